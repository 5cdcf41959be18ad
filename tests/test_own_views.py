"""Passes on other images than the clean ones, as terms of the user's own ask for them; and sites that are no layers."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import timm
import torch
from torch import Tensor, nn

import attrreg
from attrreg import baselines, masks, objectives, scores, sites
from attrreg.baselines import Baseline
from attrreg.captum import FeatureAblation
from attrreg.needs import Grad, Need, Value
from attrreg.objectives import LogOutside, Objective
from attrreg.points import CLEAN, At, Point, Quadrature, RandomPlaces
from attrreg.scores import ByTarget, Score, TargetLogit
from attrreg.trace import Trace
from tests.models import SmoothNet, smooth_batch
from tests.test_own_points import Half

LAYER = "blocks.0"


@dataclass(frozen=True, repr=False)
class Turned(Baseline):
    """Images on their side."""

    def __call__(self, x: Tensor, mask: Tensor | None, generator: torch.Generator) -> Tensor:
        return x.transpose(2, 3)


@dataclass(frozen=True, repr=False)
class Cams(attrreg.SingleRegularizer):
    """Grad-CAM of the images, and of views of them, which count nothing."""

    def needs(self) -> tuple[Need, ...]:
        return tuple(need for at in (CLEAN, At(Half())) for need in (Value(sites.SPATIAL, at), Grad(sites.SPATIAL, TargetLogit(), at)))

    def per_image(self, trace: Trace) -> Tensor:
        return self._size(trace, CLEAN) + 0 * self._size(trace, At(Half()))

    def _size(self, trace: Trace, at: Point) -> Tensor:
        weights = trace.grad(sites.SPATIAL, TargetLogit(), at).mean((2, 3), keepdim=True)
        return (weights * trace.value(sites.SPATIAL, at)).sum(1).square().mean((1, 2))


def test_the_layer_that_auto_is_on_a_view_is_not_that_of_the_images() -> None:
    torch.manual_seed(0)
    stages = [part for width in (3, 6, 6, 6) for part in (nn.Conv2d(width, 6, 3, 2, 1), nn.Tanh())]
    model = nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)).double()
    x, y, mask = torch.rand(2, 3, 32, 32).double(), torch.tensor([0, 1]), torch.zeros(32, 32, dtype=torch.bool)
    squared = attrreg.GradCAM(score=TargetLogit(), objective=lambda map, mask: map.square().mean((1, 2, 3)))
    want = squared(copy.deepcopy(model), x, mask, y)  # another model, of which nothing is known yet
    for _ in range(3):
        torch.testing.assert_close(Cams()(model, x, mask, y), want)


@dataclass(frozen=True, repr=False)
class Tokens(attrreg.MapRegularizer):
    """The tokens of views."""

    score: Score = ByTarget()
    objective: Objective = LogOutside()

    def needs(self) -> tuple[Need, ...]:
        return (Value(LAYER, At(Turned())),)

    def attribution(self, trace: Trace) -> Tensor:
        return trace.grid(LAYER, trace.value(LAYER, At(Turned())), At(Turned()))


def test_tokens_of_a_view_lie_as_the_view_does() -> None:
    torch.manual_seed(0)
    model: Any = timm.create_model("test_vit", num_classes=2, img_size=160, dynamic_img_size=True).eval()
    x, seen = torch.rand(2, 3, 80, 160), []
    with model.get_submodule(LAYER).register_forward_hook(lambda layer, args, output: seen.append(output)), torch.no_grad():
        model(x.transpose(2, 3))
    want = seen[0][:, model.num_prefix_tokens :].transpose(1, 2).reshape(2, -1, 10, 5)
    torch.testing.assert_close(Tokens().attribute(model, x), want)


@dataclass(frozen=True, repr=False)
class Slope(attrreg.SingleRegularizer):
    """The squared length of the target logit's gradient."""

    site: str

    def needs(self) -> tuple[Need, ...]:
        return (Grad(self.site, TargetLogit()),)

    def per_image(self, trace: Trace) -> Tensor:
        return trace.grad(self.site, TargetLogit()).square().flatten(1).sum(1)


def test_a_gradient_at_the_features_of_a_frozen_backbone() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head := nn.Linear(6, 3)).double()
    model[:4].requires_grad_(False)  # a linear probe
    x, mask, target = smooth_batch()
    want = head.weight[target].square().sum(1).mean()
    for site in ("3", sites.FEATURES):
        torch.testing.assert_close(Slope(site)(model, x, mask, target), want)


def test_a_map_of_the_features_or_of_the_logits() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.Tanh(), nn.Conv2d(6, 4, 1)).double()
    x, _, _ = smooth_batch()
    labels = torch.randint(4, (len(x), *x.shape[2:]))
    for site, layer in ((sites.FEATURES, "1"), (sites.OUTPUT, "2")):
        by_site, by_name = (
            attrreg.GradCAM(layer=where, score=scores.SegmentationLogit()).attribute(model, x, labels) for where in (site, layer)
        )
        torch.testing.assert_close(by_site, by_name)


@dataclass(frozen=True, repr=False)
class Grey(Baseline):
    """Of another type than the images."""

    def __call__(self, x: Tensor, mask: Tensor | None, generator: torch.Generator) -> Tensor:
        return torch.full(x.shape, 0.5, dtype=torch.float64)


def test_a_baseline_may_be_of_another_type() -> None:
    x, mask, target = smooth_batch()
    x, model = x.float(), SmoothNet()
    for own, usual in (
        (attrreg.IntegratedGradients(baseline=Grey()), attrreg.IntegratedGradients(baseline=0.5)),
        (attrreg.ActivationDifference(fill=Grey()), attrreg.ActivationDifference(fill=0.5)),
    ):
        torch.testing.assert_close(own(model, x, mask, target), usual(model, x, mask, target))


def test_paths_take_what_regularizers_take() -> None:
    image = torch.zeros(3, 1, 1)
    for take in (lambda given: Quadrature(given, 3, "gausslegendre", 1), lambda given: RandomPlaces(given, 2, None)):
        assert take(0.5) == take(baselines.Fixed(torch.tensor(0.5, dtype=torch.float64))) and take(image) == take(baselines.Fixed(image))
        with pytest.raises(TypeError, match="baseline must be"):
            take("zero")


@dataclass(frozen=True, repr=False)
class MeanOf(Baseline):
    """The mean of what several baselines give."""

    parts: tuple[Baseline, ...]

    def __call__(self, x: Tensor, mask: Tensor | None, generator: torch.Generator) -> Tensor:
        return torch.stack([part(x, mask, generator) for part in self.parts]).mean(0)


@dataclass(frozen=True, repr=False)
class Drawn(MeanOf):
    """As that, of some that draw."""

    draws: ClassVar[bool] = True


def test_a_fraction_looks_into_baselines_that_are_made_of_several() -> None:
    x, mask, target = smooth_batch(5)
    mixed = attrreg.IntegratedGradients(baseline=Drawn((baselines.Zero(), baselines.OtherImage())))
    with pytest.raises(ValueError, match="OtherImage"):
        mixed(SmoothNet().double(), x, mask, target, fraction=0.5)
    plain = attrreg.IntegratedGradients(baseline=MeanOf((baselines.Zero(), baselines.Mean())))
    assert plain(SmoothNet().double(), x, mask, target, fraction=0.5).isfinite()


@dataclass(frozen=True, repr=False)
class Background(Baseline):
    """One colour everywhere: the mean of the irrelevant pixels."""

    needs_mask: ClassVar[bool] = True

    def __call__(self, x: Tensor, mask: Tensor | None, generator: torch.Generator) -> Tensor:
        assert mask is not None
        outside = 1 - masks.resize(mask, x.shape[-2:]).to(x.dtype)
        return ((x * outside).sum((2, 3), keepdim=True) / outside.sum((2, 3), keepdim=True)).expand_as(x)


@dataclass(frozen=True, repr=False)
class Blanked(Background):
    """The image, blank outside the mask."""

    def __call__(self, x: Tensor, mask: Tensor | None, generator: torch.Generator) -> Tensor:
        assert mask is not None
        return torch.where(masks.resize(mask, x.shape[-2:]) > 0, x, 0.5)


def test_a_share_is_refused_only_where_it_is_constant() -> None:
    x, mask, target = smooth_batch()
    for share in (objectives.OutsideFraction(), objectives.Energy()):
        regularizer = attrreg.IntegratedGradients(steps=2, baseline=Background(), objective=share)
        assert 0 < regularizer(SmoothNet().double(), x, mask, target) < 1
        for baseline in (baselines.Masked(), baselines.Shuffle(), Blanked()):
            with pytest.raises(ValueError, match="only irrelevant pixels change"):
                attrreg.IntegratedGradients(baseline=baseline, objective=share)
        with pytest.raises(ValueError, match="only irrelevant pixels change"):
            FeatureAblation(torch.arange(64).view(8, 8) // 8, baselines.Masked(), objective=share)
