"""Text for users: the log, one line for any text, durations, the progress of something slow.

The library logs what it does through ``logging`` under the name "almrr_ref"; the commands print it.
"""

import logging
import math
import time

LOGGER = logging.getLogger("almrr_ref")


def one_line(text: object) -> str:
    """Any text or path -> one printable line: control characters and undecodable bytes are escaped."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))


def counted(number: int, what: str) -> str:
    """1, "good image" -> "1 good image"; 2 -> "2 good images"."""
    return f"{number} {what}{'s' if number != 1 else ''}"


def decimals(value: float | None) -> str:
    """A score or threshold: four decimals, and near 0 and 1 as many as tell it from them: none, 0.5000, 0.999985."""
    if value is None:
        return "none"
    near = min(value, 1 - value)
    return f"{value:.{max(4, 1 - math.floor(math.log10(max(near, 1e-9)))) if near > 0 else 4}f}"


def duration(seconds: float) -> str:
    """Seconds as a person says them: 45 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class Countdown:
    """Progress of something slow: logs every five seconds how much is done and the time left.

    The clock starts when it is made, and again at a call with ``done`` 0.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self.start = self.shown = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if not done:
            self.start = self.shown = now
        elif now - self.shown > 5:
            self.shown = now
            left = duration((now - self.start) / done * (total - done))
            LOGGER.info("%s: %d/%d, %s left", self.what, done, total, left)
