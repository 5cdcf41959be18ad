"""Which layer is the map, and which output is one: shared activations, streams side by side, concatenated branches, dropped patches."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor, nn

import attrreg
from tests.models import WAYS, gradients, loss_by

TARGET = torch.tensor([0, 1])


class Shared(nn.Module):
    """One activation behind each layer, on maps and on vectors."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1)
        self.relu, self.pool, self.fc1, self.fc2 = nn.ReLU(inplace), nn.MaxPool2d(2), nn.Linear(16, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu(self.conv1(x)))
        x = self.relu(self.conv2(x)).mean((2, 3))
        logits: Tensor = self.fc2(self.relu(self.fc1(x)))
        return logits


def test_a_layer_that_also_ran_on_vectors_is_not_listed() -> None:
    model, x, mask = Shared(inplace=False), torch.rand(2, 3, 16, 16), torch.zeros(2, 16, 16)
    found = [layer.name for layer in attrreg.layers(model, x)]
    assert found == ["conv1", "pool", "conv2"]
    for name in found:
        attrreg.GradCAM(name)(model, x, mask, TARGET)


@pytest.mark.parametrize("way", WAYS)
def test_an_activation_in_place_that_cannot_be_named_hides_no_layer(way: str) -> None:
    """The map is what is left in the layer's memory: that of the same model with `F.relu_`."""
    torch.manual_seed(0)
    model, x, mask = Shared(inplace=True), torch.rand(2, 3, 16, 16), torch.zeros(2, 16, 16)
    auto, named = attrreg.GradCAM(), attrreg.GradCAM("activated")
    apart = nn.ModuleDict({"activated": nn.ReLU()})

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.activated = model, apart["activated"]

        def forward(self, x: Tensor) -> Tensor:
            m = self.model
            h = self.activated(m.conv2(m.pool(m.conv1(x).relu()))).mean((2, 3))
            logits: Tensor = m.fc2(m.fc1(h).relu())
            return logits

    want = loss_by(way, named, Named(), (x, mask, TARGET))
    expected = gradients(model, want)
    for _ in range(2):  # found, and then known
        value = loss_by(way, auto, model, (x, mask, TARGET))
        torch.testing.assert_close(value, want)
        for got, right in zip(gradients(model, value), expected, strict=True):
            torch.testing.assert_close(got, right)


class Streams(nn.Module):
    """Two networks side by side, as in an ensemble, or of colours and depth."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (timm.create_model("test_resnet", num_classes=2) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.first(x) + self.second(x)
        return logits


def test_of_two_streams_the_last_map_is_taken() -> None:
    model, x, mask = Streams().eval(), torch.rand(2, 3, 160, 160), torch.zeros(2, 160, 160)
    with attrreg.GradCAM().attach(model) as handle:
        model(x)
        attrreg.GradCAM()(model, x, mask, TARGET)
        assert handle.map is not None and handle.map.startswith("second.")


class Branches(nn.Module):
    """As Inception's blocks: no layer gives as many channels as the concatenation, and no border is padded."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, 4)
        self.block = nn.ModuleDict({"left": nn.Conv2d(4, 5, 3), "right": nn.Conv2d(4, 6, 3)})
        self.joined, self.fc = nn.Identity(), nn.Linear(11, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        joined = self.joined(torch.cat([part(h) for part in self.block.values()], 1))
        logits: Tensor = self.fc(joined.mean((2, 3)))
        return logits


def test_concatenated_branches_are_a_map_though_borders_were_cut_off() -> None:
    model, x = Branches(), torch.rand(2, 3, 32, 64)
    assert attrreg.GradCAM("joined").attribute(model, x, target=TARGET).shape == (2, 1, 6, 14)
    torch.testing.assert_close(
        attrreg.GradCAM().attribute(model, x, target=TARGET), attrreg.GradCAM("joined").attribute(model, x, target=TARGET)
    )


def test_channels_of_a_flattened_map_are_no_patches() -> None:
    """16 channels would pass for 4 x 4 patches."""
    layers = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Flatten(2), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(16, 2)]
    model, x, mask = nn.Sequential(*layers), torch.rand(2, 3, 16, 16), torch.zeros(2, 16, 16)
    assert [layer.name for layer in attrreg.layers(model, x)] == ["0", "1"]
    torch.testing.assert_close(attrreg.GradCAM()(model, x, mask, TARGET), attrreg.GradCAM("1")(model, x, mask, TARGET))
    with pytest.raises(ValueError, match=r"layer '2' gives .*not a spatial map"):
        attrreg.GradCAM("2")(model, x, mask, TARGET)


@pytest.mark.parametrize(
    ("name", "settings", "layer"),
    [
        ("naflexvit_base_patch16_gap", {"patch_drop_rate": 0.75, "depth": 2, "embed_dim": 48, "num_heads": 2}, "blocks.1"),
        ("hiera_tiny_224", {"patch_drop_rate": 0.25, "embed_dim": 16}, "blocks.11"),
    ],
)
def test_patches_kept_at_random_are_no_map(name: str, settings: dict[str, float], layer: str) -> None:
    """A quarter of 16 x 16 patches would pass for 8 x 8, 36 of 49 mask units for 6 x 6."""
    side = 256 if name.startswith("naflex") else 224
    model, x, mask = timm.create_model(name, num_classes=2, **settings).train(), torch.rand(2, 3, side, side), torch.zeros(2, side, side)
    with pytest.raises(ValueError, match=rf"layer '{layer}' (has the patches that .* kept at random|keeps its tokens in the order of)"):
        attrreg.GradCAM(layer)(model, x, mask, TARGET)
    assert attrreg.GradCAM(layer).attribute(model.eval(), x, target=TARGET).shape[2:] in ((16, 16), (7, 7))


def test_of_heads_that_normalise_first_the_first_is_the_main_one() -> None:
    model, x = timm.create_model("levit_128s", num_classes=2, img_size=64).eval(), torch.rand(2, 3, 64, 64)
    mask = torch.zeros(2, 64, 64)
    mask[:, 16:48, 16:48] = True
    model.head.bn.weight.data.uniform_()
    found = [
        attrreg.ActivationDifference(layers, fill=attrreg.baselines.Zero())(model, x, mask)
        for layers in ("auto", "head.bn", "head_dist.bn")
    ]
    torch.testing.assert_close(found[0], found[1])
    assert found[0] != found[2]
