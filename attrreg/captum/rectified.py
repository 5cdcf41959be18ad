"""Attributions with another rule for gradients through ReLU layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from attrreg.attributions.gradcam import GradCAM, LayerMap
from attrreg.needs import Grad, Need
from attrreg.objectives import LogOutside, Objective
from attrreg.ops.rectify import deconvolved, guided
from attrreg.points import Rectified
from attrreg.regularizer import MapRegularizer
from attrreg.scores import ByTarget, Score
from attrreg.sites import INPUT
from attrreg.trace import Trace

GUIDED, DECONVOLVED = Rectified(guided), Rectified(deconvolved)


@dataclass(frozen=True, repr=False)
class GuidedBackprop(MapRegularizer):
    """The input gradient, with only what is positive passed back at each ReLU layer, `(N, C, H, W)`.

    Only `nn.ReLU` layers follow the rule, as in Captum. It applies where the map is computed, not in the backward of the penalty, whose
    parameter gradient is the true derivative of the map.

    Args:
        score: what is differentiated; by default the target's logit, or the sum of log-probabilities without targets.
        objective: the penalty of phi under the mask, `(map, mask) -> (N,)`: see `attrreg.objectives`.

    Raises:
        ValueError: no `nn.ReLU` layer runs, so the map would be the gradient; or with `engines.FiniteDifference`.

    Cost:
        One forward of its own, one backward and its double backward.

    Source:
        Springenberg et al. 2014, arXiv 1412.6806. Equals Captum's `GuidedBackprop` where what enters a ReLU goes nowhere else. In
        pre-activation networks Captum applies the rule to the skip connection too; here it stays at the ReLU. Nie et al. 2018
        (arXiv 1805.07039) show that the map recovers the image more than it explains the prediction.
    """

    score: Score = ByTarget(contrast=False)
    objective: Objective = LogOutside()

    def needs(self) -> tuple[Need, ...]:
        """The gradient under the rule."""
        return (Grad(INPUT, self.score, GUIDED),)

    def attribution(self, trace: Trace) -> Tensor:
        """That gradient."""
        return trace.grad(INPUT, self.score, GUIDED)


@dataclass(frozen=True, repr=False)
class Deconvolution(MapRegularizer):
    """The input gradient, with the positive part of what arrives passed back at each ReLU layer, `(N, C, H, W)`.

    As `GuidedBackprop`, but gradients also pass a ReLU that was not active in the forward. See there for what both have in common.

    Args:
        score: what is differentiated; by default the target's logit, or the sum of log-probabilities without targets.
        objective: the penalty of phi under the mask, `(map, mask) -> (N,)`: see `attrreg.objectives`.

    Raises:
        ValueError: no `nn.ReLU` layer runs, so the map would be the gradient; or with `engines.FiniteDifference`.

    Cost:
        One forward of its own, one backward and its double backward.

    Source:
        Zeiler and Fergus 2013, arXiv 1311.2901. Equals Captum's `Deconvolution`, with the difference of `GuidedBackprop`.
    """

    score: Score = ByTarget(contrast=False)
    objective: Objective = LogOutside()

    def needs(self) -> tuple[Need, ...]:
        """The gradient under the rule."""
        return (Grad(INPUT, self.score, DECONVOLVED),)

    def attribution(self, trace: Trace) -> Tensor:
        """That gradient."""
        return trace.grad(INPUT, self.score, DECONVOLVED)


@dataclass(frozen=True, repr=False)
class GuidedGradCam(LayerMap):
    """Guided backpropagation times the positive part of Grad-CAM, enlarged to the image, `(N, C, H, W)`.

    Args:
        layer: dotted name of a layer with a spatial map; "auto": the last one.
        score: what is differentiated; by default the target's logit, or the sum of log-probabilities without targets.
        objective: the penalty of phi under the mask, `(map, mask) -> (N,)`: see `attrreg.objectives`.

    Raises:
        TypeError: naming the setting.
        ValueError: as `GuidedBackprop`.

    Cost:
        That of `GuidedBackprop` and of `GradCAM`.

    Source:
        Selvaraju et al. 2017, arXiv 1610.02391. Equals Captum's `GuidedGradCam` with its nearest interpolation.
    """

    layer: str = "auto"
    score: Score = ByTarget(contrast=False)
    objective: Objective = LogOutside()

    @property
    def _cam(self) -> GradCAM:
        return GradCAM(self.layer, relu=True, score=self.score)

    def needs(self) -> tuple[Need, ...]:
        """The gradient under the rule; the layer's activations and their gradient without it."""
        return Grad(INPUT, self.score, GUIDED), *self._cam.needs()

    def attribution(self, trace: Trace) -> Tensor:
        """Their product."""
        gradient = trace.grad(INPUT, self.score, GUIDED)
        return gradient * F.interpolate(self._cam.attribution(trace), gradient.shape[-2:], mode="nearest")
