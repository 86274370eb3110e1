"""Images of one size in one tensor: in memory, or above a budget in a file that the system caches."""

import math
import os
import tempfile
from contextlib import suppress

import torch
from torch import Tensor

from almrr_ref.data.dataset import DataError

IN_MEMORY = 2**30  # bytes; a hundred thousand images of 256 x 256 have 20 times as many


class ImageRows:
    """Images uint8 (n, 3, height, width), whose number can grow. Their file is gone once nothing uses them."""

    def __init__(self, size: tuple[int, int]) -> None:
        self.images = torch.empty((0, 3, *size), dtype=torch.uint8)

    def reserve(self, count: int) -> None:
        """Make room for ``count`` images in all; the present ones stay. Raises DataError if the disk is full."""
        if count <= len(self.images):
            return
        before, shape = self.images, (count, *self.images.shape[1:])
        fits = math.prod(shape) <= IN_MEMORY  # rows that are never written take no memory
        self.images = torch.empty(shape, dtype=torch.uint8) if fits else _in_a_file(shape)
        self.images[: len(before)] = before

    def arrange(self, numbers: list[int]) -> Tensor:
        """Move the images of these numbers, all different, to the front, in place as a copy might not fit; -> them."""
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
    """An uninitialised uint8 tensor of a shape, in a temporary file that is already unlinked."""
    size, folder = math.prod(shape), tempfile.gettempdir()
    handle, name = tempfile.mkstemp(prefix="almrr-", suffix=".images", dir=folder)
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(handle, 0, size)  # a full disk is an error now, not a crash later
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
