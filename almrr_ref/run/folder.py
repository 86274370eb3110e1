"""The folder of a training run: made and held for one process, with the checkpoint to resume from."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from almrr_ref.config import ModelConfig, TrainConfig
from almrr_ref.run.checkpoint import read_checkpoint, stored_config
from almrr_ref.run.files import hold_folder
from almrr_ref.run.text import LOGGER, one_line


@contextmanager
def open_run(
    out: Path | None, data: str, wanted: dict[str, Any], resume: bool = False, overwrite: bool = False
) -> Iterator[tuple[Path, dict[str, Any] | None]]:
    """Yield the folder of a run, held for this process, and the checkpoint to continue from, if there is one.

    Args:
        out, data: the flags; without --out the folder is runs/NAME of the data.
        wanted: the settings named by preset and flags; a resumed run must have the same.
    Raises:
        ValueError: if there is a run and neither flag is set, another process holds the folder, or a setting differs.
    """
    if not data:
        raise ValueError("--data is empty; give a folder of images, or 'demo'")
    run = out or Path("runs") / (Path(data).resolve().name or "root")
    if data != "demo" and Path(data).resolve() in [run.resolve(), *run.resolve().parents]:
        raise ValueError(f"--out {run} lies in the data folder, whose images are trained on; name a folder elsewhere")
    with _removed_if_unused(run), hold_folder(run):
        last, stored = run / "last.pt", None
        if not last.exists():
            if resume:
                LOGGER.info("no checkpoint in %s yet: starting from the beginning", one_line(run))
        elif resume:
            stored = read_checkpoint(last)
            model = stored_config(ModelConfig, stored["model_config"])
            train = stored_config(TrainConfig, stored["train_config"])
            _refuse_other_settings(run, {**vars(model), **vars(train)}, wanted)
        elif not overwrite:
            raise ValueError(f"{run} holds a run already: name another folder, or --resume or --overwrite it")
        yield run, stored


@contextmanager
def _removed_if_unused(run: Path) -> Iterator[None]:
    """Remove the folder after the block if the block made it and wrote nothing into it: its data was refused."""
    existed = run.exists()
    try:
        yield
    finally:
        if not existed:
            with suppress(OSError):
                run.rmdir()


def _refuse_other_settings(run: Path, stored: dict[str, Any], wanted: dict[str, Any]) -> None:
    for name, value in wanted.items():
        before = stored.get(name)
        if name == "data" and "demo" not in (before, value):
            continue  # the folder may have moved: its files are compared when they have been read
        if name in ("anomaly_source", "roi", "weights") and before and value:
            same = Path(before).resolve() == Path(value).resolve()
        else:
            same = before == value or value == "auto" or name == "workers"  # workers do not touch the result
        if not same:
            raise ValueError(
                f"--resume: the run in {run} has {name.replace('_', '-')} {before}, not {value}; "
                "give the flags of its first command again, or start anew with another --out"
            )
