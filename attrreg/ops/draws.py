"""Dropout and stochastic depth in a pass over several places of a path: each place gets what its image would get alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attrreg.state import Rng

Draw = Callable[[Tensor], Tensor]


class Draws:
    """What one pass draws whose batch has each image at several places, side by side.

    It is drawn for the images once and repeated for their places, from generators of its own: the default ones move only if something was
    drawn that is not known here, or whose batch is not told from its shape. With a single place, PyTorch draws, and this takes note.

    Attributes:
        state: of the generators that this draws from.
        shapes: of all that was drawn for. At the end, state and shapes have to be those of a pass over the images alone. Both are compared:
            a shape can be mistaken for that of a batch, which CUDA's state does not show, and something else may have drawn.

    Args:
        rows: of the batch, the images at all places.
        places: of each image.
        start: from where a pass over the images alone would draw.
    """

    def __init__(self, rows: int, places: int, start: Rng) -> None:
        self._rows = rows
        self._places = places
        self.state = start
        self.shapes: list[torch.Size] = []

    def dropout(self, function: Any, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        """`F.dropout` and its kinds for whole channels: `function`."""
        # Off the CPU, the order of what is drawn depends on the layout, and on whether it is in place.
        known = training and p and (input.device.type == "cpu" or input.is_contiguous())
        noise = self._once(input, lambda like: function(torch.ones_like(like), p, True, inplace)) if known else None
        if noise is None:
            return function(input, p, training, inplace)
        return input.mul_(noise) if inplace else input * noise

    def bernoulli_(self, function: Any, input: Tensor, p: Any = 0.5, *, generator: torch.Generator | None = None) -> Tensor:
        """`Tensor.bernoulli_`."""
        given = generator is not None or isinstance(p, Tensor)
        drawn = None if given else self._once(input, lambda like: torch.empty_like(like).bernoulli_(p))
        return function(input, p, generator=generator) if drawn is None else input.copy_(drawn)

    def _once(self, tensor: Tensor, draw: Draw) -> Tensor | None:
        """What is drawn for a tensor: for a batch one draw an image, for no batch one in all. None: not known which, so PyTorch draws."""
        if self._places == 1:
            self.shapes.append(tensor.shape)
            return None
        rows, shape = self._rows, list(tensor.shape)
        if shape and shape[0] == rows:  # if not as a batch, the shapes at the end tell
            return self._drawn(tensor[:: self._places], draw).repeat_interleave(self._places, dim=0)
        return None if any(size % rows == 0 for size in shape) else self._drawn(tensor, draw)

    def _drawn(self, like: Tensor, draw: Draw) -> Tensor:
        self.shapes.append(like.shape)
        before = Rng.of(like.device)
        self.state.restore()
        try:
            return draw(like.detach())
        finally:
            self.state = Rng.of(like.device)
            before.restore()
