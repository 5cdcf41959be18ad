"""Objectives, scores, baselines and sites by themselves."""

from __future__ import annotations

import math
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import attrreg
from attrreg import baselines, objectives, presets, scores, sites
from attrreg.transforms import ReplaceOutside
from tests import oracles
from tests.models import DEVICE, SmoothNet, assert_close, gradients, smooth_batch

GENERATOR = torch.Generator(DEVICE)


OUTSIDE: list[objectives.Objective] = [
    *(objectives.LogOutside(), objectives.SquaredOutside(), objectives.AbsoluteOutside(), objectives.NetOutside()),
    *(objectives.OutsideFraction(), objectives.Energy()),
]


@pytest.mark.parametrize("objective", OUTSIDE)
def test_objectives_survive_zero_maps(objective: Any) -> None:
    map = torch.zeros(2, 3, 4, 4, requires_grad=True)
    value = objective(map, torch.ones(2, 1, 4, 4).triu())
    (gradient,) = torch.autograd.grad(value.sum(), map)
    assert not value.any() and gradient.isfinite().all()


def test_shares_are_scale_free() -> None:
    map, mask = torch.randn(3, 2, 5, 5), torch.rand(3, 1, 5, 5)
    for share in (objectives.OutsideFraction(), objectives.Energy()):
        value = share(map, mask)
        torch.testing.assert_close(share(1000 * map, mask), value)
        assert ((value >= 0) & (value <= 1)).all()


def test_the_default_objective_is_relative_where_large_and_fades_where_small() -> None:
    map, mask = torch.randn(3, 2, 5, 5, dtype=torch.float64), torch.zeros(3, 1, 5, 5)
    value = objectives.LogOutside()
    gained = value(1e6 * map, mask) - value(1e3 * map, mask)
    torch.testing.assert_close(gained, torch.full_like(gained, 2 * math.log(1e3)), rtol=1e-5, atol=0)
    torch.testing.assert_close(value(2e-6 * map, mask), 4 * value(1e-6 * map, mask))


@pytest.mark.cpu  # to the last bit, which cuDNN does not promise
def test_the_default_score_is_the_contrast_and_a_shown_map_captums() -> None:
    model, (x, mask, target) = SmoothNet().double(), smooth_batch()
    term = attrreg.InputGradient()
    assert torch.equal(term(model, x, mask, target), attrreg.InputGradient(scores.Contrast())(model, x, mask, target))
    assert torch.equal(term(model, x, mask), attrreg.InputGradient(scores.SumLogProb())(model, x, mask))
    logit = attrreg.InputGradient(scores.TargetLogit())
    assert torch.equal(term.attribute(model, x, target), logit.attribute(model, x, target))
    as_captum = attrreg.InputGradient(scores.ByTarget(contrast=False))
    assert torch.equal(as_captum(model, x, mask, target), logit(model, x, mask, target))


def test_energy_without_positive_attribution_still_has_a_gradient() -> None:
    map = -torch.rand(2, 1, 4, 4)
    map[1] *= -1
    map.requires_grad_()
    mask = torch.zeros(2, 1, 4, 4)
    mask[..., 0] = 1
    value = objectives.Energy()(map, mask)
    torch.testing.assert_close(value, oracles.energy(map, mask))
    (gradient,) = torch.autograd.grad(value.sum(), map)
    assert gradient[0].any() and gradient[1].any()


@given(st.integers(1, 3), st.integers(1, 7), st.integers(1, 7), st.integers(0, 2**31))
@settings(deadline=None, max_examples=50)
def test_shuffle_permutes_whole_pixels_outside_only(channels: int, height: int, width: int, seed: int) -> None:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    x = torch.arange(2 * channels * height * width, dtype=torch.float32).reshape(2, channels, height, width)
    mask = (torch.rand(2, 1, height, width, generator=generator) > 0.5).float()
    shuffled = baselines.Shuffle()(x, mask, generator)
    inside = mask.bool().expand_as(x)
    assert torch.equal(shuffled[inside], x[inside])
    for image, other in zip(x, shuffled, strict=True):
        assert sorted(map(tuple, image.flatten(1).T.tolist())) == sorted(map(tuple, other.flatten(1).T.tolist()))


def test_shuffle_is_uniform() -> None:
    """Each outside pixel lands on each outside place equally often."""
    x = torch.arange(4.0).reshape(1, 1, 2, 2).expand(3000, 1, 2, 2)
    mask = torch.tensor([[0.0, 1.0], [0.0, 0.0]]).expand(3000, 1, 2, 2)
    landed = baselines.Shuffle()(x, mask, torch.Generator(DEVICE).manual_seed(0))[:, 0]
    assert (landed[:, 0, 1] == 1).all()
    for place in (landed[:, 0, 0], landed[:, 1, 0], landed[:, 1, 1]):
        for value in (0, 2, 3):
            assert 900 < int((place == value).sum()) < 1100  # 1000 expected, standard deviation 26


def test_fills() -> None:
    x, mask = torch.randn(4, 3, 8, 8), torch.zeros(4, 1, 8, 8)
    mask[..., :4] = 1
    kept = mask.bool().expand_as(x)
    for fill in (
        baselines.Zero(),
        baselines.Mean(),
        baselines.Blur(1.5),
        baselines.Noise(2.0),
        baselines.Shuffle(),
        baselines.OtherImage(),
    ):
        image = baselines.Masked(fill)(x, mask, torch.Generator(DEVICE).manual_seed(0))
        assert torch.equal(image[kept], x[kept])
        assert not torch.equal(image[~kept], x[~kept])
    assert not baselines.Masked(baselines.Zero())(x, mask, GENERATOR)[~kept].any()
    torch.testing.assert_close(baselines.Mean()(x, None, GENERATOR)[0, 1, 3, 3], x[0, 1].mean())
    torch.testing.assert_close(baselines.Blur(50.0)(torch.ones_like(x), None, GENERATOR), torch.ones_like(x))
    drawn = baselines.Noise(3.0, 1.0)(torch.zeros(4, 3, 64, 64), None, torch.Generator(DEVICE).manual_seed(0))
    assert abs(float(drawn.std()) - 3) < 0.1 and abs(float(drawn.mean()) - 1) < 0.1


@pytest.mark.parametrize("sigma", [1.0, 2.0])
def test_a_blur_reaches_three_deviations(sigma: float) -> None:
    impulse = torch.zeros(1, 1, 25, 25, dtype=torch.float64)
    impulse[..., 12, 12] = 1
    distance = torch.arange(25, dtype=torch.float64) - 12
    gauss = torch.exp(-distance.square() / (2 * sigma**2)) * (distance.abs() <= 3 * sigma)
    blurred = baselines.Blur(sigma)(impulse, None, torch.Generator())[0, 0]
    torch.testing.assert_close(blurred, torch.outer(gauss, gauss) / gauss.sum() ** 2)


def test_a_signal_of_one_row_is_blurred_along_it() -> None:
    x, gauss = torch.randn(2, 3, 1, 64).double(), torch.exp(-torch.arange(-6, 7).double().square() / 8)
    want = F.conv1d(F.pad(x[:, :, 0], (6, 6), "reflect").flatten(0, 1)[:, None], gauss[None, None] / gauss.sum()).reshape(x.shape)
    for turned, wanted in ((x, want), (x.mT, want.mT)):
        torch.testing.assert_close(baselines.Blur(2.0)(turned, None, torch.Generator()), wanted)


def test_pixels_that_are_relevant_in_part_are_shuffled() -> None:
    x, mask = torch.arange(64.0).reshape(1, 1, 8, 8), torch.full((1, 1, 8, 8), 0.5)
    shuffled = baselines.Shuffle()(x, mask, torch.Generator(x.device).manual_seed(0))
    assert not torch.equal(shuffled, x)
    assert torch.equal(shuffled.flatten().sort().values, x.flatten())


@pytest.mark.parametrize("fill", [baselines.Zero(), baselines.Mean(), baselines.Blur(1.5)])
def test_a_soft_mask_blends_the_image_and_its_fill(fill: baselines.Baseline) -> None:
    model, (x, _, _) = SmoothNet().double(), smooth_batch()
    mask = torch.rand(3, 8, 8, dtype=torch.float64)
    soft = mask[:, None]
    want = soft * x + (1 - soft) * fill(x, soft, GENERATOR)
    torch.testing.assert_close(baselines.Masked(fill)(x, soft, GENERATOR), want)
    torch.testing.assert_close(ReplaceOutside(fill)(x, mask), want)
    layers = nn.Sequential(model.stem, model.act, model.body)
    difference = (layers(x) - layers(want)).flatten(1).norm(dim=1).mean()
    torch.testing.assert_close(attrreg.ActivationDifference("body", fill)(model, x, mask), difference)
    small = oracles.resize_by_area(mask, 4)  # and one that has to be resized: each of its values is that of four pixels
    repeated = small.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, None]
    torch.testing.assert_close(ReplaceOutside(fill)(x, small), repeated * x + (1 - repeated) * fill(x, repeated, GENERATOR))


def test_another_image_is_never_the_image_itself_and_any_of_the_others() -> None:
    x = torch.arange(4.0).view(4, 1, 1, 1)
    other = torch.stack([baselines.OtherImage()(x, None, GENERATOR).flatten() for _ in range(3000)])
    for image in range(4):
        counts = torch.bincount(other[:, image].long(), minlength=4)
        assert counts[image] == 0
        assert all(900 < counts[value] < 1100 for value in range(4) if value != image)  # 1000 expected, standard deviation 26


def test_expected_gradients_average_to_integrated_gradients() -> None:
    model, (x, _, target) = SmoothNet().double(), smooth_batch()
    want = attrreg.IntegratedGradients(64, baselines.Mean()).attribute(model, x, target)
    got = attrreg.ExpectedGradients(500, baselines.Mean()).attribute(model, x, target, generator=torch.Generator().manual_seed(0))
    assert float((got - want).norm() / want.norm()) < 0.05


@pytest.mark.parametrize(
    ("shape", "images", "grid"),
    [
        ((2, 7, 4, 4), (32, 32), (2, 7, 4, 4)),
        ((2, 4, 4, 7), (32, 32), (2, 7, 4, 4)),  # (N, h, w, C)
        ((2, 7, 3, 5), (48, 80), (2, 7, 3, 5)),
        ((2, 3, 5, 17), (48, 80), (2, 17, 3, 5)),
        ((2, 7, 7, 7), (224, 224), (2, 7, 7, 7)),
        ((2, 16, 7), (32, 32), (2, 7, 4, 4)),  # tokens
        ((2, 17, 7), (32, 32), (2, 7, 4, 4)),  # and a class token
        ((2, 18, 7), (32, 32), (2, 7, 4, 4)),  # and a distillation token
        ((2, 15, 7), (48, 80), (2, 7, 3, 5)),
    ],
)
def test_outputs_of_layers_are_read_as_a_grid(shape: tuple[int, ...], images: tuple[int, int], grid: tuple[int, ...]) -> None:
    value = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)
    got = sites.to_grid(value, nn.Sequential(nn.Identity()), torch.zeros(2, 3, *images), "0")
    assert got.shape == grid
    length = grid[2] * grid[3]
    tokens = value[:, -length:] if len(shape) == 3 else value.flatten(1, 2) if shape[3] == grid[1] != shape[1] else None
    if tokens is not None:
        assert torch.equal(got.flatten(2), tokens.transpose(1, 2))


def test_a_convolutions_output_is_no_guess() -> None:
    """With a stride for each axis the shape alone would be read as (N, h, w, C)."""
    model = nn.Sequential(nn.Conv2d(3, 16, (4, 8), (4, 8)), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 16 * 8, 3))
    x, target = torch.randn(2, 3, 64, 64), torch.tensor([0, 2])
    got = attrreg.GradCAM("0").attribute(model, x, target)
    torch.testing.assert_close(got, oracles.grad_cam(model, x, target, oracles.score_target_logit, "0").detach())


@pytest.mark.parametrize("shape", [(2, 7), (2, 7, 1, 1), (2, 1, 7), (2, 12, 7), (4, 16, 7)])
def test_outputs_that_are_no_grid_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"layer 'here' gives .*not a spatial map"):
        sites.to_grid(torch.zeros(shape), nn.ModuleDict({"here": nn.Identity()}), torch.zeros(2, 3, 32, 32), "here")


def test_the_models_own_word_on_its_layout_decides_a_square() -> None:
    value, x = torch.randn(2, 7, 7, 7), torch.zeros(2, 3, 224, 224)
    model = nn.Sequential(nn.Identity())
    torch.testing.assert_close(sites.to_grid(value, model, x, "0"), value)
    model.output_fmt = "NHWC"  # type: ignore[assignment]
    torch.testing.assert_close(sites.to_grid(value, model, x, "0"), value.permute(0, 3, 1, 2))
    whole = nn.ModuleDict({"images": model, "others": nn.Sequential(nn.Identity())})  # each by its own word
    torch.testing.assert_close(sites.to_grid(value, whole, x, "images.0"), value.permute(0, 3, 1, 2))
    torch.testing.assert_close(sites.to_grid(value, whole, x, "others.0"), value)


def test_presets_are_the_papers_formulas() -> None:
    model, (x, mask, target) = SmoothNet(classes=2).double(), smooth_batch()
    target = target % 2
    outside = 1 - mask.unsqueeze(1).double()
    annotated = torch.tensor([True, True, False])
    kept = annotated.view(-1, 1, 1, 1)

    gradient = oracles.input_gradient(model, x, target, oracles.score_sum_log_prob)
    want = 1000 * ((outside * gradient) ** 2 * kept).sum()
    torch.testing.assert_close(presets.rrr_ross2017()(model, x, mask, annotated=annotated), want)

    leaf = x.clone().requires_grad_()
    logits = model(leaf)
    (gradient,) = torch.autograd.grad((logits[:, 0] - logits[:, 1]).abs().sum(), leaf)
    want = 0.203439 * (outside * gradient * kept).abs().sum()
    got = presets.gradmask_viviano2019()(model, x, mask, target, annotated=annotated)
    torch.testing.assert_close(got.detach(), want)

    regularizer = presets.actdiff_viviano2019()
    got = regularizer(model, x, mask, annotated=annotated, generator=torch.Generator().manual_seed(4))
    other = attrreg.ActivationDifference()(model, x, mask, annotated=annotated, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(got, other * 2 / 3)
    assert [term.name for term in (presets.rrr_ross2017() + regularizer).terms] == ["rrr_ross2017", "actdiff_viviano2019"]


def test_a_single_position_is_a_map_where_a_convolution_made_it_and_none_where_pooling_did() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 8), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).double()
    x, mask, target = smooth_batch()
    got = attrreg.GradCAM("0").attribute(model, x, target)
    torch.testing.assert_close(got, oracles.grad_cam(model, x, target, oracles.score_target_logit, "0").detach())
    for share in (objectives.OutsideFraction(), objectives.Energy()):
        with pytest.raises(ValueError, match=r"the map has one cell, so that the share outside is the mask's alone"):
            attrreg.GradCAM("0", objective=share)(model, x, mask, target)
    with pytest.raises(ValueError, match=r"'2' gives .* not a spatial map"):
        attrreg.GradCAM("2")(model, x, mask, target)
    with pytest.raises(ValueError, match="'auto' found no layer"):
        attrreg.GradCAM()(model, x, mask, target)


@pytest.mark.parametrize("objective", [*OUTSIDE, objectives.TotalVariation()])
@pytest.mark.parametrize("scale", [0.0, 1.0, 1000.0])
def test_half_maps_are_judged_in_float32(objective: objectives.Objective, scale: float) -> None:
    map, mask = (scale * torch.randn(2, 3, 16, 16)).half(), (torch.rand(2, 1, 16, 16) > 0.5).float()
    found = objective(map, mask)
    assert found.dtype == torch.float32 and found.isfinite().all()
    torch.testing.assert_close(found, objective(map.float(), mask))


@pytest.mark.parametrize("size", [0.0, 1e-8, 1.0, 1e4, 1e7, 1e9, 1e17])
def test_the_default_neither_overflows_nor_loses_its_gradient(size: float) -> None:
    map = torch.full((1, 3, 8, 8), size, requires_grad=True)
    value = objectives.LogOutside()(map, torch.zeros(1, 1, 8, 8))
    value.sum().backward()
    wide = torch.full((1, 3, 8, 8), size, dtype=torch.float64, requires_grad=True)
    want = wide.abs().sum().square().log1p()
    want.backward()
    torch.testing.assert_close(value.double(), want.view(1))
    assert map.grad is not None
    torch.testing.assert_close(map.grad.double(), wide.grad, rtol=1e-5, atol=0.0)


def test_total_variation_is_of_neighbours_whatever_the_mask() -> None:
    map = torch.tensor([[0.0, 1.0, 3.0], [2.0, 2.0, -1.0]]).expand(2, 2, 2, 3) * torch.tensor([1.0, -2.0]).view(2, 1, 1, 1)
    right, below = 1 + 2 + 0 + 3, 2 + 1 + 4
    want = torch.tensor([1.0, 2.0]) * 2 * (right + below)
    for mask in (torch.zeros(2, 1, 2, 3), torch.rand(2, 1, 2, 3)):
        torch.testing.assert_close(objectives.TotalVariation()(map, mask), want)
    with pytest.raises(ValueError, match=r"TotalVariation: the map has one cell.*Name a layer"):
        objectives.TotalVariation()(torch.ones(2, 3, 1, 1), torch.zeros(2, 1, 1, 1))


@pytest.mark.parametrize("kind", [baselines.Masked, attrreg.ActivationDifference, attrreg.transforms.ReplaceOutside])
def test_a_fill_is_what_a_baseline_may_be(kind: Any) -> None:
    for fill in (0.5, torch.zeros(3, 1, 1)):
        assert kind(fill=fill) == kind(fill=baselines.as_baseline(fill))
    for wrong in (baselines.Zero, "zero"):
        with pytest.raises(TypeError, match=r"fill must be a tensor, a number or a baselines\.Baseline.*\. Use"):
            kind(fill=wrong)


def test_images_to_draw_from_are_a_tensor() -> None:
    with pytest.raises(TypeError, match=r"OneOf: images must be a tensor .* Write torch\.stack"):
        baselines.OneOf([torch.zeros(2, 4, 4), torch.ones(2, 4, 4)])  # type: ignore[arg-type]
    assert baselines.OneOf(numpy.zeros((2, 3, 4, 4))) == baselines.OneOf(torch.zeros(2, 3, 4, 4).double())  # type: ignore[arg-type]


def test_contrast_at_a_tie_is_zero_and_has_no_gradient() -> None:
    logits = torch.tensor([[1.0, 1.0, 0.0], [2.0, 0.0, 1.0]], requires_grad=True)
    assert scores.Contrast()(torch.tensor([[1.0, math.nan, 2.0]]), torch.tensor([0])).isnan().all()  # not a penalty of 0
    value = scores.Contrast()(logits, torch.tensor([0, 2]))
    torch.testing.assert_close(value.detach(), torch.tensor([0.0, 1.0]))
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    assert torch.equal(gradient, torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, -1.0]]))


@pytest.mark.parametrize("term", [attrreg.IntegratedGradients(3, baselines.Masked()), attrreg.ExpectedGradients(2, baselines.Masked())])
def test_from_the_image_without_its_irrelevant_part_the_map_is_zero_inside(term: attrreg.MapRegularizer) -> None:
    model, (x, mask, target) = SmoothNet().double(), smooth_batch()
    map = term.attribute(model, x, target, mask=mask)
    inside = mask.unsqueeze(1).expand_as(map)
    assert not map[inside].any() and map[~inside].any()


def test_a_clipped_cam_is_differentiated_where_it_is_positive() -> None:
    model, (x, mask, target) = SmoothNet().double(), smooth_batch()
    term = attrreg.GradCAM("body", relu=True, score=scores.TargetLogit(), objective=objectives.AbsoluteOutside())
    cam = oracles.grad_cam(model, x, target, oracles.score_target_logit, "body")
    assert (cam > 0).any() and (cam < 0).any()
    want = oracles.absolute_outside(cam.relu(), oracles.resize_by_area(mask.double(), 4).unsqueeze(1)).mean()
    value = term(model, x, mask, target)
    torch.testing.assert_close(value, want)
    assert_close(gradients(model, value), gradients(model, want), 1e-10)


@pytest.mark.parametrize("number", [0.5, torch.tensor(0.5), torch.full((2, 8, 8), 0.5)], ids=["number", "tensor", "image"])
def test_a_number_is_a_baseline(number: float | Tensor) -> None:
    model, (x, _, target) = SmoothNet().double(), smooth_batch()
    want = oracles.integrated_gradients(model, x, target, oracles.score_target_logit, 3, torch.full_like(x, 0.5))
    torch.testing.assert_close(attrreg.IntegratedGradients(3, number).attribute(model, x, target), want.detach())
