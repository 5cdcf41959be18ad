"""Regularizers are values: sums, weights, names, reprs, pickles."""

from __future__ import annotations

import math
import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import attrreg
from attrreg import baselines, objectives, scores
from attrreg.regularizer import AttributionRegularizer, Sum
from tests.models import SmoothNet, assert_close, gradients, smooth_batch


def my_objective(map: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return map.square().mean(dim=(1, 2, 3))


fills = st.one_of(
    st.sampled_from([baselines.Zero(), baselines.Mean(), baselines.OtherImage(), baselines.Shuffle()]),
    st.builds(baselines.Blur, st.floats(0.1, 9)),
    st.builds(baselines.Noise, st.floats(0, 9), st.floats(-9, 9)),
)
any_score = st.one_of(
    st.sampled_from([scores.ByTarget(), scores.SumLogProb(), scores.TargetLogit(), scores.Contrast(), scores.PredictedLogit()]),
    st.builds(scores.RandomProjection, st.sampled_from(["auto", "body"]), st.none() | st.integers(0, 2**62)),
    st.builds(scores.TaskLoss, st.sampled_from([None, torch.nn.functional.mse_loss])),
)
any_objective = st.one_of(
    st.sampled_from([objectives.SquaredOutside(), objectives.AbsoluteOutside(), objectives.NetOutside(), my_objective]),
    st.builds(objectives.OutsideFraction, st.floats(1e-20, 1e-3)),
    st.builds(objectives.Energy, st.floats(1e-20, 1e-3)),
)
any_baseline = st.one_of(
    fills,
    st.builds(baselines.Masked, fills),
    st.lists(st.floats(-5, 5), min_size=1, max_size=3).map(torch.tensor),
    st.lists(st.floats(-5, 5), min_size=1, max_size=3).map(lambda values: torch.tensor(values, dtype=torch.float64)),
)
leaves = st.one_of(
    st.builds(attrreg.InputGradient, any_score, any_objective),
    st.builds(attrreg.InputXGradient, any_score, any_objective),
    st.builds(
        attrreg.IntegratedGradients,
        st.integers(2, 9),
        any_baseline,
        st.sampled_from(["gausslegendre", "riemann_left"]),
        st.none() | st.integers(1, 5),
    ),
    st.builds(attrreg.ExpectedGradients, st.integers(1, 9), any_baseline),
    st.builds(attrreg.GradCAM, st.sampled_from(["auto", "layer4"]), st.booleans(), st.booleans(), any_score, any_objective),
    st.builds(
        attrreg.ActivationDifference, st.sampled_from(["auto", "a.b", ("a", "b"), ["a"]]), fills, st.sampled_from([None, "clean", "masked"])
    ),
)
weights = st.floats(0, 1e6)


@st.composite
def sums(draw: Any) -> AttributionRegularizer:
    parts = [
        (draw(weights) * leaf).named(f"term {i}").reduced(draw(st.sampled_from(["mean", "sum", "batchmean"])))
        for i, leaf in enumerate(draw(st.lists(leaves, min_size=1, max_size=3)))
    ]
    total = sum(parts)
    assert isinstance(total, AttributionRegularizer)
    return total


@given(st.one_of(leaves, sums()))
@settings(deadline=None, max_examples=150)
def test_repr_rebuilds_and_pickle_keeps(regularizer: AttributionRegularizer) -> None:
    # Nothing but the packages needs to be in scope; functions are written as the path that imports them.
    rebuilt = eval(repr(regularizer), {"attrreg": attrreg, "torch": torch, "tests": sys.modules["tests"]})
    for other in (rebuilt, pickle.loads(pickle.dumps(regularizer))):
        assert other == regularizer
        assert hash(other) == hash(regularizer)
        assert repr(other) == repr(regularizer)


def test_repr_names_only_what_differs() -> None:
    assert repr(attrreg.InputGradient()) == "attrreg.InputGradient()"
    assert (
        repr(attrreg.GradCAM("layer4", score=scores.TargetLogit())) == "attrreg.GradCAM(layer='layer4', score=attrreg.scores.TargetLogit())"
    )
    total = 0.5 * attrreg.InputGradient() + (2 * attrreg.GradCAM()).named("heat")
    assert repr(total) == "0.5 * attrreg.InputGradient() + (2.0 * attrreg.GradCAM()).named('heat')"


def test_values_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        attrreg.InputGradient().score = scores.TargetLogit()  # type: ignore[misc]
    with pytest.raises(AttributeError):
        (attrreg.InputGradient() + attrreg.GradCAM()).terms = ()  # type: ignore[misc]


def test_a_fixed_baseline_keeps_its_own_copy() -> None:
    image = torch.zeros(2, requires_grad=True)
    baseline = baselines.Fixed(image)
    with torch.no_grad():
        image += 1
    assert not baseline.image.requires_grad and baseline == baselines.Fixed(torch.zeros(2)) != baselines.Fixed(image)
    assert baselines.Fixed(image) != baselines.Fixed(image.double())
    assert attrreg.IntegratedGradients(baseline=image) == attrreg.IntegratedGradients(baseline=baselines.Fixed(image))


def test_sums_are_flat() -> None:
    a, b, c = attrreg.InputGradient(), attrreg.InputXGradient(), attrreg.GradCAM()
    for total in (a + b + c, a + (b + c), sum([a, b, c]), 1 * (a + b) + c):
        assert isinstance(total, AttributionRegularizer)
        assert [term.name for term in total.terms] == ["InputGradient", "InputXGradient", "GradCAM"]
        assert total == a + b + c
    nested = 2 * (3 * a + 0.5 * (4 * b).named("b"))
    assert [(term.name, term.weight) for term in nested.terms] == [("InputGradient", 6.0), ("b", 4.0)]
    assert (a * 2) == (2 * a)


def test_a_sums_type_is_the_widest_of_its_terms() -> None:
    model, (x, mask, target) = SmoothNet(), smooth_batch()
    wide = attrreg.InputGradient(objective=lambda map, mask: my_objective(map.double(), mask)).named("wide")
    for total in (wide + attrreg.InputXGradient(), attrreg.InputXGradient() + wide):
        value, parts, _ = total.evaluate(model, x.float(), mask, target)
        assert value.dtype == torch.float64
        torch.testing.assert_close(value, sum(parts.values()))
        gradients(model, value)


def test_a_sum_of_one_term_has_its_map() -> None:
    model, (x, mask, target) = SmoothNet().double(), smooth_batch()
    term = attrreg.IntegratedGradients(steps=3, baseline=baselines.Masked(baselines.Zero()))
    want = term.attribute(model, x, target, mask=mask)
    for regularizer in (0.5 * term, term.named("path")):
        torch.testing.assert_close(regularizer.attribute(model, x, target, mask=mask), want, rtol=0, atol=0)


class Inverted(attrreg.InputGradient):
    """A mask of the other polarity, and a map of one channel: what a subclass does of its own in public methods."""

    def __call__(self, model: Any, x: Any, mask: Any, *rest: Any, **settings: Any) -> Any:
        return super().__call__(model, x, ~mask, *rest, **settings)

    def attribute(self, *rest: Any, **settings: Any) -> Any:
        return super().attribute(*rest, **settings).sum(1, keepdim=True)


def test_methods_of_subclasses_are_called() -> None:
    model, (x, mask, target) = SmoothNet().double(), smooth_batch()
    term, plain = Inverted(), attrreg.InputGradient()
    want = plain(model, x, ~mask, target)
    torch.testing.assert_close(attrreg.Scheduled(term, attrreg.schedules.Every(2))(model, x, mask, target), 2 * want)
    for regularizer in (term, 0.5 * term, term.named("inverted")):
        torch.testing.assert_close(regularizer.attribute(model, x, target), plain.attribute(model, x, target).sum(1, keepdim=True))


def test_a_sum_has_terms() -> None:
    with pytest.raises(ValueError, match="Sum: there are no terms"):
        Sum(())


@given(st.just(0.0) | st.floats(1e-6, 100), st.just(0.0) | st.floats(1e-6, 100))
@settings(deadline=None, max_examples=20)
def test_linear_in_the_weights(first: float, second: float) -> None:
    torch.manual_seed(0)
    model, (x, mask, target) = SmoothNet().double(), smooth_batch()
    a, b = attrreg.InputGradient(), attrreg.GradCAM("body")
    got = (first * a + second * b)(model, x, mask, target)
    want = first * a(model, x, mask, target) + second * b(model, x, mask, target)
    assert math.isclose(float(got.detach()), float(want.detach()), rel_tol=1e-9, abs_tol=1e-12)
    if first or second:
        assert_close(gradients(model, got), gradients(model, want), 1e-9)


@given(st.permutations(range(4)), st.lists(st.booleans(), min_size=4, max_size=4))
@settings(deadline=None, max_examples=20)
def test_order_of_images_does_not_matter_and_unannotated_ones_do_not_count(order: list[int], flags: list[bool]) -> None:
    torch.manual_seed(0)
    model, (x, mask, target) = SmoothNet().double(), smooth_batch(4)
    annotated = torch.tensor(flags)
    regularizer = attrreg.InputGradient(objective=objectives.OutsideFraction()) + attrreg.ActivationDifference(fill=baselines.Zero())
    value = regularizer(model, x, mask, target, annotated=annotated)
    permuted = regularizer(model, x[order], mask[order], target[order], annotated=annotated[order])
    torch.testing.assert_close(value, permuted)
    if any(flags):
        alone = regularizer(model, x[annotated], mask[annotated], target[annotated])
        torch.testing.assert_close(value, alone)
        by_sum = regularizer.reduced("sum")(model, x, mask, target, annotated=annotated)
        by_batch = regularizer.reduced("batchmean")(model, x, mask, target, annotated=annotated)
        torch.testing.assert_close(by_sum, value * sum(flags))
        torch.testing.assert_close(by_batch, value * sum(flags) / 4)
    else:
        assert float(value.detach()) == 0


def test_import_is_light() -> None:
    heavy = ("timm", "captum", "torchvision", "matplotlib", "lightning", "accelerate", "transformers")
    code = f"import sys, attrreg; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
