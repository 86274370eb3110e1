"""Decode what a client sends in processes of their own, so that a decoder that crashes or hangs takes no server down.

A process only decodes: bytes of an encoded picture -> uint8 pixels. It is started once, by a fork of a clean process
(spawn on Windows), and again when it has ended. A crash costs the picture that caused it, and nothing else.
"""

import multiprocessing
import queue
import signal
import sys
from multiprocessing.connection import Connection

import numpy as np
from PIL import Image

from almrr_ref.data.images import ImageError, Levels, read_image

TIMEOUT = 30.0  # seconds for one picture
NAME = "picture"


class Decoders:
    """Several processes that decode; use as a context manager. Safe in threads.

    Args:
        count: of processes.
        levels: which value is white.
        max_pixels: a picture that declares more is refused before it is decoded.
    """

    def __init__(self, count: int, levels: Levels, max_pixels: int | None) -> None:
        context = multiprocessing.get_context("spawn" if sys.platform == "win32" else "forkserver")
        if hasattr(context, "set_forkserver_preload"):
            context.set_forkserver_preload([__name__])
        self.processes = [_Decoder(context, levels, max_pixels) for _ in range(count)]
        self._idle: queue.Queue[_Decoder] = queue.Queue()
        for process in self.processes:
            self._idle.put(process)

    def decode(self, data: bytes) -> np.ndarray:
        """An encoded picture -> uint8 (h, w, 3), waiting for an idle process. Raises ImageError."""
        process = self._idle.get()
        try:
            return process.decode(data)
        finally:
            self._idle.put(process)

    def __enter__(self) -> "Decoders":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.end()


class _Decoder:
    def __init__(self, context: multiprocessing.context.BaseContext, *settings: object) -> None:
        self._context, self._settings = context, settings
        self._start()

    def decode(self, data: bytes) -> np.ndarray:
        if not self.process.is_alive():  # it ended while idle, which no picture has to answer for
            self._restart()
        try:
            self._connection.send_bytes(data)
            if not self._connection.poll(TIMEOUT):
                raise ImageError(NAME, f"takes longer than {TIMEOUT:.0f} s to decode")
            shape, reason = self._connection.recv()
            if reason:
                raise ImageError(NAME, reason)
            return np.frombuffer(self._connection.recv_bytes(), np.uint8).reshape(shape)
        except (EOFError, OSError) as error:
            self._restart()
            raise ImageError(NAME, "its decoder crashed: the picture is broken, or made to break it") from error
        except ImageError as error:
            if "longer than" in error.reason:
                self._restart()
            raise

    def _start(self) -> None:
        self._connection, other = self._context.Pipe()
        self.process = self._context.Process(  # type: ignore[attr-defined]
            target=_decode_all, args=(other, *self._settings), daemon=True
        )
        self.process.start()
        other.close()

    def _restart(self) -> None:
        self.end()
        self._start()

    def end(self) -> None:
        self._connection.close()
        self.process.kill()
        self.process.join()


def _decode_all(connection: "Connection", levels: Levels, max_pixels: int | None) -> None:
    """In the process: bytes -> shape and the pixels, or the reason why there are none; until the other side is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the server, which ends this process
    Image.MAX_IMAGE_PIXELS = max_pixels
    while True:
        try:
            data = connection.recv_bytes()
        except (EOFError, OSError):
            return
        try:
            pixels = read_image(data, levels).permute(1, 2, 0).contiguous().numpy()
        except ImageError as error:
            connection.send((None, error.reason))
            continue
        connection.send((pixels.shape, ""))
        connection.send_bytes(pixels.tobytes())
