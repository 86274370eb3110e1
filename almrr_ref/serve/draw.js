// Drawing: a picture with its map and boxes on a canvas; the histogram of the calibration.
'use strict';

// A copy of a picture whose pixels `paint(data, i)` changes, data[i] to data[i + 3] being one.
function repainted(picture, paint) {
  const {width, height} = picture, canvas = new OffscreenCanvas(width, height), context = canvas.getContext('2d');
  context.drawImage(picture, 0, 0);
  const image = context.getImageData(0, 0, width, height);
  for (let i = 0; i < image.data.length; i += 4) paint(image.data, i);
  context.putImageData(image, 0, 0);
  return canvas;
}

// The map's grey -> colour and opacity: low values stay clear, high ones glow.
const heat = map => repainted(map, (data, i) => {
  const v = data[i] / 255;
  data[i] = 255;
  data[i + 1] = Math.round(220 * (1 - v));
  data[i + 2] = 0;
  data[i + 3] = Math.round(255 * Math.min(1, 1.4 * v));
});

const LARGEST = 1200;  // pixels of the longer side of what is drawn

// Draw one result: {picture, glow, answer}; the map alone where the browser cannot show the picture, such as a TIFF.
function drawResult(canvas, result, opacity, boxes) {
  const [height, width] = result.answer.size, longest = Math.max(height, width);
  const scale = Math.min(LARGEST, Math.max(320, longest)) / longest;
  canvas.width = Math.max(1, Math.round(width * scale));
  canvas.height = Math.max(1, Math.round(height * scale));
  const context = canvas.getContext('2d');
  context.fillStyle = '#333';
  context.fillRect(0, 0, canvas.width, canvas.height);
  if (result.picture) context.drawImage(result.picture, 0, 0, canvas.width, canvas.height);
  context.globalAlpha = result.picture ? opacity : 1;
  context.drawImage(result.glow, 0, 0, canvas.width, canvas.height);
  context.globalAlpha = 1;
  if (!boxes) return;
  context.lineWidth = Math.max(1.5, canvas.width / 250);
  context.strokeStyle = '#00e5ff';  // as found in the overlays; red would vanish in the map
  for (const region of result.answer.regions) {
    const [x0, y0, x1, y1] = region.box.map(value => value * scale);
    context.strokeRect(x0, y0, x1 - x0, y1 - y0);
  }
}

const logit = value => { const v = Math.min(1 - 1e-9, Math.max(1e-9, value)); return Math.log(v / (1 - v)); };
const unlogit = value => 1 / (1 + Math.exp(-value));

// Draw both groups of scores over their logit; returns a function that moves the mark to a threshold.
function drawHistogram(place, good, simulated, low, high) {
  const name = 'http://www.w3.org/2000/svg', bins = 60, width = 900, height = 190;
  const svg = document.createElementNS(name, 'svg');
  const add = (kind, attributes, text) => {
    const node = document.createElementNS(name, kind);
    for (const key in attributes) node.setAttribute(key, attributes[key]);
    if (text !== undefined) node.textContent = text;
    svg.append(node);
    return node;
  };
  const x = value => 10 + (width - 20) * (logit(value) - low) / (high - low);
  svg.setAttribute('viewBox', `0 0 ${width} ${height}`);
  svg.setAttribute('role', 'img');
  svg.setAttribute('aria-label', 'Histogram of the scores of good images and of simulated defects');
  for (const [kind, scores] of [['good', good], ['simulated', simulated]]) {
    const counts = new Array(bins).fill(0);
    for (const score of scores) {
      counts[Math.min(bins - 1, Math.max(0, Math.floor(bins * (logit(score) - low) / (high - low))))] += 1;
    }
    const most = Math.max(...counts);
    counts.forEach((count, i) => {
      if (!count) return;
      const size = 140 * Math.sqrt(count / most), step = (width - 20) / bins;
      add('rect', {class: kind, x: 10 + i * step, y: 156 - size, width: step - 1, height: size});
    });
  }
  add('path', {d: `M10 156.5H${width - 10}`});
  for (let i = 0; i <= 2; i++) {
    const value = low + i * (high - low) / 2, anchor = ['start', 'middle', 'end'][i];
    add('text', {x: 10 + i * (width - 20) / 2, y: 182, 'text-anchor': anchor}, digits(unlogit(value)));
  }
  const mark = add('path', {class: 'mark'});
  place.replaceChildren(svg);
  return value => mark.setAttribute('d', `M${x(value).toFixed(1)} 4V162`);
}
