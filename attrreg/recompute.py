"""Sums of gradients along a path, whose graphs need not all be in memory at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from attrreg.points import Stop

# (image, create_graph) -> one gradient a score, each of the shape of the image
Gradients = Callable[[Tensor, bool], list[Tensor]]
Summed = Callable[[Tensor, bool], list[Tensor]]


def along(
    stops: Sequence[Stop], model: nn.Module, x: Tensor, gradients: Gradients, chunk: int | None, differentiable: bool
) -> list[Tensor]:
    """Sum weighted gradients over the places of a path, for each score.

    With all graphs held (`chunk=None`, or no more places than `chunk`) this is one forward and backward a place. Otherwise
    the gradients of each chunk are computed without a graph, and once more with one when the penalty is
    differentiated; memory is then that of one chunk, and a place costs one forward and one inner backward more.
    """

    def summed(part: Sequence[Stop]) -> Summed:
        def function(images: Tensor, create_graph: bool) -> list[Tensor]:
            total: list[Tensor] = []
            for stop in part:
                factor = stop.factor(images)
                terms = [factor * gradient for gradient in gradients(stop.image(images), create_graph)]
                total = [a + b for a, b in zip(total, terms, strict=True)] if total else terms
            return total

        return function

    if not differentiable or chunk is None or len(stops) <= chunk:
        return summed(stops)(x, differentiable)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    total: list[Tensor] = []
    for start in range(0, len(stops), chunk):
        step = _Step(summed(stops[start : start + chunk]), model, x.device.type)
        terms = _Recomputed.apply(step, x, *parameters)
        total = [a + b for a, b in zip(total, terms, strict=True)] if total else list(terms)
    return total


class _Step:
    """A function of the images that can be run again later under the conditions of its first run."""

    def __init__(self, function: Summed, model: nn.Module, device_type: str) -> None:
        self._function = function
        self._model = model
        self._modes = self._training()
        self._autocast: dict[str, Any] = {
            "device_type": device_type,
            "enabled": torch.is_autocast_enabled(device_type),
            "dtype": torch.get_autocast_dtype(device_type),
        }

    def _training(self) -> list[bool]:
        return [module.training for module in self._model.modules()]

    def __call__(self, x: Tensor, create_graph: bool) -> list[Tensor]:
        if self._training() != self._modes:
            raise RuntimeError(
                "The model changed between train and eval mode between the penalty and its backward, where chunked path methods "
                "recompute. Call backward first, or pass chunk=None."
            )
        with torch.enable_grad(), torch.autocast(**self._autocast):
            return self._function(x, create_graph)


class _Recomputed(Function):
    """The step's gradients as a function of x and the parameters, whose graph is built only in the backward."""

    @staticmethod
    def forward(ctx: Any, step: _Step, x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.step = step
        ctx.save_for_backward(x, *parameters)  # also refuses the backward if an optimizer has stepped meanwhile
        return tuple(value.detach() for value in step(x.detach(), False))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        x, *parameters = ctx.saved_tensors
        images = x.detach().requires_grad_(ctx.needs_input_grad[1])
        values = ctx.step(images, True)
        pairs = [(value, grad) for value, grad in zip(values, outer, strict=True) if value.requires_grad]
        if not pairs:
            return (None,) * (2 + len(parameters))
        inputs = [images, *parameters] if images.requires_grad else parameters
        grads = torch.autograd.grad([v for v, _ in pairs], inputs, [g for _, g in pairs], allow_unused=True)
        return (None, *grads) if images.requires_grad else (None, None, *grads)
