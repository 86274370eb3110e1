"""The command that predicts: the same answer in any company, every row beside its own map, failures by name.

Long runs: a command over a few images or steps and over many, each in a process of its own; the peak memory of both
must be alike. ALMRR_LONG=1 in the environment makes them 10,000 images and 2,000 steps, which takes minutes.
"""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from trust_cases import MEMORY_FLAGS, SMALLEST_FLAGS, Ended, read_scores, run, write_images

from almrr_ref import Detector, load_checkpoint, predict
from almrr_ref.data.images import load_image
from almrr_ref.run.checkpoint import read_checkpoint

LONG = bool(os.environ.get("ALMRR_LONG"))
IMAGES, PICTURES, STEPS = (10_000, 10_000, 2_000) if LONG else (1_000, 100, 100)
FEW = 20
MARGIN = 9.0 if LONG else 5.0  # MiB; 1,000 images and maps of 32x32 pixels, kept, would be 7; 100 of 100x100 as much
PICTURE_MARGIN = 12.0  # MiB; 60 overlays, kept, would be 30


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """good/ with 15 images of three sizes, and a network trained on them in run/."""
    folder = tmp_path_factory.mktemp("predict")
    for seed, size in enumerate((32, 45, 100)):
        write_images(folder / "good" / str(size), 5, seed, size)
    train(folder, "run", 4)
    return folder


def train(root: Path, out: str, steps: int, *flags: str) -> Ended:
    base = ["--data", str(root / "good"), "--out", str(root / out), *SMALLEST_FLAGS, *MEMORY_FLAGS]
    ended = run("train", [*base, "--steps", str(steps), *flags], root / "io")
    assert ended.code == 0, ended
    return ended


def flags_for(root: Path, source: Path, out: Path, network: str = "run/last.pt") -> list[str]:
    return ["--checkpoint", str(root / network), "--input", str(source), "--out", str(out)]


def test_the_same_bytes_come_twice_and_other_batches_hardly_change_a_score(root: Path, tmp_path: Path) -> None:
    for name, batch in (("a", "4"), ("b", "4"), ("one", "1"), ("all", "15")):
        flags = [*flags_for(root, root / "good", tmp_path / name), "--batch-size", batch]
        assert run("predict", flags, tmp_path / "io").code == 0
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.*"))
    files.remove(Path("index.html"))  # it names the folder
    assert len(files) == 2 + 3 * 15
    assert all((tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes() for file in files)
    expected, *others = ([float(row["score"]) for row in read_scores(tmp_path / name)] for name in ("a", "one", "all"))
    assert len(set(expected)) > 10, "scores that hardly differ prove nothing"
    for scores in others:
        assert scores == pytest.approx(expected, abs=1e-6, rel=0)


def test_every_row_stands_beside_its_own_map_and_says_what_python_says(root: Path, tmp_path: Path) -> None:
    model = load_checkpoint(root / "run" / "last.pt")
    assert predict.main([*flags_for(root, root / "good", tmp_path / "out"), "--batch-size", "4"]) == 0
    rows = read_scores(tmp_path / "out")
    paths = sorted((root / "good").rglob("*.png"))
    assert [row["path"] for row in rows] == [path.relative_to(root / "good").as_posix() for path in paths]
    for row, path in zip(rows, paths):
        with Image.open(tmp_path / "out" / "maps" / f"{row['path']}.tiff") as stored:
            width, height = stored.size
            anomaly_map = torch.frombuffer(bytearray(stored.tobytes()), dtype=torch.float32).view(1, 1, height, width)
        assert float(model.image_scores(anomaly_map)[0]) == pytest.approx(float(row["score"]), abs=1e-6)
        score = float(model.predict(load_image(path, (32, 32))[None].float() / 255)[1])
        assert float(row["score"]) == pytest.approx(score, abs=1e-5)  # folding changes the last digits
        assert (float(row["score"]) >= float(row["threshold"])) == (row["label"] == "1") == (int(row["area"]) > 0)


def test_several_inputs_have_distinct_names_and_every_region_is_a_box(root: Path, tmp_path: Path) -> None:
    sources = [root / "good" / "45", root / "good" / "100" / "000.png", root / "good" / "32"]
    flags = flags_for(root, sources[0], tmp_path / "out")
    paths = [*sorted(sources[0].iterdir()), sources[1], *sorted(sources[2].iterdir())]
    results = Detector.load(root / "run" / "last.pt", "cpu").batch(paths)
    threshold = sorted(result.score for result in results)[5]  # six images are defective
    more = ["--input", *map(str, sources[1:]), "--threshold", repr(threshold), "--no-maps", "--no-overlays"]
    assert predict.main([*flags, *more]) == 0
    assert "--no-overlays --no-maps --input" in (tmp_path / "out" / "index.html").read_text(), "in the command to copy"
    rows, boxes = read_scores(tmp_path / "out"), json.loads((tmp_path / "out" / "boxes.json").read_text())
    names = [path.relative_to(root / "good").as_posix() for path in paths]
    assert [row["path"] for row in rows] == [image["file_name"] for image in boxes["images"]] == names
    assert [image["height"] for image in boxes["images"]] == [45] * 5 + [100] + [32] * 5
    assert sum(row["label"] == "1" for row in rows) == 6
    assert boxes["categories"] == [{"id": 1, "name": "defect"}]
    results = Detector.load(root / "run" / "last.pt", "cpu", threshold).batch(paths)
    for number, (result, row) in enumerate(zip(results, rows), start=1):
        annotations = [entry for entry in boxes["annotations"] if entry["image_id"] == number]
        assert len(annotations) == len(result.regions)
        assert bool(annotations) == (row["label"] == "1")
        for entry, region in zip(annotations, result.regions):
            x, y, width, height = entry["bbox"]
            assert ((x, y, x + width, y + height), entry["area"]) == (region.box, region.area)
            assert entry["score"] == pytest.approx(region.peak, abs=1e-6)
    assert [entry["id"] for entry in boxes["annotations"]] == list(range(1, len(boxes["annotations"]) + 1))


def test_a_link_to_an_input_is_that_input(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "link").symlink_to(root / "good")
    flags = [*flags_for(root, root / "good", tmp_path / "out"), "--input", str(tmp_path / "link")]
    assert predict.main(flags) == 2
    assert "is given twice" in capsys.readouterr().err


def test_a_star_that_no_shell_has_replaced_stands_for_the_files_it_fits(root: Path, tmp_path: Path) -> None:
    """As in cmd.exe; a file of that very name is that file."""
    names = sorted(path.name for path in (root / "good" / "32").glob("*.png"))
    assert predict.main(flags_for(root, root / "good" / "32" / "*.png", tmp_path / "out")) == 0
    assert [row["path"] for row in read_scores(tmp_path / "out")] == names
    shutil.copy(root / "good" / "32" / names[0], tmp_path / "*.png")
    shutil.copy(root / "good" / "32" / names[0], tmp_path / "x.png")
    assert predict.main(flags_for(root, tmp_path / "*.png", tmp_path / "again")) == 0
    assert [row["path"] for row in read_scores(tmp_path / "again")] == ["*.png"]
    assert predict.main(flags_for(root, tmp_path / "*.jpg", tmp_path / "none")) == 2
    shutil.copytree(root / "good" / "32", tmp_path / "lot [7]")
    assert predict.main(flags_for(root, tmp_path / "lot [7]" / "*.png", tmp_path / "lot")) == 0
    assert [row["path"] for row in read_scores(tmp_path / "lot")] == names


def test_the_page_names_the_folder_that_is_called_a_dot(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root / "good" / "32")
    assert predict.main(flags_for(root, Path("."), tmp_path / "out")) == 0
    assert "<title>Defect maps of 32" in (tmp_path / "out" / "index.html").read_text()


@pytest.mark.parametrize(("first", "second"), [("good", "good/32"), ("good/32", "good"), ("good/32", "good/45/../32")])
def test_an_input_that_lies_in_another_one_is_refused(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], first: str, second: str
) -> None:
    assert predict.main([*flags_for(root, root / first, tmp_path / "out"), "--input", str(root / second)]) == 2
    assert f"--input {root / 'good' / '32'} is given twice, or lies in another --input" in capsys.readouterr().err


@pytest.fixture(scope="module")
def long(root: Path) -> Path:
    """Folders of links to one image: few/, some/ and many/; and tiled.pt, the network as if trained with tiles."""
    content = read_checkpoint(root / "run" / "last.pt")
    content["model_config"]["tile"] = 50
    torch.save(content, root / "tiled.pt")
    for name, count in (("few", FEW), ("some", PICTURES), ("many", IMAGES)):
        (root / name).mkdir()
        for i in range(count):
            (root / name / f"{i}.png").hardlink_to(root / "good" / "100" / "000.png")
    return root


def assert_no_growth(few: Ended, many: Ended, margin: float = MARGIN) -> None:
    assert few.code == many.code == 0, many
    assert many.peak - few.peak < margin, f"{few.peak:.0f} MiB grew to {many.peak:.0f}"
    assert many.open_files <= few.open_files


@pytest.mark.parametrize(
    ("flags", "name", "margin"),
    [
        (["--no-overlays"], "many", MARGIN),
        (["--tile", "100", "--no-overlays", "--no-maps"], "some", MARGIN),
        ([], "some", PICTURE_MARGIN),
    ],
)
def test_predictions_need_no_more_memory_or_handles_the_more_they_are(
    long: Path, tmp_path: Path, flags: list[str], name: str, margin: float
) -> None:
    network = "tiled.pt" if "--tile" in flags else "run/last.pt"
    few, many = (
        run("predict", [*flags_for(long, long / folder, tmp_path / folder, network), *flags], tmp_path / "io")
        for folder in ("few", name)
    )
    assert_no_growth(few, many, margin)
    assert f"{PICTURES if name == 'some' else IMAGES} images in" in many.out


@pytest.mark.parametrize("workers", ["0", "1"])
def test_training_steps_need_no_more_memory_or_handles_the_more_they_are(long: Path, workers: str) -> None:
    few = train(long, f"few{workers}", 12, "--workers", workers)
    assert_no_growth(few, train(long, f"many{workers}", STEPS, "--workers", workers))
