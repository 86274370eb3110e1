"""Folders -> the images and folders in them, sorted; and the inputs of predict: the images of all folders below.

The pages of a file of several pages are images; the file itself is none (decoding.py). Hidden files and clutter
(Thumbs.db, __MACOSX) are left out. A folder, pipe or dangling link that is *named* like an image counts as one, so that
loading it reports what is wrong.
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

from almrr_ref.data.decoding import ImageError, is_image_file, pages, split_page
from almrr_ref.run.distributed import rank
from almrr_ref.run.files import BOXES, SCORES, is_of_results
from almrr_ref.run.text import one_line

_CLUTTER = ("thumbs.db", "desktop.ini", "__macosx")


def list_folder(folder: Path) -> tuple[list[str], list[str], list[str]]:
    """Folder -> names of its images, names of its sub-folders, at most one note on other files. Raises OSError."""
    images: list[str] = []
    folders: list[str] = []
    others: list[str] = []
    for name in sorted(os.listdir(folder)):  # names: the paths of a hundred thousand images need much memory
        if is_image_file(name):
            images.append(name)
        elif not name.startswith((".", SCORES, BOXES)) and name.lower() not in _CLUTTER:
            (folders if os.path.isdir(folder / name) else others).append(name)
    note = f"{len(others)} files in {one_line(folder)} are not named like images"
    return images, folders, [f"{note} (first: {one_line(others[0])})"] if others else []


class Links:
    """Which paths below a folder to follow, so that each folder is read once, however many links lead to it."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self._read = {self._identity(root)}

    def first_paths(self, parent: Path, names: list[str]) -> tuple[list[str], list[str]]:
        """Names of a folder's sub-folders -> those to follow, and notes on the others."""
        followed, notes = [], []
        for name in names:
            path = parent / name
            inside = path.is_symlink() and self.root in path.resolve().parents
            identity = self._identity(path)
            if inside or identity in self._read:
                notes.append(f"linked folder {one_line(path)} is not read: {one_line(path.resolve())} is read already")
            else:
                self._read.add(identity)
                followed.append(name)
        return followed, notes

    @staticmethod
    def _identity(path: Path) -> tuple[int, int]:
        status = path.stat()
        return status.st_dev, status.st_ino


def find_inputs(source: Path) -> Iterator[Path | ImageError]:
    """The pictures of a file; or those of the image files in a folder and all folders below it, sorted.

    A folder that cannot be read is an ImageError. Earlier results, and links to folders that are read already, are left
    out with a note on the screen. Raises ValueError if the source cannot be read.
    """
    if split_page(source)[0].is_file():
        yield from _pages(source)
    elif not source.is_dir():
        raise ValueError(f"--input {one_line(source)}: no such file or folder")
    elif not os.access(source, os.R_OK | os.X_OK):
        raise ValueError(f"--input {one_line(source)}: no permission to read it")
    else:
        yield from _images_below(source, Links(source))


def _images_below(folder: Path, links: Links) -> Iterator[Path | ImageError]:
    try:
        names, folders, notes = list_folder(folder)
        folders, left_out = links.first_paths(folder, folders)
    except OSError as error:
        yield ImageError(folder, f"the folder cannot be read ({error.strerror})")
        return
    notes += left_out
    for name in folders:
        path = folder / name
        if is_of_results(path):
            notes.append(f"earlier results in {one_line(path)} are not read as images")
        else:
            names.append(name)
    for note in notes if rank() == 0 else []:
        print(f"note: {note}", file=sys.stderr)
    for name in sorted(names):
        if is_image_file(name):
            yield from _pages(folder / name)
        else:
            yield from _images_below(folder / name, links)


def _pages(path: Path) -> list[Path] | list[ImageError]:
    try:
        return pages(path)
    except ImageError as error:
        return [error]
