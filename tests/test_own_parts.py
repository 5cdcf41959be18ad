"""Parts of one's own: what they give is checked, and what they get is as PyTorch would have it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import attrreg
from attrreg import baselines, scores
from attrreg.needs import Grad, Need
from attrreg.objectives import AbsoluteOutside, LogOutside, Objective, SquaredOutside
from attrreg.ops.rectify import Rule
from attrreg.points import At, Rectified
from attrreg.scores import Score, TargetLogit
from attrreg.sites import INPUT, OUTPUT
from attrreg.spec import Spec
from attrreg.trace import Trace
from tests.models import SmoothNet, assert_close, gradients, smooth_batch

x, mask, target = smooth_batch()


@dataclass(frozen=True, repr=False)
class Read(attrreg.MapRegularizer):
    """Declares the input gradient, and reads from the trace what a function reads."""

    read: Callable[[Trace], Any]
    score: Score = TargetLogit()
    objective: Objective = AbsoluteOutside()

    def needs(self) -> tuple[Need, ...]:
        return (Grad(INPUT, self.score),)

    def attribution(self, trace: Trace) -> Tensor:
        found: Tensor = self.read(trace)
        return found


def of_gradient(change: Callable[[Tensor], Any]) -> Read:
    return Read(lambda trace: change(trace.grad(INPUT, TargetLogit())))


MAPS: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "without channels": (lambda map: map.sum(dim=1), r"got torch\.float64 \(3, 8, 8\)"),
    "one for all images": (lambda map: map.mean(dim=0, keepdim=True), r"got torch\.float64 \(1, 2, 8, 8\)"),
    "integers": (lambda map: (map > 0).int(), r"got torch\.int32 \(3, 2, 8, 8\)"),
    "an array": (lambda map: map.detach().numpy(force=True), r"got a ndarray"),
    "nothing": (lambda map: None, r"got a NoneType"),
}


@pytest.mark.parametrize("name", MAPS)
def test_a_map_of_another_form_is_refused(name: str) -> None:
    read, got = MAPS[name]
    model, regularizer = SmoothNet().double(), of_gradient(read)
    message = rf"Read: attribution\(trace\) must return a floating-point map \(3, C, h, w\), {got}\. Return .* keepdim=True"
    for call in (lambda: regularizer(model, x, mask, target), lambda: regularizer.attribute(model, x, target)):
        with pytest.raises(ValueError, match=message):
            call()


def test_maps_of_any_channels_and_size_are_taken() -> None:
    model = SmoothNet().double()
    summed = of_gradient(lambda map: map.sum(dim=1, keepdim=True)[..., ::2, ::2])
    assert summed.attribute(model, x, target).shape == (3, 1, 4, 4)
    assert summed(model, x, mask, target, annotated=torch.tensor([True, False, True])) > 0
    assert torch.equal(Read(lambda trace: trace.grid(INPUT, trace.value(INPUT))).attribute(model, x, target), x)


def scaled(map: Tensor, mask: Tensor) -> Tensor:
    return (map.mul_(100) * (1 - mask)).sum(dim=(1, 2, 3))


def inverted(map: Tensor, mask: Tensor) -> Tensor:
    return (map * mask.neg_().add_(1)).sum(dim=(1, 2, 3))


@pytest.mark.parametrize("objective", [scaled, inverted])
def test_objectives_that_write_into_what_they_get_are_refused(objective: Objective) -> None:
    given = mask.double()
    both = attrreg.InputGradient(objective=objective).named("first") + attrreg.InputGradient()
    with pytest.raises(ValueError, match=rf"{objective.__name__} writes into the map or the mask.*Make new tensors"):
        both(SmoothNet().double(), x, given, target)
    assert torch.equal(given, mask.double())


@pytest.mark.parametrize("value", [None, 0.5])
def test_objectives_that_give_no_tensor_are_refused(value: Any) -> None:
    with pytest.raises(TypeError, match=rf"lambda> gave a {type(value).__name__}, but an objective gives a tensor \(3,\).*Return"):
        attrreg.InputGradient(objective=lambda map, mask: value)(SmoothNet().double(), x, mask, target)


@dataclass(frozen=True, repr=False)
class Energy(Score):
    """The weighted energy of a layer, of which nobody knows what it looks like."""

    layer: str
    needs_target: ClassVar[bool] = True

    @property
    def site(self) -> str:
        return self.layer

    def __call__(self, value: Tensor, target: Tensor | None) -> Tensor:
        assert target is not None
        return value.square().flatten(1).sum(1) * target


@pytest.mark.parametrize("layer", ["body", "drop"])
def test_a_score_of_ones_own_reads_any_layer(layer: str) -> None:
    model, weights, image = SmoothNet().double(), torch.tensor([1, 7, 2]), x.clone().requires_grad_()
    h = model.body(model.act(model.stem(image)))
    h = h if layer == "body" else nn.functional.silu(h).mean(dim=(2, 3))
    (want,) = torch.autograd.grad(Energy(layer)(h, weights).sum(), image)
    torch.testing.assert_close(attrreg.InputGradient(Energy(layer)).attribute(model, x, weights), want)


class Auxiliary(attrreg.scores.TargetLogit):
    @property
    def site(self) -> str:
        return "drop"


def test_a_score_of_classes_is_checked_at_a_layer_too() -> None:
    with pytest.raises(ValueError, match="target has the class 7, but"):
        attrreg.InputGradient(Auxiliary()).attribute(SmoothNet().double(), x, torch.tensor([1, 7, 2]))


# A rule for ReLU layers


def gated(gradient: Tensor, y: Tensor) -> Tensor:
    return gradient * y.tanh()


@dataclass(frozen=True, repr=False)
class Ruled(attrreg.MapRegularizer):
    """The input gradient under a rule."""

    rule: Rule = gated
    score: Score = TargetLogit()
    objective: Objective = SquaredOutside()

    def needs(self) -> tuple[Need, ...]:
        return (Grad(INPUT, self.score, Rectified(self.rule)),)

    def attribution(self, trace: Trace) -> Tensor:
        return trace.grad(INPUT, self.score, Rectified(self.rule))


def test_the_penalty_is_differentiated_through_what_a_rule_reads() -> None:
    first = nn.Conv2d(2, 4, 3)
    layers = first, nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    model, weight, step = nn.Sequential(*layers).double(), first.weight, 1e-6
    (gradient,) = torch.autograd.grad(Ruled()(model, x, mask, target), weight)
    way, values = torch.randn_like(weight), []
    for sign in (1, -2):
        with torch.no_grad():
            weight += sign * step * way
        values.append(Ruled()(model, x, mask, target).item())
    assert float((gradient * way).sum()) == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-5)


class Written(nn.Module):
    """What a ReLU wrote into is read again if it works in place, else what it gave, which is the same."""

    def __init__(self, inplace: bool, view: bool = False, saves: bool = False) -> None:
        super().__init__()
        self.stem, self.body, self.head = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 3)
        self.relu, self.view, self.saves = nn.ReLU(inplace), view, saves

    def block(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        positive = self.relu(h[:] if self.view else h)
        return self.body(positive) + (h if self.relu.inplace else positive)  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        h = checkpoint(self.block, x, use_reentrant=False) if self.saves else self.block(x)
        return self.head(h.square().mean(dim=(2, 3)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("saves", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("view", [False, True], ids=["", "view"])
@pytest.mark.parametrize("term", [Ruled(), attrreg.captum.GuidedBackprop(), attrreg.captum.Deconvolution()])
def test_a_relu_in_place_works_in_place_under_a_rule(term: attrreg.MapRegularizer, view: bool, saves: bool) -> None:
    model, plain, seen = Written(True, view, saves).double(), Written(False).double(), list[Tensor]()
    plain.load_state_dict(model.state_dict())
    with model.register_forward_hook(lambda module, args, output: seen.append(output.detach())):
        value = term(model, x, mask, target)
    (output,) = seen
    torch.testing.assert_close(output, plain(x))
    want = term(plain, x, mask, target)
    torch.testing.assert_close(value, want)
    assert_close(gradients(model, value), gradients(plain, want), 1e-10)


# Classes


class Plain(Score):
    """A score that is no dataclass."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, value: Tensor, target: Tensor | None) -> Tensor:
        return self.factor * value.sum(dim=1)


def test_a_class_that_is_no_dataclass_has_pythons_repr() -> None:
    regularizer = attrreg.InputGradient(score=Plain(2.0))
    assert "Plain object at" in repr(regularizer)
    assert regularizer(SmoothNet().double(), x, mask) > 0


@dataclass
class ThawedScore(Plain):
    factor: float = 1.0


@dataclass
class ThawedObjective(Spec):
    factor: float = 1.0
    requires_region: ClassVar[bool] = False

    def __call__(self, map: Tensor, mask: Tensor) -> Tensor:
        return self.factor * LogOutside()(map, mask)


@dataclass
class ThawedBaseline(baselines.Baseline):
    value: float = 1.0

    def __call__(self, x: Tensor, mask: Tensor | None, generator: torch.Generator) -> Tensor:
        return torch.full_like(x, self.value)


@dataclass(frozen=True, eq=False, repr=False)
class Halfway(baselines.Baseline):
    """To an image that it holds for each one of the batch."""

    images: Tensor

    def __call__(self, x: Tensor, mask: Tensor | None, generator: torch.Generator) -> Tensor:
        return (x + self.images) / 2


@pytest.mark.parametrize("count", [1, 2])
def test_a_baseline_may_hold_an_image_for_each_of_the_batch(count: int) -> None:
    model, annotated = SmoothNet().double(), torch.arange(3) < count
    regularizer = attrreg.IntegratedGradients(steps=2, baseline=Halfway(torch.randn_like(x)))
    value = regularizer(model, x, mask, target, annotated=annotated)
    torch.testing.assert_close(value, regularizer.evaluate(model, x, mask, target, annotated=annotated).total, rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match="makes an image from others of the batch"):
        regularizer(model, x, mask, target, fraction=0.5)


@pytest.mark.parametrize("kind", [ThawedScore, ThawedBaseline])
def test_a_dataclass_that_is_not_frozen_is_refused_where_it_is_made(kind: Any) -> None:
    with pytest.raises(TypeError, match=rf"{kind.__name__} has no hash.*@dataclass\(frozen=True"):
        kind()


@dataclass
class Step(attrreg.schedules.Schedule):
    """Nobody shares it: it may change."""

    at: int = 1

    def __call__(self, step: int) -> float:
        return float(step >= self.at)


def test_own_objectives_and_schedules_need_no_hash() -> None:
    model = SmoothNet().double()
    scheduled = attrreg.Scheduled(attrreg.InputGradient(score=TargetLogit(), objective=ThawedObjective()), Step())
    assert scheduled(model, x, mask, target) == 0 and scheduled(model, x, mask, target) > 0


@pytest.mark.parametrize("twice", [True, False])
def test_an_engine_of_ones_own_is_refused(twice: bool) -> None:
    own = type("Own", (attrreg.engines.Engine,), {"twice": twice})()
    with pytest.raises(TypeError, match=r"using: an engine is engines\.DoubleBackward\(\) or engines\.FiniteDifference\(\), got <.*Own"):
        attrreg.InputGradient().using(own)
    assert isinstance(attrreg.InputGradient(score=scores.TargetLogit()).using(attrreg.engines.FiniteDifference()), attrreg.regularizer.Sum)


@dataclass(frozen=True, repr=False)
class Constant(Score):
    def __call__(self, value: Tensor, target: Tensor | None) -> Tensor:
        return value.detach().sum(1)


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (lambda trace: trace.value("body"), r"Value\('body', .*Clean.*\) was read, but not declared"),
        (lambda trace: trace.value(OUTPUT), r"Value\('<output>', .*Clean.*\) was read, but not declared"),  # though the score reads it
        (lambda trace: trace.value(INPUT, At(baselines.Zero())), r"Value\('<input>', .*At.*\) was read, but not declared"),
        (lambda trace: trace.grad(INPUT, scores.SumLogProb()), r"Grad\('<input>', .*SumLogProb.*\) was read, but not declared"),
        (lambda trace: trace.score(scores.SumLogProb(), At(baselines.Zero())), r"Scored\(.*SumLogProb.*At.*\) was read, but not declared"),
        (lambda trace: trace.score(scores.RandomProjection("body")), r"Scored\(.*RandomProjection.*\) was read, but not declared"),
    ],
)
def test_what_is_read_without_being_declared_is_named(read: Callable[[Trace], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message + r"\. Let needs\(\)"):
        Read(read)(SmoothNet().double(), x, mask, target)


def test_a_map_of_the_mask_without_one_and_a_score_without_gradient() -> None:
    model = SmoothNet().double()
    with pytest.raises(ValueError, match=r"made from the mask, and there is none\. Pass `mask=`"):
        Read(lambda trace: trace.grad(INPUT, TargetLogit()) * trace.mask).attribute(model, x, target)
    with pytest.raises(RuntimeError, match=r"The score has no gradient.*Let gradients through"):
        attrreg.InputGradient(score=Constant())(model, x, mask, target)


@pytest.mark.parametrize(
    "read",
    [
        lambda trace: trace.grad(INPUT, TargetLogit()).relu_(),
        lambda trace: trace.value(INPUT).detach().mul_(2),
        lambda trace: trace.grad(INPUT, TargetLogit()) * trace.mask.mul_(0.5),
    ],
)
def test_attributions_that_write_into_what_they_read_are_refused(read: Callable[[Trace], Tensor]) -> None:
    model, regularizer, images = SmoothNet().double(), Read(read), x.clone()
    with pytest.raises(ValueError, match=r"Read writes into what it reads from the trace.*Let it make new tensors"):
        regularizer(model, images, mask, target)
    with pytest.raises(ValueError, match=r"Read writes into what it reads from the trace.*Let it make new tensors"):
        regularizer.attribute(model, images, target, mask=mask)


def test_a_score_of_many_points_is_checked_once() -> None:
    checked: list[Tensor] = []

    @dataclass(frozen=True, repr=False)
    class Checked(TargetLogit):
        def check_target(self, target: Tensor) -> None:
            checked.append(target)

    attrreg.captum.ShapleyValues(torch.arange(8) // 2, score=Checked())(SmoothNet().double(), x, mask, target)
    assert len(checked) == 1
