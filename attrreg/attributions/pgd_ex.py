"""Robustness outside the mask."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from attrreg.needs import Need, Scored
from attrreg.points import Ascent
from attrreg.regularizer import SingleRegularizer
from attrreg.scores import TaskLoss
from attrreg.settings import brief, is_number, is_real, keep_count
from attrreg.trace import Trace


@dataclass(frozen=True, repr=False)
class PGDEx(SingleRegularizer):
    """The loss under an adversarial perturbation of the irrelevant pixels: robustness outside the mask, without second derivatives.

    Per image: loss(f(x + d), target), with |d| <= epsilon (1 - m) found by steps along the sign of the loss's gradient.

    Args:
        epsilon: how far an irrelevant value may move, in units of `x`.
        steps: number of steps.
        rate: length of a step, in units of `x`; None: 2.5 epsilon / steps, enough to reach the border and to leave it again.
        bounds: least and greatest value of a valid image, for example (0, 1) if images were not normalised; None: there are none. A value
            of `x` beyond them is not clipped: it may move towards the range by epsilon, but no further away.
        loss: the loss of each image, which needs a target; by default cross-entropy.

    Raises:
        TypeError, ValueError: naming the setting.

    Cost:
        `steps` forwards and backwards to the images, one more forward, and first-order gradients of that one. No double backward.

    Source:
        PGD-Ex, Heo et al. 2023, arXiv 2303.06419, whose code (vihari/robust_mlx) starts from the image too, with steps of epsilon / steps;
        after Madry et al. 2018, arXiv 1706.06083, who start from a random point.
    """

    epsilon: float = 0.1
    steps: int = 5
    rate: float | None = None
    bounds: tuple[float, float] | None = None
    loss: TaskLoss = TaskLoss()

    def __post_init__(self) -> None:
        given = {"epsilon": self.epsilon} if self.rate is None else {"epsilon": self.epsilon, "rate": self.rate}
        for name, value in given.items():
            if not is_number(value) or value <= 0:
                raise ValueError(f"{name} must be a positive number, in units of x, got {brief(value)}. Write for example {name}=0.1.")
        keep_count(self, "steps", 1)
        if self.bounds is not None:
            pair = tuple(self.bounds) if isinstance(self.bounds, (tuple, list)) else ()
            if len(pair) != 2 or not all(map(is_real, pair)) or not pair[0] < pair[1]:
                raise ValueError(f"bounds must be the least and the greatest value of images, got {brief(self.bounds)}. Write (0.0, 1.0).")
            object.__setattr__(self, "bounds", tuple(map(float, pair)))
        if not isinstance(self.loss, TaskLoss):
            raise TypeError(f"loss must be a scores.TaskLoss, got {brief(self.loss)}. Write scores.TaskLoss(function).")

    @property
    def _worst(self) -> Ascent:
        low, high = self.bounds or (-math.inf, math.inf)
        rate = 2.5 * self.epsilon / self.steps if self.rate is None else self.rate
        return Ascent(self.loss, self.epsilon, self.steps, rate, low, high)

    def needs(self) -> tuple[Need, ...]:
        """The loss on the worst images."""
        return (Scored(self.loss, self._worst),)

    def per_image(self, trace: Trace) -> Tensor:
        """The loss there."""
        return trace.score(self.loss, self._worst)
