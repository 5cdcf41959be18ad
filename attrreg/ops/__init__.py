"""Operators that can be differentiated twice, exactly and fast, in place of PyTorch's, which `modes` puts there.

A function with PyTorch's arguments leaves to PyTorch what it is not sure of (`sound`), sees to the type (`precision`), and applies an
autograd function. The backward of that asks `phase.wanted` which gradients of weights are asked for. Norms, attention and LSTM layers go
on by one pattern: where somebody differentiates again (`torch.is_grad_enabled`), a second autograd function takes the gradients, whose
backward is the second derivative in closed form, and the last (`phase.once_differentiable`). What is linear is made of functions that are
each other's derivatives (convolutions, products), or of PyTorch's own nodes where these are as fast (slopes that are constant by parts).
"""

from attrreg.ops.modes import twice_differentiable
from attrreg.ops.once import operators
from attrreg.ops.phase import Phase
from attrreg.ops.process import checkpoints_recompute_inside

__all__ = ["Phase", "checkpoints_recompute_inside", "operators", "twice_differentiable"]
