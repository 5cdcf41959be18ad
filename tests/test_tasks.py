"""Tasks other than one label an image: multi-label, one logit, segmentation, regression."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

import attrreg
from attrreg import engines, objectives, scores
from tests import oracles
from tests.models import DEVICE, SmoothNet, assert_close, gradients, smooth_batch
from tests.test_engines import ENGINES
from tests.test_gradients import OBJECTIVES, SCORES, check_numerically


class Dense(nn.Module):
    """Logits for every pixel, from a smooth net."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.head = nn.Conv2d(4, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.tanh(self.stem(x)))
        return logits


def multi_label(logits: Tensor, target: Tensor) -> Tensor:
    return torch.stack([logits[i, c] * target[i, c] for i in range(3) for c in range(3)]).sum()


def binary(logits: Tensor, target: Tensor) -> Tensor:
    return torch.stack([logits[i, 0] if target[i] else -logits[i, 0] for i in range(3)]).sum()


def segmentation(logits: Tensor, target: Tensor) -> Tensor:
    pixels = [(i, r, c) for i in range(3) for r in range(8) for c in range(8) if target[i, r, c] != -100]
    return torch.stack([logits[i, int(target[i, r, c]), r, c] for i, r, c in pixels]).sum()


def one_logit_a_pixel(logits: Tensor, target: Tensor) -> Tensor:
    signs = torch.where(target == 1, 1.0, -1.0) * (target != -100)
    return (signs * logits[:, 0]).sum()


def label_loss(logits: Tensor, target: Tensor) -> Tensor:
    return nn.functional.binary_cross_entropy_with_logits(logits, target, reduction="none").sum(dim=1)


def square_loss(outputs: Tensor, target: Tensor) -> Tensor:
    return (outputs[:, 0] - target).square()


LABELS = torch.randint(0, 3, (3, 8, 8), generator=torch.Generator(DEVICE).manual_seed(0))
LABELS[:, :2] = -100
FOREGROUND = LABELS.clamp(max=1)
HOT = torch.tensor([[1, 0, 1], [0, 0, 1], [1, 1, 1]])

Case = tuple[nn.Module, scores.Score, Tensor | None, Callable[[Tensor, Tensor], Tensor]]
CASES: dict[str, Callable[[], Case]] = {
    "multi-label": lambda: (SmoothNet(), scores.MultiLabelLogit(), HOT, multi_label),
    "multi-label, float": lambda: (SmoothNet(), scores.MultiLabelLogit(), HOT.float() * 0.5, multi_label),
    "multi-label, mixed": lambda: (SmoothNet(), scores.MultiLabelLogit(), HOT.float() * (1 + 2.0**-22), multi_label),
    "multi-label, half": lambda: (SmoothNet(), scores.MultiLabelLogit(), HOT.bfloat16(), multi_label),
    "multi-label, by the target's shape": lambda: (SmoothNet(), scores.ByTarget(), HOT, multi_label),
    "multi-label, by a loss": lambda: (SmoothNet(), scores.TaskLoss(label_loss), HOT.double(), lambda *data: label_loss(*data).sum()),
    "regression, by a loss": lambda: (
        SmoothNet(classes=1),
        scores.TaskLoss(square_loss),
        torch.tensor([0.5, 2.0, -1.0]).double(),
        lambda *data: square_loss(*data).sum(),
    ),
    "one logit": lambda: (SmoothNet(classes=1), scores.BinaryLogit(), torch.tensor([1, 0, 1]), binary),
    "one logit, float": lambda: (SmoothNet(classes=1), scores.BinaryLogit(), torch.tensor([[1.0], [0.0], [1.0]]), binary),
    "segmentation": lambda: (Dense(3), scores.SegmentationLogit(), LABELS, segmentation),
    "segmentation, by the target's shape": lambda: (Dense(3), scores.ByTarget(), LABELS, segmentation),
    "segmentation, one logit a pixel": lambda: (Dense(1), scores.SegmentationLogit(), FOREGROUND, one_logit_a_pixel),
    "regression": lambda: (SmoothNet(), scores.RegressionOutput(), None, lambda outputs, target: outputs.sum()),
    "regression, one of several": lambda: (SmoothNet(), scores.RegressionOutput(1), None, lambda outputs, target: outputs[:, 1].sum()),
}


@pytest.mark.parametrize("name", CASES)
def test_scores_of_other_tasks(name: str) -> None:
    model, score, target, oracle = CASES[name]()
    model = model.double()
    x, mask, _ = smooth_batch()
    layer = "stem"
    regularizer = attrreg.InputGradient(score) + attrreg.GradCAM(layer, score=score, objective=objectives.AbsoluteOutside())
    value = regularizer(model, x, mask, target)
    labels = torch.zeros(()) if target is None else target
    map, cam = oracles.input_gradient(model, x, labels, oracle), oracles.grad_cam(model, x, labels, oracle, layer)
    torch.testing.assert_close(attrreg.InputGradient(score).attribute(model, x, target), map.detach())  # its sign too
    relevant = mask.unsqueeze(1).double()
    want = oracles.log_outside(map, relevant).mean() + oracles.absolute_outside(cam, relevant).mean()
    torch.testing.assert_close(value, want)
    assert_close(gradients(model, value), gradients(model, want), 1e-8)
    check_numerically(model, lambda: attrreg.InputGradient(score)(model, x, mask, target))


class Squeezed(nn.Module):
    """One number for the whole batch."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(2 * 8 * 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        number: Tensor = self.head(x.flatten(1)).mean()
        return number


class Twice(SmoothNet):
    """Two views of each image, one after the other."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((super().forward(x), super().forward(-x)))


BAG = nn.Sequential(SmoothNet(classes=1), nn.Flatten(0), nn.Linear(3, 1))  # one logit for the whole batch

BAD: list[tuple[scores.Score, nn.Module, Tensor | None, str]] = [
    (scores.MultiLabelLogit(), SmoothNet(), torch.tensor([0, 1, 1]), r"target must be \(N, C\)"),
    (scores.MultiLabelLogit(), SmoothNet(), 2 * HOT, r"target must be in \[0, 1\] for MultiLabelLogit, got values from 0 to 2\."),
    (scores.MultiLabelLogit(), SmoothNet(), HOT[:, :2], r"target is \(3, 2\), but the logits are \(3, 3\)"),
    (scores.MultiLabelLogit(), SmoothNet(), None, "MultiLabelLogit needs a target"),
    (scores.BinaryLogit(), SmoothNet(classes=1), torch.tensor([0, 2, 1]), r"of 0 and 1 for BinaryLogit, got values from 0 to 2\."),
    (scores.BinaryLogit(), SmoothNet(classes=1), HOT[:, :2], r"target must be \(N,\) of 0 and 1 for BinaryLogit, got \(3, 2\)"),
    (scores.BinaryLogit(), SmoothNet(), torch.tensor([0, 1, 1]), "one logit an image"),
    (scores.BinaryLogit(), Twice(classes=1), torch.tensor([0, 1, 1]), r"one logit an image, but the model returned \(6, 1\)"),
    (scores.BinaryLogit(), BAG, torch.tensor([0, 1, 1]), r"one logit an image, but the model returned \(1,\)"),
    (scores.SegmentationLogit(), Dense(3), LABELS.double(), r"label map, \(N, H, W\) integers, got torch.float64 \(3, 8, 8\)"),
    (scores.SegmentationLogit(), Dense(3), LABELS.bool(), r"label map, \(N, H, W\) integers, got torch.bool \(3, 8, 8\)"),
    (scores.ByTarget(), Dense(3), LABELS[:, None], r"got \(3, 1, 8, 8\)\. Reshape it; a label map is \(N, H, W\)"),
    (scores.ByTarget(), SmoothNet(classes=1), torch.zeros(3, 1), r"target is \(3, 1\).*For one logit name the score: scores.BinaryLogit"),
    (scores.RegressionOutput(), Squeezed(), None, r"does not fit outputs of shape \(\)"),
    (scores.SegmentationLogit(), Dense(3), LABELS[:, :4], "Resize"),
    (scores.SegmentationLogit(), Dense(3), LABELS[:, :, :4], "Resize"),
    (scores.SegmentationLogit(), Dense(3), LABELS.clamp(min=-1), r"outside \[0, 3\)"),
    (scores.SegmentationLogit(), SmoothNet(), LABELS, r"needs logits \(N, C, H, W\)"),
    (scores.SegmentationLogit(), Dense(2), LABELS, r"outside \[0, 2\)"),
    (scores.SegmentationLogit(), Dense(1), LABELS, r"outside \[0, 2\)"),
    (scores.RegressionOutput(3), SmoothNet(), None, "index in range"),
    (scores.RegressionOutput(-1), SmoothNet(), None, "index in range"),
    (scores.TargetLogit(), SmoothNet(classes=1), torch.tensor([0, 1, 0]), "class 1.*use scores.BinaryLogit"),
    (scores.TaskLoss(), SmoothNet(), torch.tensor([0, -100, 1]), "class -100, which is negative"),
    (scores.TargetLogit(), Twice(), torch.tensor([0, 1, 2]), r"one row of logits an image, .* \(6, 3\) for 3 images"),
    (scores.Contrast(), Twice(), torch.tensor([0, 1, 2]), r"one row of logits an image, .* \(6, 3\) for 3 images"),
    (scores.SegmentationLogit(), nn.Sequential(Dense(6), nn.Unflatten(1, (2, 3)), nn.Flatten(0, 1)), LABELS, r"got \(6, 3, 8, 8\)"),
]


@pytest.mark.parametrize(("score", "model", "target", "message"), BAD)
def test_bad_targets_and_outputs(score: scores.Score, model: nn.Module, target: Tensor | None, message: str) -> None:
    x, mask, _ = smooth_batch()
    with pytest.raises(ValueError, match=message):
        attrreg.InputGradient(score)(model.double(), x, mask, target)


def test_clips_whose_frames_are_images_need_a_row_of_logits_for_each() -> None:
    class Clips(SmoothNet):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).unflatten(0, (-1, 2)).mean(1)  # type: ignore[no-any-return]  # of two frames each

    model, (x, mask, _) = Clips().double(), smooth_batch(4)
    with pytest.raises(ValueError, match=r"reads \(2, 3\) for 4 images.*repeat_interleave"):
        attrreg.InputGradient()(model, x, mask)
    assert attrreg.InputGradient()(model, x, mask, output=lambda logits: logits.repeat_interleave(2, 0)) > 0


def test_a_number_an_image_is_no_class() -> None:
    x, mask, _ = smooth_batch()
    with pytest.raises(TypeError, match=r"class indices, got torch.float64.*one logit BinaryLogit.*regression RegressionOutput"):
        attrreg.InputGradient()(SmoothNet(classes=1).double(), x, mask, torch.rand(3, dtype=torch.float64))


@pytest.mark.parametrize("output", [0, "logits"])
def test_an_output_of_train_mode_in_eval_mode(output: int | str) -> None:
    x, mask, _ = smooth_batch()
    for score in (scores.SumLogProb(), scores.RegressionOutput()):  # three images of three outputs: an index would pick an image
        with pytest.raises(TypeError, match=r"does not fit a Tensor.*Leave output= out, or pass a function"):
            attrreg.InputGradient(score)(SmoothNet().double(), x, mask, output=output)


def public(module: ModuleType) -> set[type]:
    """The classes that a module defines, of which objects can be made."""
    own = [kind for kind in vars(module).values() if isinstance(kind, type) and kind.__module__ == module.__name__]
    return {kind for kind in own if not kind.__name__.startswith("_") and not inspect.isabstract(kind) and kind is not engines.Engine}


def test_every_score_objective_and_engine_is_held_to_the_tests_of_gradients() -> None:
    tested = {type(score) for score, _ in SCORES.values()} | {type(make()[1]) for make in CASES.values()} | {scores.RandomProjection}
    assert public(scores) == tested
    assert public(objectives) == {type(objective) for objective, _ in OBJECTIVES.values()}
    assert public(engines) == {type(engine) for engine in ENGINES}


@pytest.mark.parametrize("term", [attrreg.InputGradient(), attrreg.GradCAM("body"), attrreg.IntegratedGradients(steps=2)])
def test_an_image_without_any_label_is_not_penalised(term: attrreg.AttributionRegularizer) -> None:
    model, (x, mask, _), hot, others = SmoothNet().double(), smooth_batch(), HOT.clone(), [0, 2]
    hot[1] = 0
    value, want = term.reduced("sum")(model, x, mask, hot), term.reduced("sum")(model, x[others], mask[others], hot[others])
    torch.testing.assert_close(value, want)
    assert_close(gradients(model, value), gradients(model, want), 1e-9)
    nothing = term(model, x, mask, torch.zeros_like(hot))
    assert nothing == 0 and not any(gradient.any() for gradient in gradients(model, nothing))


def test_label_maps_of_ignored_pixels_alone_are_not_penalised() -> None:
    model, (x, mask, _) = Dense(3).double(), smooth_batch()
    value = attrreg.InputGradient(scores.SegmentationLogit(255))(model, x, mask, torch.full_like(LABELS, 255))
    assert value == 0 and not any(gradient.any() for gradient in gradients(model, value))


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = SmoothNet().double()

    def forward(self, x: Tensor, scale: float, shift: float = 0.0) -> Tensor:
        return scale * self.inner(x) + shift  # type: ignore[no-any-return]


class Fails(SmoothNet):
    def __init__(self, message: str) -> None:
        super().__init__()
        self.message = message

    def forward(self, x: Tensor, *others: Tensor, **options: float) -> Tensor:
        raise TypeError(self.message)


@pytest.mark.parametrize("attached", [False, True])
def test_other_inputs_that_were_forgotten(attached: bool) -> None:
    model, regularizer, (x, mask, target) = Scaled(), attrreg.InputGradient(), smooth_batch()
    with regularizer.attach(model) if attached else nullcontext():
        model(x, 2.0)
        with pytest.raises(TypeError, match=r"forward also takes scale\. Pass .*`inputs=`"):
            regularizer(model, x, mask, target)
    for fails in (Fails("of the model's own").double(), Fails("something is missing").double()):
        with pytest.raises(TypeError, match=f"^{fails.message}$"):
            regularizer(fails, x, mask, target)
