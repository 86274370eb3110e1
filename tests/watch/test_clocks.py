"""Cameras whose clock has stopped, tables that somebody deletes: no picture is taken for another, no row is lost."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from stations import rows, wait_for, watching
from trust_cases import write_images

from almrr_ref.report.scores import LineFile
from almrr_ref.run.files import OutputError

BEFORE_1970 = -3600  # 1970-01-01 east of Greenwich


@pytest.mark.parametrize("again", [False, True], ids=["in one run", "after a new start"])
def test_two_pictures_of_one_name_size_and_time_are_both_judged_and_kept(
    checkpoint: Path, camera: Path, tmp_path: Path, again: bool
) -> None:
    contents = [bytes([65 + number]) * 20 for number in range(3)]  # no pictures, so the size is one and the same
    sorted_to = tmp_path / "sorted"

    def arrives(content: bytes) -> None:
        (tmp_path / "new.png").write_bytes(content)
        os.utime(tmp_path / "new.png", (BEFORE_1970, BEFORE_1970))
        os.replace(tmp_path / "new.png", camera / "img.png")

    for parts in [[content] for content in contents] if again else [contents]:
        with watching(checkpoint, camera, move_to=sorted_to):
            for content in parts:
                arrives(content)
                wait_for(lambda: not list(camera.iterdir()))
    assert len(rows(tmp_path / "out")) == 3
    assert sorted(path.read_bytes() for path in (sorted_to / "unreadable").iterdir()) == contents


def test_a_copy_of_a_moved_picture_is_not_judged_again(checkpoint: Path, camera: Path, tmp_path: Path) -> None:
    write_images(tmp_path / "source", 1)
    with watching(checkpoint, camera, move_to=tmp_path / "sorted"):
        for _ in range(2):
            (tmp_path / "new.png").write_bytes((tmp_path / "source" / "000.png").read_bytes())
            os.utime(tmp_path / "new.png", (0, 0))
            os.replace(tmp_path / "new.png", camera / "img.png")
            wait_for(lambda: not list(camera.iterdir()))
    assert len(rows(tmp_path / "out")) == 1


def test_a_line_is_not_written_into_a_file_that_was_deleted(tmp_path: Path) -> None:
    with LineFile(tmp_path / "scores.csv", sync=True) as lines:
        lines.append("one\n")
        (tmp_path / "scores.csv").unlink()
        with pytest.raises(OutputError, match="deleted or replaced while it grew; start again"):
            lines.append("two\n")


def test_remarks_on_pictures_are_logged_as_predict_says_them(
    checkpoint: Path, camera: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_images(tmp_path / "source", 2, size=40)
    with watching(checkpoint, camera):
        for path in sorted((tmp_path / "source").iterdir()):
            deep = np.asarray(Image.open(path).convert("L"), dtype=np.uint16) * 256
            Image.fromarray(deep).save(camera / path.name)
        wait_for(lambda: len(rows(tmp_path / "out")) == 2)
    assert caplog.text.count("16-bit values taken to use all 16 bits; said once") == 1


def test_a_picture_that_takes_the_place_of_a_judged_one_is_judged_before_it_is_moved(
    checkpoint: Path, camera: Path, tmp_path: Path
) -> None:
    write_images(tmp_path / "source", 2)
    contents = [path.read_bytes() for path in sorted((tmp_path / "source").iterdir())]

    def replace(row: Any, result: Any) -> None:
        if row["path"] == "x.png" and (camera / "x.png").read_bytes() == contents[0]:
            (camera / "x.png").write_bytes(contents[1])

    (camera / "x.png").write_bytes(contents[0])
    with watching(checkpoint, camera, move_to=tmp_path / "sorted", threshold=0.0, on_row=replace):
        wait_for(lambda: not list(camera.iterdir()))
    assert len(rows(tmp_path / "out")) == 2
    assert [path.read_bytes() for path in (tmp_path / "sorted" / "defective").iterdir()] == [contents[1]]
