"""Operators that can be differentiated twice, in place of those that cannot."""

from attrreg.ops.modes import twice_differentiable

__all__ = ["twice_differentiable"]
