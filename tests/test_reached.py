"""What a score reaches and what it does not: auxiliary heads, other inputs, detached and checkpointed parts."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import attrreg
from attrreg.regularizer import AttributionRegularizer
from attrreg.trace import passes
from tests.models import WAYS, SmoothNet, assert_close, batch, gradients, loss_by, smooth_batch
from tests.test_side_effects import assert_same, snapshot

ZERO = attrreg.baselines.Zero()


class WithAuxiliary(nn.Module):
    """An auxiliary head that runs last, on maps of the backbone."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.body = nn.Conv2d(4, 5, 3, padding=1)
        self.head = nn.Linear(5, 3)
        self.aux = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.Tanh(), nn.Conv2d(6, 3, 1))

    def forward(self, x: Tensor) -> Any:
        stem = self.stem(x).tanh()
        logits = self.head(self.body(stem).tanh().mean(dim=(2, 3)))
        return {"out": logits, "aux": self.aux(stem).mean(dim=(2, 3))}


@pytest.mark.parametrize(("output", "layer"), [("out", "body"), ("aux", "aux")])
def test_the_automatic_layer_is_one_that_the_score_reads(output: str, layer: str) -> None:
    model, (x, mask, target) = WithAuxiliary().double(), smooth_batch()
    regularizer = attrreg.GradCAM()
    want = attrreg.GradCAM(layer)(model, x, mask, target, output=output)
    torch.testing.assert_close(regularizer(model, x, mask, target, output=output), want)
    with regularizer.attach(model) as handle:
        for _ in range(2):
            model(x)
            torch.testing.assert_close(regularizer(model, x, mask, target, output=output), want)
    assert handle.map == layer


@pytest.mark.parametrize("output", ["out", "aux", lambda given: given["out"]])
def test_the_features_are_of_the_head_that_makes_the_logits(output: Any) -> None:
    model, (x, mask, _) = WithAuxiliary().double(), smooth_batch()
    regularizer = attrreg.ActivationDifference(fill=ZERO)
    masked = torch.where(mask[:, None], x, 0)

    def features(x: Tensor) -> Any:
        stem = model.stem(x).tanh()
        return model.body(stem).tanh().mean(dim=(2, 3)) if output != "aux" else model.aux[1](model.aux[0](stem)).flatten(1)

    want = (features(x) - features(masked)).norm(dim=1).mean()
    got = regularizer(model, x, mask, output=output)
    torch.testing.assert_close(got, want)
    assert_close(gradients(model, got), gradients(model, want), 1e-10)
    with regularizer.attach(model):
        model(x)
        torch.testing.assert_close(regularizer(model, x, mask, output=output), want)


class LateFusion(nn.Module):
    """Adds logits of other data to those of the image."""

    def __init__(self) -> None:
        super().__init__()
        self.net = SmoothNet()
        self.other = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))

    def forward(self, x: Tensor, data: Tensor) -> Any:
        return self.net(x) + self.other(data)


def test_features_of_other_inputs_are_refused() -> None:
    model, (x, mask, _) = LateFusion().double(), smooth_batch()
    data = torch.randn(3, 6, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"come from other inputs than the images.*Name a layer that the images reach"):
        attrreg.ActivationDifference(fill=ZERO)(model, x, mask, inputs=(x, data))
    assert attrreg.ActivationDifference("net.body", fill=ZERO)(model, x, mask, inputs=(x, data)) > 0
    nothing = attrreg.ActivationDifference(fill=ZERO)(model, x, torch.ones_like(mask), inputs=(x, data))
    assert nothing == 0  # all is relevant: nothing to tell apart


@pytest.mark.parametrize(
    ("regularizer", "outcome"),
    [
        (attrreg.GradCAM(), nullcontext()),
        (attrreg.ActivationDifference(fill=ZERO), pytest.raises(RuntimeError, match="come from other inputs")),
    ],
)
def test_asking_what_the_images_reach_leaves_nothing_behind(regularizer: AttributionRegularizer, outcome: Any) -> None:
    model, (x, mask, target) = LateFusion().double(), smooth_batch()
    model.net, data = SmoothNet(norm=True, dropout=0.5).double(), torch.randn(3, 6, dtype=torch.float64)
    before = snapshot(model, x)
    with outcome:
        regularizer(model, x, mask, target, inputs=(x, data))
    assert_same(before, snapshot(model, x))


class Text(nn.Module):
    """Reads words beside the image, by attention: two ways to compute it differ by rounding."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.text = SmoothNet(), nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.head = nn.Linear(32, 3)

    def forward(self, x: Tensor, words: Tensor) -> Any:
        return self.net(x) + self.head(self.text(words).mean(1))


@pytest.mark.parametrize("other", [attrreg.InputGradient(), attrreg.GradCAM("net.body")])
def test_features_of_other_inputs_are_refused_in_a_sum(other: AttributionRegularizer) -> None:
    model, (x, mask, target) = Text(), batch(3, channels=2, size=8, classes=3)
    words = torch.randn(3, 20, 32)
    for regularizer in (attrreg.ActivationDifference("text", ZERO), other + attrreg.ActivationDifference("text", ZERO)):
        with pytest.raises(RuntimeError, match=r"\('text',\).*come from other inputs than the images.*Name a layer that the images reach"):
            regularizer(model, x, mask, target, inputs=(x, words))


@pytest.mark.parametrize("heads", ["functions", "modules"])
def test_what_one_output_shows_is_not_known_of_another(heads: str) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.images, self.words = nn.Linear(128, 6), nn.Linear(5, 6)
            self.a, self.b = nn.Linear(6, 3), nn.Linear(6, 3)

        def forward(self, x: Tensor, words: Tensor) -> dict[str, Tensor]:
            return {"a": self.a(self.images(x.flatten(1)).tanh()), "b": self.b(self.words(words).tanh())}

    class First(nn.Module):
        def forward(self, out: dict[str, Tensor]) -> Tensor:
            return 1 * out["a"]

    class Second(nn.Module):
        def forward(self, out: dict[str, Tensor]) -> Tensor:
            return 1 * out["b"]

    model, (x, mask, target), words = Two().double(), smooth_batch(), torch.randn(3, 5, dtype=torch.float64)
    functions: tuple[Any, Any] = (lambda out: torch.clone(out["a"]), lambda out: torch.clone(out["b"]))
    first, second = functions if heads == "functions" else (First(), Second())
    near, regularizer = x * (1e-3 + 0.999 * mask[:, None]), attrreg.ActivationDifference(fill=ZERO)
    regularizer(model, near, mask, target, inputs=(near, words), output=first)
    with pytest.raises(RuntimeError, match="come from other inputs than the images"):
        regularizer(model, x, mask, target, inputs=(x, words), output=second)


def test_rounding_is_no_difference() -> None:
    model, (x, mask, target) = timm.create_model("test_vit", img_size=64, num_classes=3), batch(4, size=64, classes=3)
    mask[0] = True
    regularizer = 0.0 * attrreg.InputGradient() + attrreg.ActivationDifference(detach="clean")
    nothing = regularizer(model, x, torch.ones_like(mask), target)
    assert nothing == 0 and not any(gradient.any() for gradient in gradients(model, nothing))
    both, second = (
        regularizer(model, x, mask, target, annotated=torch.tensor(annotated), generator=torch.Generator().manual_seed(0))
        for annotated in ([True, True, False, False], [False, True, False, False])
    )
    torch.testing.assert_close(both, second / 2)
    assert_close(gradients(model, both), gradients(model, second / 2), 1e-4)


def test_an_unchanged_image_differs_where_batch_norm_couples_it_to_changed_ones() -> None:
    model, (x, mask, target) = SmoothNet(norm=True).double(), smooth_batch()
    mask[0] = True
    regularizer = 0.0 * attrreg.InputGradient() + attrreg.ActivationDifference("body", ZERO)
    with torch.no_grad():
        layers = nn.Sequential(model.stem, model.norm, model.act, model.body)
        want = (layers(x) - layers(torch.where(mask[:, None], x, 0))).flatten(1).norm(dim=1).mean()
    torch.testing.assert_close(regularizer(model, x, mask, target).detach(), want)


def test_small_differences_count_and_are_checked_once() -> None:
    model, (x, mask, target) = SmoothNet().double(), smooth_batch()
    x = torch.where(mask[:, None], x, 1e-9 * x)
    regularizer = 0.0 * attrreg.InputGradient() + attrreg.ActivationDifference("body", ZERO, detach="clean")
    layers = nn.Sequential(model.stem, model.act, model.body)
    with torch.no_grad():
        clean = layers(x)
    want = (clean - layers(torch.where(mask[:, None], x, 0))).flatten(1).norm(dim=1).mean()
    slopes = gradients(model, want)
    for looks in (1, 0):
        with passes() as counted:
            value = regularizer(model, x, mask, target)
        assert (counted.forward, counted.checks) == (2, looks)
        torch.testing.assert_close(value, want, rtol=1e-4, atol=0)
        assert_close(gradients(model, value), slopes, 1e-4)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.unused = SmoothNet(), nn.Conv2d(2, 2, 1)

    def forward(self, x: Tensor) -> Any:
        return self.net(x) + self.net(x.flip(3))


class Detaches(SmoothNet):
    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(self.act(self.stem(x))).detach().mean(dim=(2, 3)))
        return logits


class DetachesLogits(SmoothNet):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).detach()


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 2))

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3)) @ self.weight.T


class Reentrant(SmoothNet):
    """Reentrant checkpoints behind the stem, or from the images on."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.first = first

    def forward(self, x: Tensor) -> Tensor:
        stem = checkpoint(self.stem, x, use_reentrant=True) if self.first else self.stem(x)
        body = checkpoint(self.body, stem, use_reentrant=True)
        logits: Tensor = self.head(F.silu(body).mean(dim=(2, 3)))
        return logits


class Recurrent(nn.Module):
    """A layer with a tuple for its output."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.rnn = nn.Conv2d(2, 4, 3), nn.GRU(4, 3, batch_first=True)

    def forward(self, x: Tensor) -> Any:
        return self.rnn(self.stem(x).flatten(2).mT)[1][0]


class Unread(nn.Module):
    """A class token, read alone, that no patch ever reaches."""

    num_prefix_tokens = 1

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.block, self.head = nn.Conv2d(2, 6, 2, 2), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Any:
        token = x.mean((2, 3)).repeat(1, 3)[:, None]
        return self.head(self.block(torch.cat((token, self.patches(x).flatten(2).mT), 1)).tanh()[:, 0])


REENTRANT = "use_reentrant=True.*[Uu]se torch.utils.checkpoint with use_reentrant=False"
BAD: list[tuple[Callable[[], nn.Module], AttributionRegularizer, type[Exception], str]] = [
    (Twice, attrreg.GradCAM(), ValueError, "every layer with a map ran more than once.*Let the model run once"),
    (Twice, attrreg.GradCAM("net.act"), ValueError, r"'net\.act' ran more than once.*\. "),
    (Twice, attrreg.GradCAM("unused"), ValueError, r"'unused' did not run.*\. "),
    (Detaches, attrreg.InputGradient(), RuntimeError, "does not depend on the images: .*detaches.*Let gradients through"),
    (Detaches, attrreg.IntegratedGradients(2), RuntimeError, "does not depend on the images: .*Let gradients through"),
    (Detaches, attrreg.GradCAM(), RuntimeError, "does not depend on any layer with a spatial map: .*Let gradients through"),
    (Detaches, attrreg.GradCAM("body"), RuntimeError, "does not depend on layer 'body'.*Name a layer between"),
    (DetachesLogits, attrreg.InputGradient(), RuntimeError, r"output carries no gradient.*\. "),
    (
        DetachesLogits,
        attrreg.captum.FeatureAblation(torch.arange(8) // 4),
        RuntimeError,
        "no path .*where the forward or an objective detaches",
    ),
    (Unread, attrreg.GradCAM(), RuntimeError, "only a class token. Name an earlier layer"),
    (Recurrent, attrreg.GradCAM("rnn"), ValueError, "'rnn' returned tuple, not a floating-point tensor.*inside it"),
    (Functional, attrreg.ActivationDifference(), ValueError, "No layer ran that may be the classifier.*Name a layer"),
    (Functional, attrreg.GradCAM(), ValueError, "no layer has one. Name a layer"),
    (lambda: Reentrant(False), attrreg.InputGradient(), RuntimeError, REENTRANT),
    (lambda: Reentrant(False), attrreg.GradCAM(), RuntimeError, REENTRANT),
    (lambda: Reentrant(False), attrreg.GradCAM("stem"), RuntimeError, REENTRANT),
    (lambda: Reentrant(False), attrreg.GradCAM("body"), ValueError, f"'body' ran under no_grad.*{REENTRANT}"),
    (lambda: Reentrant(False), attrreg.ActivationDifference("body"), RuntimeError, "no path.*use_reentrant=False"),
    (lambda: Reentrant(True), attrreg.InputGradient(), RuntimeError, REENTRANT),
    (lambda: Reentrant(True), attrreg.GradCAM("stem"), ValueError, REENTRANT),
]


@pytest.mark.parametrize(("build", "regularizer", "kind", "message"), BAD)
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_what_is_not_reached_is_said(
    build: Callable[[], nn.Module], regularizer: AttributionRegularizer, kind: type[Exception], message: str
) -> None:
    model, (x, mask, target) = build().double(), smooth_batch()
    with pytest.raises(kind, match=message):
        regularizer(model, x, mask, target)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


class Normalised(nn.Module):
    """Batch normalisation in checkpointed blocks, one inside another."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.inner = nn.Sequential(nn.BatchNorm2d(4), nn.Tanh())
        self.body = nn.Sequential(nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5), nn.Tanh())
        self.head = nn.Linear(5, 3)

    def _block(self, x: Tensor) -> Any:
        return self.body(checkpoint(self.inner, x, use_reentrant=False))

    def forward(self, x: Tensor) -> Any:
        return self.head(checkpoint(self._block, self.stem(x), use_reentrant=False).mean(dim=(2, 3)))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "regularizer",
    [
        attrreg.InputGradient(),
        attrreg.IntegratedGradients(3),
        attrreg.IntegratedGradients(3, chunk=None),
        attrreg.GradCAM("stem"),
        attrreg.ActivationDifference(fill=ZERO),
        attrreg.InputGradient().using(attrreg.engines.FiniteDifference()),
    ],
)
def test_checkpoints_recompute_without_moving_statistics(regularizer: Any, way: str) -> None:
    x, mask, target = smooth_batch()
    torch.manual_seed(0)
    plain = Normalised().double()
    F.cross_entropy(plain(x), target).backward()  # counts its own recomputation: PyTorch's way
    torch.manual_seed(0)
    model = Normalised().double()
    loss_by(way, regularizer, model, (x, mask, target)).backward()
    for (name, buffer), other in zip(model.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(buffer, other, msg=name)
