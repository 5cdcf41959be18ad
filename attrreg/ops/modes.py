"""The replacements, active only inside the regularizer's own passes and the attached forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from attrreg.ops.activation import hardsigmoid, hardswish

REPLACEMENTS: dict[Callable[..., Any], Callable[..., Tensor]] = {F.hardsigmoid: hardsigmoid, F.hardswish: hardswish}


class _Replace(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        chosen: Callable[..., Any] = REPLACEMENTS.get(func, func)
        return chosen(*args, **(kwargs or {}))


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Compute with operators that have a second derivative. The user's settings are back at the end.

    Attention takes PyTorch's math path: its fused kernels have no double backward (pytorch#116350).
    """
    with sdpa_kernel(SDPBackend.MATH), _Replace():
        yield
