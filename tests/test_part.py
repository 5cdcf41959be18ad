"""Which images a penalty's own pass runs on: the annotated ones, a random fraction, or all, where images depend on each other."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy
import pytest
import torch
from timm.layers import EvoNorm2dB0
from torch import Tensor, nn

import attrreg
from attrreg import baselines
from attrreg.apart import images_apart
from attrreg.call import Call
from attrreg.regularizer import Reduction
from attrreg.trace import passes
from tests import oracles
from tests.models import FAMILIES, Raising, SmoothNet, assert_close, batch, gradients, smooth_batch
from tests.test_bad_input import check_message

TERM = attrreg.InputGradient()


class Watched(nn.Module):
    """Remembers how many images it saw."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Any:
        self.seen.append(x.shape[0])
        return self.model(x)


@pytest.mark.parametrize("reduction", ["mean", "sum", "batchmean"])
def test_images_without_annotation_are_left_out_and_nothing_else_changes(reduction: Reduction) -> None:
    model, (x, mask, target) = Watched(SmoothNet().double()), smooth_batch(5)
    annotated = torch.tensor([True, False, False, True, False])
    regularizer = (TERM + attrreg.GradCAM(layer="model.body")).reduced(reduction)
    value = regularizer(model, x, mask, target, annotated=annotated)
    with regularizer.attach(model):
        model(x)
        whole = regularizer(model, x, mask, target, annotated=annotated)
    assert model.seen == [5, 2, 3, 2, 5]  # the first, and its two halves alone, show that images do not depend on each other
    torch.testing.assert_close(value, whole, rtol=1e-12, atol=0)
    assert_close(gradients(model, value), gradients(model, whole), 1e-10)


def test_a_single_annotated_image_is_there_twice() -> None:
    model, (x, mask, target) = Watched(nn.Sequential(SmoothNet(), squeeze := nn.Flatten(0)).double()), smooth_batch(5)
    squeeze.forward = torch.squeeze  # type: ignore[method-assign]
    for annotated in torch.eye(5).bool()[[0, 4]]:
        value = TERM(model, x, mask, target, annotated=annotated)
        assert_close([value], [TERM.evaluate(model, x, mask, target, annotated=annotated).total], 1e-12)
    assert model.seen == [5, 2, 3, 2, 5] * 2  # it shows at the first call and at the second
    bad = torch.where(annotated.view(5, 1, 1, 1), x, math.nan)  # another beside it would make its gradients NaN
    for _ in range(2):  # at the second call the images are asked, and show nothing
        assert all(gradient.isfinite().all() for gradient in gradients(model, TERM(model, bad, mask, target, annotated=annotated)))


def test_coupled_images_all_take_part() -> None:
    family = FAMILIES["resnet"]
    model, (x, mask, target) = Watched(family.build()), batch(4, size=family.size)
    annotated = torch.tensor([True, False, False, True])
    TERM(model.train(), x, mask, target, annotated=annotated)
    TERM(model.eval(), x, mask, target, annotated=annotated)
    attrreg.ActivationDifference()(model, x, mask, target, annotated=annotated)  # shuffles: draws for each image
    TERM(model, x, mask, target, annotated=torch.zeros(4, dtype=torch.bool))  # none: the same work as the other ranks of a run
    assert model.seen == [4, 4, 2, 2, 2, 4, 4, 4]


@pytest.mark.parametrize("norm", [lambda: nn.BatchNorm2d(4, track_running_stats=False).eval(), lambda: EvoNorm2dB0(4)])
def test_images_that_a_norm_of_another_kind_couples_all_take_part(norm: Callable[[], nn.Module]) -> None:
    model = Watched(nn.Sequential(nn.Conv2d(2, 4, 3), norm(), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))).double()
    x, mask, target = smooth_batch(4)
    annotated = torch.tensor([True, False, False, True])
    value = TERM(model, x, mask, target, annotated=annotated)
    with TERM.attach(model):
        model(x)
        torch.testing.assert_close(value, TERM(model, x, mask, target, annotated=annotated), rtol=1e-10, atol=0)
    assert model.seen == [4, 4]


def test_a_fraction_is_drawn_from_the_generator_alone() -> None:
    model, (x, mask, target) = SmoothNet().double(), smooth_batch(8)
    state, found = torch.get_rng_state(), []
    for seed in (3, 3, 4):
        generator = torch.Generator().manual_seed(seed)
        found.append([float(TERM(model, x, mask, target, fraction=0.3, generator=generator).detach()) for _ in range(4)])
        assert torch.equal(state, torch.get_rng_state())
        torch.rand(3)
        state = torch.get_rng_state()
    assert found[0] == found[1] != found[2]


def test_a_fraction_is_unbiased_and_keeps_each_image_with_its_mask_and_its_target() -> None:
    model, (x, mask, _) = SmoothNet().double(), smooth_batch(5)
    target, annotated = torch.tensor([0, 1, 2, 2, 1]), torch.tensor([True, True, False, True, True])
    each = [float(TERM(model, x[[i]], mask[[i]], target[[i]]).detach()) for i in (0, 1, 3, 4)]
    assert sum(each) / 4 == pytest.approx(float(TERM(model, x, mask, target, annotated=annotated).detach()))
    generator = torch.Generator().manual_seed(0)
    found = [TERM(model, x, mask, target, annotated=annotated, fraction=0.5, generator=generator) for _ in range(80)]
    drawn = {round(float(value.detach()), 9) for value in found}
    assert drawn == {round((a + b) / 2, 9) for a, b in itertools.combinations(each, 2)}  # all six pairs, and nothing else


@pytest.mark.parametrize("reduction", ["mean", "sum", "batchmean"])
def test_a_fraction_keeps_the_scale_of_a_reduction(reduction: Reduction) -> None:
    model, (x, mask, target) = SmoothNet().double(), smooth_batch(4)
    x, mask, target = x[:1].expand(4, -1, -1, -1).contiguous(), mask[:1].expand(4, -1, -1), target[:1].expand(4)  # all alike
    regularizer = TERM.reduced(reduction)
    torch.testing.assert_close(regularizer(model, x, mask, target, fraction=0.5), regularizer(model, x, mask, target))


def test_a_fraction_leaves_a_recorded_forward_alone() -> None:
    model, (x, mask, target) = Watched(SmoothNet().double()), smooth_batch(4)
    with TERM.attach(model):
        model(x)
        with passes() as counter:
            TERM(model, x, mask, target, fraction=0.5)
            TERM(model, x, mask, target)
    assert model.seen == [4, 2] and counter.forward == 1


def test_a_fraction_is_of_so_many_images() -> None:
    model, (x, mask, target), seen = SmoothNet().double(), smooth_batch(25), []
    model.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    given: list[Any] = [0.28, numpy.float32(0.5), 1e-12]
    for fraction in given:
        TERM(model, x, mask, target, fraction=fraction)
    assert seen == [7, 13, 2]  # 0.28 * 25 is a little above 7; a single one is there twice


@pytest.mark.parametrize(("fraction", "kind"), [(0, ValueError), (1.5, ValueError), ("half", TypeError), (True, TypeError)])
def test_bad_fractions(fraction: Any, kind: type[Exception]) -> None:
    model, (x, mask, target) = SmoothNet().double(), smooth_batch()
    with pytest.raises(kind) as caught:
        TERM(model, x, mask, target, fraction=fraction)
    check_message(caught.value, ["fraction"])


def test_a_fraction_of_unknown_inputs_is_refused() -> None:
    model, (x, mask, target) = SmoothNet().double(), smooth_batch()
    with pytest.raises(ValueError) as caught:
        TERM(model, x, mask, target, fraction=0.5, inputs=(x,))
    check_message(caught.value, ["fraction"])


class Centred(nn.Module):
    """Features about their mean over the batch, in code of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 6, 3), nn.Linear(6, 4)
        nn.init.zeros_(self.head.weight)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x).tanh().mean((2, 3))
        result: Tensor = self.head(h - h.mean(0))
        return result.softmax(1)


def test_a_model_that_couples_images_in_its_own_code_sees_all() -> None:
    model, (x, mask, target) = Centred().double(), batch(4, channels=3, size=8, classes=4)
    x, annotated = x.double(), torch.tensor([True, False, True, False])
    regularizer = attrreg.InputGradient(score=attrreg.scores.TargetLogit(), objective=attrreg.objectives.SquaredOutside())
    regularizer(model, x, mask, target, annotated=annotated)  # a head that is zero shows nothing yet
    with torch.no_grad():
        model.head.weight.normal_()
    value = regularizer(model, x, mask, target, annotated=annotated)
    expected = oracles.squared_input_gradient(model, x, mask, target)[annotated].mean()
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=0)
    assert_close(gradients(model, value), gradients(model, expected), 1e-9)


@pytest.mark.parametrize("seed", [3, None])
def test_a_projection_of_each_image_is_the_same_in_every_form(seed: int | None) -> None:
    model, (x, mask, target) = SmoothNet().double(), smooth_batch(4)
    annotated = torch.tensor([False, True, True, False])
    regularizer = attrreg.InputGradient(score=attrreg.scores.RandomProjection(seed=seed))

    def options() -> dict[str, Any]:
        return {"annotated": annotated, "generator": torch.Generator().manual_seed(0)}

    value = regularizer(model, x, mask, target, **options())
    assert regularizer.evaluate(model, x, mask, target, **options()).total == value
    if seed is not None:
        with pytest.raises(ValueError, match=r"fraction cannot be used with a score whose seed.*Let it draw anew"):
            regularizer(model, x, mask, target, fraction=0.5)


@dataclass(frozen=True, repr=False)
class BatchMean(baselines.Baseline):
    def __call__(self, x: Tensor, mask: Tensor | None, generator: torch.Generator) -> Tensor:
        return x.mean(0, keepdim=True).expand_as(x)


@dataclass(frozen=True, repr=False)
class Halved(baselines.Baseline):
    def __call__(self, x: Tensor, mask: Tensor | None, generator: torch.Generator) -> Tensor:
        return x / 2


@dataclass(frozen=True, repr=False)
class Flipped(baselines.Baseline):
    def __call__(self, x: Tensor, mask: Tensor | None, generator: torch.Generator) -> Tensor:
        return x.flip(0)


@dataclass(frozen=True, repr=False)
class FirstOne(baselines.Baseline):
    def __call__(self, x: Tensor, mask: Tensor | None, generator: torch.Generator) -> Tensor:
        return x[:1].expand_as(x)


@dataclass(frozen=True, repr=False)
class LastOne(baselines.Baseline):
    def __call__(self, x: Tensor, mask: Tensor | None, generator: torch.Generator) -> Tensor:
        return x[-1:].expand_as(x)


@pytest.mark.parametrize("own", [BatchMean(), baselines.Masked(BatchMean()), Flipped(), FirstOne(), LastOne()])
def test_own_baselines_that_take_other_images(own: baselines.Baseline) -> None:
    model, (x, mask, target) = Watched(SmoothNet().double()), smooth_batch(4)
    regularizer, annotated = attrreg.ActivationDifference(fill=own), torch.tensor([False, True, True, True])
    value = regularizer(model, x, mask, target, annotated=annotated)
    assert model.seen == [4, 4]
    torch.testing.assert_close(value, regularizer.evaluate(model, x, mask, target, annotated=annotated).total, rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match=r"fraction cannot be used with .*(BatchMean|Flipped|FirstOne|LastOne).*makes an image from"):
        regularizer(model, x, mask, target, fraction=0.5)


def test_an_own_baseline_of_each_image_by_itself() -> None:
    model, (x, mask, target) = Watched(SmoothNet().double()), smooth_batch(4)
    regularizer, annotated = attrreg.ActivationDifference(fill=Halved()), torch.tensor([False, True, True, True])
    value = regularizer(model, x, mask, target, annotated=annotated)
    assert model.seen == [4, 2, 2, 3, 3]  # the first three show that images are apart
    torch.testing.assert_close(value, regularizer.evaluate(model, x, mask, target, annotated=annotated).total, rtol=1e-12, atol=0)
    assert regularizer(model, x, mask, target, fraction=0.5).isfinite()


@pytest.mark.parametrize("masked", [False, True])
def test_a_baseline_of_one_image_a_sample(masked: bool) -> None:
    model, (x, mask, target) = SmoothNet().double(), smooth_batch(4)
    annotated = torch.tensor([True, False, True, True])
    given = torch.randn_like(x)
    baseline = baselines.Masked(baselines.Fixed(given)) if masked else given
    value = attrreg.IntegratedGradients(steps=2, baseline=baseline)(model, x, mask, target, annotated=annotated)
    kept = baselines.Masked(baselines.Fixed(given[annotated])) if masked else given[annotated]
    alone = attrreg.IntegratedGradients(steps=2, baseline=kept)(model, x[annotated], mask[annotated], target[annotated])
    torch.testing.assert_close(value, alone, rtol=1e-12, atol=0)
    for others in (attrreg.ExpectedGradients(), attrreg.IntegratedGradients(steps=2, baseline=baselines.Masked(baselines.OtherImage()))):
        with pytest.raises(ValueError, match=r"fraction cannot be used with baselines\.OtherImage.*baselines\.OneOf\(images\)"):
            others(model, x, mask, target, fraction=0.5)
    with pytest.raises(ValueError, match=r"one image for each image of the batch.*Give one for all"):
        attrreg.IntegratedGradients(steps=2, baseline=baseline)(model, x, mask, target, fraction=0.5)
    one = attrreg.IntegratedGradients(steps=2, baseline=given[:1])
    assert one(model, x, mask, target, annotated=annotated, fraction=0.5).isfinite()


class Gated(SmoothNet):
    """A gate that starts at zero lets images meet; and other outputs beside the logits."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.gate = kind, nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Any:
        logits = super().forward(x)
        if self.kind == "by image":
            return {"logits": logits, "energy": logits.logsumexp(1)}
        if self.kind == "flat":
            return {"logits": logits.reshape(-1)}
        if self.kind == "time first":
            return {"logits": logits[None]}
        return {"logits": logits + self.gate * logits.flip(0)}


@pytest.mark.parametrize("kind", ["by image", "flat", "time first", "gate"])
def test_outputs_of_all_kinds_show_whether_images_meet(kind: str) -> None:
    gated = Gated(kind).double()
    model, (x, mask, target) = Watched(gated), smooth_batch(4)
    annotated, found = torch.tensor([True, False, True, False]), []

    def logits(output: dict[str, Tensor]) -> Tensor:
        return output["logits"].reshape(-1, 3)

    for _ in range(3):  # the second time it is shown again
        model.seen.clear()
        value = TERM(model, x, mask, target, annotated=annotated, output=logits)
        found.append([*model.seen])
        with torch.no_grad():
            gated.gate.add_(0.5)
    assert found == ([[4, 2, 2, 2], [4, 4], [4]] if kind == "gate" else [[4, 2, 2, 2], [4, 2, 2, 2], [2]])
    assert value.isfinite()


class Loud(SmoothNet):
    """Divides by the size of its images."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x / x.square().mean((1, 2, 3), keepdim=True).sqrt())


def test_a_black_image_couples_nobody() -> None:
    model, (x, mask, target) = Watched(Loud().double()), smooth_batch(4)
    x = x.detach().clone()
    x[1] = 0
    value = TERM(model, x, mask, target, annotated=torch.tensor([True, False, True, True]))
    assert model.seen == [4, 2, 2, 3] and all(gradient.isfinite().all() for gradient in gradients(model, value))


class Beside(SmoothNet):
    """Gives something beside the logits that cannot be differentiated."""

    def forward(self, x: Tensor) -> Any:
        logits = super().forward(x)
        return logits, Raising.apply(logits, NotImplementedError())


def test_a_model_whose_backward_fails_gets_the_whole_batch() -> None:
    model, (x, mask, target) = Watched(Beside().double()), smooth_batch(4)
    annotated = torch.tensor([True, False, True, True])
    value = TERM(model, x, mask, target, annotated=annotated, output=0)
    torch.testing.assert_close(value, TERM.evaluate(model, x, mask, target, annotated=annotated, output=0).total, rtol=1e-12, atol=0)


@pytest.mark.cpu
def test_draws_are_of_the_cpus_generator_whatever_the_default_device_is() -> None:
    model, (x, mask, _) = SmoothNet().double(), smooth_batch()

    def shuffled() -> Tensor:
        return baselines.Shuffle()(x, mask[:, None].double(), torch.Generator("cpu").manual_seed(0))

    here = shuffled()
    with torch.device("meta"):
        assert torch.equal(shuffled(), here)
        assert images_apart(Call(model, x))
