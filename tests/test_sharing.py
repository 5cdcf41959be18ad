"""One pass for many terms: counts, and the same numbers however the forward comes about."""

from __future__ import annotations

import gc
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import attrreg
from attrreg import baselines, scores
from attrreg.bench.memory import LiveStorage
from attrreg.regularizer import AttributionRegularizer
from attrreg.trace import Passes, passes
from tests.models import FAMILIES, WAYS, Batch, SmoothNet, assert_close, batch, gradients, logits_and_penalty, smooth_batch

FOUR = attrreg.InputGradient() + attrreg.InputXGradient() + attrreg.GradCAM(layer="body") + attrreg.ActivationDifference()

REGULARIZERS: dict[str, AttributionRegularizer] = {
    "input_gradient": attrreg.InputGradient(),
    "input_x_gradient": attrreg.InputXGradient(),
    "integrated_gradients": attrreg.IntegratedGradients(steps=3),
    "integrated_gradients_noise": attrreg.IntegratedGradients(steps=2, baseline=baselines.Noise(), chunk=None),
    "expected_gradients": attrreg.ExpectedGradients(2),
    "grad_cam": attrreg.GradCAM(layer="body"),
    "grad_cam_auto": attrreg.GradCAM(),
    "activation_difference": attrreg.ActivationDifference(),
    "projection": attrreg.InputGradient(scores.RandomProjection()),
    "pgd_ex": attrreg.PGDEx(epsilon=0.3, steps=2, bounds=(-3.0, 3.0)),
    "four": FOUR,
    "layer_activation": attrreg.captum.LayerActivation("body"),
    "layer_gradient_x_activation": attrreg.captum.LayerGradientXActivation(),
    "internal_influence": attrreg.captum.InternalInfluence("body", steps=2),
    "layer_conductance": attrreg.captum.LayerConductance("body", steps=2),
    "neuron_conductance": attrreg.captum.NeuronConductance(attrreg.captum.Neuron("body", (1, 2, 2)), steps=2),
    "noise_tunnel": attrreg.captum.NoiseTunnel(attrreg.InputXGradient(), samples=2),
    "feature_ablation": attrreg.captum.FeatureAblation(torch.arange(8) // 4),
    "shapley_values": attrreg.captum.ShapleyValues(torch.arange(8) // 4),
}


@pytest.mark.cpu  # a default device is a function mode, through which torch.autograd.grad would be counted twice
def test_four_terms_attached_cost_one_forward_and_one_inner_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted here too, so that the library's own count is not trusted."""
    model, (x, mask, target) = SmoothNet(norm=True).double(), smooth_batch()
    forwards: list[int] = []
    backwards: list[int] = []
    model.register_forward_pre_hook(lambda module, args: forwards.append(1))
    original = torch.autograd.grad

    def counting(*args: Any, **settings: Any) -> Any:
        backwards.append(1)
        return original(*args, **settings)

    monkeypatch.setattr(torch.autograd, "grad", counting)
    with passes() as counted, FOUR.attach(model):
        loss = F.cross_entropy(model(x), target)
        assert len(forwards) == 1
        (loss + FOUR(model, x, mask, target=target)).backward()
    assert len(forwards) == 2  # the loop's own, and the masked one
    assert len(backwards) == 1
    assert counted == Passes(forward=1, backward=1)


@pytest.mark.parametrize(
    ("regularizer", "forward", "backward"),
    [
        (attrreg.InputGradient(), 1, 1),
        (FOUR, 2, 1),
        (attrreg.InputGradient(scores.SumLogProb()) + attrreg.InputXGradient(scores.TargetLogit()), 1, 2),
        # The default score is the contrast here, so it is shared with one that says so.
        (attrreg.InputGradient() + attrreg.InputXGradient(scores.Contrast()), 1, 1),
        (attrreg.ActivationDifference(), 2, 0),
        # Equal terms draw one masked image between them; other fills need their own.
        (attrreg.ActivationDifference() + attrreg.ActivationDifference("body").named("second"), 2, 0),
        (attrreg.ActivationDifference() + attrreg.ActivationDifference(fill=baselines.Zero()).named("second"), 3, 0),
        # All places of a path in one batch.
        (attrreg.IntegratedGradients(steps=3, chunk=None), 1, 1),
        (attrreg.IntegratedGradients(steps=3, chunk=None, score=scores.SumLogProb()) + attrreg.InputGradient(), 2, 2),
    ],
)
def test_passes_of_an_unattached_call(regularizer: AttributionRegularizer, forward: int, backward: int) -> None:
    model, (x, mask, target) = SmoothNet().double(), smooth_batch()
    with passes() as outer, passes() as counted:
        regularizer(model, x, mask, target)
    assert counted == outer == Passes(forward, backward)


def test_chunked_paths_recompute_in_the_backward() -> None:
    model, (x, mask, target) = SmoothNet().double(), smooth_batch()
    with passes() as counted:
        value = attrreg.IntegratedGradients(steps=4, chunk=2)(model, x, mask, target)
        assert counted == Passes(3, 3)  # the first place, the other of its chunk, and a chunk
        value.backward()
    assert counted == Passes(5, 5)  # and each chunk again


@pytest.mark.cpu  # elsewhere gradients of images are taken by other operators
def test_the_outer_backward_takes_no_gradient_of_images_that_nobody_asks_for() -> None:
    model = nn.Sequential(nn.Identity(), nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.LazyLinear(3))
    x, mask = torch.randn(2, 3, 8, 8), torch.zeros(8, 8)
    model(x)
    for images in (x, x.clone().requires_grad_()):
        taken: list[bool] = []
        transposed: list[bool] = []  # by which the gradient of images was taken: what is taken of its input is no gradient of images

        class Watch(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                if func.overloadpacket is torch.ops.aten.convolution_backward:
                    (transposed if args[7] else taken).append(args[-1][0])
                return func(*args, **kwargs or {})

        value = attrreg.InputGradient(scores.SumLogProb())(model, images, mask)
        with Watch():
            value.backward()
        assert taken == [images.requires_grad] and len(transposed) == 1


def all_ways(
    model: nn.Module, regularizer: AttributionRegularizer, data: tuple[Tensor, Tensor, Tensor]
) -> dict[str, tuple[Tensor, Tensor]]:
    results: dict[str, tuple[Tensor, Tensor]] = {}
    for way in WAYS:
        torch.manual_seed(7)
        results[way] = logits_and_penalty(way, regularizer, model, data)
    return results


@pytest.mark.parametrize("name", REGULARIZERS)
def test_attached_unattached_and_evaluate_agree(name: str) -> None:
    model, data = SmoothNet().double(), smooth_batch()
    results = all_ways(model, REGULARIZERS[name], data)
    logits, value = results.pop("unattached")
    want = gradients(model, F.cross_entropy(logits, data[2]) + value)
    for logits, other in results.values():
        torch.testing.assert_close(other, value, rtol=1e-13, atol=0)
        assert_close(gradients(model, F.cross_entropy(logits, data[2]) + other), want, 1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_attached_unattached_and_evaluate_agree_on_real_models(family: str) -> None:
    known = FAMILIES[family]
    model = known.build().eval()
    data = batch(2, size=known.size, classes=4)
    regularizer = attrreg.InputGradient() + attrreg.GradCAM(layer=known.layer) + attrreg.ActivationDifference()
    results = all_ways(model, regularizer, data)
    logits, value = results.pop("unattached")
    want = gradients(model, F.cross_entropy(logits, data[2]) + value)
    for logits, other in results.values():
        torch.testing.assert_close(other, value, rtol=1e-4, atol=1e-9)
        assert_close(gradients(model, F.cross_entropy(logits, data[2]) + other), want, 1e-4)


@pytest.mark.parametrize("attach", [False, True])
def test_terms_are_reported_by_name_and_sum_to_the_total(attach: bool) -> None:
    model, (x, mask, target) = SmoothNet().double(), smooth_batch()
    regularizer = 2.0 * attrreg.InputGradient() + (0.5 * attrreg.GradCAM(layer="body")).named("background")
    with regularizer.attach(model) if attach else nullcontext(), passes() as counted:
        logits = model(x)
        penalty = regularizer.evaluate(model, x, mask, target)
    assert counted.forward == (0 if attach else 1)
    assert set(penalty.terms) == {"InputGradient", "background"}
    assert not any(term.requires_grad for term in penalty.terms.values())
    torch.testing.assert_close(sum(penalty.terms.values()), penalty.total.detach())
    torch.testing.assert_close(penalty.terms["InputGradient"], 2 * attrreg.InputGradient()(model, x, mask, target).detach())
    torch.testing.assert_close(penalty.terms["background"], 0.5 * attrreg.GradCAM(layer="body")(model, x, mask, target).detach())
    torch.testing.assert_close(penalty.output, logits)


def test_memory_of_a_chunked_path_does_not_grow_with_steps() -> None:
    model, (x, mask, target) = SmoothNet(), batch(4, channels=2, size=64, classes=3)
    peaks = {}
    for steps, chunk in ((2, 1), (16, 1), (16, None)):
        regularizer = attrreg.IntegratedGradients(steps=steps, chunk=chunk)
        with LiveStorage() as meter:
            meter.ignore(*model.parameters(), x, mask, target)
            regularizer(model, x, mask, target).backward()
        peaks[steps, chunk] = meter.peak
    assert peaks[16, 1] <= 1.02 * peaks[2, 1]
    assert peaks[16, None] >= 4 * peaks[16, 1]


def test_every_regularizer_is_held_to_these_tests() -> None:
    public = [getattr(module, name) for module in (attrreg, attrreg.captum) for name in module.__all__]
    leaves = {kind for kind in public if isinstance(kind, type) and issubclass(kind, attrreg.SingleRegularizer)}
    leaves -= {attrreg.SingleRegularizer, attrreg.MapRegularizer}
    # These need ReLU layers, which no smooth network has: tests/test_captum_kinds.py.
    leaves -= {attrreg.captum.Deconvolution, attrreg.captum.GuidedBackprop, attrreg.captum.GuidedGradCam}
    assert leaves == {type(term.regularizer) for regularizer in REGULARIZERS.values() for term in regularizer.terms}


def check_memory(model: nn.Module, regularizer: AttributionRegularizer, data: Batch, attach: bool) -> None:
    """Two steps leave none, without waiting for the garbage collector, which cannot see through a graph that leads back to itself."""
    x, mask, target = data
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    gc.disable()
    try:
        with LiveStorage() as meter:
            grads = [p.grad for p in model.parameters() if p.grad is not None]
            meter.ignore(*model.parameters(), *model.buffers(), *grads, x, mask, target)
            for _ in range(2):
                if attach:
                    with regularizer.attach(model):
                        (model(x).sum() + regularizer(model, x, mask, target)).backward()
                else:
                    regularizer(model, x, mask, target).backward()
            assert meter.current == 0
    finally:
        gc.enable()


@pytest.mark.parametrize("attach", [False, True])
@pytest.mark.parametrize("name", [*REGULARIZERS, "with a path"])
def test_a_step_leaves_no_memory_behind(name: str, attach: bool) -> None:
    regularizer = REGULARIZERS.get(name, attrreg.InputGradient() + attrreg.IntegratedGradients(steps=3))
    check_memory(SmoothNet(), regularizer, batch(3, channels=2, size=8, classes=3), attach)


GRADIENT = attrreg.InputGradient()
DIFFERENCES = GRADIENT.using(attrreg.engines.FiniteDifference())


@pytest.mark.parametrize(("attached", "called"), [(GRADIENT, GRADIENT + attrreg.IntegratedGradients(2)), (DIFFERENCES, DIFFERENCES)])
def test_a_forward_that_moved_buffers_serves_no_call_with_further_passes(attached: Any, called: Any) -> None:
    model, (x, mask, target) = SmoothNet().double(), smooth_batch()
    nn.utils.spectral_norm(model.stem)
    with attached.attach(model):
        model(x)
        value = called(model, x, mask, target)
    want = called(model, x, mask, target)
    torch.testing.assert_close(value, want, rtol=1e-12, atol=0)
    assert_close(gradients(model, value), gradients(model, want), 1e-10)


def test_a_layer_that_was_recorded_for_its_value_gives_gradients_where_the_images_do() -> None:
    model, (x, mask, target) = SmoothNet().double(), smooth_batch()
    other = attrreg.GradCAM("body")
    want = other(model, x, mask, target)
    with (attrreg.InputGradient() + attrreg.ActivationDifference("body")).attach(model):
        model(x)
        with passes() as counted:
            found = other(model, x, mask, target)
    assert counted == Passes(0, 1)
    torch.testing.assert_close(found, want)
    assert_close(gradients(model, found), gradients(model, want), 1e-10)
