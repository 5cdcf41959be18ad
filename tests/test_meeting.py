"""Models whose images meet where no gradient shows it, or only some: they are not taken apart."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import attrreg
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


def test_a_hook_that_lets_images_meet_is_noticed() -> None:
    model, (x, mask, target) = SmoothNet().double(), smooth_batch(6)
    for _ in range(5):
        TERM(model, x, mask, target, annotated=ANNOTATED)
    model.body.register_forward_hook(lambda module, args, output: output + 0.3 * output.flip(0))
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
