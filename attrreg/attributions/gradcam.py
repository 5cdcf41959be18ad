"""Grad-CAM."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from attrreg.needs import Grad, Need, Value
from attrreg.objectives import LogOutside, Objective
from attrreg.regularizer import MapRegularizer
from attrreg.scores import ByTarget, Score
from attrreg.sites import check_layer_name, spatial
from attrreg.trace import Trace


class LayerMap(MapRegularizer):
    """A map of a layer, whose name is checked."""

    layer: str

    def __post_init__(self) -> None:
        super().__post_init__()
        check_layer_name(self.layer)


@dataclass(frozen=True, repr=False)
class GradCAM(LayerMap):
    """Grad-CAM: a layer's channels, weighted by their mean gradient.

    phi = sum_c w_c A_c, w_c = mean over positions of d score / d A_c, `(N, 1, h, w)` at the layer's own resolution.

    Args:
        layer: dotted name of a layer with a spatial map: `(N, C, h, w)`, `(N, h, w, C)` or tokens `(N, L, C)`. "auto": the last such layer
            on which the score depends; where the model overwrites its output in place, the map is of what it wrote.
        relu: clip the map at zero, as the paper does. Off by default, as in Captum: a map that is negative
            everywhere would be clipped to nothing, and its penalty would have no gradient.
        semi: treat the weights w as constants when the penalty is differentiated, so that gradients reach the activations alone. This is a
            different method, not an approximation.
        score: what is differentiated; by default chosen by the target (`scores.ByTarget`): for class indices the target's logit against the
            best other, without a target the sum of log-probabilities.
        objective: the penalty of phi under the mask, `(map, mask) -> (N,)`: see `attrreg.objectives`.

    Raises:
        TypeError: naming the setting.
        ValueError, RuntimeError: in a call, if the layer has no spatial map, or the score does not depend on it.

    Cost:
        One forward, none when attached, and one backward from the score down to the layer, which is differentiated again. "auto" costs more
        in a model's first call: see docs/gradcam.md.

    Source:
        Selvaraju et al. 2017, arXiv 1610.02391; semi: RES (Gao et al. 2022, arXiv 2206.13413). Equals Captum's `LayerGradCam`
        with `relu_attributions=relu` on `(N, C, h, w)` layers; Captum reads tokens as channels, here they are a grid.
    """

    layer: str = "auto"
    relu: bool = False
    semi: bool = False
    score: Score = ByTarget()
    objective: Objective = LogOutside()

    def needs(self) -> tuple[Need, ...]:
        """The layer's activations and their gradient."""
        return Value(spatial(self.layer)), Grad(spatial(self.layer), self.score)

    def attribution(self, trace: Trace) -> Tensor:
        """The weighted sum of channels."""
        site = spatial(self.layer)
        activations = trace.grid(site, trace.value(site))
        weights = trace.grid(site, trace.grad(site, self.score)).mean(dim=(2, 3), keepdim=True)
        if self.semi:
            weights = weights.detach()
        cam = (weights * activations).sum(dim=1, keepdim=True)
        return cam.relu() if self.relu else cam
