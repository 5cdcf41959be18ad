"""Activations whose PyTorch version has no second derivative."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

# PyTorch's backward has this constant in float32 whatever the dtype. Kept, so that gradients agree to the last bit.
SIXTH = float(torch.tensor(1 / 6, dtype=torch.float32))


class _HardSigmoid(Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor) -> Tensor:
        ctx.save_for_backward(input)
        return F.hardsigmoid(input)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (input,) = ctx.saved_tensors
        # Linear in grad and piecewise constant in the input: autograd's own second derivative of this line is right.
        result: Tensor = grad * ((input > -3) & (input < 3)) * SIXTH
        return result


def hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    """relu6(x + 3) / 6. Never in place: what was given may be needed by another derivative."""
    result: Tensor = _HardSigmoid.apply(input)
    return result


def hardswish(input: Tensor, inplace: bool = False) -> Tensor:
    """x relu6(x + 3) / 6. Never in place: the product rule needs the input."""
    return input * F.relu6(input + 3) / 6
