"""Calls that PyTorch refuses are refused in its words."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attrreg.ops import Phase, attention, twice_differentiable


def _attended(h: Tensor, mask: Tensor | None = None, **settings: Any) -> Tensor:
    return F.scaled_dot_product_attention(h, h, h, mask, **settings)


ATTENTION: dict[str, Callable[[Tensor], Any]] = {
    "causal and a mask": lambda h: _attended(h, torch.randn(4, 4), is_causal=True),
    "keys of another type": lambda h: F.scaled_dot_product_attention(h, h.double(), h),
    "values of another type": lambda h: F.scaled_dot_product_attention(h, h, h.double()),
    "a mask of another type": lambda h: _attended(h, torch.randn(4, 4).double()),
    "a mask of whole numbers": lambda h: _attended(h, torch.ones(4, 4, dtype=torch.int64)),
    "a mask for other images": lambda h: _attended(h, torch.randn(3, 1, 4, 4)),
    "a mask for more images": lambda h: _attended(h[:1], torch.randn(2, 1, 4, 4)),
    "a mask of five axes": lambda h: _attended(h, torch.randn(2, 1, 1, 4, 4)),
    "vectors": lambda h: _attended(h[0, 0, 0]),
    "whole numbers": lambda h: _attended(h.long()),
}
OTHERS: dict[str, Callable[[Tensor], Any]] = {
    "norm in a narrower type": lambda h: torch.norm(h, dtype=torch.bfloat16),
    "linalg.norm in a narrower type": lambda h: torch.linalg.norm(h, dtype=torch.float16),
    "vector norm in whole numbers": lambda h: torch.linalg.vector_norm(h, dtype=torch.int64),
    "vector norm of whole numbers": lambda h: torch.linalg.vector_norm(h.long()),
    "distances of another width": lambda h: torch.cdist(h, h[..., :1]),
    "distances of a vector": lambda h: torch.cdist(h[0, 0, 0], h),
    "distances of half types": lambda h: torch.cdist(h.half(), h.half()),
    "cat of other axes": lambda h: torch.cat([h, h[0]]),
}


def check(function: Callable[[Tensor], Any]) -> None:
    h, messages = torch.randn(2, 3, 4, 5, requires_grad=True), []
    for context in (nullcontext(), twice_differentiable(Phase())):
        with context, pytest.raises((RuntimeError, ValueError, IndexError)) as caught:
            function(h)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


@pytest.mark.cpu
@pytest.mark.parametrize("kept", [0, 4], ids=["weights recomputed", "weights kept"])
@pytest.mark.parametrize("name", ATTENTION)
def test_attention(name: str, kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "MAX_KEPT", kept)
    check(ATTENTION[name])


@pytest.mark.cpu
@pytest.mark.parametrize("name", OTHERS)
def test_others(name: str) -> None:
    check(OTHERS[name])
