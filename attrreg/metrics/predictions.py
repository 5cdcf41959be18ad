"""Measures of predictions: functions of logits and targets."""

from __future__ import annotations

import torch
from torch import Tensor


def accuracy(logits: Tensor, target: Tensor) -> float:
    """The share of images whose highest logit is that of the target. An image with a NaN logit counts as wrong.

    Args:
        logits: `(N, classes)`.
        target: `(N,)` class indices.

    Raises:
        ValueError: the shapes do not fit.
    """
    return is_correct(logits, target).double().mean().item()


def auc(logits: Tensor, target: Tensor) -> float | None:
    """Area under the ROC curve of y1 - y0: how often an image of class 1 ranks above one of class 0. Ties count half.

    Not the mean of the areas of the two logits by themselves, which is another number.

    Args:
        logits: `(N, 2)`; with another number of classes there is no such area.
        target: `(N,)` of 0 and 1.

    Returns:
        The area; None if there are more than two classes; NaN if only one of them occurs, or a difference is NaN.

    Raises:
        TypeError, ValueError: the shapes do not fit, it is one logit, or a target is neither 0 nor 1.

    Cost:
        Sorting.
    """
    check_shapes(logits, target)
    if logits.shape[1] != 2:
        return None
    check_binary(target)
    return roc_area(logit_difference(logits), target)


def logit_difference(logits: Tensor) -> Tensor:
    """y1 - y0, `(N,)`, in float64: near ones would tie in float32."""
    return logits[:, 1].double() - logits[:, 0].double()


def roc_area(score: Tensor, target: Tensor) -> float:
    """Area under the ROC curve of a score `(N,)` for targets `(N,)` of 0 and 1, as in `auc`."""
    ones, zeros = score[target == 1].contiguous(), score[target == 0].sort().values
    if not len(ones) or not len(zeros) or bool(score.isnan().any()):
        return float("nan")
    below, up_to = torch.searchsorted(zeros, ones), torch.searchsorted(zeros, ones, right=True)
    return ((below + up_to).double().mean() / (2 * len(zeros))).item()


def group_accuracies(logits: Tensor, target: Tensor, groups: Tensor) -> dict[int, float]:
    """The accuracy in each group that occurs, by its number.

    Args:
        logits: `(N, classes)`.
        target: `(N,)` class indices.
        groups: `(N,)` integers, for example `2 * target + background`.

    Raises:
        TypeError, ValueError: the shapes do not fit, or groups are no integers.
    """
    correct = is_correct(logits, target)
    check_groups(groups, target)
    return {int(group): correct[groups == group].double().mean().item() for group in groups.unique().tolist()}


def worst_group_accuracy(logits: Tensor, target: Tensor, groups: Tensor) -> float:
    """The lowest accuracy of a group that occurs.

    Args:
        logits, target, groups: as in `group_accuracies`.

    Raises:
        TypeError, ValueError: as `group_accuracies`.

    Source:
        Sagawa et al. 2020, arXiv 1911.08731.
    """
    return min(group_accuracies(logits, target, groups).values())


def is_correct(logits: Tensor, target: Tensor) -> Tensor:
    """Whether each image's highest logit is that of its target, boolean `(N,)`; False where a logit is NaN.

    Raises:
        ValueError: the shapes do not fit.
    """
    check_shapes(logits, target)
    return (logits.argmax(dim=1) == target) & ~logits.isnan().any(dim=1)


def check_shapes(logits: Tensor, target: Tensor) -> None:
    """Check that logits are `(N, classes)` and targets `(N,)`, and that there are some.

    Raises:
        ValueError: naming both.
    """
    for name, value in (("logits", logits), ("target", target)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}. Write torch.as_tensor({name}).")
    if logits.dim() != 2 or target.shape != logits.shape[:1] or not len(target):
        raise ValueError(
            f"logits must be (N, classes) and target (N,), got {tuple(logits.shape)} and {tuple(target.shape)}. Pass one class an image."
        )
    if logits.shape[1] < 2:
        raise ValueError(
            f"logits must be of at least two classes, got {tuple(logits.shape)}. For one logit y write torch.cat([0 * y, y], dim=1)."
        )


def check_groups(groups: Tensor, target: Tensor) -> None:
    """Check that there is one group an image.

    Raises:
        TypeError, ValueError: naming `groups`.
    """
    if not isinstance(groups, Tensor):
        raise TypeError(f"groups must be a tensor of integers, got {type(groups).__name__}. Number them; write torch.as_tensor(groups).")
    if groups.shape != target.shape:
        raise ValueError(f"groups must be {tuple(target.shape)}, one group an image, got {tuple(groups.shape)}. Reshape it.")
    if groups.is_floating_point():
        raise TypeError(
            f"groups must be integers, one group an image, got {groups.dtype}. Number the groups: groups.unique(return_inverse=True)."
        )


def check_binary(target: Tensor) -> None:
    """Check that targets are of two classes.

    Raises:
        ValueError: naming `target`.
    """
    if bool(((target != 0) & (target != 1)).any()):
        raise ValueError("target must be 0 or 1, as there are two classes. Leave images of no class out.")
