"""Whether images of a batch depend on each other: what modules tell, and what a pass shows where they tell nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.instancenorm import _InstanceNorm

from attrreg.call import Call, Select
from attrreg.conditions import tensors_in
from attrreg.distributed import in_step
from attrreg.memory import lacks_memory
from attrreg.recording import Recording
from attrreg.runner import Runner
from attrreg.sites import INPUT, OUTPUT
from attrreg.state import autocast_type, isolated
from attrreg.walk import modules

# What may be raised by a model or a baseline that expects a certain number of images, where it gets another one.
SIZE_ERRORS = (RuntimeError, ValueError, AssertionError, LookupError, TypeError, AttributeError)


@dataclass
class Probe:
    """A question about a model that only passes answer, as whether images meet; not every call has to run those.

    Attributes:
        calls: how many have asked.
        found: the last answer; None: no pass has shown anything yet. Once it is False, nobody asks again.
    """

    calls: int = 0
    found: bool | None = None

    def due(self) -> bool:
        """Count a call; whether it has to run the passes.

        Until they have shown something each call has to, then the second, fourth, eighth ...: images may meet in a branch whose gate starts
        at zero, which shows nothing at first.
        """
        self.calls += 1
        return self.found is None or (self.found and self.calls & (self.calls - 1) == 0)  # a power of two


_PROBES: WeakKeyDictionary[nn.Module, dict[Hashable, Probe]] = WeakKeyDictionary()


def probe_of(model: nn.Module, *kind: Hashable) -> Probe:
    """The probe of a model for one question in one kind of calls."""
    return _PROBES.setdefault(model, {}).setdefault(kind, Probe())


def state_key(model: nn.Module) -> Hashable:
    """A key for what may change whether images meet: which modules are in train mode, and which have hooks."""
    return bytes(module.training + 2 * bool(module._forward_pre_hooks or module._forward_hooks) for module in modules(model))


def output_key(output: Select) -> Hashable:
    """A key for an `output=`: the code of a function, a module's state, the name of another's type; these themselves may hold the model.

    `call.picked_by` gives one only to functions that always pick alike. Here every callable has one: passes check what is shown under it.
    """
    kind: Any = type(output)
    key = getattr(output, "__code__", f"{kind.__module__}.{kind.__qualname__}") if callable(output) else (output,)
    return (key, state_key(output)) if isinstance(output, nn.Module) else key


def images_apart(call: Call) -> bool:
    """Whether what a model gives for an image depends on that alone."""
    model = call.model
    if any(map(couples, call.modules)):
        return False
    if in_step(call.whole):  # other ranks may not run the pass that shows it, which would wait for them
        return False
    probe = probe_of(model, "images", call.inputs is None, state_key(model), output_key(call.output))
    if probe.due():
        found = _are_apart(call, probe)
        probe.found = probe.found if found is None else found  # images that show nothing, as of NaN, say nothing
    return bool(probe.found)


def _are_apart(call: Call, probe: Probe) -> bool | None:
    """Whether passes find images apart; None: they show nothing yet. Only some of them may meet, as in pairs."""
    images, device = len(call.x), call.x.device
    order = torch.randperm(images, generator=torch.Generator().manual_seed(probe.calls), device="cpu")  # another one each time
    half = (order < max(1, images // 2)).to(device)
    # Until something was shown, groups that part any two images; then two halves at random.
    bits = [(order >> bit & 1 == 1).to(device) for bit in range((images - 1).bit_length())] if probe.found is None else []
    runner = Runner(call, twice=False)
    with isolated(call.model, device):
        recording = runner.forward(call.x.detach(), {INPUT: True}, check=True)
        outputs = _by_image(runner, recording, images)
        differentiable = [part for part in outputs if part.requires_grad]
        for chosen in [group for bit in bits for group in (bit, ~bit)] or [half]:
            try:
                total = torch.stack([_weighed(part[chosen]) for part in differentiable]).sum()
                gradient = runner.spread(recording, total)
            except RuntimeError:  # none can be taken; a term that needs one will say so
                return None
            if gradient is None:
                return None
            gradient = gradient.nan_to_num(0.0)  # of a black image it may be zero times infinity
            if not bool(gradient[chosen].any()):  # a head that starts at zero
                return None
            if bool(gradient[~chosen].any()):
                return False
    # Both halves: if a model divides by the largest value of the batch, the half that has it gives the same. Of three images, each pair.
    groups = [half, ~half] if images > 3 else [order.to(device) != left for left in range(images)]
    if recording.drew or call.inputs is not None:  # a part of the batch needs its part of those, and which of them go by image is not known
        return True
    return all(_as_whole(call, outputs, chosen.nonzero()[:, 0]) for chosen in groups)


def _as_whole(call: Call, outputs: Sequence[Tensor], chosen: Tensor) -> bool:
    """Whether some images give alone what they give among all: what has no gradient shows only so."""
    if len(chosen) == 1:  # of a batch of one some models drop an axis
        chosen = chosen.repeat(2)
    few = Runner(replace(call, x=call.x[chosen]), twice=False)

    def alone(images: Tensor) -> list[Tensor]:
        with torch.no_grad():
            found = _by_image(few, few.replay(images, {}, check=True), len(images))
            return [part.nan_to_num(0.0) for part in found]

    try:
        return same_alone([part.detach()[chosen].nan_to_num(0.0) for part in outputs], call.x.detach()[chosen], alone)
    except SIZE_ERRORS as error:  # it knows how many images it gets
        if lacks_memory(error):
            raise
        return False


def same_alone(among: Sequence[Tensor], images: Tensor, alone: Callable[[Tensor], Sequence[Tensor]]) -> bool:
    """Whether `alone` makes of images what came of them among others, but for rounding, or for what rounding makes of the images."""
    found = alone(images)
    if len(found) != len(among):
        return False
    if all(map(close, among, found)):
        return True
    nearly = alone(images * (1 + torch.finfo(images.dtype).eps))  # statistics of a few values make much of rounding
    return all(close(a, b, noise=_difference(c, b)) for a, b, c in zip(among, found, nearly, strict=True))


def _by_image(runner: Runner, recording: Recording, images: int) -> list[Tensor]:
    """The floating-point tensors that a model gave with a row for each image, and the logits that are picked from them."""
    given = tensors_in(recording.output)
    if runner.call.output is not None:
        given.append(runner.at(recording, OUTPUT))
    fitting = (part for part in given if part.is_floating_point() and part.shape[:1] == (images,) and part.layout == torch.strided)
    return [part.to(runner.call.x.device) for part in fitting]  # a model may span several devices


def _weighed(part: Tensor) -> Tensor:
    """No plain sum: that of probabilities does not depend on the images."""
    values = part.reshape(part.shape[0], -1).float()
    return (values * torch.arange(1.0, values.shape[1] + 1, device=part.device).cos()).sum()


def close(a: Tensor, b: Tensor, noise: float = 0.0) -> bool:
    """Whether two results differ by rounding alone, or by little more than the noise of the like."""
    return a.shape == b.shape and _difference(a, b) <= max(_rounding(a), 100 * noise)


def _difference(a: Tensor, b: Tensor) -> float:
    """The largest, by the largest value."""
    return float(((a - b).abs().amax() / b.abs().amax().clamp_min(torch.finfo(b.dtype).tiny)).detach())


def _rounding(value: Tensor) -> float:
    eps = torch.finfo(autocast_type(value.device) or value.dtype).eps
    return math.sqrt(max(eps, 2.0**-10) if value.is_cuda and eps > 1e-10 else eps)  # there, products of float32 may be in TF32


def couples(module: nn.Module) -> bool:
    """Whether what a layer itself gives for an image depends on the others of the batch: it normalises or quantises by their statistics."""
    if any(kind.__module__.startswith("torch.ao.quantization") for kind in type(module).__mro__):  # imported only if it is used
        return True
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return module.training or module.running_mean is None
    if isinstance(module, _InstanceNorm) or type(module).__name__.startswith("FrozenBatchNorm"):
        return False  # each image by itself, or by fixed statistics, though buffers may be called running_...
    # Such as timm's EvoNorm. TorchScript's buffers have `keys` alone.
    return module.training and any(name.startswith("running_") for name in module._buffers.keys())  # noqa: SIM118
