"""Odd and broken files through `predict` and `train`: every one gives a right result or is named exactly once.

How a single file is read is tested in test_images.py.
"""

import os
import re
from pathlib import Path

import pytest
from odd_files import write_odd_files
from trust_cases import OTHER_USER, SMALLEST_FLAGS, Ended, open_to_all, read_scores, run, write_images

ALIKE = ("png.png", "upper.PNG", "bmp.bmp", "tiff.tif", "ppm.ppm", "png in disguise.tiff", "linked.png", "ünï 漢字.png")
Expected = dict[str, str | None]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that everybody may read, with a network in run/ and two folders that the other user may write."""
    folder = tmp_path_factory.mktemp("trust_images")
    open_to_all(folder)
    write_images(folder / "good", 3)
    flags = ["--data", str(folder / "good"), "--out", str(folder / "run"), *SMALLEST_FLAGS, "--steps", "1"]
    assert run("train", flags, folder / "io").code == 0
    for name in ("out", "trained"):
        (folder / name).mkdir()
        if os.geteuid() == 0:
            os.chown(folder / name, OTHER_USER, -1)
    return folder


@pytest.fixture(scope="module")
def expected(root: Path) -> Expected:
    """What becomes of the files in odd/."""
    return {name: error for name, error in write_odd_files(root / "odd").items() if not name.startswith(".")}


def assert_every_broken_file_is_named_once(ended: Ended, folder: Path, expected: Expected) -> None:
    assert ended.code == 1, ended
    assert "Traceback" not in ended.err
    named = [line for line in ended.err.splitlines() if line.startswith("not read: ")]
    assert len(named) == sum(error is not None for error in expected.values()), named
    for name, error in expected.items():
        readable = "".join(c if c.isprintable() else repr(c)[1:-1] for c in name)
        lines = [line for line in named if line.startswith(f"not read: {folder / readable}: ")]
        assert len(lines) == (error is not None), (name, lines)
        assert all((error or "") in line for line in lines)


def test_predict_gives_every_file_a_result_or_a_named_error(root: Path, expected: Expected) -> None:
    out = root / "out"
    flags = ["--checkpoint", str(root / "run" / "last.pt"), "--input", str(root / "odd"), "--out", str(out)]
    ended = run("predict", flags, root / "io", user=OTHER_USER)
    assert_every_broken_file_is_named_once(ended, root / "odd", expected)
    rows = {row["path"]: row for row in read_scores(out)}
    cells = {("'" if name[0] in "=-" else "") + name.encode("utf-8", "backslashreplace").decode() for name in expected}
    assert set(rows) == cells
    for cell, row in rows.items():
        assert bool(row["error"]) != bool(row["score"]), cell
    whole = sum(error is None for error in expected.values())
    assert len(list((out / "overlays").rglob("*.png"))) == len(list((out / "maps").rglob("*.tiff"))) == whole
    assert len({round(float(rows[name]["score"]), 6) for name in ALIKE}) == 1, "the same picture in other wrappings"


def test_train_names_every_broken_file_and_trains_on_the_others(root: Path, expected: Expected) -> None:
    """The last test of these files: two have one stem ("16 bit"), which a training folder may not hold."""
    (root / "odd" / "16 bit.tif").rename(root / "odd" / "16 bits.tif")
    flags = ["--data", str(root / "odd"), "--out", str(root / "trained"), *SMALLEST_FLAGS, "--steps", "2"]
    ended = run("train", flags, root / "io", user=OTHER_USER)
    expected = expected | {"huge values.tif": None}  # the other float images say what is white
    assert_every_broken_file_is_named_once(ended, root / "odd", expected)
    counts = re.search(r"^(\d+) images? to train on, (\d+) good ones? kept aside", ended.out, re.MULTILINE)
    copies = re.search(r"^note: the same pixels, which count once: (\d+) ", ended.err, re.MULTILINE)
    assert counts
    assert copies
    assert int(counts[1]) + int(counts[2]) + int(copies[1]) == sum(error is None for error in expected.values())


@pytest.mark.parametrize("count", [1, 2])
def test_one_image_or_two_are_enough(tmp_path: Path, count: int) -> None:
    write_images(tmp_path / "good", count)
    folders = ["--data", str(tmp_path / "good"), "--out", str(tmp_path / "run")]
    ended = run("train", [*folders, *SMALLEST_FLAGS, "--steps", "1"], tmp_path / "io")
    assert ended.code == 0, ended
    assert ("none is kept aside" in ended.out) == (count == 1)
