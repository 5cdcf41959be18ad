"""The ways to train with a penalty that are compared: what people write today, and attrreg's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import captum.attr
from torch import Tensor

import attrreg
from attrreg import AttributionRegularizer, Scheduled
from attrreg.bench import today
from attrreg.bench.cases import Case
from attrreg.bench.measure import Step
from attrreg.bench.today import Loss
from attrreg.engines import FiniteDifference
from attrreg.schedules import Every

IG_STEPS = 8
INPUT_GRADIENT, GRAD_CAM, ACTIVATION_DIFFERENCE = "InputGradient", "GradCAM", "ActivationDifference"
SUM, INTEGRATED_GRADIENTS = "all three", f"IntegratedGradients({IG_STEPS})"
PENALTIES = (INPUT_GRADIENT, GRAD_CAM, ACTIVATION_DIFFERENCE, SUM, INTEGRATED_GRADIENTS)
# The score and the objective that people write by hand.
WRITTEN: dict[str, Any] = {"score": attrreg.scores.TargetLogit(), "objective": attrreg.objectives.SquaredOutside()}
REGULARIZERS: dict[str, AttributionRegularizer] = {
    INPUT_GRADIENT: attrreg.InputGradient(**WRITTEN),
    GRAD_CAM: attrreg.GradCAM(**WRITTEN),
    ACTIVATION_DIFFERENCE: attrreg.ActivationDifference(),
    SUM: attrreg.InputGradient(**WRITTEN) + attrreg.GradCAM(**WRITTEN) + attrreg.ActivationDifference(),
    INTEGRATED_GRADIENTS: attrreg.IntegratedGradients(steps=IG_STEPS, chunk=None, **WRITTEN),
}
# Of convolutions and products, in plain steps: one forward, one gradient of the input and one of the weights are a third each.
FLOORS = {INPUT_GRADIENT: 2.0, GRAD_CAM: 1.0, ACTIVATION_DIFFERENCE: 2.0, SUM: 3.0, INTEGRATED_GRADIENTS: 1 + 2.0 * IG_STEPS}

PLAIN, DETACHED, TODAY = "plain step", "detached", "own forward + create_graph"
CAPTUM, PAPER, BY_HAND = "Captum, made differentiable", "paper's formula, shared forward", "by hand, shared forward"
UNATTACHED, ATTACHED, CHUNKED = "attrreg, unattached", "attrreg, attached", "attrreg, attached, chunk=1"
LAZY, MOVED = "attrreg, attached, every 4 steps", "attrreg, attached, finite difference"


@dataclass(frozen=True)
class Strategy:
    """One way to train with a penalty.

    Attributes:
        name: of the way.
        loss: the loss of one step.
        attach: what is attached to the model throughout.
        count: steps that are timed together, where they differ.
    """

    name: str
    loss: Loss
    attach: AttributionRegularizer | Scheduled | None = None
    count: int = 1

    def prepare(self, case: Case) -> Step:
        """A training step without the optimizer, on a copy of the model."""
        case = replace(case, model=copy.deepcopy(case.model))
        if self.attach is not None:
            self.attach.attach(case.model)

        def run() -> None:
            for _ in range(self.count):
                with case.precision():
                    loss = self.loss(case)
                loss.backward()
                case.model.zero_grad(set_to_none=True)

        return Step(run, case, self.count)


def strategies(penalty: str, case: Case) -> list[Strategy]:
    """All ways to train with one of the penalties, the plain step first."""
    ours = REGULARIZERS[penalty]
    found = [_plain(), *TODAYS[penalty](case), Strategy(UNATTACHED, _with(ours)), _attached(ATTACHED, ours)]
    if isinstance(ours, attrreg.IntegratedGradients):
        found.append(_attached(CHUNKED, replace(ours, chunk=1)))
    if penalty == INPUT_GRADIENT:
        found += [_attached(LAZY, Scheduled(ours, Every(4)), count=4), _attached(MOVED, ours.using(FiniteDifference()))]
    return found


def of_curve(varied: str, value: int, case: Case) -> list[Strategy]:
    """What is compared where one number varies: the plain step, today's way and attrreg's."""
    ours = REGULARIZERS[INPUT_GRADIENT]
    theirs: list[Loss] = [today.input_gradient]
    chunked: list[Strategy] = []
    if varied == "steps":
        ours = path = attrreg.IntegratedGradients(steps=value, chunk=None, **WRITTEN)
        theirs = [today.integrated_gradients(value)]
        chunked = [_attached(CHUNKED, replace(path, chunk=1))]
    elif varied == "terms":
        theirs = [today.input_gradient, today.grad_cam(_layer(case)), today.activation_difference, today.input_gradient][:value]
        terms = [*(REGULARIZERS[name] for name in (INPUT_GRADIENT, GRAD_CAM, ACTIVATION_DIFFERENCE)), attrreg.InputXGradient(**WRITTEN)]
        ours = sum(terms[1:value], start=1.0 * terms[0])
    return [_plain(), Strategy(TODAY, today.added(*theirs)), _attached(ATTACHED, ours), *chunked]


def _plain() -> Strategy:
    return Strategy(PLAIN, lambda case: today.cross_entropy(case, case.model(case.x)))


def _attached(name: str, regularizer: AttributionRegularizer | Scheduled, count: int = 1) -> Strategy:
    return Strategy(name, _with(regularizer), regularizer, count)


def _with(regularizer: AttributionRegularizer | Scheduled) -> Loss:
    def loss(case: Case) -> Tensor:
        logits = case.model(case.x)
        return today.cross_entropy(case, logits) + regularizer(case.model, case.x, case.mask, case.y)

    return loss


def _layer(case: Case) -> str:
    """The layer that `GradCAM()` takes, from the one place that keeps its name."""
    regularizer, model = attrreg.GradCAM(), copy.deepcopy(case.model)
    with regularizer.attach(model) as handle:
        model(case.x)
        regularizer(model, case.x, case.mask, case.y)
        assert handle.map is not None
        return handle.map


def _grad_cams(case: Case) -> list[Strategy]:
    layer = _layer(case)
    captums = [Strategy(CAPTUM, today.added(today.captum_grad_cam(layer)))] if _is_nchw(case, layer) else []
    return [Strategy(TODAY, today.added(today.grad_cam(layer))), *captums, Strategy(BY_HAND, today.by_hand(layer=layer))]


def _all_three(case: Case) -> list[Strategy]:
    layer = _layer(case)
    return [
        Strategy(TODAY, today.added(today.input_gradient, today.grad_cam(layer), today.activation_difference)),
        Strategy(BY_HAND, today.by_hand(gradient=True, difference=True, layer=layer)),
    ]


def _is_nchw(case: Case, layer: str) -> bool:
    """Whether Captum reads this layer as it is: it takes the second axis for channels."""
    return any(found.name == layer and found.layout == "NCHW" for found in attrreg.layers(case.model, case.x))


TODAYS: dict[str, Callable[[Case], list[Strategy]]] = {
    INPUT_GRADIENT: lambda case: [
        Strategy(DETACHED, today.detached),
        Strategy(TODAY, today.added(today.input_gradient)),
        Strategy(CAPTUM, today.added(today.through_captum(captum.attr.Saliency, abs=False))),
        Strategy(PAPER, today.contrast),
        Strategy(BY_HAND, today.by_hand(gradient=True)),
    ],
    GRAD_CAM: _grad_cams,
    ACTIVATION_DIFFERENCE: lambda case: [
        Strategy(TODAY, today.added(today.activation_difference)),
        Strategy(BY_HAND, today.by_hand(difference=True)),
    ],
    SUM: _all_three,
    INTEGRATED_GRADIENTS: lambda case: [
        Strategy(TODAY, today.added(today.integrated_gradients(IG_STEPS))),
        Strategy(CAPTUM, today.added(today.through_captum(captum.attr.IntegratedGradients, n_steps=IG_STEPS))),
    ],
}
