"""Writing at once or not at all, and names of outputs that neither collide nor escape."""

import errno
import os
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from almrr_ref.run import files
from almrr_ref.run.files import OutputError, atomic_path, atomic_write, hold_folder, make_folder, output_name


def test_atomic_write_replaces_whole_and_leaves_nothing_beside(tmp_path: Path) -> None:
    target = tmp_path / "new" / "x.json"
    atomic_write(target, "first")
    with suppress(KeyboardInterrupt), atomic_path(target) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert target.read_text() == "first"
    atomic_write(target, b"second")
    assert target.read_bytes() == b"second"
    assert os.listdir(target.parent) == ["x.json"]


def test_the_file_is_synced_before_it_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda number: (steps.append("sync"), sync(number)))
    monkeypatch.setattr(os, "replace", lambda a, b: (steps.append("rename"), replace(a, b)))
    atomic_write(tmp_path / "x", "data")
    assert steps[:2] == ["sync", "rename"]


def test_what_stands_in_the_way_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    with pytest.raises(OutputError, match=r"^cannot write '.*x': a folder of that name is in the way; .*$"):
        atomic_write(tmp_path / "x", "data")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="a file is in the place of a folder"):
        atomic_write(tmp_path / "file" / "y", "data")
    with pytest.raises(OutputError, match="in the place of a folder"):
        make_folder(tmp_path / "file")
    full = r"^cannot write '.*last\.pt': the disk is full; free some space .*$"
    with pytest.raises(OutputError, match=full), files.writing(tmp_path / "last.pt"):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_lock_file_that_its_holder_has_just_removed_is_not_taken(tmp_path: Path) -> None:
    """Else two processes could hold a folder: one the file that is gone, one the new file."""
    path = tmp_path / ".lock"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    assert files._lock(path, descriptor)
    path.unlink()
    assert not files._lock(path, descriptor)
    path.touch()
    assert not files._lock(path, descriptor)
    os.close(descriptor)


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
    assert outputs[0] == "a/x.png.png"
    assert len(set(outputs)) == len(names)
    assert max(len(part.encode()) for output in outputs for part in output.split("/")) < 255
    assert not {output.split("/")[0] for output in outputs if "/" in output} & set(outputs), "a folder in a file's way"


def test_a_link_in_the_place_of_a_lock_costs_no_other_file(tmp_path: Path) -> None:
    (tmp_path / "received").mkdir()
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "received" / ".lock").symlink_to(tmp_path / "mine")
    with pytest.raises(OutputError, match="symbolic links"), hold_folder(tmp_path / "received"):
        pass
    assert (tmp_path / "mine").read_text() == "mine"
