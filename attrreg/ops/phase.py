"""What the operators of one pass are told of the backward that runs through them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from attrreg.graph import leads_to_ours
from attrreg.ops.draws import Draws
from attrreg.state import full_precision

THIRD = b"trying to take a third derivative, which a penalty has not: leave out create_graph=True where its gradient is taken."


@dataclass
class Phase:
    """Shared by the operators of one pass.

    A Python function cannot see which gradients `autograd.grad` was asked for, so without a word from outside every inner
    backward would also compute weight gradients that nobody uses.

    Attributes:
        running: the forward is not over: a backward now is the model's own.
        inner: the running backward makes an attribution: nobody asks for the gradients of weights.
        places: how many places of a path share the batch, those of an image side by side.
        draws: what the pass draws; None: nobody asks.
        rows: in the batch of all places.
        normalised: of how many rows, tokens of an image as one, statistics were taken: of `rows` alone, unless images meet otherwise.
    """

    running: bool = False
    inner: bool = False
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
    """Which gradients of its first inputs the running backward asks a function for; the outer one is asked about the first only."""
    needed, phase, nodes = ctx.needs_input_grad, ctx.phase, ctx.next_functions  # a bias that is None has no node, and needs none
    if phase.inner:  # nobody asks for the gradient of a weight, unless that was computed from the images
        return [needed[0], *(needed[index] and executes(nodes[index][0], leaf=False) for index in range(1, count))]
    if phase.running:
        return list(needed[:count])
    # Gradients of weights are what the outer one is for. A plain step has no gradient of the images either.
    return [needed[0] and executes(nodes[0][0], leaf=True) and not leads_to_ours(nodes[0][0], phase), *needed[1:count]]


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """As PyTorch's decorator, whose error does not come where gradients are asked for by name, or only what was saved has a graph.

    A loop may run its backward under autocast, which closed forms leave: they are written for the types that they were given.
    """

    @wraps(backward)
    def call(ctx: Any, *gradients: Tensor | None) -> Any:
        device = next(gradient.device for gradient in gradients if gradient is not None)
        if not (torch.is_grad_enabled() or torch.is_autocast_enabled(device.type)):  # as mostly: to enter contexts takes longer than to ask
            return backward(ctx, *gradients)
        with torch.no_grad(), full_precision(device):
            found = backward(ctx, *gradients)
        if not torch.is_grad_enabled():
            return found
        # The error stands between the results and all that they came from.
        behind = [part for part in (*gradients, *ctx.saved_tensors, *getattr(ctx, "leaves", ())) if part is not None and part.requires_grad]
        results: list[Any] = [None if gradient is None else gradient.detach().requires_grad_() for gradient in found]
        of: list[Any] = [*results, *behind, None]  # None: of a single tensor it would give no tuple
        return tuple(torch._C._functions.DelayedError(THIRD, len(of))(*of)[: len(found)])

    return call


def executes(node: Any, leaf: bool) -> bool:
    """Whether the engine will run a node; `leaf`: what to say of a leaf under `autograd.grad`, of which PyTorch will not tell."""
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:
        return leaf
