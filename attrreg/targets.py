"""What a target, logits and a loss have to be: the checks that scores share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def required(target: Tensor | None) -> Tensor:
    """The target of a score that cannot do without.

    Raises:
        ValueError: there is none.
    """
    if target is None:
        raise ValueError("This score needs a target. Pass `target=`.")
    return target


def check_classes(target: Tensor) -> None:
    """Check that a target is one class index an image.

    Raises:
        TypeError, ValueError: naming `target`.
    """
    if target.is_floating_point() or target.dtype is torch.bool:
        one_hot = "target.int().argmax(1)" if target.dtype is torch.bool else "target.argmax(1)"  # PyTorch's takes no bool
        indices = "Write `target.long()`" if target.dim() == 1 else f"For one-hot labels write `{one_hot}`"
        if target.dim() > 1 and target.shape[1] == 1:  # whose argmax is 0 everywhere
            indices = "Write `target.squeeze(1).long()`"
        others = f"{indices}; several labels take MultiLabelLogit(), one logit BinaryLogit(), regression RegressionOutput()."
        raise TypeError(f"target must be class indices, got {target.dtype}. {others}")
    if target.dim() != 1:
        remedy = "For one-hot labels write `target.argmax(1)`; several labels take MultiLabelLogit()."
        if target[0].numel() == 1:
            remedy = "Write `target.flatten()`."
        elif target.dim() > 2:
            remedy = "Reshape it; a label map is (N, H, W), and takes SegmentationLogit()."
        raise ValueError(f"target must be ({len(target)},), one class an image of x, got {tuple(target.shape)}. {remedy}")
    if bool((target < 0).any()):
        raise ValueError(
            f"target has the class {int(target.min())}, which is negative. Pass class indices. Images to be ignored are left out by "
            "`annotated=`, and have any class: target.clamp(min=0)."
        )


def check_task(target: Tensor) -> None:
    """Check the same for a loss that knows soft labels, too.

    Raises:
        TypeError, ValueError: naming `target`.
    """
    if target.is_floating_point() and target.dim() == 2 and target.shape[1] > 1:
        raise TypeError(
            f"target must be class indices for TaskLoss(), got {target.dtype} of shape {tuple(target.shape)}. Soft labels take "
            "TaskLoss(nn.CrossEntropyLoss(reduction='none')), several labels a loss of theirs, summed over labels; regression "
            "RegressionOutput()."
        )
    check_classes(target)


def check_multi_hot(target: Tensor) -> None:
    """Check that a target says of each class how much of it an image has.

    Raises:
        ValueError: naming `target`.
    """
    if target.dim() != 2:
        raise ValueError(f"target must be (N, C) in [0, 1] for MultiLabelLogit, got {tuple(target.shape)}. Pass multi-hot labels.")
    if not bool(((target.float() - 0.5).abs() < 0.5 + 1e-6).all()):  # half types round 0.5 + 1e-6 to 0.5
        raise ValueError(
            f"target must be in [0, 1] for MultiLabelLogit, {_extremes(target)}. Pass multi-hot labels; what is not known of an image may "
            "count as absent, 0."
        )


def check_binary(target: Tensor) -> None:
    """Check that a target is one label an image, 0 or 1.

    Raises:
        ValueError: naming `target`.
    """
    if target[0].numel() != 1:
        raise ValueError(f"target must be (N,) of 0 and 1 for BinaryLogit, got {tuple(target.shape)}. Pass one label an image.")
    if not bool(((target == 0) | (target == 1)).all()):
        raise ValueError(
            f"target must be of 0 and 1 for BinaryLogit, {_extremes(target)}. Write for example (target > 0.5).long(); "
            "images whose label is not known are left out by `annotated=`, and have any."
        )


def _extremes(target: Tensor) -> str:
    return f"got values from {target.min().item():g} to {target.max().item():g}"


def check_logits(name: str, value: Tensor, least: int, target: Tensor | None) -> None:
    """Check that a value is logits `(N, C)`, of enough classes for a score and for the class indices it needs.

    Args:
        name: the score's.
        value: what it is about to read.
        least: the fewest classes it means something for.
        target: `(N,)`; None: it needs none.

    Raises:
        ValueError: naming the score or `target`.
    """
    if value.dim() != 2:
        raise ValueError(
            f"{name} needs logits (N, C), but the model returned {tuple(value.shape)}. Select or pool them with `output=`, a "
            "function of what the model returns, or use the score of your task."
        )
    if target is not None and len(value) != len(target):  # PyTorch would read the first rows, and leave out the others
        raise ValueError(
            f"{name} needs one row of logits an image, but the model returned {tuple(value.shape)} for {len(target)} images. Select the "
            "rows with `output=`, a function of what the model returns."
        )
    classes = value.shape[1]
    if classes < least:
        raise ValueError(
            f"{name} needs at least {least} classes, but the model has {classes}. Use scores.BinaryLogit() for one "
            "logit, scores.RegressionOutput() for a number."
        )
    if target is not None and bool((target >= classes).any()):
        remedy = f"Pass class indices in [0, {classes})." if classes > 1 else "For one logit use scores.BinaryLogit()."
        raise ValueError(f"target has the class {int(target.max())}, but the model has {classes} classes. {remedy}")


def check_maps(value: Tensor, target: Tensor, ignored: int) -> None:
    """Check that a value is logits `(N, C, H, W)` for a label map `(N, H, W)`, and that its classes are in range.

    Args:
        value: what `SegmentationLogit` is about to read.
        target: the label map.
        ignored: the class of pixels that are left out.

    Raises:
        ValueError: naming the score or `target`.
    """
    if value.shape[:1] + value.shape[2:] != target.shape:
        sizes = f"{tuple(value.shape)} and {tuple(target.shape)}"
        remedy = "Resize one of them." if value.dim() == 4 else "Pass class indices (N,) to a classifier; a mask is passed as mask=."
        raise ValueError(f"SegmentationLogit needs logits (N, C, H, W) and a target (N, H, W), got {sizes}. {remedy}")
    kept, classes = target[target != ignored], max(2, value.shape[1])
    if kept.numel() and not 0 <= int(kept.min()) <= int(kept.max()) < classes:
        raise ValueError(f"target has classes outside [0, {classes}). Pass class indices, or set ignore_index.")


def check_loss(function: Any) -> None:
    """Check the loss of a `TaskLoss`.

    Raises:
        TypeError: naming it.
    """
    if isinstance(function, type):
        raise TypeError(
            f"TaskLoss: function must be a loss (logits, target) -> (N,), got the class {function.__name__}. Pass an instance of it, such "
            "as nn.CrossEntropyLoss(reduction='none')."
        )
    if function is not None and not callable(function):
        raise TypeError(f"TaskLoss: function must be a loss (logits, target) -> (N,), got {function!r}. Leave it out for cross-entropy.")
