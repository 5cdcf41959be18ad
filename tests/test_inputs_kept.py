"""Parts of a user's own must leave alone what they are given: it is the model's, the loop's or another term's."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import attrreg
from attrreg import baselines, metrics, scores
from attrreg.transforms import ReplaceOutside
from tests.models import SmoothNet, smooth_batch


@dataclass(frozen=True, repr=False)
class Cooled(scores.Score):
    def __call__(self, value: Tensor, target: Tensor | None) -> Tensor:
        return value.div_(10).sum(1)


@dataclass(frozen=True, repr=False)
class Relabelled(scores.TargetLogit):
    def __call__(self, value: Tensor, target: Tensor | None) -> Tensor:
        assert target is not None
        target[target == 2] = 0
        return super().__call__(value, target)


@dataclass(frozen=True, repr=False)
class Emptied(baselines.Baseline):
    def __call__(self, x: Tensor, mask: Tensor | None, generator: torch.Generator) -> Tensor:
        return x.zero_()


@pytest.mark.parametrize(
    ("regularizer", "message"),
    [
        (attrreg.InputGradient(score=Cooled()), "Cooled.* writes into the value"),
        (attrreg.InputGradient(score=Relabelled()), "Relabelled.* writes into the value or the target"),
        (attrreg.IntegratedGradients(3, chunk=None, score=Relabelled()), "Relabelled.* writes into the value or the target"),
        (attrreg.ActivationDifference(fill=Emptied()), "Emptied.* writes into the images"),
        (attrreg.IntegratedGradients(baseline=Emptied()), "Emptied.* writes into the images"),
    ],
)
def test_own_parts_that_write_into_what_they_are_given(regularizer: attrreg.AttributionRegularizer, message: str) -> None:
    model, (x, mask, target) = SmoothNet().double(), smooth_batch()
    before, annotated = x.clone(), torch.tensor([True, True, False])
    for flags in (None, annotated):
        with pytest.raises(ValueError, match=message):
            regularizer(model, x, mask, target, annotated=flags)
        assert torch.equal(x, before)
    with pytest.raises(ValueError, match=message):
        regularizer(model, x.detach(), mask, target)


def test_a_fill_of_a_transform_that_writes_into_what_it_is_given() -> None:
    x, mask = torch.ones(2, 3, 8, 8), torch.ones(8, 8)
    with pytest.raises(ValueError, match=r"Emptied.* writes into the images.*Let it write into a copy"):
        ReplaceOutside(Emptied())(x, mask)
    assert (x == 1).all()


def test_a_fill_of_a_judge_that_writes_into_what_it_is_given() -> None:
    x, target = torch.ones(2, 1, 8, 8), torch.tensor([3, 9])
    with pytest.raises(ValueError, match=r"Emptied.* writes into the images.*Let it write into a copy"):
        metrics.Occlusion(window=4, stride=4, fill=Emptied())(nn.Flatten(), x, target)
    assert (x == 1).all()
