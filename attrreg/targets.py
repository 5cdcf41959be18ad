"""What a target has to be: the checks that scores share."""

from __future__ import annotations

import torch
from torch import Tensor


def required(target: Tensor | None) -> Tensor:
    """The target of a score that cannot do without.

    Raises:
        ValueError: there is none.
    """
    if target is None:
        raise ValueError("This score needs a target. Pass `target=`, (N,) class indices.")
    return target


def check_classes(target: Tensor) -> None:
    """Check that a target is one class index an image.

    Raises:
        TypeError, ValueError: naming `target`.
    """
    if target.is_floating_point() or target.dtype is torch.bool:
        others = "For one-hot labels write `target.argmax(1)`; one logit takes BinaryLogit(), regression RegressionOutput()."
        raise TypeError(f"target must be class indices, got {target.dtype}. {others}")
    if target.dim() != 1:
        raise ValueError(f"target must be ({len(target)},), one class an image of x, got {tuple(target.shape)}. Reshape it.")
    if bool((target < 0).any()):
        raise ValueError(
            f"target has the class {int(target.min())}, which is negative. Pass class indices, and leave out images to be ignored."
        )
