// The view Judge: pictures that are dropped, chosen, pasted or taken by the camera are sent and drawn.
'use strict';
const SENT_AT_ONCE = 2, SHOWN = 200, TRIES = 3;
const MAP_ALONE = '; browsers do not show such a file: the map alone';
const waiting = [], results = [];
const tally = {good: 0, defective: 0, none: 0, unreadable: 0, 'not judged': 0};
let sending = 0;

function take(files) {
  waiting.push(...files);
  for (let i = sending; i < SENT_AT_ONCE; i++) next();
}

async function next() {
  if (!waiting.length || sending >= SENT_AT_ONCE) return;
  sending += 1;
  const file = waiting.shift();
  try {
    await judge(file);
  } finally {
    sending -= 1;
    next();
  }
}

async function judge(file) {
  const name = file.path || file.webkitRelativePath || file.name || 'pasted picture';
  try {
    const body = await file.arrayBuffer();
    if (!body.byteLength) throw Object.assign(new Error('the file is empty'), {status: 422});
    let content, failures = 0;
    while (!content) {
      try {
        content = await ask('judge?map=inline', {method: 'POST', body});
      } catch (error) {  // a busy server, and one that is gone for a while, is asked again
        const busy = error.status === 503 && !error.message.includes('memory');
        if (error.status && error.status !== 503) throw error;
        if (!busy && (well || error.status) && ++failures >= TRIES) throw error;
        await new Promise(resolve => setTimeout(resolve, 1000));
      }
    }
    const bytes = Uint8Array.from(atob(content.map), c => c.charCodeAt(0));
    const [height, width] = content.size, scale = Math.min(1, LARGEST / Math.max(height, width));
    const small = {  // hundreds are kept, decoded
      resizeWidth: Math.ceil(width * scale), resizeHeight: Math.ceil(height * scale), resizeQuality: 'high',
    };
    const whole = await createImageBitmap(new Blob([bytes], {type: 'image/png'}));
    const map = Math.max(whole.width, whole.height) > LARGEST ? await createImageBitmap(whole, small) : whole;
    const picture = await createImageBitmap(file, small).catch(() => null);
    addResult(name, {answer: content, glow: heat(map), picture});
  } catch (error) {
    addResult(name, null, error.message, error.status === 422 ? 'unreadable' : 'not judged');
  }
}

function addResult(name, result, problem, verdict = result.answer.verdict) {
  const card = pictureCard(verdict, result ? result.answer.score : null, name);
  if (result) {
    result.canvas = element('canvas');
    redraw(result);
    const {regions, seconds, size} = result.answer;
    const count = regions.length === 1 ? '1 region' : `${regions.length} regions`;
    card.append(result.canvas, element('p',
      `${count}, ${size[1]}x${size[0]} pixels, ${Math.round(1000 * seconds)} ms${result.picture ? '' : MAP_ALONE}`));
    results.unshift(result);
    results.splice(SHOWN);
    drawOver(name, result);
  } else {
    card.append(element('p', problem));
    if (!$('region').hidden) tell(`${name}: ${problem}`);
  }
  prepend($('results'), card, SHOWN);
  tally[verdict] += 1;
  $('tally').textContent = Object.entries(tally).filter(([, n]) => n).map(([k, n]) => `${n} ${k}`).join(', ');
}

function redraw(result) {
  drawResult(result.canvas, result, $('opacity').value / 100, $('boxes').checked);
}

// A dropped folder comes as an entry; its files are read in groups until none is left. Each gets its path in the folder.
async function filesBelow(entry) {
  const path = entry.fullPath.slice(1), files = [];
  try {
    if (entry.isFile) return [Object.assign(await new Promise((resolve, reject) => entry.file(resolve, reject)), {path})];
    const reader = entry.createReader();
    for (;;) {
      const group = await new Promise((resolve, reject) => reader.readEntries(resolve, reject));
      if (!group.length) return files;
      for (const below of group) files.push(...await filesBelow(below));
    }
  } catch (error) {
    return [...files, {path, name: entry.name, arrayBuffer: () => Promise.reject(error)}];  // its card says why
  }
}

const visible = files => files.filter(file => !file.name.startsWith('.'));

async function dropped(event) {
  event.preventDefault();
  $('drop').classList.remove('over');
  if ($('judge').hidden && $('region').hidden) location.hash = 'judge';  // where the results are
  const entries = [...event.dataTransfer.items].map(item => item.webkitGetAsEntry && item.webkitGetAsEntry());
  if (!entries.some(entry => entry && entry.isDirectory)) return take(event.dataTransfer.files);
  for (const entry of entries.filter(Boolean)) {
    take(visible(await filesBelow(entry)));
  }
}

function say(text) {
  $('problem').textContent = text;
  $('problem').hidden = !text;
}

let stream = null;
async function camera() {
  say('');
  if (!navigator.mediaDevices) return say('Browsers give the camera only to pages of this machine or over https.');
  let fresh;
  try {
    fresh = await navigator.mediaDevices.getUserMedia({video: {width: {ideal: 4096}, height: {ideal: 4096}}});
  } catch (error) {
    return say(`No camera: ${error.message}`);
  }
  stopCamera();  // the one before: nothing else would
  stream = fresh;
  $('video').srcObject = stream;
  await $('video').play();
  $('live').hidden = false;
}

function stopCamera() {
  if (stream) for (const track of stream.getTracks()) track.stop();
  $('live').hidden = true;
}

function shoot() {
  const video = $('video'), canvas = element('canvas');
  canvas.width = video.videoWidth;
  canvas.height = video.videoHeight;
  canvas.getContext('2d').drawImage(video, 0, 0);
  const name = `frame ${new Date().toLocaleTimeString()}.png`;
  canvas.toBlob(blob => take([new File([blob], name, {type: 'image/png'})]), 'image/png');
}

addEventListener('paste', event => take([...event.clipboardData.files]));
addEventListener('dragover', event => { event.preventDefault(); $('drop').classList.add('over'); });
addEventListener('dragleave', () => $('drop').classList.remove('over'));
addEventListener('drop', dropped);
for (const id of ['files', 'folder', 'region-file']) {
  $(id).addEventListener('change', event => {
    const files = [...event.target.files];
    take(id === 'folder' ? visible(files) : files);
    event.target.value = '';
  });
}
for (const id of ['opacity', 'boxes']) $(id).addEventListener('input', () => results.forEach(redraw));
$('camera').addEventListener('click', camera);
$('shoot').addEventListener('click', shoot);
$('stop').addEventListener('click', stopCamera);
