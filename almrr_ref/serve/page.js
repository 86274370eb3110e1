// The station's page. Every text that comes from a file name or the server is set as text, never as markup.
'use strict';
const $ = id => document.getElementById(id);

function element(kind, text, name) {
  const node = document.createElement(kind);
  if (text !== undefined) node.textContent = text;
  if (name) node.className = name;
  return node;
}

function list(place, facts) {
  place.replaceChildren(...facts.flatMap(([name, value]) => [element('dt', name), element('dd', String(value))]));
}

// The card of one picture, with verdict, score and name as its head.
function pictureCard(verdict, score, name) {
  const card = element('article'), head = element('h3');
  head.append(element('b', verdict === 'none' ? 'no threshold' : verdict, 'badge ' + verdict));
  if (score !== null) head.append(element('b', digits(score)));
  head.append(element('span', name));
  card.append(head);
  return card;
}

// Show a card first, and the newest `most` cards at all.
function prepend(place, card, most) {
  place.prepend(card);
  while (place.children.length > most) place.lastChild.remove();
}

// JSON of the server; an error says what it answered, and has no `status` where there was no answer at all.
async function ask(path, options) {
  const answer = await fetch(path, options).catch(() => { throw new Error('the server does not answer'); });
  const text = await answer.text();
  const json = (answer.headers.get('content-type') || '').includes('json');
  const content = json ? JSON.parse(text) : {error: text};
  if (!answer.ok) throw Object.assign(new Error(content.error || answer.statusText), {status: answer.status});
  return content;
}

// Views
const views = ['judge', 'region', 'threshold', 'watch', 'about'];
function show() {
  const view = views.includes(location.hash.slice(1)) ? location.hash.slice(1) : 'judge';
  for (const name of views) $(name).hidden = name !== view;
  for (const link of document.querySelectorAll('nav a')) {
    link.classList.toggle('on', link.hash === '#' + view);
    link.ariaCurrent = link.hash === '#' + view ? 'page' : null;
  }
  fill();
  scrollTo(0, 0);
}

// Ask for what the view shows; without an answer it stays as it is, and the head of the page says why.
function fill() {
  const useAbout = facts => list($('facts'), Object.entries(facts));
  const warn = content => { $('outdated').hidden = !content.outdated; };
  for (const [view, path, use] of [
    ['judge', 'region', warn], ['region', 'region', useRegion], ['threshold', 'calibration', useCalibration], ['about', 'about', useAbout],
  ]) if (!$(view).hidden) ask(path).then(use, () => {});
}

// Watch and health
let last = 0, well = true;  // number of the last row; whether the server answers

function addRow(row) {
  const card = pictureCard(row.verdict, row.score, row.path);
  if (row.picture) {
    const image = element('img');
    image.src = `recent/${row.number}.jpg`;
    image.loading = 'lazy';
    image.alt = row.path;
    card.append(image);
  }
  if (row.error) card.append(element('p', row.error));
  prepend($('rows'), card, 60);
}

const DRIFT = {higher: 'score higher', lower: 'score lower', wider: 'spread wider', narrower: 'spread less'};

async function refresh() {
  try {
    const state = await ask(`recent?after=${last}`);
    $('folder-name').textContent = state.folder || 'No folder is watched: start with --watch DIR --out DIR.';
    for (const row of state.rows) addRow(row);
    if (state.rows.length) last = state.rows[state.rows.length - 1].number;
    const counts = Object.entries(state.counts).filter(([, count]) => count);
    $('counts').replaceChildren(...counts.map(([verdict, count]) => element('li', `${count} ${verdict}`)));
    $('earlier').hidden = counts.reduce((sum, [, count]) => sum + count, 0) <= $('rows').children.length;
    const drift = state.drift.map(kind => DRIFT[kind]);
    $('drift').textContent = drift.length ? `Drift: good pictures ${drift.join(', ')} than in calibration.` : '';
    $('drift').classList.toggle('warn', drift.length > 0);
    const health = await ask('health');
    $('health').textContent = health.error || (drift.length ? 'drift' : health.status);
    $('health').classList.toggle('warn', Boolean(health.error));
    if (!well) fill();
    well = true;
  } catch (error) {
    $('health').textContent = `not well: ${error.message}`;
    $('health').classList.add('warn');
    well = false;
  }
  setTimeout(refresh, 1000);
}

addEventListener('hashchange', show);
document.addEventListener('visibilitychange', () => document.hidden || fill());  // another page may have saved
addEventListener('load', () => { show(); refresh(); });
