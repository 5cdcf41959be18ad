"""Whether images of a batch depend on each other: what modules tell, and what a pass shows where they tell nothing."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.instancenorm import _InstanceNorm

from attrreg.call import Call, Select
from attrreg.distributed import sharded
from attrreg.recording import parts
from attrreg.runner import Runner
from attrreg.sites import INPUT, OUTPUT
from attrreg.state import autocast_type, isolated
from attrreg.walk import modes


@dataclass
class Shown:
    """What passes have shown of a model, so that not each call has to show it.

    Attributes:
        calls: how many there were.
        found: what was shown last; None: nothing.
    """

    calls: int = 0
    found: bool | None = None

    def due(self) -> bool:
        """Count a call; whether it has to show.

        Until something was shown each call has to, then the second, fourth, eighth ...: what starts at zero, as the gate of a branch, shows
        nothing at first.
        """
        self.calls += 1
        return self.found is None or self.calls & (self.calls - 1) == 0  # a power of two


_SHOWN: WeakKeyDictionary[nn.Module, dict[Hashable, Shown]] = WeakKeyDictionary()


def shown(model: nn.Module, *kind: Hashable) -> Shown:
    """What was shown of a model, by what it is and in which kind of calls."""
    return _SHOWN.setdefault(model, {}).setdefault(kind, Shown())


def output_key(output: Select) -> Hashable:
    """A key for an `output=`: the code of a function, the name of another callable's type; these themselves may hold the model.

    `call.picked_by` gives one only to functions that always pick alike. Here every callable has one: passes check what is shown under it.
    """
    kind: Any = type(output)
    return getattr(output, "__code__", f"{kind.__module__}.{kind.__qualname__}") if callable(output) else (output,)


def images_apart(call: Call) -> bool:
    """Whether what a model gives for an image depends on that alone."""
    model = call.model
    if any(map(couples, call.modules)):
        return False
    if sharded(model):  # other ranks may not run the pass that shows it, which would wait for them
        return False
    apart = shown(model, "images", tuple(modes(model)), output_key(call.output))
    if apart.due():
        # Another half of the images each time: only some of them may meet, as in pairs.
        order = torch.randperm(len(call.x), generator=torch.Generator().manual_seed(apart.calls), device="cpu")
        chosen = torch.zeros_like(order, dtype=torch.bool)
        chosen[order[: len(order) // 2]] = True
        try:
            gradient = _spread(call, chosen.to(call.x.device))
        except RuntimeError:  # no gradient can be taken; a term that needs one will say so
            gradient = None
        if gradient is not None and not bool(gradient[chosen].any()):  # a head that starts at zero shows nothing yet
            return False
        apart.found = gradient is not None and not bool(gradient[~chosen].any())
    return bool(apart.found)


def _spread(call: Call, chosen: Tensor) -> Tensor | None:
    """The gradient of what a model gives for some images, with respect to all; None: it has none."""
    runner = Runner(call, twice=False)
    with isolated(call.model, device=call.x.device):
        recording = runner.forward(call.x.detach(), {INPUT: True}, check=True)
        given = parts(recording.output) if call.output is None else [*parts(recording.output), runner.at(recording, OUTPUT)]
        by_image = [part for part in given if part.requires_grad and part.shape[:1] == chosen.shape and part.layout == torch.strided]
        if not by_image:
            return None
        gradient = runner.spread(recording, torch.stack([_weighed(part[chosen]) for part in by_image]).sum())
    return None if gradient is None else gradient.nan_to_num(0.0)  # of a black image it may be zero times infinity


def _weighed(part: Tensor) -> Tensor:
    """No plain sum: that of probabilities does not depend on the images."""
    values = part.reshape(part.shape[0], -1).float()
    return (values * torch.arange(1.0, values.shape[1] + 1, device=part.device).cos()).sum()


def close(a: Tensor, b: Tensor, noise: float = 0.0) -> bool:
    """Whether two results differ by rounding alone, or by little more than the noise of the like."""
    return a.shape == b.shape and difference(a, b) <= max(_rounding(a), 100 * noise)


def difference(a: Tensor, b: Tensor) -> float:
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
        return False  # an image by itself, or by statistics that stay; also where buffers have such names
    # Such as timm's EvoNorm. TorchScript's buffers have `keys` alone.
    return module.training and any(name.startswith("running_") for name in module._buffers.keys())  # noqa: SIM118
