"""Finite differences: the gradients of the exact engine where the network is smooth, without a second derivative."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.checkpoint import checkpoint

import attrreg
from attrreg import baselines, engines, scores, sites
from attrreg.needs import Grad, Need
from attrreg.regularizer import AttributionRegularizer, SingleRegularizer
from attrreg.trace import Passes, Trace, passes
from tests.models import FAMILIES, SmoothNet, assert_close, batch, gradients, smooth_batch

FINE = engines.FiniteDifference(step=1e-4)
ENGINES = (engines.DoubleBackward(), engines.FiniteDifference())
REGULARIZERS: dict[str, AttributionRegularizer] = {
    "input_gradient": attrreg.InputGradient(),
    "input_x_gradient": attrreg.InputXGradient(score=scores.SumLogProb()),
    "integrated_gradients": attrreg.IntegratedGradients(steps=3),
    "expected_gradients": attrreg.ExpectedGradients(samples=2, baseline=baselines.Noise()),
    "gradcam": attrreg.GradCAM(layer="body"),
    "gradcam_auto": attrreg.GradCAM(),
    "gradcam_auto_and_by_name": attrreg.GradCAM() + attrreg.GradCAM(layer="body").named("by name"),
    "activation_difference": attrreg.ActivationDifference(),
    "random_projection": attrreg.InputGradient(score=scores.RandomProjection()),
    "integrated_gradients_from_a_zero_image": attrreg.IntegratedGradients(steps=3, rule="riemann_left"),
    "layer_gradient_x_activation": attrreg.captum.LayerGradientXActivation("body"),
    "layer_conductance": attrreg.captum.LayerConductance("body", steps=2),
    "neuron_conductance": attrreg.captum.NeuronConductance(attrreg.captum.Neuron("body", (1, 2, 2)), steps=2),
    "noise_tunnel": attrreg.captum.NoiseTunnel(attrreg.InputXGradient(), samples=2),
    "feature_ablation": attrreg.captum.FeatureAblation(torch.arange(8) // 4),
    "sum": 1.0 * attrreg.InputGradient() + 0.5 * attrreg.GradCAM(layer="body") + 0.1 * attrreg.ActivationDifference(),
}


@pytest.mark.parametrize("name", REGULARIZERS)
@pytest.mark.parametrize("attached", [False, True])
def test_gradients_are_those_of_the_exact_engine(name: str, attached: bool) -> None:
    model, (x, mask, target) = SmoothNet().double(), smooth_batch()
    found = []
    for engine in (engines.DoubleBackward(), FINE):
        regularizer = REGULARIZERS[name].using(engine)
        generator = torch.Generator().manual_seed(3)
        with regularizer.attach(model) if attached else nullcontext():
            model(x)
            value = regularizer(model, x, mask, target, generator=generator)
        found.append([value, *gradients(model, value)])
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-12, atol=0)
    assert_close(found[1][1:], found[0][1:], 1e-6)


@pytest.mark.parametrize("name", ["input_gradient", "gradcam", "integrated_gradients"])
def test_gradients_reach_what_made_the_images(name: str) -> None:
    model, (x, mask, target) = SmoothNet().double(), smooth_batch()
    found = []
    for engine in (engines.DoubleBackward(), FINE):
        x.requires_grad_()
        images = x.tanh()
        found.append(torch.autograd.grad(REGULARIZERS[name].using(engine)(model, images, mask, target), x)[0])
    assert_close([found[1]], [found[0]], 1e-6)


class Prototypes(nn.Module):
    """A loss with weights of its own: the cross-entropy of distances to prototypes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(3, dtype=torch.float64))

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(-(logits[:, None] - self.weight).square().sum(dim=2), target, reduction="none")


def test_a_loss_may_have_the_only_weights_that_are_trained() -> None:
    model, (x, mask, target), loss = SmoothNet().double().requires_grad_(False), smooth_batch(), Prototypes()
    found = []
    for engine in (engines.DoubleBackward(), FINE):
        regularizer = attrreg.InputGradient(score=scores.TaskLoss(loss)).using(engine)
        found.append(gradients(loss, regularizer(model, x, mask, target, output=lambda logits: logits)))
    assert all(gradient.any() for gradient in found[0])
    assert_close(found[1], found[0], 1e-6)


class Block(nn.Module):
    """Two layers, checkpointed or not."""

    def __init__(self, checkpoints: bool) -> None:
        super().__init__()
        self.first, self.second, self.checkpoints = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3), checkpoints

    def forward(self, h: Tensor) -> Tensor:
        if self.checkpoints:
            result: Tensor = checkpoint(self.inner, h, use_reentrant=False)
            return result
        return self.inner(h)

    def inner(self, h: Tensor) -> Tensor:
        return self.second(self.first(h).mul(3).tanh()).tanh()  # type: ignore[no-any-return]


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("layer", ["1.first", "auto"])
def test_layers_in_checkpointed_blocks_move_in_the_recomputation_too(layer: str, frozen: bool) -> None:
    (x, mask, target), found = smooth_batch(), []
    for checkpoints, engine in ((False, engines.DoubleBackward()), (False, FINE), (True, FINE)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(2, 4, 3), Block(checkpoints), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).double()
        model[:2].requires_grad_(not frozen)[1].second.requires_grad_()
        found.append(gradients(model, attrreg.GradCAM(layer).using(engine)(model, x, mask, target)))
    assert_close(found[1], found[0], 1e-6)
    assert_close(found[2], found[1], 1e-9)


def test_passes_are_counted() -> None:
    model, (x, mask, target) = SmoothNet().double(), smooth_batch()
    with passes() as counter:
        REGULARIZERS["sum"].using(FINE)(model, x, mask, target)
    assert (counter.forward, counter.backward) == (4, 1)  # clean, masked, there and back


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("score", [scores.Contrast(), scores.PredictedLogit()])
def test_a_step_does_not_change_what_a_score_chose(score: scores.Score, seed: int) -> None:
    family = FAMILIES["vit"]  # untrained, so that its logits are close to each other
    torch.manual_seed(seed)
    model, (x, mask, target) = family.build().eval(), batch(size=family.size)
    found = [gradients(model, attrreg.InputGradient(score).using(engine)(model, x, mask, target)) for engine in ENGINES]
    exact, moved = (torch.cat([gradient.flatten() for gradient in each]) for each in found)
    assert float(F.cosine_similarity(exact, moved, dim=0)) > 0.99


def test_a_transformer_keeps_its_fused_attention() -> None:
    family = FAMILIES["vit"]
    model, (x, mask, target) = family.build().eval(), batch(size=family.size)
    exact = gradients(model, attrreg.InputGradient()(model, x, mask, target))
    seen: list[Any] = []
    kernel = F.scaled_dot_product_attention

    def watched(*args: Any, **settings: Any) -> Tensor:
        seen.append(torch.backends.cuda.flash_sdp_enabled())
        return kernel(*args, **settings)

    regularizer = attrreg.InputGradient().using(engines.FiniteDifference())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", watched)
        value = regularizer(model, x, mask, target)
    assert seen and all(seen)
    one, other = (torch.cat([g.flatten() for g in found]) for found in (exact, gradients(model, value)))
    assert float(F.cosine_similarity(one, other, dim=0)) > 0.99


@pytest.mark.parametrize("attached", [False, True])
def test_draws_are_replayed_and_nothing_is_left(attached: bool) -> None:
    model, (x, mask, target) = nn.Sequential(SmoothNet(), nn.Dropout(0.5)).double().train(), smooth_batch()
    found = []
    for engine in (engines.DoubleBackward(), FINE):
        torch.manual_seed(5)
        regularizer = attrreg.InputGradient().using(engine)
        with regularizer.attach(model) if attached else nullcontext():
            model(x)
            before = torch.get_rng_state()
            value = regularizer(model, x, mask, target)
        assert torch.equal(before, torch.get_rng_state())
        found.append(gradients(model, value))
    assert_close(found[1], found[0], 1e-6)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_score_of_the_users_draws_on_both_sides_what_it_drew() -> None:
    model, (x, mask, target) = nn.Sequential(SmoothNet(), nn.Dropout(0.5)).double(), smooth_batch()
    found = []
    for engine in (engines.DoubleBackward(), FINE):
        torch.manual_seed(5)
        score = scores.TaskLoss(lambda logits, target: (logits * torch.randn_like(logits)).sum(1))
        found.append(gradients(model, attrreg.InputGradient(score).using(engine)(model, x, mask, target)))
    assert_close(found[1], found[0], 1e-6)


def test_a_path_draws_what_the_recorded_forward_drew() -> None:
    model, (x, mask, target) = SmoothNet(dropout=0.5).double(), smooth_batch()
    found = []
    for engine in ENGINES:
        regularizer = attrreg.IntegratedGradients(steps=2).using(engine)
        with regularizer.attach(model):
            torch.manual_seed(5)
            model(x)
            torch.rand(7)
            found.append(regularizer(model, x, mask, target))
    torch.testing.assert_close(*found, rtol=1e-9, atol=0)


@dataclass(frozen=True, repr=False)
class _AtFeatures(SingleRegularizer):
    def needs(self) -> tuple[Need, ...]:
        return (Grad(sites.FEATURES, scores.TargetLogit()),)

    def per_image(self, trace: Trace) -> Tensor:
        return trace.grad(sites.FEATURES, scores.TargetLogit()).square().flatten(1).sum(1)


def test_what_cannot_be_moved_is_refused() -> None:
    model, (x, mask, target) = SmoothNet().double(), smooth_batch()
    assert _AtFeatures()(model, x, mask, target) > 0
    with pytest.raises(ValueError, match=r"^Finite differences move images and what layers give.* Name the layer that gives them"):
        _AtFeatures().using(FINE)(model, x, mask, target)


class Skips(SmoothNet):
    """Leaves a layer out of every second forward."""

    forwards = 0

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += 1
        h = self.stem(x)
        logits: Tensor = self.head(self.body(self.act(h) if self.forwards % 2 else h.tanh()).mean((2, 3)))
        return logits


def test_a_layer_that_does_not_run_again_was_not_moved() -> None:
    model, (x, mask, target) = Skips().double(), smooth_batch()
    with pytest.raises(ValueError, match="layer 'act' did not run in the forward"):
        attrreg.GradCAM("act").using(FINE)(model, x, mask, target)


def test_a_recording_that_cannot_be_differentiated_twice_is_not_used() -> None:
    model, (x, mask, target) = SmoothNet().double(), smooth_batch()
    with attrreg.InputGradient().using(FINE).attach(model):
        model(x)
        with passes() as counter:
            attrreg.InputGradient()(model, x, mask, target)
    assert counter.forward == 1


def test_a_forward_that_moves_what_it_reads_serves_no_difference() -> None:
    """Passes that move would compute with other weights than it did."""
    found = []
    for engine in (engines.DoubleBackward(), FINE):
        torch.manual_seed(0)
        model, (x, mask, target) = SmoothNet().double(), smooth_batch()
        spectral_norm(model.stem)
        for buffer in model.buffers():  # which have not converged
            buffer.copy_(F.normalize(torch.randn_like(buffer), dim=0))
        regularizer = attrreg.InputGradient().using(engine)
        with nullcontext() if engine.twice else regularizer.attach(model):
            model(x)
            value = regularizer(model, x, mask, target)
        found.append([value, *gradients(model, value)])
    assert_close(found[1], found[0], 1e-6)


@pytest.mark.parametrize("term", [attrreg.captum.GuidedBackprop(), attrreg.InputGradient() + attrreg.captum.GuidedBackprop()])
def test_a_rule_for_relus_is_refused_before_any_pass(term: AttributionRegularizer) -> None:
    model, (x, mask, target) = SmoothNet().double(), smooth_batch()
    regularizer = term.using(FINE)
    with passes() as counted, pytest.raises(ValueError, match="is the gradient of none"):
        regularizer(model, x, mask, target, annotated=torch.tensor([True, True, False]))
    assert counted == Passes() and counted.checks == 0
    with pytest.raises(ValueError, match="is the gradient of none"):
        regularizer.attach(model)


def test_zero_directions_give_zero() -> None:
    model, (x, mask, target) = SmoothNet().double(), smooth_batch()
    value = attrreg.InputGradient().using(FINE)(model, x, torch.ones_like(mask), target)
    assert float(value.detach()) == 0
    assert all(gradient.isfinite().all() and not gradient.any() for gradient in gradients(model, value))


def test_all_sites_move_by_the_least_of_their_steps() -> None:
    places = torch.full((4,), 2.0), torch.zeros(9), torch.full((16,), 2e4).half(), torch.ones(3)
    directions = torch.full((4,), 10.0), torch.ones(9), torch.ones(16), torch.zeros(3)
    engine = engines.FiniteDifference(step=0.5)
    for chosen, want in (([0, 1, 2, 3], 0.1), ([1], 0.5), ([2], 1e4), ([3], 0.0)):
        found = engine.scale([places[site] for site in chosen], [directions[site] for site in chosen])
        torch.testing.assert_close(found, torch.tensor(want))


def test_images_that_do_not_move_say_nothing_of_the_step() -> None:
    places = torch.cat((torch.full((1, 4), 2.0), torch.full((3, 4), 1e3))), torch.cat((torch.zeros(1, 9), torch.full((3, 9), 1e3)))
    directions = [torch.zeros_like(place) for place in places]
    for place, direction, want in zip(places, directions, (4.0, 3.0), strict=True):
        direction[0, 0] = 0.5
        torch.testing.assert_close(engines.FiniteDifference(step=0.5).scale([place], [direction]), torch.tensor(want))


def test_engines_are_part_of_the_value() -> None:
    regularizer = (2.0 * attrreg.InputGradient() + attrreg.GradCAM()).using(engines.FiniteDifference(step=0.1))
    assert eval(repr(regularizer)) == regularizer
    assert (3 * regularizer).engine == regularizer.engine == regularizer.reduced("sum").engine
    assert attrreg.InputGradient().named("a").using(FINE).named("b").engine == FINE
    with pytest.raises(ValueError, match="engine"):
        regularizer + attrreg.ActivationDifference()
    with pytest.raises(TypeError, match="engine"):
        attrreg.InputGradient().using("fd")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="step"):
        engines.FiniteDifference(step=0)


class Once(torch.autograd.Function):
    """tanh, without a second derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.tanh()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        result: Tensor = gradient * (1 - y * y)
        return result


class OnceNet(SmoothNet):
    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(F.silu(self.body(Once.apply(self.stem(x)))).mean(dim=(2, 3)))
        return logits


def test_a_model_without_second_derivatives() -> None:
    plain, model, (x, mask, target) = SmoothNet().double(), OnceNet().double(), smooth_batch()
    model.load_state_dict(plain.state_dict())
    difference = attrreg.ActivationDifference(fill=baselines.Zero())
    assert_close(gradients(model, difference(model, x, mask)), gradients(plain, difference(plain, x, mask)), 1e-12)
    for term in (attrreg.InputGradient(), attrreg.IntegratedGradients(steps=3)):
        exact = gradients(plain, term(plain, x, mask, target))
        assert_close(gradients(model, term.using(FINE)(model, x, mask, target)), exact, 1e-6)
    with pytest.raises(RuntimeError, match="once_differentiable"):  # PyTorch's own words, and no wrong gradient
        attrreg.InputGradient()(model, x, mask, target).backward()
