"""Images of one row or column, as signals are: layers that give `(N, C, L)`, and rows of tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import attrreg
from attrreg.objectives import AbsoluteOutside
from tests.models import assert_close, gradients


class Signals(nn.Module):
    """Convolutions along the one axis; as many positions as channels, behind the second."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv1d(2, 16, 5, padding=2), nn.Conv1d(16, 16, 5, stride=4, padding=2)
        self.head = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 3))

    def features(self, x: Tensor) -> Tensor:
        features: Tensor = self.second(self.first(x.flatten(2)).tanh())
        return features

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(x).tanh().mean(2))
        return logits


class Rows(nn.Module):
    """A transformer of a row of 16 patches with a class token, which alone the head reads."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.token = nn.Conv2d(2, 16, (1, 4), (1, 4)), nn.Parameter(torch.randn(1, 1, 16))
        self.blocks = nn.Sequential(*(nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True) for _ in range(2)))
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).mT
        logits: Tensor = self.head(self.blocks(torch.cat((self.token.expand(len(x), -1, -1), tokens), 1))[:, 0])
        return logits


x, target = torch.randn(3, 2, 1, 64, dtype=torch.float64), torch.tensor([0, 1, 2])
mask = torch.zeros(3, 1, 64, dtype=torch.bool)
mask[..., :32] = True


@pytest.mark.parametrize("layer", ["auto", "second"])
@pytest.mark.parametrize("column", [False, True])
def test_grad_cam_of_convolutions_along_a_signal(layer: str, column: bool) -> None:
    model = Signals().double()
    features = model.features(x)
    score = model.head(features.tanh().mean(2)).gather(1, target.unsqueeze(1)).sum()
    (gradient,) = torch.autograd.grad(score, features, create_graph=True)
    map = (gradient.mean(2, keepdim=True) * features).sum(1)
    want = (map * (torch.arange(16) >= 8)).abs().sum(1).mean()
    regularizer = attrreg.GradCAM(layer, score=attrreg.scores.TargetLogit(), objective=AbsoluteOutside())
    images, masks = (x.mT, mask.mT) if column else (x, mask)
    found = regularizer(model, images, masks, target)
    torch.testing.assert_close(found, want, rtol=1e-10, atol=0)
    assert_close(gradients(model, found), gradients(model, want), 1e-10)
    assert [(each.name, each.layout, max(each.grid)) for each in attrreg.layers(model, images)] == [
        ("first", "NCL", 64),
        ("second", "NCL", 16),
    ]


def test_channels_of_a_convolution_along_flattened_images_are_no_tokens() -> None:
    model = nn.Sequential(nn.Conv2d(2, 16, 3, padding=1), nn.Flatten(2), nn.Conv1d(16, 16, 3, padding=1), nn.Flatten(), nn.Linear(1024, 3))
    assert [each.name for each in attrreg.layers(model.double(), x.reshape(3, 2, 8, 8))] == ["0"]


class Gating(nn.Sequential):
    """A layer that mixes tokens `(N, L, C)` by a convolution that takes them for channels."""

    def __init__(self) -> None:
        super().__init__(nn.LayerNorm(6), nn.Conv1d(16, 16, 1), nn.Linear(6, 6))


def test_tokens_that_a_convolution_mixes_are_tokens() -> None:
    model = nn.Sequential(nn.Conv2d(2, 6, 2, 2), nn.Flatten(2), Transposed(), Gating(), nn.Flatten(), nn.Linear(96, 3)).double()
    found = {each.name: (each.layout, each.grid) for each in attrreg.layers(model, x.reshape(3, 2, 8, 8))}
    assert found["3"] == found["3.2"] == ("tokens", (4, 4))


class Transposed(nn.Module):
    """Channels last."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mT


def test_a_class_token_before_a_row_of_patches() -> None:
    model = Rows().double()
    assert [each.grid for each in attrreg.layers(model, x) if each.name == "blocks.0"] == [(1, 16)]
    with pytest.raises(RuntimeError, match="every patch token is zero"):
        attrreg.GradCAM("blocks.1")(model, x, mask, target)
    assert attrreg.GradCAM().attribute(model, x, target).shape == (3, 1, 1, 16)
    model.num_prefix_tokens = 0  # type: ignore[assignment]  # what it declares counts
    assert [each.grid for each in attrreg.layers(model, x) if each.name == "blocks.0"] == [(1, 17)]


class Inception(nn.Module):
    """Concatenates what convolutions give, so that no one of them gives as many channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(2, 8, 3, padding=1)
        self.ways = nn.ModuleList(nn.Conv1d(8, 8, k, padding=k // 2) for k in (1, 3, 5))
        self.norm, self.act, self.head = nn.BatchNorm1d(24), nn.Tanh(), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        stem = self.stem(x.flatten(2))
        logits: Tensor = self.head(self.act(self.norm(torch.cat([way(stem) for way in self.ways], dim=1))).mean(2))
        return logits


def test_concatenated_channels_are_no_tokens() -> None:
    model = Inception().double()
    assert attrreg.GradCAM().attribute(model, x, target).shape == (3, 1, 1, 64)
    assert [each.name for each in attrreg.layers(model, x.reshape(3, 2, 8, 8))] == []


@pytest.mark.parametrize(("size", "patch", "grid"), [((80, 80), 26, (3, 3)), ((72, 120), 16, (4, 7))])
def test_patches_that_do_not_divide_the_images(size: tuple[int, int], patch: int, grid: tuple[int, int]) -> None:
    """Without a class token; with five registers, or two, a smaller grid would be left that does."""
    model = nn.Sequential(
        nn.Conv2d(2, 6, patch, patch), nn.Flatten(2), Transposed(), nn.LayerNorm(6), nn.Flatten(), nn.Linear(6 * grid[0] * grid[1], 3)
    )
    found = {each.name: each.grid for each in attrreg.layers(model, torch.randn(2, 2, *size))}
    assert found["3"] == grid
