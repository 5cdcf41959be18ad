"""How one value a channel meets a tensor `(N, C, ...)`, fast."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

FEW = 8  # positions of a plane, from which on PyTorch's backward of batch normalisation is vectorised
MANY = 2**12  # values, from which on it is worth a dozen operations to go around that


@dataclass(frozen=True)
class Channels:
    """The layout of a tensor `(N, C, ...)`, and what a value a channel does to its like.

    With all values of an image in one row, and a channel's value repeated for its positions, a single vectorised loop runs over them.

    Attributes:
        shape: of the tensor.
        positions: of a channel of an image.
        count: of the values of a channel.
        rows: rows are views, and worth it: on the CPU, where planes are contiguous.
        few: planes are so small, and so many, that PyTorch's kernels are slow.
    """

    shape: torch.Size
    positions: int
    count: int
    rows: bool
    few: bool

    @staticmethod
    def of(x: Tensor) -> Channels:
        """That of a tensor."""
        return _channels(x.shape, x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64) and x.is_contiguous())

    def flat(self, tensor: Tensor) -> Tensor:
        """In rows where planes are small, else as it is."""
        return tensor.reshape(self.shape[0], -1) if self.few else tensor

    def along(self, values: Tensor) -> Tensor:
        """One value a channel, to meet what is flat: small planes would each be a loop of its own."""
        return self.row(values) if self.few else values.view(1, -1, *[1] * (len(self.shape) - 2))

    def row(self, values: Tensor) -> Tensor:
        """One value a channel, to meet rows."""
        return values.view(-1, 1).expand(-1, self.positions).reshape(-1)

    def total(self, rows: Tensor) -> Tensor:
        """The sum a channel of rows."""
        return rows.sum(0).view(-1, self.positions).sum(1)

    def unflat(self, rows: Tensor) -> Tensor:
        """In the tensor's shape. Not as a view of rows: a layer may go on to work in place, which on views is slow or refused."""
        if rows.dim() == len(self.shape):
            return rows
        shaped: Tensor = torch.ops.aten._unsafe_view(rows, self.shape)
        return shaped

    def affine(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """A scale and a shift a channel."""
        if self.rows:
            return self.unflat(torch.addcmul(self.row(shift), x.view(self.shape[0], -1), self.row(scale)))
        return torch.addcmul(self.along(shift), x, self.along(scale))


@lru_cache(maxsize=4096)
def _channels(shape: torch.Size, suited: bool) -> Channels:
    positions = shape[2:].numel()
    rows = suited and positions > 1 and shape.numel() > 0
    return Channels(shape, positions, shape[0] * positions, rows, rows and positions < FEW and shape.numel() >= MANY)
