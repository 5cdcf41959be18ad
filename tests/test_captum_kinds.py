"""Captum's kinds that draw, and those with another rule for ReLU layers: against maps made by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import captum.attr
import captum.metrics
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import attrreg
from attrreg import baselines
from attrreg.trace import Passes, passes
from benchmarks import captum_check
from benchmarks.captum_check import Net
from tests import models, oracles
from tests.models import FAMILIES, SmoothNet, assert_close, gradients, smooth_batch
from tests.test_captum import SEGMENTS, batch
from tests.test_gradients import check_numerically
from tests.test_sharing import check_memory
from tests.test_side_effects import CALLS, assert_same, snapshot

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
    score = oracles.score_contrast
    naive: Callable[[Tensor], Tensor] = {
        "input_gradient": lambda image: oracles.input_gradient(model, image, target, score),
        "grad_cam": lambda image: oracles.grad_cam(model, image, target, score, "body"),
    }[name]
    maps = torch.stack([naive(image) for image in seen])
    mean, square = maps.mean(0), (maps * maps).mean(0)
    map = {"smoothgrad": mean, "smoothgrad_sq": square, "vargrad": square - mean * mean}[kind]
    want = oracles.log_outside(map, oracles.resize_by_area(mask.double(), map.shape[-1]).unsqueeze(1)).mean()
    assert len(seen) == 3 and all(0.2 < float((image - x).std()) < 0.4 for image in seen)
    assert len({float(image.sum()) for image in seen}) == 3
    torch.testing.assert_close(value, want)
    assert_close(gradients(model, value), gradients(model, want), 1e-10)


def test_vargrad_in_float32_is_exact_under_little_noise() -> None:
    model, (x, _, target) = SmoothNet(), smooth_batch()
    seen: list[Tensor] = []
    hook = model.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().clone()))
    got = attrreg.captum.NoiseTunnel(attrreg.InputGradient(), "vargrad", std=1e-3).attribute(model, x.float(), target)
    hook.remove()
    maps = torch.stack([attrreg.InputGradient().attribute(model.double(), image.double(), target) for image in seen])
    assert (got >= 0).all()
    torch.testing.assert_close(got.double(), maps.var(dim=0, correction=0), rtol=0.01, atol=1e-3 * float(got.max()))


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
    drawn = baselines.OneOf(images)(torch.zeros(400, 2, 3, 3), None, torch.Generator(images.device).manual_seed(0))
    assert (drawn == drawn[:, :1, :1, :1]).all()
    counts = drawn[:, 0, 0, 0].long().bincount()
    assert len(counts) == 4 and counts.min() > 60


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
    want = oracles.log_outside(map, 1 - outside).mean()
    torch.testing.assert_close(value, want)
    assert_close(gradients(model, value), gradients(model, want), 1e-10)


# ReLU layers with another rule


class Residual(nn.Module):
    """One ReLU module, in place, called in two ways, with BatchNorm between and a ReLU before a skip connection. Can fail behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.body = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 3)
        self.saves = self.fails = False

    def block(self, h: Tensor) -> Tensor:
        return self.relu(input=self.norm(self.body(h)) + h)  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        h = self.relu(self.stem(x))
        h = checkpoint(self.block, h, use_reentrant=False) if self.saves else self.block(h)
        if self.fails:
            raise ArithmeticError("from inside the model")
        return self.head(h.square().mean(dim=(2, 3)))  # type: ignore[no-any-return]


SMOOTH = attrreg.objectives.SquaredOutside()  # without kinks that a central difference could cross
RULES: dict[str, tuple[attrreg.MapRegularizer, Callable[[Tensor, Tensor], Tensor]]] = {
    "guided": (attrreg.captum.GuidedBackprop(objective=SMOOTH), lambda gradient, x: gradient.clamp(min=0) * (x > 0)),
    "deconvolution": (attrreg.captum.Deconvolution(objective=SMOOTH), lambda gradient, x: gradient.clamp(min=0)),
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
    model = FAMILIES["resnet_torchvision"].build().double().eval()
    x, target = torch.randn(2, 3, 48, 48, dtype=torch.float64), torch.tensor([1, 3])
    extra = [model.layer3] if kind == "GuidedGradCam" else []
    want = getattr(captum.attr, kind)(model, *extra).attribute(x.clone().requires_grad_(), target=target).detach()
    settings: dict[str, Any] = {"layer": "layer3"} if extra else {}
    got = attrreg.from_captum(getattr(captum.attr, kind), **settings).attribute(model, x, target)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9 * float(want.abs().max()))


class PreActivation(nn.Module):
    """What enters the ReLU also goes past it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.relu = nn.ReLU()
        self.body = nn.Conv2d(4, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        return (self.body(self.relu(h)) + h[:, :3]).mean(dim=(2, 3))  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore:Setting backward hooks on ReLU:UserWarning")
def test_a_rule_stays_at_the_relu_where_captums_reaches_past_it() -> None:
    model, (x, _, target) = PreActivation().double(), smooth_batch()
    got = attrreg.captum.GuidedBackprop().attribute(model, x, target)
    image = x.clone().requires_grad_()
    h = model.stem(image)
    last = h.relu()
    (at_last,) = torch.autograd.grad(oracles.score_target_logit(model.body(last).mean(dim=(2, 3)), target), last)
    past = torch.zeros_like(h)
    for i, t in enumerate(target.tolist()):
        past[i, t] = 1 / 64
    (want,) = torch.autograd.grad(h, image, at_last.clamp(min=0) * (h > 0) + past)
    torch.testing.assert_close(got, want)
    theirs = captum.attr.GuidedBackprop(model).attribute(x.clone().requires_grad_(), target=target)
    assert float((theirs - want).norm()) > 0.01 * float(want.norm())


def test_rules_share_a_sum_with_plain_gradients() -> None:
    model, (x, mask, target) = Residual().double(), smooth_batch()
    terms = [attrreg.InputGradient(), attrreg.captum.GuidedBackprop(), attrreg.captum.Deconvolution(), attrreg.GradCAM("body")]
    together = sum(terms).evaluate(model, x, mask, target)  # type: ignore[union-attr]
    for term in terms:
        torch.testing.assert_close(together.terms[type(term).__name__], term(model, x, mask, target).detach())
    alone = [gradients(model, term(model, x, mask, target)) for term in terms]
    assert_close(gradients(model, together.total), [torch.stack(parts).sum(0) for parts in zip(*alone, strict=True)], 1e-10)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("kind", [attrreg.captum.GuidedBackprop, attrreg.captum.GuidedGradCam])
def test_rules_leave_nothing_behind(kind: Callable[..., Any], fails: bool, call: str) -> None:
    model, (x, mask, target) = Residual().double(), smooth_batch()
    model.fails = fails
    term = kind("body") if kind is attrreg.captum.GuidedGradCam else kind()
    before = snapshot(model, x)
    if fails:
        with pytest.raises(ArithmeticError):
            CALLS[call](term, model, x, mask, target)
    else:
        CALLS[call](term, model, x, mask, target)
    assert_same(before, snapshot(model, x), but=("parameters",) if call == "backward" and not fails else ())


def test_rules_leave_no_memory_behind() -> None:
    check_memory(Residual().double(), attrreg.captum.GuidedGradCam("body"), smooth_batch(), attach=False)


@pytest.mark.parametrize("name", RULES)
def test_rules_without_a_relu_layer_are_refused(name: str) -> None:
    model, (x, mask, target) = SmoothNet().double(), smooth_batch()
    before = snapshot(model, x)
    with pytest.raises(ValueError, match=r"No nn\.ReLU layer ran in the forward"):
        RULES[name][0](model, x, mask, target)
    assert_same(before, snapshot(model, x))


@pytest.mark.parametrize("attach", [False, True])
@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_the_last_maps_activations_need_no_gradient_there(name: str, attach: bool) -> None:
    family = FAMILIES[name]
    model, (x, mask, target) = family.build(), models.batch(2, channels=3, size=family.size, classes=5)
    reg = attrreg.captum.LayerActivation()
    with torch.no_grad():
        cam = attrreg.GradCAM().attribute(model.eval(), x, target)
    assert reg.attribute(model, x, target).shape[2:] == cam.shape[2:]
    with reg.attach(model) if attach else torch.enable_grad():
        for _ in range(2):
            with passes() as counted:
                if attach:
                    model(x)
                value = reg(model, x, mask, target)
            assert value > 0 and value.requires_grad and counted.forward == (0 if attach else 1)


def test_the_activations_with_grad_cam_are_those_of_its_layer() -> None:
    family = FAMILIES["resnet"]
    model, (x, mask, target) = family.build().eval(), models.batch(2, channels=3, size=family.size, classes=5)
    alone = attrreg.captum.LayerActivation()(model, x, mask, target)
    together = (attrreg.captum.LayerActivation() + attrreg.GradCAM()).evaluate(model, x, mask, target)
    torch.testing.assert_close(together.terms["LayerActivation"], alone.detach())


def costs() -> list[tuple[attrreg.MapRegularizer, Passes]]:
    """The table of costs in docs/captum.md, of three steps or samples and four segments."""
    own = attrreg.captum
    return [
        (own.LayerActivation("body"), Passes(1, 0)),
        (own.LayerGradientXActivation("body"), Passes(1, 1)),
        (own.InternalInfluence("body", steps=3), Passes(3, 3)),
        (own.LayerConductance("body", steps=3), Passes(4, 3)),
        (own.NeuronConductance(own.Neuron("body", (1, 2, 2)), steps=3), Passes(3, 6)),
        (own.NoiseTunnel(attrreg.InputXGradient(), samples=3), Passes(3, 3)),
        (own.GuidedBackprop(), Passes(1, 1)),
        (own.Deconvolution(), Passes(1, 1)),
        (own.GuidedGradCam("body"), Passes(2, 2)),
        (own.FeatureAblation(SEGMENTS), Passes(5, 0)),
        (own.ShapleyValues(SEGMENTS), Passes(16, 0)),
    ]


@pytest.mark.parametrize(("term", "cost"), costs(), ids=lambda value: type(value).__name__)
def test_passes_are_those_of_the_documented_table(term: attrreg.MapRegularizer, cost: Passes) -> None:
    with passes() as counted:
        term(Net(rectified=True).double(), *batch())
    assert counted == cost


def test_a_neuron_of_the_class_token() -> None:
    model = timm.create_model("test_vit", num_classes=3, img_size=64).double().eval()
    x, target = torch.rand(2, 3, 64, 64, dtype=torch.float64), torch.tensor([0, 2])
    settings: Any = {"neuron_selector": (0, 3), "n_steps": 3, "method": "gausslegendre"}
    want = captum.attr.NeuronConductance(model, model.norm).attribute(x.clone().requires_grad_(), target=target, **settings)
    got = attrreg.from_captum(captum.attr.NeuronConductance, layer="norm", **settings).attribute(model, x, target)
    assert got.any()
    torch.testing.assert_close(got, want.detach())
