"""One HTML page that shows a result, the worst misses first: a table of metrics, a histogram of scores, all overlays.

page.html is its frame. The page works offline: style and script stand in it; overlays are linked by relative paths and
loaded when scrolled to, so that 10,000 rows open at once. Every text is escaped, every link quoted and relative.
"""

from collections import Counter
from dataclasses import dataclass
from html import escape
from itertools import chain
from pathlib import Path
from string import Template
from typing import Any
from urllib.parse import quote

import numpy as np

from almrr_ref.run.files import atomic_write

_METRICS = {
    "image_auroc": "image AUROC", "image_ap": "image AP", "pixel_auroc": "pixel AUROC", "pixel_ap": "pixel AP",
    "aupro": "AUPRO 0.3",
}  # fmt: skip
_SHOWN = {  # outcome, in the order of the page -> what the reader sees
    "error": "unreadable", "miss": "missed", "alarm": "false alarm", "hit": "found", "correct": "correct",
    "bad": "defective", "fine": "good",
}  # fmt: skip
_REMARKS = {
    "without_mask": "defective images without a mask: not in the pixel metrics",
    "empty_masks": "defective images with an empty mask: their pixels count as defect-free",
    "good_with_defects": "good images with a mask that is not empty: check the data",
}


@dataclass(frozen=True)
class ReportRow:
    """One image of the page.

    The label is the truth, 1 defective or 0 good. The picture is the overlay's path relative to the page, and the size
    its width and height. An image that could not be read has no score, and an error that says why.
    """

    path: str
    score: float | None
    label: int
    defect_type: str
    picture: str | None = None
    size: tuple[int, int] | None = None
    error: str = ""

    def outcome(self, threshold: float | None) -> str:
        """Name what became of the image, or without a threshold what it is: a key of _SHOWN."""
        if self.score is None:
            return "error"
        if threshold is None:
            return "bad" if self.label else "fine"
        if self.score < threshold:
            return "miss" if self.label else "correct"
        return "hit" if self.label else "alarm"


def worst_first(rows: list[ReportRow], threshold: float | None) -> list[ReportRow]:
    """Sort: unreadable, misses (lowest score first), false alarms (highest first), found (lowest first), correct."""

    def key(row: ReportRow) -> tuple[int, float, str]:
        outcome, score = row.outcome(threshold), row.score or 0.0
        return list(_SHOWN).index(outcome), score if outcome in ("miss", "hit", "bad") else -score, row.path

    return sorted(rows, key=key)


def write_html(
    path: Path, metrics: dict[str, Any], rows: list[ReportRow], title: str, threshold: float | None, notes: list[str]
) -> None:
    """Write the page; OutputError if that fails.

    Args:
        metrics: as AnomalyMetrics.compute returns them.
        rows: one per image, in any order.
        threshold: an image is called defective where its score >= threshold; None: no verdicts are shown.
        notes: sentences shown below the title.
    """
    rows = worst_first(rows, threshold)
    outcomes = [row.outcome(threshold) for row in rows]
    counts = {outcome: outcomes.count(outcome) for outcome in _SHOWN if outcome in outcomes}
    missed = Counter(row.defect_type for row, outcome in zip(rows, outcomes) if outcome == "miss")
    types = Counter(row.defect_type for row in rows if row.defect_type)
    page = Path(__file__)
    text = Template(page.with_suffix(".html").read_text("utf-8")).substitute(
        title=escape(title),
        style=page.with_suffix(".css").read_text("utf-8"),
        script=page.with_suffix(".js").read_text("utf-8"),
        notes="\n".join(f"<p>{escape(note)}</p>" for note in notes),
        tiles=_tiles(metrics),
        results=_results(metrics, counts, missed),
        histogram=_histogram(rows, threshold),
        types="".join(_option(name, name, count) for name, count in sorted(types.items())),
        outcomes="".join(_option(outcome, _SHOWN[outcome], count) for outcome, count in counts.items()),
        count=len(rows),
        cards="\n".join(map(_card, rows, outcomes)),
    )
    atomic_write(path, text)


def _option(value: str, shown: str, count: int) -> str:
    """One choice of a filter; page.js reads its value."""
    return f'<option value="{escape(value)}">{escape(shown)} ({count})</option>'


def _tiles(metrics: dict[str, Any]) -> str:
    """Show the overall metrics in large type, in percent; the reason below one that is undefined."""
    tiles = ""
    for name, shown in _METRICS.items():
        reason = escape(metrics["reasons"].get(name, ""))
        tiles += f"<div><b>{_percent(metrics, name)}</b><span>{shown}, %</span><small>{reason}</small></div>"
    return f'<section class="tiles">{tiles}</section>'


def _percent(metrics: dict[str, Any], name: str) -> str:
    if metrics[name] is not None:
        return f"{100 * metrics[name]:.2f}"
    return f'<span class="none" title="{escape(metrics["reasons"][name])}">–</span>'


def _results(metrics: dict[str, Any], counts: dict[str, int], missed: dict[str, int]) -> str:
    """How many images had which outcome; metrics by defect type, with the images that were missed."""
    summary = _legend({outcome: f"{count} {_SHOWN[outcome]}" for outcome, count in counts.items()})
    table = ""
    for name, values in metrics["per_type"].items():
        cells = [values["images"], missed[name], *(_percent(values, metric) for metric in _METRICS)]
        table += f"<tr><th>{escape(name)}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
    if table:
        heads = "".join(f"<th>{shown}</th>" for shown in ("type", "images", "missed", *_METRICS.values()))
        table = f'<div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>{table}</tbody></table></div>'
    odd = metrics["counts"]
    remarks = "".join(f"<p>{odd[name]} {text}</p>" for name, text in _REMARKS.items() if odd[name])
    return f"<section><h2>Results</h2>{summary}{table}{remarks}</section>"


def _legend(texts: dict[str, str]) -> str:
    """Coloured squares with a text each; the keys are classes of page.css, which has their colours."""
    items = "".join(f'<li><i class="{name}"></i>{text}</li>' for name, text in texts.items())
    return f'<ul class="summary">{items}</ul>'


def _histogram(rows: list[ReportRow], threshold: float | None) -> str:
    """Draw the scores of good and of defective images, each as fractions of its class, and the threshold, as an SVG."""
    scores = {
        name: values
        for label, name in enumerate(("good", "defective"))
        if (values := [row.score for row in rows if row.score is not None and row.label == label])
    }
    if not scores:
        return ""
    marks = [] if threshold is None else [threshold]
    edges = np.histogram_bin_edges([*marks, *chain(*scores.values())], bins=50)  # each 9 wide
    low, high = edges[0], edges[-1]
    fractions = {name: np.histogram(values, edges)[0] / len(values) for name, values in scores.items()}
    highest = max(bars.max() for bars in fractions.values())
    drawn = '<path d="M10 170.5H460"/>'
    for name, bars in fractions.items():
        for index in np.flatnonzero(bars):
            height = 150 * np.sqrt(bars[index] / highest)
            box = f'x="{10 + 9 * index}" y="{170 - height:.1f}" width="8" height="{height:.1f}"'
            drawn += f'<rect class="{name}" {box}/>'
    for x, value, anchor in ((10, low, "start"), (235, (low + high) / 2, "middle"), (460, high, "end")):
        drawn += f'<text x="{x}" y="186" text-anchor="{anchor}">{value:.3g}</text>'
    for mark in marks:
        x = 10 + 450 * (mark - low) / (high - low)
        anchor = "end" if x > 235 else "start"
        drawn += (
            f'<path d="M{x:.1f} 14V170"/><text x="{x:.1f}" y="10" text-anchor="{anchor}">threshold {mark:.4g}</text>'
        )
    legend = _legend({name: f"{len(values)} {name}" for name, values in scores.items()})
    return (
        f'<section><h2>Scores</h2>{legend}<svg viewBox="0 0 470 190" role="img" aria-label="Histogram of scores">'
        f"{drawn}</svg><p>Height: square root of the share of the class's images.</p></section>"
    )


def _card(row: ReportRow, outcome: str) -> str:
    """One image: what became of it, its name, its score, its overlay."""
    name, defect_type = escape(row.path), escape(row.defect_type)
    score = "" if row.score is None else f"<b>{row.score:.4f}</b>"
    head = f'<span class="badge {outcome}">{_SHOWN[outcome]}</span>{score}<em>{defect_type}</em>'
    picture = f'<p class="why">{escape(row.error)}</p>' if row.error else ""
    if row.picture is not None:
        size = ' width="{}" height="{}"'.format(*row.size) if row.size else ""
        link = "./" + quote(row.picture)
        picture += f'<a href="{link}"><img loading="lazy" decoding="async" src="{link}"{size} alt="{name}"></a>'
    return (
        f'<article data-type="{defect_type}" data-outcome="{outcome}" data-name="{name}">'
        f"<h3>{head}<span>{name}</span></h3>{picture}</article>"
    )
