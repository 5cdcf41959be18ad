"""Batch transforms: training on images without their irrelevant part, the cheapest thing to try."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attrreg import call as calls
from attrreg import masks, own
from attrreg.baselines import Baseline, Masked, Zero, as_baseline, keep_baseline
from attrreg.spec import Spec
from attrreg.state import drawn_seed, undone_on_error


@dataclass(frozen=True, repr=False)
class ReplaceOutside(Spec):
    """Each annotated image with its irrelevant part replaced: m x + (1 - m) fill(x). The others stay as they are.

        x = ReplaceOutside()(x, mask)                          # masked training: zeros outside
        x = ReplaceOutside(baselines.Shuffle())(x, mask)       # shuffled training: the pixels outside permuted, anew each call

    For training batches only. The test images keep their irrelevant part, and what the model does with it was never trained.

    Args:
        fill: what takes the place of the irrelevant pixels: a number, a tensor that broadcasts to `x`, or one of `attrreg.baselines`.
            `Zero()` is the mean colour of normalised images.

    Raises:
        TypeError, ValueError: `fill` is none of these.

    Cost:
        None worth measuring.

    Source:
        The baselines "masked" and "shuffled" of the founding paper, arXiv 1910.00199.
    """

    fill: Baseline | Tensor | float = Zero()

    def __post_init__(self) -> None:
        keep_baseline(self, "fill")

    def __call__(self, x: Tensor, mask: Tensor, *, annotated: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """The batch to train on, of the shape of `x`.

        Args:
            x, mask, annotated: as in calling a regularizer.
            generator: where the fill's draws come from; None: PyTorch's default generator on the CPU.

        Raises:
            TypeError, ValueError: naming the argument.
        """
        calls.check_batch(x)
        calls.check_options(x, generator)
        annotation = masks.check(mask, x, annotated)
        with undone_on_error(x.device, generator):
            fill = as_baseline(self.fill)
            seed = drawn_seed(generator) if fill.draws else 0
            replaced = own.made(fill, Masked(fill), x, annotation.relevant, seed)
        return torch.where(annotation.annotated.view(-1, 1, 1, 1), replaced, x)
