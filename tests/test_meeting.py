"""Models whose images meet where no gradient shows it, or only some: they are not taken apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attrreg
from attrreg import baselines
from attrreg.objectives import SquaredOutside
from tests.models import SmoothNet, assert_close, gradients, smooth_batch

TERM = attrreg.InputGradient(objective=SquaredOutside())
ANNOTATED = torch.tensor([True, False, True, False, True, True])


def quantized(h: Tensor) -> Tensor:
    step = h.detach().abs().max() / 16
    return h + (torch.round(h / step) * step - h).detach()


MEETINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "a mean without gradient": lambda h: h - h.mean(0).detach(),
    "fake quantisation": quantized,
    "the largest value": lambda h: h / h.abs().amax(),
    "the largest value without gradient": lambda h: h / h.detach().abs().amax(),
    "the number of images": lambda h: h * len(h),
    "places in the batch": lambda h: h + 0.1 * torch.arange(len(h), dtype=h.dtype)[:, None],
    "pairs from both ends": lambda h: h + 0.3 * h.flip(0),
    "pairs of neighbours": lambda h: h + 0.3 * h.unflatten(0, (-1, 2)).flip(1).flatten(0, 1) if len(h) % 2 == 0 else h,
    "one pair": lambda h: h + 0.3 * (torch.arange(len(h)) == 4)[:, None] * h[1],
    "the last one": lambda h: h + h[-1:],
}


class Meets(nn.Module):
    """Features of images, which meet, and a head."""

    def __init__(self, name: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.meet, self.head = SmoothNet(), MEETINGS[name], nn.Linear(3, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.meet(self.body(x)).tanh())
        return logits


class Capacity(nn.Module):
    """Images compete for places, without a gradient that would show it."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = SmoothNet(), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x)
        taken = torch.full((len(h), 1), 0.5, dtype=h.dtype)
        taken[-1 - len(h) // 3 :] = 1  # the last in the batch have places
        logits: Tensor = self.head((h * taken).tanh())
        return logits


@pytest.mark.parametrize("seed", range(3))
def test_of_three_images_each_two_are_looked_at(seed: int) -> None:
    torch.manual_seed(seed)
    model, (x, mask, target) = Capacity().double(), smooth_batch(3)
    for left_out in range(3):
        annotated = torch.arange(3) != left_out
        whole = TERM.evaluate(model, x, mask, target, annotated=annotated).total
        torch.testing.assert_close(TERM(model, x, mask, target, annotated=annotated), whole, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["a mean without gradient", "the largest value without gradient", "fake quantisation"])
def test_of_two_images_each_is_looked_at(name: str) -> None:
    model, (x, mask, target) = Meets(name), smooth_batch(6)
    for images in (2, 2, 6):  # what two have shown counts for more, too
        annotated = torch.arange(images) % 2 == 0
        arguments = model, x[:images], mask[:images], target[:images]
        whole = TERM.evaluate(*arguments, annotated=annotated).total
        torch.testing.assert_close(TERM(*arguments, annotated=annotated), whole, rtol=1e-12, atol=0)


class Normalised(SmoothNet):
    """Normalises by the batch, which no module tells."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.batch_norm(x, None, None, training=True))


def test_what_a_penalty_has_shown_does_not_count_for_maps() -> None:
    """Its operator normalises each place by itself, PyTorch's all of them together."""
    model, (x, mask, target) = Normalised().double(), smooth_batch(3)
    one, all_at_once = (attrreg.IntegratedGradients(steps=4, chunk=chunk, objective=SquaredOutside()) for chunk in (1, None))
    want = one.attribute(model, x, target)
    for _ in range(2):
        torch.testing.assert_close(all_at_once(model, x, mask, target), one(model, x, mask, target), rtol=1e-12, atol=0)
    for _ in range(3):
        torch.testing.assert_close(all_at_once.attribute(model, x, target), want)


@pytest.mark.parametrize("name", MEETINGS)
def test_all_images_take_part(name: str) -> None:
    model, (x, mask, target) = Meets(name), smooth_batch(6)
    whole = TERM.evaluate(model, x, mask, target, annotated=ANNOTATED).total
    for _ in range(9):
        value = TERM(model, x, mask, target, annotated=ANNOTATED)
        torch.testing.assert_close(value, whole, rtol=1e-12, atol=0)
    assert_close(gradients(model, value), gradients(model, whole), 1e-10)


@pytest.mark.parametrize("name", MEETINGS)
def test_places_of_a_path_do_not_share_a_batch(name: str) -> None:
    model, (x, mask, target) = Meets(name), smooth_batch(6)
    one, all_at_once = (attrreg.IntegratedGradients(steps=8, chunk=chunk, objective=SquaredOutside()) for chunk in (1, None))
    want = one(model, x, mask, target)
    for _ in range(3):
        torch.testing.assert_close(all_at_once(model, x, mask, target), want, rtol=1e-12, atol=0)


def beside(h: Tensor) -> Tensor:
    return h + 0.3 * h.flip(0)


CHANGES: dict[str, Callable[[Any], object]] = {
    "a hook": lambda model: model.body.register_forward_hook(lambda module, args, output: beside(output)),
    "a hook before": lambda model: model.body.register_forward_pre_hook(lambda module, args: beside(*args)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_hook_that_lets_images_meet_is_noticed(change: str) -> None:
    model, (x, mask, target) = SmoothNet().double(), smooth_batch(6)
    for _ in range(5):
        TERM(model, x, mask, target, annotated=ANNOTATED)
    CHANGES[change](model)
    whole = TERM.evaluate(model, x, mask, target, annotated=ANNOTATED).total
    torch.testing.assert_close(TERM(model, x, mask, target, annotated=ANNOTATED), whole, rtol=1e-12, atol=0)


class OfSix(SmoothNet):
    """Knows how many images it gets."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.zeros(6, 3, dtype=x.dtype)


def test_a_model_of_a_fixed_number_of_images_gets_all() -> None:
    model, (x, mask, target) = OfSix().double(), smooth_batch(6)
    value = TERM(model, x, mask, target, annotated=ANNOTATED)
    torch.testing.assert_close(value, TERM.evaluate(model, x, mask, target, annotated=ANNOTATED).total, rtol=1e-12, atol=0)


def test_a_head_that_starts_at_zero_does_not_end_the_search() -> None:
    model, (x, mask, target) = Meets("pairs of neighbours"), smooth_batch(6)
    weight = model.head.weight.detach().clone()
    nn.init.zeros_(model.head.weight)
    TERM(model, x, mask, target, annotated=ANNOTATED)
    with torch.no_grad():
        model.head.weight.copy_(weight)
    whole = TERM.evaluate(model, x, mask, target, annotated=ANNOTATED).total
    for _ in range(8):
        torch.testing.assert_close(TERM(model, x, mask, target, annotated=ANNOTATED), whole, rtol=1e-12, atol=0)


class Pair(SmoothNet):
    """One image reads another; and dropout, so that no half can be run alone to compare."""

    def __init__(self, reader: int, read: int) -> None:
        super().__init__(dropout=0.2)
        self.reader, self.read = reader, read
        self.sizes: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.append(len(x))
        logits: Tensor = super().forward(x)
        return logits + (torch.arange(len(x)) == self.reader)[:, None] * logits[self.read % len(x)]


@pytest.mark.parametrize(("reader", "read"), [(i, j) for i in range(6) for j in range(6) if i != j])
def test_any_pair_is_found_at_once_and_not_forgotten(reader: int, read: int) -> None:
    model, (x, mask, target) = Pair(reader, read).double(), smooth_batch(6)
    for _ in range(20 if reader == 0 else 1):
        TERM(model, x, mask, target, annotated=ANNOTATED)
    assert set(model.sizes) == {6}


def test_a_call_that_fails_shows_nothing() -> None:
    model, (x, mask, target) = SmoothNet().double(), smooth_batch(6)
    with pytest.raises(RuntimeError, match="channels"):
        TERM(model, x[:, :1], mask, target, annotated=ANNOTATED)
    sizes: list[int] = []
    model.stem.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    for _ in range(3):
        TERM(model, x, mask, target, annotated=ANNOTATED)
    assert sizes[-1] == int(ANNOTATED.sum())


def test_places_are_looked_at_in_turn() -> None:
    model, (x, mask, target) = SmoothNet().double(), smooth_batch(3)
    regularizer, seen = attrreg.IntegratedGradients(steps=4, chunk=None, objective=SquaredOutside()), []
    model.stem.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()) if len(args[0]) == 3 else None)
    for _ in range(64):
        regularizer(model, x, mask, target)
    shares = {round(float((images / x).mean()), 6) for images in seen}
    assert len(shares) == 4  # each place was run alone at some call


@pytest.mark.parametrize("largest", range(6))
def test_a_value_of_one_image_by_which_all_are_divided(largest: int) -> None:
    model, (x, mask, target) = Meets("the largest value without gradient"), smooth_batch(6)
    x = x * torch.where(torch.arange(6) == largest, 9, 1).view(-1, 1, 1, 1)
    value = TERM(model, x, mask, target, annotated=ANNOTATED)
    torch.testing.assert_close(value, TERM.evaluate(model, x, mask, target, annotated=ANNOTATED).total, rtol=1e-12, atol=0)


def test_an_image_that_is_all_relevant_moves_with_the_batch() -> None:
    """Its features differ between the passes where batch normalisation sees the others' fills: that is no rounding."""
    model, (x, mask, _) = SmoothNet(norm=True).double(), smooth_batch()
    mask[0] = 1
    term = attrreg.ActivationDifference("body", baselines.Zero())
    seen: list[Tensor] = []
    hook = model.body.register_forward_hook(lambda module, args, output: seen.append(output))
    model(x), model(x * mask.unsqueeze(1))
    hook.remove()
    want = (seen[0] - seen[1]).flatten(1).norm(dim=1)
    assert want[0] > 0.01
    torch.testing.assert_close(term(model, x, mask), want.mean())


@pytest.mark.parametrize("detach", ["clean", "masked"])
def test_what_rounding_leaves_of_an_image_that_is_all_relevant_has_no_gradient(detach: Any) -> None:
    """In a sum with a term that takes gradients the two passes run on different operators; images meet only behind the layer."""
    model = nn.Sequential(
        nn.Conv2d(2, 8, 3), nn.SiLU(), nn.GroupNorm(2, 8), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 3)
    )
    x, mask, target = smooth_batch()
    mask[0] = 1
    term = attrreg.ActivationDifference("2", baselines.Zero(), detach=detach)
    body = model.double()[:3]
    clean, masked = body(x), body(x * mask.unsqueeze(1))
    clean, masked = (clean.detach(), masked) if detach == "clean" else (clean, masked.detach())
    want = (clean[1:] - masked[1:]).flatten(1).norm(dim=1).sum() / 3
    found = gradients(model, (term + 0.0 * attrreg.InputGradient())(model, x, mask, target))
    assert_close(found, gradients(model, want), 1e-10)
