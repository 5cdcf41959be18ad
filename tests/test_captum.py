"""Captum's attributions as regularizers: the right map, the right parameter gradient, or a refusal with its reason."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
from typing import Any

import captum.attr
import captum.metrics
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attrreg
from attrreg import baselines, scores
from attrreg.captum import Neuron
from attrreg.captum.bridge import ACCEPTED
from attrreg.captum.refusals import REFUSED
from attrreg.trace import passes
from benchmarks import captum_check
from benchmarks.captum_check import TOLERANCE, Net, cases, check, ours
from tests.models import FAMILIES, SmoothNet, smooth_batch, stir
from tests.test_gradients import check_numerically
from tests.test_side_effects import assert_same, snapshot

pytestmark = pytest.mark.cpu

CASES = {case.name: case for case in cases()}
TAKEN = [name for name, case in CASES.items() if case.accepted]
LEFT = [name for name, case in CASES.items() if not case.accepted]
SEGMENTS = captum_check.SEGMENTS


def batch() -> tuple[Tensor, Tensor, Tensor]:
    return captum_check.X, captum_check.MASK, captum_check.TARGET


@pytest.mark.parametrize("name", TAKEN)
def test_map_is_captums_and_gradient_is_that_of_captums_map(name: str) -> None:
    """Captum's own map, differentiated numerically, is the oracle: it shares no code with ours."""
    result = check(CASES[name])
    assert result.gradient is not None and result.gradient < TOLERANCE
    assert result.case.draws or (result.value is not None and result.value < TOLERANCE)


def test_the_check_sees_a_wrong_gradient() -> None:
    case, model = CASES["InputXGradient"], captum_check.network(CASES["InputXGradient"])
    map = captum_check.captums(case, model)
    error = captum_check.gradient_error(model, captum_check.judged(map), lambda: captum_check.judged(captum_check.captums(case, model)))
    assert error > 0.1


def test_the_check_sees_a_gradient_that_is_no_number() -> None:
    model, x = nn.Sequential(nn.Linear(2, 2), last := nn.Linear(2, 2)).double(), torch.ones(1, 2, dtype=torch.float64)
    value = lambda: model(x).square().sum()  # noqa: E731
    assert captum_check.gradient_error(model, value(), value) < TOLERANCE
    assert math.isnan(captum_check.gradient_error(model, value() + math.nan * last.bias.sum(), value))


@pytest.mark.parametrize("name", LEFT)
def test_refused_by_name_with_reason_and_way_out(name: str) -> None:
    reason, way_out = REFUSED[name]
    with pytest.raises(TypeError) as raised:
        attrreg.from_captum(getattr(captum.attr, name))
    assert str(raised.value) == f"from_captum: {name} cannot be trained through: {reason}. {way_out}."


@pytest.mark.parametrize("name", [name for name in LEFT if CASES[name].runs])
@pytest.mark.parametrize("create_graph", [False, True])
def test_what_is_refused_has_no_right_graph(name: str, create_graph: bool) -> None:
    found = captum_check.graph(CASES[name], create_graph)
    assert found is None or isinstance(found, str) or found > 1e-2


def test_every_attribution_is_accepted_or_refused() -> None:
    assert set(CASES) <= set(ACCEPTED) | set(REFUSED)
    assert not set(ACCEPTED) & set(REFUSED)


def test_captums_own_hooks_make_a_wrong_gradient() -> None:
    """Why its code is not run with another gradient function: the hooks fire again in the penalty's own backward."""
    mended = captum_check.graph(CASES["GuidedBackprop"], create_graph=True)
    assert isinstance(mended, float) and mended > 1e-3


@pytest.mark.parametrize("family", ["inplace", *(pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES if name != "inplace")])
def test_maps_are_captums_on_real_models(family: str) -> None:
    known = FAMILIES[family]
    model, size = known.build().double().eval(), known.size
    stir(model, 0.01)
    x, target = torch.randn(2, 3, size, size, dtype=torch.float64), torch.tensor([1, 3])
    half = torch.arange(size) // ((size + 1) // 2)
    fitting = {
        "layer": known.layer,
        "baselines": torch.randn(1, 3, size, size, dtype=torch.float64),
        "feature_mask": (half.view(-1, 1) * 2 + half).expand(1, 3, size, size).contiguous(),
        "neuron_selector": (0, 0, 0),
    }
    rectified = any(isinstance(module, nn.ReLU) for module in model.modules())
    compared = 0
    for case in CASES.values():
        if not case.accepted or case.draws or ("Guided" in case.name or "Deconv" in case.name) > rectified:
            continue
        case = dataclasses.replace(case, settings=dict(case.settings) | {k: v for k, v in fitting.items() if k in case.settings})
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            want = captum_check.captums(case, model, x=x, target=target).detach()
        got = ours(case).attribute(model, x, target)
        assert float((got - want).norm()) <= (1e-6 if case.single else 1e-9) * float(want.norm()), case.name
        compared += 1
    assert compared >= 14  # all but what draws and what is about ReLUs


# What the ways out promise


class Rectified(nn.Module):
    """Layers with rules only: convolutions, ReLUs, a pool and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 5, 3, stride=2, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
        )
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x).flatten(1))  # type: ignore[no-any-return]


def test_lrp_is_input_times_gradient_on_a_relu_network() -> None:
    model, (x, _, target) = Rectified().double().eval(), batch()
    twin = copy.deepcopy(model)
    theirs = captum.attr.LRP(twin).attribute(x.clone().requires_grad_(), target=target).detach()
    torch.testing.assert_close(theirs, attrreg.InputXGradient().attribute(model, x, target), rtol=1e-4, atol=1e-8)
    theirs = captum.attr.LayerLRP(twin, twin.layers[2]).attribute(x.clone().requires_grad_(), target=target).detach()
    got = attrreg.captum.LayerGradientXActivation("layers.2").attribute(model, x, target)
    torch.testing.assert_close(theirs, got, rtol=1e-4, atol=1e-8)


def test_ablated_windows_are_occlusion() -> None:
    model, (x, _, target) = Net().eval().double(), batch()
    theirs = captum.attr.Occlusion(model).attribute(x, (2, 4, 4), (2, 4, 4), target=target)
    got = attrreg.from_captum(captum.attr.FeatureAblation, feature_mask=SEGMENTS).attribute(model, x, target)
    torch.testing.assert_close(got.float(), theirs)


def test_shapley_values_are_what_their_estimators_estimate() -> None:
    model, (x, _, target) = Net().eval().double(), batch()
    torch.manual_seed(0)
    got = attrreg.from_captum(captum.attr.ShapleyValues, feature_mask=SEGMENTS).attribute(model, x, target)
    sampled = captum.attr.ShapleyValueSampling(model).attribute(x, target=target, feature_mask=SEGMENTS, n_samples=200)
    torch.testing.assert_close(got, sampled.double(), rtol=0, atol=0.1 * float(got.abs().max()))


def test_each_set_of_segments_is_scored_once() -> None:
    model, (x, _, target), calls = Net().eval().double(), batch(), []

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        calls.append(1)
        return F.cross_entropy(logits, target, reduction="none")

    attrreg.captum.ShapleyValues(SEGMENTS, score=scores.TaskLoss(loss)).attribute(model, x, target)
    assert len(calls) == 2 ** len(SEGMENTS.unique())


def test_conductance_and_integrated_gradients_add_up_to_the_same() -> None:
    model, (x, _, target) = Net().eval().double(), batch()
    paths = (attrreg.IntegratedGradients(steps=40), attrreg.captum.LayerConductance("body", steps=400))
    sums = [term.attribute(model, x, target).sum(dim=(1, 2, 3)) for term in paths]
    torch.testing.assert_close(sums[0], sums[1], rtol=2e-2, atol=1e-5)


@pytest.mark.parametrize("method", ["riemann_trapezoid", "riemann_left", "gausslegendre"])
def test_conductance_over_one_interval(method: str) -> None:
    model, (x, _, target) = Net().eval().double(), batch()
    theirs = captum.attr.LayerConductance(model, model.body).attribute(x, target=target, n_steps=1, method=method)
    got = attrreg.from_captum(captum.attr.LayerConductance, layer="body", n_steps=1, method=method).attribute(model, x, target)
    torch.testing.assert_close(got, theirs.detach())


# Values, sums, settings


@pytest.mark.parametrize("name", TAKEN)
def test_terms_compare_hash_pickle_and_print(name: str) -> None:
    term = ours(CASES[name])
    assert ours(CASES[name]) == term and hash(ours(CASES[name])) == hash(term)
    assert pickle.loads(pickle.dumps(term)) == term
    assert eval(repr(term), {"attrreg": attrreg, "torch": torch}) == term
    with pytest.raises(dataclasses.FrozenInstanceError):
        term.objective = None  # type: ignore[assignment]


def test_terms_share_passes_with_others() -> None:
    model, (x, mask, target) = Net(rectified=True).double(), batch()
    regularizer = (
        attrreg.from_captum(captum.attr.InputXGradient)
        + attrreg.from_captum(captum.attr.LayerGradCam, layer="body")
        + attrreg.from_captum(captum.attr.LayerGradientXActivation, layer="body")
        + attrreg.from_captum(captum.attr.LayerActivation, layer="third")
    )
    with regularizer.attach(model), passes() as counted:
        (F.cross_entropy(model(x), target) + regularizer(model, x, mask, target)).backward()
    assert (counted.forward, counted.backward) == (0, 1)


def test_settings_are_captums_by_name_and_default() -> None:
    make, score = attrreg.from_captum, scores.ByTarget(contrast=False)
    assert make(captum.attr.Saliency, abs=False) == attrreg.InputGradient(score)
    assert make(captum.attr.Saliency) == attrreg.InputGradient(score, absolute=True)
    assert make(captum.attr.IntegratedGradients) == attrreg.IntegratedGradients(steps=50, score=score)
    assert make(captum.attr.IntegratedGradients, method="riemann_left", baselines=0.5, n_steps=4) == attrreg.IntegratedGradients(
        4, 0.5, "riemann_left", score=score
    )
    assert make(captum.attr.LayerGradCam, layer="a.b", relu_attributions=True) == attrreg.GradCAM("a.b", relu=True, score=score)
    energy, contrast = attrreg.objectives.Energy(), scores.Contrast()
    for name in TAKEN:
        term = attrreg.from_captum(getattr(captum.attr, name), objective=energy, **CASES[name].settings)
        assert term.objective == energy
        if not name.startswith("Neuron"):
            assert attrreg.from_captum(getattr(captum.attr, name), score=contrast, **CASES[name].settings).score == contrast


class Mine(captum.attr.Saliency):  # type: ignore[misc]
    """A subclass, which may do anything."""


LAYERED = {"layer": "body", "neuron_selector": (0, 1, 1)}
BAD: list[tuple[type[Exception], str, Any, dict[str, Any]]] = [
    (TypeError, "pass the class captum.attr.Saliency, not an object of it", captum.attr.Saliency(nn.Identity()), {}),
    (TypeError, "pass a class of captum.attr, such as captum.attr.Saliency, got 'Saliency'", "Saliency", {}),
    (TypeError, "Mine is not one of captum.attr's attributions", Mine, {}),
    (TypeError, "Linear is not one of captum.attr's attributions", nn.Linear, {}),
    (TypeError, "GradientAttribution is an abstract class", captum.attr.GradientAttribution, {}),
    (ValueError, "Saliency has no setting n_steps here. Those it has: abs", captum.attr.Saliency, {"n_steps": 3}),
    (ValueError, "target comes with the call", captum.attr.Saliency, {"target": 0}),
    (ValueError, "LayerGradCam needs layer. Its settings: layer, relu_attributions", captum.attr.LayerGradCam, {}),
    (ValueError, "GradientShap needs baselines", captum.attr.GradientShap, {}),
    (TypeError, "baselines must be a tensor", captum.attr.GradientShap, {"baselines": 0.0}),
    (ValueError, r"OneOf: images must be \(K, C, H, W\)", captum.attr.GradientShap, {"baselines": torch.zeros(2, 8, 8)}),
    (ValueError, "NeuronGradient differentiates a neuron", captum.attr.NeuronGradient, {"score": scores.TargetLogit(), **LAYERED}),
    (TypeError, "index must be an integer or a tuple", captum.attr.NeuronGradient, {"layer": "body", "neuron_selector": "a"}),
    (ValueError, "rule 'x' is unknown", captum.attr.InternalInfluence, {"layer": "body", "method": "x"}),
    (ValueError, "steps must be an integer of at least 1", captum.attr.LayerConductance, {"layer": "body", "n_steps": 0}),
    (ValueError, "there would be no path", captum.attr.LayerConductance, {"layer": "body", "baselines": baselines.Noise()}),
    (TypeError, "segments must be a tensor of integers", captum.attr.FeatureAblation, {"feature_mask": torch.rand(8, 8)}),
    (ValueError, "one set of segments", captum.attr.FeatureAblation, {"feature_mask": SEGMENTS.repeat(3, 1, 1, 1)}),
    (ValueError, "would draw anew", captum.attr.ShapleyValues, {"feature_mask": SEGMENTS, "baselines": baselines.Noise()}),
    (ValueError, r"11 segments take 2\*\*11 forwards", captum.attr.ShapleyValues, {"feature_mask": torch.arange(11).view(1, 11)}),
    (TypeError, "GuidedBackprop", captum.attr.NoiseTunnel, {"attribution_method": captum.attr.GuidedBackprop}),
    (ValueError, "unknown kind 'x'", captum.attr.NoiseTunnel, {"attribution_method": captum.attr.Saliency, "nt_type": "x"}),
    (ValueError, "samples must be", captum.attr.NoiseTunnel, {"attribution_method": captum.attr.Saliency, "nt_samples": 0}),
    (ValueError, r"Captum's stdevs\) must be", captum.attr.NoiseTunnel, {"attribution_method": captum.attr.Saliency, "stdevs": (0.3,)}),
    (
        ValueError,
        "score of NoiseTunnel is that of its attribution_method",
        captum.attr.NoiseTunnel,
        {"attribution_method": attrreg.InputGradient(), "score": scores.TargetLogit()},
    ),
]


@pytest.mark.parametrize(("kind", "message", "method", "settings"), BAD)
def test_bad_settings(kind: type[Exception], message: str, method: Any, settings: dict[str, Any]) -> None:
    with pytest.raises(kind, match=message):
        attrreg.from_captum(method, **settings)


BAD_CALLS: list[tuple[attrreg.MapRegularizer, str]] = [
    (attrreg.InputGradient(Neuron("body", 1)), "in which (1,) is no neuron"),
    (attrreg.InputGradient(Neuron("body", (1, 2, 9))), "in which (1, 2, 9) is no neuron"),
    (attrreg.InputGradient(Neuron("bodi", (1, 2, 2))), "Did you mean 'body'"),
    (attrreg.captum.LayerActivation("head"), "is not a spatial map"),
    (attrreg.captum.LayerConductance("bodi", 2), "Did you mean 'body'"),
    (attrreg.captum.FeatureAblation(torch.zeros(5, 5, dtype=torch.long)), "segments of shape (5, 5) do not broadcast"),
    (attrreg.captum.FeatureAblation(SEGMENTS, score=scores.TargetLogit()), "TargetLogit needs a target"),
]


@pytest.mark.parametrize(("term", "message"), BAD_CALLS)
def test_bad_calls(term: attrreg.MapRegularizer, message: str) -> None:
    model, (x, mask, target) = SmoothNet().double(), smooth_batch()
    before = snapshot(model, x)
    with pytest.raises(ValueError) as raised:
        term(model, x, mask, None if "needs a target" in message else target)
    assert message in str(raised.value)
    assert_same(before, snapshot(model, x))


def test_a_neuron_by_a_plain_index() -> None:
    model, (x, mask, _) = SmoothNet().double(), smooth_batch()
    term = attrreg.from_captum(captum.attr.NeuronGradient, layer="head", neuron_selector=1)
    leaf = x.clone().requires_grad_()
    (want,) = torch.autograd.grad(model(leaf)[:, 1].sum(), leaf)
    torch.testing.assert_close(term.attribute(model, x), want)
    check_numerically(model, lambda: term(model, x, mask))


def test_ablation_of_a_projection_draws_one_direction() -> None:
    model, (x, mask, _) = SmoothNet().double(), smooth_batch()
    term = attrreg.captum.FeatureAblation(SEGMENTS, score=scores.RandomProjection())
    got = term.attribute(model, x, generator=torch.Generator().manual_seed(3))
    corners = got[:, 0, ::4, ::4]
    assert (got == corners.repeat_interleave(4, 1).repeat_interleave(4, 2).unsqueeze(1)).all() and corners.unique().numel() == 12
    check_numerically(model, lambda: term(model, x, mask, generator=torch.Generator().manual_seed(3)))


# Into Captum


def test_maps_go_into_captums_metrics() -> None:
    model, (x, _, target) = SmoothNet().double(), smooth_batch()
    term = attrreg.InputGradient()

    def shaken(images: Tensor) -> tuple[Tensor, Tensor]:
        noise = 1e-4 * torch.randn_like(images)
        return noise, images - noise

    phi = term.attribute(model, x, target=target)
    errors = [captum.metrics.infidelity(model, shaken, x, map, target=target) for map in (phi, torch.zeros_like(phi))]
    assert (errors[0] < 1e-3 * errors[1]).all()  # the gradient is the best linear explanation of a small shake

    explain = attrreg.captum.explanation_func(term, model)
    torch.testing.assert_close(explain(x, target), phi)
    torch.manual_seed(5)
    ours = captum.metrics.sensitivity_max(explain, x, target=target)
    torch.manual_seed(5)
    theirs = captum.metrics.sensitivity_max(
        lambda images, target: (
            captum.attr.Saliency(model).attribute(tuple(image.clone().requires_grad_() for image in images), target, abs=False)
            if isinstance(images, tuple)
            else captum.attr.Saliency(model).attribute(images.clone().requires_grad_(), target, abs=False)
        ),
        x,
        target=target,
    )
    torch.testing.assert_close(ours, theirs)
