"""bench/station.py: what cannot be measured is one line at once, not a long wait; the rest needs minutes."""

from pathlib import Path

import pytest
import station
from PIL import Image


@pytest.mark.parametrize("what", ["load", "kills"])
def test_wrong_paths_are_one_line_at_once(what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "pictures" / "more").mkdir(parents=True)
    checkpoint = tmp_path / "last.pt"
    flags = [what, "--checkpoint", str(checkpoint), "--pictures"]
    assert station.main([*flags, str(tmp_path / "pictures")]) == 2
    assert "last.pt: there is no such checkpoint" in capsys.readouterr().err
    checkpoint.write_bytes(b"")
    for folder, reason in (("pictures", "also holds more"), ("absent", "No such file")):
        assert station.main([*flags, str(tmp_path / folder)]) == 2
        assert reason in capsys.readouterr().err


def test_a_watching_process_that_ends_by_itself_ends_the_bench(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "x.png").rename(tmp_path / "pictures" / "x.png")
    (tmp_path / "last.pt").write_bytes(b"junk")
    flags = ["--checkpoint", str(tmp_path / "last.pt"), "--pictures", str(tmp_path / "pictures"), "--kills", "1"]
    assert station.main(["kills", *flags]) == 2
    assert "the watching process ended by itself" in capsys.readouterr().err
