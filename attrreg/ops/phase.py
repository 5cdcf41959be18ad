"""What the operators of one pass are told of the backward that runs through them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from attrreg.graph import leads_to_ours
from attrreg.ops.draws import Draws


@dataclass
class Phase:
    """Shared by the operators of one pass.

    A Python function cannot see which gradients `autograd.grad` was asked for, so without a word from outside every inner
    backward would also compute weight gradients that nobody uses.

    Attributes:
        inner: the running backward makes an attribution: nobody asks for the gradients of weights.
        places: how many places of a path share the batch, those of an image side by side.
        draws: what they draw, where they are several.
        rows: in the batch of all places.
        normalised: how many rows of their own statistics' batches are told apart: `rows`, unless images meet in another way.
        active: what runs now will be differentiated twice. False before the first layer at which a gradient is taken.
    """

    inner: bool = False
    active: bool = True
    places: int = 1
    rows: int = 0
    draws: Draws | None = None
    normalised: set[int] = field(default_factory=set)

    @contextmanager
    def attributing(self) -> Iterator[None]:
        """Around the inner backward."""
        self.inner = True
        try:
            yield
        finally:
            self.inner = False


def wanted(ctx: Any, count: int) -> list[bool]:
    """Which gradients of its first inputs the running backward asks a function for."""
    nodes, phase = ctx.next_functions, ctx.phase  # a bias that is None has no entry, and needs none
    return [needed and _executes(nodes[index][0], index, phase) for index, needed in enumerate(ctx.needs_input_grad[:count])]


def _executes(node: Any, index: int, phase: Phase) -> bool:
    try:
        executes: bool = torch._C._will_engine_execute_node(node)
    except RuntimeError:  # a leaf under autograd.grad, of which PyTorch will not tell
        return index == 0 or not phase.inner
    # A plain step has no gradient of the images either.
    return executes and (phase.inner or index > 0 or not leads_to_ours(node))
