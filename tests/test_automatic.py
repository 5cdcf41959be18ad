"""The layer that `layer="auto"` is for Grad-CAM: found among many, and remembered."""

from __future__ import annotations

import copy
import gc
import weakref
from collections import OrderedDict
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attrreg
from attrreg import scores
from attrreg.graph import nodes
from attrreg.trace import passes
from tests.models import FAMILIES, SmoothNet, assert_close, batch, gradients, smooth_batch, stir
from tests.test_conditions import CAM


@pytest.mark.parametrize(
    ("name", "settings", "layer"),
    [
        ("test_vit", {"img_size": 64}, "blocks.5.norm1"),
        ("test_vit3", {"img_size": 64}, "norm"),  # attention pooling over patches
        ("test_resnet", {}, "layer4"),
        ("test_convnext", {}, "stages"),  # not the identity behind them
        ("test_mambaout", {}, "stages"),  # (N, h, w, C)
    ],
)
def test_the_automatic_layer(name: str, settings: dict[str, Any], layer: str) -> None:
    model = timm.create_model(name, num_classes=4, **settings).eval()
    x, mask, target = batch(2, size=64, classes=4)
    stir(model, 0.02)
    map = attrreg.GradCAM().attribute(model, x, target)
    assert map.dim() == 4 and map.shape[1] == 1 and map.shape[2] == map.shape[3] > 1
    assert float(map.flatten(1).std(dim=1).min()) > 0
    regularizer = attrreg.GradCAM()
    with passes() as counted, regularizer.attach(model) as handle:
        for _ in range(3):
            model(x)
            regularizer(model, x, mask, target)
    assert handle.map == layer
    assert counted.forward == 0 and counted.backward <= 4  # looked for at most once


@pytest.mark.parametrize(
    ("name", "settings", "layer"),
    [
        ("coat_tiny", {"img_size": 64}, "norm14"),  # four branches; the last maps are read by nobody
        ("cait_xxs24_224", {"img_size": 64, "depth": 1}, "norm1"),  # class attention: its inside has maps too
        ("xcit_nano_12_p16_224", {"img_size": 64, "depth": 1}, "norm1"),
        ("crossvit_tiny_240", {}, "norm1"),
        ("volo_d1_224", {"img_size": 64}, "norm"),  # head_drop runs twice
    ],
)
def test_the_automatic_layer_of_class_attention(name: str, settings: dict[str, Any], layer: str) -> None:
    model = timm.create_model(name, num_classes=4, **settings).eval()
    stir(model, 0.02)
    x = torch.randn(1, 3, *(model.img_size[0], model.img_size[0]) if "crossvit" in name else (64, 64))
    target, mask = torch.tensor([1]), torch.ones(x.shape[-2:]).triu()
    regularizer = attrreg.GradCAM() + attrreg.ActivationDifference()
    want = regularizer(model, x, mask, target, generator=torch.Generator().manual_seed(0))
    with regularizer.attach(model) as handle:
        for _ in range(2):  # the second time by name
            model(x)
            got = regularizer(model, x, mask, target, generator=torch.Generator().manual_seed(0))
            torch.testing.assert_close(got, want, rtol=1e-4, atol=0)
    assert handle.map is not None and handle.map.rsplit(".", 1)[-1].startswith(layer)
    assert float(attrreg.GradCAM(handle.map).attribute(model, x, target).std()) > 0


class TwoBranches(nn.Module):
    """As in timm's CrossViT, `num_features` is the width of two branches together, and by chance that of a perceptron's inside."""

    num_features = 8

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(2, 4, 2, stride=2)
        self.mlp = nn.Sequential(nn.Conv2d(4, 8, 1), nn.Tanh(), nn.Conv2d(8, 4, 1))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Any:
        patches = self.patches(x)
        return self.head(torch.cat((patches, patches + self.mlp(patches)), dim=1).mean(dim=(2, 3)))


def test_hidden_features_are_not_the_automatic_layer() -> None:
    model, (x, mask, target) = TwoBranches().double(), smooth_batch()
    with attrreg.GradCAM().attach(model) as handle:
        model(x)
        attrreg.GradCAM()(model, x, mask, target)
    assert handle.map == "mlp"


class Attention(nn.Conv2d):
    """By its name."""


class Within(nn.Module):
    """Its last map is of a layer inside a part of a name that may say what the part is."""

    def __init__(self, name: str, part: nn.Module, width: int | None) -> None:
        super().__init__()
        self.stem, self.parts, self.head = nn.Conv2d(2, 4, 3), nn.ModuleDict({name: part}), nn.Linear(6, 3)
        if width is not None:
            self.num_features = width

    def forward(self, x: Tensor) -> Any:
        part = next(iter(self.parts.values()))
        return self.head((part[0] if isinstance(part, nn.ModuleList) else part)(self.stem(x).tanh()).mean((2, 3)))


@pytest.mark.parametrize(
    ("name", "width", "layer"),
    [
        *((name, None, "stem") for name in ("mlp", "MLP", "ffn", "xca", "attn", "cross_attn")),
        ("attn", 5, "stem"),  # no layer outside has the width that the model says
        *((name, None, f"parts.{name}.0") for name in ("attn_block", "mlp_block")),
        ("block", 6, "parts.block.0"),
        ("block", 4, "stem"),
    ],
)
def test_parts_of_attention_and_perceptrons_are_told_by_name_and_width(name: str, width: int | None, layer: str) -> None:
    model, (x, mask, target) = Within(name, nn.ModuleList([nn.Conv2d(4, 6, 1)]), width).double(), smooth_batch()
    torch.testing.assert_close(CAM(model, x, mask, target), replace(CAM, layer=layer)(model, x, mask, target))


@pytest.mark.parametrize(("name", "layer"), [("", "parts.part"), ("SelfAttention", "stem"), ("AttentionBlock", "parts.part.0")])
def test_attention_is_told_by_its_class_but_is_no_part_of_itself(name: str, layer: str) -> None:
    part = type(name, (nn.ModuleList,), {})([nn.Conv2d(4, 6, 1)]) if name else Attention(4, 6, 1)
    model, (x, mask, target) = Within("part", part, None).double(), smooth_batch()
    torch.testing.assert_close(CAM(model, x, mask, target), replace(CAM, layer=layer)(model, x, mask, target))


def test_a_model_whose_maps_are_all_of_a_perceptron_has_an_automatic_layer() -> None:
    model, (x, mask, target) = nn.Sequential(OrderedDict(mlp=SmoothNet())).double(), smooth_batch()
    torch.testing.assert_close(CAM(model, x, mask, target), replace(CAM, layer="mlp.body")(model, x, mask, target))


def test_frozen_backbone_with_an_automatic_layer() -> None:
    model, (x, mask, target) = SmoothNet().double(), smooth_batch()
    for layer in (model.stem, model.body):
        layer.requires_grad_(False)
    by_name = gradients(model, attrreg.GradCAM("body")(model, x, mask, target))
    assert_close(gradients(model, attrreg.GradCAM()(model, x, mask, target)), by_name, 1e-12)


@pytest.mark.parametrize("name", ["vit", "swin", "convnext"])
def test_the_first_step_takes_one_backward_as_all_others_do(name: str) -> None:
    model = FAMILIES[name].build().eval()  # swin draws in train mode
    x, mask, target = batch(2, size=FAMILIES[name].size, classes=4)
    reg = attrreg.InputGradient() + attrreg.GradCAM()
    alone = [gradients(model, term(model, x, mask, target)) for term in (attrreg.InputGradient(), attrreg.GradCAM())]
    for attached in (False, True):
        fresh = copy.deepcopy(model)
        with reg.attach(fresh) if attached else nullcontext():
            for _ in range(2):
                fresh(x)
                with passes() as counted:
                    value = reg(fresh, x, mask, target)
                assert (counted.forward, counted.backward) == (0 if attached else 1, 1)
                assert_close(gradients(fresh, value), [a + b for a, b in zip(*alone, strict=True)], 1e-4)


# Remembered


class Steps(nn.Module):
    """Two outputs, of which the second comes a layer later; on larger images and in eval mode there is one more."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.c = nn.Conv2d(2, 3, 3, padding=1), *(nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        a = self.a(self.stem(x).tanh()).tanh()
        b = self.b(a).tanh()
        b = self.c(b).tanh() if x.shape[-1] > 8 or not self.training else b
        return {"a": self.first(a.mean((2, 3))), "b": self.second(b.mean((2, 3)))}


@pytest.mark.parametrize("order", ["abab", "baba", "aab"])
def test_the_automatic_layer_is_that_of_the_output_asked_for(order: str) -> None:
    model, (x, mask, target) = Steps().double(), smooth_batch()
    want = {key: CAM(model, x, mask, target, output=key) for key in "ab"}
    with CAM.attach(model):
        for key in order:
            model(x)
            torch.testing.assert_close(CAM(model, x, mask, target, output=key), want[key])


def test_a_function_may_pick_the_output_by_what_it_is_given() -> None:
    class Telling(Steps):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {**super().forward(x), "bright": x.mean() > 0}

    model, (x, mask, target) = Telling().double(), smooth_batch()
    x = x.abs()
    for images, key in ((x, "a"), (-x, "b"), (x, "a")):
        got = CAM(model, images, mask, target, output=lambda out: out["a"] if out["bright"] else out["b"])
        torch.testing.assert_close(got, CAM(copy.deepcopy(model), images, mask, target, output=key))


def test_a_model_that_changes_is_attached_anew() -> None:
    class Growing(Steps):
        deep = False

        def forward(self, x: Tensor) -> Any:
            return super().forward(x)["b" if self.deep else "a"]

    model, (x, mask, target) = Growing().double(), smooth_batch()
    for deep, layer in ((False, "a"), (True, "b")):
        model.deep = deep
        with CAM.attach(model) as handle:
            for _ in range(2):
                model(x)
                torch.testing.assert_close(CAM(model, x, mask, target), replace(CAM, layer=layer)(model, x, mask, target))
            assert handle.map == layer


def test_calls_of_attribute_do_not_change_the_remembered_layer() -> None:
    model, (x, mask, target) = Steps().double(), smooth_batch()
    CAM.attribute(model, x, target, output=lambda out: torch.clone(out["b"]))
    with CAM.attach(model) as handle:
        for _ in range(2):
            model(x)
            CAM(model, x, mask, target, output="a")
            CAM.attribute(model, x, target, output=lambda out: torch.clone(out["b"]))
        assert handle.map == "a"


@pytest.mark.parametrize(("size", "training"), [(16, True), (8, False)])
@pytest.mark.parametrize("attached", [True, False])
def test_the_automatic_layer_is_that_of_the_images_size_and_of_the_mode(size: int, training: bool, attached: bool) -> None:
    model, (x, mask, target) = Steps().double(), smooth_batch()
    calls = [(x, True), (F.interpolate(x, size=size), training)] * 2
    with CAM.attach(model) if attached else nullcontext():
        for images, mode in calls:
            model.train(mode)
            want = CAM(copy.deepcopy(model), images, mask, target, output="b")  # a copy remembers nothing
            model(images)
            torch.testing.assert_close(CAM(model, images, mask, target, output="b"), want)


def test_the_automatic_layer_is_that_of_what_the_score_reads() -> None:
    model, (x, mask, target) = Steps().double(), smooth_batch()
    early = replace(CAM, score=scores.RandomProjection("a", seed=0))
    for reg, layer in ((early, "stem"), (CAM, "b"), (early, "stem")):
        got = reg(model, x, mask, target, output="b")
        torch.testing.assert_close(got, replace(reg, layer=layer)(model, x, mask, target, output="b"))


def test_the_automatic_layer_stays_known_where_the_output_is_a_function_written_in_the_loop() -> None:
    model, (x, mask, target) = Steps().double(), smooth_batch()
    with CAM.attach(model) as handle:
        for _ in range(3):
            model(x)
            CAM(model, x, mask, target, output=lambda out: out["a"])
        assert handle.map == "a"


PICKED = ""


def by_a_global(key: str) -> Any:
    global PICKED
    PICKED = key
    return lambda out: next(out[PICKED] for _ in range(1))


MAKERS = [
    lambda key: lambda out, key=key: out[key],
    lambda key: lambda out, *, key=key: out[key],
    lambda key: lambda out: out[key],
    by_a_global,
]


@pytest.mark.parametrize("order", ["aabb", "bbaa"])
@pytest.mark.parametrize("make", MAKERS)
def test_functions_of_equal_code_may_pick_different_outputs(make: Any, order: str) -> None:
    model, (x, mask, target) = Steps().double(), smooth_batch()
    fresh = copy.deepcopy(model)
    want = {key: CAM(fresh, x, mask, target, output=key) for key in "ab"}
    for handle in (CAM.attach(model), None):
        for key in order:
            model(x)
            pick = make(key)
            torch.testing.assert_close(CAM(model, x, mask, target, output=pick), want[key])
            held = weakref.ref(pick)
            del pick
            assert held() is None  # it may hold anything
        if handle is not None:
            assert handle.map is None
            handle.remove()


def test_a_later_call_finds_the_automatic_layer_known() -> None:
    model, (x, mask, target) = SmoothNet().double(), smooth_batch()
    found = []
    for _ in range(2):
        value = attrreg.GradCAM()(model, x, mask, target)
        ours = sum(node.name() == "_ConvolveBackward" for node in nodes(value))
        found.append((ours, value.detach(), gradients(model, value)))
    (first, value, want), (second, again, got) = found
    assert (first, second) == (2, 0)  # what comes before the layer is differentiated once, by PyTorch
    torch.testing.assert_close(again, value, rtol=1e-13, atol=0)
    assert_close(got, want, 1e-12)


def test_a_remembered_layer_keeps_no_model() -> None:
    model, (x, mask, target) = SmoothNet().double(), smooth_batch()

    class Own(scores.TargetLogit):
        owner = model

    attrreg.GradCAM(score=Own())(model, x, mask, target)
    attrreg.GradCAM()(model, x, mask, target, output=partial(lambda model, output: output, model))
    watched = weakref.ref(model)
    del model, Own
    gc.collect()
    assert watched() is None
