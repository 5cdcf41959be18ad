"""Grad-CAM with an automatic layer points at what a trained network looks at."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attrreg
from tests.models import DEVICE

SIZE, PATCH = 64, 16
SMALL: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {"patch_size": 8, "depth": 3},
    "deit_tiny_patch16_224": {"patch_size": 8, "depth": 3},
    "deit_tiny_distilled_patch16_224": {"patch_size": 8, "depth": 3},
    "cait_xxs24_224": {"patch_size": 8, "depth": 3},
    "xcit_nano_12_p8_224": {"depth": 3},
    "volo_d1_224": {},
    "crossvit_tiny_240": {"img_scale": (1.0, 1.0), "patch_size": (8, 16), "depth": ((1, 1, 0),)},
    "swin_tiny_patch4_window7_224": {"depths": (1, 1, 1), "embed_dim": 48, "num_heads": (2, 2, 4), "window_size": 4},
    "resnet18": {"output_stride": 8},
}


def planted(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Noise with a square that is red or green: images, where the square is, and its colour."""
    x = 0.3 * torch.randn(n, 3, SIZE, SIZE, generator=generator)
    y = torch.randint(2, (n,), generator=generator)
    places = torch.zeros(n, SIZE, SIZE, dtype=torch.bool)
    corners = torch.randint(SIZE // PATCH, (n, 2), generator=generator) * PATCH
    for image, place, colour, (row, column) in zip(x, places, y.tolist(), corners.tolist(), strict=True):
        square = slice(row, row + PATCH), slice(column, column + PATCH)
        image[colour][square] += 2.0
        place[square] = True
    return x, places, y


def trained(name: str, generator: torch.Generator) -> nn.Module:
    """A small network of the family, trained until it tells the colours."""
    torch.manual_seed(0)
    sized = {} if name == "resnet18" else {"img_size": SIZE}
    model: nn.Module = timm.create_model(name, num_classes=2, **sized, **SMALL[name])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    right = 0
    for _ in range(300):
        x, _, y = planted(32, generator)
        output = model.train()(x)
        logits = output[0] if isinstance(output, tuple) else output
        optimizer.zero_grad()
        F.cross_entropy(logits, y).backward()
        optimizer.step()
        right = right + 1 if bool((logits.argmax(1) == y).all()) else 0
        if right == 8:
            return model.eval()
    raise AssertionError(f"{name} did not learn the task")


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_the_map_points_at_the_planted_square(name: str) -> None:
    generator = torch.Generator(DEVICE).manual_seed(0)
    model = trained(name, generator)
    x, places, y = planted(64, generator)
    map = attrreg.GradCAM(score=attrreg.scores.Contrast()).attribute(model, x, y)
    assert map.any() and float(map.flatten(1).std(1).min()) > 0
    inside = F.adaptive_avg_pool2d(places[:, None].float(), (map.shape[-2], map.shape[-1]))
    # Attention mixes places, so not every map peaks there. Chance gives one in sixteen; five times that, on 64 images, never.
    strongest = map.abs().flatten(1).argmax(1)
    hits = float((inside.flatten(1).gather(1, strongest[:, None]) > 0.2).float().mean())
    assert hits > 5 / 16, f"{hits:.2f} of the maps peak in the square"
