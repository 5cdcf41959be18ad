"""Common mistakes: the message names the argument, the cause, and a remedy that works."""

# mypy: disable-error-code="arg-type,list-item,dict-item"

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

import attrreg
from attrreg import baselines, masks, metrics, plot, schedules, scores
from attrreg.data import MaskFolder, WithMasks
from tests.models import SmoothNet, smooth_batch

pytestmark = pytest.mark.cpu

x, mask, target = smooth_batch()
model = SmoothNet().double()
REG = attrreg.InputGradient()
HOT = torch.eye(3)[target].long()


class Item(scores.Score):
    """Gives a number."""

    def __call__(self, value: Tensor, target: Tensor | None) -> Any:
        return value.sum().item()


class Named(SmoothNet):
    """Takes the images by name alone."""

    def forward(self, *, images: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(images)


class Frozen(SmoothNet):
    """Its features are made without a graph."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = x * 2
            features = self.body(self.stem(x)).mean((2, 3))
        logits: Tensor = self.head(features)
        return logits


named, frozen = Named().double(), Frozen().double()
MISTAKES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "an array of images": (lambda: REG(model, x.numpy(), mask), TypeError, r"x must .*Make a normalised tensor"),
    "images and mask swapped": (lambda: REG(model, mask, x), TypeError, r"It looks like a mask: the order is \(model, x, mask\)"),
    "a mask of a type that is no tensor": (lambda: REG(model, x, mask.numpy()), TypeError, r"torch.as_tensor\(numpy.array\(mask\)\)"),
    "labels in place of the mask": (lambda: REG(model, x, target), ValueError, r"labels go by name: target="),
    "one-hot labels": (lambda: attrreg.InputGradient(scores.TargetLogit())(model, x, mask, HOT), ValueError, r"`target.argmax\(1\)`"),
    "boolean one-hot labels": (
        lambda: attrreg.InputGradient(scores.TargetLogit())(model, x, mask, HOT.bool()),
        TypeError,
        r"`target.int\(\).argmax\(1\)`",
    ),
    "one class for all": (lambda: REG(model, x, mask, torch.tensor(1)), ValueError, r"one class for all images write target.expand\(3\)"),
    "one class in a batch": (lambda: REG(model, x, mask, torch.tensor([1])), ValueError, r"write target.expand\(3\)"),
    "features under no_grad": (
        lambda: attrreg.InputGradient(scores.RandomProjection())(frozen, x, mask),
        RuntimeError,
        "on the way to it the model detaches or runs under no_grad",
    ),
    "a column of labels": (
        lambda: attrreg.InputGradient(scores.TargetLogit())(model, x, mask, target[:, None]),
        ValueError,
        r"`target.flatten\(\)`",
    ),
    "a float label map with its channel": (
        lambda: attrreg.InputGradient(scores.TargetLogit())(model, x, mask, torch.ones(3, 1, 8, 8)),
        TypeError,
        r"`target.squeeze\(1\).long\(\)`",
    ),
    "labels of several heads": (lambda: REG(model, x, mask, {"a": target, "b": target}), TypeError, r"torch\.stack\(labels, dim=1\)"),
    "a list of labels": (lambda: REG(model, x, mask, list(target)), TypeError, r"torch\.as_tensor\(target\)"),
    "a column of floats for cross-entropy": (
        lambda: attrreg.InputGradient(scores.TaskLoss())(model, x, mask, target[:, None].float()),
        TypeError,
        r"`target.squeeze\(1\).long\(\)`",
    ),
    "labels of several heads in a list": (lambda: REG(model, x, mask, [target, target]), TypeError, r"torch\.stack\(labels, dim=1\)"),
    "soft labels for cross-entropy": (
        lambda: attrreg.PGDEx()(model, x, mask, HOT.double()),
        TypeError,
        r"TaskLoss\(nn\.CrossEntropyLoss\(reduction='none'\)\)",
    ),
    "a label that is not known": (
        lambda: attrreg.InputGradient(scores.BinaryLogit())(model, x, mask, torch.tensor([1.0, -1.0, 0.0])),
        ValueError,
        "not known are left out by `annotated=`",
    ),
    "a column of floats": (
        lambda: attrreg.InputGradient(scores.TargetLogit())(model, x, mask, target[:, None].float()),
        TypeError,
        r"`target.squeeze\(1\).long\(\)`",
    ),
    "a mask in place of the target": (lambda: REG.attribute(model, x, mask), ValueError, "a mask is passed as mask="),
    "the class called": (lambda: attrreg.InputGradient(model, x, mask), TypeError, r"InputGradient\(\)\(model, x, mask\)"),
    "the class of another called": (lambda: attrreg.ActivationDifference(model), TypeError, "layers must be dotted names"),
    "a schedule times a regularizer": (lambda: schedules.Every(4) * REG, TypeError, r"Scheduled\(reg, schedule\)"),
    "a baseline's class": (lambda: attrreg.IntegratedGradients(baseline=baselines.Blur), TypeError, "got the class Blur"),
    "a fill's class": (lambda: attrreg.ActivationDifference(fill=baselines.Zero), TypeError, "got the class Zero"),
    "no image": (lambda: baselines.Fixed(None), TypeError, "image must be a tensor, .*got NoneType"),
    "noise by channel": (lambda: baselines.Noise(std=torch.ones(3)), TypeError, "one number for all channels"),
    "a score that gives a number": (
        lambda: attrreg.InputGradient(Item())(model, x, mask),
        TypeError,
        "gave a float, but a score is a tensor",
    ),
    "an input of another name": (
        lambda: REG(named, x, mask, inputs={"image": x}),
        TypeError,
        r"inputs= does not fit the model's forward\(\*, images.*unexpected keyword argument 'image'",
    ),
    "a name that is none": (lambda: REG(named, x, mask, inputs={1: x}), TypeError, "inputs= does not fit .*keywords must be strings"),
    "images by name alone": (lambda: REG(named, x, mask), TypeError, r"its forward is forward\(\*, images.*by `inputs=`"),
    "no parameters": (lambda: REG(nn.Identity(), x, mask), RuntimeError, "The model has no parameters"),
    "a class as output": (lambda: REG(model, x, mask, output=nn.Softmax), TypeError, "output must be"),
    "arrays of logits": (lambda: metrics.accuracy(numpy.zeros((3, 2)), target), TypeError, "logits must be a tensor"),
    "boxes of detection": (lambda: masks.from_boxes([{"boxes": []}], (8, 8)), TypeError, r"target\['boxes'\]"),
    "a flat box": (lambda: masks.from_boxes([0, 0, 4, 4], (8, 8)), TypeError, r"boxes of one image are \(K, 4\)"),
    "curves without steps": (lambda: plot.training({"a": [1.0]}, {}), TypeError, r"penalties must map names to curves"),
    "captions without columns": (
        lambda: plot.attributions(x, mask, {"phi": x}, captions=["a"]),
        TypeError,
        "captions must be a mapping",
    ),
    "a value in place of a function of values": (lambda: MaskFolder(".", relevant=255), TypeError, "relevant must be a function"),
    "the class of a transform": (lambda: WithMasks(nn.Identity), TypeError, "mix must be called"),
    "a measure's name": (
        lambda: metrics.judged(model, x, mask, target, lambda model, x, target: x, measure="share"),
        TypeError,
        "measure must be a function",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_the_message_says_what_to_do(name: str) -> None:
    call, kind, message = MISTAKES[name]
    with pytest.raises(kind, match=message) as caught:
        call()
    assert len(str(caught.value)) < 500  # and does not print a model
