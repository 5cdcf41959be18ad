"""The ways to compute a penalty that are compared: what people write today, and attrreg's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

import attrreg
from attrreg import AttributionRegularizer
from attrreg.bench.cases import Case
from attrreg.bench.measure import Step

Loss = Callable[[Case], Tensor]

IG_STEPS = 8
INPUT_GRADIENT, GRAD_CAM, ACTIVATION_DIFFERENCE = "InputGradient", "GradCAM", "ActivationDifference"
INTEGRATED_GRADIENTS, SUM = f"IntegratedGradients({IG_STEPS})", "InputGradient + GradCAM + ActivationDifference"
REGULARIZERS: dict[str, AttributionRegularizer] = {
    INPUT_GRADIENT: attrreg.InputGradient(),
    GRAD_CAM: attrreg.GradCAM(),
    ACTIVATION_DIFFERENCE: attrreg.ActivationDifference(),
    SUM: attrreg.InputGradient() + attrreg.GradCAM() + attrreg.ActivationDifference(),
    INTEGRATED_GRADIENTS: attrreg.IntegratedGradients(steps=IG_STEPS),
}


@dataclass(frozen=True)
class Strategy:
    """One way to train with a penalty.

    Attributes:
        penalty: the regularizer that it computes.
        name: of the way.
        loss: the loss of one step.
        attach: what is attached to the model throughout.
        ours: computed by attrreg.
    """

    penalty: str
    name: str
    loss: Loss
    attach: AttributionRegularizer | None = None
    ours: bool = True

    @property
    def key(self) -> str:
        """Both names."""
        return f"{self.penalty}: {self.name}"

    def prepare(self, case: Case) -> Step:
        """A training step without the optimizer, on a copy of the model."""
        case = replace(case, model=copy.deepcopy(case.model))
        if self.attach is not None:
            self.attach.attach(case.model)

        def run() -> None:
            self.loss(case).backward()
            case.model.zero_grad(set_to_none=True)

        return Step(run, case)


PLAIN = Strategy("no penalty", "plain step", lambda case: _cross_entropy(case, case.model(case.x)), ours=False)


def _cross_entropy(case: Case, logits: Tensor) -> Tensor:
    return F.cross_entropy(logits, case.y)


def _ours(name: str, regularizer: AttributionRegularizer) -> list[Strategy]:
    def loss(case: Case) -> Tensor:
        logits = case.model(case.x)
        return _cross_entropy(case, logits) + regularizer(case.model, case.x, case.mask, case.y)

    return [Strategy(name, "attrreg, own forward", loss), Strategy(name, "attrreg, attached", loss, attach=regularizer)]


class _Differentiable(TorchFunctionMode):
    """What people have to put in place of operators without a second derivative."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.hardsigmoid:
            return F.relu6(args[0] + 3) / 6
        if func is F.hardswish:
            return args[0] * F.relu6(args[0] + 3) / 6
        return func(*args, **(kwargs or {}))


def workaround(model: nn.Module) -> AbstractContextManager[Any]:
    """What it takes to differentiate this model twice without attrreg; nothing where nothing is needed."""
    names = {type(module).__name__ for module in model.modules()}
    if any("Hardswish" in name or "HardS" in name or "Hardsigmoid" in name for name in names):
        return _Differentiable()
    if any("Attention" in name for name in names):
        return sdpa_kernel(SDPBackend.MATH)
    return nullcontext()


def _logit_sum(logits: Tensor, y: Tensor) -> Tensor:
    return logits.gather(1, y[:, None]).sum()


def _outside(map: Tensor, mask: Tensor) -> Tensor:
    """The squared map outside the mask, as `objectives.SquaredOutside`."""
    irrelevant = 1 - F.interpolate(mask[:, None].float(), map.shape[-2:], mode="area")
    return (irrelevant * map).square().flatten(1).sum(1).mean()


def _input_gradient(case: Case) -> Tensor:
    x = case.x.clone().requires_grad_()
    with workaround(case.model):
        score = _logit_sum(case.model(x), case.y)
    (gradient,) = torch.autograd.grad(score, x, create_graph=True)
    return _outside(gradient, case.mask)


def _today(penalty: Loss) -> Loss:
    """A penalty with forwards of its own, added to the loss."""
    return lambda case: _cross_entropy(case, case.model(case.x)) + penalty(case)


def strategies(penalties: list[str]) -> list[Strategy]:
    """All strategies for some penalties, the plain step first."""
    today: dict[str, list[Strategy]] = {
        INPUT_GRADIENT: [Strategy(INPUT_GRADIENT, "own forward + create_graph", _today(_input_gradient), ours=False)],
    }
    result = [PLAIN]
    for name in penalties:
        result += today.get(name, []) + _ours(name, REGULARIZERS[name])
    return result
