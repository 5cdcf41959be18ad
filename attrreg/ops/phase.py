"""What the operators of one pass are told of the backward that runs through them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Phase:
    """Shared by the operators of one pass.

    A Python function cannot see which gradients `autograd.grad` was asked for, so without a word from outside every inner
    backward would also compute weight gradients that nobody uses.

    Attributes:
        inner: the running backward makes an attribution: nobody asks for the gradients of weights.
    """

    inner: bool = False

    @contextmanager
    def attributing(self) -> Iterator[None]:
        """Around the inner backward."""
        self.inner = True
        try:
            yield
        finally:
            self.inner = False
