"""Decoding in processes of their own: the same pixels and reasons as here, and an end to what hangs."""

import io
import subprocess
import sys
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
from PIL import Image
from trust_cases import ROOT, slow_to_decode

from almrr_ref.data.decoders import Decoders, _read
from almrr_ref.data.images import ImageError, Levels, Remarks, read_image


def test_pixels_and_reasons_are_those_of_read_image(tmp_path: Path) -> None:
    levels, deep = Levels(bits=12), np.arange(600, dtype=np.uint16).reshape(20, 30) * 6
    paths = [tmp_path / name for name in ("deep.png", "caf\u00e9 two.tif", "broken.png", "missing.png", "float.tiff")]
    Image.fromarray(deep).save(paths[0])
    Image.new("RGB", (5, 4), "red").save(paths[1], save_all=True, append_images=[Image.new("RGB", (6, 7), "blue")])
    paths[2].write_bytes(paths[0].read_bytes()[:90])
    Image.fromarray(np.full((3, 3), np.nan, dtype=np.float32)).save(paths[4])
    Image.fromarray(deep + 3000).save(tmp_path / "bright.png")
    page = paths[1].with_name(f"{paths[1].name}#2")
    with Decoders(2, levels, 10_000) as decoders:
        for picture in (paths[0], str(page), paths[0].read_bytes()):
            remarks = Remarks()
            pixels, left_out = decoders.decode(picture)
            assert np.array_equal(pixels, read_image(picture, levels, remarks).permute(1, 2, 0).numpy())
            assert left_out == list(remarks.counts)
        assert decoders.decode(paths[4].with_name("bright.png"))[1] == ["values above white (4095) shown as white"]
        for broken in (paths[1], *paths[2:], paths[2].read_bytes()):
            with pytest.raises(ImageError) as expected:
                read_image(broken, levels)
            with pytest.raises(ImageError) as found:
                decoders.decode(broken)
            assert str(found.value) == str(expected.value)
        buffer = io.BytesIO()
        Image.new("L", (1000, 1000)).save(buffer, "PNG")
        with pytest.raises(ImageError, match="pixels"):
            decoders.decode(buffer.getvalue())


def test_one_that_takes_too_long_is_given_up_and_the_next_is_decoded() -> None:
    with Decoders(1, Levels(), None, timeout=3.0) as decoders:
        with pytest.raises(ImageError, match="longer than 3 s"):
            decoders.decode(slow_to_decode())
        buffer = io.BytesIO()
        Image.new("L", (3, 2), 7).save(buffer, "PNG")
        assert decoders.decode(buffer.getvalue())[0].tolist() == [[[7, 7, 7]] * 3] * 2


def test_an_answer_for_which_memory_is_lacking_is_not_taken_for_that_of_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    buffers = io.BytesIO(), io.BytesIO()
    for buffer, side in zip(buffers, (400, 3)):
        Image.new("L", (side, side), 7).save(buffer, "PNG")
    read = _read

    def lacking(pipe: BinaryIO, count: int) -> bytearray:
        if count == 3 * 400 * 400:
            raise MemoryError
        return read(pipe, count)

    monkeypatch.setattr("almrr_ref.data.decoders._read", lacking)
    with Decoders(1, Levels(), None) as pool:
        with pytest.raises(MemoryError):
            pool.decode(buffers[0].getvalue())
        assert pool.decode(buffers[1].getvalue())[0].tolist() == [[[7, 7, 7]] * 3] * 3


def test_a_decoder_needs_no_torch() -> None:
    code = "import sys, almrr_ref.data.decoders; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_a_decoder_whose_program_was_killed_ends_without_a_word() -> None:
    """While it decodes: what it has then is more than a pipe holds."""
    code = """
import io, os
from PIL import Image
from almrr_ref.data.decoders import ASKED, Decoders
from almrr_ref.data.levels import Levels
buffer = io.BytesIO()
Image.new("L", (2000, 2000)).save(buffer, "PNG")
with Decoders(1, Levels(), None) as decoders:
    asked, _ = decoders.processes[0]._pipes()
    asked.write(ASKED.pack(False, len(buffer.getvalue())) + buffer.getvalue())
    asked.flush()
    os._exit(0)
"""
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (0, "")  # of both: it holds stderr until it has ended
