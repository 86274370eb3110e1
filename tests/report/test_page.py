"""The HTML page: every text escaped, nothing loaded from elsewhere, all that scores.csv says, the commands."""

import json
import re
import shlex
import sys
from html.parser import HTMLParser
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np
import pytest

from almrr_ref import calibrate, predict
from almrr_ref.metrics import anomaly_metrics
from almrr_ref.report.page import commands_for, write_page
from almrr_ref.report.scores import ScoresWriter

EVIL = '<script>alert("x")</script><!--&\'=1+1$title\n.png'


class Page(HTMLParser):
    """Collect the tags, attributes and texts of a page; JSON in it by the id of its element."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.json: dict[str | None, Any] = {}
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        _, attributes = self.tags[-1] if self.tags else ("", {})
        if attributes.get("type") == "application/json" and data.strip():
            self.json[attributes["id"]] = json.loads(data)


def write_scores(out: Path, *rows: dict[str, Any]) -> None:
    with ScoresWriter(out / "scores.csv", truth="truth" in rows[0]) as scores:
        for row in rows:
            scores.write(**row)


def test_page_escapes_every_text_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    metrics = anomaly_metrics([np.eye(3), np.zeros((3, 3))], [np.eye(3), None], [0.9, 0.1], [1, 0], [EVIL, "good"])
    truth = {"truth": 1, "defect_type": EVIL}
    rows = {"path": EVIL, "score": 0.9, **truth}, {"path": "\udcff", "error": EVIL, **truth}
    write_scores(tmp_path, *rows, {"path": "-x.png", "score": 0.5, "truth": 0, "defect_type": "good"})
    commands = commands_for(Path(EVIL), [Path(EVIL)], Path(EVIL))
    write_page(tmp_path, EVIL, [EVIL, "\udcff"], 0.5, metrics=metrics, commands=commands)
    page = Page(tmp_path / "index.html")
    assert page.source.count("<script") == page.source.count("</script>") == 3  # our own
    assert page.source.count("<style") == 1
    assert "<!--" not in page.source
    assert "alert" not in "".join(tag for tag, _ in page.tags)
    assert not re.search(r"https?:|@import|url\(|<link|innerHTML", page.source)
    expected = [[EVIL, 0.9, 1, EVIL, ""], ["\\udcff", None, 1, EVIL, EVIL], ["-x.png", 0.5, 0, "good", ""]]
    assert page.json["table"] == expected
    assert page.json["facts"]["commands"] == commands
    assert sum(EVIL in text for text in page.texts) >= 4  # title, heading, note, type: read back as they were
    assert [attributes["data-missed"] for _, attributes in page.tags if "data-missed" in attributes] == [EVIL]


def test_types_that_a_spreadsheet_would_run_are_counted_by_their_names(tmp_path: Path) -> None:
    metrics = anomaly_metrics([np.eye(3)], [np.eye(3)], [0.1], [1], ["-dent"])
    write_scores(tmp_path, {"path": "a", "score": 0.1, "truth": 1, "defect_type": "-dent"})
    write_page(tmp_path, "Result", [], 0.5, metrics=metrics)
    page = Page(tmp_path / "index.html")
    [counted] = [attributes["data-missed"] for _, attributes in page.tags if "data-missed" in attributes]
    assert page.json["table"][0][3] == counted == "-dent"


def test_page_shows_metrics_and_reasons_and_needs_none_nor_a_threshold(tmp_path: Path) -> None:
    metrics = anomaly_metrics([np.array([[0.9, 0.2]])], [np.array([[1, 0]])], [0.9], [1], ["crack"])
    write_scores(tmp_path, {"path": "a", "score": 0.9, "truth": 1})
    calibration = {"good_scores": [0.2], "intervals": [[0.1, 0.9]], "simulated_scores": [], "images": ["not shown"]}
    write_page(tmp_path, "Result", [], 0.5, 0.25, metrics=metrics, calibration=calibration)
    page = Page(tmp_path / "index.html")
    assert page.texts.count("100.00") == 6  # three pixel metrics, overall and type
    assert "no good image in the test part" in page.texts
    facts = page.json["facts"]
    assert (facts["threshold"], facts["offset"], set(facts["calibration"])) == (0.5, 0.25, {*calibration} - {"images"})
    write_scores(tmp_path, {"path": "a", "score": 0.25})
    write_page(tmp_path, "Result", [], None, calibration={"images": [], "thresholds": []})  # of an earlier version
    page = Page(tmp_path / "index.html")
    assert page.json["table"] == [["a", 0.25, None, "", ""]]
    assert (page.json["facts"]["threshold"], page.json["facts"]["calibration"]) == (None, None)


def test_the_commands_are_ones_that_the_parsers_take_with_any_name() -> None:
    odd = Path("a b/$(x) 'y'.pt")
    commands = commands_for(odd, [odd, Path("./-z")], odd.parent, ["--tile", "64"])
    words = shlex.split(commands["once"] + " 0.25")
    assert words[:3] == ["python", "-m", "almrr_ref.predict"]
    given = predict.build_parser().parse_args(words[3:])
    assert (given.checkpoint, given.input, given.out) == (odd, [odd, Path("-z")], odd.parent)
    assert (given.threshold, given.overwrite, given.tile) == (0.25, True, 64)
    words = shlex.split(commands["from now on"] + " 0.25")
    assert words[:3] == ["python", "-m", "almrr_ref.calibrate"]
    given = calibrate.build_parser().parse_args(words[3:])
    assert (given.checkpoint, given.threshold) == (odd, 0.25)
    assert set(commands_for(Path("model.onnx"))) == {"once"}


def test_on_windows_the_commands_have_the_quotes_that_every_shell_there_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    paths = PureWindowsPath(r"C:\runs\last.pt"), [PureWindowsPath(r"R&D\a b"), PureWindowsPath("new")]
    command = r'python -m almrr_ref.predict --checkpoint C:\runs\last.pt --input "R&D\a b" new --out found --threshold'
    assert commands_for(*paths)["once"] == command  # type: ignore[arg-type]
