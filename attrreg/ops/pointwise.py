"""1x1 convolutions as matrix products.

PyTorch's convolution prepares longer than it computes where there is little to compute, and each of its derivatives calls one more.
Where there is much, it computes images fast if they are wide, but the gradient of weights slowly. `by_products` says where the line is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attrreg.ops.linear import product

FEW_POSITIONS = 8  # up to here, the images of a batch are put into one product, because products with so few columns are slow
SMALL_WEIGHT = 2**12  # values of a weight, up to which products win at any number of positions


def by_products(images: int, positions: int, inner: int, outer: int, channels_last: bool) -> tuple[bool, bool]:
    """Where products are as fast as PyTorch's convolution or faster: for images and their gradients, and for gradients of weights.

    Args:
        images: in the batch.
        positions: of an output image.
        inner: channels of the input.
        outer: those of the output.
        channels_last: images are laid out so, and rows of channels need no copy.
    """
    always = inner * outer <= SMALL_WEIGHT or channels_last or positions <= FEW_POSITIONS
    # With so few positions, PyTorch's library spends most of its time on reordering the weights.
    return always, always or images * positions <= max(inner, outer) // 4


def _takes_rows(x: Tensor) -> bool:
    """Whether to take all images as rows of channels, in one product; else one product an image."""
    return x.shape[2:].numel() <= FEW_POSITIONS or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))


def copied_once(x: Tensor) -> Tensor:
    """Images for several products: with channels last if these take rows, so that each product need not copy them."""
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 and _takes_rows(x) else x


def as_rows(x: Tensor) -> Tensor:
    """The channels of each position of all images, `(N * positions, C)`."""
    return x.movedim(1, -1).reshape(-1, x.shape[1])


def times(matrix: Tensor, x: Tensor, b: Tensor | None, channels_last: bool) -> Tensor:
    """A matrix `(out, in)` times the channels of each position of images `(N, in, ...)`, plus the bias b.

    Where all positions are rows of one product, the result is laid out as `channels_last` says.
    """
    n, out, places = x.shape[0], matrix.shape[0], x.shape[2:]
    if not _takes_rows(x):
        matrices, flat = matrix.expand(n, -1, -1), x.flatten(2)
        images = torch.bmm(matrices, flat) if b is None else torch.baddbmm(b[:, None], matrices, flat)
        return images.view(n, out, *places).data
    rows = product(as_rows(x), matrix, b)
    shaped = rows.view(n, *places, out).movedim(-1, 1)
    if channels_last:
        return shaped.data
    return shaped.clone(memory_format=torch.contiguous_format)


def input_gradient(gy: Tensor, w: Tensor, channels_last: bool) -> Tensor:
    """gx(gy, w), laid out as said."""
    matrix = w.flatten(1).t()
    if not _takes_rows(gy):
        matrix = matrix.contiguous()  # products of a transposed matrix with each image are slow
    return times(matrix, gy, None, channels_last)


def weight_gradient(gy: Tensor, x: Tensor, w: Tensor) -> Tensor:
    """gw(gy, x), of the shape of w."""
    (n, channels), out = x.shape[:2], gy.shape[1]
    if _takes_rows(x):
        found = product(as_rows(gy).t(), as_rows(x).t())
    elif n > 1 and out * channels <= min(SMALL_WEIGHT, 2 * (out + channels) * x.shape[2:].numel()):  # no larger than reordered images
        found = torch.bmm(gy.flatten(2), x.flatten(2).mT).sum(0)
    else:
        found = product(gy.transpose(0, 1).reshape(out, -1), x.transpose(0, 1).reshape(channels, -1))
    return found.view(w.shape).data
