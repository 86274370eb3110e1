"""Images of one size, one after the other: in memory, or beyond a budget in a file that the system caches."""

import math
import os
import tempfile
from contextlib import suppress

import torch
from torch import Tensor

from almrr_ref.data.dataset import DataError

IN_MEMORY = 2**30  # bytes; a hundred thousand images of 256 x 256 have 20 times as many


class ImageRows:
    """Images uint8 (n, 3, height, width), whose number can grow; the file is gone as soon as nobody uses them."""

    def __init__(self, size: tuple[int, int]) -> None:
        self.images = torch.empty((0, 3, *size), dtype=torch.uint8)

    def reserve(self, count: int) -> None:
        """Make room for as many images; those that are there stay. Raises DataError if the disk is full."""
        if count <= len(self.images):
            return
        before, shape = self.images, (count, *self.images.shape[1:])
        kept_in_memory = math.prod(shape) <= IN_MEMORY  # what is unused of an empty tensor takes none
        self.images = torch.empty(shape, dtype=torch.uint8) if kept_in_memory else _in_a_file(shape)
        self.images[: len(before)] = before

    def arrange(self, numbers: list[int]) -> Tensor:
        """Bring the images of these numbers, all different, to the front, in place: a copy might not fit; -> them."""
        order = [*numbers, *sorted(set(range(len(self.images))).difference(numbers))]
        for start in range(len(order)):
            if order[start] == start:
                continue
            first, to = self.images[start].clone(), start
            while (row := order[to]) != start:
                self.images[to] = self.images[row]
                order[to], to = to, row
            self.images[to] = first
            order[to] = to
        return self.images[: len(numbers)]


def _in_a_file(shape: tuple[int, ...]) -> Tensor:
    """An uninitialised uint8 tensor in a temporary file that has no name any more."""
    size, folder = math.prod(shape), tempfile.gettempdir()
    handle, name = tempfile.mkstemp(prefix="almrr-", suffix=".images", dir=folder)
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(handle, 0, size)  # a full disk is found now, and by name
        return torch.from_file(name, shared=True, size=size, dtype=torch.uint8).view(shape)
    except OSError as error:
        raise DataError(
            f"the images take {size / 1e9:.1f} GB, for which {folder} has no room ({error.strerror}); let TMPDIR name "
            "a folder on another disk"
        ) from error
    finally:
        os.close(handle)
        with suppress(PermissionError):  # Windows keeps a file that is in use
            os.unlink(name)
