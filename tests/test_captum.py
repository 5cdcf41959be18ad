"""Captum's attributions as regularizers: the right map, the right parameter gradient, or a refusal with its reason."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable
from typing import Any

import captum.attr
import captum.metrics
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import attrreg
from attrreg import baselines, engines, scores
from attrreg.captum import Neuron
from attrreg.captum.bridge import ACCEPTED
from attrreg.captum.refusals import REFUSED
from attrreg.trace import passes
from benchmarks import captum_check
from benchmarks.captum_check import TOLERANCE, Net, cases, check, ours
from tests import oracles
from tests.models import FAMILIES, SmoothNet, assert_close, gradients, smooth_batch
from tests.test_gradients import check_numerically
from tests.test_side_effects import CALLS, assert_same, snapshot

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


def test_captums_hooks_make_a_gradient_that_is_wrong_where_ours_is_right() -> None:
    """Why its code is not run with another gradient function: the hooks fire again in the penalty's own backward."""
    mended = captum_check.graph(CASES["GuidedBackprop"], create_graph=True)
    assert isinstance(mended, float) and mended > 1e-3


@pytest.mark.parametrize("family", ["inplace", *(pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES if name != "inplace")])
def test_maps_are_captums_on_real_models(family: str) -> None:
    known = FAMILIES[family]
    model, size = known.build().double().eval(), known.size
    with torch.no_grad():
        for parameter in model.parameters():  # some heads start at zero
            parameter.add_(0.01 * torch.randn_like(parameter))
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


def test_permuted_segments_come_from_other_images() -> None:
    model, (x, mask, target) = SmoothNet().double(), smooth_batch()
    seen: list[Tensor] = []
    hook = model.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().clone()))
    term = attrreg.from_captum(captum.attr.FeaturePermutation, feature_mask=SEGMENTS)
    value = term(model, x, mask, target)
    hook.remove()
    map, outside = torch.zeros_like(x), (~mask).unsqueeze(1).double()
    before = oracles.score_target_logit
    for number, image in enumerate(seen[1:]):
        here = torch.eq(SEGMENTS, number).expand_as(x)
        assert torch.equal(image[~here], x[~here])
        sources = [[bool(torch.equal(image[i][here[i]], x[j][here[j]])) for j in range(3)] for i in range(3)]
        assert all(sum(row) == 1 for row in sources) and all(sum(column) == 1 for column in zip(*sources, strict=True))
        falls = torch.stack(
            [before(model(x[i : i + 1]), target[i : i + 1]) - before(model(image[i : i + 1]), target[i : i + 1]) for i in range(3)]
        )
        map = map + here * falls.view(3, 1, 1, 1)
    want = ((outside * map) ** 2).sum(dim=(1, 2, 3)).mean()
    torch.testing.assert_close(value, want)
    assert_close(gradients(model, value), gradients(model, want), 1e-10)


def test_conductance_and_integrated_gradients_add_up_to_the_same() -> None:
    model, (x, _, target) = Net().eval().double(), batch()
    paths = (attrreg.IntegratedGradients(steps=40), attrreg.captum.LayerConductance("body", steps=400))
    sums = [term.attribute(model, x, target).sum(dim=(1, 2, 3)) for term in paths]
    torch.testing.assert_close(sums[0], sums[1], rtol=2e-2, atol=1e-5)


# Draws


def noisy(of: attrreg.MapRegularizer, kind: Any) -> attrreg.captum.NoiseTunnel:
    return attrreg.captum.NoiseTunnel(of, kind, samples=3, std=0.3)


@pytest.mark.parametrize("kind", ["smoothgrad", "smoothgrad_sq", "vargrad"])
@pytest.mark.parametrize("name", ["input_gradient", "grad_cam"])
def test_noise_tunnel_equals_naive_at_the_images_it_ran_on(name: str, kind: str) -> None:
    model, (x, mask, target) = SmoothNet().double(), smooth_batch()
    of = {"input_gradient": attrreg.InputGradient(), "grad_cam": attrreg.GradCAM("body")}[name]
    seen: list[Tensor] = []
    hook = model.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().clone()))
    value = noisy(of, kind)(model, x, mask, target)
    hook.remove()
    score = oracles.score_target_logit
    naive: Callable[[Tensor], Tensor] = {
        "input_gradient": lambda image: oracles.input_gradient(model, image, target, score),
        "grad_cam": lambda image: oracles.grad_cam(model, image, target, score, "body"),
    }[name]
    maps = torch.stack([naive(image) for image in seen])
    mean, square = maps.mean(0), (maps * maps).mean(0)
    map = {"smoothgrad": mean, "smoothgrad_sq": square, "vargrad": square - mean * mean}[kind]
    want = oracles.squared_outside(map, oracles.resize_by_area(mask.double(), map.shape[-1]).unsqueeze(1)).mean()
    assert len(seen) == 3 and all(0.2 < float((image - x).std()) < 0.4 for image in seen)
    assert len({float(image.sum()) for image in seen}) == 3
    torch.testing.assert_close(value, want)
    assert_close(gradients(model, value), gradients(model, want), 1e-10)


def test_noise_tunnel_without_noise_is_captums() -> None:
    model, (x, _, target) = Net().eval().double(), batch()
    for kind in ("smoothgrad", "smoothgrad_sq"):
        settings: dict[str, Any] = {"nt_type": kind, "nt_samples": 2, "stdevs": 0.0}
        want = captum.attr.NoiseTunnel(captum.attr.InputXGradient(model)).attribute(x, target=target, **settings)
        got = attrreg.from_captum(captum.attr.NoiseTunnel, attribution_method=captum.attr.InputXGradient, **settings)
        torch.testing.assert_close(got.attribute(model, x, target), want.detach())


@pytest.mark.parametrize("neuron", [False, True])
def test_gradient_shap_is_captums_in_the_mean(neuron: bool) -> None:
    model, (x, _, target), others = Net().eval().double(), batch(), captum_check.OTHERS
    torch.manual_seed(0)
    if neuron:
        at: Any = {"layer": "body", "neuron_selector": (1, 2, 2)}
        theirs = captum.attr.NeuronGradientShap(model, model.body).attribute(x, (1, 2, 2), others, n_samples=3000)
        term = attrreg.from_captum(captum.attr.NeuronGradientShap, baselines=others, n_samples=300, **at)
    else:
        theirs = captum.attr.GradientShap(model).attribute(x, others, n_samples=3000, target=target)
        term = attrreg.from_captum(captum.attr.GradientShap, baselines=others, n_samples=300)
    got = term.attribute(model, x, target)
    assert float((got - theirs.detach()).norm() / theirs.norm()) < 0.15


def test_one_of_draws_each_image_by_itself() -> None:
    images = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 2, 3, 3)
    drawn = baselines.OneOf(images)(torch.zeros(400, 2, 3, 3), None, torch.Generator().manual_seed(0))
    assert (drawn == drawn[:, :1, :1, :1]).all()
    counts = drawn[:, 0, 0, 0].long().bincount()
    assert len(counts) == 4 and counts.min() > 60


# ReLU layers with another rule


class Residual(nn.Module):
    """One ReLU module, in place, twice in a forward, with BatchNorm between and a ReLU before a skip connection."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.body = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 3)
        self.saves = False

    def block(self, h: Tensor) -> Tensor:
        return self.relu(self.norm(self.body(h)) + h)  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        h = self.relu(self.stem(x))
        h = checkpoint(self.block, h, use_reentrant=False) if self.saves else self.block(h)
        return self.head(h.square().mean(dim=(2, 3)))  # type: ignore[no-any-return]


RULES: dict[str, tuple[attrreg.MapRegularizer, Callable[[Tensor, Tensor], Tensor]]] = {
    "guided": (attrreg.captum.GuidedBackprop(), lambda gradient, x: gradient.clamp(min=0) * (x > 0)),
    "deconvolution": (attrreg.captum.Deconvolution(), lambda gradient, x: gradient.clamp(min=0)),
}


def by_hand(model: Residual, x: Tensor, target: Tensor, rule: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The map layer by layer: the score's gradient at each ReLU's output, the rule, on to the next."""
    image = x.clone().requires_grad_()
    first = model.stem(image)
    h = first.relu()
    second = model.norm(model.body(h)) + h
    last = second.relu()
    score = oracles.score_target_logit(model.head(last.square().mean(dim=(2, 3))), target)
    (at_last,) = torch.autograd.grad(score, last, create_graph=True)
    (at_h,) = torch.autograd.grad(second, h, rule(at_last, second), create_graph=True)
    (at_image,) = torch.autograd.grad(first, image, rule(at_h, first), create_graph=True)
    return at_image


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("saves", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("name", RULES)
def test_rules_equal_a_map_made_by_hand(name: str, saves: bool, training: bool) -> None:
    model, (x, mask, target) = Residual().double().train(training), smooth_batch()
    term, rule = RULES[name]
    want = oracles.squared_outside(by_hand(model, x, target, rule), mask.unsqueeze(1).double()).mean()
    model.saves = saves
    value = term(model, x, mask, target)
    torch.testing.assert_close(value, want)
    assert_close(gradients(model, value), gradients(model, want), 1e-10)
    check_numerically(model, lambda: term(model, x, mask, target))


@pytest.mark.parametrize("kind", ["GuidedBackprop", "Deconvolution", "GuidedGradCam"])
@pytest.mark.filterwarnings("ignore:Setting backward hooks on ReLU:UserWarning")
def test_rules_equal_captum_on_a_resnet(kind: str) -> None:
    model = torchvision.models.resnet18(num_classes=4).double().eval()
    x, target = torch.randn(2, 3, 48, 48, dtype=torch.float64), torch.tensor([1, 3])
    extra = [model.layer3] if kind == "GuidedGradCam" else []
    want = getattr(captum.attr, kind)(model, *extra).attribute(x.clone().requires_grad_(), target=target).detach()
    settings: dict[str, Any] = {"layer": "layer3"} if extra else {}
    got = attrreg.from_captum(getattr(captum.attr, kind), **settings).attribute(model, x, target)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9 * float(want.abs().max()))


def test_rules_share_a_sum_with_plain_gradients() -> None:
    model, (x, mask, target) = Residual().double(), smooth_batch()
    terms = [attrreg.InputGradient(), attrreg.captum.GuidedBackprop(), attrreg.captum.Deconvolution(), attrreg.GradCAM("body")]
    together = sum(terms).evaluate(model, x, mask, target)  # type: ignore[union-attr]
    for term in terms:
        torch.testing.assert_close(together.terms[type(term).__name__], term(model, x, mask, target).detach())
    alone = [gradients(model, term(model, x, mask, target)) for term in terms]
    assert_close(gradients(model, together.total), [torch.stack(parts).sum(0) for parts in zip(*alone, strict=True)], 1e-10)


class Sideways(nn.Module):
    """Fails on request behind the ReLU, with the rule's hooks in place."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Residual()
        self.fails = False

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        if self.fails:
            raise ArithmeticError("from inside the model")
        return logits


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("kind", [attrreg.captum.GuidedBackprop, attrreg.captum.GuidedGradCam])
def test_rules_leave_nothing_behind(kind: Callable[..., Any], fails: bool, call: str) -> None:
    model, (x, mask, target) = Sideways().double(), smooth_batch()
    model.fails = fails
    term = kind("net.body") if kind is attrreg.captum.GuidedGradCam else kind()
    before = snapshot(model, x)
    if fails:
        with pytest.raises(ArithmeticError):
            CALLS[call](term, model, x, mask, target)
    else:
        CALLS[call](term, model, x, mask, target)
    assert_same(before, snapshot(model, x), but=("parameters",) if call == "backward" and not fails else ())


@pytest.mark.parametrize("name", RULES)
def test_rules_without_a_relu_layer_are_refused(name: str) -> None:
    model, (x, mask, target) = SmoothNet().double(), smooth_batch()
    before = snapshot(model, x)
    with pytest.raises(ValueError, match=r"No nn\.ReLU layer ran in the forward"):
        RULES[name][0](model, x, mask, target)
    assert_same(before, snapshot(model, x))


def test_rules_are_refused_with_finite_differences() -> None:
    model, (x, mask, target) = Residual().double(), smooth_batch()
    with pytest.raises(ValueError, match="is the gradient of none"):
        (attrreg.InputGradient() + attrreg.captum.GuidedBackprop()).using(engines.FiniteDifference())(model, x, mask, target)


# Values, sums, settings


@pytest.mark.parametrize("name", TAKEN)
def test_terms_are_values(name: str) -> None:
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
    with passes() as counted:
        attrreg.from_captum(captum.attr.NeuronConductance, layer="body", neuron_selector=(0, 1, 1), n_steps=3)(model, x, mask, target)
    assert (counted.forward, counted.backward) == (3, 6)
    with passes() as counted:
        attrreg.from_captum(captum.attr.FeatureAblation, feature_mask=SEGMENTS)(model, x, mask, target)
    assert (counted.forward, counted.backward) == (5, 0)


def test_settings_are_captums_by_name_and_default() -> None:
    make = attrreg.from_captum
    assert make(captum.attr.Saliency, abs=False) == attrreg.InputGradient()
    assert make(captum.attr.Saliency) == attrreg.InputGradient(absolute=True)
    assert make(captum.attr.IntegratedGradients) == attrreg.IntegratedGradients(steps=50)
    assert make(captum.attr.IntegratedGradients, method="riemann_left", baselines=0.5, n_steps=4) == attrreg.IntegratedGradients(
        4, 0.5, "riemann_left"
    )
    assert make(captum.attr.LayerGradCam, layer="a.b", relu_attributions=True) == attrreg.GradCAM("a.b", relu=True)
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
    (TypeError, "layer must be the dotted name of a layer", captum.attr.LayerGradCam, {"layer": nn.Identity()}),
    (ValueError, "rule 'x' is unknown", captum.attr.InternalInfluence, {"layer": "body", "method": "x"}),
    (ValueError, "steps must be an integer of at least 1", captum.attr.LayerConductance, {"layer": "body", "n_steps": 0}),
    (ValueError, "there would be no path", captum.attr.LayerConductance, {"layer": "body", "baselines": baselines.Noise()}),
    (TypeError, "segments must be a tensor of integers", captum.attr.FeatureAblation, {"feature_mask": torch.rand(8, 8)}),
    (ValueError, "one set of segments", captum.attr.FeatureAblation, {"feature_mask": SEGMENTS.repeat(3, 1, 1, 1)}),
    (ValueError, "would draw anew", captum.attr.ShapleyValues, {"feature_mask": SEGMENTS, "baselines": baselines.Noise()}),
    (ValueError, "11 segments take 2048 forwards", captum.attr.ShapleyValues, {"feature_mask": torch.arange(11).view(1, 11)}),
    (TypeError, "GuidedBackprop", captum.attr.NoiseTunnel, {"attribution_method": captum.attr.GuidedBackprop}),
    (ValueError, "unknown kind 'x'", captum.attr.NoiseTunnel, {"attribution_method": captum.attr.Saliency, "nt_type": "x"}),
    (ValueError, "samples must be", captum.attr.NoiseTunnel, {"attribution_method": captum.attr.Saliency, "nt_samples": 0}),
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
