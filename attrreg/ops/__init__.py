"""Operators that can be differentiated twice, exactly and fast, in place of PyTorch's."""

from attrreg.ops.modes import checkpoints_recompute_inside, twice_differentiable
from attrreg.ops.once import operators
from attrreg.ops.phase import Phase

__all__ = ["Phase", "checkpoints_recompute_inside", "operators", "twice_differentiable"]
