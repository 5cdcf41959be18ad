"""Layers and heads that look like something else: tokens of another size, positions in another order, heads without a layer, adapters."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap
from transformers import HieraConfig, HieraForImageClassification

import attrreg
from attrreg import baselines
from tests.models import SmoothNet, gradients, smooth_batch

TARGET = torch.tensor([0, 1])
DIFFERENCE = attrreg.ActivationDifference(fill=baselines.Zero())


@pytest.mark.parametrize("size", [(80, 320), (160, 160), (320, 80)])
def test_tokens_lie_as_those_of_the_images_at_hand(size: tuple[int, int]) -> None:
    model = timm.create_model("test_vit", num_classes=2, img_size=160, dynamic_img_size=True).eval()  # made for 10 x 10 patches
    x, grid = torch.rand(2, 3, *size), (size[0] // 16, size[1] // 16)
    for cam in (attrreg.GradCAM(), attrreg.GradCAM("blocks.2.norm1")):
        assert cam.attribute(model, x, target=TARGET).shape[2:] == grid
    assert {layer.grid for layer in attrreg.layers(model, x) if layer.name.startswith("blocks")} == {grid}


@pytest.mark.parametrize(
    ("name", "size", "layer"),
    [
        ("mobilevitv2_050", 64, "stages.3.1.transformer.0"),
        ("mobilevitv2_050", 64, "stages.3.1.norm"),
        ("nest_tiny", 64, "levels.0.transformer_encoder.1"),
    ],
)
def test_positions_in_another_order_are_no_map(name: str, size: int, layer: str) -> None:
    model = timm.create_model(name, num_classes=2, **({"img_size": size} if name.startswith("nest") else {})).eval()
    x = torch.rand(2, 3, size, size)
    assert layer not in {found.name for found in attrreg.layers(model, x)}
    with pytest.raises(ValueError, match=rf"layer '{layer}' keeps positions in another order than the image.* Name the block around it"):
        attrreg.GradCAM(layer).attribute(model, x, target=TARGET)
    assert attrreg.GradCAM().attribute(model, x, target=TARGET).std() > 0


@pytest.mark.parametrize("layer", ["1", "auto"])
@pytest.mark.parametrize("channels", [8, 6], ids=["as many channels as rows", "others"])
def test_strides_may_differ_between_the_axes(layer: str, channels: int) -> None:
    """With as many channels as rows, (8 channels, 8 rows, 16 columns) could be 8 rows of 8 columns with 16 channels."""
    model = nn.Sequential(nn.Conv2d(3, channels, 3, (2, 1), 1), nn.Mish(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 4))
    cam = attrreg.GradCAM(layer).attribute(model.eval(), torch.rand(2, 3, 16, 16), target=TARGET)
    assert cam.shape == (2, 1, 8, 16)


def test_tokens_of_mask_units_are_no_map() -> None:
    stages: dict[str, Any] = {"depths": [1, 1], "num_heads": [1, 2], "masked_unit_attention": [True, False], "num_query_pool": 1}
    sizes: dict[str, Any] = {"image_size": (64, 64), "query_stride": (2, 2), "masked_unit_size": (4, 4)}
    model = HieraForImageClassification(HieraConfig(embed_dim=16, num_labels=2, **stages, **sizes)).eval()
    x, layer = torch.rand(2, 3, 64, 64), "hiera.encoder.stages.{}.layers.0.layernorm_before"
    with pytest.raises(ValueError, match=r"keeps its tokens in the order of HieraForImageClassification's mask units"):
        attrreg.GradCAM(layer.format(0)).attribute(model, x, target=TARGET, output="logits")
    assert attrreg.GradCAM().attribute(model, x, target=TARGET, output="logits").shape == (2, 1, 8, 8)


@pytest.mark.parametrize("around", ["", "0."], ids=["alone", "a part of the model"])
def test_tokens_out_of_the_images_order(around: str) -> None:
    backbone = timm.create_model("hiera_tiny_224", img_size=64, num_classes=4, embed_dim=24, num_heads=1, stages=(1, 1, 1, 1))
    nn.init.normal_(backbone.head.fc.weight)  # timm's is zero at first
    model, blocks = nn.Sequential(backbone) if around else backbone, f"{around}blocks."
    x, target, mask = torch.rand(2, 3, 64, 64), torch.tensor([0, 1]), torch.zeros(2, 64, 64)
    grids = {info.name: info.grid for info in attrreg.layers(model, x)}
    assert [grid for name, grid in grids.items() if name.startswith(blocks) and name.count(".") == blocks.count(".")] == [(2, 2)]
    # which is the last stage alone
    with pytest.raises(ValueError, match=rf"'{blocks}1'.*order of Hiera's mask units.*block of the last stage"):
        attrreg.GradCAM(f"{blocks}1")(model, x, mask, target)
    assert attrreg.GradCAM()(model, x, mask, target) > 0


@pytest.mark.parametrize("around", ["", "0."], ids=["alone", "a part of the model"])
def test_patches_kept_at_random_are_no_map(around: str) -> None:
    backbone = timm.create_model("test_vit", num_classes=3, img_size=64, patch_drop_rate=0.75)
    model = nn.Sequential(backbone) if around else backbone.train()
    x, target, last = torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 2, 0]), f"{around}blocks.1.norm1"
    whole = attrreg.GradCAM(f"{around}patch_embed").attribute(model, x, target).shape
    assert attrreg.GradCAM().attribute(model, x, target).shape == whole
    with pytest.raises(ValueError, match=rf"layer '{last}' has the patches that VisionTransformer kept at random"):
        attrreg.GradCAM(last).attribute(model, x, target)
    assert attrreg.GradCAM(last).attribute(model.eval(), x, target).shape == whole


@pytest.mark.parametrize(
    ("settings", "grid"),
    [
        ({"class_token": False, "global_pool": "avg", "reg_tokens": 4, "no_embed_class": True}, (2, 2)),  # registers before the patches
        ({"patch_size": (16, 8)}, (2, 4)),
    ],
)
def test_tokens_that_are_no_square_with_a_class_token(settings: dict[str, Any], grid: tuple[int, int]) -> None:
    model, x = timm.create_model("test_vit", img_size=32, num_classes=3, **settings), torch.randn(4, 3, 32, 32)
    assert attrreg.GradCAM("blocks.0").attribute(model, x, torch.tensor([0, 1, 2, 0])).shape == (4, 1, *grid)


class Cosine(SmoothNet):
    """A head that is a function."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Identity()  # type: ignore[assignment]
        self.classes = nn.Parameter(torch.randn(3, 5))

    def forward(self, x: Tensor) -> Tensor:
        return 16 * F.linear(F.normalize(super().forward(x)), F.normalize(self.classes))


def test_the_layer_before_a_functional_head_is_not_taken_for_the_classifier() -> None:
    model, (x, mask, target) = Cosine().double(), smooth_batch()
    with pytest.raises(ValueError, match=r"so it may not be the classifier\. Name the layer"):
        DIFFERENCE(model, x, mask, target)
    assert attrreg.ActivationDifference("head", baselines.Zero())(model, x, mask, target) > 0


class Naming(Cosine):
    """It says which layer is the classifier, though a matrix comes after it."""

    def get_classifier(self) -> nn.Module:
        """The classifier."""
        return self.last

    def __init__(self) -> None:
        super().__init__()
        self.last, self.after = nn.Linear(3, 3), nn.Parameter(torch.randn(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(super().forward(x)) @ self.after  # type: ignore[no-any-return]


def test_a_classifier_that_the_model_names_is_taken_at_its_word() -> None:
    model, (x, mask, target) = Naming().double(), smooth_batch()
    want = (Cosine.forward(model, x) - Cosine.forward(model, x * mask[:, None])).norm(dim=1).mean()
    torch.testing.assert_close(DIFFERENCE(model, x, mask, target), want)


class Choosing(SmoothNet):
    """It gives a classifier by its name alone."""

    def get_classifier(self, which: str) -> nn.Module:
        """The classifier."""
        return self.get_submodule(which)


def test_a_classifier_that_has_to_be_asked_for_by_name_is_looked_for() -> None:
    model, (x, mask, target) = Choosing().double(), smooth_batch()
    model.head.register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    entered: list[Tensor] = []
    value = DIFFERENCE(model, x, mask, target)
    torch.testing.assert_close(value, (entered[0] - entered[1]).norm(dim=1).mean())


class Convolving(nn.Module):
    """The classifier is a convolution, before the pooling."""

    def __init__(self, axes: int) -> None:
        super().__init__()
        self.stem, self.axes = nn.Conv2d(2, 5, 3), axes
        self.head = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1](5, 3, 1)

    def features(self, x: Tensor) -> Tensor:
        """What enters the classifier."""
        h = self.stem(x).tanh()
        return (h.flatten(2), h, h.unsqueeze(2))[self.axes - 1]  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x)).flatten(2).mean(2)  # type: ignore[no-any-return]


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_a_convolution_can_be_the_classifier(axes: int) -> None:
    model, (x, mask, target) = Convolving(axes).double(), smooth_batch()
    want = (model.features(x) - model.features(x * mask[:, None])).flatten(1).norm(dim=1).mean()
    torch.testing.assert_close(DIFFERENCE(model, x, mask, target), want)


class Averaging(SmoothNet):
    """Two classifiers behind one body, on a scale."""

    def __init__(self, scales: tuple[int, ...]) -> None:
        super().__init__()
        self.other, self.scale = nn.Linear(5, 3), nn.Parameter(torch.ones(scales))

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(self.stem(x).tanh()).mean((2, 3))
        return self.scale * (self.head(h) + self.other(h.tanh()))  # type: ignore[no-any-return]


@pytest.mark.parametrize("scales", [(), (3,), (1, 3)])  # of which none is a matrix
def test_two_classifiers_behind_a_scale_have_features(scales: tuple[int, ...]) -> None:
    model, (x, mask, target) = Averaging(scales).double(), smooth_batch()
    assert DIFFERENCE(model, x, mask, target) > 0


class Crops(SmoothNet):
    """One classifier for the halves of an image."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[..., :4]) + super().forward(x[..., 4:])


class Gated(SmoothNet):
    """A classifier whose first opinion gates the features that it reads at last."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(self.stem(x).tanh()).mean((2, 3))
        return self.head(h * self.head(h).sigmoid().mean(1, keepdim=True)) + 0 * self.head(h).detach()  # type: ignore[no-any-return]


def test_runs_of_a_classifier_before_its_last_one_leave_the_features_clear() -> None:
    model, (x, mask, target) = Gated().double(), smooth_batch()
    assert DIFFERENCE(model, x, mask, target) > 0


@pytest.mark.parametrize("term", [DIFFERENCE, attrreg.InputGradient(score=attrreg.scores.RandomProjection())])
def test_what_entered_the_last_of_several_runs_is_not_taken_for_the_features(term: attrreg.AttributionRegularizer) -> None:
    model, (x, mask, target) = Crops().double(), smooth_batch()
    with pytest.raises(ValueError, match=r"The classifier ran more than once.*Name a layer"):
        term(model, x, mask, target)


class LowRank(nn.Module):
    """An adapter beside a layer, as PEFT's."""

    def __init__(self, base: nn.Linear, dropout: float, rank: int) -> None:
        super().__init__()
        self.base, self.dropout = base.requires_grad_(False), nn.Dropout(dropout)
        self.a, self.b = nn.Linear(base.in_features, rank, bias=False), nn.Linear(rank, base.out_features, bias=False)

    def forward(self, h: Tensor) -> Any:
        return self.base(h) + self.b(self.a(self.dropout(h)))


@pytest.mark.parametrize(("dropout", "rank", "frozen"), [(0.0, 2, False), (0.5, 2, False), (0.0, 2, True), (0.0, 5, False)])
def test_an_adapter_beside_the_classifier_is_not_taken_for_it(dropout: float, rank: int, frozen: bool) -> None:
    model, (x, mask, _) = SmoothNet().double(), smooth_batch()
    adapted = copy.deepcopy(model).requires_grad_(not frozen)
    adapted.head = LowRank(adapted.head, dropout, rank).double()  # type: ignore[assignment]
    projected = attrreg.InputGradient(attrreg.scores.RandomProjection(seed=0))
    torch.testing.assert_close(projected.attribute(adapted, x), projected.attribute(model, x))
    if not frozen:
        torch.testing.assert_close(DIFFERENCE(adapted, x, mask), DIFFERENCE(model, x, mask))
        return
    with pytest.raises(RuntimeError, match="no path to any trainable parameter"):  # what the adapter's own two layers share is no feature
        DIFFERENCE(adapted, x, mask)


class Beside(SmoothNet):
    """A layer beside the classifier, on other features; `read`: by the logits."""

    def __init__(self, width: int, out: int, read: bool) -> None:
        super().__init__()
        self.other, self.read = nn.Linear(width, out), read

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(self.stem(x).tanh()).mean((2, 3))
        other, logits = self.other(h[:, : self.other.in_features]), self.head(h.tanh())
        return logits + other if self.read else logits  # type: ignore[no-any-return]


class Square(SmoothNet):
    """A layer of the same widths before the classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.head = nn.Sequential(nn.Linear(5, 5), nn.Tanh()), nn.Linear(5, 5)  # type: ignore[assignment]


@pytest.mark.parametrize("build", [Square, lambda: Beside(4, 3, True), lambda: Beside(5, 1, True), lambda: Beside(5, 3, False)])
def test_another_layer_is_not_taken_for_an_adapted_classifier(build: Callable[[], SmoothNet]) -> None:
    model, (x, mask, _) = build().double(), smooth_batch()
    adapted = copy.deepcopy(model)
    adapted.head = LowRank(adapted.head, 0.0, 2).double()  # type: ignore[assignment]
    torch.testing.assert_close(DIFFERENCE(adapted, x, mask), DIFFERENCE(model, x, mask))


class Members(nn.Module):
    """An ensemble whose members run at once, by torch.func."""

    def __init__(self) -> None:
        super().__init__()
        self.members = nn.ModuleList(
            nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        parameters = [dict(member.named_parameters()) for member in self.members]
        stacked = {name: torch.stack([each[name] for each in parameters]) for name in parameters[0]}
        logits: Tensor = vmap(lambda own: functional_call(self.members[0], own, (x,)))(stacked).mean(0)
        return logits


def test_layers_under_a_transform_are_not_there() -> None:
    model, (x, mask, target) = Members().double(), smooth_batch()
    assert gradients(model, attrreg.InputGradient()(model, x, mask, target))[0].any()
    assert not attrreg.layers(model, x)
    with pytest.raises(ValueError, match=r"layer 'members\.0\.1' ran under torch\.func, where no hook can read it\. Name a layer outside"):
        attrreg.GradCAM("members.0.1")(model, x, mask, target)
    for reg in (attrreg.GradCAM(), DIFFERENCE):
        with reg.attach(model):
            assert model(x).shape == (3, 3)
            with pytest.raises(ValueError, match="Name a layer"):
                reg(model, x, mask, target)


class Volumes(nn.Module):
    """A volume's slices are channels, and 4 x 4 x 4 patches would pass for 8 x 8."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.block, self.head = nn.Conv3d(1, 12, 4, 4), nn.Sequential(nn.LayerNorm(12), nn.Linear(12, 12)), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x.unsqueeze(1)).flatten(2).mT
        logits: Tensor = self.head((tokens + self.block(tokens)).mean(1))
        return logits


def test_patches_of_a_volume_are_no_map() -> None:
    model, x = Volumes(), torch.randn(2, 16, 16, 16)
    with pytest.raises(ValueError, match=r"layer 'block' has tokens of a volume.*Use an attribution at the images"):
        attrreg.GradCAM("block").attribute(model, x)
    with pytest.raises(ValueError, match="no layer with a spatial map"):
        attrreg.GradCAM().attribute(model, x)
    assert attrreg.InputGradient().attribute(model, x).any()
