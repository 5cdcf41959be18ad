"""Calls that are PyTorch's own: what it refuses is refused in its words, and what it writes into a given tensor is there."""

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
    "norm of matrices of three axes": lambda h: torch.norm(h, "fro", dim=(0, 1, 2)),
    "linalg.norm of three axes": lambda h: torch.linalg.norm(h, dim=(0, 1, 2)),
    "linalg.norm of matrices, one axis": lambda h: torch.linalg.norm(h, "fro", dim=1),
    "norm in a narrower type": lambda h: torch.norm(h, dtype=torch.bfloat16),
    "linalg.norm in a narrower type": lambda h: torch.linalg.norm(h, dtype=torch.float16),
    "vector norm in whole numbers": lambda h: torch.linalg.vector_norm(h, dtype=torch.int64),
    "vector norm of whole numbers": lambda h: torch.linalg.vector_norm(h.long()),
    "distances of another width": lambda h: torch.cdist(h, h[..., :1]),
    "distances of a vector": lambda h: torch.cdist(h[0, 0, 0], h),
    "distances of half types": lambda h: torch.cdist(h.half(), h.half()),
    "distances of two types": lambda h: torch.cdist(h, h.double()),
    "distances by a negative power": lambda h: torch.cdist(h, h, p=-1.0),
    "distances in another way": lambda h: torch.cdist(h, h, compute_mode="fast"),
    "cat of other axes": lambda h: torch.cat([h, h[0]]),
    "cat along no axis": lambda h: torch.cat([h, h], 4),
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


INTO: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "cat": lambda h, out: torch.cat([h, h], out=out),
    "norm": lambda h, out: torch.norm(h, dim=1, out=out),
    "linalg.norm": lambda h, out: torch.linalg.norm(h, dim=1, out=out),
    "vector norm": lambda h, out: torch.linalg.vector_norm(h, dim=1, out=out),
}


@pytest.mark.parametrize("name", INTO)
def test_a_tensor_for_the_result(name: str) -> None:
    h, found = torch.randn(2, 3), []
    for context in (nullcontext(), twice_differentiable(Phase())):
        found.append(torch.zeros(0))
        with context:
            assert INTO[name](h, found[-1]) is found[-1]
    assert found[0].numel() > 0 and torch.equal(*found)
