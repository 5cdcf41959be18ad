"""Attributions, objectives, scores and baselines of the user's own: what they return is checked, and that they write into nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from attrreg import masks
from attrreg.baselines import Baseline, made_of
from attrreg.conditions import version
from attrreg.objectives import Objective, requires_region
from attrreg.points import Point
from attrreg.scores import Score
from attrreg.spec import is_own, source
from attrreg.state import full_precision

if TYPE_CHECKING:
    from attrreg.regularizer import MapRegularizer
    from attrreg.trace import Trace


T = TypeVar("T")


def made(part: Baseline | Point, make: Callable[..., T], x: Tensor, mask: Tensor | None, seed: int) -> T:
    """What `make` of a baseline or a path makes of images, outside autocast. The user's own get copies, as they may write into them.

    Raises:
        ValueError: it wrote into what it got, or drew random numbers unsaid: it would draw the same in each call.
    """
    users = [each for each in (part, *made_of(part)) if is_own(each)]
    if users:
        x, mask = x.clone(), None if mask is None else mask.clone()
    parts = [tensor for tensor in (x, mask) if tensor is not None]
    before = list(map(version, parts))
    generator = torch.Generator(x.device).manual_seed(seed)
    start = None if part.draws or not users else generator.get_state()
    with full_precision(x.device):
        result = make(x, mask, generator)
    if list(map(version, parts)) != before:
        raise ValueError(f"{users[0]!r} writes into the images or the mask that it is given. Let it write into a copy.")
    if start is not None and not torch.equal(generator.get_state(), start):
        raise ValueError(f"{users[0]!r} draws random numbers, and does not say so. Set draws = True in its class.")
    return result


def check_scores(score: Score, per_image: Any, value: Tensor, images: int) -> None:
    """Check what a score made of a value.

    Raises:
        TypeError, ValueError: naming the score.
    """
    if not isinstance(per_image, Tensor):
        raise TypeError(f"{score!r} gave a {type(per_image).__name__}, but a score is a tensor ({images},). Return a number an image.")
    if per_image.shape == (images,):
        return
    if value.shape[:1] != (images,):
        raise ValueError(
            f"{score!r} reads {tuple(value.shape)} for {images} images, of which each must have a row. Where images are frames of "
            "clips, repeat the clip's row with `output=`: lambda logits: logits.repeat_interleave(frames, 0)."
        )
    raise ValueError(
        f"{score!r} gave {tuple(per_image.shape)}, but a score is ({images},), one number an image. Reduce over all "
        "but the batch: a loss, for example, takes reduction='none', and one of several labels .sum(1) then."
    )


def map_of(regularizer: MapRegularizer, trace: Trace) -> Tensor:
    """The map of an attribution. One of another shape would be broadcast against the mask, into another penalty.

    Raises:
        ValueError: naming the regularizer.
    """
    map: Any = regularizer.attribution(trace)
    images = trace.call.x.shape[0]
    if isinstance(map, Tensor) and map.is_floating_point() and map.dim() == 4 and map.shape[0] == images:
        return map
    got = f"{map.dtype} {tuple(map.shape)}" if isinstance(map, Tensor) else f"a {type(map).__name__}"
    raise ValueError(
        f"{type(regularizer).__name__}: attribution(trace) must return a floating-point map ({images}, C, h, w), got {got}. Return what it "
        "reads from the trace; a sum over an axis keeps that with keepdim=True."
    )


def penalties(objective: Objective, map: Tensor, annotation: masks.Annotation) -> Tensor:
    """What an objective makes of a map, under the mask at the map's size. Other terms may read the same tensors.

    Images without annotation get a mask of 0.5 everywhere. Their penalty is not counted, but an objective that divides by the area outside,
    for example, would be NaN for a full mask, and so would the gradient of the whole batch.

    Raises:
        TypeError, ValueError: naming the objective.
    """
    map = masks.at_least_float32(map)
    if requires_region(objective) and map.shape[-2] * map.shape[-1] == 1:
        raise ValueError(
            f"{source(objective)}: the map has one cell, so that the share outside is the mask's alone, whatever the model does. Name a "
            "layer with a finer map, or use objectives.LogOutside()."
        )
    mask = masks.resize(annotation.relevant, (map.shape[-2], map.shape[-1]))
    if annotation.count < annotation.batch:
        mask = torch.where(annotation.annotated.view(-1, 1, 1, 1), mask, 0.5)
    before = version(map), version(mask)
    value: Any = objective(map, mask)
    if (version(map), version(mask)) != before:
        raise ValueError(
            f"{source(objective)} writes into the map or the mask that it is given, which other terms read too. Make new tensors, for "
            "example map.abs() in place of map.abs_()."
        )
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{source(objective)} gave a {type(value).__name__}, but an objective gives a tensor ({map.shape[0]},), one penalty an image. "
            "Return what it reduces the map to."
        )
    return value
