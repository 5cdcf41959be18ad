"""Memory: what the C library does with what a training step has freed, and how a lack of it shows."""

from __future__ import annotations

import ctypes
import sys

import torch

# glibc's malloc.h
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
NEVER = -1  # of a threshold: it is unsigned there, while `mallopt` takes no more than 2**31 - 1, which a large step exceeds

# What PyTorch says where it raises a plain RuntimeError: its allocator on the CPU, cuBLAS and cuDNN, Apple's GPUs
LACKING = ("can't allocate memory", "not enough memory", "ALLOC_FAILED", "out of memory")


def lacks_memory(error: Exception) -> bool:
    """Whether memory was lacking, which may pass, and says nothing of a model or of a kernel."""
    said = isinstance(error, RuntimeError) and any(words in str(error) for words in LACKING)
    return said or isinstance(error, torch.OutOfMemoryError | MemoryError)


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
