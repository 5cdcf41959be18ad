"""Settings are checked when they are given, before any pass, in words that name them."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from typing import Any

import captum.attr
import numpy
import pytest
import torch
from torch import Tensor, nn

import attrreg
from attrreg import baselines, engines, metrics, objectives, schedules, scores
from attrreg.captum import FeatureAblation, InternalInfluence, LayerConductance, Neuron, NeuronConductance, NoiseTunnel, ShapleyValues
from tests.models import SmoothNet, smooth_batch


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: objectives.OutsideFraction(eps=-1), ValueError, r"OutsideFraction: eps must be a finite number.*got -1\. "),
        (lambda: objectives.OutsideFraction(eps="a"), ValueError, r"OutsideFraction: eps must be.*got 'a'\. "),  # type: ignore[arg-type]
        (lambda: objectives.OutsideFraction(eps=True), ValueError, r"OutsideFraction: eps must be.*got True\. "),
        (lambda: objectives.Energy(eps=float("nan")), ValueError, r"Energy: eps must be.*got nan\. "),
        (lambda: objectives.Energy(float("inf")), ValueError, r"Energy: eps must be.*got inf\. "),
        (lambda: scores.TaskLoss(nn.CrossEntropyLoss), TypeError, r"the class CrossEntropyLoss\. Pass an instance.*'none'"),  # type: ignore[arg-type]
        (lambda: scores.TaskLoss(3), TypeError, r"function must be a loss.*got 3\. Leave it out"),  # type: ignore[arg-type]
        (lambda: scores.RandomProjection(seed=1.5), TypeError, r"seed must be None or an integer, got 1\.5, a float\. "),  # type: ignore[arg-type]
        (lambda: scores.RandomProjection(seed=2**70), ValueError, r"RandomProjection: seed must fit 64 bits, got 11805\d+\. "),
        (lambda: scores.RandomProjection(seed=True), TypeError, r"RandomProjection: seed must be.*a bool\. "),
        (lambda: scores.SegmentationLogit(None), TypeError, r"SegmentationLogit: ignore_index must be an integer, got None.*\. "),  # type: ignore[arg-type]
        (lambda: scores.SegmentationLogit("255"), TypeError, r"ignore_index must be an integer, got '255', a str\. "),  # type: ignore[arg-type]
        (lambda: scores.RegressionOutput(1.0), TypeError, r"RegressionOutput: index must be.*got 1\.0, a float\. "),  # type: ignore[arg-type]
        (lambda: scores.RegressionOutput(True), TypeError, r"index must be.*got True, a bool\. "),
        (lambda: attrreg.IntegratedGradients(steps=8.0), ValueError, r"steps.*got 8\.0, a float\. Pass an int"),  # type: ignore[arg-type]
        (lambda: attrreg.IntegratedGradients(chunk=True), ValueError, r"chunk must be an integer.*got True, a bool\. Pass"),
        (lambda: attrreg.IntegratedGradients(steps=0), ValueError, r"steps must be an integer of at least 1, got 0\. Give a larger one"),
        (lambda: attrreg.IntegratedGradients(1, rule="riemann_left"), ValueError, r"steps must be an integer of at least 2, got 1\. "),
        (lambda: attrreg.ExpectedGradients(samples="2"), ValueError, r"samples must be.*got '2', a str\. "),  # type: ignore[arg-type]
        (lambda: attrreg.PGDEx(steps=numpy.float64(2)), ValueError, r"steps must be an integer.*a float64\. "),  # type: ignore[arg-type]
        (lambda: schedules.Every(numpy.float64(2)), ValueError, r"steps must be an integer.*a float64\. Pass an int"),  # type: ignore[arg-type]
        (lambda: attrreg.ActivationDifference(b"stem"), TypeError, "layers must be dotted names"),  # type: ignore[arg-type]
        (lambda: attrreg.ActivationDifference(3), TypeError, r"layers must be dotted names of layers, got 3\. "),  # type: ignore[arg-type]
        (lambda: attrreg.ActivationDifference(()), TypeError, r"layers must be dotted names of layers, got \(\)\. "),
        (lambda: attrreg.ActivationDifference(("stem", "")), TypeError, r"layers must be dotted names of layers, got \('stem', ''\)\. "),
        (lambda: attrreg.ActivationDifference(detach="both"), ValueError, r"detach must be 'clean', 'masked' or None, got 'both'\. "),  # type: ignore[arg-type]
        (lambda: NoiseTunnel(attrreg.ActivationDifference()), TypeError, r"of must be a map.*got ActivationDifference\. "),  # type: ignore[arg-type]
        (lambda: NoiseTunnel(attrreg.InputGradient(), "vargrad", samples=1), ValueError, r"samples must be.* at least 2, got 1\. "),
        (lambda: NoiseTunnel(attrreg.InputGradient(), std=-0.1), ValueError, r"std \(Captum's stdevs\) must be.*got -0\.1\. "),
        (lambda: FeatureAblation([[0, 1]]), TypeError, r"segments must be a tensor of integers, got list\. "),  # type: ignore[arg-type]
        (lambda: FeatureAblation(torch.ones(2, 2).bool()), TypeError, r"segments must be a tensor of integers, got torch\.bool\. "),
        (lambda: baselines.Blur("5"), ValueError, r"Blur\(sigma='5'\) is not a blur\. "),  # type: ignore[arg-type]
        (lambda: baselines.Noise(mean=float("nan")), ValueError, r"Noise\(mean=float\('nan'\)\) is not a normal distribution\. "),
        (lambda: baselines.Fixed(torch.empty(0)), ValueError, r"baseline of shape \(0,\) is empty"),
        (lambda: metrics.Occlusion(stride=0), ValueError, r"stride must be an integer of at least 1, got 0\. "),
        (lambda: NeuronConductance("body"), TypeError, r"neuron must be a captum\.Neuron, got 'body'\. "),  # type: ignore[arg-type]
        (lambda: Neuron("body", ()), TypeError, r"Neuron: index must be an integer or a tuple of them, got \(\)\. "),
        (lambda: attrreg.PGDEx(epsilon="0.1"), ValueError, r"epsilon must be a positive number.*got '0\.1'\. "),  # type: ignore[arg-type]
        (lambda: attrreg.PGDEx(epsilon=0.0), ValueError, r"epsilon must be a positive.*\. "),
        (lambda: attrreg.PGDEx(rate=-1.0), ValueError, r"rate must be a positive.*\. "),
        (lambda: attrreg.PGDEx(steps=0), ValueError, r"steps must be.*\. "),
        (lambda: attrreg.PGDEx(bounds=(1.0, 0.0)), ValueError, r"bounds must be.*\. "),
        (lambda: attrreg.PGDEx(bounds=(0.0, 0.5, 1.0)), ValueError, r"bounds must be.*got \(0\.0, 0\.5, 1\.0\)\. "),  # type: ignore[arg-type]
        (lambda: attrreg.PGDEx(bounds=1.0), ValueError, r"bounds must be.*got 1\.0\. "),  # type: ignore[arg-type]
        (lambda: attrreg.PGDEx(bounds=(False, True)), ValueError, r"bounds must be.*\. "),
        (lambda: attrreg.PGDEx(loss=scores.TargetLogit()), TypeError, r"loss must be.*\. "),  # type: ignore[arg-type]
        (lambda: attrreg.AdversarialInvariance(every=0), ValueError, r"every must be.*\. "),
        (lambda: attrreg.AdversarialInvariance(rate=0.0), ValueError, r"rate must be.*\. "),
        (lambda: attrreg.AdversarialInvariance(rate="1e-3"), ValueError, r"rate must be.*\. "),  # type: ignore[arg-type]
        (lambda: attrreg.AdversarialInvariance(seed=1.0), TypeError, r"seed must be an integer of 64 bits.*\. "),  # type: ignore[arg-type]
        (lambda: attrreg.AdversarialInvariance(seed=2**70), TypeError, r"seed must be an integer of 64 bits.*\. "),
        (lambda: attrreg.AdversarialInvariance(hidden=8), TypeError, r"hidden must be the widths.*\. "),  # type: ignore[arg-type]
        (lambda: attrreg.AdversarialInvariance(hidden="64"), TypeError, r"hidden must be the widths of the hidden layers, got '64'\. "),  # type: ignore[arg-type]
        (lambda: attrreg.AdversarialInvariance(weight=-1.0), ValueError, r"weight of AdversarialInvariance must be.*\. "),
        (lambda: attrreg.AdversarialInvariance(layer=nn.Linear(1, 1)), TypeError, r"layer must be the dotted name.*\. "),  # type: ignore[arg-type]
        (lambda: attrreg.AdversarialInvariance(fill="0"), TypeError, r"fill must be.*\. "),  # type: ignore[arg-type]
        (lambda: attrreg.AdversarialInvariance(hidden=(8.0,)), ValueError, r"hidden must be an integer.*\. "),  # type: ignore[arg-type]
    ],
)
def test_bad_settings_are_refused(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


COUNT: Any = numpy.int64(2)
HALF: Any = numpy.float32(0.5)
SMALL: Any = numpy.int8(127)


@pytest.mark.parametrize(
    ("given", "want"),
    [
        (lambda: attrreg.IntegratedGradients(COUNT, chunk=COUNT), attrreg.IntegratedGradients(2, chunk=2)),
        (lambda: attrreg.ExpectedGradients(COUNT), attrreg.ExpectedGradients(2)),
        (lambda: attrreg.PGDEx(steps=COUNT), attrreg.PGDEx(steps=2)),
        (lambda: schedules.Linear(COUNT, float(COUNT)), schedules.Linear(2, 2.0)),
        (lambda: attrreg.InputGradient(scores.RandomProjection(seed=COUNT)), attrreg.InputGradient(scores.RandomProjection(seed=2))),
        (lambda: attrreg.InputGradient(scores.RegressionOutput(COUNT)), attrreg.InputGradient(scores.RegressionOutput(2))),
        (lambda: metrics.Occlusion(COUNT, COUNT), metrics.Occlusion(2, 2)),
        (lambda: attrreg.ActivationDifference(["stem", "body"]), attrreg.ActivationDifference(("stem", "body"))),
        (lambda: attrreg.InputGradient(Neuron("head", COUNT)), attrreg.InputGradient(Neuron("head", 2))),
        (
            lambda: attrreg.InputGradient().using(engines.FiniteDifference(HALF)),
            attrreg.InputGradient().using(engines.FiniteDifference(0.5)),
        ),
        (lambda: attrreg.IntegratedGradients(2, HALF), attrreg.IntegratedGradients(2, 0.5)),
        (lambda: attrreg.PGDEx(HALF, rate=HALF, bounds=(-HALF, HALF)), attrreg.PGDEx(0.5, rate=0.5, bounds=(-0.5, 0.5))),
        (lambda: LayerConductance("body", SMALL), LayerConductance("body", 127)),
        (lambda: NoiseTunnel(attrreg.InputGradient(), samples=COUNT), NoiseTunnel(attrreg.InputGradient(), samples=2)),
        (lambda: scores.SegmentationLogit(COUNT), scores.SegmentationLogit(2)),
    ],
)
def test_integers_of_numpy_and_lists_are_what_they_stand_for(given: Callable[[], Any], want: Any) -> None:
    made = given()
    assert made == want and hash(made) == hash(want) and pickle.loads(pickle.dumps(made)) == want
    assert eval(repr(made)) == want
    if isinstance(want, attrreg.AttributionRegularizer):
        model, (x, mask, target) = SmoothNet().double(), smooth_batch()
        found, expected = (each(model, x, mask, target, generator=torch.Generator().manual_seed(0)) for each in (made, want))
        assert torch.equal(found, expected)


IMAGES = torch.rand(4, 3, 32, 32)
ONE_OF = baselines.OneOf(IMAGES)


@pytest.mark.parametrize(
    ("call", "cause"),
    [
        (lambda: InternalInfluence("body", baseline=ONE_OF), "each place would draw another OneOf"),
        (lambda: ShapleyValues(torch.zeros(32, 32, dtype=torch.long), ONE_OF), "OneOf would draw anew for each set of segments"),
        (lambda: NoiseTunnel(FeatureAblation(torch.zeros(32, 32, dtype=torch.long), ONE_OF)), "a map that reads the images as they are"),
        (lambda: attrreg.IntegratedGradients(baseline=baselines.Masked(ONE_OF), objective=objectives.Energy()), "a share of attribution"),
        (lambda: attrreg.from_captum(captum.attr.GradientShap, baselines=IMAGES.tolist()), r"baselines must be a tensor \(K, C, H, W\)"),
    ],
)
def test_a_refusal_prints_no_images(call: Callable[[], Any], cause: str) -> None:
    with pytest.raises((TypeError, ValueError), match=cause) as caught:
        call()
    assert len(str(caught.value)) < 300


def test_a_gradient_from_a_masked_image_has_a_share() -> None:
    settings: dict[str, Any] = {"steps": 2, "baseline": baselines.Masked(baselines.Zero()), "objective": objectives.Energy()}
    assert NeuronConductance(Neuron("body", (0, 1, 1)), multiply=False, **settings).multiply is False
    with pytest.raises(ValueError, match="a share of attribution would not tell"):
        NeuronConductance(Neuron("body", (0, 1, 1)), **settings)


def test_losses_that_are_taken() -> None:
    def loss(logits: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits, target, reduction="none")

    model, (x, mask, target) = SmoothNet().double(), smooth_batch()
    taken: list[Any] = [None, loss, nn.CrossEntropyLoss(reduction="none")]
    first, *others = (attrreg.InputGradient(scores.TaskLoss(function))(model, x, mask, target) for function in taken)
    for other in others:
        torch.testing.assert_close(other, first)


def test_counts_are_pythons_own() -> None:
    steps = numpy.uint8(200)
    for kept in (attrreg.IntegratedGradients(steps=steps), schedules.Linear(steps), schedules.Every(steps)):  # type: ignore[arg-type]
        assert kept.steps * 2 == 400
    scheduled = attrreg.Scheduled(attrreg.InputGradient(), schedules.Every(3))
    scheduled.load_state_dict({"step": steps})  # type: ignore[dict-item]
    assert scheduled.step * 2 == 400
    assert metrics.pointing_game(torch.rand(1, 1, 4, 4), torch.ones(4, 4), steps) == 1  # type: ignore[arg-type]
    invariance = attrreg.AdversarialInvariance(every=numpy.uint8(2), hidden=(8,))  # type: ignore[arg-type]
    invariance.load_state_dict({**invariance.state_dict(), "step": 256})  # no remainder by a uint8
    model, (x, mask, _) = SmoothNet().double(), smooth_batch()
    invariance(model, x, mask)
    assert invariance.step == 257


def test_an_image_is_named_by_its_shape_in_texts() -> None:
    image = torch.zeros(3, 64, 64)
    assert re.search(r"Fixed\(<\(3, 64, 64\), torch\.float32, [0-9a-f]{8}>\)\)$", repr(attrreg.IntegratedGradients(2, image)))
    assert repr(baselines.Fixed(image)) != repr(baselines.Fixed(image + 1))  # by which metrics are told apart
    wrong: list[Callable[[], Any]] = [lambda: attrreg.ExpectedGradients(image), lambda: attrreg.GradCAM(image)]  # type: ignore[arg-type]
    for made in wrong:
        with pytest.raises((TypeError, ValueError), match=r"got tensor\(.* \.\.\.") as raised:
            made()
        assert len(str(raised.value)) < 200


def test_an_attachment_says_whether_it_records() -> None:
    handle = attrreg.InputGradient().attach(SmoothNet())
    assert repr(handle) == "<Attachment to SmoothNet>"
    handle.remove()
    assert repr(handle) == "<Attachment to SmoothNet, recording nothing>"
