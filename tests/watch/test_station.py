"""A watched folder: each picture once, in order of arrival, whatever happens."""

import csv
import errno
import os
import random
import resource
import shutil
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from receiver import Receiver
from stations import rows, wait_for, watching
from trust_cases import Running, processor_time, run, slow_to_decode, write_images

from almrr_ref.calibration.drift import Drift
from almrr_ref.watch import station


def test_whole_files_are_judged_once_in_order_moved_and_named(
    checkpoint: Path, camera: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Renamed into place, written slowly, in a folder with an image's name, of several pages, broken, large, twice."""
    caplog.set_level("INFO", "almrr_ref")
    out, sorted_to = tmp_path / "out", tmp_path / "sorted"
    write_images(tmp_path / "source", 5, size=40)
    source = [(tmp_path / "source" / f"{i:03}.png").read_bytes() for i in range(5)]
    with watching(checkpoint, camera, move_to=sorted_to, threshold=0.0):
        (camera / "slow.png").write_bytes(source[0][:600])
        (tmp_path / "new.png").write_bytes(source[1])
        os.replace(tmp_path / "new.png", camera / "z first.png")
        time.sleep(0.06)
        with (camera / "slow.png").open("ab") as file:
            file.write(source[0][600:])
        wait_for(lambda: len(rows(out)) == 2)
        assert [(row["path"], row["error"]) for row in rows(out)] == [("z first.png", ""), ("slow.png", "")]
        wait_for(lambda: not (camera / "slow.png").exists())
        (camera / "slow.png").write_bytes(source[2])  # another picture of the name
        (camera / "below.png").mkdir()
        frames = [Image.new("L", (20, 20), grey) for grey in (0, 90)]
        frames[0].save(camera / "below.png" / "two.tif", save_all=True, append_images=frames[1:])
        (camera / "broken.png").write_bytes(source[3][:500])
        (camera / "huge.ppm").write_bytes(b"P6 100000 100000 255\n" + bytes(10))
        (camera / ".hidden.png").write_bytes(source[4])
        wait_for(lambda: len(rows(out)) == 7)
        wait_for(lambda: not any((camera / name).exists() for name in ("below.png/two.tif", "broken.png", "huge.ppm")))
    errors = {row["path"]: row["error"] for row in rows(out) if row["error"]}
    assert set(errors) == {"broken.png", "huge.ppm"}
    assert "pixels" in errors["huge.ppm"]
    assert f"not read: {camera / 'broken.png'}: " in caplog.text
    assert {"below.png/two.tif#1", "below.png/two.tif#2"} < {row["path"] for row in rows(out)}
    moved = {path.relative_to(sorted_to).as_posix(): path for path in sorted_to.rglob("*") if path.is_file()}
    again = next(name for name in moved if name.startswith("defective/slow-"))
    expected = {"defective/z first.png", "defective/slow.png", "defective/below.png/two.tif"}
    assert set(moved) == expected | {"unreadable/broken.png", "unreadable/huge.ppm", again}
    assert [moved["defective/slow.png"].read_bytes(), moved[again].read_bytes()] == [source[0], source[2]]


def test_a_new_start_judges_nothing_again_and_moves_what_a_kill_has_left(
    checkpoint: Path, camera: Path, tmp_path: Path
) -> None:
    write_images(camera, 4)
    with watching(checkpoint, camera):
        wait_for(lambda: len(rows(tmp_path / "out")) == 4)
    before = (tmp_path / "out" / "scores.csv").read_bytes()
    with watching(checkpoint, camera, move_to=tmp_path / "sorted"):
        wait_for(lambda: not list(camera.iterdir()))
    assert (tmp_path / "out" / "scores.csv").read_bytes() == before
    assert len(list((tmp_path / "sorted" / "good").iterdir())) == 4


def test_a_new_start_does_not_compare_what_another_threshold_judged_with_the_new_calibration(
    checkpoint: Path, camera: Path
) -> None:
    write_images(camera, 6)
    with watching(checkpoint, camera, threshold=0.99) as watched:
        wait_for(lambda: watched.counts["good"] == 6)
    for threshold, compared in ((0.99, True), (0.98, False)):
        drift = Drift([])
        with watching(checkpoint, camera, threshold=threshold, drift=drift) as watched:
            wait_for(lambda: watched.counts["good"] == 6)
        assert (len(drift.reference) == 6) == compared


def leave_only_by_copies(camera: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the camera's folder be a disk of its own."""
    rename = os.replace

    def between_disks(source: Any, target: Any) -> None:
        if Path(source).parent == camera:
            raise OSError(errno.EXDEV, "another disk")
        rename(source, target)

    monkeypatch.setattr(station.os, "replace", between_disks)


def test_a_picture_that_arrives_while_its_predecessor_is_copied_to_another_disk_is_judged(
    checkpoint: Path, camera: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_images(tmp_path / "source", 2)
    contents = [path.read_bytes() for path in sorted((tmp_path / "source").iterdir())]
    copy = shutil.copy2

    def slow_copy(source: Any, target: Any) -> None:
        copy(source, target)
        if Path(source).read_bytes() == contents[0]:
            Path(source).write_bytes(contents[1])

    leave_only_by_copies(camera, monkeypatch)
    monkeypatch.setattr(station.shutil, "copy2", slow_copy)
    (camera / "x.png").write_bytes(contents[0])
    with watching(checkpoint, camera, move_to=tmp_path / "sorted", threshold=0.0):
        wait_for(lambda: not list(camera.iterdir()))
    assert len(rows(tmp_path / "out")) == 2
    assert [path.read_bytes() for path in (tmp_path / "sorted" / "defective").iterdir()] == [contents[1]]


def test_a_picture_is_moved_to_a_disk_that_rounds_the_time_of_writing(
    checkpoint: Path, camera: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As FAT and network folders do."""
    copy = shutil.copy2

    def rounding_copy(source: Any, target: Any) -> None:
        copy(source, target)
        os.utime(target, (0, os.stat(source).st_mtime // 2 * 2))

    leave_only_by_copies(camera, monkeypatch)
    monkeypatch.setattr(station.shutil, "copy2", rounding_copy)
    write_images(camera, 1)
    with watching(checkpoint, camera, move_to=tmp_path / "sorted", threshold=0.0):
        wait_for(lambda: not list(camera.iterdir()))
    assert len(list((tmp_path / "sorted" / "defective").iterdir())) == 1


def test_kills_while_pictures_arrive_lose_no_row_double_none_and_tell_of_all(
    checkpoint: Path, camera: Path, tmp_path: Path, receiver: Receiver
) -> None:
    count, out, chance = 60, tmp_path / "out", random.Random(0)
    write_images(tmp_path / "source", count)
    flags = ["--checkpoint", str(checkpoint), "--watch", str(camera), "--out", str(out), "--no-maps", "--no-overlays"]
    flags += ["--webhook", receiver.url]

    def arrive() -> None:
        for path in sorted((tmp_path / "source").iterdir()):
            os.replace(path, camera / path.name)
            time.sleep(0.03)

    thread = threading.Thread(target=arrive)
    thread.start()
    for kill in range(5):
        process, seen = Running("predict", flags, tmp_path / f"io{kill}"), len(rows(out))
        done = count if kill == 4 else min(seen + 1, count)  # a slow machine may have judged all of them by then
        process.wait_until(lambda done=done: len(rows(out)) >= done)  # type: ignore[misc]
        if kill == 4:
            wait_for(lambda: len({entry["id"] for entry in receiver.taken}) >= count)
        else:
            time.sleep(0.1 * chance.random())
        process.kill()
        process.process.join()
    thread.join()
    names = [row["path"] for row in rows(out)]
    assert sorted(names) == [f"{i:03}.png" for i in range(count)]
    assert all(float(row["score"]) > 0 and row["judged"].endswith("+00:00") for row in rows(out))
    assert {entry["path"] for entry in receiver.taken} == set(names)
    assert len({entry["id"] for entry in receiver.taken}) == count
    assert {(entry["verdict"], entry["error"]) for entry in receiver.taken} <= {("good", None), ("defective", None)}


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the process at work by /proc")
def test_a_picture_that_always_kills_its_decoder_is_unreadable_and_the_next_is_judged(
    checkpoint: Path, camera: Path, tmp_path: Path
) -> None:
    out, sorted_to = tmp_path / "out", tmp_path / "sorted"
    with watching(checkpoint, camera, move_to=sorted_to, threshold=0.0) as watched:
        wait_for(lambda: hasattr(watched, "decoders"))
        (camera / "killer.jpg").write_bytes(slow_to_decode())
        while not (found := rows(out)):
            for decoder in watched.decoders.processes:
                with suppress(FileNotFoundError):
                    if processor_time(decoder.process.pid) > 80:  # after its start, which takes less
                        os.kill(decoder.process.pid, signal.SIGKILL)
            time.sleep(0.01)
        assert "decoder crashed" in found[0]["error"]
        write_images(camera, 2)
        wait_for(lambda: len(rows(out)) == 3)
    assert [row["error"] for row in rows(out)[1:]] == ["", ""]
    assert (sorted_to / "unreadable" / "killer.jpg").exists()


def test_a_full_disk_is_said_and_waited_for(
    checkpoint: Path, camera: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A limit on the size of files stands for the disk: it needs no privileges."""
    caplog.set_level("INFO", "almrr_ref")
    write_images(camera, 1)
    unlimited, table = resource.getrlimit(resource.RLIMIT_FSIZE), tmp_path / "out" / "scores.csv"
    with watching(checkpoint, camera):
        wait_for(lambda: len(rows(tmp_path / "out")) == 1)
        write_images(tmp_path / "more", 2, seed=1)
        for path in (tmp_path / "more").iterdir():
            os.replace(path, camera / f"late {path.name}")
        resource.setrlimit(resource.RLIMIT_FSIZE, (table.stat().st_size + 20, unlimited[1]))
        try:
            wait_for(lambda: "limit" in caplog.text)
            size = table.stat().st_size
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        wait_for(lambda: len(rows(tmp_path / "out")) == 3)
        wait_for(lambda: "it works again" in caplog.text)
    assert len(next(csv.reader([table.read_bytes()[:size].decode().splitlines()[-1]]))) == 14, "a row is half"
    assert caplog.text.count("trying again until it works") == 1


def test_a_file_that_cannot_be_read_or_moved_keeps_no_other_one_waiting(
    checkpoint: Path, camera: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = os.replace

    def refusing(source: Any, target: Any) -> None:
        if Path(source).name == "foreign.png":
            raise PermissionError(errno.EACCES, "Permission denied")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refusing)
    write_images(tmp_path / "new", 2)
    (camera / "circle.png").symlink_to("circle.png")
    with watching(checkpoint, camera, move_to=tmp_path / "sorted", threshold=0.0) as watched:
        shutil.copy(tmp_path / "new" / "000.png", camera / "foreign.png")
        wait_for(lambda: len(rows(tmp_path / "out")) == 1 and "circle.png" in watched.trouble)
        (camera / "circle.png").unlink()
        shutil.copy(tmp_path / "new" / "001.png", camera / "later.png")
        wait_for(lambda: (tmp_path / "sorted" / "defective" / "later.png").exists())
        wait_for(lambda: watched.trouble == f"cannot move {camera / 'foreign.png'}: Permission denied")
    assert (camera / "foreign.png").exists()


def test_a_name_too_long_to_be_moved_keeps_no_other_one_waiting(checkpoint: Path, camera: Path, tmp_path: Path) -> None:
    write_images(tmp_path / "new", 3)
    name, moved = "n" * 240 + ".png", tmp_path / "sorted" / "defective"
    moved.mkdir(parents=True)
    shutil.copy(tmp_path / "new" / "000.png", moved / name)  # another of its name is there
    shutil.copy(tmp_path / "new" / "001.png", camera / name)
    with watching(checkpoint, camera, move_to=moved.parent, threshold=0.0) as watched:
        wait_for(lambda: "too long" in watched.trouble)
        (tmp_path / "new" / "002.png").rename(camera / "later.png")
        wait_for((moved / "later.png").exists)
    assert (camera / name).exists()


def test_its_own_pictures_in_the_watched_folder_are_not_judged(checkpoint: Path, camera: Path, tmp_path: Path) -> None:
    write_images(tmp_path / "new", 2)
    own = camera / "found" / "overlays"
    own.mkdir(parents=True)
    own.with_name("scores.csv").touch()
    shutil.copy(tmp_path / "new" / "000.png", own / "x.png")  # arrives first
    shutil.copy(tmp_path / "new" / "001.png", camera / "later.png")
    with watching(checkpoint, camera):
        wait_for(lambda: bool(rows(tmp_path / "out")))
    assert [row["path"] for row in rows(tmp_path / "out")] == ["later.png"]


def test_wrong_use_is_one_line(checkpoint: Path, camera: Path, tmp_path: Path) -> None:
    base = ["--checkpoint", str(checkpoint), "--out", str(tmp_path / "out")]
    watch = [*base, "--watch", str(camera)]
    (tmp_path / "empty").touch()
    for flags, said in (
        ([*base, "--watch", str(tmp_path / "absent")], "no such folder"),
        ([*watch, "--webhook", "file:///etc/passwd"], "--webhook is a URL such as https"),
        ([*watch, "--webhook", "http://user:word@host/"], "no user and password"),
        ([*watch, "--webhook", "http://host:99999/"], "Port out of range"),
        ([*watch, "--webhook", "http://x", "--webhook-secret-file", str(tmp_path / "empty")], "is empty"),
        ([*watch, "--move-to", str(camera)], "is the watched folder"),
        ([*base, "--input", str(camera), "--move-to", str(tmp_path)], "go with --watch"),
    ):
        assert said in run("predict", flags, tmp_path / "io").error_line
    (tmp_path / "out").mkdir(exist_ok=True)
    (tmp_path / "out" / "scores.csv").write_text("path,score\r\nx.png,0.5\r\n")
    assert "is not of a watched folder" in run("predict", watch, tmp_path / "io").error_line
