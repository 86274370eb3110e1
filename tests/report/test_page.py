"""The HTML page: worst misses first, every text escaped, nothing loaded from elsewhere."""

import configparser
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import numpy as np

import almrr_ref.report
from almrr_ref.metrics import anomaly_metrics
from almrr_ref.report.page import ReportRow, write_html
from almrr_ref.run.files import output_name

EVIL = '<script>alert("x")</script>&\'=1+1$title\n.png'


class Page(HTMLParser):
    """Collect the tags, attributes and texts of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def values(self, tag: str, attribute: str) -> list[str]:
        return [str(attributes[attribute]) for name, attributes in self.tags if name == tag and attribute in attributes]


METRICS = anomaly_metrics([np.array([[0.9, 0.2]])], [np.array([[1, 0]])], [0.9], [1], ["crack"])
ROWS = [
    ReportRow("hit", 0.9, 1, "crack"), ReportRow("correct", 0.1, 0, "good"), ReportRow("small miss", 0.4, 1, "crack"),
    ReportRow("alarm", 0.6, 0, "good"), ReportRow("big miss", 0.1, 1, "hole"), ReportRow("big alarm", 0.8, 0, "good"),
    ReportRow("close hit", 0.5, 1, "hole"), ReportRow("broken", None, 1, "crack", error="cannot read"),
]  # fmt: skip


def test_page_escapes_every_text_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    metrics = anomaly_metrics([np.eye(3), np.zeros((3, 3))], [np.eye(3), None], [0.9, 0.1], [1, 0], [EVIL, "good"])
    rows = [
        ReportRow(EVIL, 0.9, 1, EVIL, "overlays/" + output_name(EVIL, ".png"), (10, 20), EVIL),
        ReportRow("\udcff", 0.1, 0, "good", "//example.org/x.png"),
        ReportRow("c", 0.1, 0, "good", 'javascript:alert("x")'),
    ]
    write_html(tmp_path / "index.html", metrics, rows, EVIL, 0.5, [EVIL])
    page = Page(tmp_path / "index.html")
    assert page.source.count("<script") == page.source.count("<style") == 1  # our own
    assert "alert" not in "".join(tag for tag, _ in page.tags)
    assert all(link.startswith("./") for link in page.values("img", "src") + page.values("a", "href"))
    assert unquote(page.values("img", "src")[0]) == "./overlays/" + output_name(EVIL, ".png")
    assert not re.search(r"https?:|@import|url\(|<link", page.source)
    assert EVIL in page.values("article", "data-type")
    assert sum(EVIL in text for text in page.texts) >= 4  # title, heading, note, path: read back as they were
    assert all(attributes.get("loading") == "lazy" for tag, attributes in page.tags if tag == "img")


def test_page_shows_metrics_reasons_counts_and_every_row_the_worst_miss_first(tmp_path: Path) -> None:
    write_html(tmp_path / "index.html", METRICS, ROWS, "Result", 0.5, [])
    page = Page(tmp_path / "index.html")
    assert page.texts.count("100.00") == 6  # three pixel metrics, overall and type
    assert "no good image in the test part" in page.texts
    names = ["broken", "big miss", "small miss", "big alarm", "alarm", "close hit", "hit", "correct"]
    assert page.values("article", "data-name") == names
    assert page.values("article", "data-outcome") == ["error", *["miss"] * 2, *["alarm"] * 2, *["hit"] * 2, "correct"]
    assert {"2 missed", "2 false alarm", "1 unreadable"} <= set(page.texts)
    assert "rect" in {tag for tag, _ in page.tags}


def test_page_needs_no_threshold_no_spread_of_scores_and_no_readable_image(tmp_path: Path) -> None:
    write_html(tmp_path / "index.html", METRICS, ROWS, "Result", None, [])
    page = Page(tmp_path / "index.html")
    assert page.values("article", "data-name")[:3] == ["broken", "big miss", "small miss"]
    assert set(page.values("article", "data-outcome")) == {"error", "bad", "fine"}
    assert "threshold" not in page.source
    write_html(tmp_path / "a.html", METRICS, [ReportRow("x", 0.5, 0, "good")] * 2, "t", 0.5, [])
    assert "nan" not in Page(tmp_path / "a.html").source
    write_html(tmp_path / "b.html", anomaly_metrics([], [], [], []), [ReportRow("x", None, 0, "good")], "t", 0.5, [])
    assert Page(tmp_path / "b.html").values("article", "data-outcome") == ["error"]


def test_an_install_takes_the_frame_style_and_script_along() -> None:
    config = configparser.ConfigParser()
    config.read(Path(__file__).parents[2] / "setup.cfg")
    files = {path.name for path in Path(*almrr_ref.report.__path__).glob("page.*")} - {"page.py"}
    assert files == set(config["options.package_data"]["almrr_ref.report"].split(", ")) != set()
