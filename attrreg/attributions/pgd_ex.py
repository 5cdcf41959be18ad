"""Robustness outside the mask."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real

from torch import Tensor

from attrreg.needs import Need, Value
from attrreg.points import Ascent
from attrreg.regularizer import SingleRegularizer
from attrreg.scores import TaskLoss
from attrreg.settings import is_number, keep_count
from attrreg.sites import OUTPUT
from attrreg.trace import Trace


@dataclass(frozen=True, repr=False)
class PGDEx(SingleRegularizer):
    """The loss on the image with its irrelevant part perturbed for the worst: the first-order way to ask that it should not matter.

    Per image: loss(f(x + d), target), with d found by steps along the sign of the loss's gradient, |d| <= epsilon (1 - m).

    Args:
        epsilon: how far an irrelevant value may move, in units of `x`.
        steps: number of steps.
        rate: how far a step goes; None: 2.5 epsilon / steps, so that the border can be reached and left again.
        bounds: the range of valid images, where there is one: (0, 1) for images that were not normalised. A value of `x` that lies
            outside is not brought inside: it may move towards the range by epsilon, and no further away.
        loss: the loss of each image; by default cross-entropy. It needs targets.

    Raises:
        TypeError, ValueError: naming the setting.

    Cost:
        `steps` forwards and backwards to the images, one more forward, and first-order gradients of that one. No double backward.

    Source:
        PGD-Ex, Heo et al. 2023, arXiv 2303.06419, after Madry et al. 2018, arXiv 1706.06083. There from a random start; here from the
        image, so that nothing is drawn.
    """

    epsilon: float = 0.1
    steps: int = 5
    rate: float | None = None
    bounds: tuple[float, float] | None = None
    loss: TaskLoss = TaskLoss()

    def __post_init__(self) -> None:
        for name, value in (("epsilon", self.epsilon), ("rate", self.epsilon if self.rate is None else self.rate)):
            if not is_number(value) or value <= 0:
                raise ValueError(f"{name} must be a positive number, in units of x, got {value!r}. Write for example {name}=0.1.")
        keep_count(self, "steps", 1)
        if self.bounds is not None:
            pair = tuple(self.bounds) if isinstance(self.bounds, (tuple, list)) else ()
            if len(pair) != 2 or not all(isinstance(end, Real) and not isinstance(end, bool) for end in pair) or not pair[0] < pair[1]:
                raise ValueError(f"bounds must be the least and the greatest value of images, got {self.bounds!r}. Write (0.0, 1.0).")
            object.__setattr__(self, "bounds", tuple(map(float, pair)))
        if not isinstance(self.loss, TaskLoss):
            raise TypeError(f"loss must be a scores.TaskLoss, got {self.loss!r}. Write scores.TaskLoss(function).")

    @property
    def _worst(self) -> Ascent:
        low, high = self.bounds or (-math.inf, math.inf)
        return Ascent(self.loss, self.epsilon, self.steps, 2.5 * self.epsilon / self.steps if self.rate is None else self.rate, low, high)

    def needs(self) -> tuple[Need, ...]:
        """The output on the worst images."""
        return (Value(OUTPUT, self._worst),)

    def per_image(self, trace: Trace) -> Tensor:
        """The loss there."""
        return trace.score(self.loss, self._worst)
