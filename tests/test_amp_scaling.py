"""The inner gradient in float16: it neither underflows nor overflows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attrreg
from attrreg import engines, objectives, scores
from tests.models import DEVICE, SmoothNet, batch, flat, gradients, smooth_batch


def relative_error(model: nn.Module, regularizer: Any, x: Tensor, target: Tensor) -> float:
    """Of the map in float16 against the one in float32."""
    exact = regularizer.attribute(model, x, target)
    with torch.autocast(DEVICE, torch.float16):
        found = regularizer.attribute(model, x, target)
    assert found.dtype == torch.float32 and exact.any()
    return float((found - exact).norm() / exact.norm())


@pytest.mark.parametrize("factor", [1e-9, 1e9])
def test_scores_of_any_size_survive_float16(factor: float) -> None:
    model, (x, _, target) = SmoothNet(), batch(3, channels=2, size=8, classes=3)
    loss = scores.TaskLoss(lambda logits, target: factor * F.cross_entropy(logits, target, reduction="none"))
    assert relative_error(model, attrreg.InputGradient(score=loss), x, target) < 0.01


def test_a_confident_model_keeps_its_gradients() -> None:
    model, (x, _, target) = SmoothNet(), batch(3, channels=2, size=8, classes=3)
    target[:] = 1
    with torch.no_grad():
        model.head.bias[1] += 19  # the loss's gradient at the logits is near 1e-8: float16 ends at 6e-8
    assert relative_error(model, attrreg.InputGradient(score=scores.TaskLoss()), x, target) < 0.01


@pytest.mark.parametrize("part", ["the whole", "all but the head", "attribute", "finite differences"])
def test_an_autocast_inside_the_model_keeps_small_gradients(part: str) -> None:
    class Inside(SmoothNet):
        """As Accelerate and `@torch.autocast` make a forward: it computes in float16, and returns float32."""

        inside = False

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast(DEVICE, torch.float16, enabled=self.inside):
                features = F.silu(self.body(self.act(self.stem(x)))).mean(dim=(2, 3))
                logits = features if part == "all but the head" else self.head(features)
            return self.head(logits.float()) if part == "all but the head" else logits.float()

    model, (x, mask, target) = Inside(), batch(3, channels=2, size=8, classes=3)
    target[:] = 1
    with torch.no_grad():
        model.head.bias[1] += 19  # the loss's gradient at the logits is near 1e-8: float16 ends at 6e-8
    term = 1e8 * attrreg.InputGradient(score=scores.TaskLoss(), objective=objectives.AbsoluteOutside())
    if part == "finite differences":
        term = term.using(engines.FiniteDifference())
    found = []
    for model.inside in (False, True):
        if part == "attribute":
            found.append(1e8 * term.attribute(model, x, target))
            continue
        value = term(model, x, mask, target)
        found.append(value.detach()[None] if part == "finite differences" else flat([value.detach(), *gradients(model, value)]))
    assert found[0].any()
    assert float((found[1] - found[0]).norm() / found[0].norm()) < 0.02


def test_gradients_that_grow_on_their_way_survive_float16() -> None:
    convolutions = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
    model = nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    with torch.no_grad():
        for layer, factor in zip(convolutions, (1e-3, 300.0, 3e4), strict=True):
            layer.weight.mul_(factor)
    x, _, target = batch(3, channels=2, size=8, classes=3)
    features = convolutions[0](x).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(model[1:](features).gather(1, target[:, None]).sum(), features)
    assert 16 * float(gradient.abs().amax()) > torch.finfo(torch.float16).max  # scaled as usual
    assert relative_error(model, attrreg.InputGradient(), x, target) < 0.01


def test_float16_has_no_infinite_scale() -> None:
    class Saturated(SmoothNet):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 0.01 + torch.tensor([95.0, 0.0, 0.0], dtype=x.dtype)

    model, (x, mask, target) = Saturated().half(), smooth_batch()
    value = attrreg.InputGradient(score=scores.TargetLogProb())(model, x.half(), mask, torch.zeros_like(target))
    assert value.isfinite()


def test_distances_of_half_activations_survive_float16() -> None:
    model, (x, mask, _) = SmoothNet(), batch(3, channels=2, size=24)
    with torch.no_grad():
        model.stem.weight.mul_(3000)
    value = attrreg.ActivationDifference("stem")(model.half(), x.half(), mask)
    assert value.dtype == torch.float32 and torch.finfo(torch.float16).max < value < torch.inf
