"""bench/station.py: what cannot be measured is one line at once, not a long wait; the rest needs minutes."""

from pathlib import Path

import pytest
import station


@pytest.mark.parametrize("what", ["load", "kills"])
def test_wrong_paths_are_one_line_at_once(what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "pictures" / "more").mkdir(parents=True)
    checkpoint = tmp_path / "last.pt"
    flags = [what, "--checkpoint", str(checkpoint), "--pictures"]
    assert station.main([*flags, str(tmp_path / "pictures")]) == 2
    assert "last.pt: there is no such checkpoint" in capsys.readouterr().err
    checkpoint.write_bytes(b"")
    for folder, reason in (("pictures", "holds folders"), ("absent", "No such file")):
        assert station.main([*flags, str(tmp_path / folder)]) == 2
        assert reason in capsys.readouterr().err
