"""When it is known that images of a batch, or places of a path, do not depend on each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

import attrreg
from attrreg import baselines, folding
from attrreg.apart import images_apart
from attrreg.call import Call
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


class Centred(SmoothNet):
    """Images meet in the logits, not in the features."""

    def forward(self, x: Tensor) -> Tensor:
        return relative(super().forward(x))


def test_places_that_are_apart_in_the_features_may_meet_in_the_logits() -> None:
    model, (x, mask, target) = Centred().double(), smooth_batch()
    for _ in range(2):
        attrreg.IntegratedGradients(score=attrreg.scores.RandomProjection(), steps=4, chunk=None)(model, x, mask, target)
    found = [path(model, x, mask, target) for path in (WHOLE_PATH, attrreg.IntegratedGradients(steps=4, chunk=1))]
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

    def __init__(self, images: int, error: Exception) -> None:
        super().__init__()
        self.net, self.images, self.error = Watched(SmoothNet()), images, error

    def forward(self, x: Tensor) -> Tensor:
        if len(x) == self.images:
            self.images = 0
            raise self.error
        logits: Tensor = self.net(x)
        return logits


def test_a_memory_of_the_models_own_is_no_lack_of_memory() -> None:
    x, mask, target = smooth_batch(5)
    model = Passing(3, ValueError("3 is out of memory-bank range")).double()
    TERM(model, x, mask, target, annotated=torch.tensor([True, False, True, False, False]))
    assert model.net.seen[-1] == 5  # images are taken to meet


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes. Error code 12 (Cannot allocate memory)"),
    ],
    ids=["cuda", "cublas", "cpu"],
)
def test_a_lack_of_memory_that_passes_says_nothing_of_a_model(error: Exception) -> None:
    x, mask, target = smooth_batch(5)
    annotated = torch.tensor([True, False, True, False, False])
    model = Passing(3, error).double()  # one of the halves that run alone
    with pytest.raises(type(error)):
        TERM(model, x, mask, target, annotated=annotated)
    TERM(model, x, mask, target, annotated=annotated)
    assert model.net.seen[-1] == 2
    model = Passing(4 * len(x), error).double()
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


class Straight(nn.Module):
    """Images meet in gradients alone, as behind a straight-through estimator."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.body(x.mean(3).flatten(1)[:, :8]).tanh()
        total = hidden.square().sum(0)
        logits: Tensor = self.head(hidden + (total - total.detach()))
        return logits


@pytest.mark.parametrize("zero", [False, True])
def test_places_may_meet_in_gradients_alone(zero: bool) -> None:
    model, (x, mask, target) = Straight().double(), smooth_batch()
    if zero:  # shows nothing yet
        weight = model.head.weight.detach().clone()
        nn.init.zeros_(model.head.weight)
        for _ in range(2):
            assert WHOLE_PATH(model, x, mask, target) == 0
        model.head.weight.data.copy_(weight)
    found = [path(model, x, mask, target) for path in (WHOLE_PATH, attrreg.IntegratedGradients(steps=4, chunk=1))]
    torch.testing.assert_close(*found, rtol=1e-10, atol=0)


class Depth(nn.Identity):
    """Stochastic depth as Hugging Face's models have it where none is asked for."""

    drop_prob: float | None = None


class Functional(nn.Module):
    """Dropout that no layer tells of."""

    def forward(self, h: Tensor) -> Tensor:
        return nn.functional.dropout(h, 0.5, self.training)


HEADS = [(lambda: nn.Dropout(0.5), 4), (lambda: nn.Dropout(0.0), 1), (lambda: nn.BatchNorm1d(16), 4), (Depth, 1), (Functional, 5)]


@pytest.mark.parametrize(("layer", "forwards"), HEADS)
def test_a_head_outside_has_modes_of_its_own(layer: Callable[[], nn.Module], forwards: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, (x, _, target) = SmoothNet(classes=16).double(), smooth_batch()
    head = nn.Sequential(layer(), nn.Linear(16, 3)).double().eval()
    for _ in range(2):
        WHOLE_PATH.attribute(model, x, target, output=head)
    head.train()
    found = []
    for expected in (forwards, 4):
        torch.manual_seed(0)
        with passes() as counted:
            found.append(WHOLE_PATH.attribute(model, x, target, output=head))
        assert counted.forward == expected
        monkeypatch.setattr(folding, "budget", lambda device: 1)
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-14)


@dataclass(frozen=True, repr=False)
class Noise(baselines.Baseline):
    def __call__(self, x: Tensor, mask: Tensor | None, generator: torch.Generator) -> Tensor:
        return torch.randn_like(x)


def test_an_own_baseline_that_draws_unsaid_draws_what_it_draws_alone() -> None:
    model, (x, mask, target), found = SmoothNet().double(), smooth_batch(4), []
    for way in (attrreg.ActivationDifference(fill=Noise()), attrreg.ActivationDifference(fill=Noise()).evaluate):
        torch.manual_seed(0)
        value: Any = way(model, x, mask, target, annotated=torch.tensor([False, True, False, False]))
        found.append(getattr(value, "total", value))
    torch.testing.assert_close(*found, rtol=1e-12, atol=0)


class Conditioned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = SmoothNet()

    def forward(self, scale: Tensor, x: Tensor) -> Tensor:
        return scale * self.net(x)  # type: ignore[no-any-return]


def test_other_inputs_keep_all_images_together() -> None:
    model, (x, mask, target) = Conditioned().double(), smooth_batch(4)
    settings: dict[str, Any] = {"annotated": torch.tensor([False, True, False, True]), "inputs": (torch.rand(4, 1).double(), x)}
    want = TERM.evaluate(model, x, mask, target, **settings).total
    torch.testing.assert_close(TERM(model, x, mask, target, **settings), want, rtol=1e-12, atol=0)
    with passes() as counted:
        WHOLE_PATH(model, x, mask, target, **settings)
    assert counted.forward == 4  # and places of a path alone


class Meets(SmoothNet):
    """Images meet where no gradient shows it."""

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        return logits + logits.mean(0).detach()


def test_what_calls_with_inputs_show_is_theirs_alone() -> None:
    model, (x, _, _) = Meets().double(), smooth_batch()
    assert not images_apart(Call(model, x))  # passes on parts of the batch show it
    assert images_apart(Call(model, x, inputs=(x,)))  # where none are run
