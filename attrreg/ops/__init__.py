"""Operators that can be differentiated twice, exactly and fast, in place of PyTorch's."""

from attrreg.ops.modes import twice_differentiable
from attrreg.ops.once import operators
from attrreg.ops.phase import Phase
from attrreg.ops.process import checkpoints_recompute_inside

__all__ = ["Phase", "checkpoints_recompute_inside", "operators", "twice_differentiable"]
