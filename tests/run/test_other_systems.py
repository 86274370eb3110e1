"""What Windows and macOS lack is not needed: commands run without it, with a spawned worker, on files nobody holds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from trust_cases import SMALLEST_FLAGS, write_images

PROGRAM = """\
import json, os, signal, sys
import torch.multiprocessing, scipy.ndimage  # these import what they need for this system
MODULES = ("fcntl", "grp", "pwd", "resource", "termios", "triton")
sys.modules.update(dict.fromkeys(MODULES))
FUNCTIONS = ("fork", "getuid", "geteuid", "getloadavg", "killpg", "posix_fallocate", "sched_getaffinity", "O_NOFOLLOW")
for name in FUNCTIONS:
    vars(os).pop(name)
del signal.SIGHUP, signal.SIGUSR1
torch.multiprocessing.set_start_method("spawn")

def refusing_open_files(change):
    def changed(path, *others, **options):
        names = {os.path.realpath(each) for each in (path, *others) if not isinstance(each, int)}
        for number in os.listdir("/proc/self/fd"):
            link = f"/proc/self/fd/{number}"
            assert not (os.path.islink(link) and os.readlink(link) in names), f"{names} are in use"
        return change(path, *others, **options)
    return changed

for name in ("rename", "replace", "remove", "unlink"):
    setattr(os, name, refusing_open_files(getattr(os, name)))
platform, sys.platform = sys.platform, "win32"
import almrr_ref.run.files as files
sys.platform = platform
files.sys = type("Windows", (), {"platform": "win32", "stderr": sys.stderr})
from almrr_ref import calibrate, evaluate, predict, train
commands = {"calibrate": calibrate, "evaluate": evaluate, "predict": predict, "train": train}
for name, *flags in json.loads(sys.argv[1]):
    assert commands[name].main(flags) == 0, name
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="Linux tells which files are open")
def test_the_commands_run_without_what_only_linux_has(tmp_path: Path) -> None:
    write_images(tmp_path / "data" / "train" / "good", 8)
    write_images(tmp_path / "data" / "test" / "good", 2, seed=1)
    write_images(tmp_path / "data" / "test" / "dent", 2, seed=2)
    network = ["--checkpoint", "run/last.pt"]
    training = ["train", "--data", "data", "--out", "run", *SMALLEST_FLAGS, "--steps", "2", "--workers"]
    commands = [
        [*training, "1"],
        [*training, "0", "--overwrite"],
        ["calibrate", *network, "--good", "data/train/good"],
        *(["predict", *network, "--input", "data/test", "--out", "found", *again] for again in ([], ["--overwrite"])),
        ["evaluate", *network, "--data", "data", "--out", "judged"],
    ]
    path = os.pathsep.join([str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "cp1252:strict"}
    program = [sys.executable, "-W", "ignore", "-c", PROGRAM, json.dumps(commands)]
    done = subprocess.run(program, cwd=tmp_path, env=environment, capture_output=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr.decode(errors="replace")
