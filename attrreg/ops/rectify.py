"""ReLU with another rule for the gradient that passes it while an attribution is made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.autograd import Function

from attrreg.ops.phase import Phase

# (gradient, y) -> what is passed on, from the ReLU's output y, through which the penalty is differentiated too
Rule = Callable[[Tensor, Tensor], Tensor]


def guided(gradient: Tensor, y: Tensor) -> Tensor:
    """Where input and gradient are both positive. Source: Springenberg et al. 2014, arXiv 1412.6806."""
    return (gradient * (y > 0)).relu()


def deconvolved(gradient: Tensor, y: Tensor) -> Tensor:
    """Where the gradient is positive, whatever the input. Source: Zeiler and Fergus 2013, arXiv 1311.2901."""
    return gradient.relu()


class _Rectified(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rule: Rule, phase: Phase) -> Tensor:
        y = x.relu()
        ctx.save_for_backward(y)
        ctx.rule, ctx.phase = rule, phase
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (y,) = ctx.saved_tensors
        # The penalty's own backward comes through here too, where what follows is curved: that one takes the true slope.
        passed = ctx.rule(gradient, y) if ctx.phase.inner else gradient * (y > 0)
        return passed, None, None


def rectify(x: Tensor, rule: Rule, phase: Phase) -> Tensor:
    """ReLU of x, whose inner backward follows a rule and whose outer backward is the derivative."""
    return _Rectified.apply(x, rule, phase)
