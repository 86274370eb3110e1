// The view Threshold: what another threshold would promise and find; saves it.
'use strict';
let calibration = null, low = 0, high = 1, mark = () => {}, chosen = 0;
const SET_BY = {fpr: 'false-positive rate', balanced: 'balance', 'by hand': 'hand'};

function useCalibration(content) {
  if (JSON.stringify(content) === JSON.stringify(calibration)) return;
  if (!calibration || chosen === calibration.threshold) chosen = content.threshold;  // else it is being chosen, and stays
  calibration = content;
  const good = content.good_scores, simulated = content.simulated_scores.map(entry => entry[1]);
  $('none').hidden = good.length > 0 || Boolean(content.fixed);
  $('exported').textContent = content.fixed && `No threshold can be set: ${content.fixed}.`;
  $('exported').hidden = !content.fixed;
  $('tune').hidden = !good.length;
  const rows = [...content.thresholds].reverse().map(entry => {
    const row = element('tr');
    const cells = [digits(entry.value), SET_BY[entry.operating_point] || '', entry.rate === undefined ? '' :
      percent(entry.rate), entry.images === undefined ? '' : entry.images];
    row.append(...cells.map(cell => element('td', cell)));
    return row;
  });
  $('history').replaceChildren(...rows);
  if (!good.length) return;
  const all = [...good, ...simulated, content.threshold].map(logit);
  low = Math.min(...all) - 0.2;
  high = Math.max(...all) + 0.2;
  mark = drawHistogram($('chart'), good, simulated, low, high);
  const entries = [['good', `${good.length} good images`], ['simulated', `${simulated.length} simulated defects`]];
  $('legend').replaceChildren(...entries.map(([name, text]) => {
    const item = element('li');
    item.append(element('i', '', name), text);
    return item;
  }));
  choose(chosen);
}

function choose(value) {
  chosen = value;
  $('value').value = digits(value);
  $('slider').value = 1000 * (logit(value) - low) / (high - low);
  mark(value);
  const {good_scores: good, intervals, simulated_scores: simulated} = calibration;
  const alarms = good.filter(score => score >= value).length, rate = Math.min(1, (alarms + 1) / (good.length + 1));
  const [from, to] = intervals[alarms] ?? [intervals.at(-1)[0], 1];
  const sure = `(95% sure: ${percent(from)} to ${percent(to)})`;
  const facts = [['false alarms expected', `${percent(rate)} of good images ${sure}`],
    ['good images of the calibration at or above it', `${alarms} of ${good.length}`]];
  for (const strength of [...new Set(simulated.map(entry => entry[0]))].sort((a, b) => b - a)) {
    const scores = simulated.filter(entry => entry[0] === strength);
    const found = scores.filter(entry => entry[1] >= value).length;
    facts.push([`simulated defects found, strength ${percent(strength)}`, percent(found / scores.length)]);
  }
  list($('promise'), facts);
  $('save').disabled = !calibration.changeable || value === calibration.threshold;
}

async function save() {
  $('saved').textContent = '';
  try {
    const content = await ask('threshold', {method: 'POST', body: JSON.stringify({value: chosen})});
    useCalibration(content);
    $('saved').textContent = `saved: ${digits(content.threshold)}`;
  } catch (error) {
    $('saved').textContent = `not saved: ${error.message}`;
  }
}

$('slider').addEventListener('input', event => choose(unlogit(low + event.target.value / 1000 * (high - low))));
$('value').addEventListener('change', event => {
  const value = Number(event.target.value);
  choose(event.target.value !== '' && value >= 0 && value <= 1 ? value : chosen);
});
$('save').addEventListener('click', save);
$('back').addEventListener('click', () => choose(calibration.threshold));
