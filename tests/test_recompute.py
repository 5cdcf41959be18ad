"""Chunked paths run again in the backward: as they ran first, and without freeing what is not theirs."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import attrreg
from tests.models import SmoothNet, accumulated, assert_close, batch, gradients, smooth_batch
from tests.test_held import Prototypes


class Centred(nn.Module):
    """Features about a running mean, which every forward in train mode moves."""

    centre: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(8, 1, 1))

    def forward(self, h: Tensor) -> Tensor:
        result = h - self.centre
        if self.training:
            with torch.no_grad():
                self.centre.lerp_(h.mean((0, 2, 3))[:, None, None], 0.5)
        return result


def net(middle: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(2, 8, 3), middle, nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)).double()


def spectral() -> nn.Module:
    layer = spectral_norm(nn.Conv2d(8, 8, 3, padding=1))
    with torch.no_grad():  # its power iteration, in buffers, has not caught up with the weights
        layer.parametrizations.weight.original.normal_()  # type: ignore[union-attr, operator]
    return layer


@pytest.mark.parametrize("build", [Centred, spectral])
@pytest.mark.parametrize("way", ["evaluate", "attached", "call, then a forward"])
@pytest.mark.parametrize("chunk", [1, 2])
def test_chunks_are_recomputed_from_the_buffers_of_their_first_run(build: Callable[[], nn.Module], way: str, chunk: int) -> None:
    start, (images, mask, target) = net(build()), batch(3, channels=2, size=8, classes=3)
    x = images.double()

    def results(chunk: int | None) -> tuple[Tensor, list[Tensor]]:
        model, regularizer = copy.deepcopy(start), attrreg.IntegratedGradients(steps=4, chunk=chunk)
        if way == "evaluate":
            value = regularizer.evaluate(model, x, mask, target).total
        elif way == "attached":
            with regularizer.attach(model):
                model(x)
                value = regularizer(model, x, mask, target)
        else:
            value = regularizer(model, x, mask, target)
        if way == "call, then a forward":
            model(x)
        return value, gradients(model, value)

    (value, found), (expected, want) = results(chunk), results(None)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    assert_close(found, want, 1e-10)


class Checkpointed(nn.Sequential):
    def forward(self, h: Tensor) -> Tensor:
        result: Tensor = checkpoint(super().forward, h, use_reentrant=False)
        return result


@pytest.mark.parametrize("chunk", [1, 2])
def test_checkpointed_blocks_run_from_the_same_buffers(chunk: int) -> None:
    x, mask, target = batch(3, channels=2, size=8, classes=3)
    found = []
    for around in (nn.Sequential, Checkpointed):
        torch.manual_seed(0)
        model = net(around(Centred(), nn.SiLU()))
        value = attrreg.IntegratedGradients(steps=4, chunk=chunk)(model, x.double(), mask, target)
        model(x.double())
        found.append([value, *gradients(model, value)])
    assert_close(found[1], found[0], 1e-10)


class Given(nn.Module):
    """A convolution whose weight comes from elsewhere."""

    held: Any

    def forward(self, h: Tensor) -> Tensor:
        (weight,) = tree_leaves(self.held)
        return F.conv2d(h, weight)


HELD: dict[str, Callable[[Tensor], Any]] = {
    "by itself": lambda weight: weight,
    "in a list": lambda weight: [weight],
    "in a mapping": lambda weight: {"weight": weight},
}


@pytest.mark.parametrize("owner", ["the model", "somebody else"])
@pytest.mark.parametrize("held", HELD)
def test_chunks_leave_the_graph_of_weights_made_elsewhere(owner: str, held: str) -> None:
    given, code = Given(), nn.Parameter(torch.randn(8, 8, 1, 1).double())
    model, (x, mask, target) = net(given), batch(3, channels=2, size=8, classes=3)
    if owner == "the model":
        model.register_parameter("code", code)
    found = []
    for chunk in (None, 1):
        given.held = HELD[held]((2 * code).tanh())
        loss = F.cross_entropy(model(x.double()), target)
        loss = loss + attrreg.IntegratedGradients(steps=3, chunk=chunk)(model, x.double(), mask, target)
        loss.backward()
        found.append([parameter.grad.clone() for parameter in [*model.parameters(), code] if parameter.grad is not None])
        model.zero_grad()
        code.grad = None
    assert_close(found[1], found[0], 1e-10)


class Conditioned(nn.Module):
    """Features are scaled by another input, which a layer of its own may make."""

    def __init__(self) -> None:
        super().__init__()
        self.maker, self.conv, self.head = nn.Linear(4, 8), nn.Conv2d(2, 8, 3), nn.Linear(8, 3)

    def forward(self, x: Tensor, gains: Tensor) -> Tensor:
        logits: Tensor = self.head((self.conv(x) * gains[:, :, None, None]).tanh().mean((2, 3)))
        return logits


def test_chunks_leave_the_graph_of_inputs_made_elsewhere() -> None:
    model, (x, mask, target), codes = Conditioned().double(), smooth_batch(), torch.randn(3, 4, dtype=torch.float64)
    found = []
    for chunk in (None, 1):
        gains = model.maker(codes).tanh()
        loss = F.cross_entropy(model(x, gains), target)
        (loss + attrreg.IntegratedGradients(steps=3, chunk=chunk)(model, x, mask, target, inputs=(x, gains))).backward()
        found.append(accumulated(model))
        model.zero_grad()
    assert_close(found[1], found[0], 1e-10)


def test_chunks_leave_the_graph_of_what_an_output_reads() -> None:
    model, (x, mask, target) = SmoothNet(classes=8).double(), smooth_batch()
    maker, codes, found = nn.Linear(4, 8).double(), torch.randn(3, 4, dtype=torch.float64), []
    for chunk in (None, 1):
        prototypes = maker(codes).tanh()

        def read(features: Tensor, prototypes: Tensor = prototypes) -> Tensor:
            return features @ prototypes.mT

        penalty = attrreg.IntegratedGradients(steps=3, chunk=chunk)(model, x, mask, target, output=read)
        (F.cross_entropy(read(model(x)), target) + penalty).backward()
        found.append(accumulated(nn.ModuleList([model, maker])))
        model.zero_grad()
        maker.zero_grad()
    assert_close(found[1], found[0], 1e-10)


def test_inputs_that_are_refilled_before_the_backward_are_refused() -> None:
    model, (x, mask, target), gains = Conditioned().double(), smooth_batch(), torch.ones(3, 8, dtype=torch.float64)
    value = attrreg.IntegratedGradients(steps=3, chunk=1)(model, x, mask, target, inputs={"x": x, "gains": gains})
    gains.fill_(2.0)
    with pytest.raises(RuntimeError, match=r"inputs were written to between the penalty and its backward.*copies in inputs="):
        value.backward()


@pytest.mark.parametrize("way", ["integrated", "expected"])
def test_hooks_of_parameters_are_shown_the_whole_gradient_once(way: str) -> None:
    found = []
    for chunk in (None, 1):
        torch.manual_seed(0)
        model, (x, mask, target) = net(nn.Conv2d(8, 8, 3)), batch(3, channels=2, size=8, classes=3)
        seen: list[Tensor] = []
        weight = next(model.parameters())

        def shrink(gradient: Tensor, seen: list[Tensor] = seen) -> Tensor:
            seen.append(gradient)
            return 0.1 * gradient

        weight.register_hook(shrink)
        reg = attrreg.IntegratedGradients(3, chunk=chunk) if way == "integrated" else attrreg.ExpectedGradients(3, chunk=chunk)
        reg(model, x.double(), mask, target, generator=torch.Generator().manual_seed(0)).backward()
        assert len(seen) == 1 and weight._backward_hooks is not None
        found.append(accumulated(model))
    assert_close(found[1], found[0], 1e-10)


def test_weights_that_are_cached() -> None:
    model, (x, mask, target) = net(weight_norm(nn.Conv2d(8, 8, 3))), batch(3, channels=2, size=8, classes=3)
    found = []
    for chunk in (None, 1):
        with parametrize.cached():
            loss = F.cross_entropy(model(x.double()), target)
            (loss + attrreg.IntegratedGradients(steps=3, chunk=chunk)(model, x.double(), mask, target)).backward()
        found.append(accumulated(model))
        model.zero_grad()
    assert_close(found[1], found[0], 1e-10)


def test_chunks_are_right_under_save_on_cpu() -> None:
    model, (x, mask, target) = net(nn.Identity()), batch(2, channels=2, size=8, classes=3)
    x, regularizer, seen = x.double(), attrreg.IntegratedGradients(steps=3, chunk=1), []
    want = gradients(model, regularizer(model, x, mask, target))

    def smaller(gradient: Tensor) -> Tensor:
        seen.append(1)
        return gradient * 0.1

    handle = next(model.parameters()).register_hook(smaller)
    with torch.autograd.graph.save_on_cpu():
        value = regularizer(model, x, mask, target)
    value.backward()
    found = [torch.zeros_like(parameter) if parameter.grad is None else parameter.grad for parameter in model.parameters()]
    assert len(seen) == 1
    assert_close(found, [want[0] * 0.1, *want[1:]], 1e-10)
    handle.remove()
    for context in (torch.autograd.graph.save_on_cpu(), contextlib.nullcontext()):
        with context:
            value = regularizer(model, x, mask, target)
        for weight in (next(model.parameters()), list(model.parameters())[-1]):  # the last: a bias, that no input gradient is a function of
            with torch.no_grad():
                weight.add_(0.1)
            with pytest.raises(RuntimeError, match=r"Parameters were changed between the penalty and its backward.*chunk=None"):
                value.backward()
            value = regularizer(model, x, mask, target)


@dataclass(frozen=True, repr=False)
class Undeclared(attrreg.scores.Score):
    """Draws without a word."""

    def __call__(self, value: Tensor, target: Tensor | None) -> Tensor:
        return F.dropout(value, 0.5).sum(1)


def test_a_score_that_draws_without_a_word_is_not_recomputed() -> None:
    model, (x, mask, _) = net(nn.Identity()), batch(2, channels=2, size=8, classes=3)
    with pytest.raises(ValueError, match=r"draws random numbers.*draws = True.*chunk=None"):
        attrreg.IntegratedGradients(score=Undeclared(), steps=3, chunk=1)(model, x.double(), mask)
    assert attrreg.IntegratedGradients(score=Undeclared(), steps=3, chunk=None)(model, x.double(), mask).isfinite()


def test_labels_may_be_refilled_before_the_backward() -> None:
    model, (x, mask, target) = SmoothNet().double(), smooth_batch()
    reg, labels = attrreg.IntegratedGradients(steps=4), target.clone()
    value = reg(model, x, mask, labels)
    labels.copy_((target + 1) % 3)
    assert_close(gradients(model, value), gradients(model, reg(model, x, mask, target)), 1e-10)


class Routed(nn.Module):
    """Dark images go to one expert, bright ones to the other, as in sparse mixtures."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(128, 6), nn.Tanh(), nn.Linear(6, 3)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(1)
        route, logits = (rows.mean(1) > 0.25).long(), rows.new_zeros(len(rows), 3)
        for number, expert in enumerate(self.experts):
            hit = (route == number).nonzero().squeeze(1)
            if len(hit):
                logits = logits.index_add(0, hit, expert(rows[hit]))
        return logits


@pytest.mark.parametrize("chunk", [1, 3])
def test_chunked_paths_train_what_later_places_alone_use(chunk: int) -> None:
    model, (x, mask, target) = Routed().double(), smooth_batch()
    x = x.abs()
    shown: list[Tensor] = []
    dict(model.named_parameters())["experts.1.2.bias"].register_hook(shown.append)
    want = gradients(model, attrreg.IntegratedGradients(8, chunk=None)(model, x, mask, target))
    assert want[0].any() and want[4].any()
    attrreg.IntegratedGradients(8, chunk=chunk)(model, x, mask, target).backward()
    assert_close([torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()], want, 1e-10)
    assert shown and all(isinstance(gradient, Tensor) for gradient in shown)


def test_a_leaf_frozen_before_a_chunked_backward_gets_nothing() -> None:
    model, (x, mask, target) = SmoothNet().double(), smooth_batch()
    want = gradients(model, attrreg.IntegratedGradients(4)(model, x, mask, target))
    value = attrreg.IntegratedGradients(4)(model, x, mask, target)
    model.stem.weight.requires_grad_(False)
    value.backward()
    assert model.stem.weight.grad is None
    torch.testing.assert_close(model.body.weight.grad, want[2])


class Branch(SmoothNet):
    """Decides over the whole batch, with no gradient."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.detach().abs().mean() > 0.5 else x.tanh())


def test_a_decision_over_the_batch_is_noticed_where_places_share_one() -> None:
    model, (x, mask, target) = Branch().double(), smooth_batch()
    want = attrreg.IntegratedGradients(4)(model, x, mask, target)
    torch.testing.assert_close(attrreg.IntegratedGradients(4, chunk=None)(model, x, mask, target), want)


@pytest.mark.parametrize("chunk", [None, 1, 3])
def test_prototypes_may_be_detached_before_a_chunked_backward(chunk: int | None) -> None:
    model, (x, mask, target), codes = Prototypes().double(), smooth_batch(), torch.randn(3, 4, dtype=torch.float64)
    maker, reg = nn.Linear(4, 6).double(), attrreg.IntegratedGradients(4, chunk=chunk)
    whole = nn.ModuleList([model, maker])
    model.prototypes = maker(codes)
    want = gradients(whole, reg(model, x, mask, target))
    model.prototypes = maker(codes)
    value = reg(model, x, mask, target)
    model.prototypes = model.prototypes.detach()
    assert want[-1].any()
    assert_close(gradients(whole, value), want, 1e-10)


def test_maps_go_by_chunks_too() -> None:
    model, (x, _, target) = net(nn.Identity()).eval(), batch(3, channels=2, size=8, classes=3)
    maps, forwards = [], []
    for chunk in (1, None):
        for _ in range(2):  # the first shows whether places share a pass
            with attrreg.trace.passes() as counted:
                maps.append(attrreg.IntegratedGradients(steps=4, chunk=chunk).attribute(model, x.double(), target))
            forwards.append(counted.forward)
    assert forwards[1] == 4 and forwards[3] < 4
    assert_close(maps[1:], maps[:-1], 1e-12)
