"""The ways to train with a penalty that are compared: what people write today, and attrreg's."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import captum.attr
import torch
import torch.nn.functional as F
from captum._utils.common import _run_forward
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

import attrreg
from attrreg import AttributionRegularizer, Scheduled, sites
from attrreg.baselines import Shuffle
from attrreg.bench.cases import Case
from attrreg.bench.measure import Step
from attrreg.engines import FiniteDifference
from attrreg.schedules import Every

Loss = Callable[[Case], Tensor]

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
CAPTUM, PAPER = "Captum, made differentiable", "paper's formula, shared forward"
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
    today: list[Loss] = [_input_gradient]
    chunked: list[Strategy] = []
    if varied == "steps":
        ours = path = attrreg.IntegratedGradients(steps=value, chunk=None, **WRITTEN)
        today = [_integrated_gradients(value)]
        chunked = [_attached(CHUNKED, replace(path, chunk=1))]
    elif varied == "terms":
        today = [_input_gradient, _grad_cam(_layer(case)), _activation_difference, _input_gradient][:value]
        terms = [*(REGULARIZERS[name] for name in (INPUT_GRADIENT, GRAD_CAM, ACTIVATION_DIFFERENCE)), attrreg.InputXGradient(**WRITTEN)]
        ours = sum(terms[1:value], start=1.0 * terms[0])
    return [_plain(), Strategy(TODAY, _added(*today)), _attached(ATTACHED, ours), *chunked]


def _plain() -> Strategy:
    return Strategy(PLAIN, lambda case: _cross_entropy(case, case.model(case.x)))


def _attached(name: str, regularizer: AttributionRegularizer | Scheduled, count: int = 1) -> Strategy:
    return Strategy(name, _with(regularizer), regularizer, count)


def _with(regularizer: AttributionRegularizer | Scheduled) -> Loss:
    def loss(case: Case) -> Tensor:
        logits = case.model(case.x)
        return _cross_entropy(case, logits) + regularizer(case.model, case.x, case.mask, case.y)

    return loss


# What people write today


class _Differentiable(TorchFunctionMode):
    """Replaces activations that PyTorch cannot differentiate twice, as users without attrreg have to."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.hardsigmoid:
            return F.relu6(args[0] + 3) / 6
        if func is F.hardswish:
            return args[0] * F.relu6(args[0] + 3) / 6
        return func(*args, **(kwargs or {}))


@contextmanager
def _workaround(model: nn.Module) -> Iterator[None]:
    """What it takes to differentiate a model twice without attrreg."""
    hard = any("hardswish" in name or "hardsigmoid" in name for name in (type(module).__name__.lower() for module in model.modules()))
    with sdpa_kernel(SDPBackend.MATH), _Differentiable() if hard else nullcontext():
        yield


def _cross_entropy(case: Case, logits: Tensor) -> Tensor:
    return F.cross_entropy(logits, case.y)


def _score(logits: Tensor, y: Tensor) -> Tensor:
    return logits.gather(1, y[:, None]).sum()


def _outside(map: Tensor, mask: Tensor) -> Tensor:
    """The squared map outside the mask, as `objectives.SquaredOutside`."""
    irrelevant = 1 - F.adaptive_avg_pool2d(mask[:, None].float(), (map.shape[-2], map.shape[-1]))
    return (irrelevant * map.float()).square().flatten(1).sum(1).mean()


def _added(*penalties: Loss) -> Loss:
    """Penalties with forwards of their own, added to the loss."""
    return lambda case: torch.stack([_cross_entropy(case, case.model(case.x)), *(penalty(case) for penalty in penalties)]).sum()


def _detached(case: Case) -> Tensor:
    x = case.x.clone().requires_grad_()
    logits = case.model(x)
    (gradient,) = torch.autograd.grad(_score(logits, case.y), x, retain_graph=True)
    return _cross_entropy(case, logits) + _outside(gradient, case.mask)


def _input_gradient(case: Case) -> Tensor:
    x = case.x.clone().requires_grad_()
    with _workaround(case.model):
        score = _score(case.model(x), case.y)
    (gradient,) = torch.autograd.grad(score, x, create_graph=True)
    return _outside(gradient, case.mask)


def _contrast(case: Case) -> Tensor:
    # As the code of arXiv 1910.00199 computes it, with the best other class for its second class.
    x = case.x.clone().requires_grad_()
    with _workaround(case.model):
        logits = case.model(x)
    true = logits.gather(1, case.y[:, None]).squeeze(1)
    other = logits.scatter(1, case.y[:, None], -torch.inf).amax(1)
    (gradient,) = torch.autograd.grad((true - other).abs().sum(), x, create_graph=True)
    return _cross_entropy(case, logits) + (gradient * ~case.mask[:, None]).abs().sum()


def gradients_with_graph(forward_fn: Any, inputs: Any, target_ind: Any = None, additional_forward_args: Any = None) -> Any:
    """Captum's `gradient_func`, with `create_graph`."""
    with torch.enable_grad():
        outputs = _run_forward(forward_fn, inputs, target_ind, additional_forward_args)
        return torch.autograd.grad(torch.unbind(outputs), inputs, create_graph=True)


def _captum(method: Any, **settings: Any) -> Loss:
    def penalty(case: Case) -> Tensor:
        attribution = method(case.model)
        attribution.gradient_func = gradients_with_graph
        with _workaround(case.model):
            return _outside(attribution.attribute(case.x.clone().requires_grad_(), target=case.y, **settings), case.mask)

    return penalty


def _grad_cam(layer: str) -> Loss:
    def penalty(case: Case) -> Tensor:
        seen: list[Tensor] = []

        def keep(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            seen.append(output)
            return output.clone()  # what follows may work in place

        with case.model.get_submodule(layer).register_forward_hook(keep), _workaround(case.model):
            score = _score(case.model(case.x), case.y)
        (gradient,) = torch.autograd.grad(score, seen[0], create_graph=True)
        weights, values = (sites.to_grid(value, case.model, case.x, layer) for value in (gradient, seen[0]))
        return _outside((weights.mean((2, 3), keepdim=True) * values).sum(1, keepdim=True), case.mask)

    return penalty


def _captum_grad_cam(layer: str) -> Loss:
    def penalty(case: Case) -> Tensor:
        method = captum.attr.LayerGradCam(case.model, case.model.get_submodule(layer))
        with _workaround(case.model):
            return _outside(method.attribute(case.x, target=case.y, grad_kwargs={"create_graph": True}), case.mask)

    return penalty


def _activation_difference(case: Case) -> Tensor:
    masked = Shuffle()(case.x, case.mask[:, None].float(), torch.Generator(case.device).manual_seed(0))
    masked = torch.where(case.mask[:, None], case.x, masked)
    clean, other = (_features(case.model, x) for x in (case.x, masked))
    distance: Tensor = (clean - other).flatten(1).norm(dim=1).mean()
    return distance


def _features(model: Any, x: Tensor) -> Tensor:
    """What enters the classifier."""
    if hasattr(model, "forward_head"):  # timm's
        features: Tensor = model.forward_head(model.forward_features(x), pre_logits=True)
        return features
    entered: list[Tensor] = []
    classifier = [layer for layer in model.modules() if isinstance(layer, (nn.Linear, nn.Conv2d))][-1]
    with classifier.register_forward_pre_hook(lambda layer, args: entered.append(args[0])):
        model(x)
    return entered[0]


def _integrated_gradients(steps: int) -> Loss:
    def penalty(case: Case) -> Tensor:
        total = torch.zeros_like(case.x)
        for step in range(steps):
            x = (case.x * (step + 0.5) / steps).requires_grad_()
            with _workaround(case.model):
                score = _score(case.model(x), case.y)
            total = total + torch.autograd.grad(score, x, create_graph=True)[0] / steps
        return _outside(total * case.x, case.mask)

    return penalty


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
    captums = [Strategy(CAPTUM, _added(_captum_grad_cam(layer)))] if _is_nchw(case, layer) else []
    return [Strategy(TODAY, _added(_grad_cam(layer))), *captums]


def _is_nchw(case: Case, layer: str) -> bool:
    """Whether Captum reads this layer as it is: it takes the second axis for channels."""
    return any(found.name == layer and found.layout == "NCHW" for found in attrreg.layers(case.model, case.x))


TODAYS: dict[str, Callable[[Case], list[Strategy]]] = {
    INPUT_GRADIENT: lambda case: [
        Strategy(DETACHED, _detached),
        Strategy(TODAY, _added(_input_gradient)),
        Strategy(CAPTUM, _added(_captum(captum.attr.Saliency, abs=False))),
        Strategy(PAPER, _contrast),
    ],
    GRAD_CAM: _grad_cams,
    ACTIVATION_DIFFERENCE: lambda case: [Strategy(TODAY, _added(_activation_difference))],
    SUM: lambda case: [Strategy(TODAY, _added(_input_gradient, _grad_cam(_layer(case)), _activation_difference))],
    INTEGRATED_GRADIENTS: lambda case: [
        Strategy(TODAY, _added(_integrated_gradients(IG_STEPS))),
        Strategy(CAPTUM, _added(_captum(captum.attr.IntegratedGradients, n_steps=IG_STEPS))),
    ],
}
