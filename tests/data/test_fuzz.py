"""Mutated files of every format: each gives a picture or an ImageError, within its time and memory.

They are read in a process of their own, whose death, stillness or memory is seen from outside. ``ALMRR_FUZZ=100000``
sets how many are read (default: 2000); mutation i is the same in every run.
"""

import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from odd_files import PIXELS, encoded
from PIL import Image
from test_pictures import deep_png
from tiny_network import build

from almrr_ref.data.folders import find_inputs
from almrr_ref.data.images import ImageError, Levels, image_size, load_image, read_image
from almrr_ref.data.masks import load_mask
from almrr_ref.detector import Detector

COUNT = int(os.environ.get("ALMRR_FUZZ", "2000"))
SECONDS, MEMORY = 10.0, 2**30  # for one file; for all together, beyond what the process has
SMALL, GREY = PIXELS[:17, :21], PIXELS[:17, :21, 0]
EXTREMES = (b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\0\0\x40\0")
FRAMES = [Image.fromarray(np.roll(GREY, i)) for i in range(3)]


@cache
def whole_files() -> list[bytes]:
    """A file of every format and kind that this Pillow writes."""
    Image.init()
    several = {"save_all": True, "append_images": FRAMES[1:]}
    files = [encoded(SMALL, kind) for kind in ("PNG", "JPEG", "GIF", "BMP", "PPM", "WEBP", "TIFF", "JPEG2000", "AVIF")
             if kind in Image.SAVE]  # fmt: skip
    files += [encoded(FRAMES[0], kind, **several) for kind in ("TIFF", "GIF", "PNG", "WEBP", "MPO")]
    files += [
        encoded(SMALL, "TIFF", compression=name) for name in ("tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits")
    ]
    files += [encoded(GREY.astype(np.uint16) * 257, kind) for kind in ("PNG", "TIFF")]
    files += [encoded(GREY.astype(np.float32) / 255, "TIFF"), encoded(GREY > 99, "TIFF", compression="group4")]
    files += [encoded(SMALL, "JPEG", progressive=True), encoded(Image.fromarray(SMALL).quantize(16), "PNG")]
    files += [encoded(np.dstack([SMALL, GREY]), kind) for kind in ("PNG", "WEBP")]
    files += [deep_png(SMALL.astype(np.uint16) * 257), b"P5 21 17 65535\n" + bytes(2 * 21 * 17)]
    return files


def mutated(number: int) -> bytes:
    """Mutation ``number``: bytes flipped, cut, moved, fields set to extremes, or the start of another file."""
    rng = np.random.default_rng(number)
    files = whole_files()
    content = bytearray(files[number % len(files)])
    for _ in range(rng.integers(1, 4)):
        # most of what decides lies near the start, or, of TIFF, near the end
        at = int(min(rng.integers(0, len(content)), *rng.integers(0, len(content), rng.integers(1, 3))))
        at = len(content) - 1 - at if rng.random() < 0.3 else at
        kind = rng.integers(0, 6)
        if kind == 0:
            content[at] ^= 1 << int(rng.integers(0, 8))
        elif kind == 1:
            content[at] = int(rng.integers(0, 256))
        elif kind == 2:
            content[at : at + 4] = (b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\0\0\x40\0")[
                rng.integers(0, 4)
            ]
        elif kind == 3:
            del content[max(at, 1) :]
        elif kind == 4:
            content[at:at] = content[at : at + int(rng.integers(1, 40))]
        else:
            other = files[rng.integers(0, len(files))]
            content[:at] = other[:at]
    return bytes(content)


def read_all(numbers: range, folder: Path, report: Callable[[tuple[int, str]], None]) -> None:
    """Read mutations, and report the number of each before, and after a fault what it was."""
    path, levels = folder / "x.tif", Levels(bits=12)
    detector = Detector(build(threshold=0.5))
    reads: list[Callable[[], object]] = [
        lambda: read_image(path.read_bytes(), levels), lambda: load_image(path, (9, 9)), lambda: image_size(path),
        lambda: load_mask(path, (8, 8)),
        lambda: [read_image(page) for page in find_inputs(path) if isinstance(page, Path)],
    ]  # fmt: skip
    if sys.platform != "win32":
        import resource

        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    for number in numbers:
        content = mutated(number)
        path.unlink(missing_ok=True)  # to overwrite it would wait for the disk
        path.write_bytes(content)
        start = time.monotonic()
        report((number, ""))
        try:
            read = reads[number // len(whole_files()) % len(reads)]()
            if isinstance(read, torch.Tensor):
                assert read.dtype == torch.uint8
                assert 0 not in read.shape
            if number % 20 == 0:
                assert 0 <= detector(content).score <= 1
        except ImageError as error:
            if not error.reason.isprintable():
                report((number, f"reason {error.reason!r}"))
        except BaseException as error:  # the very thing that must not come out
            report((number, f"{type(error).__name__}: {error}"))
        if time.monotonic() - start > SECONDS:
            report((number, f"took {time.monotonic() - start:.0f} s"))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is limited by Linux's means")
def test_mutated_files_end_as_pictures_or_named_errors(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=read_all, args=(range(COUNT), tmp_path, sender.send))
    child.start()
    sender.close()
    faults, last = [], -1
    try:
        while receiver.poll(5 * SECONDS):
            last, fault = receiver.recv()
            faults += [(last, fault)] if fault else []
        faults.append((last, "no sign of life"))
    except EOFError:
        child.join()
    finally:
        child.kill()
    assert (faults, child.exitcode, last) == ([], 0, COUNT - 1), "mutated(i) gives the bytes"


def test_the_mutations_reach_the_decoders() -> None:
    """Else the test above would prove nothing: some are read, most are refused, for many reasons."""
    reasons, whole = set(), 0
    for number in range(300):
        try:
            whole += len(read_image(mutated(number))) == 3
        except ImageError as error:
            reasons.add(error.reason)
    assert 30 < whole < 200
    assert len(reasons) > 20
