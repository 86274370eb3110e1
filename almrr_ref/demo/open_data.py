"""What --data names: a folder in any known layout, or the demo set."""

import shutil
from pathlib import Path

from almrr_ref.data.layouts import DataSet, describe, find_dataset
from almrr_ref.demo.surfaces import write_demo


def open_data(data: str, run: Path) -> DataSet:
    """Read a data folder, or the demo set, written into the run's folder when it is missing; print what it holds."""
    folder = run / "demo-images" if data == "demo" else Path(data)
    if data == "demo" and not folder.is_dir():
        unfinished = run / ".demo-images.part"
        shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was killed while it drew them
        write_demo(unfinished)
        unfinished.rename(folder)
    data_set = find_dataset(folder)
    print(describe(data_set))
    return data_set
