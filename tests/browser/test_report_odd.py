"""The report's page in a real browser where input is odd: typed thresholds, pictures of extreme shapes."""

from pathlib import Path
from typing import Any

import pytest

from almrr_ref.report.page import write_page
from almrr_ref.report.scores import ScoresWriter


@pytest.fixture
def three(open_page: Any, tmp_path: Path) -> Any:
    """A page of three rows without pictures, at a threshold of 0.4."""
    with ScoresWriter(tmp_path / "scores.csv") as table:
        for name, score in {"a.png": 0.1, "b.png": 0.5, "c.png": 0.9}.items():
            table.write(name, score, 0.4, 0)
    write_page(tmp_path, "three", [], 0.4, pictures=False, commands={"once": "predict --threshold"})
    return open_page(tmp_path / "index.html")


@pytest.mark.parametrize(
    ("typed", "threshold"),
    [("0.6", 0.6), ("1e-7", 1e-7), ("0", 0), ("1", 1), ("1e-200", 1e-200)]
    + [(refused, 0.4) for refused in ("2", "-1", "0,6", "", "x")],
)
def test_a_typed_threshold_is_one_that_the_commands_take_or_none(three: Any, typed: str, threshold: float) -> None:
    three.fill("#threshold", typed)
    three.press("#threshold", "Enter")
    assert float(three.inner_text("#command").split()[-1]) == threshold
    assert float(three.input_value("#threshold")) == pytest.approx(threshold)
    assert three.inner_text("#counts").count("defective") == (threshold < 1)
