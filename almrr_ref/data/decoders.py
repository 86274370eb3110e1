"""Decode pictures in separate processes, so that a decoder that crashes or hangs does not stop a server.

A process only decodes: an encoded picture, or the path of one, -> uint8 pixels, and what was left out. It imports
neither PyTorch nor the program that started it, so it starts, and starts again, in a moment. A crash costs only the
picture that caused it. The answers are read as plain numbers and text, even if a picture has taken the process over.
"""

import contextlib
import os
import queue
import signal
import struct
import subprocess
import sys
import threading
from typing import BinaryIO

import numpy as np
from PIL import Image

from almrr_ref.data.decoding import ImageError, decoded
from almrr_ref.data.levels import Levels, ValuesError

NAME = "picture"  # the name in errors of a picture that came as bytes
ASKED = struct.Struct("<?q")  # whether a path (or a picture) follows, and its length in bytes
ANSWERED = struct.Struct("<qqqq")  # height, width of the pixels; bytes of remarks and reason, which follow


class Decoders:
    """A pool of decoding processes; use as a context manager. Safe in threads.

    Args:
        count: of processes.
        levels: which value is white.
        max_pixels: a picture that declares more is refused before it is decoded.
        timeout: seconds for one picture.
    """

    def __init__(self, count: int, levels: Levels, max_pixels: int | None, timeout: float = 30.0) -> None:
        self.processes = [_Decoder(timeout, levels, max_pixels) for _ in range(count)]
        self._idle: queue.Queue[_Decoder] = queue.Queue()
        for process in self.processes:
            self._idle.put(process)

    def decode(self, picture: "bytes | str | os.PathLike[str]") -> tuple[np.ndarray, list[str]]:
        """An encoded picture, or its path, -> uint8 (h, w, 3), and what was left out, as for `Remarks`.

        It waits for an idle process. Raises ImageError.
        """
        process = self._idle.get()
        try:
            return process.decode(picture)
        finally:
            self._idle.put(process)

    def __enter__(self) -> "Decoders":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.end()


class _Decoder:
    def __init__(self, timeout: float, *settings: object) -> None:
        work = f"from almrr_ref.data.decoders import decode_all; decode_all{(*settings,)}"
        levels = "from almrr_ref.data.levels import Levels"
        self._command = [sys.executable, "-c", f"import sys; sys.path[:] = {sys.path}; {levels}; {work}"]
        self._timeout = timeout
        self._start()

    def decode(self, picture: "bytes | str | os.PathLike[str]") -> tuple[np.ndarray, list[str]]:
        name, data = (NAME, picture) if isinstance(picture, bytes) else (picture, os.fsencode(picture))
        if self.process.poll() is not None:  # it ended while idle, which is no picture's fault
            self._restart()
        timer = threading.Timer(self._timeout, self.process.kill)
        timer.start()
        try:
            asked, answers = self._pipes()
            asked.write(ASKED.pack(data is not picture, len(data)) + data)
            asked.flush()
            height, width, *lengths = ANSWERED.unpack(_read(answers, ANSWERED.size))
            remarks, reason = (bytes(_read(answers, length)).decode(errors="replace") for length in lengths)
            if reason:
                raise ImageError(name, reason)
            pixels = np.frombuffer(_read(answers, 3 * height * width), np.uint8).reshape(height, width, 3)
            return pixels, remarks.splitlines()
        except (EOFError, OSError) as error:
            late = not timer.is_alive()
            self._restart()
            crashed = "its decoder crashed: the picture is broken, or made to break it"
            raise ImageError(name, f"takes longer than {self._timeout:.0f} s to decode" if late else crashed) from error
        except ImageError:
            raise
        except (MemoryError, OverflowError, ValueError):  # the rest of the answer would be taken for the next picture's
            self._restart()
            raise
        finally:
            timer.cancel()

    def _pipes(self) -> tuple[BinaryIO, BinaryIO]:
        assert self.process.stdin
        assert self.process.stdout
        return self.process.stdin, self.process.stdout  # type: ignore[return-value]

    def _start(self) -> None:
        self.process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def _restart(self) -> None:
        self.end()
        self._start()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in self._pipes():
            with contextlib.suppress(OSError):  # closing flushes what was not written
                pipe.close()


def _read(pipe: BinaryIO, count: int) -> bytearray:
    """Read exactly ``count`` bytes. Raises EOFError."""
    data = bytearray(count)
    view, done = memoryview(data), 0
    while done < count:
        if not (read := pipe.readinto(view[done:])):  # type: ignore[attr-defined]
            raise EOFError
        done += read
    return data


def decode_all(levels: Levels, max_pixels: int | None) -> None:
    """The loop of a process: picture -> its pixels, or the reason why there are none; ends when its input closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the server, which ends this process
    Image.MAX_IMAGE_PIXELS = max_pixels
    asked, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a decoder prints is no answer
    while len(head := asked.read(ASKED.size)) == ASKED.size:
        is_path, length = ASKED.unpack(head)
        data = asked.read(length)
        remarks, reason, pixels = b"", b"", np.empty((0, 0, 3), np.uint8)
        try:
            pixels, left_out = decoded(os.fsdecode(data) if is_path else data, levels)
            remarks = "\n".join(left_out).encode()
        except ImageError as error:
            reason = error.reason.encode()
        except ValuesError as error:
            reason = str(error).encode()
        try:
            answers.write(ANSWERED.pack(*pixels.shape[:2], len(remarks), len(reason)) + remarks + reason)
            answers.write(np.ascontiguousarray(pixels).data)
            answers.flush()
        except BrokenPipeError:  # the server is gone: end without a traceback
            os._exit(0)
