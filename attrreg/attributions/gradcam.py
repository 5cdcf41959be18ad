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


@dataclass(frozen=True, repr=False)
class GradCAM(MapRegularizer):
    """Grad-CAM: a layer's channels, weighted by their mean gradient.

    phi = sum_c w_c A_c, w_c = mean over positions of d score / d A_c, `(N, 1, h, w)` at the layer's own resolution.

    Args:
        layer: dotted name of a layer with a spatial map: `(N, C, h, w)`, `(N, h, w, C)` or tokens `(N, L, C)`. "auto": the
            last layer that has one on which the score depends, taken as it is when the forward ends.
        relu: clip the map at zero, as the paper does for display. Off by default, as in Captum: a map that is negative
            everywhere would be clipped to nothing, and its penalty would have no gradient.
        semi: treat the weights w as constants when the penalty is differentiated. A different method, not an
            approximation: gradients reach the activations alone.
        score: what is differentiated; by default what `scores.ByTarget` says: the target's logit against the best other.
        objective: what is asked of phi.

    Raises:
        TypeError: `layer` is not a name.

    Cost:
        One backward from the score down to the layer (and its double backward); no forward when attached.

    Source:
        Selvaraju et al. 2017, arXiv 1610.02391; semi: RES (Gao et al. 2022, arXiv 2206.13413). Equals Captum's `LayerGradCam`
        with `relu_attributions=relu` on `(N, C, h, w)` layers; Captum reads tokens as channels, here they are a grid.
    """

    layer: str = "auto"
    relu: bool = False
    semi: bool = False
    score: Score = ByTarget()
    objective: Objective = LogOutside()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_layer_name(self.layer)

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
