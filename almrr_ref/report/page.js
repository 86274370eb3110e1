// The page that page.py writes: its threshold moves; verdicts, counts, order and outlines follow.
const pick = id => document.getElementById(id), read = id => JSON.parse(pick(id).textContent);
const facts = read("facts");
const rows = read("table").map(([name, score, truth, type, error]) => ({name, score, truth, type, error}));
const SHOWN = {  // outcome, in the order of the page -> what the reader sees
  error: "unreadable", miss: "missed", alarm: "false alarm", hit: "found", correct: "correct",
  bad: "defective", fine: "good", open: "not judged",
};
const labelled = rows.some(row => row.truth !== null);
const ascending = rows.filter(row => row.score !== null).sort((a, b) => a.score - b.score);
const state = {threshold: facts.threshold, order: [], current: 0};

// ---- The threshold

// How many of some values, ascending, are below a limit.
function below(values, limit, of = value => value) {
  let low = 0, high = values.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (of(values[middle]) < limit) low = middle + 1; else high = middle;
  }
  return low;
}

// All rows at the threshold by outcome, the worst first: misses lowest first, alarms highest first, found lowest first.
function judge() {
  const t = state.threshold, groups = Object.fromEntries(Object.keys(SHOWN).map(name => [name, []]));
  groups.error = rows.filter(row => row.score === null);
  const split = t === null ? 0 : below(ascending, t, row => row.score);
  ascending.forEach((row, at) => {
    const high = at >= split, bad = row.truth === 1;
    if (t === null) groups[row.truth === null ? "open" : bad ? "bad" : "fine"].push(row);
    else if (row.truth === null) groups[high ? "bad" : "fine"].push(row);
    else groups[bad ? (high ? "hit" : "miss") : high ? "alarm" : "correct"].push(row);
  });
  for (const name of ["alarm", "correct", "fine", "open"]) groups[name].reverse();
  if (!labelled) groups.bad.reverse();
  for (const name in groups) for (const row of groups[name]) row.outcome = name;
  return groups;
}

function setThreshold(value, exact = false) {
  state.threshold = value === null || exact ? value : Number(digits(value));
  update();
}

function update() {
  const groups = judge(), t = state.threshold, judging = labelled && t !== null;
  pick("counts").replaceChildren(...Object.entries(groups).filter(([name, group]) => group.length || (judging && ["miss", "alarm"].includes(name)))
    .map(([name, group]) => item(name, `${group.length} ${SHOWN[name]}${name === "alarm" && group.length !== 1 ? "s" : ""}`)));
  for (const cell of document.querySelectorAll("[data-missed]"))
    cell.textContent = groups.miss.reduce((count, row) => count + (row.type === cell.dataset.missed), 0);
  for (const option of pick("outcome").options)
    if (option.value) option.textContent = `${SHOWN[option.value]} (${groups[option.value].length})`;
  pick("threshold").value = t === null ? "" : digits(t);
  for (const slider of document.querySelectorAll(".slider")) {
    slider.value = t === null ? 1000 : plot.position(t);
    slider.setAttribute("aria-valuetext", t === null ? "none" : digits(t));
  }
  pick("promise").textContent = t === null ? "no threshold: move the slider" : promised(t);
  pick("command").textContent = t === null ? "" : `${facts.commands[pick("purpose").value]} ${t}`;
  plot.mark(t);
  arrange(groups);
}

// What the calibration says of a threshold.
function promised(t) {
  const known = facts.calibration;
  if (!known) return "";
  const good = known.good_scores, n = good.length, alarms = good.filter(score => score >= t).length;
  const [low, high] = known.intervals[alarms] ?? [known.intervals[n - 1][0], 1];
  let text = `about ${percent((alarms + 1) / (n + 1))} false alarms among new good pictures, by ${n} good ones `
    + `(95% sure: ${percent(low)} to ${percent(high)})`;
  const found = {};
  for (const [strength, score] of known.simulated_scores) (found[strength] ??= []).push(score >= t);
  const shares = Object.entries(found).sort(([a], [b]) => b - a).map(([strength, hits]) =>
    `${percent(hits.filter(Boolean).length / hits.length)} at ${percent(strength)} of their strength`);
  if (shares.length) text += `; simulated defects found: ${shares.join(", ")}`;
  return text;
}

// ---- The histogram: logits of the scores, each series as shares of its own

function item(name, text) {
  const entry = document.createElement("li"), mark = document.createElement("i");
  mark.className = name;
  entry.append(mark, text);
  return entry;
}

const plot = (() => {
  const known = facts.calibration, clip = p => logit(Math.min(Math.max(p, 1e-7), 1 - 1e-7));
  const of = truth => ascending.filter(row => row.truth === truth).map(row => row.score);
  const series = Object.entries({
    good: [of(0), "good"], defective: [of(1), "defective"], given: [of(null), "pictures"],
    calibration: [known?.good_scores ?? [], "good, in calibration"],
    simulated: [known?.simulated_scores.map(([, score]) => score) ?? [], "defects simulated in calibration"],
  }).filter(([, [values]]) => values.length).map(([name, [values, text]]) => ({name, text, values: values.map(clip)}));
  const all = series.flatMap(one => one.values).concat(facts.threshold === null ? [] : [clip(facts.threshold)]);
  const low = all.reduce((a, b) => Math.min(a, b), 0) - 0.3, high = all.reduce((a, b) => Math.max(a, b), low + 1) + 0.3;
  const position = p => 1000 * (clip(p) - low) / (high - low), svg = pick("histogram"), height = 150;
  const add = (kind, values, text = "") => {
    const part = document.createElementNS(svg.namespaceURI, kind);
    for (const name in values) part.setAttribute(name, values[name]);
    part.textContent = text;
    svg.append(part);
    return part;
  };
  let line, width;
  pick("series").replaceChildren(...series.map(one => item(one.name, `${one.values.length} ${one.text}`)));

  function drawAll() {
    width = svg.clientWidth - 20;
    svg.replaceChildren();
    svg.setAttribute("height", height + 40);
    svg.setAttribute("viewBox", `0 0 ${width + 20} ${height + 40}`);  // a print may be narrower
    const bins = Math.max(20, Math.round(width / 10)), at = x => 10 + width * x / 1000;
    const shares = series.map(({values}) => {
      const counts = new Array(bins).fill(0);
      for (const value of values) counts[Math.min(bins - 1, Math.floor(bins * (value - low) / (high - low)))]++;
      return counts.map(count => count / values.length);
    });
    const most = Math.sqrt(Math.max(...shares.flat()));
    series.forEach(({name}, number) => {
      const steps = shares[number].map(share => `V${20 + height - height * Math.sqrt(share) / most}h${width / bins}`);
      add("path", {class: name, d: `M10 ${20 + height}${steps.join("")}V${20 + height}`});
    });
    add("path", {d: `M10 ${20.5 + height}h${width}`, class: "axis"});
    const ticks = [1e-6, 1e-5, 1e-4, 1e-3, 0.01, 0.1, 0.5, 0.9, 0.99, 0.999, 0.9999, 0.99999, 0.999999];
    let last = -Infinity;
    for (const tick of ticks) {
      const x = at(position(tick));
      if (x < 10 || x > 10 + width || x - last < 44) continue;
      add("text", {x: last = x, y: height + 36, "text-anchor": "middle"}, String(tick));
    }
    line = add("path", {class: "threshold"});
    mark(state.threshold);
  }

  function mark(t) {
    const x = t === null ? null : 10 + width * Math.min(Math.max(position(t), 0), 1000) / 1000;
    line?.setAttribute("d", x === null ? "" : `M${x} 6V${20 + height}`);
  }

  const drag = event => {
    const x = 1000 * (event.clientX - svg.getBoundingClientRect().left - 10) / width;
    setThreshold(sigmoid(low + (high - low) * Math.min(Math.max(x, 0), 1000) / 1000));
  };
  svg.addEventListener("pointerdown", event => { svg.setPointerCapture(event.pointerId); drag(event); });
  svg.addEventListener("pointermove", event => event.buttons && drag(event));
  return {position, mark, drawAll, at: x => sigmoid(low + (high - low) * x / 1000)};
})();
