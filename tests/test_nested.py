"""Nested tensors inside a model, as in PyTorch's own encoders in eval mode: they are left to PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import _get_current_function_mode_stack

import attrreg
from attrreg.objectives import SquaredOutside
from attrreg.ops import Phase, linear, operators, twice_differentiable
from attrreg.scores import TargetLogit
from tests.models import assert_close, batch, gradients

pytestmark = [pytest.mark.cpu, pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")]  # once, where the first is made

IDS = torch.tensor([[3, 1, 4, 1, 5, 0, 0, 0], [2, 6, 5, 3, 5, 8, 9, 7], [9, 3, 0, 0, 0, 0, 0, 0]])  # 0: padding
SETTINGS: dict[str, Any] = {"score": TargetLogit(), "objective": SquaredOutside()}


class Captioned(nn.Module):
    """Images, and texts that a frozen encoder reads."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.words = nn.Embedding(10, 8)
        self.text = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), 2)
        self.head = nn.Linear(8, 5)
        self.words.requires_grad_(False)
        self.text.requires_grad_(False).eval()

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        texts = self.text(self.words(ids), src_key_padding_mask=ids == 0).mean(1)
        logits: Tensor = self.head((F.gelu(self.stem(x)) * texts[:, :, None, None]).mean((2, 3)))
        return logits


REGULARIZERS = [
    attrreg.InputGradient(**SETTINGS),
    attrreg.GradCAM("stem", **SETTINGS),
    attrreg.GradCAM(**SETTINGS),
    attrreg.ActivationDifference(fill=attrreg.baselines.Zero()),
]


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("regularizer", REGULARIZERS, ids=["images", "named", "auto", "difference"])
def test_a_frozen_encoder_computes_what_it_computes_without(regularizer: attrreg.AttributionRegularizer, attached: bool) -> None:
    torch.manual_seed(0)
    model, (x, mask, target) = Captioned(), batch()
    want, padded = model(x, IDS), model.text(model.words(IDS), src_key_padding_mask=IDS == 0)
    assert not padded[0, 5:].any()  # PyTorch ran it on nested tensors, which leaves nothing of padding
    seen: list[Tensor] = []
    hook = model.text.register_forward_hook(lambda module, args, output: seen.append(output))
    with regularizer.attach(model) if attached else nullcontext(), patch.object(linear, "MKL_IS_SLOW", True):
        torch.testing.assert_close(model(x, IDS), want)
        value = regularizer(model, x, mask, target, inputs=(x, IDS))
    hook.remove()
    assert all(torch.equal(output, padded) for output in seen)
    assert not _get_current_function_mode_stack()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    if isinstance(regularizer, attrreg.InputGradient):
        images = x.clone().requires_grad_()
        with sdpa_kernel(SDPBackend.MATH):
            logits = model(images, IDS)
            (map,) = torch.autograd.grad(logits.gather(1, target[:, None]).sum(), images, create_graph=True)
            assert_close(gradients(model, value), gradients(model, SquaredOutside()(map, mask[:, None].float()).mean()), 1e-5)


def test_an_encoder_that_fails_gives_the_operators_back() -> None:
    encoder = Captioned().text
    with operators(nn.Sequential(encoder), Phase(), True, True):
        stack = _get_current_function_mode_stack()
        with pytest.raises(RuntimeError):
            encoder(torch.randn(2, 3, 7))  # of another width
        assert _get_current_function_mode_stack() == stack


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.parametrize("layer", [nn.Linear(6, 4), nn.ReLU(), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.LayerNorm(6), nn.GELU()])
def test_layers_of_nested_tensors_are_pytorchs(layer: Callable[[Tensor], Tensor], layout: torch.layout) -> None:
    rows = [torch.randn(size, 6) for size in (2, 3)]

    def run() -> Tensor:
        torch.manual_seed(0)
        with torch.no_grad():
            padded: Tensor = torch.nested.to_padded_tensor(layer(torch.nested.nested_tensor(rows, layout=layout)), 0.0)
            return padded

    want = run()
    with twice_differentiable(Phase()):
        assert torch.equal(run(), want)
