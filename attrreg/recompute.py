"""Sums of gradients along a path, whose graphs need not all be in memory at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn.utils import parametrize

from attrreg.conditions import tensors_in, version
from attrreg.distributed import sharded
from attrreg.folding import PathGradients
from attrreg.graph import trained_by
from attrreg.ops.phase import once_differentiable
from attrreg.points import Stop
from attrreg.state import BufferValues, Settings, autocast_as, buffer_values, copied_buffers
from attrreg.walk import attributes


def sum_along(stops: Sequence[Stop], gradients: PathGradients, chunk: int | None, differentiable: bool) -> list[Tensor]:
    """Sum weighted gradients over the places of a path, for each score.

    With all graphs held (`chunk=None`, or no more places than `chunk`) this is one forward and backward a batch of places. Otherwise
    the gradients of each chunk are computed without a graph, and once more with one when the penalty is
    differentiated; memory is then that of one chunk, and a place costs one forward and one inner backward more. A map, which is not
    differentiated, is summed chunk by chunk.
    """
    x = gradients.call.x
    chunks = [stops[start : start + chunk] for start in range(0, len(stops), chunk)] if chunk else [stops]
    if not differentiable or len(chunks) == 1:
        return reduce(_added, (_summed(part, x, gradients, differentiable) for part in chunks))
    images = x.detach()
    # The first place tells which leaves a penalty can train: not all parameters, and maybe others than the model's.
    first = _summed(stops[:1], images, gradients, True)
    if gradients.runner.drew:
        raise ValueError(
            "A score draws random numbers, which a path that recomputes would draw anew. Let its class set draws = True and fix them in "
            "drawn(seed), or pass chunk=None."
        )
    whole = gradients.call.holding
    at_first, known = trained_by(whole, *first), set(gradients.reached)
    values = [value.detach() for value in first]  # from which the first chunk goes on
    del first  # and its graph with it
    buffers, settings = buffer_values(whole), Settings(whole, sharded=bool(sharded(whole)))
    total: list[Tensor] = []
    for part in chunks:
        rest = part[1:] if part is chunks[0] else part
        values = _added(values, _summed(rest, images, gradients, False))
        # At other places the model may use other parameters, as sparse experts do.
        leaves = at_first + [leaf for key, leaf in gradients.reached.items() if key not in known]
        again = _Chunk(part, gradients, buffers, settings, leaves)
        total = _added(total, list(_Recomputed.apply(again, values, x, *leaves)))
        values = []
    return total


def _summed(stops: Sequence[Stop], x: Tensor, gradients: PathGradients, create_graph: bool) -> list[Tensor]:
    """The weighted gradients at places, summed, for each score; as many places in a pass as may share one."""
    total: list[Tensor] = []
    pending = list(stops)
    while pending:
        count = gradients.room(len(pending))
        batch, pending = pending[:count], pending[count:]
        for stop, found in zip(batch, gradients([stop.image(x) for stop in batch], create_graph), strict=True):
            factor = stop.factor(x)
            total = _added(total, [factor * gradient for gradient in found])
    return total


def _added(total: list[Tensor], terms: list[Tensor]) -> list[Tensor]:
    """The sums of two lists, of which an empty one stands for zeros."""
    return [a + b for a, b in zip(total, terms, strict=True)] if total and terms else total or terms


class _Chunk:
    """The sum over a part of the path, to be run again under the conditions of its first run."""

    def __init__(
        self, stops: Sequence[Stop], gradients: PathGradients, buffers: BufferValues, settings: Settings, leaves: Sequence[Tensor]
    ) -> None:
        self._stops = stops
        self._gradients = gradients
        self._model = gradients.call.holding
        self._buffers, self._settings = buffers, settings
        self._default = torch.get_default_dtype()  # of tensors that the model makes; Lightning sets another in a step, not in the backward
        others = [part for part in tensors_in(gradients.call.inputs) if part is not gradients.call.x]
        self._others = [(part, version(part)) for part in others]
        # Also leaves that the gradients are no function of: a score may choose its class by the last layer's bias.
        self._weights = [(leaf, version(leaf)) for leaf in (*leaves, *gradients.reached.values())]

    @contextmanager
    def again(self, x: Tensor) -> Iterator[list[Tensor]]:
        """The sum with its graph, and the model as it was: where that is differentiated, checkpointed blocks run once more."""
        self._check_unchanged()
        with self._settings.back(), torch.enable_grad(), copied_buffers(self._model, self._buffers), _default_dtype(self._default):
            with autocast_as(x.device, self._gradients.runner.autocast):  # around all passes, so that each weight is cast once
                found = _summed(self._stops, x, self._gradients, True)
            yield found

    def _check_unchanged(self) -> None:
        if any(version(weight) != then for weight, then in self._weights):
            raise RuntimeError(
                "Parameters were changed between the penalty and its backward, as by an optimizer's step, where chunked path methods "
                "recompute. Call backward first. Where the optimizer steps within the backward, pass chunk=None."
            )
        if any(version(part) != then for part, then in self._others):
            raise RuntimeError(
                "inputs were written to between the penalty and its backward, where chunked path methods recompute. Call backward first, "
                "or pass copies in inputs=."
            )

    def meets_others(self, leaves: Sequence[Tensor]) -> bool:
        """Whether the graph may go on in one that was made outside the pass, which others need: of weights that come from elsewhere."""
        own = {id(parameter) for parameter in self._model.parameters()}
        if parametrize._cache_enabled or any(id(leaf) not in own for leaf in leaves):
            return True
        held = (*self._buffers.values(), *attributes(self._model), *(part for part, _ in self._others))
        return any(isinstance(value, Tensor) and value.grad_fn is not None for value in held)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def _without_hooks(leaves: Sequence[Tensor]) -> Iterator[None]:
    """Set the hooks of leaves aside: the outer backward will call them, once, with the whole gradient."""
    hooked = [(leaf, leaf._backward_hooks) for leaf in leaves if leaf._backward_hooks]
    try:
        for leaf, _ in hooked:
            leaf._backward_hooks = None
        yield
    finally:
        for leaf, hooks in hooked:
            leaf._backward_hooks = hooks


class _Recomputed(Function):
    """Known values as a function of x and the trainable leaves, whose graph is built only in the backward."""

    @staticmethod
    def forward(ctx: Any, chunk: _Chunk, values: list[Tensor], x: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
        # Not by `save_for_backward`, from which hooks on saved tensors, as of `save_on_cpu`, would give copies without hooks back.
        ctx.chunk, ctx.leaves = chunk, leaves
        ctx.save_for_backward(x)
        return tuple(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        (x,), leaves = ctx.saved_tensors, ctx.leaves
        images = x.detach().requires_grad_(ctx.needs_input_grad[2])
        inputs = [value for value in (images, *leaves) if value.requires_grad]  # a leaf may have been frozen meanwhile
        chunk = ctx.chunk
        with chunk.again(images) as values:
            if not torch._C._autograd._get_current_graph_task_keep_graph():
                ctx.chunk = None  # with all that it holds: a loop may keep its loss, and so this node, through the next step
            pairs = [(value, grad) for value, grad in zip(values, outer, strict=True) if value.requires_grad]
            if not pairs or not inputs:
                return (None,) * (3 + len(leaves))
            outputs, directions = zip(*pairs, strict=True)
            retain = chunk.meets_others(leaves)
            with _without_hooks(leaves):
                # Zeros where these places do not use a leaf: a hook on it would be shown None.
                grads = torch.autograd.grad(outputs, inputs, directions, retain_graph=retain, allow_unused=True, materialize_grads=True)
        found = iter(grads)
        return (None, None, *(next(found) if value.requires_grad else None for value in (images, *leaves)))
