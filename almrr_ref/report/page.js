// Filters of the page that page.py writes: by type, outcome and name.
const pick = id => document.getElementById(id);
function show() {
  const type = pick("type").value, outcome = pick("outcome").value, name = pick("name").value.toLowerCase();
  let shown = 0;
  for (const row of document.querySelectorAll("article")) {
    const data = row.dataset;
    row.hidden = (type && data.type !== type) || (outcome && data.outcome !== outcome)
      || (name && !data.name.toLowerCase().includes(name));
    shown += !row.hidden;
  }
  pick("shown").textContent = shown + (shown === 1 ? " image" : " images");
}
for (const id of ["type", "outcome", "name"]) pick(id).addEventListener("input", show);
show();
