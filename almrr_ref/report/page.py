"""One HTML page that shows a result, the worst misses first: a table of metrics, a histogram of scores, all overlays.

Source: own. The page works offline: no script, font or picture from elsewhere; overlays are linked by relative paths
and loaded when scrolled to, so that 10,000 rows open at once. Every text is escaped, every link quoted and relative.
"""

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any
from urllib.parse import quote

import numpy as np

from almrr_ref.report.page_style import SCRIPT, STYLE
from almrr_ref.run.files import atomic_write

_NAMES = {
    "image_auroc": "image AUROC", "image_ap": "image AP", "pixel_auroc": "pixel AUROC", "pixel_ap": "pixel AP",
    "aupro": "AUPRO 0.3",
}  # fmt: skip
_OUTCOMES = {  # in the order of the page -> what the reader sees
    "error": "unreadable", "miss": "missed", "alarm": "false alarm", "flagged": "flagged", "hit": "found",
    "correct": "correct", "passed": "passed", "bad": "defective", "fine": "good", "scored": "scored",
}  # fmt: skip
_BINS = 50


@dataclass(frozen=True)
class ReportRow:
    """One image of the page.

    Args:
        path: as shown to the reader.
        score: image score; None if the image could not be read.
        label: the truth, 1 defective, 0 good; None if unknown.
        defect_type: name of the image's group, e.g. "crack" or "good"; may be empty.
        picture: the overlay's path relative to the page, or None.
        size: the overlay's width and height, so that the page does not jump while loading.
        error: why the image could not be read; may be empty.
    """

    path: str
    score: float | None
    label: int | None = None
    defect_type: str = ""
    picture: str | None = None
    size: tuple[int, int] | None = None
    error: str = ""


def outcome(row: ReportRow, threshold: float | None) -> str:
    """Name what became of an image: error, miss, alarm, hit, correct; flagged or passed where the truth is unknown.

    Without a threshold there is no verdict, only the truth: bad, fine, or scored where it is unknown.
    """
    if row.score is None:
        return "error"
    if threshold is None:
        return "scored" if row.label is None else "bad" if row.label else "fine"
    above = row.score >= threshold
    if row.label is None:
        return "flagged" if above else "passed"
    if row.label:
        return "hit" if above else "miss"
    return "alarm" if above else "correct"


def worst_first(rows: Iterable[ReportRow], threshold: float | None) -> list[ReportRow]:
    """Sort: unreadable, misses (lowest score first), false alarms (highest first), found (lowest first), correct."""

    def key(row: ReportRow) -> tuple[int, float, str]:
        kind = outcome(row, threshold)
        score = row.score if row.score is not None else 0.0
        return list(_OUTCOMES).index(kind), score if kind in ("miss", "hit", "bad") else -score, row.path

    return sorted(rows, key=key)


def write_html(
    path: str | os.PathLike[str],
    metrics: Mapping[str, Any],
    rows: Iterable[ReportRow],
    title: str,
    threshold: float | None,
    notes: Sequence[str] = (),
) -> None:
    """Write the page.

    Args:
        path: where to; the rows' pictures are relative to its folder.
        metrics: as AnomalyMetrics.compute returns them; empty where there is no truth.
        rows: one per image, in any order.
        title: heading of the page.
        threshold: an image is called defective where its score >= threshold; None: no verdicts are shown.
        notes: sentences shown below the heading, e.g. checkpoint, and how the threshold was chosen.
    Raises:
        OutputError: if the file cannot be written.
    """
    ordered = worst_first(rows, threshold)
    kinds = [outcome(row, threshold) for row in ordered]
    parts = [
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>',
        '<meta name="viewport" content="width=device-width,initial-scale=1">',
        f"<style>{STYLE}</style></head><body><header><h1>{escape(title)}</h1>",
        *(f"<p>{escape(note)}</p>" for note in notes),
        f"</header><main>{_tiles(metrics)}",
        f'<div class="columns">{_table(metrics, ordered, kinds)}{_histogram(ordered, threshold)}</div>',
        _filters(ordered, kinds),
        '<div id="rows">',
        *(_card(row, kind) for row, kind in zip(ordered, kinds, strict=True)),
        f"</div></main><script>{SCRIPT}</script></body></html>\n",
    ]
    atomic_write(path, "\n".join(parts))


def _value(metrics: Mapping[str, Any], name: str) -> str:
    """Show one metric, or a dash that says why there is none."""
    if metrics.get(name) is None:
        return f'<span class="none" title="{escape(str(metrics.get("reasons", {}).get(name, "undefined")))}">–</span>'
    return f"{100 * metrics[name]:.2f}"


def _tiles(metrics: Mapping[str, Any]) -> str:
    """Show the overall metrics in large type, in percent; the reason in place of one that is undefined."""
    if not metrics:
        return ""
    tiles = []
    for name, shown in _NAMES.items():
        reason = "" if metrics.get(name) is not None else str(metrics.get("reasons", {}).get(name, "undefined"))
        tiles.append(f"<div><b>{_value(metrics, name)}</b><span>{shown}, %</span><small>{escape(reason)}</small></div>")
    return f'<section class="tiles">{"".join(tiles)}</section>'


def _table(metrics: Mapping[str, Any], rows: Sequence[ReportRow], kinds: Sequence[str]) -> str:
    """Metrics by defect type, with the images that were missed; and how many images had which outcome."""
    summary = "".join(
        f'<li><i class="{kind}"></i>{kinds.count(kind)} {shown}</li>'
        for kind, shown in _OUTCOMES.items()
        if kind in kinds
    )
    table = ""
    if metrics.get("per_type"):
        missed = Counter(row.defect_type for row, kind in zip(rows, kinds, strict=True) if kind == "miss")
        heads = "".join(f"<th>{shown}</th>" for shown in ("type", "images", "missed", *_NAMES.values()))
        lines = []
        for name, values in metrics["per_type"].items():
            cells = [str(values["images"]), str(missed[name]), *(_value(values, metric) for metric in _NAMES)]
            lines.append(f"<tr><th>{escape(name)}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
        table = f'<div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'
    counts = metrics.get("counts", {})
    remarks = [
        f"{counts[name]} {text}"
        for name, text in (
            ("without_mask", "defective images without a mask: not in the pixel metrics"),
            ("empty_masks", "defective images with an empty mask: their pixels count as defect-free"),
            ("good_with_defects", "good images with a mask that is not empty: check the data"),
        )
        if counts.get(name)
    ]
    remarks_html = "".join(f"<p>{escape(remark)}</p>" for remark in remarks)
    return f'<section><h2>Results</h2><ul class="summary">{summary}</ul>{table}{remarks_html}</section>'


def _histogram(rows: Sequence[ReportRow], threshold: float | None) -> str:
    """Draw the scores of good and of defective images, each as shares of its class, and the threshold, as an SVG."""
    groups = [("good", [row.score for row in rows if row.score is not None and row.label == 0]),
              ("defective", [row.score for row in rows if row.score is not None and row.label]),
              ("unknown", [row.score for row in rows if row.score is not None and row.label is None])]  # fmt: skip
    groups = [(name, scores) for name, scores in groups if scores]
    if not groups:
        return ""
    marks = [] if threshold is None else [threshold]
    every = np.array([*marks, *(score for _, scores in groups for score in scores)], dtype=np.float64)
    low, high = float(every.min()), float(every.max())
    low, high = (low, high) if high > low else (low - 0.5, high + 0.5)
    shares = [(name, np.histogram(scores, _BINS, (low, high))[0] / len(scores)) for name, scores in groups]
    top = max(float(share.max()) for _, share in shares)
    bars = []
    for name, share in shares:
        for index in np.flatnonzero(share):
            height = 150 * float(np.sqrt(share[index] / top))
            box = f'x="{10 + 9 * index}" y="{170 - height:.1f}" width="8" height="{height:.1f}"'
            bars.append(f'<rect class="{name}" {box}/>')
    ticks = "".join(
        f'<text x="{10 + 9 * _BINS * part:.0f}" y="186" text-anchor="{anchor}">{low + part * (high - low):.3g}</text>'
        for part, anchor in ((0.0, "start"), (0.5, "middle"), (1.0, "end"))  # of the axis
    )
    for mark in marks:
        place = 10 + 9 * _BINS * (mark - low) / (high - low)
        anchor = "end" if place > 235 else "start"
        ticks += f'<text x="{place:.1f}" y="10" text-anchor="{anchor}">threshold {mark:.4g}</text>'
        ticks += f'<path d="M{place:.1f} 14V170"/>'
    legend = "".join(f'<li><i class="{name}"></i>{len(scores)} {name}</li>' for name, scores in groups)
    return (
        f'<section><h2>Scores</h2><ul class="summary">{legend}</ul>'
        f'<svg viewBox="0 0 470 190" role="img" aria-label="Histogram of scores">{"".join(bars)}'
        f'<path d="M10 170.5H460"/>{ticks}</svg>'
        "<p>Height: square root of the share of the class's images.</p></section>"
    )


def _filters(rows: Sequence[ReportRow], kinds: Sequence[str]) -> str:
    """Choices of type and outcome; the script at the end of the page reads them."""
    types = Counter(row.defect_type for row in rows if row.defect_type)
    outcomes = [(kind, shown, kinds.count(kind)) for kind, shown in _OUTCOMES.items() if kind in kinds]
    choices = [("type", [(name, name, types[name]) for name in sorted(types)]), ("outcome", outcomes)]
    selects = "".join(
        f'<label>{name} <select id="{name}"><option value="">all</option>'
        + "".join(f'<option value="{escape(value)}">{escape(shown)} ({n})</option>' for value, shown, n in options)
        + "</select></label>"
        for name, options in choices
    )
    search = '<label>name <input id="name" type="search"></label>'
    return f'<nav>{selects}{search}<output id="shown">{len(rows)} images</output></nav>'


def _card(row: ReportRow, kind: str) -> str:
    """One image: what became of it, its name, its score, its overlay."""
    score = "" if row.score is None else f"<b>{row.score:.4f}</b>"
    head = f'<span class="badge {kind}">{_OUTCOMES[kind]}</span>{score}<em>{escape(row.defect_type)}</em>'
    picture = f'<p class="why">{escape(row.error)}</p>' if row.error else ""
    if row.picture is not None:
        size = f' width="{row.size[0]}" height="{row.size[1]}"' if row.size else ""
        link = "./" + quote(os.fsencode(row.picture.replace(os.sep, "/")))
        image = f'<img loading="lazy" decoding="async" src="{link}"{size} alt="{escape(row.path)}">'
        picture += f'<a href="{link}">{image}</a>'
    return (
        f'<article data-type="{escape(row.defect_type)}" data-outcome="{kind}" data-name="{escape(row.path)}">'
        f"<h3>{head}<span>{escape(row.path)}</span></h3>{picture}</article>"
    )
