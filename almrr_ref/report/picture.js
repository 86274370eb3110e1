// One picture: loads its layers (layers.py), finds regions, and draws map, outlines, boxes and mask at any threshold.
const logit = p => Math.log(p / (1 - p)), sigmoid = x => 1 / (1 + Math.exp(-x));

// A file of layers calls this: its script element waits for them.
function layers(content) { document.currentScript.take(content); }

// Load a file of layers -> what decode gives.
function loadLayers(address) {
  return new Promise((resolve, reject) => {
    const script = document.createElement("script");
    script.take = content => { script.remove(); resolve(decode(content)); };
    script.onerror = () => { script.remove(); reject(new Error(address + " is missing")); };
    script.src = address;
    document.head.append(script);
  });
}

// Data URLs -> the picture, and the bytes of levels and mask, all of one size.
async function decode(content) {
  const load = async source => { const image = new Image(); image.src = source; await image.decode(); return image; };
  const [picture, levels, mask] = await Promise.all(
    [content.picture, content.levels, content.mask].map(source => source && load(source)));
  const map = {...content, picture, w: levels.width, h: levels.height, levels: bytes(levels), mask: mask && bytes(mask)};
  map.highestLevel = map.levels.reduce((most, level) => Math.max(most, level), 0);
  return map;
}

function bytes(image) {
  const context = sheet(image.width, image.height);
  context.drawImage(image, 0, 0);
  return context.getImageData(0, 0, image.width, image.height).data.filter((_, at) => at % 4 === 0);
}

function sheet(width, height) {
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [width, height];
  return canvas.getContext("2d", {willReadFrequently: true});
}

// The lowest level of a region, and of its peak, as region_levels in result.py chooses them.
function regionLevels(map, threshold, facts) {
  if (!threshold) return [1, 1];  // all that is judged
  const limit = logit(Math.min(Math.max(threshold, 1e-9), 1 - 1e-9));
  const wanted = Math.min(threshold < 1 ? limit + facts.offset : limit, map.highest);
  const edge = Math.min(wanted, (map.highest + map.median) / 2);
  const level = Math.max(1, Math.min(128 + Math.round((edge - map.centre) / facts.step), map.highestLevel));
  return [level, Math.min(level + Math.floor((wanted - edge) / facts.step), map.highestLevel)];
}

// Pixels at a level and above, connected also by their corners, one of them at that of a peak -> regions, and the
// outline of them all. A box is [x0, y0, x1, y1] in pixels of the map, half open.
function findRegions(map, level, peak) {
  const {w, h, levels} = map, pixels = new Uint8Array(w * h), regions = [];
  for (let start = 0; start < w * h; start++) {
    if (levels[start] < peak || pixels[start]) continue;
    const one = {box: [w, h, 0, 0], area: 0}, open = [start];
    regions.push(one);
    pixels[start] = 1;
    while (open.length) {
      const at = open.pop(), x = at % w, y = (at - x) / w;
      one.area++;
      one.box = [Math.min(one.box[0], x), Math.min(one.box[1], y), Math.max(one.box[2], x + 1), Math.max(one.box[3], y + 1)];
      for (let v = Math.max(y - 1, 0); v <= Math.min(y + 1, h - 1); v++)
        for (let u = Math.max(x - 1, 0); u <= Math.min(x + 1, w - 1); u++)
          if (levels[v * w + u] >= level && !pixels[v * w + u]) {
            pixels[v * w + u] = 1;
            open.push(v * w + u);
          }
    }
  }
  return {regions: regions.sort((a, b) => b.area - a.area), outline: outline(pixels, w, h)};
}

// The edges between pixels that are set and others, as a path in pixels of the map.
function outline(pixels, w, h) {
  const path = new Path2D();
  const edge = (x, y, u, v) => { path.moveTo(x, y); path.lineTo(u, v); };
  for (let y = 0; y < h; y++)
    for (let x = 0; x < w; x++) {
      if (!pixels[y * w + x]) continue;
      if (!x || !pixels[y * w + x - 1]) edge(x, y, x, y + 1);
      if (x === w - 1 || !pixels[y * w + x + 1]) edge(x + 1, y, x + 1, y + 1);
      if (!y || !pixels[(y - 1) * w + x]) edge(x, y, x + 1, y);
      if (y === h - 1 || !pixels[(y + 1) * w + x]) edge(x, y + 1, x + 1, y + 1);
    }
  return path;
}

// Regions of a picture at a threshold; none of a good one. The last answer is kept.
function regionsAt(map, score, threshold, facts) {
  const [level, peak] = threshold === null || score < threshold ? [256, 256] : regionLevels(map, threshold, facts);
  if (map.last?.level !== level || map.last.peak !== peak) map.last = {level, peak, ...findRegions(map, level, peak)};
  return map.last;
}

// The map in its colours, more opaque where it is higher, on the scale from 0 to 1.
function heat(map, facts) {
  if (map.heat) return map.heat;
  const context = sheet(map.w, map.h), image = context.createImageData(map.w, map.h);
  map.levels.forEach((level, at) => {
    const value = sigmoid(map.centre + facts.step * (level - 127.5)), colour = 6 * Math.round(255 * value);
    for (let c = 0; c < 3; c++) image.data[4 * at + c] = parseInt(facts.colours.substr(colour + 2 * c, 2), 16);
    image.data[4 * at + 3] = 255 * Math.sqrt(value);
  });
  context.putImageData(image, 0, 0);
  return map.heat = context.canvas;
}

// Draw a picture into a canvas that has its shape; view: opacity of the map, and which of outlines, boxes, mask.
function draw(canvas, map, found, view, facts) {
  const context = canvas.getContext("2d"), {width, height} = canvas;
  context.imageSmoothingQuality = "high";
  context.filter = view.opacity ? "grayscale(1)" : "none";
  context.drawImage(map.picture, 0, 0, width, height);
  context.filter = "none";
  context.globalAlpha = view.opacity;
  context.drawImage(heat(map, facts), 0, 0, width, height);
  context.globalAlpha = 1;
  const stroke = (path, colour, thick) => {
    const scaled = new Path2D();
    scaled.addPath(path, {a: width / map.w, d: height / map.h});  // not the lines' width: the map may be squashed
    [context.strokeStyle, context.lineWidth] = [colour, thick * devicePixelRatio];
    context.stroke(scaled);
  };
  if (view.mask && map.mask) stroke(map.truth ??= outline(map.mask, map.w, map.h), "#ff48d0", 2);
  if (view.outlines) stroke(found.outline, "#00e5ff", 2);
  if (!view.boxes) return;
  const boxes = new Path2D();
  for (const {box: [x0, y0, x1, y1]} of found.regions) boxes.rect(x0, y0, x1 - x0, y1 - y0);
  stroke(boxes, "#ffd600", 1.5);
}

// Boxes and areas of regions in pixels of the picture itself: as in boxes.json, or somewhat larger by a reduced map.
function inPixels(map, regions) {
  const [height, width] = map.size, {w, h} = map;
  return regions.map(({box: [x0, y0, x1, y1], area}) => ({
    box: [Math.floor(x0 * width / w), Math.floor(y0 * height / h), Math.ceil(x1 * width / w), Math.ceil(y1 * height / h)],
    area: Math.max(1, Math.round(area * width * height / (w * h))),
  }));
}
