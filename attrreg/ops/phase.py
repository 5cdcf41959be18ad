"""What the operators of one pass are told of the backward that runs through them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import torch

from attrreg.graph import executes, leads_to_ours
from attrreg.ops.draws import Draws
from attrreg.state import full_precision

THIRD = "Trying to take a third derivative, which a penalty does not have. Leave out create_graph=True where its gradient is taken."


@dataclass
class Phase:
    """Shared by the operators of one pass.

    A Python function cannot see which gradients `autograd.grad` was asked for, so without a word from outside every inner
    backward would also compute weight gradients that nobody uses.

    Attributes:
        running: the forward is not over, so that a backward now is one that the model takes itself.
        inner: the running backward computes an attribution, for which nobody needs gradients of weights.
        places: how many places of a path share the batch; those of an image lie side by side.
        draws: what the pass draws; None: PyTorch draws as ever, as from the first checkpointed block on.
        rows: how many images the batch has, at all places together.
        normalised: over how many rows batch normalisation took statistics, the tokens of an image counted as one. Other numbers than `rows`
            show that images meet in a way that is not known here.
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

    @contextmanager
    def recomputing(self) -> Iterator[None]:
        """Around a part of a forward, whose own backwards are the model's: a checkpointed block within a backward, or a head after it."""
        inner, running = self.inner, self.running
        self.inner, self.running = False, True
        try:
            yield
        finally:
            self.inner, self.running = inner, running


def wanted(ctx: Any, count: int) -> list[bool]:
    """For each of a function's first inputs, the image before weights, whether the running backward needs its gradient.

    The inner backward needs those of weights only where a weight was computed from the images; the outer one does not need that of the
    image where it would lead to nothing but the images.
    """
    needed, phase, nodes = ctx.needs_input_grad, ctx.phase, ctx.next_functions  # a bias that is None has no node, and needs none
    if phase.inner:  # nobody asks for the gradient of a weight, unless that was computed from the images
        return [needed[0], *(needed[index] and executes(nodes[index][0], leaf=False) for index in range(1, count))]
    if phase.running:
        return list(needed[:count])
    # Gradients of weights are what the outer one is for. A plain step has no gradient of the images either.
    return [needed[0] and executes(nodes[0][0], leaf=True) and not leads_to_ours(nodes[0][0], phase), *needed[1:count]]


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """As PyTorch's decorator of this name, but every attempt to differentiate the results is an error.

    PyTorch's raises none where gradients are asked for by name, or where only saved tensors require one. A loop may run its backward under
    autocast, which is off in here: closed forms compute in the types that they are given.
    """

    @wraps(backward)
    def call(ctx: Any, *gradients: Any) -> Any:
        device = gradients[0].device  # never None: PyTorch puts zeros where nobody read a result
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
