"""Numbers at the extremes, in trainings that are otherwise fine: classes masked by -inf, gradients that are NaN, images of one colour."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attrreg
from attrreg import baselines, scores
from attrreg.engines import DoubleBackward, FiniteDifference
from tests.models import SmoothNet, gradients, smooth_batch

pytestmark = pytest.mark.cpu


class Some(SmoothNet):
    """Of five classes, two are not known yet."""

    def __init__(self) -> None:
        super().__init__(classes=5)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).masked_fill(torch.arange(5) > 2, -torch.inf)


HOT = torch.tensor([[1.0, 0, 0, 0, 0], [0, 0.7, 0.3, 0, 0], [0, 0, 1, 0, 0]])


@pytest.mark.parametrize("target", [None, HOT])
def test_classes_that_are_masked(target: Tensor | None) -> None:
    model, (x, mask, _) = Some().double(), smooth_batch()
    found = []
    for engine in (DoubleBackward(), FiniteDifference(1e-4)):
        value = attrreg.InputGradient().using(engine)(model, x, mask, target)
        found.append((value.detach(), torch.cat([gradient.flatten() for gradient in gradients(model, value)])))
    torch.testing.assert_close(found[1][0], found[0][0])
    assert F.cosine_similarity(found[1][1], found[0][1], dim=0) > 0.999


def test_ablation_with_classes_that_are_masked() -> None:
    model, x = Some().double(), smooth_batch()[0]
    segments = torch.arange(x.shape[2]).view(-1, 1).expand(x.shape[2:]) // 3
    assert attrreg.captum.FeatureAblation(segments).attribute(model, x, HOT).isfinite().all()
    assert scores.MultiLabelLogit()(model(x), HOT).isfinite().all()


class Edges(nn.Module):
    """The length of a difference, at zero: harmless in training, as nothing before it is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(49, 2)

    def forward(self, x: Tensor) -> Tensor:
        down, right = x[..., 1:, 1:] - x[..., :-1, 1:], x[..., 1:, 1:] - x[..., 1:, :-1]
        logits: Tensor = self.head((down.square() + right.square()).sqrt().flatten(1))
        return logits


def test_a_gradient_that_is_nan_is_no_direction_to_stay() -> None:
    model, x, target = Edges(), torch.full((2, 1, 8, 8), 0.3), torch.tensor([0, 1])
    assert all(gradient.isfinite().all() for gradient in gradients(model, F.cross_entropy(model(x), target)))
    assert attrreg.PGDEx(epsilon=0.5)(model, x, torch.zeros(8, 8), target=target).isnan()  # not the plain loss, in silence


@pytest.mark.parametrize("fill", [baselines.Blur(), baselines.Mean()])
@pytest.mark.parametrize("detach", ["clean", "masked", None])
def test_images_of_one_colour_that_a_fill_moves_by_rounding(fill: baselines.Baseline, detach: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    x = torch.tensor([-0.4242, 0.3, 0.77, -1.3]).view(4, 1, 1, 1).expand(4, 1, 32, 32).clone()
    value = attrreg.ActivationDifference("0", fill, detach)(model, x, torch.zeros(32, 32))
    assert all(gradient.abs().max() < 1e-3 for gradient in gradients(model, value)[:2])
