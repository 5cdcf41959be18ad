"""When the kernels of `attrreg.ops.kernels` are used."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from attrreg.memory import lacks_memory
from attrreg.ops.channels import dense

TYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_VALUES = 2**31 - 2**12  # values, which the kernels count in 32 bits


def kernels(*tensors: Tensor) -> Any | None:
    """The kernels, if they take these tensors: on CUDA, dense and laid out alike. None: go by PyTorch's operators."""
    first = tensors[0]
    if not first.is_cuda or first.dtype not in TYPES or not 0 < first.numel() < MAX_VALUES:
        return None
    if any(type(tensor) is not Tensor for tensor in tensors):  # distributed, or otherwise without memory of its own
        return None
    strides = first.stride()  # which may differ in axes of length one
    alike = all(tensor.is_contiguous() for tensor in tensors) or all(tensor.stride() == strides for tensor in tensors)
    if not (dense(first) and alike):
        return None
    return _kernels(first.device, first.dtype)


@lru_cache
def _kernels(device: torch.device, dtype: torch.dtype) -> Any | None:
    if importlib.util.find_spec("triton") is None:
        return None
    try:
        found = importlib.import_module("attrreg.ops.kernels")
        probe = torch.zeros(1, device=device, dtype=dtype)  # of each type: GPUs before Ampere compile none of bfloat16
        found.activation("SILU", probe, probe, probe)
    except Exception as error:  # for example no C compiler, which Triton needs on first use
        if lacks_memory(error):  # which says nothing of the next call
            raise
        warnings.warn(
            f"attrreg's Triton kernels do not run on {device} in {dtype}, so normalisations and activations take PyTorch's operators, "
            f"which are as exact and slower: {type(error).__name__}: {error}",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    return found
