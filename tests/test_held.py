"""What a model holds, gets or gives besides its parameters, images and logits: graphs in buffers, prompts, heads, what the loop changes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import attrreg
from attrreg import baselines, objectives
from attrreg.trace import passes
from tests.models import FAMILIES, WAYS, SmoothNet, assert_close, batch, gradients, loss_by, nearly_all, smooth_batch

ZERO = baselines.Zero()


class Prototypes(SmoothNet):
    """Logits are likenesses to prototypes, which a network makes for each step."""

    prototypes: Tensor

    def __init__(self) -> None:
        super().__init__(classes=6)
        self.register_buffer("prototypes", torch.zeros(3, 6))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) @ self.prototypes.T


@pytest.mark.parametrize(
    "regularizer",
    [attrreg.InputGradient(), attrreg.ActivationDifference("body", ZERO) + attrreg.GradCAM("body"), attrreg.IntegratedGradients(3)],
)
@pytest.mark.parametrize("way", WAYS)
def test_graphs_of_buffers_lead_on(regularizer: attrreg.AttributionRegularizer, way: str) -> None:
    model, (x, mask, target) = Prototypes().double(), smooth_batch()
    maker, codes = nn.Linear(4, 6).double(), torch.randn(3, 4, dtype=torch.float64)

    class Made(Prototypes):  # the same without a buffer
        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = SmoothNet.forward(self, x) @ maker(codes).T
            return logits

    made = Made().double()
    made.load_state_dict(model.state_dict())
    want = gradients(nn.ModuleList([made, maker]), F.cross_entropy(made(x), target) + regularizer(made, x, mask, target))
    model.prototypes = maker(codes)
    loss = loss_by(way, regularizer, model, (x, mask, target))
    assert_close(gradients(nn.ModuleList([model, maker]), loss), want, 1e-9)


@pytest.mark.parametrize("hold", [lambda prompt: prompt, lambda prompt: [prompt], lambda prompt: {"first": (prompt,)}])
def test_a_frozen_model_may_be_trained_by_what_it_gets_or_holds(hold: Callable[[Tensor], Any]) -> None:
    class Prompted(SmoothNet):
        held: Any = None

        def forward(self, x: Tensor, prompt: Tensor | None = None) -> Tensor:
            return super().forward(x + (tree_leaves(self.held)[0] if prompt is None else prompt))

    model, (x, mask, target), reg = Prompted().double().requires_grad_(False), smooth_batch(), attrreg.InputGradient()
    prompt = torch.zeros(2, 8, 8, dtype=torch.float64, requires_grad=True)
    model.held = hold(prompt.detach())
    with pytest.raises(RuntimeError, match="frozen"):
        reg(model, x, mask, target)
    (given,) = torch.autograd.grad(reg(model, x, mask, target, inputs=(x, prompt)), prompt)
    assert given.any()
    for held in (prompt, 1.0 * prompt):  # a leaf, or made of one
        model.held = hold(held)
        (found,) = torch.autograd.grad(reg(model, x, mask, target), prompt)
        torch.testing.assert_close(found, given)


class Parts(nn.Module):
    """Returns what a loop may write into: logits, features, a map."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Conv2d(4, 5, 3), nn.Identity())
        self.head = nn.Linear(5, 3).requires_grad_(False)
        self.other = nn.Linear(5, 3)  # a later head, of other features

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        map = self.body(x)
        features = map.mean((2, 3))
        return {"logits": self.head(features), "features": features, "map": map, "other": self.other(features.tanh())}


def halve(found: Tensor) -> Tensor:
    return found.mul_(0.5)


@pytest.mark.parametrize(
    ("regularizer", "key", "change", "more"),
    [
        (attrreg.ActivationDifference(fill=ZERO), "features", halve, 1),
        (attrreg.ActivationDifference(fill=ZERO), "features", Tensor.detach_, 1),
        (attrreg.GradCAM(), "map", halve, 1),
        (attrreg.GradCAM(), "map", Tensor.detach_, 1),
        (attrreg.GradCAM("body"), "map", halve, 0),  # the loop got a copy
    ],
)
def test_what_the_loop_changed_is_not_served(
    regularizer: attrreg.AttributionRegularizer, key: str, change: Callable[[Tensor], Tensor], more: int
) -> None:
    model, (x, mask, target) = Parts().double(), smooth_batch()
    want = regularizer(model, x, mask, target, output="logits")
    with regularizer.attach(model), passes() as counted:
        model(x)
        regularizer(model, x, mask, target, output="logits")
        shared = counted.forward
        found = model(x)[key]
        with torch.no_grad():
            change(found)
        value = regularizer(model, x, mask, target, output="logits")
        assert counted.forward == 2 * shared + more
    torch.testing.assert_close(value, want)
    assert_close(gradients(model, value), gradients(model, want), 1e-10)


def test_what_is_not_read_may_be_written_into() -> None:
    class Two(SmoothNet):
        def __init__(self) -> None:
            super().__init__()
            self.aux = nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Any:
            features = self.body(self.act(self.stem(x))).mean((2, 3))
            return self.head(features), self.aux(features)

    model, (x, mask, target), reg = Two().double(), smooth_batch(), attrreg.ActivationDifference(fill=ZERO)
    want = reg(model, x, mask, target, output=0)
    with reg.attach(model), passes() as counted:
        logits, aux = model(x)
        aux *= 0.4
        with torch.no_grad():
            logits /= 2
        value = reg(model, x, mask, target, output=0)
    assert counted.forward == 1
    torch.testing.assert_close(value, want)
    assert_close(gradients(model, value), gradients(model, want), 1e-10)


@pytest.mark.parametrize("regularizer", [attrreg.ActivationDifference(fill=ZERO), attrreg.InputGradient()])
@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize("change", ["written to", "replaced"])
def test_evaluate_gives_what_the_model_returned(regularizer: Any, scheduled: bool, change: str) -> None:
    model, (x, mask, target) = Parts().double(), smooth_batch()
    reg = attrreg.Scheduled(regularizer, attrreg.schedules.Linear(10)) if scheduled else regularizer  # of weight 0 at first
    with reg.attach(model):
        found = model(x)
        want = found["logits"].detach().clone()
        if change == "replaced":
            found["logits"] = found["logits"].log_softmax(1)
        else:
            with torch.no_grad():
                found["logits"] /= 10
        torch.testing.assert_close(reg.evaluate(model, x, mask, target=target, output="logits").output["logits"], want)


def test_a_site_that_was_recorded_without_its_gradient_is_not_taken_for_one_with() -> None:
    """Operators that PyTorch cannot differentiate twice were not replaced before it, and hooks on the images would see the attribution."""
    model = FAMILIES["vit"].build()
    seen: list[Tensor] = []
    x, mask, target = batch(2, size=64, classes=4)
    layer = "blocks.0.norm1"
    with attrreg.ActivationDifference(layer).attach(model):
        loss = F.cross_entropy(model(x), target)
        (loss + attrreg.GradCAM(layer)(model, x, mask, target)).backward()
    x = x.requires_grad_() * 1
    x.register_hook(seen.append)
    with attrreg.GradCAM("blocks.1.norm2").attach(model):
        loss = F.cross_entropy(model(x), target)
        penalty = attrreg.InputGradient()(model, x, mask, target)
        assert not seen
        (loss + penalty).backward()
    assert len(seen) == 1


@pytest.mark.parametrize(
    "regularizer", [attrreg.InputGradient(), attrreg.IntegratedGradients(4), attrreg.IntegratedGradients(4, chunk=None)]
)
def test_a_head_outside_the_model_runs_once_a_pass_and_leaves_nothing(regularizer: attrreg.AttributionRegularizer) -> None:
    model, (x, mask, target) = SmoothNet(classes=6).double(), smooth_batch()
    norm = nn.BatchNorm1d(6)
    head = nn.Sequential(norm, nn.Dropout(0.5), nn.Linear(6, 3)).double()
    whole = nn.Sequential(model, head)
    torch.manual_seed(5)
    want = gradients(whole, regularizer(whole, x, mask, target))
    norm.reset_running_stats()
    state, before = torch.manual_seed(5).get_state(), copy.deepcopy(head.state_dict())
    value = regularizer(model, x, mask, target, output=head)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)  # what a loop draws before it differentiates
    state = torch.get_rng_state()
    found = gradients(whole, value)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(kept, before[name]) for name, kept in head.state_dict().items())
    assert_close(found, want, 1e-9)


@pytest.mark.parametrize("way", WAYS)
def test_a_head_outside_the_model_draws_the_same_in_each_pass(way: str) -> None:
    model, (x, mask, target) = SmoothNet(classes=16).double(), smooth_batch()
    head = nn.Sequential(nn.Dropout(0.5), nn.Linear(16, 3)).double()
    segment = torch.zeros(8, 8, dtype=torch.long)
    same = attrreg.captum.FeatureAblation(segment, baseline=x, objective=objectives.AbsoluteOutside())  # the image in its own place
    call: Any = same.evaluate if way == "evaluate" else same
    with same.attach(model) if way == "attached" else nullcontext():
        head(model(x))  # the loop's own
        value = call(model, x, mask, target, output=head)
    assert float(getattr(value, "total", value).detach()) == pytest.approx(0, abs=1e-12)


def test_features_that_the_loop_wrote_into_do_not_enter_a_head_outside() -> None:
    model, head, (x, mask, target) = SmoothNet(classes=6).double(), nn.Linear(6, 3).double(), smooth_batch()
    reg = attrreg.InputGradient()
    want = reg(model, x, mask, target, output=head)
    with reg.attach(model):
        features = model(x)
        features /= 2
        torch.testing.assert_close(reg(model, x, mask, target, output=head), want)


class Headless(SmoothNet):
    """Has a head that somebody else runs."""

    def __init__(self) -> None:
        super().__init__(classes=6)
        self.norm1d = nn.BatchNorm1d(6)
        self.top = nn.Sequential(self.norm1d, nn.Linear(6, 3))


@pytest.mark.parametrize("regularizer", [attrreg.InputGradient(), attrreg.ActivationDifference(fill=ZERO)])
@pytest.mark.parametrize("way", WAYS)
def test_a_head_of_the_model_that_a_function_runs_counts_no_batch(regularizer: attrreg.AttributionRegularizer, way: str) -> None:
    model, (x, mask, target) = Headless().double(), smooth_batch()
    call: Any = regularizer.evaluate if way == "evaluate" else regularizer
    with regularizer.attach(model) if way == "attached" else nullcontext():
        model(x)
        call(model, x, mask, target, output=lambda features: model.top(features))
    counted = model.norm1d.num_batches_tracked
    assert isinstance(counted, Tensor) and int(counted) == 0


class Drawing(SmoothNet):
    """Draws in the order of memory."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.dropout(x + torch.rand_like(x), 0.5))


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("fill", [baselines.Shuffle(), baselines.Noise(), baselines.Mean()])
def test_the_masked_pass_draws_what_the_clean_one_drew(fill: baselines.Baseline, format: torch.memory_format) -> None:
    model, (x, _, target) = Drawing().double(), smooth_batch()
    x = x.contiguous(memory_format=format)
    assert attrreg.ActivationDifference("body", fill)(model, x, nearly_all(x), target) < 1e-6


class Probe(nn.Module):
    """Trains what follows frozen features, which have no graph."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.hidden, self.head = nn.Conv2d(2, 6, 3), nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            features = self.backbone(x).tanh().mean((2, 3))
        logits: Tensor = self.head(self.hidden(features).tanh())
        return logits


@pytest.mark.parametrize("layers", ["auto", "hidden"])
def test_features_without_a_graph_to_the_images_come_from_them(layers: str) -> None:
    model, (x, mask, _) = Probe().double(), smooth_batch()
    reg, nearly = attrreg.ActivationDifference(layers, fill=ZERO), torch.ones_like(mask, dtype=torch.float64)
    nearly[:, 0, 0] = 0.9999  # x and x~ are almost the same
    with passes() as first:
        value = reg(model, x, nearly)
    assert 0 < value < 1e-3 and first.checks > 0
    with passes() as second:
        torch.testing.assert_close(reg(model, x, nearly), value)
    assert second.checks == 0
    assert gradients(model, value)[2].any()


class Tracking(SmoothNet):
    """Tracks the mean of its images, which a loop does not differentiate by."""

    mean: Tensor

    def __init__(self, assigns: bool) -> None:
        super().__init__()
        self.assigns = assigns
        self.register_buffer("mean", torch.zeros(1, 2, 1, 1))
        self.act.register_buffer("mean", self.mean)  # one for both

    def forward(self, x: Tensor) -> Tensor:
        now = x.mean((0, 2, 3), keepdim=True).square()
        if self.assigns:
            self.mean = self.act.mean = 0.9 * self.mean + 0.1 * now
        else:
            self.mean.mul_(0.9).add_(0.1 * now)
        return super().forward(x + x * self.mean)


@pytest.mark.parametrize("assigns", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_buffers_made_of_images_have_no_graph_afterwards(assigns: bool, way: str) -> None:
    model, data = Tracking(assigns).double(), smooth_batch()
    for _ in range(3):
        loss_by(way, attrreg.InputGradient(), model, data).backward()
        assert model.mean.grad_fn is None and not model.mean.requires_grad
        assert model.act.mean is model.mean or not assigns
    copy.deepcopy(model)


class _Pooling(nn.Module):
    """A head with operators that PyTorch cannot differentiate twice."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(5, 3)

    def forward(self, h: Tensor) -> Tensor:
        tokens = F.hardsigmoid(h).flatten(2).mT.unsqueeze(1)
        return self.head(F.scaled_dot_product_attention(tokens, tokens, tokens).mean((1, 2)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("way", ["unattached", "attached"])
def test_a_head_has_our_operators_too(way: str) -> None:
    x, mask, target = smooth_batch()
    body, head = nn.Sequential(nn.Conv2d(2, 5, 3, padding=1), nn.Tanh()).double(), _Pooling().double()
    whole, reg = nn.Sequential(*body, head), attrreg.InputGradient() + attrreg.GradCAM("1")
    want = gradients(whole, reg.evaluate(whole, x, mask, target).total)
    with reg.attach(body) if way == "attached" else nullcontext():
        body(x)
        value = reg(body, x, mask, target, output=head)
    assert_close(gradients(whole, value), want, 1e-9)
