"""What is promised in a line, and nothing else tests: arguments that pass through, draws, labels, masks and outputs of rarer kinds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attrreg
from attrreg import baselines, objectives, schedules, scores, sites
from attrreg.engines import FiniteDifference
from attrreg.needs import Grad, Need
from attrreg.points import Quadrature
from attrreg.trace import Trace
from tests.models import SmoothNet, assert_close, gradients, smooth_batch

pytestmark = pytest.mark.cpu
x, mask, target = smooth_batch()
SOME = torch.tensor([True, False, True])


@dataclass(frozen=True, repr=False)
class Noting(attrreg.InputGradient):
    """Notes what it is called with."""

    def __call__(self, *arguments: Any, **settings: Any) -> Tensor:
        NOTED.append((arguments, settings))
        return torch.zeros(())

    def evaluate(self, *arguments: Any, **settings: Any) -> Any:
        NOTED.append((arguments, settings))
        return attrreg.Penalty(torch.zeros(()), {}, None)


NOTED: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
SETTINGS: dict[str, Any] = {
    "annotated": SOME,
    "generator": torch.Generator(),
    "output": "logits",
    "inputs": (x, None),
    "group": False,
}


def test_a_scheduled_regularizer_gets_all_that_the_call_has() -> None:
    scheduled, model = attrreg.Scheduled(Noting(), schedules.Linear(2, first=1.0)), SmoothNet()
    NOTED.clear()
    scheduled(model, x, mask, target, fraction=0.5, **SETTINGS)
    scheduled.evaluate(model, x, mask, target, **SETTINGS)
    (called, evaluated), given = NOTED, (model, x, mask, target)
    for arguments, settings in NOTED:
        assert all(one is other for one, other in zip(arguments, given, strict=True))
        assert all(settings[name] is value for name, value in SETTINGS.items())
    assert called[1].keys() - SETTINGS.keys() == {"fraction"} and called[1]["fraction"] == 0.5 and evaluated[1].keys() == SETTINGS.keys()


def test_places_are_drawn_from_a_baseline_that_draws_nothing() -> None:
    model, term = SmoothNet().double(), attrreg.ExpectedGradients(baseline=baselines.Zero())
    assert term(model, x, mask, target) != term(model, x, mask, target)


@pytest.mark.parametrize(
    "term",
    [
        attrreg.ActivationDifference(fill=baselines.Zero()),
        attrreg.PGDEx(),
        attrreg.IntegratedGradients(steps=2, baseline=baselines.Masked(baselines.Zero())),
    ],
)
def test_the_mask_of_an_image_without_annotation_is_not_read(term: attrreg.AttributionRegularizer) -> None:
    model = SmoothNet(norm=True).double()  # in which images meet
    found = []
    for filling in (torch.nan, 1.0):
        other = torch.where(SOME[:, None, None], mask, filling)
        value = term(model, x, other, target, annotated=SOME)
        found.append([value, *gradients(model, value)])
    assert_close(found[0], found[1], 1e-12)


@dataclass(frozen=True, repr=False)
class At(attrreg.SingleRegularizer):
    """The squared gradient at a site, on a path or not."""

    site: str
    path: bool = False

    def needs(self) -> tuple[Need, ...]:
        at = {"at": Quadrature(baselines.Zero(), 2, "gausslegendre", None)} if self.path else {}
        return (Grad(self.site, scores.SumLogProb(), **at),)

    def per_image(self, trace: Trace) -> Tensor:
        return trace.grad(self.site, scores.SumLogProb()).square().flatten(1).sum(1)


def test_what_cannot_be_moved_or_has_no_place_on_a_path_is_refused() -> None:
    model = SmoothNet().double()
    for site in (sites.OUTPUT, sites.FEATURES):
        with pytest.raises(ValueError, match="Finite differences move images and what layers give"):
            At(site).using(FiniteDifference())(model, x, mask)
    with pytest.raises(ValueError, match=r"At: on a path only the gradient at the input can be taken"):
        At("body", path=True)(model, x, mask)


def test_needs_are_no_generator() -> None:
    class Yields(At):
        def needs(self) -> Any:
            yield from super().needs()

    with pytest.raises(TypeError, match=r"needs\(\) gave a generator, but gives a tuple of needs"):
        Yields("body")(SmoothNet().double(), x, mask)


def test_labels_get_no_gradient() -> None:
    soft = torch.rand(3, 3, dtype=torch.float64, requires_grad=True)
    attrreg.InputGradient()(SmoothNet().double(), x, mask, soft.softmax(1)).backward()
    assert soft.grad is None


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int16])
def test_labels_of_small_integers(dtype: torch.dtype) -> None:
    model = SmoothNet().double()
    torch.testing.assert_close(attrreg.InputGradient()(model, x, mask, target.to(dtype)), attrreg.InputGradient()(model, x, mask, target))


def test_labels_that_are_nan_are_refused() -> None:
    hot = torch.eye(3)[target]
    hot[1, 0] = torch.nan
    with pytest.raises(ValueError, match="target"):
        attrreg.InputGradient()(SmoothNet().double(), x, mask, hot)


def test_scores_that_need_no_target_leave_that_of_others_alone() -> None:
    model, soft = SmoothNet().double(), torch.rand(3, 7, dtype=torch.float64)
    for score in (scores.SumLogProb(), scores.RandomProjection()):
        assert attrreg.InputGradient(score)(model, x, mask, soft).isfinite()
    assert attrreg.InputGradient(scores.PredictedLogit())(model, x, mask, target + 5).isfinite()


@pytest.mark.parametrize("value", [1e-9, -1e-9])
def test_a_mask_that_is_empty_but_for_rounding_is_empty(value: float) -> None:
    soft = mask.float()
    soft[1] = value
    with pytest.raises(ValueError, match="mask of image 1 has no relevant pixel"):
        attrreg.InputGradient(objective=objectives.OutsideFraction())(SmoothNet(), x.float(), soft, target)


class Registers(nn.Module):
    """Five tokens before the patches, which nothing declares."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.block, self.head = (
            nn.Conv2d(2, 6, 2, 2),
            nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6), nn.Tanh()),
            nn.Linear(6, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x).flatten(2).transpose(1, 2)
        tokens = self.block(torch.cat([tokens.mean(1, keepdim=True).expand(-1, 5, -1), tokens], 1))
        logits: Tensor = self.head(tokens.mean(1))
        return logits


def test_five_tokens_before_the_patches() -> None:
    model, images = Registers().double(), torch.rand(2, 2, 12, 12, dtype=torch.float64)
    phi = attrreg.GradCAM("block").attribute(model, images, torch.tensor([0, 1]))
    assert phi.shape == (2, 1, 6, 6)
    torch.testing.assert_close(attrreg.GradCAM().attribute(model, images, torch.tensor([0, 1])), phi)


def test_what_pooling_keeps_is_no_map() -> None:
    assert sites.layout(torch.rand(2, 1, 1, 5), nn.Linear(5, 5), torch.rand(2, 3, 8, 8), "") is None


def meeting(logits: Tensor) -> Tensor:
    mean = logits.mean(0).detach()
    return logits - mean + mean.tanh()


def test_what_one_output_shows_is_not_believed_of_another() -> None:
    model, (images, masks, labels), some = SmoothNet().double(), smooth_batch(6), torch.arange(6) % 2 == 0
    term = attrreg.InputGradient(scores.SumLogProb(), objectives.SquaredOutside())
    for output in (None, None, meeting):
        whole = term.evaluate(model, images, masks, labels, annotated=some, output=output).total
        torch.testing.assert_close(term(model, images, masks, labels, annotated=some, output=output), whole, rtol=1e-12, atol=0)
