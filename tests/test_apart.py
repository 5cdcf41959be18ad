"""When it is known that images of a batch, or places of a path, do not depend on each other."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

import attrreg
from attrreg.trace import passes
from tests.models import SmoothNet, assert_close, gradients, smooth_batch
from tests.test_part import Watched

TERM = attrreg.InputGradient()
WHOLE_PATH = attrreg.IntegratedGradients(steps=4, chunk=None)


def relative(logits: Tensor) -> Tensor:
    """Images meet in what `output=` picks."""
    return 3 * (logits - logits.mean(0))


def test_images_that_are_apart_in_one_output_may_meet_in_another() -> None:
    model, (x, mask, target) = SmoothNet().double(), smooth_batch(4)
    annotated = torch.tensor([True, False, True, False])
    for _ in range(3):  # in one of two calls that take turns it is never shown again
        value = TERM(model, x, mask, target, annotated=annotated, output=relative)
        want = TERM.evaluate(model, x, mask, target, annotated=annotated, output=relative).total
        torch.testing.assert_close(value, want, rtol=1e-10, atol=0)
        TERM(model, x, mask, target, annotated=annotated)


def test_places_that_are_apart_in_one_output_may_meet_in_another() -> None:
    model, (x, mask, target) = SmoothNet().double(), smooth_batch()
    for _ in range(2):
        WHOLE_PATH(model, x, mask, target)
    found = [path(model, x, mask, target, output=relative) for path in (WHOLE_PATH, attrreg.IntegratedGradients(steps=4, chunk=1))]
    torch.testing.assert_close(*found, rtol=1e-10, atol=0)


def test_a_call_that_is_wrong_shows_nothing_of_places() -> None:
    model, (x, mask, target) = SmoothNet().double(), smooth_batch()
    with pytest.raises(ValueError, match="target has the class"):
        WHOLE_PATH(model, x, mask, target + 3)
    with passes() as counted:
        WHOLE_PATH(model, x, mask, target)
    assert counted.forward == 1


class Passing(nn.Module):
    """Memory is short once, for batches of so many images."""

    def __init__(self, images: int) -> None:
        super().__init__()
        self.net, self.images = Watched(SmoothNet()), images

    def forward(self, x: Tensor) -> Tensor:
        if len(x) == self.images:
            self.images = 0
            raise torch.OutOfMemoryError("out of memory")
        logits: Tensor = self.net(x)
        return logits


def test_a_lack_of_memory_that_passes_says_nothing_of_a_model() -> None:
    x, mask, target = smooth_batch(5)
    annotated = torch.tensor([True, False, True, False, False])
    model = Passing(images=3).double()  # one of the halves that run alone
    with pytest.raises(torch.OutOfMemoryError):
        TERM(model, x, mask, target, annotated=annotated)
    TERM(model, x, mask, target, annotated=annotated)
    assert model.net.seen[-1] == 2
    model = Passing(images=4 * len(x)).double()
    forwards = []
    for _ in range(2):
        with passes() as counted:
            WHOLE_PATH(model, x, mask, target)
        forwards.append(counted.forward)
    assert forwards == [5, 1]


NORMS = [lambda: nn.InstanceNorm2d(4), lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True), lambda: FrozenBatchNorm2d(4)]


@pytest.mark.parametrize("norm", NORMS, ids=["instance norm", "with statistics", "frozen batch norm"])
def test_norms_of_each_image_let_none_meet(norm: Callable[[], nn.Module]) -> None:
    layers = [nn.Conv2d(2, 4, 3), norm(), nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3)]
    model, (x, mask, target) = Watched(nn.Sequential(*layers)).double(), smooth_batch(4)
    value = TERM(model, x, mask, target, annotated=torch.tensor([True, False, False, False]))
    assert model.seen == [4, 2, 2, 2]
    alone = TERM(model, x[:1], mask[:1], target[:1])
    torch.testing.assert_close(value, alone, rtol=1e-10, atol=0)
    with passes() as counted:
        together = WHOLE_PATH(model, x, mask, target)
    assert counted.forward == 1
    one_by_one = attrreg.IntegratedGradients(steps=4, chunk=1)(model, x, mask, target)
    torch.testing.assert_close(together, one_by_one, rtol=1e-10, atol=0)
    assert_close(gradients(model, together), gradients(model, one_by_one), 1e-9)
