"""Outputs: no two collide, none escapes, none is taken for an input, nothing that was there is lost unasked."""

import json
import os
from functools import partial
from pathlib import Path

import pytest
from trust_cases import OTHER_USER, SMALLEST_FLAGS, Ended, Running, open_to_all, read_scores, run, write_images

from almrr_ref.report.scores import clear_results
from almrr_ref.run.files import OutputError, hold_folder

ODD_NAMES = ("=1+1.png", "@x.png", "new\nline.png", "<script>.png", "'quote\".png", "100%.png", "%2E.png", "x..png")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("network")
    write_images(folder / "good", 3)
    assert train(folder / "good", folder / "run").code == 0
    return folder / "run" / "last.pt"


def train(data: Path, out: Path, *more: str) -> Ended:
    arguments = ["--data", str(data), "--out", str(out), *SMALLEST_FLAGS, "--steps", "1", *more]
    return run("train", arguments, data.parent / "io")


def predict(checkpoint: Path, source: Path, out: Path, *more: str, name: str = "predict", **options: int) -> Ended:
    """Run predict, or evaluate."""
    where = ["--checkpoint", str(checkpoint), {"predict": "--input", "evaluate": "--data"}[name], str(source)]
    return run(name, [*where, "--out", str(out), *more], checkpoint.parent / "io", **options)


def files_below(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}


def test_evaluate_and_predict_give_every_odd_name_its_own_output_and_stay_inside(
    checkpoint: Path, tmp_path: Path
) -> None:
    root, out, found = tmp_path / "data" / "=cloth", tmp_path / "deep" / "out", tmp_path / "deep" / "found"
    write_images(root / "train" / "good", 1)
    for kind in ("good", "=<i>"):
        write_images(root / "test" / kind, 1)
        for name in ODD_NAMES:
            (root / "test" / kind / name).hardlink_to(root / "test" / kind / "000.png")
    assert predict(checkpoint, root, out, name="evaluate").code == 0
    count = 2 * (1 + len(ODD_NAMES))
    assert len(list((out / "overlays").rglob("*.png"))) == count
    assert json.loads((out / "metrics.json").read_text())["counts"]["images"] == count
    (root / "test" / "good" / "000.jpg").hardlink_to(root / "test" / "good" / "000.png")
    assert predict(checkpoint, root / "test", found).code == 0
    for pattern in ("overlays/**/*.png", "maps/**/*.tiff"):
        assert len(list(found.glob(pattern))) == count + 1
    assert {path.name for path in (*tmp_path.iterdir(), *out.parent.iterdir())} == {"data", "deep", "out", "found"}


@pytest.mark.parametrize("inside", ["found", "."])
def test_results_below_the_input_folder_are_neither_predicted_nor_trained_on(
    checkpoint: Path, tmp_path: Path, inside: str
) -> None:
    source = tmp_path / "in"
    write_images(source / "sub", 2)
    assert "lies in the data folder" in train(source, source / inside).error_line  # a resumed run would train on it
    assert len(files_below(source)) == 2
    assert predict(checkpoint, source, source / inside).code == 0
    first = files_below(source)
    for out, more in ((source / inside, ["--overwrite"]), (tmp_path / "out", [])):
        again = predict(checkpoint, source, out, *more)
        assert again.code == 0
        assert again.err.count("earlier results") == 3
        assert [row["path"] for row in read_scores(out)] == ["sub/000.png", "sub/001.png"]
    assert files_below(source) == first
    assert f"{source / inside / 'layers'} holds pictures of earlier" in train(source, tmp_path / "run").error_line


@pytest.mark.parametrize(("streams", "steps"), [(["out"], "3"), (["err"], "3"), (["out", "err"], "0")])
def test_output_that_nobody_reads_any_more_is_no_traceback(tmp_path: Path, streams: list[str], steps: str) -> None:
    """As in `train | head -1`, `2>&1 | true`; also when there is an error to tell (--steps 0)."""
    write_images(tmp_path / "good", 3)
    pipes = [tmp_path / name for name in streams]
    for pipe in pipes:
        os.mkfifo(pipe)
    arguments = ["--data", str(tmp_path / "good"), *SMALLEST_FLAGS, "--steps", steps, "--out", str(tmp_path / "run")]
    process = Running("train", arguments, tmp_path)
    for pipe in pipes:
        os.close(os.open(pipe, os.O_RDONLY))  # waits for the command to open its end
        pipe.unlink()
    ended = process.end()
    assert ended.code == (0 if streams == ["err"] else 2)  # a warning may get lost
    assert "Traceback" not in ended.err
    if streams == ["out"]:
        assert "nobody reads what is printed" in ended.error_line


def test_what_predict_does_not_read_is_named_even_where_the_terminal_cannot_show_it(
    checkpoint: Path, tmp_path: Path
) -> None:
    """A folder without permission is an error; links that lead in circles and other files are notes."""
    source, out = tmp_path / "in", Path(os.fsdecode(bytes(tmp_path) + b"/out \xff\n"))
    write_images(source / "a", 1)
    write_images(source / "closed", 1)
    (source / "a" / "circle").symlink_to(source, target_is_directory=True)
    (source / "a" / "notes.txt").write_text("?")
    open_to_all(tmp_path)
    open_to_all(checkpoint.parent)
    out.mkdir()
    out.chmod(0o777)
    (source / "closed").chmod(0)
    try:
        ended = predict(checkpoint, source, out, user=OTHER_USER)
    finally:
        (source / "closed").chmod(0o755)
    assert ended.code == 1, ended
    assert f"not read: {source / 'closed'}: the folder cannot be read (Permission denied)" in ended.err
    assert "circle is not read" in ended.err
    assert "first: notes.txt" in ended.err
    assert f"results in {tmp_path}/out \\udcff\\n\n" in ended.out
    assert [row["path"] for row in read_scores(out)] == ["a/000.png", "closed"]


@pytest.mark.parametrize("name", ["evaluate", "predict"])
def test_earlier_results_stay_unless_overwritten_and_never_mix_with_other_ones(
    checkpoint: Path, tmp_path: Path, name: str
) -> None:
    root, out = tmp_path / "set", tmp_path / "out"
    write_images(root / "train" / "good", 1)
    write_images(root / "test" / "good", 2)
    again = partial(predict, checkpoint, root if name == "evaluate" else root / "test", out, name=name)
    assert again().code == 0
    (out / "overlays" / "mine.txt").write_text("kept")
    before = {file: (out / file).read_bytes() for file in files_below(out)}
    (root / "test" / "good" / "001.png").rename(root / "test" / "good" / "002.png")
    assert f"'{out}' holds earlier results (scores.csv); replace them with --overwrite" in again().error_line
    with hold_folder(out):
        assert f"'{out}' is in use by process {os.getpid()} on " in again("--overwrite").error_line
    if name == "predict":
        (tmp_path / "empty").mkdir()
        for source in (tmp_path / "empty", tmp_path / "missing"):
            assert str(source) in predict(checkpoint, source, out, "--overwrite").error_line
            predict(checkpoint, source, tmp_path / "new")
        assert not (tmp_path / "new").exists(), "the next try would meet what looks like earlier results"
    assert {file: (out / file).read_bytes() for file in files_below(out)} == before
    assert again("--overwrite").code == 0
    assert files_below(out) == {file.replace("001.png", "002.png") for file in before}


def test_a_run_started_anew_does_not_keep_the_evaluation_of_the_old_one(tmp_path: Path) -> None:
    write_images(tmp_path / "set" / "train" / "good", 3)
    write_images(tmp_path / "set" / "test" / "good", 1)
    out = tmp_path / "run"
    assert train(tmp_path / "set", out).code == 0
    assert (out / "evaluation" / "metrics.json").exists()
    diverged = train(tmp_path / "set", out, "--steps", "30", "--lr", "1e30", "--overwrite")
    assert "not finite" in diverged.error_line
    assert files_below(out) <= {"log.jsonl", "synthetic.png"}


def test_what_is_named_like_results_but_is_none_stays_though_overwritten(tmp_path: Path) -> None:
    for name in ("index.html", "layers/app.js", "maps/world.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    before = files_below(tmp_path)
    with pytest.raises(OutputError, match=r"holds index\.html, but no scores\.csv"):
        clear_results(tmp_path, overwrite=True)
    assert files_below(tmp_path) == before
    kept = {"scores.csv.monday", "scores.csv.xlsx", "boxes.json.checked"}
    for name in {"scores.csv.part", "scores.csv.0", "boxes.json.12.part", *kept}:
        (tmp_path / name).touch()
    clear_results(tmp_path, overwrite=True)
    assert files_below(tmp_path) == kept
