"""A setting of the C library: freed memory stays with the process."""

import ctypes

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # names of mallopt(3)
LARGEST = 2**25  # bytes that glibc takes for MMAP_THRESHOLD at most


def keep_freed_memory() -> None:
    """Keep freed memory for the next allocation, if the C library is glibc.

    glibc returns large blocks to the system at once, but every training step and judged picture allocates the same tens
    of megabytes. Each time the system clears them again, which takes a tenth of the time (bench/LOG.md).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # another C library, another system
        return
    mallopt(TRIM_THRESHOLD, 2**31 - 1)
    mallopt(MMAP_THRESHOLD, LARGEST)
