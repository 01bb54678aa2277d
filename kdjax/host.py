"""How the ``kdjax`` command sets up its own process; a library must not do this to its user's."""

import contextlib
import ctypes
import sys

_ARENA_MAX, _MMAP_MAX, _TRIM_THRESHOLD = -8, -4, -1  # of mallopt, in malloc.h


def keep_freed_memory() -> None:
    """Lets glibc keep what is freed; without glibc does nothing.

    On a CPU a step's temporary buffers are allocated and freed at every step, and glibc maps those over 32 MB anew each
    time: the kernel zeroes them page by page, which took a seventh of the step of a ViT (``tests/peers/README.md``).
    """
    if not sys.platform.startswith("linux"):
        return
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL("libc.so.6")
        for parameter, value in ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1)):
            libc.mallopt(parameter, value)
