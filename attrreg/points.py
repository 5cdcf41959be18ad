"""Points: the images at which the model is evaluated."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import numpy
import torch
from torch import Tensor

from attrreg import masks
from attrreg.baselines import Baseline, keep_baseline
from attrreg.ops.rectify import Rule
from attrreg.scores import Score
from attrreg.spec import Key

# For each Riemann rule: how many steps the first place is from the start of the path, and the last one from its end.
ENDS = {"riemann_left": (0, 1), "riemann_right": (1, 0), "riemann_middle": (0.5, 0.5), "riemann_trapezoid": (0, 0)}

RULES = ("gausslegendre", *ENDS)


@cache
def places(rule: str, steps: int) -> tuple[tuple[float, float], ...]:
    """The places on [0, 1] of a quadrature rule, by Captum's name, each with its weight."""
    # As Captum's tables where float32 is the default type: the Riemann places and all weights are rounded to float32.
    if rule in ENDS:
        first, last = ENDS[rule]
        found = torch.linspace(first / steps, 1 - last / steps, steps, dtype=torch.float32, device="cpu").tolist()
        sizes = [1 / steps] * steps
        if rule == "riemann_trapezoid":
            sizes[0], sizes[-1] = sizes[0] / 2, sizes[-1] / 2
    else:
        nodes, lengths = numpy.polynomial.legendre.leggauss(steps)
        found, sizes = (0.5 * (1 + nodes)).tolist(), (0.5 * lengths).tolist()
    weights = torch.tensor(sizes, dtype=torch.float32, device="cpu").tolist()
    return tuple(zip(found, weights, strict=True))


@dataclass(frozen=True, eq=False)
class Stop:
    """One place on the way from a baseline to x: baseline + alpha (x - baseline), weighted.

    Attributes:
        baseline: `(N, C, H, W)`.
        alpha: how far along, in [0, 1]: a number, or one per image `(N, 1, 1, 1)`.
        weight: of the gradient at this place in the sum along the path.
    """

    baseline: Tensor
    alpha: float | Tensor
    weight: float

    def image(self, x: Tensor) -> Tensor:
        """The image at this place."""
        return (self.baseline + self.alpha * (x - self.baseline)).to(x.dtype)

    def factor(self, x: Tensor) -> Tensor:
        """What the gradient here is multiplied by: weight (x - baseline)."""
        return (self.weight * (x - self.baseline)).to(x.dtype)


class Point(Key, ABC):
    """Where the model is evaluated."""

    draws: ClassVar[bool] = False
    needs_mask: ClassVar[bool] = False


@dataclass(frozen=True, repr=False)
class Clean(Point):
    """The images as they are."""


CLEAN = Clean()
"""The images as they are, the default wherever a point is asked for."""


class FromBaseline(Point, ABC):
    """Images that a baseline makes; subclasses have it as a field, which may be written as a number or a tensor."""

    baseline: Baseline

    def __post_init__(self) -> None:
        keep_baseline(self)

    @property
    def draws(self) -> bool:  # type: ignore[override]
        """Whether the baseline draws."""
        return self.baseline.draws

    @property
    def needs_mask(self) -> bool:  # type: ignore[override]
        """Whether the baseline requires a mask."""
        return self.baseline.needs_mask


@dataclass(frozen=True, repr=False)
class At(FromBaseline):
    """An image made from each image, cut off from it: no gradient flows to x.

    Args:
        baseline: how it is made.
    """

    baseline: Baseline


@dataclass(frozen=True, repr=False)
class Rectified(Point):
    """The images as they are, with another rule for gradients through `nn.ReLU` layers.

    Args:
        rule: one of `attrreg.ops.rectify`, or `(gradient, y) -> passed on`, from the ReLU's output y. It scales with the gradient,
            rule(s gradient, y) = s rule(gradient, y) for s > 0: in float16 it gets scaled ones.
    """

    rule: Rule

    def __post_init__(self) -> None:
        if not callable(self.rule):
            raise TypeError(f"rule must be a function (gradient, y) -> passed on, as attrreg.ops.rectify.guided, got {self.rule!r}.")


@dataclass(frozen=True, repr=False)
class Ascent(Point):
    """An image near each image, changed outside its mask so that a score is high: by steps along the sign of the score's gradient.

    No gradient flows to x, nor through the way there.

    Args:
        score: what ascends; nothing that draws.
        epsilon: how far any value may move, times the irrelevance of its pixel.
        steps: number of steps.
        rate: how far one step moves a value, times the irrelevance of its pixel.
        low, high: the range of valid images, widened to where an image itself is.
    """

    score: Score
    epsilon: float
    steps: int
    rate: float
    low: float
    high: float
    needs_mask: ClassVar[bool] = True

    def step(self, x: Tensor, image: Tensor, gradient: Tensor, mask: Tensor) -> Tensor:
        """One step from `image`, which stays near `x`."""
        outside = 1 - masks.resize(mask, (x.shape[-2], x.shape[-1])).to(x.dtype)
        reach = self.epsilon * outside
        way = gradient.sign().masked_fill(gradient.isnan(), math.nan)  # of which PyTorch's is 0, as if there were nothing to move
        moved = (image - x + self.rate * outside * way.to(x.dtype)).clamp(-reach, reach)  # gradients are in float32 at least
        # Within the bounds, widened to where x itself is: what lies beyond them would else move by more than its reach.
        kept = torch.maximum(torch.minimum(x + moved, x.clamp(min=self.high)), x.clamp(max=self.low))
        return torch.where(outside > 0, kept, x)


class Path(FromBaseline, ABC):
    """Several places between a baseline and x, over which gradients are summed.

    Subclasses have the field `chunk`, too: of how many places graphs are held at a time (None: all).
    """

    chunk: int | None

    @abstractmethod
    def stops(self, x: Tensor, mask: Tensor | None, generator: torch.Generator) -> Sequence[Stop]:
        """The places, for images `x` without graph."""


@dataclass(frozen=True, repr=False)
class Quadrature(Path):
    """Fixed places and weights on the straight path, by one of Captum's rules."""

    baseline: Baseline
    steps: int
    rule: str
    chunk: int | None

    def stops(self, x: Tensor, mask: Tensor | None, generator: torch.Generator) -> Sequence[Stop]:
        """One place a step, all from the same baseline."""
        start = self.baseline(x, mask, generator)
        return [Stop(start, alpha, weight) for alpha, weight in places(self.rule, self.steps)]


@dataclass(frozen=True, repr=False)
class RandomPlaces(Path):
    """Places drawn uniformly on the path, one alpha an image, each draw from a fresh baseline."""

    baseline: Baseline
    samples: int
    chunk: int | None
    draws: ClassVar[bool] = True

    def stops(self, x: Tensor, mask: Tensor | None, generator: torch.Generator) -> Sequence[Stop]:
        """One place a sample."""
        result = []
        for _ in range(self.samples):
            start = self.baseline(x, mask, generator)
            alpha = torch.rand((x.shape[0], 1, 1, 1), generator=generator, device=x.device, dtype=x.dtype)
            result.append(Stop(start, alpha, 1 / self.samples))
        return result
