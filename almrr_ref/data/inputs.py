"""What to predict: a file, or a folder -> the image files in it and below, in a fixed order."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

from almrr_ref.data.images import ImageError, is_image_file
from almrr_ref.run.distributed import rank
from almrr_ref.run.files import SCORES, is_of_results
from almrr_ref.run.text import one_line


def find_inputs(source: Path) -> Iterator[Path | ImageError]:
    """The one file itself; or the image files of a folder and of all folders below it, sorted.

    What looks like an image or may hold some, but is not read, is named: a folder without permission as an ImageError;
    linked folders (they may lead in circles) and the pictures of earlier runs in a note on the screen.

    Raises:
        ValueError: if there is no such file or folder, or it cannot be read.
    """
    if source.is_file():
        yield source
    elif not source.is_dir():
        raise ValueError(f"--input {one_line(source)}: no such file or folder")
    elif not os.access(source, os.R_OK | os.X_OK):
        raise ValueError(f"--input {one_line(source)}: no permission to read it")
    else:
        yield from _images_below(source)


def _images_below(folder: Path) -> Iterator[Path | ImageError]:
    try:
        names = sorted(name for name in os.listdir(folder) if not name.startswith("."))  # names: paths need much memory
    except OSError as error:
        yield ImageError(folder, f"the folder cannot be read ({error.strerror})")
        return
    others = [name for name in names if not is_image_file(name) and (folder / name).is_file()]
    others = [name for name in others if not name.startswith(SCORES)]
    if others:
        _note(f"{len(others)} files in {one_line(folder)} are not named like images (first: {one_line(others[0])})")
    for path in (folder / name for name in names):
        if is_image_file(path):
            yield path  # also a folder of such a name: reading it says what is wrong
        elif not path.is_dir():
            continue
        elif path.is_symlink():
            _note(f"linked folder {one_line(path)} is not followed")
        elif is_of_results(path):
            _note(f"earlier results in {one_line(path)} are not read as images")
        else:
            yield from _images_below(path)


def _note(text: str) -> None:
    if rank() == 0:
        print(f"note: {text}", file=sys.stderr)
