"""Long runs: memory and file handles do not grow with the number of images or steps.

A command over a few and over many, each in a process of its own; the peak memory of both must be alike. The numbers
here take seconds; ALMRR_LONG=1 in the environment makes them 10,000 images and 2,000 steps, which takes minutes.
"""

import os
from pathlib import Path

import pytest
from trust_cases import SMALLEST_FLAGS, Ended, run, write_images

LONG = bool(os.environ.get("ALMRR_LONG"))
IMAGES, PICTURES, STEPS = (10_000, 10_000, 2_000) if LONG else (2_000, 200, 160)
FEW = 40
MARGIN = 8.0 if LONG else 4.0  # MiB; 2,000 images and maps of 32x32 pixels, kept, would be 14
PICTURE_MARGIN = 12.0  # MiB; 160 overlays, kept, would be 80


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a network in run/, and folders of links to one image: few/, some/ and many/."""
    folder = tmp_path_factory.mktemp("long")
    write_images(folder / "good", 3)
    assert train(folder, "run", 10).code == 0
    for name, count in (("few", FEW), ("some", PICTURES), ("many", IMAGES)):
        (folder / name).mkdir()
        for i in range(count):
            (folder / name / f"{i}.png").hardlink_to(folder / "good" / "000.png")
    return folder


def train(root: Path, out: str, steps: int, *flags: str) -> Ended:
    base = ["--data", str(root / "good"), "--out", str(root / out), *SMALLEST_FLAGS, "--steps", str(steps)]
    ended = run("train", [*base, *flags], root / "io")
    assert ended.code == 0, ended
    return ended


def assert_no_growth(few: Ended, many: Ended, margin: float = MARGIN) -> None:
    assert few.code == many.code == 0, many
    assert many.peak - few.peak < margin, f"{few.peak:.0f} MiB grew to {many.peak:.0f}"
    assert many.open_files <= few.open_files


@pytest.mark.parametrize(
    ("flags", "name", "margin"),
    [
        (["--no-overlays", "--no-maps"], "many", MARGIN),
        (["--no-overlays"], "many", MARGIN),
        (["--tile", "32", "--no-overlays", "--no-maps"], "many", MARGIN),
        ([], "some", PICTURE_MARGIN),
    ],
)
def test_predictions_need_no_more_memory_or_handles_the_more_they_are(
    root: Path, tmp_path: Path, flags: list[str], name: str, margin: float
) -> None:
    def predict(folder: str) -> Ended:
        places = {"checkpoint": root / "run" / "last.pt", "input": root / folder, "out": tmp_path / folder}
        return run("predict", [*(f"--{key}={place}" for key, place in places.items()), *flags], root / "io")

    many = predict(name)
    assert_no_growth(predict("few"), many, margin)
    assert f"{PICTURES if name == 'some' else IMAGES} images in" in many.out


@pytest.mark.parametrize("workers", ["0", "1"])
def test_training_steps_need_no_more_memory_or_handles_the_more_they_are(root: Path, workers: str) -> None:
    few = train(root, f"few{workers}", 12, "--workers", workers)
    assert_no_growth(few, train(root, f"many{workers}", STEPS, "--workers", workers))
