"""The README's Python block runs as it stands, in an empty folder and without network, and shows a picture."""

import os
import re
import subprocess
import sys
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent


def test_the_python_block_trains_judges_and_shows_a_picture(tmp_path: Path) -> None:
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("\n## Python\n")[1]
    (block, *_) = re.findall(r"^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    assert len(block.splitlines()) <= 12
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TORCH_HOME": str(tmp_path / "hub")}
    command = [sys.executable, "-W", "error", "-c", block]
    ended = subprocess.run(command, env=variables, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert ended.returncode == 0, ended.stderr
    assert "True" in ended.stdout, "the scratched picture is called defective"
    (picture,) = tmp_path.iterdir()
    with Image.open(picture) as shown:
        assert shown.width > 2 * shown.height > 200
