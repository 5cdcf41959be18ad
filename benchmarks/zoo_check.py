"""What is checked of one model: penalties, gradients, layers, and what is left behind."""

from __future__ import annotations

import copy
import itertools
import math
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import captum.attr  # noqa: F401  (IntegratedGradients imports it late; not to be timed)
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack

import attrreg
from attrreg import AttributionRegularizer, sites
from benchmarks.zoo_models import CLASSES, Subject

# Without kinks of their own: what a difference tells is of the model and the operators.
SMOOTH: dict[str, Any] = {"score": attrreg.scores.TargetLogit(), "objective": attrreg.objectives.SquaredOutside()}
REGULARIZERS: dict[str, AttributionRegularizer] = {
    "InputGradient": attrreg.InputGradient(**SMOOTH),
    "IntegratedGradients": attrreg.IntegratedGradients(steps=2, **SMOOTH),
    "ActivationDifference": attrreg.ActivationDifference(),
    "GradCAM": attrreg.GradCAM(**SMOOTH),
}
STEPS = (1e-8, 1e-6, 1e-10, 1e-9, 1e-7, 1e-11, 1e-5)  # of the parameters' own size; tiny ones for ill-conditioned models
GOOD, TOLERANCE = 1e-5, 1e-3  # an agreement with which no other step is tried; one that passes
CLEAR = 1.3  # see `alignment`: from here on the place of a change can be told
SEED = 3


class Failure(Exception):
    """A check that failed."""


@dataclass
class Result:
    """The outcome for one regularizer on one model.

    Attributes:
        status: "pass", "refused" (an error by attrreg itself) or "fail".
        cause: why not "pass".
        penalty: its value in float32.
        agreement: relative difference between the derivative along a direction and a difference quotient, in float64;
            `smoothed`: on a copy without kinks.
        layer: that was found, and `shape` of the map (Grad-CAM) or the features (activation difference).
        aligned: see `alignment`.
        seconds: of one penalty with its gradients, in float32.
    """

    regularizer: str
    status: str = "pass"
    cause: str = ""
    penalty: float = math.nan
    agreement: float = math.nan
    smoothed: bool = False
    layer: str = ""
    shape: tuple[int, ...] = ()
    aligned: tuple[int, float] = (-1, 1.0)
    seconds: float = math.nan


def check(subject: Subject, names: tuple[str, ...] = tuple(REGULARIZERS), float64: bool = True) -> Iterator[Result]:
    """Check a model with each regularizer in turn. The model is left in float64."""
    torch.manual_seed(SEED)
    x = torch.randn(subject.batch, 3, subject.size, subject.size)
    mask = torch.zeros(subject.batch, subject.size, subject.size, dtype=torch.bool)
    mask[:, : subject.size // 2] = True
    case = Case(subject, x, mask, torch.arange(subject.batch) % CLASSES)
    results = {name: Result(name) for name in names}
    for result in results.values():
        _guarded(result, _check_float32, case)
    subject.model.double()
    case.x = x.double()
    for result in results.values():
        if result.status == "pass" and float64:
            _guarded(result, _check_float64, case)
        yield result


@dataclass
class Case:
    """A model with a batch."""

    subject: Subject
    x: Tensor
    mask: Tensor
    target: Tensor

    @property
    def model(self) -> nn.Module:
        """The model."""
        return self.subject.model

    def penalty(self, name: str) -> Tensor:
        """The penalty, always with the same draws."""
        torch.manual_seed(SEED)
        before, draws = torch.get_rng_state(), torch.Generator().manual_seed(SEED)
        value = REGULARIZERS[name](self.model, self.x, self.mask, self.target, generator=draws, output=self.subject.output)
        if not torch.equal(before, torch.get_rng_state()):
            raise Failure("left behind: the random number generator")
        return value

    def attached(self, name: str) -> Tensor:
        """The penalty from the loop's own forward."""
        torch.manual_seed(SEED)
        with REGULARIZERS[name].attach(self.model):
            self.model(self.x)
            return self.penalty(name)

    def gradients(self, value: Tensor) -> list[Tensor]:
        """Its gradients of all parameters."""
        parameters = list(self.model.parameters())
        return list(torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True))


def _guarded(result: Result, function: Callable[[Result, Case], None], case: Case) -> None:
    before = _snapshot(case)
    try:
        function(result, case)
    except Failure as failure:
        result.status, result.cause = "fail", str(failure)
    except Exception as error:  # whatever attrreg, the model or PyTorch raises is a result
        result.status = "refused" if _is_ours(error) else "fail"
        result.cause = _where(error)
    left = "" if function is _check_float64 else _difference(before, _snapshot(case))
    if left:
        result.status, result.cause = "fail", f"left behind: {left}. {result.cause}"


def _check_float32(result: Result, case: Case) -> None:
    name = result.regularizer
    start = time.perf_counter()
    value = case.penalty(name)
    gradients = case.gradients(value)
    result.seconds = round(time.perf_counter() - start, 3)
    result.penalty = float(value.detach())
    if not math.isfinite(result.penalty):
        raise Failure(f"the penalty is {result.penalty}")
    if result.penalty == 0:
        raise Failure("the penalty is zero")
    bad = [key for (key, _), g in zip(case.model.named_parameters(), gradients, strict=True) if not g.isfinite().all()]
    if bad:
        raise Failure(f"gradients that are not finite: {len(bad)} of {len(gradients)} parameters, such as {bad[0]}")
    if not any(gradient.any() for gradient in gradients):
        raise Failure("all gradients are zero")
    if name == "GradCAM":
        _check_map(result, case)
    if name in ("GradCAM", "ActivationDifference"):
        _look_inside(result, copy.deepcopy(case.model), case)


def _check_map(result: Result, case: Case) -> None:
    with torch.no_grad():
        torch.manual_seed(SEED)
        map = attrreg.GradCAM().attribute(case.model, case.x, case.target, output=case.subject.output)
    result.shape = tuple(map.shape[1:])
    if not map.any():
        raise Failure("the map is zero")
    if map[0].numel() > 1 and float(map.flatten(1).std(dim=1).min()) <= 1e-6 * float(map.abs().max()):
        raise Failure("the map does not vary over positions")


def _look_inside(result: Result, model: nn.Module, case: Case) -> None:
    """Which layer "auto" turned out to be. The only place that reads what attrreg keeps for itself."""
    with REGULARIZERS[result.regularizer].attach(model) as handle:
        model(case.x)
        if result.regularizer == "ActivationDifference":
            assert handle._recording is not None
            result.shape = tuple(handle._recording.values[sites.FEATURES].shape[1:])
            return
        REGULARIZERS["GradCAM"](model, case.x, case.mask, case.target, output=case.subject.output)
        result.layer = handle.map or ""
    if result.layer:
        result.aligned = right, contrast = alignment(model, case.x, result.layer)
        if contrast > CLEAR and right < 2:
            raise Failure(f"the map of {result.layer} shows changes elsewhere than the image has them ({right} of 4 quadrants)")


@patch.object(Tensor, "float", Tensor.double)  # in parts that would compute in float32
def _check_float64(result: Result, case: Case) -> None:
    name = result.regularizer
    value = case.penalty(name)
    gradients = case.gradients(value)
    again = case.attached(name)
    if not torch.allclose(again, value, rtol=1e-9, atol=0):
        raise Failure(f"attached {float(again):.8g}, unattached {float(value):.8g}")
    torch.manual_seed(SEED + 1)
    parameters = list(case.model.parameters())
    direction = [torch.randn_like(p) * p.detach().square().mean().sqrt() for p in parameters]
    slope = _dot(gradients, direction)
    also = _dot(case.gradients(again), direction)
    if abs(slope - also) > 1e-7 * abs(slope):
        raise Failure(f"derivative attached {also:.8g}, unattached {slope:.8g}")
    del gradients, again
    result.agreement, quotient = _agreement(case, name, direction, slope, STEPS[:3])
    if not result.agreement < TOLERANCE:
        with smooth():  # kinks may be as dense as any step is small
            slope = _dot(case.gradients(case.penalty(name)), direction)
            result.agreement, quotient = _agreement(case, name, direction, slope, STEPS)
        result.smoothed = True
    if not result.agreement < TOLERANCE:
        raise Failure(f"the derivative along a direction is {quotient:.6g}, the gradients give {slope:.6g}")


@contextmanager
def smooth() -> Iterator[None]:
    """Compute with smooth functions in place of those with kinks: another model, with the same operators around them."""
    with ExitStack() as stack:
        for name in ("relu", "relu6", "hardtanh"):  # what relied on the sign still can
            stack.enter_context(patch.object(F, name, lambda input, *rest, **settings: F.softplus(input)))
        for name in ("leaky_relu", "prelu"):
            stack.enter_context(patch.object(F, name, lambda input, *rest, **settings: F.silu(input)))
        stack.enter_context(patch.object(F, "max_pool2d", _max_pool))
        yield


def _max_pool(
    input: Tensor, size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False, **_: Any
) -> Tensor:
    return F.avg_pool2d(input, size, stride or size, padding, ceil_mode)


def _dot(one: list[Tensor], other: list[Tensor]) -> float:
    return float(sum((a * b).sum() for a, b in zip(one, other, strict=True)))


def _agreement(case: Case, name: str, direction: list[Tensor], slope: float, steps: tuple[float, ...]) -> tuple[float, float]:
    """How well the slope agrees with a central difference, at the best step: a large one crosses kinks, a small one rounds."""
    parameters = list(case.model.parameters())
    origin = [parameter.detach().clone() for parameter in parameters]

    def at(step: float) -> float:
        with torch.no_grad():
            for parameter, start, way in zip(parameters, origin, direction, strict=True):
                parameter.copy_(start + step * way)
        return float(case.penalty(name).detach())

    best = math.inf, math.nan
    for step in steps:
        quotient = (at(step) - at(-step)) / (2 * step)
        best = min(best, (abs(quotient - slope) / max(abs(slope), 1e-300), quotient))
        if best[0] < GOOD:
            break
    at(0.0)
    return best


def alignment(model: nn.Module, x: Tensor, layer: str) -> tuple[int, float]:
    """Whether positions of a layer's map are where the image has them.

    Each quadrant of the images is changed in turn. Deep layers see the whole image, so the change in each quadrant of the map is
    compared with its mean over the four.

    Returns:
        For how many quadrants the map changed most in the same one, and the largest of the compared changes: near 1 where
        nothing can be told. (-1, 1) where the map has too few positions.
    """
    base = _grid(model, x, layer)
    h, w = base.shape[-2:]
    if min(h, w) < 2:
        return -1, 1.0
    quadrants = list(itertools.product((False, True), (False, True)))
    table = torch.zeros(4, 4, dtype=base.dtype)
    for n, quadrant in enumerate(quadrants):
        for seed in range(3):
            noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)
            changed = x.clone()
            _part(changed, quadrant).add_(0.3 * _part(noise, quadrant))
            change = (_grid(model, changed, layer) - base).abs().mean(dim=(0, 1))
            table[n] += torch.stack([_part(change, place).mean() for place in quadrants])
    table /= table.mean(dim=1, keepdim=True)
    table /= table.mean(dim=0, keepdim=True)
    return int((table.argmax(dim=1) == torch.arange(4)).sum()), round(float(table.max()), 3)


def _part(value: Tensor, quadrant: tuple[bool, bool]) -> Tensor:
    height, width = value.shape[-2] // 2, value.shape[-1] // 2
    rows, columns = (slice(-size, None) if last else slice(size) for size, last in zip((height, width), quadrant, strict=True))
    return value[..., rows, columns]


def _grid(model: nn.Module, x: Tensor, layer: str) -> Tensor:
    outputs: list[Tensor] = []
    handle = model.get_submodule(layer).register_forward_hook(lambda module, args, output: outputs.append(output.detach().clone()))
    torch.manual_seed(SEED)
    with handle, torch.no_grad():
        model(x)
    return sites.to_grid(outputs[0], model, x, layer)


def _snapshot(case: Case) -> dict[str, Any]:
    modules, cuda = list(case.model.modules()), torch.backends.cuda
    return {
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in modules],
        "buffers": [(id(b), b.clone()) for b in case.model.buffers()],
        "modes": [m.training for m in modules],
        "flags": [(p.requires_grad, p.grad is None) for p in case.model.parameters()],
        "parameters": [(id(p), p._version) for p in case.model.parameters()],
        "images": [(case.x._version, case.x.requires_grad, case.x.grad is None)],
        "settings": [cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled(), torch.is_grad_enabled()],
        "function modes": [len(_get_current_function_mode_stack()), torch.utils.checkpoint._CheckpointFrame.__module__],
    }


def _difference(before: dict[str, Any], after: dict[str, Any]) -> str:
    changed = [key for key in before if key != "buffers" and before[key] != after[key]]
    for (old, value), (new, now) in zip(before["buffers"], after["buffers"], strict=True):
        if old != new or not torch.equal(torch.nan_to_num(value), torch.nan_to_num(now)):
            changed.append("buffers")
            break
    return ", ".join(changed)


def _is_ours(error: Exception) -> bool:
    """Whether attrreg raised it, and did not fall over something."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return Path(last.filename).is_relative_to(Path(attrreg.__file__).parent) and (last.line or "").startswith("raise ")


def _where(error: Exception) -> str:
    """The error's first line and where it was raised, the model's own code if it went through there."""
    frames = traceback.extract_tb(error.__traceback__)
    place = next((f for f in reversed(frames) if "timm" in f.filename or "torchvision" in f.filename), frames[-1])
    text = (str(error).strip().splitlines() or [""])[0][:300]
    return f"{type(error).__name__}: {text} [{Path(place.filename).name}:{place.lineno}]"
