"""Input gradients."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from attrreg.needs import Grad, Need, Value
from attrreg.objectives import LogOutside, Objective
from attrreg.regularizer import MapRegularizer
from attrreg.scores import ByTarget, Score
from attrreg.sites import INPUT
from attrreg.trace import Trace


@dataclass(frozen=True, repr=False)
class InputGradient(MapRegularizer):
    """Gradient of the score with respect to the image.

    phi = d score / d x, `(N, C, H, W)`, signed, in units of the score per unit of `x`.

    Args:
        score: what is differentiated; by default chosen by the target (`scores.ByTarget`): for class indices the target's logit against the
            best other, without a target the sum of log-probabilities.
        objective: the penalty of phi under the mask, `(map, mask) -> (N,)`: see `attrreg.objectives`.
        absolute: take |d score / d x|. This matters to objectives that see the sign: `Energy`, `NetOutside` and `TotalVariation`.

    Raises:
        TypeError: naming the setting.

    Cost:
        One forward, none when attached, and one backward, which is differentiated again in the loss's backward.

    Source:
        Ross, Hughes and Doshi-Velez 2017, arXiv 1703.03717; as an attribution, Simonyan et al. 2013, arXiv 1312.6034.
        Equals Captum's `Saliency(...).attribute(..., abs=absolute)`.
    """

    score: Score = ByTarget()
    objective: Objective = LogOutside()
    absolute: bool = False

    def needs(self) -> tuple[Need, ...]:
        """The gradient at the images."""
        return (Grad(INPUT, self.score),)

    def attribution(self, trace: Trace) -> Tensor:
        """The gradient itself, or its size."""
        gradient = trace.grad(INPUT, self.score)
        return gradient.abs() if self.absolute else gradient


@dataclass(frozen=True, repr=False)
class InputXGradient(MapRegularizer):
    """Image times gradient of the score.

    phi = x * d score / d x, `(N, C, H, W)`, in units of the score. For ReLU networks without bias or normalisation by the
    images' own statistics, and a score of logits as they are, it equals integrated gradients with a zero baseline (Hesse et al. 2021, arXiv
    2111.07668).

    Args:
        score: what is differentiated; by default chosen by the target (`scores.ByTarget`): for class indices the target's logit against the
            best other, without a target the sum of log-probabilities.
        objective: the penalty of phi under the mask, `(map, mask) -> (N,)`: see `attrreg.objectives`.

    Raises:
        TypeError: naming the setting.

    Cost:
        That of `InputGradient`; in a sum with one of the same score, nothing more.

    Source:
        Shrikumar et al. 2016, arXiv 1605.01713. Equals Captum's `InputXGradient`.
    """

    score: Score = ByTarget()
    objective: Objective = LogOutside()

    def needs(self) -> tuple[Need, ...]:
        """The images and the gradient there."""
        return Value(INPUT), Grad(INPUT, self.score)

    def attribution(self, trace: Trace) -> Tensor:
        """Their product."""
        return trace.value(INPUT) * trace.grad(INPUT, self.score)
