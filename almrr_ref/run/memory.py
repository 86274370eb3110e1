"""What the C library does with memory that is freed."""

import ctypes

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # names of mallopt(3)
LARGEST = 2**25  # bytes that glibc takes for MMAP_THRESHOLD at most


def keep_freed_memory() -> None:
    """Keep what is freed for what is asked for next, where the C library is glibc.

    It gives large blocks back to the system at once, and a training step or a judged picture asks for the same tens of
    megabytes again and again: each time the system clears them anew, a tenth of the time (bench/LOG.md).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # another C library, another system
        return
    mallopt(TRIM_THRESHOLD, 2**31 - 1)
    mallopt(MMAP_THRESHOLD, LARGEST)
