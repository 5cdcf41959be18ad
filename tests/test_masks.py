"""The mask contract."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.tv_tensors import BoundingBoxes

import attrreg
from attrreg import baselines, masks, objectives, scores
from attrreg.transforms import ReplaceOutside
from tests.models import DEVICE, WAYS, SmoothNet, assert_close, gradients, logits_and_penalty, smooth_batch


@given(st.tuples(*[st.integers(1, 12)] * 4), st.integers(0, 2**31))
@example((6, 9, 2, 3), 0)
@example((2, 3, 6, 9), 0)
@settings(deadline=None, max_examples=40)
def test_resize_gives_each_cell_the_mean_of_the_pixels_that_it_covers(sizes: tuple[int, int, int, int], seed: int) -> None:
    """So a thin region becomes soft and never vanishes; upwards, pixels are repeated."""
    h, w, height, width = sizes
    mask = torch.rand(2, 1, h, w, generator=torch.Generator(DEVICE).manual_seed(seed), dtype=torch.float64)
    got = masks.resize(mask, (height, width))
    assert got.shape == (2, 1, height, width)
    for i in range(height):
        for j in range(width):
            rows, columns = (slice(k * of // to, -(-(k + 1) * of // to)) for k, of, to in ((i, h, height), (j, w, width)))
            torch.testing.assert_close(got[:, 0, i, j], mask[:, 0, rows, columns].mean(dim=(1, 2)))


def test_all_shapes_and_dtypes_say_the_same() -> None:
    model, (x, mask, target) = SmoothNet().double(), smooth_batch()
    same = mask[:1].expand(3, -1, -1)
    regularizer = attrreg.InputGradient() + attrreg.GradCAM("body")
    want = regularizer(model, x, same, target)
    for other in (same.unsqueeze(1), mask[0], same.double(), same.float(), same.half(), mask[0].float()):
        torch.testing.assert_close(regularizer(model, x, other, target), want)
    larger = same.repeat_interleave(2, 1).repeat_interleave(2, 2)
    torch.testing.assert_close(regularizer(model, x, larger, target), want)


def test_polarity_and_softness() -> None:
    model, (x, _, target) = SmoothNet().double(), smooth_batch()
    phi = attrreg.InputGradient().attribute(model, x, target)
    everything, nothing = torch.ones(8, 8), torch.zeros(8, 8)
    absolute = attrreg.InputGradient(scores.TargetLogit(), objectives.AbsoluteOutside())  # the score of the map
    assert float(absolute(model, x, everything, target).detach()) == 0
    per_image = phi.abs().sum(dim=(1, 2, 3))
    torch.testing.assert_close(absolute(model, x, nothing, target).detach(), per_image.mean())
    torch.testing.assert_close(absolute(model, x, torch.full((8, 8), 0.75), target).detach(), per_image.mean() / 4)


def test_masks_of_unannotated_images_are_not_read() -> None:
    model, (x, mask, target) = SmoothNet().double(), smooth_batch()
    annotated = torch.tensor([True, False, True])
    broken = mask.double()
    broken[1] = float("nan")
    value = attrreg.InputGradient()(model, x, broken, target, annotated=annotated)
    torch.testing.assert_close(value, attrreg.InputGradient()(model, x, mask, target, annotated=annotated))
    # Empty is not the same as not annotated.
    empty = mask.clone()
    empty[1] = False
    assert float((attrreg.InputGradient()(model, x, empty, target) - value).detach().abs()) > 0


def test_an_empty_mask_of_an_unannotated_image_is_no_error() -> None:
    model, (x, mask, target) = SmoothNet().double(), smooth_batch()
    mask[1] = False
    regularizer, annotated = attrreg.InputGradient(objective=objectives.Energy()), torch.tensor([True, False, True])
    value = regularizer(model, x, mask, target, annotated=annotated)
    torch.testing.assert_close(value, regularizer(model, x[annotated], mask[annotated], target[annotated]))


def share_outside(map: Tensor, mask: Tensor) -> Tensor:
    """NaN where all is relevant."""
    return (map * (1 - mask)).abs().sum((1, 2, 3)) / (1 - mask).sum((1, 2, 3))


def share_inside(map: Tensor, mask: Tensor) -> Tensor:
    """NaN where nothing is."""
    return (map * mask).abs().sum((1, 2, 3)) / mask.sum((1, 2, 3))


@pytest.mark.parametrize(
    "regularizer", [attrreg.InputGradient(), *(attrreg.InputGradient(objective=f) for f in (share_outside, share_inside))]
)
def test_nan_of_an_unannotated_image_reaches_nobody(regularizer: attrreg.InputGradient) -> None:
    model, (x, mask, target) = SmoothNet().double(), smooth_batch()
    annotated, broken = torch.tensor([True, False, True]), mask.double()
    broken[1] = math.nan
    with regularizer.attach(model):  # in which all images take part
        model(x)
        value = regularizer(model, x, broken, target, annotated=annotated)
    want = regularizer(model, x[annotated], mask[annotated], target[annotated])
    torch.testing.assert_close(value, want)
    assert_close(gradients(model, value), gradients(model, want), 1e-9)


def test_soft_masks_may_miss_0_and_1_by_rounding() -> None:
    model, (x, mask, target) = SmoothNet().double(), smooth_batch()
    want = attrreg.InputGradient()(model, x, mask, target)
    for dtype in (torch.float16, torch.float32, torch.float64):
        eps = torch.finfo(dtype).eps
        soft = torch.full_like(x[:, 0], -eps).masked_fill(mask, 1 + 9 * eps).to(dtype)
        assert soft.max() > 1 and soft.min() < 0
        assert torch.equal(attrreg.InputGradient()(model, x, soft, target), want)
        with pytest.raises(ValueError, match=r"outside \[0, 1\]"):
            attrreg.InputGradient()(model, x, (mask * x.new_tensor(1 + 50 * eps)).to(dtype), target)
        blurred = torch.full_like(x[:, 0], 1e-4).masked_fill(mask, 1 - 9 * eps).to(dtype)
        assert blurred.max() < 1
        seeds = [torch.Generator(x.device).manual_seed(3) for _ in range(2)]
        kept = [masks.check(given, x, None).relevant for given in (blurred, mask)]
        assert torch.equal(*(baselines.Shuffle()(x, *given) for given in zip(kept, seeds, strict=True)))  # relevant pixels stay
    for dtype in (torch.float16, torch.bfloat16):  # whose eps are no small numbers
        with pytest.raises(ValueError, match=r"outside \[0, 1\]"):
            attrreg.InputGradient()(model, x, 1.02 * mask.to(dtype), target)


def test_flags_may_come_from_inference_mode_and_be_written_to() -> None:
    model, (x, mask, target) = SmoothNet(norm=True).double(), smooth_batch()
    flags = torch.tensor([True, False, True])
    with torch.inference_mode():
        inferred = flags.clone()
    found = []
    for annotated in (flags.clone(), inferred):
        value = attrreg.InputGradient()(model, x, mask, target, annotated=annotated)
        with torch.inference_mode():
            annotated.zero_()  # a buffer that the loop uses again
        found.append(gradients(model, value))
    assert_close(found[1], found[0], 1e-12)


def test_the_users_mask_is_not_changed() -> None:
    model, (x, mask, target) = SmoothNet().double(), smooth_batch()
    soft = mask.double()
    before = soft.clone(), soft._version
    attrreg.InputGradient()(model, x, soft, target, annotated=torch.tensor([True, False, True]))
    assert torch.equal(soft, before[0]) and soft._version == before[1]


def test_from_boxes() -> None:
    got = masks.from_boxes([torch.tensor([[1, 2, 3, 5]]), [(0, 0, 1, 1), (6.2, 6.9, 6.8, 7.1)], [], None], (8, 9))
    assert got.shape == (4, 8, 9) and got.dtype is torch.bool
    assert got[0].nonzero().tolist() == [[r, c] for r in (2, 3, 4) for c in (1, 2)]
    assert got[1].nonzero().tolist() == [[0, 0], [6, 6], [7, 6]]
    assert not got[2].any() and got[3].all()


@given(st.floats(-3, 12), st.floats(-3, 12), st.floats(0.01, 20), st.floats(0.01, 20))
@settings(deadline=None, max_examples=60)
def test_boxes_cover_every_pixel_they_touch(x1: float, y1: float, width: float, height: float) -> None:
    x2, y2 = x1 + width, y1 + height
    if x2 <= 0 or y2 <= 0 or x1 >= 8 or y1 >= 8:
        with pytest.raises(ValueError, match="outside"):
            masks.from_boxes([[(x1, y1, x2, y2)]], (8, 8))
        return
    mask = masks.from_boxes([[(x1, y1, x2, y2)]], (8, 8))[0]
    for row in range(8):
        for column in range(8):
            touches = x1 < column + 1 and x2 > column and y1 < row + 1 and y2 > row
            assert bool(mask[row, column]) == touches


@pytest.mark.parametrize("box", [(0, 0, math.inf, 4), (-math.inf, 0, 4, 4), (0, 0, 4, math.nan), (4, 0, 4, 4), (0, 4, 4, 4)])
def test_boxes_that_are_not_finite_or_empty(box: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"boxes\[0\] has the box .* which is not finite, empty or outside"):
        masks.from_boxes([[box]], (8, 8))


def test_boxes_that_say_their_format() -> None:
    corners, sizes = (BoundingBoxes([[2, 2, 5, 5]], format=form, canvas_size=(8, 8)) for form in ("XYXY", "XYWH"))
    assert masks.from_boxes([corners], (8, 8)).sum() == 9
    with pytest.raises(ValueError, match=r"boxes\[0\] are XYWH.*ConvertBoundingBoxFormat"):
        masks.from_boxes([sizes], (8, 8))


ZERO = baselines.Zero()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "regularizer",
    [
        attrreg.InputGradient(),
        attrreg.GradCAM("body"),
        attrreg.IntegratedGradients(steps=2, baseline=baselines.Masked(ZERO)),
        attrreg.IntegratedGradients(steps=2, baseline=baselines.Masked(ZERO), chunk=None),
        attrreg.ActivationDifference(fill=ZERO),
        attrreg.PGDEx(epsilon=0.2, steps=2),
    ],
)
def test_no_gradient_flows_into_the_mask(regularizer: attrreg.AttributionRegularizer, way: str) -> None:
    model, (x, _, target) = SmoothNet().double(), smooth_batch()
    made = torch.randn(3, 8, 8, dtype=torch.float64, requires_grad=True)
    _, value = logits_and_penalty(way, regularizer, model, (x, made.sigmoid(), target))
    (slope,) = torch.autograd.grad(value, made, allow_unused=True)
    assert slope is None
    assert not ReplaceOutside()(x, made.sigmoid()).requires_grad


def test_boxes_of_another_image_and_boxes_that_are_tensors() -> None:
    boxes = BoundingBoxes([[1, 1, 3, 3]], format="XYXY", canvas_size=(16, 16))
    with pytest.raises(ValueError, match=r"boxes\[0\] are of an image of \(16, 16\), but size=\(8, 8\)\. Scale"):
        masks.from_boxes([boxes], (8, 8))
    tensors = [torch.tensor([1.0, 1, 3, 3]), torch.tensor([5, 5, 6, 6])]
    with pytest.raises(ValueError, match=r"boxes\[0\] are XYWH"):
        masks.from_boxes([[BoundingBoxes([[2, 2, 5, 5]], format="XYWH", canvas_size=(8, 8))]], (8, 8))
    padded = BoundingBoxes([[1, 1, 3, 3]], format="XYXY", canvas_size=(8, 6))
    with pytest.raises(ValueError, match=r"boxes\[0\] are of an image of \(8, 6\), but size=\(6, 8\)"):
        masks.from_boxes([padded], (6, 8))
    with pytest.raises(ValueError, match=r"boxes\[0\] has the shape \(4, 3\), but boxes are \(K, 4\)"):
        masks.from_boxes([torch.rand(4, 3)], (8, 8))
    assert masks.from_boxes([padded], (8, 8)).sum() == 4
    assert torch.equal(masks.from_boxes([tensors], (16, 16)), masks.from_boxes([[(1, 1, 3, 3), (5, 5, 6, 6)]], (16, 16)))


def test_boxes_may_come_from_an_iterator() -> None:
    x1, y1, x2, y2 = (1, 5), (1, 5), (3, 6), (3, 6)
    corners: Any = zip(x1, y1, x2, y2, strict=True)
    assert torch.equal(masks.from_boxes([corners], (8, 8)), masks.from_boxes([[(1, 1, 3, 3), (5, 5, 6, 6)]], (8, 8)))


@pytest.mark.parametrize("entry", [[(0, 0, 4, 4), (1, 1, 3)], [{"bbox": [0, 0, 4, 4]}], [None], [(0, 0, 4, "x")]])
def test_what_is_no_list_of_boxes_is_named(entry: Any) -> None:
    with pytest.raises(ValueError, match=r"boxes\[1\] are no boxes: .*Give \(x1, y1, x2, y2\) a box"):
        masks.from_boxes([[(0, 0, 4, 4)], entry], (8, 8))


def test_boolean_masks_are_resized_as_numbers() -> None:
    mask = torch.rand(2, 1, 9, 7) > 0.5
    torch.testing.assert_close(masks.resize(mask, (3, 2)), masks.resize(mask.float(), (3, 2)))


@pytest.mark.parametrize(
    "objective",
    [
        *(objectives.SquaredOutside(), objectives.AbsoluteOutside(), objectives.LogOutside(), objectives.NetOutside()),
        *(objectives.OutsideFraction(), objectives.Energy()),
    ],
)
def test_an_objective_refuses_a_mask_that_would_meet_other_images(objective: objectives.Objective) -> None:
    map, mask = torch.rand(3, 1, 4, 4), torch.ones(3, 4, 4)
    for channels in (1, 3):  # of which there may be as many as images
        with pytest.raises(ValueError, match=r"mask \(N, 1, H, W\), got .*\(3, 4, 4\)\. Write mask\[:, None\]"):
            objective(map.expand(3, channels, 4, 4), mask)
    with pytest.raises(ValueError, match=r"got \(1, 1, 4, 4\) and \(3, 1, 4, 4\)"):
        objective(map[:1], mask[:, None])
    for other in (mask[0, 0], mask[:, None, :1, :1], mask[None, None]):
        with pytest.raises(ValueError, match=r"The map must be \(N, C, H, W\) and the mask \(N, 1, H, W\)"):
            objective(map, other)
    for same in (mask[:1, None], mask[:1], mask[0], mask[:, None].expand_as(map)):
        torch.testing.assert_close(objective(map, same), objective(map, mask[:, None]))
