"""In which type a result goes out."""

from __future__ import annotations

import torch
from torch import Tensor


def narrowed(y: Tensor, x: Tensor) -> Tensor:
    """What was computed of x in a wider type, in that of x; but not where CUDA's autocast is on, which leaves norms wide."""
    return y if x.is_cuda and torch.is_autocast_enabled("cuda") else y.to(x.dtype)
