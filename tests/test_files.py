"""Writing at once or not at all, and names of outputs that neither collide nor escape."""

import errno
import os
import re
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from almrr_ref.run import files
from almrr_ref.run.files import OutputError, atomic_path, atomic_write, hold_folder, make_folder, output_name


def test_atomic_write_replaces_whole_and_leaves_nothing_beside(tmp_path: Path) -> None:
    target = tmp_path / "new" / "x.json"
    atomic_write(target, "first")
    atomic_write(target, b"second")
    assert target.read_bytes() == b"second"
    assert os.listdir(target.parent) == ["x.json"]


def test_a_failure_while_writing_keeps_the_old_file_and_removes_the_temporary_one(tmp_path: Path) -> None:
    target = tmp_path / "x.pt"
    atomic_write(target, "old")

    def fail() -> None:
        with atomic_path(target) as temporary:
            temporary.write_text("half")
            assert target.read_text() == "old"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["x.pt"]


def test_the_file_is_synced_before_it_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(files.os, "fsync", lambda number: (steps.append("sync"), sync(number)))
    monkeypatch.setattr(files.os, "replace", lambda a, b: (steps.append("rename"), replace(a, b)))
    atomic_write(tmp_path / "x", "data")
    assert steps[:2] == ["sync", "rename"]


def test_a_folder_in_the_place_of_a_file_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    with pytest.raises(OutputError, match=r"cannot write '.*x': a folder of that name is in the way") as caught:
        atomic_write(tmp_path / "x", "data")
    assert "\n" not in str(caught.value)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="a file is in the place of a folder"):
        atomic_write(tmp_path / "file" / "y", "data")
    with pytest.raises(OutputError, match="in the place of a folder"):
        make_folder(tmp_path / "file")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_unwritable_folder_is_one_clear_line(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="permission denied"):
        make_folder(tmp_path)


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    error = files.output_error(OSError(errno.ENOSPC, "No space left on device"), tmp_path / "last.pt")
    assert re.fullmatch(r"cannot write '.*last\.pt': the disk is full; free some space .*", str(error))


def test_a_held_folder_shows_its_holder_and_is_free_afterwards(tmp_path: Path) -> None:
    with hold_folder(tmp_path):
        assert f"process {os.getpid()} on " in (tmp_path / ".lock").read_text()
    assert not os.listdir(tmp_path)


def test_a_lock_file_that_its_holder_has_just_removed_is_not_taken(tmp_path: Path) -> None:
    """Else two processes could hold a folder: one the file that is gone, one the new file."""
    path = tmp_path / ".lock"
    number = os.open(path, os.O_RDWR | os.O_CREAT)
    assert files._lock(path, number)
    path.unlink()
    assert not files._lock(path, number)
    path.touch()
    assert not files._lock(path, number)
    os.close(number)


@given(st.lists(st.text(st.characters(exclude_characters="\0"), min_size=1, max_size=9), min_size=1, max_size=4))
@example(["..", "..", "etc", ".."])
@example(["", "etc", ".x"])
def test_output_names_stay_inside_and_are_plain(parts: list[str]) -> None:
    name = output_name("/".join(parts), ".png")
    assert not name.startswith("/")
    assert all(part and not part.startswith(".") for part in name.split("/"))
    assert name.isprintable()
    assert "\\" not in name


def test_different_inputs_get_different_outputs() -> None:
    names = ["a/x.png", "b/x.png", "x.png", "x.jpg", "x", "a_x.png", "a%2Fx.png", "a\nx.png", "../x.png", "/x.png",
             "../../x.png", "x.png.png", "ä.png", "\udce4.png", "%E4.png", "n" * 251 + ".png", "n" * 252 + ".png",
             ".x.png", "%2Ex.png", "x.jpg.png/y.png"]  # fmt: skip
    outputs = [output_name(name, ".png") for name in names]
    assert len(set(outputs)) == len(names)
    assert output_name("a/x.png", ".png") == "a/x.png.png"
    assert max(len(part.encode()) for output in outputs for part in output.split("/")) < 255


def test_an_output_folder_never_stands_in_the_way_of_an_output_file() -> None:
    file, inside = output_name("x.jpg", ".png"), output_name("x.jpg.png/y.png", ".png")
    assert inside.split("/")[0] != file
