// The pictures of the page: a list of which only what is in view exists, one picture large, keys.

const GAP = 12, HEAD = 44;  // between cards; height of a card without its pictures
const list = pick("rows"), viewer = pick("viewer");
const cards = new Map();  // place in the order -> card
const loaded = new Map();  // row -> promise of its layers, the latest used last
rows.forEach((row, number) => { row.layers = `./layers/${Math.floor(number / 1000)}/${number % 1000}.js`; });

function layersOf(row) {
  const known = loaded.get(row) ?? loadLayers(row.layers);
  loaded.delete(row);
  loaded.set(row, known);
  if (loaded.size > 120) loaded.delete(loaded.keys().next().value);
  return known;
}

// ---- The list

// Filter the groups of judge() and show them; a picture that is shown large stays among them.
function arrange(groups) {
  const type = pick("type").value, outcome = pick("outcome").value, name = pick("name").value.toLowerCase();
  const large = viewer.open && state.order[state.current];
  state.order = Object.values(groups).flat().filter(row => row === large || ((!type || row.type === type)
    && (!outcome || row.outcome === outcome) && (!name || row.name.toLowerCase().includes(name))));
  state.current = large ? state.order.indexOf(large) : Math.max(0, Math.min(state.current, state.order.length - 1));
  pick("shown").textContent = state.order.length + (state.order.length === 1 ? " picture" : " pictures");
  cards.clear();
  list.replaceChildren();
  paint();
  if (viewer.open) showLarge();
}

function sizes() {
  const width = list.clientWidth, columns = Math.max(1, Math.floor((width + GAP) / (430 + GAP)));
  const wide = (width - GAP * (columns - 1)) / columns;
  const panel = Math.floor((wide - 34) / 2);
  return {columns, wide, panel, high: HEAD + (facts.pictures ? panel + 8 : 0)};
}

// Make the cards that are in view, or a screen away from it.
function paint() {
  const {columns, wide, panel, high} = sizes(), step = high + GAP, top = -list.getBoundingClientRect().top;
  list.style.height = `${Math.ceil(state.order.length / columns) * step}px`;
  const first = columns * Math.max(0, Math.floor((top - innerHeight / 2) / step));
  const end = Math.min(state.order.length, columns * Math.ceil((top + 1.5 * innerHeight) / step));
  for (const [place, card] of cards) if (place < first || place >= end) { card.remove(); cards.delete(place); }
  for (let place = first; place < end; place++) {
    if (!cards.has(place)) {
      const card = makeCard(state.order[place], place, panel);
      cards.set(place, card);
      list.append(card);
    }
    cards.get(place).style.cssText = `width:${wide}px;height:${high}px;left:${place % columns * (wide + GAP)}px;`
      + `top:${Math.floor(place / columns) * step}px;order:${place}`;
    cards.get(place).classList.toggle("current", place === state.current);
    cards.get(place).ariaSelected = String(place === state.current);
  }
  list.setAttribute("aria-activedescendant", `card${state.current}`);
}

function heading(row) {
  const head = document.createElement("h3");
  const part = (kind, text, name = "") => {
    head.append(Object.assign(document.createElement(kind), {textContent: text, className: name}));
  };
  part("span", SHOWN[row.outcome], `badge ${row.outcome}`);
  if (row.score !== null) part("b", digits(row.score));
  if (row.type) part("em", row.type);
  part("span", row.name, "name");
  head.title = row.name;
  return head;
}

function makeCard(row, place, panel) {
  const card = Object.assign(document.createElement("article"),
    {role: "option", id: `card${place}`, ariaPosInSet: String(place + 1), ariaSetSize: String(state.order.length)});
  card.append(heading(row));
  card.addEventListener("click", () => { select(place); openLarge(); });
  if (row.error) card.append(Object.assign(document.createElement("p"), {className: "why", textContent: row.error}));
  else if (facts.pictures) {
    const panels = Object.assign(document.createElement("div"), {className: "panels"});
    card.append(panels);
    layersOf(row).then(map => {
      for (const view of [{opacity: 0}, viewNow()]) {
        const canvas = shaped(map, panel, panel);
        draw(canvas, map, regionsAt(map, row.score, state.threshold, facts), view, facts);
        panels.append(canvas);
      }
    }, error => { panels.textContent = error.message; });
  }
  return card;
}

// A canvas of the picture's shape that fits into a width and height.
function shaped(map, width, height) {
  const [h, w] = map.size, scale = Math.min(width / w, height / h), canvas = document.createElement("canvas");
  canvas.style.cssText = `width:${w * scale}px;height:${h * scale}px`;
  [canvas.width, canvas.height] = [w, h].map(side => Math.max(1, Math.round(side * scale * devicePixelRatio)));
  return canvas;
}

function viewNow() {
  const on = Object.fromEntries(["outlines", "boxes", "mask"].map(id => [id, pick(id).checked]));
  return {...on, opacity: pick("opacity").value / 100};
}

// Make the picture at a place the current one, and bring it into view.
function select(place) {
  state.current = Math.min(Math.max(place, 0), state.order.length - 1);
  const {columns, high} = sizes(), bar = document.querySelector("nav").offsetHeight;
  const y = list.getBoundingClientRect().top + Math.floor(state.current / columns) * (high + GAP);
  if (y < bar) scrollBy(0, y - bar - GAP);
  else if (y + high > innerHeight) scrollBy(0, y + high + GAP - innerHeight);
  paint();
}

// ---- One picture, large

function openLarge() {
  if (!state.order.length) return;
  pick("controls").append(pick("tools"));
  viewer.showModal();
  viewer.focus();
  showLarge();
}

pick("close").addEventListener("click", () => viewer.close());
viewer.addEventListener("close", () => { pick("place").append(pick("tools")); update(); list.focus({preventScroll: true}); });

async function showLarge() {
  const row = state.order[state.current], canvas = viewer.querySelector("canvas");
  pick("head").replaceChildren(heading(row));
  canvas.hidden = row.error || !facts.pictures;
  if (canvas.hidden) return pick("regions").textContent = row.error || "no pictures were written";
  const map = await layersOf(row).catch(error => { pick("regions").textContent = error.message; });
  if (!map || row !== state.order[state.current]) return;
  const found = regionsAt(map, row.score, state.threshold, facts);
  const large = shaped(map, Math.min(innerWidth - 60, 1100), innerHeight - 220);
  viewer.querySelector("canvas").replaceWith(large);  // another call may have replaced it meanwhile
  draw(large, map, found, viewNow(), facts);
  const listed = inPixels(map, found.regions).map(({box: [x0, y0, x1, y1], area}) =>
    `${x1 - x0} x ${y1 - y0} at (${x0}, ${y0}), area ${area}`);
  const shown = listed.slice(0, 8).join("; ") + (listed.length > 8 ? "; ..." : "");
  const regions = `${listed.length} region${listed.length > 1 ? "s" : ""}, in pixels${map.reduced ? ", about" : ""}: ${shown}`;
  pick("regions").textContent = listed.length ? regions : "no region";
}

function redraw() {
  if (viewer.open) return showLarge();
  cards.clear();
  list.replaceChildren();
  paint();
}

// ---- Keys and controls

document.addEventListener("keydown", event => {
  const {columns} = sizes(), key = event.key, large = viewer.open;
  const moves = {ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns, Home: -Infinity, End: Infinity};
  const switches = {o: "outlines", b: "boxes", m: "mask"};
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input:not([type=checkbox]),select")) return;
  if (event.target.matches("input,button") && (key === " " || key === "Enter")) return;
  if (large && (key === "ArrowUp" || key === "ArrowDown")) {
    pick("opacity").value = Number(pick("opacity").value) + (key === "ArrowUp" ? 10 : -10);
    showLarge();
  } else if (key in moves) {
    select(state.current + moves[key]);
    if (large) showLarge();
  } else if (key === " " || key === "Enter") {
    if (large) viewer.close(); else openLarge();
  } else if (key in switches) {
    pick(switches[key]).click();
  } else return;
  event.preventDefault();
});

function option(value, text) { return Object.assign(document.createElement("option"), {value, textContent: text}); }

const types = {};
for (const row of rows) if (row.type) types[row.type] = (types[row.type] ?? 0) + 1;
pick("type").append(option("", "all"), ...Object.keys(types).sort().map(name => option(name, `${name} (${types[name]})`)));
pick("type").parentElement.hidden = !Object.keys(types).length;
pick("outcome").append(option("", "all"), ...Object.keys(SHOWN).map(name => option(name, SHOWN[name])));
for (const label of pick("tools").querySelectorAll("label:not(:first-child)")) label.hidden = !facts.pictures;
pick("of-mask").hidden ||= !labelled;
pick("purpose").append(...Object.keys(facts.commands).map(name => option(name, name)));
pick("keep").hidden = !Object.keys(facts.commands).length;
for (const id of ["type", "outcome", "name", "purpose"]) pick(id).addEventListener("input", update);
for (const id of ["opacity", "outlines", "boxes", "mask"]) pick(id).addEventListener("input", redraw);
for (const slider of document.querySelectorAll(".slider"))
  slider.addEventListener("input", () => setThreshold(plot.at(slider.value)));
pick("threshold").addEventListener("change", event => {
  const value = Number(event.target.value);
  if (event.target.value.trim() && value >= 0 && value <= 1) setThreshold(value, true); else update();
});
pick("reset").addEventListener("click", () => setThreshold(facts.threshold, true));
pick("copy").addEventListener("click", async () => {
  getSelection().selectAllChildren(pick("command"));
  const written = navigator.clipboard?.writeText(pick("command").textContent);  // over plain http there is no clipboard
  const done = await written?.then(() => true, () => false) || document.execCommand("copy");
  pick("copy").textContent = done ? "copied" : "selected: press Ctrl-C";
  setTimeout(() => { pick("copy").textContent = "copy the command"; }, 1500);
});
addEventListener("scroll", () => requestAnimationFrame(paint), {passive: true});
addEventListener("resize", () => { plot.drawAll(); redraw(); });
plot.drawAll();
update();
