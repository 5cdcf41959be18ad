"""Parameter gradients: against a naive double backward and against numerical differences, in float64."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attrreg
from attrreg import baselines, objectives, scores
from attrreg.objectives import Objective
from attrreg.ops import Phase, twice_differentiable
from attrreg.regularizer import AttributionRegularizer
from attrreg.scores import Score
from tests import oracles
from tests.models import DEVICE, FAMILIES, SmoothNet, assert_close, batch, gradients, smooth_batch, stir
from tests.test_conditions import REG

SCORES: dict[str, tuple[Score, oracles.ScoreFunction]] = {
    "sum_log_prob": (scores.SumLogProb(), oracles.score_sum_log_prob),
    "target_logit": (scores.TargetLogit(), oracles.score_target_logit),
    "target_log_prob": (scores.TargetLogProb(), oracles.score_target_log_prob),
    "predicted_logit": (scores.PredictedLogit(), oracles.score_predicted),
    "contrast": (scores.Contrast(), oracles.score_contrast),
    "task_loss": (scores.TaskLoss(), oracles.score_task_loss),
}
OBJECTIVES: dict[str, tuple[Objective, Callable[[Tensor, Tensor], Tensor]]] = {
    "squared": (objectives.SquaredOutside(), oracles.squared_outside),
    "absolute": (objectives.AbsoluteOutside(), oracles.absolute_outside),
    "log": (objectives.LogOutside(), oracles.log_outside),
    "net": (objectives.NetOutside(), oracles.net_outside),
    "fraction": (objectives.OutsideFraction(), oracles.outside_fraction),
    "energy": (objectives.Energy(), oracles.energy),
    "total_variation": (objectives.TotalVariation(), oracles.total_variation),
}
# name -> (the regularizer of a score and an objective, its naive map of (model, x, target, score))
MAPS: dict[str, tuple[Callable[..., AttributionRegularizer], Callable[..., Tensor]]] = {
    "input_gradient": (attrreg.InputGradient, oracles.input_gradient),
    "input_x_gradient": (attrreg.InputXGradient, oracles.input_x_gradient),
    "integrated_gradients": (lambda **s: attrreg.IntegratedGradients(steps=4, **s), oracles.integrated_gradients),
    "integrated_gradients_unchunked": (lambda **s: attrreg.IntegratedGradients(steps=4, chunk=None, **s), oracles.integrated_gradients),
    "integrated_gradients_uneven": (lambda **s: attrreg.IntegratedGradients(steps=4, chunk=3, **s), oracles.integrated_gradients),
    "grad_cam": (lambda **s: attrreg.GradCAM(layer="body", **s), partial(oracles.grad_cam, layer="body")),
    "grad_cam_semi": (
        lambda **s: attrreg.GradCAM(layer="act", semi=True, **s),
        partial(oracles.grad_cam, layer="act", semi=True),
    ),
}


def naive(model: nn.Module, x: Tensor, mask: Tensor, target: Tensor, map: Callable[..., Tensor], score: Any, objective: Any) -> Tensor:
    phi = map(model, x, target, score)
    relevant = oracles.resize_by_area(mask.to(phi.dtype), phi.shape[-1]).unsqueeze(1)
    value: Tensor = objective(phi, relevant).mean()
    return value


# An objective does not know its map's score: all go together on one map, each by itself on the others.
ONE_BY_ONE = [(s, o) for s in SCORES for o in OBJECTIVES if s == "contrast" or o == "log"]
TOGETHER = [("input_gradient", s, o) for s in SCORES for o in OBJECTIVES]
PAIRED = [*TOGETHER, *((method, *pair) for method in MAPS if method != "input_gradient" for pair in ONE_BY_ONE)]
# In train mode the map is another, but what is made of it is not.
TRAINED = [(method, "contrast", "log", True) for method in MAPS]


@pytest.mark.parametrize(("method", "score", "objective", "training"), [*((*case, False) for case in PAIRED), *TRAINED])
def test_equal_naive_double_backward(method: str, score: str, objective: str, training: bool) -> None:
    model, (x, mask, target) = SmoothNet(norm=True).double().train(training), smooth_batch()
    build, map = MAPS[method]
    value = build(score=SCORES[score][0], objective=OBJECTIVES[objective][0])(model, x, mask, target)
    got = gradients(model, value)
    expected = naive(model, x, mask, target, map, SCORES[score][1], OBJECTIVES[objective][1])
    torch.testing.assert_close(value, expected, rtol=1e-8, atol=1e-14)  # shares have an eps that the oracle has not
    assert_close(got, gradients(model, expected), 1e-8)


# That the oracles' own derivatives are right: each score and objective once, each map once.
# Not the semi-gradient: its weights are constants for the gradient alone, so no difference of values shows it.
NUMERICAL = [("input_gradient", *pair) for pair in ONE_BY_ONE]
NUMERICAL += [(method, "contrast", "log") for method in MAPS if method not in ("input_gradient", "grad_cam_semi")]


@pytest.mark.parametrize(("method", "score", "objective"), NUMERICAL)
def test_equal_numerical_differences(method: str, score: str, objective: str) -> None:
    model, (x, mask, target) = SmoothNet().double(), smooth_batch()
    regularizer = MAPS[method][0](score=SCORES[score][0], objective=OBJECTIVES[objective][0])
    check_numerically(model, lambda: regularizer(model, x, mask, target))


def check_numerically(model: nn.Module, function: Callable[[], Tensor]) -> None:
    found = gradients(model, function())
    assert max(float(gradient.abs().max()) for gradient in found) > 0
    for parameter, gradient in zip(model.parameters(), found, strict=True):
        direction = torch.randn_like(parameter)
        expected = oracles.central_difference(function, parameter, direction)
        assert float((gradient * direction).sum()) == pytest.approx(expected, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("detach", ["clean", "masked", None])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_activation_difference_equals_naive(training: bool, detach: Any) -> None:
    model, (x, mask, _) = SmoothNet(norm=True).double().train(training), smooth_batch()
    value = attrreg.ActivationDifference("body", baselines.Zero(), detach)(model, x, mask)
    outputs: list[Tensor] = []
    hook = model.get_submodule("body").register_forward_hook(lambda module, args, output: outputs.append(output))
    model(x)
    model(x * mask.unsqueeze(1))
    hook.remove()
    clean, masked = outputs
    difference = (clean.detach() if detach == "clean" else clean) - (masked.detach() if detach == "masked" else masked)
    expected = torch.stack([image.flatten().norm() for image in difference]).mean()
    torch.testing.assert_close(value, expected)
    assert_close(gradients(model, value), gradients(model, expected), 1e-10)


def test_activation_difference_sums_layers() -> None:
    model, (x, mask, _) = SmoothNet().double(), smooth_batch()
    both = attrreg.ActivationDifference(("stem", "body"), baselines.Zero())(model, x, mask)
    each = [oracles.activation_difference(model, x, x * mask.unsqueeze(1), layer).mean() for layer in ("stem", "body")]
    torch.testing.assert_close(both, each[0] + each[1])


DRAWING: dict[str, AttributionRegularizer] = {
    "shuffled": attrreg.ActivationDifference(),
    "noise": attrreg.ActivationDifference("body", baselines.Noise()),
    "expected_gradients": attrreg.ExpectedGradients(),
    "expected_gradients_chunked": attrreg.ExpectedGradients(samples=3, chunk=2),
    "expected_gradients_masked": attrreg.ExpectedGradients(baseline=baselines.Masked(), objective=objectives.SquaredOutside()),
    "projection": attrreg.InputGradient(scores.RandomProjection()),
    "projection_on_a_path": attrreg.ExpectedGradients(2, baselines.Masked(), score=scores.RandomProjection("body")),
    "projection_cam": attrreg.GradCAM("stem", score=scores.RandomProjection()),
}


@pytest.mark.parametrize("name", DRAWING)
def test_drawing_terms_equal_numerical_differences(name: str) -> None:
    model, (x, mask, _) = SmoothNet().double(), smooth_batch()
    check_numerically(model, lambda: DRAWING[name](model, x, mask, generator=torch.Generator().manual_seed(3)))


def test_random_projection_is_a_projection_of_the_features() -> None:
    model, (x, _, _) = SmoothNet().double(), smooth_batch()
    got = attrreg.InputGradient(scores.RandomProjection("body", seed=5)).attribute(model, x)
    leaf = x.clone().requires_grad_()
    features = model.body(model.act(model.stem(leaf))).flatten(1)
    directions = torch.randn(features.shape, generator=torch.Generator(DEVICE).manual_seed(5), dtype=torch.float64)
    assert (directions[0] - directions[1]).abs().max() > 1
    (want,) = torch.autograd.grad((features * directions).sum(), leaf)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_equal_naive_double_backward_on_real_models(family: str, training: bool) -> None:
    known = FAMILIES[family]
    model = known.build().double().train(training)
    for module in model.modules():
        for rate in ("p", "drop_prob"):  # dropout and drop-path: an oracle that draws its own masks is no oracle
            if isinstance(getattr(module, rate, None), float):
                setattr(module, rate, 0.0)
    stir(model, 0.01)
    x, mask, target = batch(2, size=known.size, classes=4, dtype=torch.float64)
    regularizer = attrreg.InputGradient() + attrreg.GradCAM(layer=known.layer)
    got = regularizer.evaluate(model, x, mask, target)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        gradient = oracles.input_gradient(model, x, target, oracles.score_contrast)
        cam = oracles.grad_cam(model, x, target, oracles.score_contrast, known.layer)
    relevant = mask.unsqueeze(1).double()
    small = torch.nn.functional.adaptive_avg_pool2d(relevant, (cam.shape[-2], cam.shape[-1]))
    want = oracles.log_outside(gradient, relevant).mean() + oracles.log_outside(cam, small).mean()
    torch.testing.assert_close(got.total, want, rtol=1e-8, atol=0)
    if family == "mobilenetv3":
        return  # PyTorch has no second derivative of hardsigmoid to compare with; tests/test_ops.py checks ours
    assert_close(gradients(model, got.total), gradients(model, want), 1e-7)


@pytest.mark.parametrize(
    "regularizer",
    [attrreg.InputGradient(), attrreg.InputXGradient(), attrreg.IntegratedGradients(steps=3), attrreg.GradCAM("body")],
)
def test_gradient_reaches_what_made_x(regularizer: AttributionRegularizer) -> None:
    model, (x, mask, target) = SmoothNet().double(), smooth_batch()
    gain = torch.ones((), dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(regularizer(model, x * gain, mask, target), gain)
    expected = oracles.central_difference(lambda: regularizer(model, x * gain, mask, target), gain, torch.ones_like(gain))
    assert float(slope) == pytest.approx(expected, rel=1e-5)


def test_gradient_of_a_difference_reaches_x_through_the_clean_side_alone() -> None:
    model, (x, mask, target) = SmoothNet().double(), smooth_batch()
    gain = torch.ones((), dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(attrreg.ActivationDifference("body", baselines.Mean())(model, x * gain, mask, target), gain)
    masked = torch.where(mask[:, None], x, x.mean(dim=(2, 3), keepdim=True))

    def value() -> Tensor:
        clean, other = (model.body(model.act(model.stem(images))).flatten(1) for images in (x * gain, masked))
        difference: Tensor = (clean - other).norm(dim=1).mean()
        return difference

    assert float(slope) == pytest.approx(oracles.central_difference(value, gain, torch.ones_like(gain)), rel=1e-5)


@pytest.mark.parametrize("layer", [nn.GELU(), nn.LayerNorm(8), nn.RMSNorm(8)])
def test_a_third_derivative_is_refused_by_name_where_only_what_was_saved_requires_one(layer: nn.Module) -> None:
    x = torch.randn(3, 8, requires_grad=True)
    with twice_differentiable(Phase()):
        y = layer(x)
    (slope,) = torch.autograd.grad(y, x, torch.randn(3, 8), create_graph=True)
    (second,) = torch.autograd.grad(slope, x, torch.randn(3, 8), create_graph=True)
    with pytest.raises(RuntimeError, match="third derivative"):
        torch.autograd.grad(second.sum(), x, allow_unused=True)


@pytest.mark.parametrize("layer", [nn.GELU(), nn.SiLU(), nn.LayerNorm(8), nn.Tanh()])
@pytest.mark.parametrize("by_name", [True, False])
def test_a_third_derivative_is_right_or_refused(layer: nn.Module, by_name: bool) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(32, 8), layer, nn.Linear(8, 3)).double()
    x, mask, target = torch.randn(3, 2, 4, 4).double(), torch.rand(3, 4, 4) > 0.5, torch.tensor([0, 1, 2])
    absolute = attrreg.InputGradient(score=scores.TargetLogit(), objective=objectives.AbsoluteOutside())

    def third(value: Tensor) -> Tensor:
        weights = [parameter for parameter in model.parameters() if parameter.dim() == 2]
        found = torch.autograd.grad(value, weights, create_graph=True)
        total = torch.stack([gradient.square().sum() for gradient in found]).sum()
        if by_name:
            return torch.autograd.grad(total, weights[0])[0]
        total.backward()
        assert weights[0].grad is not None
        return weights[0].grad

    images = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(images).gather(1, target[:, None]).sum(), images, create_graph=True)
    plain = (gradient * ~mask[:, None]).abs().flatten(1).sum(1).mean()
    try:
        found = third(absolute(model, x, mask, target))
    except RuntimeError as error:
        assert "third derivative, which a penalty does not have" in str(error) and not isinstance(layer, nn.Tanh)
    else:
        model.zero_grad()
        torch.testing.assert_close(found, third(plain))
        assert isinstance(layer, nn.Tanh)


class Kept(nn.Module):
    """Takes a gradient of its own with respect to the images, and keeps its graph."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.energy = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), act, nn.Conv2d(4, 1, 3))
        self.net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = x if x.requires_grad else x.requires_grad_()
        (force,) = torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)
        logits: Tensor = self.net(x + force)
        return logits


@pytest.mark.parametrize("act", [nn.Tanh(), nn.SiLU(), nn.GELU()])
def test_a_model_that_keeps_the_graph_of_its_own_gradient_is_right_or_refused(act: nn.Module) -> None:
    model, (x, mask, target) = Kept(act).double(), smooth_batch()
    want = oracles.squared_input_gradient(model, x, mask, target).mean()
    try:
        value = REG(model, x, mask, target)
        found = gradients(model, value)
    except RuntimeError as error:
        assert "third derivative" in str(error) and not isinstance(act, nn.Tanh)
    else:
        torch.testing.assert_close(value, want)
        assert_close(found, gradients(model, want), 1e-8)


class Force(nn.Module):
    """Takes a gradient of its own with respect to the images."""

    def __init__(self) -> None:
        super().__init__()
        self.energy, self.net = SmoothNet(), SmoothNet()

    def forward(self, x: Tensor) -> Tensor:
        x.requires_grad_()
        (force,) = torch.autograd.grad(torch.tanh(self.energy(x)).sum() + x.pow(3).sum(), x)
        logits: Tensor = self.net(x + force)
        return logits


def test_a_models_own_gradient_of_its_images_is_whole() -> None:
    model, (x, mask, target) = Force().double(), smooth_batch()
    logits, want = model(x.clone()), oracles.squared_input_gradient(model, x, mask, target).mean()
    torch.testing.assert_close(REG(model, x, mask, target), want)
    with REG.attach(model):
        torch.testing.assert_close(model(x), logits)
        found = REG(model, x, mask, target)
    torch.testing.assert_close(found, want)
    assert_close(gradients(model, found), gradients(model, want), 1e-10)


@pytest.mark.parametrize("chunk", [1, None])
@pytest.mark.parametrize("baseline", [baselines.Mean(), baselines.Blur(1.0), baselines.Masked(baselines.Mean())])
def test_gradient_of_a_path_reaches_x_and_not_through_its_baseline(baseline: baselines.Baseline, chunk: int | None) -> None:
    model, (x, mask, target) = SmoothNet().double(), smooth_batch()
    gain = torch.ones((), dtype=torch.float64, requires_grad=True)
    value = attrreg.IntegratedGradients(3, baseline, chunk=chunk)(model, x * gain, mask, target)
    (slope,) = torch.autograd.grad(value, gain)
    start = baseline(x, mask.unsqueeze(1).double(), torch.Generator(DEVICE))  # stays where it is, whatever becomes of x
    same = attrreg.IntegratedGradients(3, baselines.Fixed(start), chunk=chunk)
    expected = oracles.central_difference(lambda: same(model, x * gain, mask, target), gain, torch.ones_like(gain))
    assert float(slope) == pytest.approx(expected, rel=1e-5)


def test_no_gradient_of_the_worst_image_reaches_x() -> None:
    model, (x, mask, target) = SmoothNet().double(), smooth_batch()
    gain = torch.ones((), dtype=torch.float64, requires_grad=True)
    value = attrreg.PGDEx(epsilon=0.3, steps=2)(model, x * gain, mask, target)
    (slope,) = torch.autograd.grad(value, gain, allow_unused=True)
    assert slope is None
