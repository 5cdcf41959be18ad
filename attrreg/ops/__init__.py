"""Operators that can be differentiated twice, exactly and fast. `modes` lists which of PyTorch's functions each replaces.

Each is a function with PyTorch's arguments, after the `Phase` of the pass where it needs that. It leaves to PyTorch what it does not
support (`supported`), chooses the type to compute in (`precision`), and applies an autograd function. If that has weights, its backward
asks `phase.wanted` which gradients are needed. Second derivatives are of three kinds:

- Norms, smooth activations, attention and LSTM layers have a closed form. Where the gradient may be differentiated again
  (`torch.is_grad_enabled`), the backward applies a second autograd function, whose own backward is the second derivative. There is no
  third (`phase.once_differentiable`).
- Convolutions and matrix products are linear in each argument, so their derivatives are operators of the same kinds.
- Max pooling, concatenation and activations with piecewise constant slope have gradients that are linear in the incoming one and constant
  in the values, so PyTorch's own nodes differentiate these.

Throughout, for an operator y(x, w): gy, gx and gw are the gradients with respect to y, x and w; v is the gradient with respect to gx; d_gy,
d_x and d_w are the second-order gradients that follow from it; `for_x` says whether a gradient of x is needed.

What goes out of an autograd function is not a view: a layer may work in place on it, and PyTorch adds to gradients in place. `.data` of a
view is none, and `aten._unsafe_view` is none that keeps its graph.
"""

from attrreg.ops.modes import twice_differentiable
from attrreg.ops.once import operators
from attrreg.ops.phase import Phase
from attrreg.ops.process import checkpoints_recompute_inside

__all__ = ["Phase", "checkpoints_recompute_inside", "operators", "twice_differentiable"]
