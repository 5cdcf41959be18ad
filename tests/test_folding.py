"""Places of a path in one batch: the values and gradients of places one by one, and never where images meet."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import EvoNorm2dB0
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import StochasticDepth

import attrreg
from attrreg import baselines, folding, scores
from attrreg.regularizer import AttributionRegularizer
from attrreg.trace import Passes, passes
from tests.models import DEVICE, SmoothNet, assert_close, batch, gradients


class Mixed(nn.Module):
    """Batch normalisation over something else than the images of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.norm = SmoothNet(), nn.BatchNorm1d(2)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.norm(x.permute(2, 0, 3, 1).flatten(0, 2))  # the height before the batch
        logits: Tensor = self.net(rows.unflatten(0, (x.shape[2], x.shape[0], x.shape[3])).permute(1, 3, 0, 2))
        return logits


class Tokens(nn.Module):
    """Batch normalisation of tokens, the rows of all images together; `first`: those of all images at a place side by side."""

    def __init__(self, size: int = 8, first: bool = False) -> None:
        super().__init__()
        self.first = first
        self.patches, self.project, self.norm = nn.Conv2d(2, 4, size, stride=size), nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.mix, self.head = nn.Conv1d(4, 4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2)
        tokens = self.project(tokens.permute(2, 0, 1) if self.first else tokens.mT)
        tokens = self.norm(tokens.flatten(0, 1)).reshape_as(tokens)
        tokens = tokens.permute(1, 2, 0) if self.first else tokens.mT
        logits: Tensor = self.head(F.silu(self.mix(F.silu(tokens))).mean(2))
        return logits


class Dropped(nn.Module):
    """Something that draws, on features `(N, 4, 32, 32)`."""

    def __init__(self, drop: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.stem, self.drop, self.head = nn.Conv2d(2, 4, 3, padding=1), drop, nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        logits: Tensor = self.head(F.silu(self.drop(h * 1) + 0.1 * h).mean((2, 3)))
        return logits


def _batch_in_the_middle(h: Tensor) -> Tensor:
    tokens = h.flatten(2).permute(2, 0, 1)
    return F.dropout(tokens, 0.5).permute(1, 2, 0).reshape(h.shape)


def _checkpointed_dropout(h: Tensor) -> Tensor:
    result: Tensor = checkpoint(lambda h: F.dropout(F.silu(h), 0.5), h, use_reentrant=False)
    return result


class Custom(nn.Module):
    """A normalisation of somebody's own, by running statistics of which we know nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.net = SmoothNet()
        self.register_buffer("running_scale", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x / x.square().mean().sqrt())
        return logits


def evolved() -> nn.Module:
    return nn.Sequential(EvoNorm2dB0(2), SmoothNet())


def _normalised(h: Tensor) -> Tensor:
    """In train mode, by the batch alone."""
    normalised = F.batch_norm(h, None, None, training=True)
    assert normalised.stride() == h.stride()
    return normalised


def checkpointed() -> Any:
    model = timm.create_model("test_resnet", num_classes=3, in_chans=2)
    model.set_grad_checkpointing()
    return model


OTHER_SCORE = attrreg.IntegratedGradients(score=scores.SumLogProb(), steps=3, chunk=None).named("other")
# name -> (the model, whether places share a pass)
MODELS: dict[str, tuple[Callable[[], nn.Module], bool]] = {
    "plain": (SmoothNet, True),
    "batch norm": (lambda: SmoothNet(norm=True), True),
    "batch norm in eval mode": (lambda: SmoothNet(norm=True).eval(), True),
    "a residual net": (lambda: timm.create_model("test_resnet", num_classes=3, in_chans=2), True),
    "a checkpointed net": (checkpointed, True),
    "a transformer": (lambda: timm.create_model("test_vit", num_classes=3, in_chans=2, img_size=32), True),
    "dropout": (lambda: SmoothNet(dropout=0.5), True),
    "dropout in eval mode": (lambda: SmoothNet(dropout=0.5).eval(), True),
    "dropout of as many channels as rows": (lambda: Dropped(lambda h: F.dropout2d(h.repeat(1, 3, 1, 1), 0.5)[:, :4]), True),
    "dropout in place": (lambda: Dropped(lambda h: F.dropout(h, 0.5, inplace=True) + h), True),
    "dropout of what no image has": (lambda: Dropped(lambda h: h * F.dropout(torch.ones_like(h[0]), 0.5)), True),
    "a coin for all": (lambda: Dropped(lambda h: h * (h.new_empty(()).bernoulli_(0.5) + 1)), True),
    "dropout in channels last": (lambda: Dropped(lambda h: F.dropout(h.to(memory_format=torch.channels_last), 0.5)), DEVICE == "cpu"),
    "dropout of another kind": (lambda: Dropped(lambda h: F.alpha_dropout(h, 0.5, True)), False),
    "dropout, the batch in the middle": (lambda: Dropped(_batch_in_the_middle), False),
    "dropout, the batch in windows": (lambda: Dropped(lambda h: F.dropout(h.flatten(0, 1), 0.5).unflatten(0, h.shape[:2])), False),
    "noise": (lambda: Dropped(lambda h: h + torch.randn_like(h)), False),
    "stochastic depth": (lambda: timm.create_model("test_vit", num_classes=3, in_chans=2, img_size=32, drop_path_rate=0.5), True),
    "torchvision's stochastic depth": (lambda: Dropped(StochasticDepth(0.5, "row")), True),
    "that of whole batches": (lambda: Dropped(StochasticDepth(0.5, "batch")), True),
    "dropout in attention": (lambda: timm.create_model("test_vit", num_classes=3, in_chans=2, img_size=32, attn_drop_rate=0.5), False),
    "dropout in checkpoints": (lambda: Dropped(_checkpointed_dropout), False),
    "dropout and batch norm": (lambda: SmoothNet(norm=True, dropout=0.5), True),
    "batch norm in channels last": (lambda: Dropped(lambda h: _normalised(h.to(memory_format=torch.channels_last))), True),
    "batch norm of other rows": (Mixed, False),
    "batch norm of tokens": (Tokens, True),
    "batch norm of tokens, these before the batch": (lambda: Tokens(first=True), False),
    "a norm of its own": (Custom, False),
    "evonorm": (evolved, False),
    "a mean over the batch": (lambda: Dropped(lambda h: h - h.mean(0, keepdim=True)), False),
    "its deviation": (lambda: Dropped(lambda h: h + h.std(0).mean()), False),
    "a softmax over the batch": (lambda: Dropped(lambda h: h * h.softmax(0)), False),
    "a number of images in the model": (lambda: Dropped(lambda h: h.view(3, 4, 32, 32)), False),
    "a number for each image": (lambda: Dropped(lambda h: torch.stack([(1.0, 2.0, 3.0)[i] * image for i, image in enumerate(h)])), False),
}
REGULARIZERS: dict[str, AttributionRegularizer] = {
    "integrated gradients": attrreg.IntegratedGradients(steps=4, chunk=None),
    "in chunks": attrreg.IntegratedGradients(steps=5, chunk=3),
    "two scores": attrreg.IntegratedGradients(steps=3, chunk=None) + OTHER_SCORE,
    "random projection": attrreg.IntegratedGradients(score=scores.RandomProjection(), steps=3, chunk=None),
    "expected gradients": attrreg.ExpectedGradients(4, baseline=baselines.Noise(), chunk=None),
}


def results(model: nn.Module, regularizer: AttributionRegularizer) -> tuple[Tensor, list[Tensor], Passes]:
    torch.manual_seed(1)
    x, mask, target = batch(3, channels=2, size=32, classes=3)
    with passes() as counted:
        value = regularizer(model, x.double(), mask, target, generator=torch.Generator().manual_seed(0))
        found = gradients(model, value)
    return value, found, counted


# What a regularizer adds does not depend on how a model draws or couples its images.
WHOLE = ("plain", "batch norm", "dropout", "noise")
PAIRS = [(name, kind) for name in MODELS for kind in REGULARIZERS if name in WHOLE or kind in ("integrated gradients", "in chunks")]


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_places_in_one_batch_equal_places_alone(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    build, shares = MODELS[name]
    torch.manual_seed(0)
    model = build().double()
    value, found, counted = results(model, REGULARIZERS[kind])
    monkeypatch.setattr(folding, "budget", lambda device: 1)
    alone, want, counted_alone = results(model, REGULARIZERS[kind])
    torch.testing.assert_close(value, alone, rtol=1e-12, atol=0)
    assert_close(found, want, 1e-10)
    assert (counted.forward < counted_alone.forward) == shares


@pytest.mark.parametrize("first", [False, True])
def test_as_many_tokens_as_images_at_all_places(first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Tokens(size=8, first=first).double()  # 16 tokens, 4 images at 4 places
    x, mask, target = batch(4, channels=2, size=32, classes=3)
    regularizer, found = attrreg.IntegratedGradients(steps=4, chunk=None), []
    for _ in range(2):
        with passes() as counted:
            found.append(regularizer(model, x.double(), mask, target))
        assert counted.forward > 1  # which axis is the batch is not known
        monkeypatch.setattr(folding, "budget", lambda device: 1)
    torch.testing.assert_close(*found, rtol=1e-12, atol=0)


class DropConnect(nn.Module):
    """Dropout of something with as many rows as the batch of all places."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.net, self.table = SmoothNet(classes=rows), nn.Parameter(torch.randn(rows, 3))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x) @ F.dropout(self.table, 0.5)
        return logits


class MicroBatches(nn.Module):
    """Dropout in parts of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Dropped(lambda h: F.dropout(h, 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.net(part) for part in x.split(3)])


@pytest.mark.parametrize("build", [lambda: DropConnect(12), MicroBatches])
def test_shapes_that_are_mistaken_for_a_batch(build: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    model, regularizer = build().double(), REGULARIZERS["integrated gradients"]
    value, found, counted = results(model, regularizer)
    assert counted == Passes(1 + 1 + 4, 4)  # thrown away, a forward to compare with, each place alone
    _, _, again = results(model, regularizer)
    assert again == Passes(4, 4)  # it is remembered
    monkeypatch.setattr(folding, "budget", lambda device: 1)
    alone, want, _ = results(model, regularizer)
    torch.testing.assert_close(value, alone, rtol=1e-12, atol=0)
    assert_close(found, want, 1e-10)


def test_independence_of_places_is_checked_at_the_first_second_and_fourth_call() -> None:
    model, regularizer = SmoothNet().double(), REGULARIZERS["integrated gradients"]
    assert [results(model, regularizer)[2].checks for _ in range(5)] == [4, 4, 0, 4, 0]  # of two places
    assert [results(model.eval(), regularizer)[2].checks for _ in range(5)] == [4, 4, 0, 4, 0]


class Rows(nn.Module):
    """Batch normalisation of rows of pixels: twelve an image, as many as three images at four places."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.net = nn.BatchNorm2d(2), SmoothNet()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(self.norm(x.permute(2, 1, 0, 3)).permute(2, 1, 0, 3))
        return logits


@pytest.mark.parametrize(
    ("build", "view", "output"),
    [
        (lambda: nn.Sequential(nn.Dropout(0.5), SmoothNet()), lambda x: x.mT, None),
        (SmoothNet, lambda x: x, lambda logits: logits * torch.tensor([[1.0], [2.0], [3.0]]).double()),
        (Rows, lambda x: x, None),
    ],
    ids=["dropout of a transposed view", "an output of so many images", "statistics of as many rows"],
)
def test_images_that_meet_in_this_call_alone(build: Callable[[], nn.Module], view: Callable[[Tensor], Tensor], output: Any) -> None:
    x, mask, target = batch(3, channels=2, size=12, classes=3)
    model, found = build().double(), []
    for chunk in (None, 1):
        torch.manual_seed(1)
        regularizer = attrreg.IntegratedGradients(steps=4, chunk=chunk)
        found.append(regularizer(model, view(x.double()), mask, target, output=output))
    torch.testing.assert_close(*found, rtol=1e-12, atol=0)


def test_a_refusal_is_for_a_models_modes() -> None:
    model, regularizer = Dropped(nn.AlphaDropout(0.5)).double(), REGULARIZERS["integrated gradients"]
    assert [results(model, regularizer)[2].forward for _ in range(2)] == [5, 4]
    assert results(model.eval(), regularizer)[2].forward == 1
    assert results(copy.deepcopy(model).train(), regularizer)[2].forward == 5


def test_maps_in_one_batch() -> None:
    x, _, target = batch(3, channels=2, size=8, classes=3)
    model = SmoothNet(norm=True).double().eval()
    maps = [attrreg.IntegratedGradients(steps=6, chunk=chunk).attribute(model, x.double(), target) for chunk in (None, 1)]
    torch.testing.assert_close(*maps, rtol=1e-12, atol=1e-14)
    with passes() as counted:
        attrreg.IntegratedGradients(steps=6, chunk=None).attribute(model.train(), x.double(), target)
    assert counted.forward == 6  # PyTorch's own operators, which couple the batch


def test_a_pass_holds_no_more_than_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    x, mask, target = batch(2, channels=2, size=8, classes=3)
    monkeypatch.setattr(folding, "budget", lambda device: 3 * x.numel())
    with passes() as counted:
        attrreg.IntegratedGradients(steps=8, chunk=None)(SmoothNet(), x, mask, target)
    assert counted == Passes(3, 3)  # 3 + 3 + 2


def test_statistics_are_the_users_own() -> None:
    x, mask, target = batch(3, channels=2, size=8, classes=3)
    model = SmoothNet(norm=True)
    plain = copy.deepcopy(model)
    with attrreg.IntegratedGradients(steps=4, chunk=None).attach(model):
        model(x)
        attrreg.IntegratedGradients(steps=4, chunk=None)(model, x, mask, target).backward()
    plain(x)
    for got, want in zip(model.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


class OwnNoise(SmoothNet):
    """Draws from a generator of its own, seeded anew in every forward: a function of the images alone."""

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.randn(x.shape, generator=torch.Generator(x.device).manual_seed(0), dtype=x.dtype, device=x.device)
        return super().forward(x + 0.5 * noise)


class ByRow(SmoothNet):
    """Treats the first rows of a batch in another way."""

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        return torch.cat([logits[:2], logits[2:].flip(1)])


def quantized() -> nn.Module:
    from torch.ao import quantization

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PyTorch, about its own package
        observer = quantization.FakeQuantize.with_args(observer=quantization.MovingAverageMinMaxObserver)()
    return nn.Sequential(nn.Conv2d(2, 4, 3), observer, nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))


@pytest.mark.parametrize("build", [OwnNoise, ByRow, quantized])
def test_couplings_without_a_gradient_are_found_by_comparing_values(build: Callable[[], nn.Module]) -> None:
    model, (x, mask, _) = build(), batch(3, channels=2, size=8, classes=3)
    found = []
    for chunk in (1, 2, None):
        regularizer = attrreg.IntegratedGradients(score=scores.TargetLogit(), steps=4, chunk=chunk)
        found.append(regularizer(copy.deepcopy(model), x, mask, torch.zeros(3, dtype=torch.int64)))
    torch.testing.assert_close(found[1:], found[:1] * 2, rtol=1e-5, atol=0)


def test_rounding_that_small_statistics_blow_up_is_no_other_result() -> None:
    def normalised(h: Tensor) -> Tensor:
        h = h if len(h) == 3 else h * (1 + torch.finfo(h.dtype).eps)  # as of a library that has other kernels for other numbers of images
        return F.batch_norm(h.mean((2, 3), keepdim=True), None, None, training=True, eps=1e-12)

    x, mask, target = batch(3, channels=2, size=8, classes=3)
    with passes() as counted:
        REGULARIZERS["integrated gradients"](Dropped(normalised), x[:1] + 1e-5 * x, mask, target)  # so alike that rounding shows
    assert counted.forward == 1
