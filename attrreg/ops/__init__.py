"""Operators that can be differentiated twice, exactly and fast, in place of PyTorch's."""

from attrreg.ops.modes import twice_differentiable
from attrreg.ops.phase import Phase

__all__ = ["Phase", "twice_differentiable"]
