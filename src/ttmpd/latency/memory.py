"""Keep freed memory in the process: by default large activations go back to the system after every layer.

glibc maps every block over 32 MiB anew and zeroes it page by page, so that a 112x112 map of a batch of 64 costs more
to allocate than to compute. Serving guides advise another allocator for that reason; glibc keeps it, too, when it is
told to (``benchmarks/freed_memory.py`` measures what that saves).
"""

import ctypes
import gc
import os
import sys

# Parameters of mallopt(3), from malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4

_TUNABLES = "GLIBC_TUNABLES"

_keeping = False


def keep_freed_memory() -> bool:
    """Tell glibc to keep freed memory for the next allocation, in this process from now on.

    The commands do this; a program that calls the package decides for itself, since the peak of its memory then stays
    its own until it ends.

    Returns:
        True when it is done; false where the C library is another one.

    Example:
        >>> keep_freed_memory() in (True, False)
        True
    """
    global _keeping
    if _keeping or sys.platform != "linux":
        return _keeping
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    _keeping = all(
        mallopt(ctypes.c_int(parameter), ctypes.c_int(value)) == 1
        for parameter, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, 64 << 20))
    )
    return _keeping


def release_freed_memory() -> None:
    """Hand freed memory back once, between pieces of work that need different sizes; where none is kept, do nothing."""
    if _keeping:
        gc.collect()  # what only cycles hold is not free yet
        ctypes.CDLL(None).malloc_trim(0)


def freed_memory() -> str:
    """The state of the allocator, on which milliseconds on a CPU and peak memory depend.

    Returns:
        "kept" or "returned", followed by what ``GLIBC_TUNABLES`` says of malloc where it is set.
    """
    state = "kept" if _keeping else "returned"
    tunables = [part for part in os.environ.get(_TUNABLES, "").split(":") if part.startswith("glibc.malloc.")]
    return ", ".join((state, *tunables))
