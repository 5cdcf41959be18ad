"""What terms of the user's own ask for: points, layers, scores; what their baselines and paths may do; the types they get."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attrreg
from attrreg import baselines
from attrreg.baselines import Baseline, Masked, Zero
from attrreg.engines import DoubleBackward, Engine, FiniteDifference
from attrreg.needs import Grad, Need, Scored, Value
from attrreg.objectives import AbsoluteOutside, Objective
from attrreg.ops import rectify
from attrreg.points import CLEAN, At, FromBaseline, Path, Point, Rectified, Stop
from attrreg.scores import Score, SumLogProb, TargetLogit
from attrreg.sites import INPUT, SPATIAL
from attrreg.trace import Trace
from attrreg.transforms import ReplaceOutside
from tests.models import SmoothNet, assert_close, gradients, smooth_batch


@dataclass(frozen=True, repr=False)
class Unsaid(Baseline):
    """Draws from the generator, and does not say so."""

    def __call__(self, x: Tensor, mask: Tensor | None, generator: torch.Generator) -> Tensor:
        return x + torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)


@dataclass(frozen=True, repr=False)
class From(FromBaseline):
    """A point of the user's own."""

    baseline: Baseline = Zero()


@dataclass(frozen=True, repr=False)
class Negative(Point):
    """Another."""


NOT_TO_BE_MET: dict[str, tuple[Callable[[], object], str]] = {
    "a baseline as a point": (
        lambda: Grad(INPUT, TargetLogit(), Masked(Zero())),  # type: ignore[arg-type]
        r"at must be.*got attrreg.baselines.Masked.*Write At\(baseline\)",
    ),
    "a point of one's own from a baseline": (lambda: Value("stem", From()), "at must be"),
    "a point of one's own": (lambda: Scored(TargetLogit(), Negative()), "at must be"),
    "a module as a layer": (lambda: Value(nn.Linear(2, 3)), "dotted name"),  # type: ignore[arg-type]
    "a function as a score": (lambda: Grad(INPUT, F.relu), "score must be"),  # type: ignore[arg-type]
    "a function as the score of images": (lambda: Scored(F.relu), "score must be"),  # type: ignore[arg-type]
    "the name of a rule": (lambda: Rectified("guided"), "rule must be a function"),  # type: ignore[arg-type]
    "the name of a baseline": (lambda: At("zero"), "baseline"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("name", NOT_TO_BE_MET)
def test_a_need_that_no_pass_meets_is_refused_where_it_is_made(name: str) -> None:
    build, message = NOT_TO_BE_MET[name]
    with pytest.raises(TypeError, match=message):
        build()


def test_points_take_what_regularizers_take() -> None:
    assert At(0.5) == At(baselines.Fixed(torch.tensor(0.5, dtype=torch.float64)))  # type: ignore[arg-type]
    assert Grad(INPUT, TargetLogit(), Rectified(rectify.guided)).at == Rectified(rectify.guided)


@dataclass(frozen=True, repr=False)
class Smoothed(Path):
    """The plain mean of gradients at noisy images, whose stops may write into the images."""

    baseline: Baseline = Zero()
    chunk: int | None = None
    writes: bool = False

    def stops(self, x: Tensor, mask: Tensor | None, generator: torch.Generator) -> Sequence[Stop]:
        if self.writes:
            x.zero_()
            return [Stop(x, 0.0, 1.0)]
        return [Stop(x + torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device), 0.0, 0.5) for _ in range(2)]


@dataclass(frozen=True, repr=False)
class GradientAt(attrreg.MapRegularizer):
    """The input gradient at a point."""

    at: Point
    score: Score = TargetLogit()
    objective: Objective = AbsoluteOutside()

    def needs(self) -> tuple[Need, ...]:
        return (Grad(INPUT, self.score, self.at),)

    def attribution(self, trace: Trace) -> Tensor:
        return trace.grad(INPUT, self.score, self.at)


x, mask, target = smooth_batch()


@pytest.mark.parametrize(
    "call",
    [
        lambda model: GradientAt(At(Unsaid()))(model, x, mask, target),
        lambda model: GradientAt(Smoothed())(model, x, mask, target),
        lambda model: attrreg.IntegratedGradients(baseline=Unsaid(), steps=2)(model, x, mask, target),
        lambda model: attrreg.ActivationDifference(fill=Unsaid())(model, x, mask),
        lambda model: ReplaceOutside(Unsaid())(x, mask),
    ],
    ids=["at a point", "on a path of one's own", "on a path", "inside another", "for training"],
)
def test_draws_that_are_not_said_are_refused(call: Callable[[nn.Module], Any]) -> None:
    with pytest.raises(ValueError, match=r"^tests\.\S+ draws random numbers"):  # naming the user's part of it
        call(SmoothNet().double())


def test_a_path_that_writes_into_the_images_is_refused_and_leaves_them() -> None:
    before = x.clone()
    with pytest.raises(ValueError, match="writes into the images"):
        GradientAt(Smoothed(writes=True))(SmoothNet().double(), x, mask, target)
    assert torch.equal(x, before)


@dataclass(frozen=True, repr=False)
class Opposite(Baseline):
    """Writes into the mask that it gets."""

    needs_mask: ClassVar[bool] = True

    def __call__(self, x: Tensor, mask: Tensor | None, generator: torch.Generator) -> Tensor:
        assert mask is not None
        return x * mask.neg_().add_(1)


@pytest.mark.parametrize(
    "call",
    [
        lambda model, mask: GradientAt(At(Opposite()))(model, x, mask, target),
        lambda model, mask: attrreg.IntegratedGradients(steps=2, baseline=Opposite()).attribute(model, x, target, mask=mask),
        lambda model, mask: ReplaceOutside(Opposite())(x, mask),
    ],
    ids=["at a point", "of a map", "for training"],
)
def test_a_baseline_that_writes_into_the_mask_is_refused_and_leaves_it(call: Callable[[nn.Module, Tensor], Any]) -> None:
    soft = mask[:, None].double()
    before = soft.clone()
    with pytest.raises(ValueError, match=r"^tests\.\S+ writes into the images or the mask"):
        call(SmoothNet().double(), soft)
    assert torch.equal(soft, before)


class Number(Baseline):
    """No image."""

    def __call__(self, x: Tensor, mask: Tensor | None, generator: torch.Generator) -> Any:
        return 0.0


@pytest.mark.parametrize("annotated", [[True, True, True], [True, False, True]])
def test_a_baseline_that_gives_no_images_is_refused(annotated: list[bool]) -> None:
    with pytest.raises(TypeError, match=r"gave a float, but a baseline gives images \(N, C, H, W\)"):
        GradientAt(At(Number()))(SmoothNet().double(), x, mask, target, annotated=torch.tensor(annotated))


@dataclass(frozen=True, repr=False)
class Black(Baseline):
    """Broadcast to the images, where it is a part of something."""

    axes: int

    def __call__(self, x: Tensor, mask: Tensor | None, generator: torch.Generator) -> Tensor:
        return torch.zeros(x.shape[4 - self.axes :], dtype=x.dtype)


@pytest.mark.parametrize("axes", [0, 2, 3])
@pytest.mark.parametrize("part", [{"annotated": torch.tensor([True, False])}, {"fraction": 0.5}], ids=["annotated", "fraction"])
def test_baselines_that_are_broadcast_go_with_a_part_of_the_batch(axes: int, part: dict[str, Any]) -> None:
    model = SmoothNet().double()  # of as many channels as there are images
    found = []
    for fill in (Zero(), Black(axes)):
        torch.manual_seed(0)
        found.append(attrreg.ActivationDifference("stem", fill)(model, x[:2], mask[:2], **part))
    torch.testing.assert_close(found[1], found[0])


@dataclass(frozen=True, repr=False)
class Said(Unsaid):
    """Draws from the generator, and says so."""

    draws: ClassVar[bool] = True


@dataclass(frozen=True, repr=False)
class Dimmed(Baseline):
    """Reads the mask of each image."""

    def __call__(self, x: Tensor, mask: Tensor | None, generator: torch.Generator) -> Tensor:
        return x * (1.0 if mask is None else mask)


@pytest.mark.parametrize("annotated", [[True, False, True], [False, True, False]])
@pytest.mark.parametrize("own", [Said(), Dimmed()])
def test_own_baselines_of_each_image_by_itself_go_with_a_fraction(own: Baseline, annotated: list[bool]) -> None:
    model, term = SmoothNet().double(), GradientAt(At(own))
    found = [term(model, x, mask, target, annotated=torch.tensor(annotated), fraction=fraction) for fraction in (1.0, 0.99)]
    assert found[1] > 0
    if not own.draws:
        torch.testing.assert_close(found[1], found[0])


@dataclass(frozen=True, repr=False)
class Half(Baseline):
    """The images at half their size."""

    def __call__(self, x: Tensor, mask: Tensor | None, generator: torch.Generator) -> Tensor:
        return F.avg_pool2d(x, 2)


@dataclass(frozen=True, repr=False)
class Rescaled(attrreg.SingleRegularizer):
    """How far a layer's activations on rescaled images are from rescaled activations."""

    at: ClassVar[At] = At(Half())

    def needs(self) -> tuple[Need, ...]:
        return Value("act"), Value("act", self.at)

    def per_image(self, trace: Trace) -> Tensor:
        return (F.avg_pool2d(trace.value("act"), 2) - trace.value("act", self.at)).square().mean(dim=(1, 2, 3))


def test_views_of_another_size_go_with_images_without_annotation() -> None:
    model, annotated = SmoothNet().double(), torch.tensor([True, False, True])
    penalty = Rescaled()(model, x, mask, annotated=annotated)
    assert penalty > 0
    torch.testing.assert_close(penalty, Rescaled()(model, x[annotated], mask[annotated]))
    torch.testing.assert_close(penalty, Rescaled()(model, x, mask, annotated=annotated, fraction=0.99))


@dataclass(frozen=True, repr=False)
class ByClass(attrreg.SingleRegularizer):
    """Reads the targets, and multiplies activations by gradients as matrices, which takes equal types."""

    def needs(self) -> tuple[Need, ...]:
        return Value("stem"), Grad("stem", SumLogProb())

    def per_image(self, trace: Trace) -> Tensor:
        map = torch.einsum("nchw,nc->nhw", trace.value("stem"), trace.grad("stem", SumLogProb()).mean((2, 3)))
        assert map.dtype == trace.value(INPUT).dtype == torch.float32
        return map.square().mean((1, 2)) * trace.target


def test_terms_get_the_target_and_float32_under_autocast() -> None:
    model, half = SmoothNet(), target * 0 + 2
    single, annotated = x.float(), torch.tensor([True, False, True])
    with torch.autocast(x.device.type, torch.bfloat16):
        value = ByClass()(model, single, mask, half, annotated=annotated)
    torch.testing.assert_close(value, 2 * ByClass()(model, single, mask, half // 2, annotated=annotated), rtol=0.05, atol=0)
    with pytest.raises(ValueError, match="reads the target, and there is none"):
        ByClass()(model, single, mask)


@dataclass(frozen=True, repr=False)
class Size(Score):
    """The size of a layer's output."""

    layer: str

    @property
    def site(self) -> str:
        return self.layer

    def __call__(self, value: Tensor, target: Tensor | None) -> Tensor:
        return value.square().mean((1, 2, 3))


@dataclass(frozen=True, repr=False)
class Small(attrreg.SingleRegularizer):
    """Keeps a layer's output small."""

    layer: str

    def needs(self) -> tuple[Need, ...]:
        return (Scored(Size(self.layer)),)

    def per_image(self, trace: Trace) -> Tensor:
        return trace.score(Size(self.layer))


@pytest.mark.parametrize("term", [Small, lambda layer: GradientAt(CLEAN, Size(layer))], ids=["scored", "differentiated"])
@pytest.mark.parametrize("engine", [DoubleBackward(), FiniteDifference(1e-4)], ids=["exact", "differences"])
def test_a_score_reads_the_automatic_layer(term: Callable[[str], attrreg.SingleRegularizer], engine: Engine) -> None:
    model, cam = SmoothNet().double(), attrreg.GradCAM()
    for others in ((), (cam,)):
        found = [sum(others, term(layer)).using(engine)(model, x, mask, target) for layer in (SPATIAL, "body")]
        assert_close(gradients(model, found[0]), gradients(model, found[1]), 1e-6)
        torch.testing.assert_close(found[0], found[1])


def test_auto_is_no_layer() -> None:
    with pytest.raises(ValueError, match="no layer's name"):
        attrreg.sites.check_layer(SmoothNet(), "auto")


class Direction(Score):
    """Compared by identity, so that each draw is another score."""

    draws = True

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def drawn(self, seed: int) -> Direction:
        return Direction(seed)

    def __call__(self, value: Tensor, target: Tensor | None) -> Tensor:
        return value @ torch.randn(value.shape[1], generator=torch.Generator().manual_seed(self.seed)).to(value)


@pytest.mark.cpu
@pytest.mark.parametrize("term", [attrreg.InputGradient, lambda score: attrreg.IntegratedGradients(steps=2, score=score)])
def test_a_score_without_equality_serves_every_term(term: Callable[[Score], attrreg.MapRegularizer]) -> None:
    model = SmoothNet().double()
    term(Direction())(model, x, mask, target).backward()
    assert all(parameter.grad is not None for parameter in model.stem.parameters())
