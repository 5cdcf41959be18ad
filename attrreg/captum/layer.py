"""Maps of a layer, other than Grad-CAM."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from attrreg.attributions.gradcam import LayerMap
from attrreg.baselines import Baseline, Zero
from attrreg.captum.between import check_path, path_points
from attrreg.needs import Grad, Need, Value
from attrreg.objectives import LogOutside, Objective
from attrreg.points import At
from attrreg.scores import ByTarget, Score
from attrreg.sites import spatial
from attrreg.trace import Trace


@dataclass(frozen=True, repr=False)
class LayerActivation(LayerMap):
    """A layer's activations: phi = A, `(N, C, h, w)`.

    Args:
        layer: dotted name of a layer with a spatial map; "auto": the last one.
        score: not used; every map regularizer has this field.
        objective: the penalty of phi under the mask, `(map, mask) -> (N,)`: see `attrreg.objectives`.

    Raises:
        TypeError: naming the setting.

    Cost:
        None but first-order gradients; one forward when not attached.

    Source:
        Equals Captum's `LayerActivation` on `(N, C, h, w)` layers; tokens and `(N, h, w, C)` are brought to that form.
    """

    layer: str = "auto"
    score: Score = ByTarget(contrast=False)
    objective: Objective = LogOutside()

    def needs(self) -> tuple[Need, ...]:
        """The activations."""
        return (Value(spatial(self.layer)),)

    def attribution(self, trace: Trace) -> Tensor:
        """The activations as a map."""
        return trace.grid(spatial(self.layer), trace.value(spatial(self.layer)))


@dataclass(frozen=True, repr=False)
class LayerGradientXActivation(LayerMap):
    """A layer's activations times their gradients: phi = A * d score / d A, `(N, C, h, w)`.

    Args:
        layer: dotted name of a layer with a spatial map; "auto": the last one.
        multiply: by A, as above; else the gradient itself.
        score: what is differentiated; by default the target's logit, or the sum of log-probabilities without targets.
        objective: the penalty of phi under the mask, `(map, mask) -> (N,)`: see `attrreg.objectives`.

    Raises:
        TypeError: naming the setting.

    Cost:
        One forward, none when attached, and one backward down to the layer, which is differentiated again; shared with a `GradCAM` of the
        same score there.

    Source:
        Equals Captum's `LayerGradientXActivation` on `(N, C, h, w)` layers.
    """

    layer: str = "auto"
    multiply: bool = True
    score: Score = ByTarget(contrast=False)
    objective: Objective = LogOutside()

    def needs(self) -> tuple[Need, ...]:
        """The activations and their gradient."""
        return Value(spatial(self.layer)), Grad(spatial(self.layer), self.score)

    def attribution(self, trace: Trace) -> Tensor:
        """Their product."""
        site = spatial(self.layer)
        gradient = trace.grid(site, trace.grad(site, self.score))
        return trace.grid(site, trace.value(site)) * gradient if self.multiply else gradient


@dataclass(frozen=True, repr=False)
class InternalInfluence(LayerMap):
    """A layer's gradients, averaged along the straight path from a baseline to the image.

    phi = sum_k w_k d score / d A at z_k = b + alpha_k (x - b), `(N, C, h, w)`.

    Args:
        layer: dotted name of a layer with a spatial map.
        steps: places on the path.
        baseline: where it starts, as in `IntegratedGradients`; none that draws.
        rule: Captum's name of the quadrature rule.
        score: what is differentiated; by default the target's logit, or the sum of log-probabilities without targets.
        objective: the penalty of phi under the mask, `(map, mask) -> (N,)`: see `attrreg.objectives`.

    Raises:
        TypeError, ValueError: naming the setting.

    Cost:
        `steps` forwards, and as many backwards down to the layer, each differentiated again; all graphs are held at once. No gradient flows
        to `x` through the places.

    Source:
        Leino et al. 2018, arXiv 1802.03788. Equals Captum's `InternalInfluence`.
    """

    layer: str
    steps: int = 50
    baseline: Baseline | Tensor | float = Zero()
    rule: str = "gausslegendre"
    score: Score = ByTarget(contrast=False)
    objective: Objective = LogOutside()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_path(self)

    def needs(self) -> tuple[Need, ...]:
        """The gradient at each place."""
        return tuple(Grad(self.layer, self.score, at) for at, _ in path_points(self))

    def attribution(self, trace: Trace) -> Tensor:
        """The weighted sum."""
        weighted = [weight * trace.grad(self.layer, self.score, at) for at, weight in path_points(self)]
        return trace.grid(self.layer, torch.stack(weighted).sum(dim=0))


@dataclass(frozen=True, repr=False)
class LayerConductance(LayerMap):
    """What each of a layer's activations adds to the score, along the straight path from a baseline to the image.

    phi = sum_k (A(z_{k+1}) - A(z_k)) * d score / d A at z_k = b + alpha_k (x - b), over `steps` + 1 places, `(N, C, h, w)`.

    Args:
        layer: dotted name of a layer with a spatial map.
        steps: intervals between places.
        baseline: where the path starts, as in `IntegratedGradients`; none that draws.
        rule: Captum's name of the quadrature rule, from which the places are taken.
        score: what is differentiated; by default the target's logit, or the sum of log-probabilities without targets.
        objective: the penalty of phi under the mask, `(map, mask) -> (N,)`: see `attrreg.objectives`.

    Raises:
        TypeError, ValueError: naming the setting.

    Cost:
        `steps` + 1 forwards, `steps` backwards down to the layer, each differentiated again; all graphs are held at once. No gradient flows
        to `x` through the places.

    Source:
        Dhamdhere et al. 2018, arXiv 1805.12233, computed as in Shrikumar et al. 2018, arXiv 1807.09946. Equals Captum's
        `LayerConductance`.
    """

    layer: str
    steps: int = 50
    baseline: Baseline | Tensor | float = Zero()
    rule: str = "gausslegendre"
    score: Score = ByTarget(contrast=False)
    objective: Objective = LogOutside()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_path(self, least=1)  # between two places

    def _points(self) -> list[At]:
        return [at for at, _ in path_points(self, extra_steps=1)]

    def needs(self) -> tuple[Need, ...]:
        """The activations at each place, and their gradient at each but the last."""
        points = self._points()
        return *(Value(self.layer, at) for at in points), *(Grad(self.layer, self.score, at) for at in points[:-1])

    def attribution(self, trace: Trace) -> Tensor:
        """The sum of products of steps and gradients."""
        points = self._points()
        steps = pairwise(trace.value(self.layer, at) for at in points)
        products = [(after - before) * trace.grad(self.layer, self.score, at) for at, (before, after) in zip(points, steps, strict=False)]
        return trace.grid(self.layer, torch.stack(products).sum(dim=0))
