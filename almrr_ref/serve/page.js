// The station's page. Every text that comes from a file name or the server is set as text, never as markup.
'use strict';
const $ = id => document.getElementById(id);
const percent = share => `${share < 0.1 ? Number((100 * share).toPrecision(2)) : Math.round(100 * share)}%`;

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
  if (score !== null) head.append(element('b', score.toFixed(4)));
  head.append(element('span', name));
  card.append(head);
  return card;
}

// Show a card first, and the newest `most` cards at all.
function prepend(place, card, most) {
  place.prepend(card);
  while (place.children.length > most) place.lastChild.remove();
}

async function ask(path, options) {
  const answer = await fetch(path, options);
  const content = await answer.json();
  if (!answer.ok) throw Object.assign(new Error(content.error || answer.statusText), {status: answer.status});
  return content;
}

// Views
const views = ['judge', 'region', 'threshold', 'watch', 'about'];
function show() {
  const view = views.includes(location.hash.slice(1)) ? location.hash.slice(1) : 'judge';
  for (const name of views) $(name).hidden = name !== view;
  for (const link of document.querySelectorAll('nav a')) link.classList.toggle('on', link.hash === '#' + view);
  if (view === 'region') ask('region').then(useRegion);
  if (view === 'threshold') ask('calibration').then(useCalibration);
  if (view === 'about') ask('about').then(facts => list($('facts'), Object.entries(facts)));
  scrollTo(0, 0);
}

// Watch and health
const watched = {good: 0, defective: 0, none: 0, unreadable: 0};
let last = 0;

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
  watched[row.verdict] += 1;
}

const DRIFT = {higher: 'score higher', lower: 'score lower', wider: 'spread wider', narrower: 'spread less'};

async function refresh() {
  try {
    const state = await ask(`recent?after=${last}`);
    $('folder-name').textContent = state.folder || 'No folder is watched: start with --watch DIR --out DIR.';
    for (const row of state.rows) addRow(row);
    if (state.rows.length) last = state.rows[state.rows.length - 1].number;
    const counts = Object.entries(watched).filter(([, count]) => count);
    $('counts').replaceChildren(...counts.map(([verdict, count]) => element('li', `${count} ${verdict}`)));
    const drift = state.drift.map(kind => DRIFT[kind]);
    $('drift').textContent = drift.length ? `Drift: good pictures ${drift.join(', ')} than in calibration.` : '';
    $('drift').classList.toggle('warn', drift.length > 0);
    const health = await ask('health');
    $('health').textContent = drift.length ? 'drift' : health.status;
  } catch (error) {
    $('health').textContent = `not well: ${error.message}`;
  }
  setTimeout(refresh, 1000);
}

addEventListener('hashchange', show);
addEventListener('load', () => { show(); refresh(); });
