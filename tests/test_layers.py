"""Which layers have a map or features, in models where more than one could be it, and which can be named."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

import attrreg
from attrreg import baselines, sites
from attrreg.trace import passes
from tests.models import SmoothNet, assert_close, batch, gradients, nearly_all, smooth_batch

X, Y = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])
MASK = torch.zeros(4, 32, 32, dtype=torch.bool)
MASK[:, :16] = True
WITHOUT = X * MASK[:, None]
DIFFERENCE = attrreg.ActivationDifference(fill=baselines.Zero())


def distance(features: Any) -> Tensor:
    """What `DIFFERENCE` is of a function of images."""
    return (features(X) - features(WITHOUT)).flatten(1).norm(dim=1).mean()  # type: ignore[no-any-return]


class Pooled(nn.Module):
    """Pools tokens by a layer: what that gives has one value a channel, and as many channels as a grid has cells."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.pool, self.head = nn.Conv2d(3, 64, 3, 2, 1), nn.AdaptiveAvgPool1d(1), nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.pool(self.conv(x).relu().flatten(2)).flatten(1))
        return logits


def test_a_pooled_vector_is_no_map() -> None:
    model = Pooled()
    assert attrreg.GradCAM().attribute(model, X, Y).shape == (4, 1, 16, 16)
    assert [info.name for info in attrreg.layers(model, X)] == ["conv"]


class ImageAndText(nn.Module):
    """The text's tokens look like a map."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.embed, self.text, self.head = nn.Conv2d(3, 8, 3, 2, 1), nn.Embedding(50, 8), nn.Linear(8, 8), nn.Linear(16, 3)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        image = self.conv(x).relu().mean((2, 3))
        logits: Tensor = self.head(torch.cat([image, self.text(self.embed(ids)).tanh().mean(1)], 1))
        return logits


@pytest.mark.parametrize("attach", [False, True])
def test_maps_come_from_the_images(attach: bool) -> None:
    model, ids, reg = ImageAndText(), torch.randint(50, (4, 16)), attrreg.GradCAM()
    want = attrreg.GradCAM("conv")(model, X, MASK, Y, inputs=(X, ids))
    with reg.attach(model) if attach else nullcontext():
        for _ in range(2):
            with passes() as counted:
                if attach:
                    model(X, ids)
                value = reg(model, X, MASK, Y, inputs=(X, ids))
            torch.testing.assert_close(value, want)
        assert counted.forward == (0 if attach else 1)  # it is known now
    value.backward()
    assert model.conv.weight.grad is not None


class Exits(nn.Module):
    """Early exits, more of them than layers with large outputs are kept."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Conv2d(3, 8, 3), *(nn.Conv2d(8, 8, 3) for _ in range(5))])
        self.exits = nn.ModuleList([nn.Linear(8, 3) for _ in range(6)])

    def features(self, x: Tensor, count: int) -> Tensor:
        """Of an exit."""
        for block in list(self.blocks)[: count + 1]:
            x = block(x).relu()
        return x.mean((2, 3))

    def forward(self, x: Tensor) -> list[Tensor]:
        found = []
        for block, head in zip(self.blocks, self.exits, strict=True):
            x = block(x).relu()
            found.append(head(x.mean((2, 3))))
        return found


@pytest.mark.parametrize("index", [0, 1, 3, 5])
def test_features_are_those_of_the_output_asked_for(index: int) -> None:
    model = Exits()
    torch.testing.assert_close(DIFFERENCE(model, X, MASK, output=index), distance(lambda x: model.features(x, index)))


def test_features_that_are_not_found_are_said() -> None:
    model = timm.create_model("test_efficientnet", features_only=True)
    with pytest.raises(ValueError, match=r"from none of the layers that features are looked for in\. Name the layer"):
        DIFFERENCE(model, X, MASK, output=lambda maps: maps[0].mean((2, 3)))


def test_each_of_several_classifiers_has_its_features() -> None:
    settings: dict[str, Any] = {"num_classes": 3, "img_size": 32, "depth": 2, "embed_dim": 48, "num_heads": 3}
    model = timm.create_model("deit_tiny_distilled_patch16_224", **settings)
    main, second = (distance(lambda x, token=token: model.forward_features(x)[:, token]) for token in (0, 1))
    torch.testing.assert_close(DIFFERENCE(model, X, MASK), main)  # the mean of both: the first
    model.set_distilled_training(True)
    for index, want in enumerate((main, second)):
        torch.testing.assert_close(DIFFERENCE(model, X, MASK, output=index), want)


@pytest.mark.parametrize("name", ["aux_logits1", "aux_logits2", "logits"])
def test_features_of_auxiliary_heads(name: str) -> None:
    with torch.no_grad():
        model = torchvision.models.googlenet(weights=None, init_weights=False, num_classes=3, dropout=0.0, dropout_aux=0.0)
    head = {"aux_logits1": model.aux1.fc2, "aux_logits2": model.aux2.fc2, "logits": model.fc}[name]
    entered: list[Tensor] = []
    head.register_forward_pre_hook(lambda module, args: entered.append(args[0]))
    value = DIFFERENCE(model, X, MASK, output=name)
    torch.testing.assert_close(value, (entered[0] - entered[1]).norm(dim=1).mean())


def moving() -> nn.Module:
    """Its forward moves an estimate that the next one computes with."""
    return nn.Sequential(spectral_norm(nn.Conv2d(3, 8, 3)), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)).double()


def test_all_passes_start_from_the_same_buffers() -> None:
    model, x = moving(), X.double()
    with DIFFERENCE.attach(model), passes() as counted:
        model(x)
        assert DIFFERENCE(model, x, nearly_all(x)) < 1e-7
    assert counted.forward == 2
    with attrreg.InputGradient().attach(model), passes() as counted:  # which has no other pass
        model(x)
        attrreg.InputGradient()(model, x, MASK, Y)
    assert counted.forward == 0


@pytest.mark.parametrize("channels", [1, 3])
def test_images_that_are_compared_lie_alike_in_memory(channels: int) -> None:
    model, x = nn.Sequential(nn.Conv2d(channels, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)), X[:, :channels]
    x, steps = x.to(memory_format=torch.channels_last), []
    model.register_forward_pre_hook(lambda module, args: steps.append(args[0].stride()))
    attrreg.ActivationDifference()(model, x, MASK)
    assert len(steps) > 1 and set(steps) == {x.stride()}


@pytest.mark.parametrize("other", [attrreg.ActivationDifference("features", baselines.Zero()), attrreg.GradCAM("features").named("again")])
def test_the_automatic_layers_map_is_the_same_in_every_sum(other: Any) -> None:
    with torch.no_grad():
        model = torchvision.models.DenseNet(8, (2, 2), 16, num_classes=3).double().eval()  # works in place on its last map
    x = X.double()
    alone = attrreg.GradCAM()(model, x, MASK, Y)
    expected, rest = gradients(model, alone), gradients(model, other(model, x, MASK, Y))
    for regularizer in (attrreg.GradCAM() + other, other + attrreg.GradCAM()):
        penalty = regularizer.evaluate(model, x, MASK, Y)
        torch.testing.assert_close(penalty.terms["GradCAM"], alone.detach())
        found = [one - two for one, two in zip(gradients(model, penalty.total), rest, strict=True)]
        assert_close(found, expected, 1e-6)


@pytest.mark.parametrize(("name", "layer"), [("resnet26", "layer3"), ("regnetx_002", "s3")])
def test_small_images_do_not_hide_the_map_in_a_branch(name: str, layer: str) -> None:
    model = timm.create_model(name, num_classes=3)  # whose last stage has a single position left, and starts its branches at zero
    regularizer = attrreg.GradCAM()
    with regularizer.attach(model) as handle:
        model(X)
        value = regularizer(model, X, MASK, Y)
    assert handle.map == layer
    assert any(gradient.any() for gradient in gradients(model, value))


def test_a_frozen_net_with_a_trainable_head_of_several_layers() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4), nn.Linear(4, 3))
    model[:3].requires_grad_(False)
    value, want = DIFFERENCE(model, X, MASK), distance(model[:4])  # of what enters the last layer, which the one before it can change
    torch.testing.assert_close(value, want)
    found = gradients(model, value)
    assert_close(found, gradients(model, want), 1e-5)
    assert len(found) == 4 and found[0].any()

    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.frozen, self.ours = nn.Linear(6, 4), nn.Parameter(torch.randn(4, 6))

        def forward(self, h: Tensor) -> Tensor:
            result: Tensor = self.frozen(h) + h @ self.ours.T
            return result

    adapted = nn.Sequential(*model[:3], Adapted()).requires_grad_(False)
    adapted[3].ours.requires_grad_()
    with pytest.raises(RuntimeError, match="no path to any trainable parameter"):
        DIFFERENCE(adapted, X, MASK)


@pytest.mark.parametrize("layer", ["blocks.0", "auto"])
def test_a_head_of_zeros_is_no_class_token(layer: str) -> None:
    model = timm.create_model("test_vit", img_size=32, num_classes=3)
    nn.init.zeros_(model.head.weight)
    assert attrreg.GradCAM(layer)(model, X, MASK, Y) == 0


class Fails(Pooled):
    """After its layers."""

    def forward(self, x: Tensor) -> Tensor:
        super().forward(x)
        raise KeyError("of the model")


def test_a_model_that_raises_is_left_without_hooks() -> None:
    model = Fails()
    with pytest.raises(KeyError, match="of the model"):
        attrreg.layers(model, X)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_layers_are_those_that_can_be_named() -> None:
    class Twice(SmoothNet):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.act(x))

    model, (x, mask, target) = Twice().double(), smooth_batch()
    found = [layer.name for layer in attrreg.layers(model, x)]
    assert found and "act" not in found
    for name in found:
        attrreg.GradCAM(name)(model, x, mask, target)


def test_attach_names_the_term_of_an_unknown_layer() -> None:
    reg = attrreg.InputGradient() + attrreg.GradCAM("nowhere").named("mine")
    with pytest.raises(ValueError, match=r"mine: .*nowhere"):
        reg.attach(SmoothNet())


def test_as_many_tokens_as_images_are_a_grid_unless_a_layer_takes_the_tokens_first() -> None:
    value, x = torch.randn(4, 4, 8), torch.zeros(4, 3, 32, 32)
    for first in (True, False):
        model = nn.ModuleDict({"here": nn.Identity(), "attention": nn.MultiheadAttention(8, 2, batch_first=first)})
        with nullcontext() if first else pytest.raises(ValueError, match=r"layer 'here' gives .*not a spatial map"):
            assert sites.to_grid(value, model, x, "here").shape == (4, 8, 2, 2)


class Windows(SmoothNet):
    """A layer works on windows, as Swin's attention does."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.inside(x.reshape(-1, 2, 4, 8)).reshape_as(x))


class OneNumber(SmoothNet):
    """A layer gives a number an image."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Flatten(0)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = super().forward(x) * self.inside(x.mean((1, 2, 3), keepdim=True))[:, None]
        return result


@pytest.mark.parametrize("kind", [attrreg.ActivationDifference, attrreg.AdversarialInvariance])
@pytest.mark.parametrize(("build", "shape"), [(Windows, r"\(6, 2, 4, 8\)"), (OneNumber, r"\(3,\)")])
def test_layers_without_a_row_an_image_are_named(kind: Any, build: Any, shape: str) -> None:
    model, (x, mask, _) = build().double(), smooth_batch()
    regularizer = attrreg.ActivationDifference(("inside", "body")) if kind is attrreg.ActivationDifference else kind(layer="inside")
    with pytest.raises(ValueError, match=rf"layer 'inside' gives {shape} for 3 images.*Name a layer"):
        regularizer(model, x, mask)


def test_layers_lists_what_can_be_chosen() -> None:
    model = timm.create_model("test_vit", img_size=64, num_classes=4)
    x, mask, target = batch(2, size=64, classes=4)
    with torch.no_grad():
        model.head.weight.normal_()
    before = torch.get_rng_state()
    found = {info.name: info for info in attrreg.layers(model, x)}
    assert torch.equal(torch.get_rng_state(), before) and not any(module._forward_hooks for module in model.modules())
    patches = found["patch_embed.proj"]
    assert (patches.layout, patches.kind, patches.shape[2:]) == ("NCHW", "Conv2d", patches.grid)
    tokens = found["blocks.0.norm1"]
    assert tokens.layout == "tokens" and tokens.grid == patches.grid
    assert "head" not in found and "blocks.0.attn.q_norm" not in found
    for name in ("patch_embed.proj", "blocks.0.norm1"):
        assert attrreg.GradCAM(name)(model, x, mask, target).isfinite()
    with pytest.raises(ValueError, match="x must be a batch of images"):
        attrreg.layers(model, x[0])


def test_features_are_what_enters_the_classifier() -> None:
    sizes: dict[str, Any] = {"layers": [1, 1, 1, 1], "embed_dims": [32, 64, 64, 64], "num_heads": [2, 4, 4, 4], "img_size": 64}
    model = timm.models.volo.VOLO(**sizes, num_classes=4).eval()  # an auxiliary head runs after the head
    x = torch.randn(1, 3, 64, 64)
    with attrreg.ActivationDifference().attach(model) as handle:
        model(x)
        assert handle._recording is not None
        features = handle._recording.values["<features>"]
    torch.testing.assert_close(features, model.forward_head(model.forward_features(x), pre_logits=True))


class _ByKeyword(SmoothNet):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(input=self.drop(self.body(self.stem(x)).mean((2, 3))))  # type: ignore[no-any-return]


def test_features_enter_a_classifier_by_keyword_too() -> None:
    model, (x, mask, target) = _ByKeyword().double(), smooth_batch()
    features = attrreg.ActivationDifference(fill=baselines.Zero())(model, x, mask, target)
    torch.testing.assert_close(features, attrreg.ActivationDifference("drop", baselines.Zero())(model, x, mask, target))


def test_a_pool_that_enlarges_is_no_map() -> None:
    layers = [nn.Conv2d(2, 4, 3), nn.Tanh(), nn.MaxPool2d(6), nn.AdaptiveAvgPool2d(6), nn.Flatten(), nn.Linear(144, 3)]
    model, (x, mask, target) = nn.Sequential(*layers).double(), smooth_batch()  # "2" leaves one position, "3" makes it 6 x 6, as in AlexNet
    with attrreg.GradCAM().attach(model) as handle:
        model(x)
        attrreg.GradCAM()(model, x, mask, target)
        model(x)
    assert handle.map == "1"
