"""What the C library does with memory that a training step has freed."""

from __future__ import annotations

import ctypes
import sys

# glibc's malloc.h
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
NEVER = -1  # of a threshold: it is unsigned there, while `mallopt` takes no more than 2**31 - 1, which a large step exceeds


def keep_memory() -> bool:
    """Keep memory that a step frees for the next one, in the whole process, from now on.

    A step with a penalty holds more than a plain step, and glibc, the C library of most Linux systems, hands what is freed at the end of a
    step back to the system, page by page, to fault it in again in the next one. That can cost more than the penalty's own computation:
    `docs/performance.md` has figures with and without. The process then holds the most that it ever needed. It concerns the
    CPU's memory only; PyTorch keeps the GPU's by itself.

    attrreg never calls this by itself. It does what these variables do when they are set before Python starts:
    `MALLOC_TRIM_THRESHOLD_=-1 MALLOC_MMAP_MAX_=0`.

    Returns:
        Whether the C library took it; False elsewhere than with glibc, where it changes nothing.
    """
    if sys.platform != "linux":
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    return bool(library.mallopt(M_TRIM_THRESHOLD, NEVER)) and bool(library.mallopt(M_MMAP_MAX, 0))
