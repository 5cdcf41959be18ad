"""PGD-Ex: against one image at a time, its draws, its reach and its passes."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attrreg
from attrreg import scores
from attrreg.trace import Passes, passes
from tests.models import SmoothNet, assert_close, gradients, smooth_batch


def naive_pgd(
    model: nn.Module, x: Tensor, mask: Tensor, target: Tensor, epsilon: float, steps: int, rate: float, loss: Any = F.cross_entropy
) -> Tensor:
    """One image at a time."""
    worst = []
    for image, allowed, label in zip(x, 1 - mask.to(x.dtype), target, strict=True):
        moved = torch.zeros_like(image)
        for _ in range(steps):
            moved = moved.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(loss(model((image + moved)[None]), label[None]), moved)
            moved = moved.detach() + rate * gradient.sign() * allowed
            moved = torch.maximum(torch.minimum(moved, epsilon * allowed), -epsilon * allowed)
            moved = torch.where(image.abs() > 1, torch.where(moved * image > 0, 0, moved), (image + moved).clamp(-1, 1) - image)
            moved = moved * (allowed > 0)
        worst.append(image + moved)
    result: Tensor = loss(model(torch.stack(worst)), target)
    return result


@pytest.mark.parametrize("within", [True, False])
@pytest.mark.parametrize("soft", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_pgd_ex_against_one_image_at_a_time(reduction: Any, soft: bool, within: bool) -> None:
    model, (x, mask, target) = SmoothNet().double(), smooth_batch()
    mask = torch.rand_like(x[:, 0]) if soft else mask
    x = x.clamp(-1, 1) if within else x
    assert within or (x.abs() > 1).any()
    regularizer = attrreg.PGDEx(epsilon=0.2, steps=4, rate=0.07, bounds=(-1.0, 1.0)).reduced(reduction)
    want = naive_pgd(model, x, mask, target, 0.2, 4, 0.07) * (len(x) if reduction == "sum" else 1)
    value = regularizer(model, x, mask, target)
    torch.testing.assert_close(value, want)
    assert float(value.detach()) > float(F.cross_entropy(model(x), target).detach())
    assert_close(gradients(model, value), gradients(model, want), 1e-10)


def test_pgd_ex_climbs_with_the_draws_of_the_recorded_forward() -> None:
    model, (x, mask, target) = SmoothNet(dropout=0.5).double(), smooth_batch()
    regularizer, outside, image = attrreg.PGDEx(epsilon=0.3, steps=3, rate=0.2), (~mask[:, None]).double(), x
    with regularizer.attach(model):
        torch.manual_seed(5)
        model(x)
        value = regularizer(model, x, mask, target)
    for _ in range(3):
        torch.manual_seed(5)
        leaf = image.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(leaf), target), leaf)
        image = x + (image - x + 0.2 * outside * gradient.sign()).clamp(-0.3 * outside, 0.3 * outside)
    torch.manual_seed(5)
    torch.testing.assert_close(value, F.cross_entropy(model(image), target), rtol=1e-9, atol=0)


def test_pgd_ex_leaves_unannotated_images_out_and_relevant_pixels_alone() -> None:
    model, (x, mask, target) = SmoothNet().double(), smooth_batch()
    regularizer = attrreg.PGDEx(epsilon=5.0, steps=2)
    annotated = torch.tensor([True, False, True])
    want = regularizer(model, x[annotated], mask[annotated], target[annotated])
    torch.testing.assert_close(regularizer(model, x, mask, target, annotated=annotated), want)
    everything = torch.ones_like(mask)
    torch.testing.assert_close(regularizer(model, x, everything, target), F.cross_entropy(model(x), target))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_pgd_ex_takes_a_mask_of_another_size(dtype: torch.dtype) -> None:
    model, (x, _, target), small = SmoothNet().to(dtype), smooth_batch(), torch.rand(3, 4, 4) < 0.5
    values = [
        attrreg.PGDEx(epsilon=0.2)(model, x.to(dtype), mask, target)
        for mask in (small, small.repeat_interleave(2, 1).repeat_interleave(2, 2))
    ]
    torch.testing.assert_close(*values)


@pytest.mark.parametrize("bounds", [None, (0.0, 1.0), (-1.0, 1.0)])
def test_pgd_ex_moves_no_value_further_than_epsilon(bounds: Any) -> None:
    model, (x, _, target) = SmoothNet().double(), smooth_batch()  # of which many values lie outside the bounds
    mask, seen = torch.rand(x.shape[0], *x.shape[2:], dtype=x.dtype), []
    handle = model.stem.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    attrreg.PGDEx(epsilon=0.01, steps=3, bounds=bounds)(model, x, mask, target)
    handle.remove()
    moved = seen[-1] - x
    assert moved.any() and (moved.abs() <= 0.01 * (1 - mask[:, None]) + 1e-12).all()
    if bounds is not None:
        assert (seen[-1] <= x.clamp(min=bounds[1])).all() and (seen[-1] >= x.clamp(max=bounds[0])).all()


def test_pgd_ex_climbs_in_the_type_of_the_images() -> None:
    model, (x, mask, target) = SmoothNet().bfloat16(), smooth_batch()
    assert attrreg.PGDEx(epsilon=0.5, steps=2)(model, x.bfloat16(), mask, target).isfinite()


def test_pgd_ex_passes() -> None:
    model, (x, mask, target) = SmoothNet().double(), smooth_batch()
    with passes() as counted:
        (attrreg.PGDEx(steps=3) + 2.0 * attrreg.PGDEx(steps=3).named("shared"))(model, x, mask, target)
    assert counted == Passes(4, 3)


def test_pgd_ex_climbs_a_loss_of_ones_own() -> None:
    smoothed = partial(F.cross_entropy, label_smoothing=0.3)
    model, (x, mask, target) = SmoothNet().double(), smooth_batch()
    x = x.clamp(-1, 1)
    own = scores.TaskLoss(partial(smoothed, reduction="none"))
    value = attrreg.PGDEx(epsilon=0.2, steps=4, rate=0.07, bounds=(-1.0, 1.0), loss=own)(model, x, mask, target)
    want = naive_pgd(model, x, mask, target, 0.2, 4, 0.07, smoothed)
    torch.testing.assert_close(value, want)
    assert_close(gradients(model, value), gradients(model, want), 1e-10)


def test_pgd_ex_without_a_target_is_refused_before_any_pass() -> None:
    model, (x, mask, _) = SmoothNet().double(), smooth_batch()
    with passes() as counted, pytest.raises(ValueError, match=r"PGDEx: TaskLoss needs a target\. "):
        attrreg.PGDEx()(model, x, mask)
    assert counted == Passes(0, 0)
