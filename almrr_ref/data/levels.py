"""What pixel values mean: which of them is white, and how values become 0..255.

- 16-bit integers: 0 .. 2**bits - 1 -> 0..255, rounded. 32-bit integers of 0..65535: the same; others are refused.
- 16-bit colour: the upper 8 of the significant bits, as in Pillow, which keeps the upper 8 of 16.
- Float files: 0 .. `float_white` -> 0..255. Unless the training images have settled it, white is 1 or 255, whichever
  99% of the pixels do not exceed. NaN, infinite and negative values are refused.
- Values above white become white; `Remarks` counts the pictures.
"""

import math
import threading
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from almrr_ref.run.text import counted, one_line

if TYPE_CHECKING:
    from almrr_ref.config import ModelConfig


class ValuesError(ValueError):
    """Pixel values without a meaning; the message says what came and what is expected."""


@dataclass(frozen=True)
class Levels:
    """Which value is white.

    Args:
        bits: significant bits of 16-bit integers, 8 to 16: a 12-bit camera's white is 4095. None: 16, with a remark.
        float_white: white of float files; None where it is settled file by file.
    """

    bits: int | None = None
    float_white: float | None = None

    @classmethod
    def of(cls, config: "ModelConfig") -> "Levels":
        """The levels of a network: those of its training images."""
        return cls(config.bits, config.float_white)

    @property
    def white(self) -> int:
        return 2 ** (self.bits or 16) - 1


class Remarks:
    """What was left out when pictures were read: kind -> number of pictures, and the first. Threads may share one."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._first: dict[str, str] = {}
        self._lock = threading.Lock()

    def add(self, kind: str, picture: object) -> None:
        with self._lock:
            self.counts[kind] += 1
            self._first.setdefault(kind, one_line(str(picture)))

    def lines(self) -> list[str]:
        """One line a kind: "alpha channel left out: 12 images (first: x.png)"."""
        firsts = self._first
        return [f"{kind}: {counted(n, 'image')} (first: {firsts[kind]})" for kind, n in self.counts.items()]


def to_bytes(values: np.ndarray, levels: Levels) -> tuple[np.ndarray, str | None]:
    """Integer or float values (h, w) -> uint8 (h, w), and a remark, by the module's rules. Raises ValuesError."""
    low, high = values.min().item(), values.max().item()
    if values.dtype.kind == "f":
        if not np.isfinite([low, high]).all():  # a NaN is the least and the greatest value
            raise ValuesError("holds NaN or infinite values; replace them")
        white = levels.float_white or _usual_white(values, high)
        if low < 0 or white is None:
            raise ValuesError(f"float values {low:g} to {high:g} have no defined range; scale them to [0, 1]")
        scaled = np.rint(values.astype(np.float64) * (255 / white)).clip(max=255).astype(np.uint8)
        return scaled, _above(white) if high > white else None
    if low < 0 or high > 65535:
        raise ValuesError(f"integer values {low} to {high} have no defined range; save it with 8 or 16 bits")
    white = levels.white
    scaled = (np.minimum(values, white).astype(np.uint32) * 255 + white // 2) // white
    return scaled.astype(np.uint8), _of_integers(high, levels)


def upper_bytes(values: np.ndarray, levels: Levels) -> tuple[np.ndarray, str | None]:
    """16-bit colour (h, w, 3) -> uint8 (h, w, 3), and a remark."""
    upper = np.minimum(values, levels.white) >> ((levels.bits or 16) - 8)
    return upper.astype(np.uint8), _of_integers(values.max().item(), levels)


def _usual_white(values: np.ndarray, high: float) -> float | None:
    usual = high if high <= 1 else high_value(values)
    return 1.0 if usual <= 1 else 255.0 if usual <= 255 else None


def high_value(values: np.ndarray) -> float:
    """The value that 99% of the values do not exceed: a single hot pixel does not change it."""
    flat = values.reshape(-1)
    k = math.ceil(0.99 * flat.size) - 1
    return float(np.partition(flat, k)[k])


def _of_integers(highest: int, levels: Levels) -> str | None:
    if levels.bits is None:
        return "16-bit values taken to use all 16 bits"
    return _above(levels.white) if highest > levels.white else None


def _above(white: float) -> str:
    return f"values above white ({white:g}) shown as white"
