"""What people write today: penalties without attrreg."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import captum.attr
import torch
import torch.nn.functional as F
from captum._utils.common import _run_forward
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from attrreg import sites
from attrreg.baselines import Shuffle
from attrreg.bench.cases import Case

Loss = Callable[[Case], Tensor]


class _Differentiable(TorchFunctionMode):
    """Replaces the activation that PyTorch cannot differentiate twice, as users without attrreg have to."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.hardsigmoid:
            return F.relu6(args[0] + 3) / 6
        return func(*args, **(kwargs or {}))


@contextmanager
def _workaround(model: nn.Module) -> Iterator[None]:
    """What it takes to differentiate a model twice without attrreg."""
    hard = any("hardsigmoid" in type(module).__name__.lower() for module in model.modules())
    with sdpa_kernel(SDPBackend.MATH), _Differentiable() if hard else nullcontext():
        yield


def cross_entropy(case: Case, logits: Tensor) -> Tensor:
    """The loss without a penalty."""
    return F.cross_entropy(logits, case.y)


def _score(logits: Tensor, y: Tensor) -> Tensor:
    return logits.gather(1, y[:, None]).sum()


def _outside(map: Tensor, mask: Tensor) -> Tensor:
    """The squared map outside the mask, as `objectives.SquaredOutside`."""
    irrelevant = 1 - F.adaptive_avg_pool2d(mask[:, None].float(), (map.shape[-2], map.shape[-1]))
    return (irrelevant * map.float()).square().flatten(1).sum(1).mean()


def added(*penalties: Loss) -> Loss:
    """Penalties with forwards of their own, added to the loss."""
    return lambda case: torch.stack([cross_entropy(case, case.model(case.x)), *(penalty(case) for penalty in penalties)]).sum()


def detached(case: Case) -> Tensor:
    """The loss with an input gradient that trains nothing."""
    x = case.x.clone().requires_grad_()
    logits = case.model(x)
    (gradient,) = torch.autograd.grad(_score(logits, case.y), x, retain_graph=True)
    return cross_entropy(case, logits) + _outside(gradient, case.mask)


def input_gradient(case: Case) -> Tensor:
    """On a forward of its own, as all penalties here but `by_hand`'s."""
    x = case.x.clone().requires_grad_()
    with _workaround(case.model):
        score = _score(case.model(x), case.y)
    (gradient,) = torch.autograd.grad(score, x, create_graph=True)
    return _outside(gradient, case.mask)


def contrast(case: Case) -> Tensor:
    """The loss as the code of arXiv 1910.00199 computes it, with the best other class for its second class."""
    x = case.x.clone().requires_grad_()
    with _workaround(case.model):
        logits = case.model(x)
    true = logits.gather(1, case.y[:, None]).squeeze(1)
    other = logits.scatter(1, case.y[:, None], -torch.inf).amax(1)
    (gradient,) = torch.autograd.grad((true - other).abs().sum(), x, create_graph=True)
    return cross_entropy(case, logits) + (gradient * ~case.mask[:, None]).abs().sum()


def gradients_with_graph(forward_fn: Any, inputs: Any, target_ind: Any = None, additional_forward_args: Any = None) -> Any:
    """Captum's `gradient_func`, with `create_graph`."""
    with torch.enable_grad():
        outputs = _run_forward(forward_fn, inputs, target_ind, additional_forward_args)
        return torch.autograd.grad(torch.unbind(outputs), inputs, create_graph=True)


def through_captum(method: Any, **settings: Any) -> Loss:
    """A gradient method of Captum's, with a `gradient_func` that keeps the graph."""

    def penalty(case: Case) -> Tensor:
        attribution = method(case.model)
        attribution.gradient_func = gradients_with_graph
        with _workaround(case.model):
            return _outside(attribution.attribute(case.x.clone().requires_grad_(), target=case.y, **settings), case.mask)

    return penalty


def grad_cam(layer: str) -> Loss:
    """Without ReLU, from a hook on the layer."""

    def penalty(case: Case) -> Tensor:
        with _keeping(case.model, layer) as seen, _workaround(case.model):
            score = _score(case.model(case.x), case.y)
        (gradient,) = torch.autograd.grad(score, seen[0], create_graph=True)
        return _outside(_cam(case, layer, seen[0], gradient), case.mask)

    return penalty


@contextmanager
def _keeping(model: nn.Module, layer: str) -> Iterator[list[Tensor]]:
    """What a layer returns."""
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        seen.append(output)
        return output.clone()  # what follows may work in place

    with model.get_submodule(layer).register_forward_hook(keep):
        yield seen


def _cam(case: Case, layer: str, values: Tensor, gradient: Tensor) -> Tensor:
    weights, values = (sites.to_grid(value, case.model, case.x, layer) for value in (gradient, values))
    return (weights.mean((2, 3), keepdim=True) * values).sum(1, keepdim=True)


def captum_grad_cam(layer: str) -> Loss:
    """Captum's, with `grad_kwargs` that keep the graph."""

    def penalty(case: Case) -> Tensor:
        method = captum.attr.LayerGradCam(case.model, case.model.get_submodule(layer))
        with _workaround(case.model):
            return _outside(method.attribute(case.x, target=case.y, grad_kwargs={"create_graph": True}), case.mask)

    return penalty


def activation_difference(case: Case) -> Tensor:
    """Of the features that enter the classifier, between the images and those with shuffled pixels outside the mask."""
    with _features(case.model) as features:
        for x in (case.x, _masked(case)):
            case.model(x)
    return _distance(*features)


def _masked(case: Case) -> Tensor:
    shuffled = Shuffle()(case.x, case.mask[:, None].float(), torch.Generator(case.device).manual_seed(0))
    return torch.where(case.mask[:, None], case.x, shuffled)


def _distance(clean: Tensor, other: Tensor) -> Tensor:
    distance: Tensor = (clean - other).flatten(1).norm(dim=1).mean()
    return distance


@contextmanager
def _features(model: nn.Module) -> Iterator[list[Tensor]]:
    """What enters the classifier."""
    entered: list[Tensor] = []
    classifier = [layer for layer in model.modules() if isinstance(layer, (nn.Linear, nn.Conv2d))][-1]
    with classifier.register_forward_pre_hook(lambda layer, args: entered.append(args[0])):
        yield entered


def by_hand(*, gradient: bool = False, layer: str | None = None, difference: bool = False) -> Loss:
    """The same penalties on the loop's own forward, with one gradient for all maps: more work to write, and what attrreg does attached."""

    def loss(case: Case) -> Tensor:
        x = case.x.clone().requires_grad_(gradient)
        kept: AbstractContextManager[list[Tensor]] = nullcontext([]) if layer is None else _keeping(case.model, layer)
        twice: AbstractContextManager[None] = _workaround(case.model) if gradient or layer is not None else nullcontext()
        with _features(case.model) as features:
            with kept as seen, twice:
                logits = case.model(x)
            total = cross_entropy(case, logits)
            if gradient or layer is not None:
                found = list(torch.autograd.grad(_score(logits, case.y), [x, *seen] if gradient else seen, create_graph=True))
                if layer is not None:
                    total = total + _outside(_cam(case, layer, seen[0], found.pop()), case.mask)
                for of_input in found:
                    total = total + _outside(of_input, case.mask)
            if difference:
                case.model(_masked(case))
                total = total + _distance(*features)
        return total

    return loss


def integrated_gradients(steps: int) -> Loss:
    """From zero, a forward a step."""

    def penalty(case: Case) -> Tensor:
        total = torch.zeros_like(case.x)
        for step in range(steps):
            x = (case.x * (step + 0.5) / steps).requires_grad_()
            with _workaround(case.model):
                score = _score(case.model(x), case.y)
            total = total + torch.autograd.grad(score, x, create_graph=True)[0] / steps
        return _outside(total * case.x, case.mask)

    return penalty
