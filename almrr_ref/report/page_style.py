"""Style sheet and script of the HTML page (page.py): plain text, nothing is loaded from elsewhere."""

STYLE = """
:root{color-scheme:light dark;--paper:#f5f6f8;--card:#fff;--ink:#1d2129;--faint:#667080;--line:#dfe3e9;
--bad:#c8323c;--warn:#b86e00;--good:#2f6fd0;--fine:#3c8a4e}
@media(prefers-color-scheme:dark){:root{--paper:#14171c;--card:#1d2128;--ink:#e6e9ee;--faint:#98a2b1;--line:#323842;
--bad:#f0646c;--warn:#e8a33d;--good:#6aa3f5;--fine:#6cc081}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1136px;padding:24px 20px 60px;background:var(--paper);color:var(--ink);
font:15px/1.45 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
h1{font-size:26px;margin:0 0 6px;overflow-wrap:anywhere}h2{font-size:16px;margin:0 0 10px}
header p,section p{color:var(--faint);margin:4px 0;font-size:14px;overflow-wrap:anywhere}
section{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:16px 18px;margin:16px 0 0;
min-width:0}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px}
.tiles div{display:flex;flex-direction:column}.tiles b{font-size:28px;line-height:1.2;font-variant-numeric:tabular-nums}
.tiles span,.tiles small{color:var(--faint)}
.columns{display:grid;grid-template-columns:3fr 2fr;gap:16px}
.columns section:only-child{grid-column:1/-1}
@media(max-width:900px){.columns{grid-template-columns:1fr;gap:0}}
.wide{overflow-x:auto}table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums;font-size:14px}
th,td{padding:5px 8px;text-align:right;border-top:1px solid var(--line)}
thead th{color:var(--faint);font-weight:500;border:0;vertical-align:bottom}
th:first-child{text-align:left;white-space:nowrap}thead th:first-child{padding-left:8px}
.none{color:var(--faint);cursor:help}
.summary{list-style:none;display:flex;flex-wrap:wrap;gap:4px 16px;padding:0;margin:0 0 10px;font-size:14px}
.summary i{display:inline-block;width:10px;height:10px;border-radius:2px;margin-right:6px}
i.error,i.miss,i.bad{background:var(--bad)}i.alarm,i.flagged,i.defective{background:var(--warn)}
i.hit,i.good,i.unknown,i.scored{background:var(--good)}i.correct,i.passed,i.fine{background:var(--fine)}
svg{width:100%;height:auto;display:block}svg text{fill:var(--faint);font-size:11px}
svg path{stroke:var(--faint);fill:none}
rect.good,rect.unknown{fill:var(--good);opacity:.65}rect.defective{fill:var(--warn);opacity:.65}
nav{display:flex;flex-wrap:wrap;gap:8px 18px;align-items:center;position:sticky;top:0;z-index:1;
background:var(--paper);padding:14px 0 10px;margin-top:8px}
nav label,nav output{color:var(--faint)}nav output{margin-left:auto}
select,input{font:inherit;color:var(--ink);background:var(--card);border:1px solid var(--line);border-radius:6px;
padding:3px 6px;max-width:240px}
article{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:10px 12px 12px;margin:0 0 12px;
content-visibility:auto;contain-intrinsic-size:auto 350px}
h3{display:flex;flex-wrap:wrap;gap:4px 12px;align-items:center;margin:0 0 8px;font-size:14px;font-weight:400}
h3 b{font-variant-numeric:tabular-nums}h3 em{font-style:normal}
h3 span:last-child{color:var(--faint);overflow-wrap:anywhere;white-space:pre-wrap}
.badge{border:1px solid;border-radius:20px;padding:0 9px;font-size:13px;font-weight:600}
.badge.error,.badge.miss,.badge.bad{color:var(--bad)}.badge.alarm,.badge.flagged{color:var(--warn)}
.badge.hit,.badge.scored{color:var(--good)}.badge.correct,.badge.passed,.badge.fine{color:var(--fine)}
.why{color:var(--bad);margin:0}
img{display:block;max-width:100%;height:auto;border-radius:6px;background:#fff}
"""

SCRIPT = """
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
"""
