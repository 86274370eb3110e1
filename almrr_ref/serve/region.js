// The view Region: polygons drawn over the last picture; once they are saved, only their inside is judged.
'use strict';
const NEAR = 12;  // pixels: a click this close to the first corner closes the polygon
const STEP = 0.01;  // of the picture: one move of the cross by a key
const region = {mask: null, name: '', result: null, polygons: [], corners: [], cross: null};

async function useRegion(content) {
  const share = content.share < 1 ? `${percent(content.share)} of a picture is judged` : 'All of a picture is judged';
  const remedy = 'The threshold is not calibrated for this region: run python -m almrr_ref.calibrate with good images.';
  $('judged').textContent = content.outdated ? `${share}. ${remedy}` : `${share}.`;
  $('judged').classList.toggle('warn', content.outdated);
  $('fixed').textContent = content.fixed && `No region can be drawn: ${content.fixed}.`;
  $('fixed').hidden = !content.fixed;
  $('draw').hidden = Boolean(content.fixed);
  $('whole').disabled = content.share === 1;
  region.mask = shade(await createImageBitmap(await (await fetch('region.png')).blob()));
  drawRegion();
}

// The mask -> black over what is not judged.
const shade = mask => repainted(mask, (data, i) => {
  data[i + 3] = data[i] ? 0 : 170;
  data[i] = data[i + 1] = data[i + 2] = 0;
});

// Take the picture of a result to draw on; called with every new one.
function drawOver(name, result) {
  Object.assign(region, {name, result});
  drawRegion();
}

function drawRegion() {
  const canvas = $('region-canvas'), context = canvas.getContext('2d'), {mask, result, polygons, corners} = region;
  if (!mask || $('region').hidden) return;
  const picture = element('canvas'), unit = devicePixelRatio;
  if (result) drawResult(picture, result, 0, false);
  else [picture.width, picture.height] = [mask.width, mask.height];
  canvas.style.width = `min(100%, ${70 * picture.width / picture.height}vh)`;
  const width = canvas.width = Math.round(unit * canvas.clientWidth);
  const height = canvas.height = Math.round(width * picture.height / picture.width);
  context.fillStyle = '#777';
  context.fillRect(0, 0, width, height);
  context.drawImage(picture, 0, 0, width, height);
  context.imageSmoothingEnabled = false;
  context.drawImage(mask, 0, 0, width, height);
  for (const [drawn, closed] of [...polygons.map(polygon => [polygon, true]), [corners, false]]) {
    context.beginPath();
    for (const [x, y] of drawn) context.lineTo(x * width, y * height);
    if (closed) context.closePath();
    else if (drawn.length && region.cross) context.lineTo(region.cross[0] * width, region.cross[1] * height);
    context.fillStyle = '#2f8fff33';
    if (closed) context.fill();
    for (const [colour, thick] of [['#000', 4], ['#5cf', 2]]) {
      Object.assign(context, {strokeStyle: colour, lineWidth: thick * unit});
      context.stroke();
    }
    context.fillStyle = '#fff';
    for (const [x, y] of drawn) context.fillRect(x * width - 3 * unit, y * height - 3 * unit, 6 * unit, 6 * unit);
  }
  if (region.cross) drawCross(context, region.cross[0] * width, region.cross[1] * height, unit);
  const shown = result && region.name + (result.picture ? '' : MAP_ALONE);
  $('region-name').textContent = shown || 'Judge, drop or choose a picture to draw on.';
  $('close-polygon').disabled = corners.length < 3;
  $('undo-corner').disabled = !corners.length && !polygons.length;
  $('clear-region').disabled = $('undo-corner').disabled;
  $('save-region').disabled = !polygons.length || corners.length > 0;
}

function drawCross(context, x, y, unit) {
  for (const [colour, thick] of [['#000', 3], ['#fff', 1]]) {
    Object.assign(context, {strokeStyle: colour, lineWidth: thick * unit});
    context.beginPath();
    for (const [dx, dy] of [[12, 0], [0, 12]]) {
      context.moveTo(x - dx * unit, y - dy * unit);
      context.lineTo(x + dx * unit, y + dy * unit);
    }
    context.stroke();
  }
}

function tell(text) {
  $('region-said').textContent = text;
  $('region-saved').textContent = '';
  drawRegion();
}

function setCorner(corner) {
  region.corners.push(corner);
  tell(`Corner ${region.corners.length} at ${percent(corner[0])} from the left, ${percent(corner[1])} from the top.`);
}

function closePolygon() {
  if (region.corners.length < 3) return tell('A polygon has three corners or more.');
  region.polygons.push(region.corners);
  region.corners = [];
  tell(`Polygon ${region.polygons.length} is closed; save the region, or draw another one.`);
}

// Take the last corner back; without one the last polygon is open again.
function undoCorner() {
  if (!region.corners.length) region.corners = region.polygons.pop() || [];
  else region.corners.pop();
  tell(`${region.corners.length} corners, ${region.polygons.length} polygons.`);
}

function dropPolygon(all = false) {
  region.corners = [];
  if (all) region.polygons = [];
  tell(all ? 'Nothing is drawn.' : 'The polygon is dropped.');
}

async function saveRegion(polygons) {
  $('region-saved').textContent = '';
  try {
    await useRegion(await ask('region', {method: 'POST', body: JSON.stringify({polygons})}));
    Object.assign(region, {polygons: [], corners: []});
    tell('');
    $('region-saved').textContent = 'saved';
  } catch (error) {
    $('region-saved').textContent = `not saved: ${error.message}`;
  }
}

// Where an event is, in 0..1 of the picture.
function placeOf(event) {
  const box = $('region-canvas').getBoundingClientRect();
  const shares = [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
  return shares.map(share => Math.min(1, Math.max(0, share)));
}

function clicked(event) {
  const canvas = $('region-canvas'), corner = placeOf(event), [first] = region.corners;
  region.cross = corner;
  const sides = [canvas.clientWidth, canvas.clientHeight];
  const away = first && Math.hypot(...sides.map((side, i) => side * (corner[i] - first[i])));
  if (region.corners.length > 2 && (event.detail > 1 || away < NEAR)) closePolygon();
  else if (event.detail < 2) setCorner(corner);
}

// A line to the mouse shows the edge to come.
function moved(event) {
  if (!region.corners.length || event.pointerType !== 'mouse') return;
  region.cross = placeOf(event);
  drawRegion();
}

function pressed(event) {
  const step = event.shiftKey ? 10 * STEP : STEP, [x, y] = region.cross || [0.5, 0.5];
  const clamp = value => Math.min(1, Math.max(0, Math.round(value * 100) / 100));
  const moves = {ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step]};
  const actions = {' ': () => setCorner([x, y]), Enter: closePolygon, Backspace: undoCorner, Escape: () => dropPolygon()};
  if (event.ctrlKey || event.altKey || event.metaKey || !(event.key in moves || event.key in actions)) return;
  event.preventDefault();
  if (event.key in moves) {
    region.cross = [clamp(x + moves[event.key][0]), clamp(y + moves[event.key][1])];
    tell(`${percent(region.cross[0])} from the left, ${percent(region.cross[1])} from the top`);
  } else {
    if (event.key === ' ') region.cross = [x, y];
    actions[event.key]();
  }
}

$('region-canvas').addEventListener('click', clicked);
$('region-canvas').addEventListener('pointermove', moved);
$('region-canvas').addEventListener('keydown', pressed);
$('close-polygon').addEventListener('click', closePolygon);
$('undo-corner').addEventListener('click', undoCorner);
$('clear-region').addEventListener('click', () => dropPolygon(true));
$('save-region').addEventListener('click', () => saveRegion(region.polygons));
$('whole').addEventListener('click', () => saveRegion([]));
addEventListener('resize', drawRegion);
