"""A part of the batch: the images that a penalty's own pass has to see."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from attrreg.apart import SIZE_ERRORS, close, couples, images_apart
from attrreg.attach import attached
from attrreg.baselines import Baseline, Fixed, OtherImage, made_of
from attrreg.call import Call
from attrreg.distributed import in_step
from attrreg.memory import lacks_memory
from attrreg.needs import Need, Value
from attrreg.scores import Score
from attrreg.settings import is_real
from attrreg.spec import is_own
from attrreg.state import Rng


def check_fraction(call: Call) -> None:
    """Check the share of images to compute a penalty on.

    Raises:
        TypeError, ValueError: naming `fraction`.
    """
    fraction = call.fraction
    if not is_real(fraction):
        raise TypeError(f"fraction must be a number, got {type(fraction).__name__}. Write for example fraction=0.25.")
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must be above 0 and at most 1, got {fraction}. Write for example fraction=0.25.")
    if fraction < 1 and call.inputs is not None:
        raise ValueError("fraction cannot be used with inputs=: which of them go by image is not known. Leave one of the two out.")


def part_of(call: Call, needs: Sequence[Need]) -> Call:
    """The call on the images that need a pass: a random share of the annotated ones, or all of those.

    Images without annotation are left out only where that changes nothing but dropout's draws: where the pass is the penalty's
    own, the model does not couple the images, and no image or score is made by draws over the batch or given for each sample. A single
    one is there twice; where the model normalises over the batch, at least two are drawn, and of one annotated image the batch stays.

    Raises:
        ValueError: naming `fraction`.
    """
    annotation = call.annotation
    assert annotation is not None
    # A part of one image has no statistics over the batch: PyTorch's batch normalisation may refuse it.
    least = 2 if call.fraction < 1 and any(map(couples, call.modules)) else 1
    if annotation.count < least and call.fraction < 1 and in_step(call.whole):
        return replace(call, x=call.x.clone())  # which no attachment has recorded: on other ranks, a part takes a pass of its own
    if annotation.count < least or call.inputs is not None:
        return call
    scores = [need.score for need in needs if not isinstance(need, Value)]
    if call.fraction < 1:
        if obstacle := _obstacle(call, needs, scores):
            raise ValueError(f"fraction cannot be used with {obstacle}, or leave fraction out.")
        device = torch.device("cpu") if call.generator is None else call.generator.device
        order = torch.randperm(annotation.count, generator=call.generator, device=device)
        drawn = order[: max(least, math.ceil(round(float(call.fraction) * annotation.count, 9)))]
        indices = annotation.annotated.nonzero().squeeze(1)
        indices = indices[drawn.to(indices.device).sort().values]
    else:
        whole = annotation.count == annotation.batch or attached(call.model) is not None
        draws = any(need.at.draws for need in needs) or any(score.draws for score in scores)
        if whole or draws or _obstacle(call, needs, scores) or not images_apart(call):
            return call
        indices = annotation.annotated.nonzero().squeeze(1)
    if len(indices) == 1:  # of a batch of one, some models drop an axis
        indices = indices.repeat(2)
    target = None if call.target is None else call.target[indices]
    return replace(call, x=call.x[indices], annotation=annotation.part(indices), target=target)


def _obstacle(call: Call, needs: Sequence[Need], scores: Sequence[Score]) -> str:
    """What would make the penalty of a part of the batch another one, also in expectation, and a remedy; empty: nothing."""
    made = [part for point in dict.fromkeys(need.at for need in needs) for part in made_of(point)]
    if any(isinstance(part, OtherImage) for part in made):
        return "baselines.OtherImage, which would draw from the images that fraction left alone. Give it images: baselines.OneOf(images)"
    if any(isinstance(part, Fixed) and part.image.dim() == 4 and len(part.image) > 1 for part in made):
        return "a baseline that holds one image for each image of the batch. Give one for all"
    if any(score.by_place and not score.draws for score in scores):
        return "a score whose seed goes by the places of images in the batch. Let it draw anew"
    if mixing := next((part for part in made if is_own(part) and not part.draws and _mixes(part, call)), None):
        return f"{mixing!r}, which makes an image from others of the batch, or draws without draws = True. Mend that"
    return ""


def _mixes(baseline: Baseline, call: Call) -> bool:
    """Whether a baseline that does not draw makes an image from others, too: it is tried, so that each one is missing once."""
    assert call.annotation is not None
    annotated, images, mask = call.annotation.annotated.nonzero()[:, 0], call.x.detach(), call.annotation.relevant
    before, middle = Rng.of(images.device), len(annotated) // 2
    every = torch.arange(len(images), device=images.device)

    def made(rows: Tensor) -> Tensor:
        given = images[rows]  # a copy, which it may write into before that is noticed
        image = baseline(given, mask[rows], torch.Generator(images.device).manual_seed(0))
        return image if image.dim() == 4 and len(image) == len(given) else image.expand_as(given)

    try:
        whole = made(every)
        parts = [part for part in (annotated[1:], annotated[:middle], annotated[middle:]) if len(part)]
        return not all(close(whole[part], made(part)) for part in parts)
    except SIZE_ERRORS as error:  # it may hold something for each image of the batch; if it fails on all of it, the pass will say so
        if lacks_memory(error):
            raise
        return True
    finally:
        before.restore()
