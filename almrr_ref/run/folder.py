"""The folder of a training run: found or made, kept for one process, and what it is resumed from."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from almrr_ref.config import PRESETS, make_configs
from almrr_ref.run.checkpoint import read_checkpoint
from almrr_ref.run.files import hold_folder, make_folder
from almrr_ref.run.text import one_line

MAY_CHANGE = ("workers",)  # settings that a resumed run may have otherwise: they do not touch the result


@contextmanager
def open_run(
    out: Path | None, data: str, wanted: dict[str, Any], resume: bool, overwrite: bool
) -> Iterator[tuple[Path, dict[str, Any] | None]]:
    """Within this block: the folder of a run, kept for this process, and the checkpoint to continue from.

    Args:
        out: the folder, or None for runs/NAME of the data.
        data: the --data value.
        wanted: the settings named by preset and flags; a resumed run must have the same.
    Yields:
        The folder, and the checkpoint's dictionary if the run is resumed (None if there is nothing to resume yet).
    Raises:
        ValueError: if a run is already there and neither is said, another process is at it, or a setting differs from
            the resumed run's.
    """
    if not data:
        raise ValueError("--data is empty; give a folder of images, or 'demo'")
    run = out or Path("runs") / (Path(data).resolve().name or "root")
    if run.is_file():
        raise ValueError(f"--out {run} is a file; name a folder")
    if data != "demo" and Path(data).resolve() in [run.resolve(), *run.resolve().parents]:
        raise ValueError(f"--out {run} lies in the data folder, whose images are trained on; name a folder elsewhere")
    with hold_folder(make_folder(run)):
        there = (run / "last.pt").exists()
        if there and not (resume or overwrite):
            raise ValueError(
                f"{run} holds a run already; continue it with --resume, replace it with --overwrite, or name another "
                "--out"
            )
        if resume and not there:
            print(f"no checkpoint in {one_line(run)} yet: starting from the beginning")
        yield run, _read_stored(run, wanted) if resume and there else None


def _read_stored(run: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    content = read_checkpoint(run / "last.pt")
    stored = {**content["model_config"], **content["train_config"]}
    for name, value in wanted.items():
        if name not in MAY_CHANGE and _plain(name, value) != _plain(name, stored.get(name)):
            raise ValueError(
                f"--resume: the run in {run} has {name.replace('_', '-')} {stored.get(name)}, not {value}; "
                "give the flags of its first command again, or start anew with another --out"
            )
    return content


def _plain(name: str, value: Any) -> Any:
    """A setting in the form in which two of them can be compared: folders as absolute paths, lists as tuples."""
    if name in ("data", "anomaly_source", "weights") and value not in (None, "demo", "random"):
        return Path(value).resolve()
    return tuple(value) if isinstance(value, list) else value


def wanted_settings(preset: str | None, given: dict[str, Any]) -> dict[str, Any]:
    """The settings that the command line names, by preset or flag, for comparing with a run to resume.

    Raises:
        ValueError: as `make_configs`.
    """
    values = {name: value for config in make_configs(preset or "paper", given) for name, value in vars(config).items()}
    return {name: values[name] for name in {**PRESETS.get(preset or "", {}), **given}}
