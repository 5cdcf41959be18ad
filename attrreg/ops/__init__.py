"""Operators that can be differentiated twice, exactly and fast, in place of PyTorch's, which `modes` puts there.

Most go by one pattern. A function with PyTorch's arguments leaves to PyTorch what it is not sure of (`sound`), sees to the type
(`precision`), and applies an autograd function. The backward of that asks `phase.wanted` which gradients are asked for, and takes them from
PyTorch's kernels where nobody differentiates again (`torch.is_grad_enabled`). Else a second autograd function takes them, whose backward
is the second derivative in closed form, and the last (`phase.once_differentiable`).
"""

from attrreg.ops.modes import twice_differentiable
from attrreg.ops.once import operators
from attrreg.ops.phase import Phase
from attrreg.ops.process import checkpoints_recompute_inside

__all__ = ["Phase", "checkpoints_recompute_inside", "operators", "twice_differentiable"]
