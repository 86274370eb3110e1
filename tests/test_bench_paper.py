"""What bench/paper_tables.py says that the paper prints, against second sources inside the paper."""

import sys
from itertools import pairwise
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))

from paper_tables import CATEGORIES, PAPER
from tables import TABLES

from almrr_ref.config import make_configs

COLUMNS = [(key, name) for key, columns in PAPER.items() for name in columns]


@pytest.mark.parametrize(("key", "name"), COLUMNS)
def test_the_averages_are_those_of_the_categories(key: str, name: str) -> None:
    """To the rounding of the paper; one of its averages, 69.6 for 69.54, is further up than that."""
    column = PAPER[key][name]
    assert tuple(column) == CATEGORIES
    for metric in range(len(TABLES[key].metrics)):
        values = [column[category][metric] for category in CATEGORIES[:-1]]
        if None in values:
            assert values == [None] * 5
            continue
        assert sum(v for v in values if v is not None) / 5 == pytest.approx(column["avg"][metric], abs=0.0601)


def test_one_network_has_one_row_of_figures_in_all_tables() -> None:
    """The full method stands in six tables."""
    ours = PAPER["2"]["ALMRR"]
    for key, name in (("3", "Mamba"), ("6", "ResNet50"), ("7", "blocks 1 2 3")):
        assert PAPER[key][name] == ours
    for category in CATEGORIES:
        assert PAPER["5"]["with FRM"][category] == PAPER["1"]["ALMRR"][category] + ours[category]


def test_the_text_of_the_paper_agrees_with_table_3() -> None:
    """ "In terms of pixel-AP, Mamba is higher than CNN (1x1), CNN (3x3), and Transformer by 1.4%, 3.7%, and 3.4%"."""
    average = {name: column["avg"][1] or 0.0 for name, column in PAPER["3"].items()}
    ahead = {name: round(average["Mamba"] - value, 1) for name, value in average.items()}
    assert ahead == {"CNN(1x1)": 1.4, "CNN(3x3)": 3.7, "Transformer": 3.4, "Mamba": 0.0}


def test_the_paper_has_figures_for_every_variant_that_is_measured() -> None:
    for key, table in TABLES.items():
        if key.isdecimal():
            assert set(table.variants) <= set(PAPER[key])
            assert all(len(row) == len(table.metrics) for column in PAPER[key].values() for row in column.values())


def test_the_last_step_from_small_to_plus_is_plus() -> None:
    """But for the number of steps, which is given; the memory takes the distance's place, all other steps add."""
    steps = list(TABLES["plus"].variants.values())
    assert make_configs("small", {**steps[-1], "steps": 7}) == make_configs("plus", {"steps": 7})
    assert all(before.keys() <= after.keys() for before, after in pairwise(steps))
    assert make_configs("small", steps[0]) == make_configs("small", {})
