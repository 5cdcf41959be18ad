"""Metrics against slow re-implementations, one image and one pixel at a time."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import attrreg
from attrreg import baselines, metrics, objectives
from tests.models import DEVICE


def cases() -> list[tuple[Tensor, Tensor]]:
    """Maps with ties and zeros, and boolean masks of every size but none."""
    generator, count, made = torch.Generator(DEVICE).manual_seed(0), 20, []
    for index in range(count):
        map = torch.randint(-3, 4, (1, 1 + index % 3, 4, 5), generator=generator).double()
        mask = torch.rand(1, 4, 5, generator=generator) < (index + 1) / (count + 1)
        mask[0, 0, 0] = True
        made.append((map, mask))
    return made


def pixels(map: Tensor, signed: bool) -> list[float]:
    """One number a pixel."""
    channels = [channel.flatten().tolist() for channel in map[0]]
    return [sum(value if signed else abs(value) for value in column) for column in zip(*channels, strict=True)]


@pytest.mark.parametrize(("map", "mask"), cases())
def test_shares(map: Tensor, mask: Tensor) -> None:
    def share(part: Any) -> float:
        inside = whole = 0.0
        for channel in map[0]:
            for value, relevant in zip(channel.flatten().tolist(), mask.flatten().tolist(), strict=True):
                whole += part(value)
                inside += part(value) if relevant else 0.0
        return inside / whole

    assert metrics.share_inside(map, mask).item() == pytest.approx(share(abs))
    assert metrics.energy_pointing_game(map, mask).item() == pytest.approx(share(lambda value: max(value, 0.0)))
    outside = objectives.OutsideFraction()(map, mask.unsqueeze(1).double())
    torch.testing.assert_close(metrics.share_inside(map, mask), 1 - outside)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("tolerance", [0, 1])
@pytest.mark.parametrize(("map", "mask"), cases())
def test_pointing_game(map: Tensor, mask: Tensor, tolerance: int, signed: bool) -> None:
    heights = pixels(map, signed)
    places = [divmod(index, 5) for index, height in enumerate(heights) if height == max(heights)]
    relevant = [(row, column) for row in range(4) for column in range(5) if mask[0, row, column]]
    hits = sum(any(max(abs(r - a), abs(c - b)) <= tolerance for a, b in relevant) for r, c in places)
    assert metrics.pointing_game(map, mask, tolerance, signed).item() == pytest.approx(hits / len(places))
    assert metrics.PointingGame(tolerance, signed)(map, mask).item() == pytest.approx(hits / len(places))


@pytest.mark.parametrize(("map", "mask"), cases())
def test_iou_at_mask_size(map: Tensor, mask: Tensor) -> None:
    """Ties by enumerating: the expected intersection when pixels of one height are taken in random order."""
    heights, inside = pixels(map, signed=False), mask.flatten().tolist()
    left, both = sum(inside), 0.0
    for height in sorted(set(heights), reverse=True):
        level = [relevant for value, relevant in zip(heights, inside, strict=True) if value == height]
        taken = min(left, len(level))
        both += sum(level) * taken / len(level)
        left -= taken
    expected = both / (2 * sum(inside) - both)
    assert metrics.iou_at_mask_size(map, mask).item() == pytest.approx(expected)


def test_a_perfect_map() -> None:
    mask = torch.zeros(1, 6, 6, dtype=torch.bool)
    mask[0, 2:4, 1:5] = True
    map = mask.unsqueeze(1).float() + 1e-3 * torch.rand(1, 1, 6, 6)
    assert metrics.iou_at_mask_size(map, mask).item() == metrics.pointing_game(map, mask).item() == 1
    assert metrics.iou_at_mask_size(map, ~mask).item() == pytest.approx(20 / 36)  # the 8 relevant pixels come first of 28
    assert metrics.pointing_game(map, ~mask).item() == 0


def test_an_object_that_a_coarse_map_cannot_show_is_no_miss() -> None:
    map, mask = torch.zeros(3, 1, 7, 7), torch.zeros(3, 224, 224, dtype=torch.bool)
    map[:, :, 2, 3] = 1
    mask[0, 70:90, 100:120] = True  # 20 x 20 pixels within that cell of 32 x 32
    mask[1, 64:96, 96:128] = True
    missed, hit, empty = metrics.pointing_game(map, mask).tolist()
    assert math.isnan(missed) and (hit, empty) == (1, 0)
    assert metrics.pointing_game(nn.Upsample(scale_factor=32)(map), mask)[0] == 400 / 1024  # its pixels share the vote


def test_undefined_is_nan_and_never_a_number() -> None:
    zero, mask = torch.zeros(2, 3, 4, 4), torch.ones(4, 4).triu().bool()
    for measure in (metrics.share_inside, metrics.energy_pointing_game, metrics.pointing_game, metrics.iou_at_mask_size):
        assert measure(zero, mask).isnan().all()
    assert metrics.energy_pointing_game(zero - 1, mask).isnan().all()
    assert metrics.iou_at_mask_size(torch.rand(2, 1, 4, 4), torch.zeros(4, 4)).isnan().all()


@pytest.mark.parametrize("mask", [torch.zeros(0, 4, 4, dtype=torch.bool), torch.zeros(0, 1, 9, 9), torch.ones(3, 3)])
def test_of_no_images_there_are_no_values(mask: Tensor) -> None:
    for measure in (metrics.share_inside, metrics.energy_pointing_game, metrics.pointing_game, metrics.iou_at_mask_size):
        assert measure(torch.zeros(0, 3, 4, 4), mask).shape == (0,)


@given(st.integers(0, 10**6), st.floats(1e-3, 1e3))
@settings(max_examples=30, deadline=None)
def test_scale_and_order_of_images_do_not_matter(seed: int, scale: float) -> None:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    map, mask = torch.randn(4, 2, 6, 6, generator=generator).double(), torch.rand(4, 3, 3, generator=generator).double()
    mask[:, 0, 0] = 1  # else a mask may have no pixel, and the IoU is undefined
    order = torch.randperm(4, generator=generator)
    for measure in (metrics.share_inside, metrics.energy_pointing_game, metrics.pointing_game, metrics.iou_at_mask_size):
        value = measure(map, mask)
        torch.testing.assert_close(measure(scale * map, mask), value)
        torch.testing.assert_close(measure(map[order], mask[order]), value[order])
        assert ((value >= 0) & (value <= 1)).all()


@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=20))
@settings(max_examples=60, deadline=None)
def test_auc(items: list[tuple[int, bool]]) -> None:
    logits = torch.tensor([[0.0, float(score)] for score, _ in items])
    target = torch.tensor([int(label) for _, label in items])
    pairs = [(a, b) for a, one in items if one for b, other in items if not other]
    found = metrics.auc(logits, target)
    assert found is not None
    if not pairs:
        assert math.isnan(found)
        return
    assert found == pytest.approx(sum((a > b) + (a == b) / 2 for a, b in pairs) / len(pairs))
    assert metrics.auc(torch.zeros(2, 3), torch.tensor([0, 1])) is None


def test_groups() -> None:
    logits = torch.eye(2)[torch.tensor([0, 0, 1, 1, 1, 0])]
    target, groups = torch.tensor([0, 1, 1, 1, 0, 0]), torch.tensor([0, 3, 3, 3, 5, 0])
    assert metrics.group_accuracies(logits, target, groups) == pytest.approx({0: 1.0, 3: 2 / 3, 5: 0.0})
    assert metrics.worst_group_accuracy(logits, target, groups) == 0
    assert metrics.accuracy(logits, target) == pytest.approx(4 / 6)


class Corner(nn.Module):
    """Logits are sums of quarters; counts its forwards and its statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(1)

    def forward(self, x: Tensor) -> Tensor:
        self.norm(x)
        return torch.stack([x[:, :, :4, :4].sum(dim=(1, 2, 3)), x[:, :, 4:, 4:].sum(dim=(1, 2, 3))], dim=1)


def test_occlusion_by_hand() -> None:
    model, x, target = Corner().train(), torch.rand(3, 1, 8, 8), torch.tensor([0, 1, 0])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    phi = metrics.Occlusion(window=2, stride=2, fill=0.25)(model, x, target)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    for image in range(3):
        for row in range(0, 8, 2):
            for column in range(0, 8, 2):
                covered = x[image : image + 1].clone()
                covered[:, :, row : row + 2, column : column + 2] = 0.25
                fall = (model(x[image : image + 1]) - model(covered))[0, target[image]]
                window = phi[image, 0, row : row + 2, column : column + 2]
                torch.testing.assert_close(window, fall.expand(2, 2).detach(), atol=1e-5, rtol=1e-5)


class Rounded(Corner):
    """In half precision."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).bfloat16()


class Widened(Rounded):
    """The same logits in single precision."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).float()


def test_overlapping_windows_are_summed_up_in_single_precision() -> None:
    x, target = torch.rand(3, 1, 8, 8), torch.tensor([0, 1, 0])
    rounded, widened = (metrics.Occlusion()(model.eval(), x, target) for model in (Rounded(), Widened()))
    assert torch.equal(rounded, widened)


def test_a_judge_that_the_penalty_did_not_see() -> None:
    """Scaling by a bounded function hides the shortcut from the gradient, and not from occlusion."""

    class Saturated(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            shortcut = torch.tanh(20 * x[:, 0, 0, 0])
            y = 3 * shortcut + 0.5 * x[:, 0, 4:, 4:].sum(dim=(1, 2))
            return torch.stack([-y, y], dim=1)

    x, target = torch.rand(4, 1, 8, 8) * 0.1 + 0.9, torch.ones(4, dtype=torch.long)
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[4:, 4:] = True
    by_gradient = metrics.judged(Saturated(), x, mask, target, attrreg.InputGradient().attribute)
    by_occlusion = metrics.judged(Saturated(), x, mask, target, metrics.Occlusion(window=1))
    assert (by_gradient > 0.99).all()
    assert (by_occlusion < 0.8).all()


# Bad input


class InMapping(nn.Module):
    """Returns no tensor."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": x.flatten(1)}


MAP = torch.rand(2, 1, 4, 4)


def judge(model: nn.Module, target: Tensor, measure: Any = metrics.share_inside) -> Tensor:
    """By occlusion."""
    return metrics.judged(model, MAP, MAP[:, 0], target, metrics.Occlusion(window=4, stride=4), measure)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: metrics.share_inside(MAP.long(), MAP[:, 0]), TypeError, r"map must be a floating-point.*\. "),
        (lambda: metrics.share_inside(MAP[0, 0], MAP[:, 0]), ValueError, r"map must be \(N, C, H, W\).*\. "),
        (lambda: metrics.share_inside(MAP[..., :0], MAP[:, 0]), ValueError, r"map must be \(N, C, H, W\).*\. "),
        (lambda: metrics.share_inside(MAP / 0, MAP[:, 0]), ValueError, r"map has values that are not finite\. "),
        (lambda: metrics.energy_pointing_game(MAP - math.inf, MAP[:, 0]), ValueError, r"map has values that are not finite\. "),
        (lambda: metrics.energy_pointing_game(MAP > 0, MAP[:, 0]), TypeError, r"map must be a floating-point.*got torch\.bool\. "),
        (lambda: metrics.share_inside(MAP, MAP[:1, 0]), ValueError, r"mask is for 1 images.*\. "),
        (lambda: metrics.pointing_game(MAP, MAP[:, 0], -1), ValueError, r"tolerance must be.*\. "),
        (lambda: metrics.accuracy(MAP, torch.zeros(2)), ValueError, r"logits must be \(N, classes\).*\. "),
        (lambda: metrics.accuracy(torch.rand(3, 1), torch.tensor([0, 1, 1])), ValueError, r"two classes, got \(3, 1\)\. For one logit"),
        (lambda: metrics.auc(torch.rand(3, 2), torch.tensor([0, 1, 255])), ValueError, r"target must be 0 or 1.*\. "),
        (lambda: metrics.group_accuracies(torch.rand(2, 2), torch.zeros(2), torch.zeros(3)), ValueError, r"groups must be \(2,\).*\. "),
        (lambda: metrics.Occlusion(window=0), ValueError, r"window must be.*\. "),
        (lambda: metrics.Occlusion(window=2, stride=3), ValueError, r"stride=3 leaves pixels.*\. "),
        (lambda: metrics.Occlusion(fill=baselines.Shuffle()), ValueError, r"fill=.* depends on the mask.*\. "),
        (lambda: metrics.Occlusion(fill="zero"), TypeError, r"fill must be a tensor, a number or a baselines\.Baseline, got str\. "),  # type: ignore[arg-type]
        (lambda: metrics.Occlusion(window=9)(Corner(), torch.rand(1, 1, 8, 12), torch.zeros(1)), ValueError, r"window=9 is larger.*\. "),
        (lambda: metrics.judged(Corner(), MAP, MAP, torch.zeros(2), "occlusion"), TypeError, r"attribution must be a function.*\. "),  # type: ignore[arg-type]
        (lambda: metrics.judged(Corner(), MAP, MAP, torch.zeros(2), attrreg.InputGradient()), TypeError, r"Pass .*`\.attribute`"),
        (lambda: judge(nn.Flatten(), torch.arange(2), lambda map, _: map.mean()), ValueError, r"gave \(\), but a measure is \(2,\), .*\. "),
        (lambda: judge(nn.Flatten(), torch.arange(2), lambda *_: 0.5), ValueError, r"gave a float, but a measure is \(2,\)"),
        (lambda: judge(InMapping(), torch.tensor([0, 1])), TypeError, r"model returned a dict and not logits\. "),
        (lambda: judge(nn.Flatten(), torch.tensor([0, 99])), ValueError, r"target has the class 99, but the model has 16 classes\. "),
        (lambda: judge(nn.Flatten(), torch.eye(2)), TypeError, r"target must be class indices, got torch.float32\. "),
        (lambda: judge(nn.Flatten(), torch.tensor([0])), ValueError, r"target must be \(2,\).*\. "),
    ],
)
def test_bad_input(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_the_area_of_a_diverged_model_is_nan() -> None:
    logits, target = torch.randn(6, 2), torch.tensor([0, 1, 0, 1, 0, 1])
    for bad in (math.nan, math.inf):
        logits[3] = bad
        assert math.isnan(metrics.auc(logits, target) or 0)


def test_where_a_logit_is_nan_no_class_is_right() -> None:
    logits, target = torch.full((4, 2), math.nan), torch.tensor([0, 0, 1, 1])
    logits[3] = torch.tensor([0.0, 1.0])
    logits[1, 1] = 0.0
    assert metrics.accuracy(logits, target) == 0.25 and metrics.worst_group_accuracy(logits, target, target) == 0


def test_groups_that_are_no_integers() -> None:
    logits, target = torch.eye(2)[[0, 1, 1, 0]], torch.tensor([0, 1, 0, 1])
    with pytest.raises(TypeError, match=r"groups must be integers, one group an image, got torch\.float32\. Number the groups"):
        metrics.group_accuracies(logits, target, torch.tensor([0.2, 0.2, 0.7, 0.7]))


def test_of_a_batch_without_images_nothing_is_judged() -> None:
    x, mask, target = torch.zeros(0, 3, 8, 8).bfloat16(), torch.zeros(0, 8, 8), torch.zeros(0, dtype=torch.long)
    found = metrics.judged(torch.nn.Flatten(), x, mask, target, metrics.Occlusion())
    assert found.shape == (0,) and found.dtype is torch.float32


def test_metrics_take_the_keywords_of_torchmetrics_and_no_others() -> None:
    modules = pytest.importorskip("attrreg.metrics.modules")
    kinds: list[Any] = [modules.ShareInside, modules.PointingGame, modules.IoUAtMaskSize, modules.LogitDifferenceAUC]
    kinds += [partial(modules.WorstGroupAccuracy, 2), partial(modules.Judged, metrics.Occlusion())]
    for kind in kinds:
        assert kind(sync_on_compute=False).sync_on_compute is False
        with pytest.raises(ValueError, match="Unexpected keyword"):
            kind(tolerant=1)
    with pytest.raises(TypeError, match="positional"):
        kinds[0](15)


class ByOcclusion(nn.Module):
    """Whose text does not tell its setting."""

    def __init__(self, window: int) -> None:
        super().__init__()
        self.window = window

    def forward(self, model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
        return metrics.Occlusion(self.window)(model, x, target)


def test_judges_whose_attributions_look_alike_stay_apart() -> None:
    modules = pytest.importorskip("attrreg.metrics.modules")
    for of in (ByOcclusion, lambda window: ByOcclusion(window).forward):
        first, other = (modules.Judged(of(window)) for window in (3, 9))
        assert first._defaults.keys() != other._defaults.keys()
    assert modules.Judged(metrics.Occlusion(3))._defaults.keys() == modules.Judged(metrics.Occlusion(3))._defaults.keys()
