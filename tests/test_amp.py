"""Mixed precision: the penalty in float32, its gradients near those of full precision, no silent inf."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attrreg
from attrreg import engines, objectives, scores
from attrreg.needs import Need, Value
from attrreg.ops import Phase, twice_differentiable
from attrreg.regularizer import AttributionRegularizer, SingleRegularizer
from attrreg.sites import OUTPUT
from attrreg.trace import Trace, passes
from tests.models import DEVICE, FAMILIES, Family, SmoothNet, assert_close, batch, flat, gradients

HALF = [torch.bfloat16, torch.float16]
ZERO = attrreg.baselines.Zero()


def terms(family: Family) -> AttributionRegularizer:
    share = attrreg.InputGradient(score=scores.SumLogProb(), objective=objectives.OutsideFraction()).named("share")
    return attrreg.InputGradient() + attrreg.GradCAM(family.layer) + 0.1 * attrreg.ActivationDifference() + 0.01 * share


@pytest.mark.parametrize("name", ["convnext", "vit", "swin"])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("way", ["attached, inside", "attached, outside", "inside", "evaluate"])
def test_gradients_are_near_those_of_full_precision(name: str, dtype: torch.dtype, way: str) -> None:
    family = FAMILIES[name]
    model, (x, mask, target) = family.build().eval(), batch(3, size=family.size)
    regularizer = terms(family)
    exact = regularizer.evaluate(model, x, mask, target, generator=torch.Generator().manual_seed(0))
    want = flat(gradients(model, exact.total))
    handle, generator = regularizer.attach(model) if "attached" in way else None, torch.Generator().manual_seed(0)
    with torch.autocast(DEVICE, dtype):
        if handle is not None:
            assert model(x).dtype == dtype
        if way == "evaluate":
            penalty = regularizer.evaluate(model, x, mask, target, generator=generator)
            value = penalty.total
            for term, part in exact.terms.items():
                assert float(penalty.terms[term]) == pytest.approx(float(part), rel=0.05), term
        elif way != "attached, outside":
            value = regularizer(model, x, mask, target, generator=generator)
    if way == "attached, outside":
        value = regularizer(model, x, mask, target, generator=generator)
    if handle is not None:
        handle.remove()
    assert value.dtype == torch.float32
    assert float(value.detach()) == pytest.approx(float(exact.total.detach()), rel=0.02)
    # The loss is scaled before its backward, as a GradScaler does.
    got = flat(gradients(model, value * 2.0**8)) / 2**8
    error = float((got - want).norm() / want.norm())
    assert error < (0.1 if dtype == torch.bfloat16 else 0.03)  # 8 and 11 bits, through some twenty layers


@pytest.mark.parametrize("name", ["convnext", "vit", "swin"])
@pytest.mark.parametrize("dtype", HALF)
def test_a_loop_may_call_backward_under_autocast(name: str, dtype: torch.dtype) -> None:
    family = FAMILIES[name]
    model, (x, mask, target) = family.build().eval(), batch(3, size=family.size)
    found = []
    for inside in (False, True):
        with torch.autocast(DEVICE, dtype):
            loss = F.cross_entropy(model(x), target) + terms(family)(model, x, mask, target, generator=torch.Generator().manual_seed(0))
            if inside:
                found.append(flat(gradients(model, loss)))
        if not inside:
            found.append(flat(gradients(model, loss)))
    assert (found[1] - found[0]).norm() <= 0.02 * found[0].norm()


HALF_OPERATORS: dict[str, Any] = {
    "layer norm": lambda x: F.layer_norm(x, (5,)),
    "group norm": lambda x: F.group_norm(x, 2),
    "group norm, weights": lambda x: F.group_norm(x, 2, *torch.tensor([[0.25, 1.5, 0.75, 1.25], [1, 2, 3, 4]]).to(x)),  # exact in all types
    "layer norm, wide weights": lambda x: F.layer_norm(
        x, (5,), torch.linspace(0.5, 1.5, 5).to(torch.promote_types(x.dtype, torch.float32))
    ),
    "instance norm": F.instance_norm,
    "gelu": F.gelu,
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", ["layer norm of a constant", "instance norm of a constant", "gelu", "gelu tanh", "silu"])
def test_second_derivatives_do_not_overflow(name: str, dtype: torch.dtype) -> None:
    functions = HALF_OPERATORS | {
        "layer norm of a constant": lambda x: F.layer_norm(x, (8,), eps=1e-6),
        "instance norm of a constant": lambda x: F.instance_norm(x[None], eps=1e-6)[0],
    }
    x = torch.full((3, 8), 500.0, dtype=dtype, requires_grad=True)
    with twice_differentiable(Phase()):
        y = functions[name](x)
    assert y.dtype == dtype
    (slope,) = torch.autograd.grad(y.float().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad((slope * torch.linspace(0.5, 1, 8)).sum(), x)
    assert slope.isfinite().all() and second.isfinite().all()


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("size", [1.0, 30.0])
@pytest.mark.parametrize("name", HALF_OPERATORS)
def test_second_derivatives_of_half_inputs_are_rounded_once(name: str, size: float, dtype: torch.dtype) -> None:
    x, gy, v = (torch.randn(3, 4, 6, 5).to(dtype) for _ in range(3))
    x, found, type = (size * x.float()).to(dtype), [], torch.finfo(dtype)
    for wide in (True, False):
        leaf, outer = ((each.double() if wide else each.clone()).requires_grad_() for each in (x, gy))
        with nullcontext() if wide else twice_differentiable(Phase()):
            y = HALF_OPERATORS[name](leaf)
        (slope,) = torch.autograd.grad(y, leaf, outer, create_graph=True)
        found.append(torch.autograd.grad(slope, [leaf, outer], v.to(slope.dtype)))
    for want, got in zip(*found, strict=True):
        assert got.dtype == dtype and want.any()
        # By half an eps of each value, or half of the smallest number that the type has; float32 has rounded before, far less.
        once = (type.eps * want.abs()).clamp(min=type.tiny * type.eps) / 2
        assert ((got.double() - want).abs() <= once + 1e-5 * want.abs().max()).all()


@pytest.mark.parametrize(
    ("filters", "settings"),
    [
        ((32, 16, 1, 1), {}),
        ((16, 1, 7, 7), {"padding": 3, "groups": 16}),
        ((512, 16, 3, 3), {"stride": 2}),
        ((8, 3, 7, 7), {"stride": 2}),
    ],
)
def test_convolutions_in_full_precision_keep_it_in_a_backward_under_autocast(filters: tuple[int, ...], settings: Any) -> None:
    x, w = (torch.randn(shape, requires_grad=True) for shape in ((2, filters[1] * settings.get("groups", 1), 12, 12), filters))
    found = []
    for ours in (False, True):
        with twice_differentiable(Phase()) if ours else nullcontext():
            y = F.conv2d(x, w, **settings)
        (slope,) = torch.autograd.grad(y.sin().sum(), x, create_graph=True)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=ours):
            first = torch.autograd.grad(y.square().sum(), [x, w], retain_graph=True)
            found.append((*first, *torch.autograd.grad(slope.square().sum(), [x, w])))
    for want, got in zip(*found, strict=True):
        assert (got - want).norm() <= 1e-5 * want.norm()


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("inside", [True, False])
def test_every_penalty_is_in_full_precision(dtype: torch.dtype, inside: bool) -> None:
    model, (x, mask, target) = SmoothNet(), batch(3, channels=2, size=8, classes=3)
    for regularizer in (attrreg.PGDEx(steps=1), attrreg.ActivationDifference(fill=ZERO), _OwnTerm()):
        exact = regularizer(model, x, mask, target)
        with regularizer.attach(model):
            with torch.autocast(DEVICE, dtype):
                model(x)
                value = regularizer(model, x, mask, target) if inside else None
            value = regularizer(model, x, mask, target) if value is None else value
        assert value.dtype == torch.float32
        assert float(value.detach()) == pytest.approx(float(exact.detach()), rel=0.01)


@pytest.mark.parametrize(("kind", "weight"), [("smoothgrad_sq", 300.0), ("vargrad", 1e-3)])
def test_squares_of_half_activations_neither_overflow_nor_vanish(kind: Any, weight: float) -> None:
    layer = nn.Conv2d(2, 4, 1, bias=False)
    nn.init.constant_(layer.weight, weight)
    model = nn.Sequential(layer, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    term = attrreg.captum.NoiseTunnel(attrreg.captum.LayerActivation("0"), kind, std=0.1)
    with torch.autocast(DEVICE, torch.float16):
        phi = term.attribute(model, 1 + torch.rand(2, 2, 8, 8))
    assert phi.isfinite().all() and (phi > 0).all()


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("inside", [True, False])
def test_a_forward_recorded_under_autocast_serves_no_other_pass_outside_it(dtype: torch.dtype, inside: bool) -> None:
    model, (x, mask, target) = SmoothNet(), batch(3, channels=2, size=8, classes=3)
    regularizer, alone = attrreg.ActivationDifference(fill=ZERO), attrreg.InputGradient()
    with regularizer.attach(model), torch.autocast(DEVICE, dtype):
        model(x)
        with torch.autocast(DEVICE, dtype, enabled=inside), passes() as counted:
            value = regularizer(model, x, mask)
            torch.testing.assert_close(value, regularizer(model, x, mask))
    assert counted.forward == (1 if inside else 2) + 2
    with alone.attach(model), passes() as counted:
        with torch.autocast(DEVICE, dtype):
            model(x)
        with torch.autocast(DEVICE, dtype, enabled=inside):
            alone(model, x, mask, target)
    assert counted.forward == 0


class Exact(SmoothNet):
    """Leaves autocast by itself."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(DEVICE, enabled=False):
            return super().forward(x)


@pytest.mark.parametrize("dtype", HALF)
def test_baselines_are_made_in_full_precision(dtype: torch.dtype) -> None:
    model, (x, _, target) = Exact(), batch(3, channels=2, size=8, classes=3)
    regularizer = attrreg.IntegratedGradients(steps=2, baseline=attrreg.baselines.Blur(1.0))
    exact = regularizer.attribute(model, x, target)
    with torch.autocast(DEVICE, dtype):
        found = regularizer.attribute(model, x, target)
    assert_close([found], [exact], 1e-5)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(
    "regularizer",
    [
        attrreg.InputGradient(),
        attrreg.ActivationDifference(fill=ZERO),
        attrreg.captum.LayerActivation(),
        attrreg.InputGradient() + attrreg.ActivationDifference(fill=ZERO),
    ],
)
@pytest.mark.parametrize("way", ["inside", "attached, outside"])
def test_a_head_outside_the_model_computes_as_autocast_says(dtype: torch.dtype, regularizer: AttributionRegularizer, way: str) -> None:
    model, head, (x, mask, target) = SmoothNet(classes=6), nn.Linear(6, 3), batch(3, channels=2, size=8, classes=3)
    want = float(regularizer(model, x, mask, target, output=head).detach())
    with regularizer.attach(model) if way != "inside" else nullcontext():
        with torch.autocast(DEVICE, dtype):
            model(x)
        with torch.autocast(DEVICE, dtype, enabled=way == "inside"):
            assert float(regularizer(model, x, mask, target, output=head).detach()) == pytest.approx(want, rel=0.05)


class _OwnTerm(SingleRegularizer):
    """A user's, who does not think of precision."""

    def needs(self) -> tuple[Need, ...]:
        return (Value(OUTPUT),)

    def per_image(self, trace: Trace) -> Tensor:
        return trace.value(OUTPUT).square().sum(dim=1)


# Recipes


def train(model: nn.Module, dtype: torch.dtype, regularizer: AttributionRegularizer, steps: int, scale: float) -> Any:
    """A loop as PyTorch's own page on AMP has it; returns the scaler's scales and the penalties."""
    x, mask, target = batch(4, channels=2, size=8, classes=3)
    optimizer = torch.optim.SGD(model.parameters(), 3e-2)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=scale, growth_interval=1000, enabled=dtype == torch.float16)
    scales, penalties = [], []
    with regularizer.attach(model):
        for _ in range(steps):
            optimizer.zero_grad()
            with torch.autocast(DEVICE, dtype):
                loss = F.cross_entropy(model(x), target)
                penalty = regularizer(model, x, mask, target)
            scaler.scale(loss + penalty).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
            penalties.append(float(penalty.detach()))
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    return scales, penalties


@pytest.mark.parametrize("dtype", HALF)
def test_training_lowers_the_penalty(dtype: torch.dtype) -> None:
    _, penalties = train(SmoothNet(), dtype, 100.0 * attrreg.InputGradient(), 30, 2.0**10)
    assert penalties[-1] < 0.5 * penalties[0]


def test_the_scaler_backs_off_from_a_large_penalty_and_goes_on() -> None:
    model = SmoothNet()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    scales, penalties = train(model, torch.float16, 1e7 * attrreg.InputGradient(), 40, 2.0**16)
    assert torch.tensor(penalties).isfinite().all()
    backed_off = sum(scale < previous for previous, scale in zip([2.0**16, *scales], scales, strict=False))
    assert 0 < backed_off < 40 and scales[-1] == scales[-5] > 0  # it found a scale, and kept it
    assert any((parameter - old).abs().amax() > 0 for parameter, old in zip(model.parameters(), before, strict=True))
    assert penalties[-1] < penalties[0]


def test_clipping_after_unscaling_is_that_of_full_precision() -> None:
    found = []
    for scale in (1.0, 2.0**12):
        torch.manual_seed(0)
        model, (x, mask, target) = SmoothNet(), batch(4, channels=2, size=8, classes=3)
        optimizer, scaler = torch.optim.SGD(model.parameters(), 1e-2), torch.amp.GradScaler(DEVICE, init_scale=scale)
        scaler.scale(F.cross_entropy(model(x), target) + 10 * attrreg.InputGradient()(model, x, mask, target)).backward()
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        found.append([norm, *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)])
    assert float(found[0][0]) > 0.1  # it clips
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("dtype", HALF)
def test_finite_differences_run_in_full_precision(dtype: torch.dtype) -> None:
    family = FAMILIES["vit"]
    model, (x, mask, target) = family.build().eval(), batch(3, size=family.size)
    regularizer = attrreg.InputGradient() + attrreg.GradCAM(family.layer)
    want = flat(gradients(model, regularizer(model, x, mask, target)))
    seen: list[torch.dtype] = []
    with model.register_forward_hook(lambda module, args, output: seen.append(output.dtype)), torch.autocast(DEVICE, dtype):
        value = regularizer.using(engines.FiniteDifference())(model, x, mask, target)
    assert seen[0] == dtype and len(seen) > 2 and set(seen[1:]) == {torch.float32}
    got = flat(gradients(model, value * 2.0**8))
    assert float(F.cosine_similarity(got, want, dim=0)) > 0.98


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("engine", [engines.DoubleBackward(), engines.FiniteDifference()])
def test_a_model_all_in_half_precision(dtype: torch.dtype, engine: engines.Engine) -> None:
    model, (x, mask, target) = SmoothNet().to(dtype), batch(3, channels=2, size=8, classes=3)
    wide = copy.deepcopy(model).float()  # of the same rounded weights
    for term in (attrreg.InputXGradient(), attrreg.GradCAM("body"), attrreg.ActivationDifference(fill=ZERO)):
        exact = term(wide, x.to(dtype).float(), mask, target)
        want = flat(gradients(wide, exact))
        value = term.using(engine)(model, x.to(dtype), mask, target)
        assert value.dtype == torch.float32
        assert float(value.detach()) == pytest.approx(float(exact.detach()), rel=0.05, abs=1e-4), term
        got = flat(gradients(model, value * 2.0**8)) / 2**8
        if engine.twice or isinstance(term, attrreg.ActivationDifference):
            assert float((got - want).norm() / want.norm()) < (0.1 if dtype == torch.bfloat16 else 0.03), term
        else:  # a step in half precision leaves few bits of the difference that it makes
            assert float(F.cosine_similarity(got, want, dim=0)) > 0.5, term


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", ["resnet", "efficientnet"])  # the others: `pytest --device cuda`, above
def test_on_a_gpu(dtype: torch.dtype, name: str) -> None:
    family = FAMILIES[name]
    model, (x, mask, target) = family.build().eval().cuda(), (tensor.cuda() for tensor in batch(3, size=family.size))
    regularizer = terms(family)
    want = flat(gradients(model, regularizer(model, x, mask, target, generator=torch.Generator().manual_seed(0))))
    with regularizer.attach(model), torch.autocast("cuda", dtype):
        model(x)
        value = regularizer(model, x, mask, target, generator=torch.Generator().manual_seed(0))
    assert value.dtype == torch.float32
    got = flat(gradients(model, value * 2.0**8)) / 2**8
    assert float(F.cosine_similarity(got, want, dim=0)) > 0.95
