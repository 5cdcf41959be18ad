"""What declared objects are: compared, printed, checked when they are made; and what they give is not their own memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

import attrreg
from attrreg import baselines, metrics, schedules, scores
from attrreg.regularizer import Sum, Term
from tests.models import SmoothNet, smooth_batch

pytestmark = pytest.mark.cpu
NAME: Any = numpy.str_("layer4")
YES: Any = numpy.bool_(True)


@pytest.mark.parametrize(
    "regularizer",
    [
        attrreg.PGDEx(bounds=(0.0, math.inf)),
        attrreg.GradCAM(NAME, relu=YES),
        attrreg.ActivationDifference([NAME, "layer3"]),
        attrreg.InputGradient().named(NAME).reduced(numpy.str_("sum")),  # type: ignore[arg-type]
        attrreg.IntegratedGradients(rule=numpy.str_("riemann_middle")),
    ],
)
def test_settings_of_other_kinds_are_printed_so_that_they_can_be_rebuilt(regularizer: Any) -> None:
    assert eval(repr(regularizer), {"attrreg": attrreg}) == regularizer


def test_a_method_of_an_object_is_not_printed_as_if_it_could_be_imported() -> None:
    class Judge:
        def share(self, map: Tensor, mask: Tensor) -> Tensor:
            return map.sum((1, 2, 3))

    assert "bound method" in repr(attrreg.InputGradient(objective=Judge().share))


ENERGY: Any = attrreg.objectives.Energy()
FLAGS: dict[str, Callable[[], Any]] = {
    "relu": lambda: attrreg.GradCAM("layer4", scores.TargetLogit(), ENERGY),  # type: ignore[arg-type]
    "absolute": lambda: attrreg.InputGradient(absolute="False"),  # type: ignore[arg-type]
    "multiply": lambda: attrreg.captum.LayerGradientXActivation("layer4", scores.TargetLogit()),  # type: ignore[arg-type]
    "signed": lambda: metrics.PointingGame(1, "yes"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("name", FLAGS)
def test_what_is_no_truth_value_is_refused(name: str) -> None:
    with pytest.raises(TypeError, match=rf"{name} must be True or False, got .*other settings go by name"):
        FLAGS[name]()


@pytest.mark.parametrize("tolerance", [-1, "15", 1.5])
def test_a_tolerance_is_checked_when_it_is_given(tolerance: Any) -> None:
    with pytest.raises(ValueError, match="tolerance must be an integer of at least 0"):
        metrics.PointingGame(tolerance)


def test_a_reduction_is_checked_in_every_term() -> None:
    with pytest.raises(ValueError, match=r"unknown reduction 'average' of a.*Use one of 'mean', 'sum', 'batchmean'"):
        Sum((Term(attrreg.InputGradient(), "a", reduction="average"),))  # type: ignore[arg-type]


class Negative(baselines.Fixed):
    """The image's negative."""

    def __call__(self, x: Tensor, mask: Tensor | None, generator: torch.Generator) -> Tensor:
        return -super().__call__(x, mask, generator)


def test_a_kind_of_image_of_ones_own_is_another_baseline() -> None:
    x, mask, _ = smooth_batch()
    image, model = torch.rand(2, *x.shape[2:], dtype=torch.float64), SmoothNet().double()
    assert baselines.Fixed(image) != Negative(image) == Negative(image)
    plain, other = (attrreg.ActivationDifference("stem", kind(image)) for kind in (baselines.Fixed, Negative))
    terms = (plain + other.named("negative")).evaluate(model, x, mask).terms
    torch.testing.assert_close(terms["negative"], other(model, x, mask).detach())


def test_what_a_fixed_image_gives_may_be_written_into() -> None:
    image = torch.rand(2, 2, 4, 4)
    fixed = baselines.Fixed(image)
    fixed(image, None, torch.Generator()).zero_()
    assert torch.equal(fixed.image, image)


def test_a_wrong_state_is_not_printed_whole() -> None:
    scheduled = attrreg.Scheduled(attrreg.InputGradient(), schedules.Every(2))
    with pytest.raises(ValueError) as raised:
        scheduled.load_state_dict({"model": torch.zeros(1000).tolist()})  # type: ignore[dict-item]
    assert len(str(raised.value)) < 300


def test_numbers_beyond_all_floats_are_refused() -> None:
    with pytest.raises((TypeError, ValueError), match="epsilon"):
        attrreg.PGDEx(epsilon=10**400)
