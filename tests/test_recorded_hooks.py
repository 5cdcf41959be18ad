"""What a recorded forward depended on besides tensors: hooks of backwards, and functions that layers compute by."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import attrreg
from attrreg.trace import passes
from tests.models import SmoothNet, smooth_batch


def doubled(layer: nn.Module, inner: Any, outer: Any) -> Any:
    return tuple(None if gradient is None else 2 * gradient for gradient in inner) if isinstance(layer, nn.Conv2d) else None


@pytest.mark.parametrize("change", ["added", "added before", "removed", "added to all"])
def test_hooks_of_backwards_belong_to_the_forward(change: str) -> None:
    model, (x, mask, target) = SmoothNet().double(), smooth_batch()
    body, reg = model.get_submodule("body"), attrreg.InputGradient()
    with reg.attach(model), passes() as counted:
        handle = body.register_full_backward_hook(doubled) if change == "removed" else None
        model(x)
        if handle is not None:
            handle.remove()
        elif change == "added before":
            handle = body.register_full_backward_pre_hook(lambda layer, outer: (2 * outer[0],))  # type: ignore[index]
        elif change == "added":
            handle = body.register_full_backward_hook(doubled)
        else:
            handle = nn.modules.module.register_module_full_backward_hook(doubled)
        try:
            reg(model, x, mask, target)
        finally:
            handle.remove()
    assert counted.forward == 1


@pytest.mark.parametrize(
    ("one", "other"),
    [(torch.tanh, torch.sin), (F.silu, F.relu), (nn.Tanh().forward, nn.Sigmoid().forward)],
    ids=["builtin", "function", "method"],
)
def test_a_function_that_a_layer_computes_by_belongs_to_the_forward(one: Any, other: Any) -> None:
    model, (x, mask, target), reg = SmoothNet().double(), smooth_batch(), attrreg.InputGradient()
    model.by = one
    with reg.attach(model), passes() as counted:
        for change, passed in ((one, 0), (other, 1)):
            model(x)
            model.by = change
            reg(model, x, mask, target)
            assert counted.forward == passed
