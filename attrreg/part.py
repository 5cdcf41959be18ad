"""A part of the batch: the images that a penalty's own pass has to see."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import fields, is_dataclass, replace
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from attrreg.attach import attached
from attrreg.baselines import Baseline, Fixed, OneOf, OtherImage
from attrreg.call import Call
from attrreg.counting import counters
from attrreg.distributed import sharded
from attrreg.needs import Need, Value
from attrreg.recording import parts
from attrreg.runner import Runner
from attrreg.scores import Score
from attrreg.sites import INPUT
from attrreg.state import isolated
from attrreg.walk import modes, modules

# Whether the images of a model's batch turned out to be apart, in these modes: not to be shown at every step.
_SHOWN: WeakKeyDictionary[nn.Module, tuple[list[bool], bool]] = WeakKeyDictionary()


def check_fraction(fraction: float, call: Call) -> None:
    """Check the share of images to compute a penalty on.

    Raises:
        TypeError, ValueError: naming `fraction`.
    """
    if isinstance(fraction, bool) or not isinstance(fraction, (int, float)):
        raise TypeError(f"fraction must be a number, got {type(fraction).__name__}. Write for example fraction=0.25.")
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must be above 0 and at most 1, got {fraction}. Write for example fraction=0.25.")
    if fraction < 1 and call.inputs is not None:
        raise ValueError("fraction cannot be used with inputs=: which of them go by image is not known. Leave one of the two out.")


def part_of(call: Call, needs: Iterable[Need], fraction: float) -> Call:
    """The call on the images that need a pass: a random share of the annotated ones, or all of those.

    Images without annotation are left out only where that changes nothing but dropout's draws: where the pass is the penalty's
    own, the model does not couple the images, and no image or score is made by draws over the batch or given for each sample.

    Raises:
        ValueError: naming `fraction`.
    """
    annotation = call.annotation
    assert annotation is not None
    if annotation.count == 0 or call.inputs is not None:
        return call
    needs = list(needs)
    scores = [need.score for need in needs if not isinstance(need, Value)]
    if fraction < 1:
        _check_parts(call, needs, scores)
    else:
        whole = annotation.count == annotation.batch or attached(call.model) is not None
        drawn = any(need.at.draws or _by_row(need.at) for need in needs) or any(score.by_place or score.draws for score in scores)
        if whole or drawn or any(_mixes(need.at, call) for need in needs) or not _apart(call):
            return call
    indices = annotation.annotated.nonzero().squeeze(1)
    if fraction < 1:
        device = torch.device("cpu") if call.generator is None else call.generator.device
        order = torch.randperm(annotation.count, generator=call.generator, device=device)
        indices = indices[order[: math.ceil(fraction * annotation.count)].to(indices.device).sort().values]
    target = None if call.target is None else call.target[indices]
    return replace(call, x=call.x[indices], annotation=annotation.part(indices), target=target)


def _check_parts(call: Call, needs: Sequence[Need], scores: Sequence[Score]) -> None:
    """Check that a part of the batch is what it is in the whole, in expectation."""
    remedy = ""
    if any(_of_batch(need.at) for need in needs):
        remedy = (
            "baselines.OtherImage, which would draw from the images that fraction left alone. Give it images: baselines.OneOf(images), or"
        )
    elif any(_by_row(need.at) for need in needs):
        remedy = "a baseline that holds one image a sample. Give one image for all, or"
    elif any(score.by_place and not score.draws for score in scores):
        remedy = "a score whose seed goes by the places of images in the batch. Let it draw anew, or"
    elif mixing := next((need.at for need in needs if _mixes(need.at, call)), None):
        remedy = f"{mixing!r}, which makes an image from others of the batch. Make it from that image alone, or"
    if remedy:
        raise ValueError(f"fraction cannot be used with {remedy} leave fraction out.")


def _by_row(part: object) -> bool:
    """Whether a point, or what it is made of, holds an image for each of the batch's."""
    if isinstance(part, Fixed):
        return part.image.dim() == 4 and part.image.shape[0] > 1
    if isinstance(part, OneOf) or not is_dataclass(part):
        return False
    return any(_by_row(getattr(part, field.name)) for field in fields(part))


def _of_batch(part: object) -> bool:
    """Whether a point, or what it is made of, takes other images of the batch."""
    if isinstance(part, OtherImage):
        return True
    return is_dataclass(part) and not isinstance(part, Fixed) and any(_of_batch(getattr(part, field.name)) for field in fields(part))


def _mixes(part: object, call: Call) -> bool:
    """Whether somebody's own baseline makes an image from others, too: tried, for those that do not draw."""
    if isinstance(part, Baseline) and not type(part).__module__.startswith("attrreg."):
        if part.draws or call.annotation is None:
            return False
        kept = call.annotation.annotated.nonzero()[:1, 0]
        made = [
            part(x, None if mask is None else mask.clone(), torch.Generator(x.device).manual_seed(0))
            for x, mask in ((call.x.detach().clone(), call.mask), (call.x.detach()[kept], None if call.mask is None else call.mask[kept]))
        ]
        return not close(made[0][kept], made[1])
    return is_dataclass(part) and not isinstance(part, Fixed) and any(_mixes(getattr(part, field.name), call) for field in fields(part))


def close(a: Tensor, b: Tensor) -> bool:
    """Whether two results differ by rounding alone."""
    kind = a.device.type
    eps = torch.finfo(torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else a.dtype).eps
    bound = math.sqrt(max(eps, 2.0**-10) if a.is_cuda and eps > 1e-10 else eps)  # there, products of float32 may be in TF32
    return a.shape == b.shape and bool(((a - b).abs().amax() <= bound * b.abs().amax()).detach())


def _apart(call: Call) -> bool:
    """Whether what a model gives for the annotated images depends on them alone; shown once for a model, by a pass over all of them."""
    model, annotation = call.model, call.annotation
    assert annotation is not None
    if any(map(couples, modules(model))):
        return False
    if next(sharded(model), None) is not None:  # passes that other ranks do not run would wait for them
        return True
    shown_in, apart = _SHOWN.get(model, ([], True))
    if shown_in != modes(model):
        runner = Runner(call, counters(), twice=False)
        with isolated(model, device=call.x.device):
            recording = runner.forward(call.x.detach(), {INPUT: True}, check=True)
            found = [part for part in parts(recording.output) if part.requires_grad and part.shape[:1] == call.x.shape[:1]]
            # Not plain sums: probabilities' do not depend on the images.
            total = sum((_weighed(part[annotation.annotated]) for part in found), torch.zeros((), device=call.x.device))
            gradient = runner.spread(recording, total) if found else None
        if gradient is None or not bool(gradient[annotation.annotated].any()):  # a head that starts at zero shows nothing yet
            return False
        apart = not bool(gradient[~annotation.annotated].any())
        _SHOWN[model] = modes(model), apart
    return apart


def _weighed(part: Tensor) -> Tensor:
    values = part.flatten(1).float()
    return (values * torch.arange(1.0, values.shape[1] + 1, device=part.device).cos()).sum()


def couples(module: nn.Module) -> bool:
    """Whether what a layer itself gives for an image depends on the others of the batch: it normalises or quantises by their statistics."""
    if any(kind.__module__.startswith("torch.ao.quantization") for kind in type(module).__mro__):  # imported only if it is used
        return True
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return module.training or module.running_mean is None
    return module.training and any(name.startswith("running_") for name in module._buffers.keys())  # noqa: SIM118  (TorchScript's); such as timm's EvoNorm
