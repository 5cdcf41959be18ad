"""Activation difference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from attrreg.apart import images_apart
from attrreg.baselines import Baseline, Masked, Shuffle
from attrreg.masks import penalty_dtype
from attrreg.needs import Need, Value
from attrreg.points import CLEAN, At
from attrreg.regularizer import SingleRegularizer
from attrreg.sites import FEATURES, INPUT, check_by_image
from attrreg.trace import Trace

Side = Literal["clean", "masked"]

# A difference that is no larger, by the activations, may be made by rounding: in a sum the two passes compute by other operators.
NEAR = 2.0**-5


@dataclass(frozen=True, repr=False)
class ActivationDifference(SingleRegularizer):
    """Distance between a layer's activations on the image and on the image without its irrelevant part.

    Per image: sum over layers of ||a_l(x) - a_l(x~)||_2, activations flattened, with x~ = m x + (1 - m) fill(x), which no gradient
    flows through. Both passes draw the same dropout masks.

    Args:
        layers: dotted names of layers (a single name will do). "auto": the features that enter the classifier, as in the paper.
        fill: what takes the place of the irrelevant pixels, one of `attrreg.baselines`.
        detach: the side that is held constant, "clean" or "masked"; None: gradients flow through both, as in the paper.

    Raises:
        TypeError, ValueError: naming the setting.

    Cost:
        One forward on x~ and first-order gradients through it; the clean forward is free when attached.

    Source:
        ActDiff, arXiv 1910.00199. Its code reduces only the last axis of 4-d activations, and adds 1e-6 to each difference;
        here they are flattened, and nothing is added. `presets.actdiff_viviano2019` has its mean over the batch.
    """

    layers: str | Sequence[str] = "auto"  # kept as a tuple, which can be hashed
    fill: Baseline = Shuffle()
    detach: Side | None = None

    def __post_init__(self) -> None:
        listed = (self.layers,) if isinstance(self.layers, str) else self.layers
        layers = tuple(listed) if isinstance(listed, Sequence) else ()
        if not layers or not all(isinstance(layer, str) and layer for layer in layers):
            raise TypeError(f"layers must be dotted names of layers, got {self.layers!r}. Find them with model.named_modules().")
        object.__setattr__(self, "layers", "auto" if layers == ("auto",) else layers)
        Masked(self.fill)  # which checks it
        if self.detach is not None and self.detach not in get_args(Side):
            raise ValueError(f"detach must be 'clean', 'masked' or None, got {self.detach!r}. Choose the side to hold constant.")

    @property
    def _sites(self) -> tuple[str, ...]:
        layers = (self.layers,) if isinstance(self.layers, str) else self.layers
        return tuple(FEATURES if layer == "auto" else layer for layer in layers)

    @property
    def _masked(self) -> At:
        return At(Masked(self.fill))

    def needs(self) -> tuple[Need, ...]:
        """Each layer's activations on both images."""
        return tuple(Value(site, at) for site in self._sites for at in (CLEAN, self._masked))

    def per_image(self, trace: Trace) -> Tensor:
        """The sum of distances."""
        each = [self._distance(trace, site) for site in self._sites]
        distance, size = (torch.stack(of_layers).sum(dim=0) for of_layers in zip(*each, strict=True))
        same = (trace.value(INPUT, self._masked) == trace.value(INPUT)).flatten(1).all(dim=1)
        rounded = same & (distance > 0) & trace.annotation.annotated
        near, found, all_same = torch.stack([(distance <= NEAR * size).all(), rounded.any(), same.all()]).tolist()
        if near and not any(trace.sees_images(site, self._masked) for site in self._sites):
            raise RuntimeError(
                f"ActivationDifference(layers={self.layers!r}): the activations come from other inputs than the images, so they are the "
                "same on every image. Name a layer that the images reach."
            )
        if found and (all_same or images_apart(trace.call)):
            # Of equal images the difference is zero. What rounding leaves would have a gradient as long as that of any other.
            distance = torch.where(rounded, torch.zeros_like(distance), distance)
        return distance

    def _distance(self, trace: Trace, site: str) -> tuple[Tensor, Tensor]:
        """How far the activations of each image are apart, and how large they are."""
        clean, masked = trace.value(site), trace.value(site, self._masked)
        check_by_image(clean, trace.call.x, site)
        if self.detach == "clean":
            clean = clean.detach()
        if self.detach == "masked":
            masked = masked.detach()
        dtype = penalty_dtype(clean.dtype)
        clean, masked = clean.to(dtype), masked.to(dtype)
        size: Tensor = torch.linalg.vector_norm(clean.detach().flatten(1), dim=1)
        return torch.linalg.vector_norm((clean - masked).flatten(1), dim=1), size
