"""Never a silent no-op: a penalty that could train nothing says so; one that is zero for a reason does not."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import attrreg
from attrreg import engines, objectives
from tests.models import SmoothNet, smooth_batch

x, mask, target = smooth_batch()
N = len(x)
TERM = attrreg.InputGradient()
SEGMENTS = torch.arange(8) // 4
ABLATION = attrreg.captum.FeatureAblation(SEGMENTS)


def test_a_term_without_path_to_a_parameter() -> None:
    model = SmoothNet().double()
    model.stem.requires_grad_(False)
    model.body.requires_grad_(False)
    regularizer = TERM + attrreg.ActivationDifference("stem").named("early")
    with pytest.raises(RuntimeError, match=r"early: the penalty has no path to any trainable parameter.*Unfreeze"):
        regularizer(model, x, mask, target)
    TERM(model, x, mask, target).backward()  # reaches the head
    assert model.head.weight.grad is not None and model.head.weight.grad.any()


@pytest.mark.parametrize("engine", [engines.DoubleBackward(), engines.FiniteDifference()])
@pytest.mark.parametrize("regularizer", [TERM, attrreg.GradCAM("stem"), attrreg.IntegratedGradients(steps=2)])
@pytest.mark.parametrize("attached", [False, True])
def test_a_parameter_that_nothing_reads(regularizer: attrreg.AttributionRegularizer, engine: engines.Engine, attached: bool) -> None:
    model, regularizer = SmoothNet().double().requires_grad_(False), regularizer.using(engine)
    model.unused = nn.Parameter(torch.zeros((), dtype=torch.float64))
    for images in (x, x.clone().requires_grad_()):  # images that are trained are no parameters
        for annotated in (None, torch.arange(N) > 0):  # nor are a part of them, where others need no pass
            with regularizer.attach(model) if attached else nullcontext():
                model(images)
                with pytest.raises(RuntimeError, match=r"no path to any trainable parameter, so .*Unfreeze"):
                    regularizer(model, images, mask, target, annotated=annotated)
    brightness = torch.ones((), dtype=torch.float64, requires_grad=True)  # what made the images can be trained
    regularizer(model, x * brightness, mask, target).backward()
    assert brightness.grad is not None and brightness.grad.isfinite() and brightness.grad != 0


@pytest.mark.parametrize(
    "regularizer", [attrreg.ActivationDifference(fill=attrreg.baselines.Zero()), ABLATION, attrreg.captum.ShapleyValues(SEGMENTS)]
)
def test_values_of_a_frozen_model_train_what_made_the_images(regularizer: attrreg.AttributionRegularizer) -> None:
    model, gains = SmoothNet().double().requires_grad_(False), torch.ones_like(x[:1]).requires_grad_()  # of pixels: their sum may cancel
    regularizer(model, x * gains, mask, target).backward()  # the masked images have no gradient, and so no graph
    assert gains.grad is not None and gains.grad.isfinite().all() and gains.grad.any()


def test_class_token_pooling_leaves_no_patch_gradient() -> None:
    model = timm.create_model("test_vit", img_size=32, num_classes=3)
    with torch.no_grad():
        model.head.weight.normal_()
    images, where = torch.randn(2, 3, 32, 32), torch.ones(2, 32, 32)
    with pytest.raises(RuntimeError, match=r"'norm'.*every patch token is zero.*earlier layer"):
        attrreg.GradCAM(layer="norm")(model, images, where, torch.tensor([0, 1]))
    # Left to itself, it finds the last layer whose patches the class token still reads.
    found = attrreg.GradCAM().attribute(model, images, torch.tensor([0, 1]))
    last = len(model.blocks) - 1
    torch.testing.assert_close(found, attrreg.GradCAM(f"blocks.{last}.norm1").attribute(model, images, torch.tensor([0, 1])))
    assert float(found.std()) > 0


@pytest.mark.parametrize(
    "objective",
    [objectives.LogOutside(), objectives.SquaredOutside(), objectives.AbsoluteOutside(), objectives.OutsideFraction(), objectives.Energy()],
)
def test_a_head_of_zeros_is_no_error_and_no_nan(objective: Any) -> None:
    model = SmoothNet().double()
    nn.init.zeros_(model.head.weight)
    for build in (attrreg.InputGradient, attrreg.InputXGradient, lambda **s: attrreg.GradCAM("body", **s), attrreg.IntegratedGradients):
        value = build(objective=objective)(model, x, mask, target)
        model.zero_grad()
        value.backward()
        assert float(value.detach()) == 0
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_a_batch_without_annotation_is_zero_and_connected() -> None:
    model = SmoothNet().double()
    nobody = torch.zeros(N, dtype=torch.bool)
    for reduction in ("mean", "sum", "batchmean"):
        regularizer = (TERM + attrreg.GradCAM("body") + attrreg.ActivationDifference()).reduced(reduction)
        value = regularizer(model, x, mask, target, annotated=nobody)
        model.zero_grad()
        value.backward()
        assert float(value.detach()) == 0
        for parameter in (model.stem.weight, model.body.weight, model.head.weight):
            assert parameter.grad is not None and not parameter.grad.any()


@pytest.mark.parametrize("term", [TERM, attrreg.GradCAM("body"), attrreg.ActivationDifference(), attrreg.IntegratedGradients(2)])
def test_a_weight_of_zero_is_zero_and_connected(term: attrreg.AttributionRegularizer) -> None:
    model = SmoothNet().double()
    value = (0.0 * term)(model, x, mask, target)
    value.backward()
    assert float(value.detach()) == 0
    assert model.stem.weight.grad is not None and not model.stem.weight.grad.any()


class Black(nn.Module):
    """Tokens of black images are zero, behind a class token that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.cls, self.tokens = nn.Conv2d(3, 12, 8, 8, bias=False), nn.Parameter(torch.randn(1, 1, 12)), nn.Identity()
        self.mix, self.head = nn.MultiheadAttention(12, 2, batch_first=True), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        t = self.tokens(torch.cat([self.cls.expand(len(x), -1, -1), self.embed(x).flatten(2).mT], 1))
        logits: Tensor = self.head((t + self.mix(t, t, t)[0]).mean(1))
        return logits


def test_activations_that_are_zero_are_no_gradients() -> None:
    assert not attrreg.GradCAM("tokens").attribute(Black(), torch.zeros(2, 3, 64, 64), torch.tensor([0, 1])).any()
