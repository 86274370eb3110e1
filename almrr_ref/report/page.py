"""One HTML page that shows a result, the worst misses first, and judges again when its threshold is moved.

Frame, style and scripts are page.html, colours.css and page.css, numbers.js, picture.js (one picture), page.js
(threshold, histogram) and list.js. The page contains them and the rows of scores.csv. The layers of a picture
(layers.py) are loaded when its row comes into view, so that a page of 10,000 rows opens at once. The page works
offline, from any folder: nothing is loaded from elsewhere, and every link is relative. Texts are escaped here; no
script treats one as HTML.
"""

import csv
import json
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path, PurePath
from string import Template
from typing import Any

from almrr_ref.report.overlays import COLOURS
from almrr_ref.report.result import STEP
from almrr_ref.report.scores import name_in
from almrr_ref.run.checkpoint import FIGURES
from almrr_ref.run.files import SCORES, atomic_path
from almrr_ref.run.text import decimals

PAGE = "index.html"
_STYLE, _SCRIPT = ("colours.css", "page.css"), ("numbers.js", "picture.js", "page.js", "list.js")
_METRICS = {
    "image_auroc": "image AUROC", "image_ap": "image AP", "pixel_auroc": "pixel AUROC", "pixel_ap": "pixel AP",
    "aupro": "AUPRO 0.3",
}  # fmt: skip
_REMARKS = {
    "without_mask": "defective images without a mask: not in the pixel metrics",
    "empty_masks": "defective images whose mask is empty, or too fine for the map: their pixels count as defect-free",
    "good_with_defects": "good images with a mask that is not empty: check the data",
}


def write_page(
    out: Path,
    title: str,
    notes: Sequence[str],
    threshold: float | None,
    outline_offset: float = 0.0,
    *,
    pictures: bool = True,
    metrics: dict[str, Any] | None = None,
    calibration: dict[str, Any] | None = None,
    commands: dict[str, str] | None = None,
) -> None:
    """Write the page of a folder of results from its scores.csv; OutputError if that fails.

    Rows are copied one by one: memory does not grow with them.

    Args:
        notes: sentences shown below the title.
        threshold: at which the page opens; an image is called defective if its score reaches it; None: none yet.
        outline_offset: by how much the logit of a region's peak exceeds the threshold's, at least.
        pictures: whether the layers of every readable picture have been written.
        metrics: as AnomalyMetrics.compute returns them.
        calibration: the checkpoint's calibration record.
        commands: from `commands_for`.
    """
    facts: dict[str, Any] = {"threshold": threshold, "offset": outline_offset, "step": STEP, "pictures": pictures}
    facts |= {"colours": COLOURS.tobytes().hex(), "commands": commands or {}, "calibration": None}
    if calibration and set(FIGURES) <= set(calibration):
        facts["calibration"] = {name: calibration[name] for name in FIGURES}
    frame = Template(_file("page.html")).substitute(
        title=escape(title),
        style="".join(map(_file, _STYLE)),
        script="".join(map(_file, _SCRIPT)),
        notes="\n".join(f"<p>{escape(note)}</p>" for note in notes),
        tiles=_tiles(metrics) if metrics else "",
        table=_table(metrics) if metrics else "",
        facts=_json(facts),
        rows="\0",
    )
    before, after = frame.split("\0")
    with (
        atomic_path(out / PAGE) as temporary,
        open(temporary, "w", encoding="utf-8", errors="backslashreplace") as page,
        open(out / SCORES, newline="", encoding="utf-8") as scores,
    ):
        page.write(before)
        for number, row in enumerate(_rows(csv.DictReader(scores))):
            page.write((",\n" if number else "") + _json(row))
        page.write(after)


def _file(name: str) -> str:
    return (Path(__file__).parent / name).read_text("utf-8")


def describe_threshold(threshold: float | None, stored: float | None) -> str:
    """The threshold in use, in words, and whether it is the one stored in the network."""
    if threshold is None:
        return "no threshold"
    whose = "that of the network" if threshold == stored else "given with --threshold"
    return f"threshold {decimals(threshold)}, {whose}"


def commands_for(
    checkpoint: Path,
    sources: Sequence[Path] = (Path("new-images"),),
    out: Path | None = None,
    flags: Sequence[str] = (),
) -> dict[str, str]:
    """The commands that set a threshold: what each does -> the command, to which the threshold is appended.

    Args:
        out: the folder of earlier results of the same sources, to be overwritten.
        flags: what else the command was given that made them.
    """

    def line(*words: object) -> str:
        return " ".join(map(_quoted, ["python", "-m", *map(_word, words), "--threshold"]))

    into = ["--out", "found"] if out is None else ["--out", out, "--overwrite"]
    commands = {"once": line("almrr_ref.predict", "--checkpoint", checkpoint, *flags, "--input", *sources, *into)}
    if checkpoint.suffix.lower() != ".onnx":
        commands["from now on"] = line("almrr_ref.calibrate", "--checkpoint", checkpoint)
    return commands


def _word(word: object) -> str:
    """A word of a command; a path that looks like a flag, as a `Path` of ./-x does, gets its ./ back."""
    return f"./{word}" if isinstance(word, PurePath) and str(word).startswith("-") else str(word)


def _quoted(word: str) -> str:
    """A word for the shells of this system; to cmd.exe only double quotes are quotes, and no path has one in it."""
    if sys.platform != "win32":
        return shlex.quote(word)
    return word if re.fullmatch(r"[\w.:\\/-]+", word) else f'"{word}"'


def _rows(table: "csv.DictReader[str]") -> Iterator[list[Any]]:
    """Rows of scores.csv -> [path, score or null, truth or null, type, error], as page.js takes them."""
    for row in table:
        score, truth = row["score"], row.get("truth", "")
        yield [
            name_in(row["path"]),
            float(score) if score else None,
            int(truth) if truth else None,
            name_in(row.get("defect_type", "")),
            row["error"],
        ]


def _json(value: Any) -> str:
    """JSON that may stand in a script element."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


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


def _table(metrics: dict[str, Any]) -> str:
    """Metrics by defect type; page.js fills in the images that were missed."""
    table = ""
    for name, values in metrics["per_type"].items():
        missed = f'<td data-missed="{escape(name)}"></td>'
        cells = "".join(f"<td>{_percent(values, metric)}</td>" for metric in _METRICS)
        table += f"<tr><th>{escape(name)}</th><td>{values['images']}</td>{missed}{cells}</tr>"
    if table:
        heads = "".join(f"<th>{shown}</th>" for shown in ("type", "images", "missed", *_METRICS.values()))
        table = f'<div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>{table}</tbody></table></div>'
    odd = metrics["counts"]
    return table + "".join(f"<p>{odd[name]} {text}</p>" for name, text in _REMARKS.items() if odd[name])
