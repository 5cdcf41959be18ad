"""Captum's settings: their defaults, and those that change what is computed."""

from __future__ import annotations

import inspect
from typing import Any

import captum.attr
import pytest
import torch
from torch import Tensor, nn

import attrreg
from attrreg import baselines, scores
from attrreg.captum import explanation_func
from attrreg.captum.bridge import ACCEPTED
from benchmarks.captum_check import Net
from tests.models import SmoothNet, smooth_batch
from tests.test_captum import CASES, SEGMENTS, TAKEN, batch

pytestmark = pytest.mark.cpu


@pytest.mark.parametrize("name", ACCEPTED)
def test_defaults_are_captums(name: str) -> None:
    kind, ours = getattr(captum.attr, name), inspect.signature(ACCEPTED[name]).parameters
    theirs = {**inspect.signature(kind.attribute).parameters, **inspect.signature(kind).parameters}
    for setting in ours.keys() - {"score", "objective"}:
        assert ours[setting].default in (theirs[setting].default, inspect.Parameter.empty)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("LayerGradientXActivation", {}),
        ("NeuronConductance", {"neuron_selector": (1, 2, 2), "n_steps": 3, "method": "gausslegendre"}),
    ],
)
def test_maps_without_the_factor_are_captums(name: str, settings: dict[str, Any]) -> None:
    model, (x, _, target) = Net().eval().double(), batch()
    kind = getattr(captum.attr, name)
    got = attrreg.from_captum(kind, layer="body", multiply_by_inputs=False, **settings).attribute(model, x, target)
    torch.testing.assert_close(got, kind(model, model.body, multiply_by_inputs=False).attribute(x, target=target, **settings).detach())


def test_conductance_from_a_masked_image_is_that_of_what_it_lacks() -> None:
    model, (x, mask, target) = Net().double(), batch()
    settings: dict[str, Any] = {"neuron": attrreg.captum.Neuron("body", (1, 2, 2)), "steps": 3}
    term = attrreg.captum.NeuronConductance(baseline=baselines.Masked(baselines.Zero()), **settings)
    want = attrreg.captum.NeuronConductance(baseline=x * mask.view(-1, 1, *mask.shape[-2:]), **settings)
    torch.testing.assert_close(term.attribute(model, x, target, mask=mask), want.attribute(model, x, target))


def test_a_map_of_a_selected_output_for_captums_metrics() -> None:
    class Pair(Net):
        def forward(self, x: Tensor) -> Any:
            return None, super().forward(x)

    model, (x, _, target) = Pair().double(), batch()
    explain = attrreg.captum.explanation_func(attrreg.InputGradient(), model, output=1)
    torch.testing.assert_close(explain(x, target), attrreg.InputGradient().attribute(model, x, target, output=1), rtol=0, atol=0)
    with pytest.raises(ValueError, match="too many values"):  # of one batch: a second would go unread
        explain((x, x), target)


@pytest.mark.parametrize("name", [name for name, make in ACCEPTED.items() if "layer" in inspect.signature(make).parameters])
def test_a_layer_is_given_by_its_name(name: str) -> None:
    settings: dict[str, Any] = {"neuron_selector": 1} if name.startswith("Neuron") else {}
    with pytest.raises(TypeError, match="layer must be the dotted name of a layer"):
        attrreg.from_captum(getattr(captum.attr, name), layer=nn.Identity(), **settings)


def test_neurons_are_counted_from_the_end_too() -> None:
    model, (x, _, target) = Net().double(), batch()
    last, same = (attrreg.InputGradient(attrreg.captum.Neuron("head", index)).attribute(model, x, target) for index in (-1, 2))
    assert torch.equal(last, same)
    for index in (3, -4):
        with pytest.raises(ValueError, match="is no neuron"):
            attrreg.InputGradient(attrreg.captum.Neuron("head", index)).attribute(model, x, target)


def test_what_takes_a_segments_place_is_drawn_anew_each_call() -> None:
    model, (x, mask, target) = Net().double(), batch()
    term = attrreg.captum.FeatureAblation(SEGMENTS, baselines.Noise())
    first, second = (term(model, x, mask, target) for _ in range(2))
    assert first != second


@pytest.mark.parametrize("name", TAKEN)
def test_an_objective_is_checked(name: str) -> None:
    kind, settings = getattr(captum.attr, name), CASES[name].settings
    with pytest.raises(TypeError, match="objective must be"):
        attrreg.from_captum(kind, objective="energy", **settings)  # type: ignore[arg-type]


def test_a_weighted_term_is_no_attribution_method() -> None:
    with pytest.raises(TypeError, match="attribution_method must be a plain term"):
        attrreg.from_captum(captum.attr.NoiseTunnel, attribution_method=2 * attrreg.InputGradient())


def test_masks_in_captums_metrics() -> None:
    model, (x, mask, target) = SmoothNet().double(), smooth_batch()
    term = attrreg.IntegratedGradients(2, baselines.Masked(baselines.Zero()))
    explain, want = explanation_func(term, model, mask=mask), term.attribute(model, x, target, mask=mask)
    torch.testing.assert_close(explain(x, target), want)
    twice = explain(x.repeat_interleave(2, 0), target.repeat_interleave(2))
    torch.testing.assert_close(twice, want.repeat_interleave(2, 0))


@pytest.mark.parametrize("copies", [1, 3])
def test_one_label_of_one_image_keeps_its_axes(copies: int) -> None:
    model, term, label = SmoothNet(classes=1).double(), attrreg.InputGradient(scores.MultiLabelLogit()), torch.ones(1, 1)
    x = smooth_batch()[0][:1].repeat_interleave(copies, 0)
    torch.testing.assert_close(explanation_func(term, model)(x, label), term.attribute(model, x, label.expand(copies, 1)))
