"""Activation difference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from attrreg.baselines import Baseline, Masked, Shuffle, keep_baseline
from attrreg.needs import Need, Value
from attrreg.points import CLEAN, At
from attrreg.regularizer import SingleRegularizer
from attrreg.settings import brief
from attrreg.sites import INPUT, check_by_image, feature_site
from attrreg.trace import Trace

Side = Literal["clean", "masked"]

# A smaller difference, relative to the activations, may be rounding alone: in a sum with terms that take gradients, the clean pass runs on
# other operators than the masked one.
MAY_BE_ROUNDING = 2.0**-5


@dataclass(frozen=True, repr=False)
class ActivationDifference(SingleRegularizer):
    """Distance between a layer's activations on the image and on the image without its irrelevant part.

    Per image: sum over layers of ||a_l(x) - a_l(x~)||_2, activations flattened, with x~ = m x + (1 - m) fill(x). Both passes have the same
    dropout masks. No gradient flows to `x` through x~.

    Args:
        layers: a dotted name or several, of layers whose output is `(N, ...)`. "auto": the features that enter the classifier, as in the
            paper.
        fill: what takes the place of the irrelevant pixels, one of `attrreg.baselines`.
        detach: the side that is held constant, "clean" or "masked"; None: gradients flow through both, as in the paper.

    Raises:
        TypeError, ValueError: naming the setting.
        RuntimeError: in a call, if none of the layers depends on the images.

    Cost:
        One forward on x~ and first-order gradients through it; the clean forward is free when attached.

    Source:
        ActDiff, arXiv 1910.00199. Its code reduces only the last axis of 4-d activations, adds 1e-6 to each difference, and takes the mean
        over layers; here they are flattened and summed, and nothing is added. `presets.actdiff_viviano2019` has its mean over the batch.
    """

    layers: str | Sequence[str] = ("auto",)  # kept as a tuple, which can be hashed
    fill: Baseline | Tensor | float = Shuffle()
    detach: Side | None = None

    def __post_init__(self) -> None:
        layers = (self.layers,) if isinstance(self.layers, str) else self.layers
        if not isinstance(layers, Sequence) or not layers or not all(isinstance(layer, str) and layer for layer in layers):
            raise TypeError(f"layers must be dotted names of layers, got {brief(self.layers)}. Find them with attrreg.layers(model, x).")
        object.__setattr__(self, "layers", tuple(layers))
        keep_baseline(self, "fill")
        if self.detach is not None and self.detach not in get_args(Side):
            raise ValueError(f"detach must be 'clean', 'masked' or None, got {self.detach!r}. Choose the side to hold constant.")

    @property
    def _sites(self) -> tuple[str, ...]:
        return tuple(map(feature_site, self.layers))

    @property
    def _masked(self) -> At:
        return At(Masked(self.fill))

    def needs(self) -> tuple[Need, ...]:
        """Each layer's activations on both images."""
        return tuple(Value(site, at) for site in self._sites for at in (CLEAN, self._masked))

    def per_image(self, trace: Trace) -> Tensor:
        """The sum of distances."""
        pairs = [self._activations(trace, site) for site in self._sites]
        distance = torch.stack([_norm(clean - masked) for clean, masked in pairs]).sum(dim=0)
        size = torch.stack([_norm(clean.detach()) for clean, _ in pairs]).sum(dim=0)
        images, fill = trace.value(INPUT), trace.value(INPUT, self._masked)
        slack = 64 * torch.finfo(images.dtype).eps * images.abs()  # what a blur makes of an image of one colour
        unchanged = ((fill - images).abs() <= slack).flatten(1).all(dim=1)
        rounding = unchanged & (distance > 0) & trace.annotation.annotated
        # One transfer to the host: each would otherwise wait for the device by itself.
        small, any_rounding, all_unchanged = torch.stack(
            [(distance <= MAY_BE_ROUNDING * size).all(), rounding.any(), unchanged.all()]
        ).tolist()
        if small and not all_unchanged and not any(trace.sees_images(site, self._masked) for site in self._sites):
            raise RuntimeError(
                f"ActivationDifference(layers={self.layers!r}): the activations come from other inputs than the images, so they are the "
                "same on every image. Name a layer that the images reach."
            )
        if any_rounding:
            # Equal images have equal activations, unless others meet them. What rounding leaves is tiny, the gradient of its norm is not.
            if not (all_unchanged or trace.images_apart()):
                rounding &= distance <= 64 * torch.finfo(distance.dtype).eps * size
            distance = distance.masked_fill(rounding, 0)
        return distance

    def _activations(self, trace: Trace, site: str) -> tuple[Tensor, Tensor]:
        """A layer's activations on the images and on the masked images, `(N, ...)`."""
        clean, masked = trace.value(site), trace.value(site, self._masked)
        check_by_image(clean, trace.call.x, site)
        if self.detach == "clean":
            clean = clean.detach()
        if self.detach == "masked":
            masked = masked.detach()
        return clean, masked


def _norm(activations: Tensor) -> Tensor:
    """The length of each image's activations, `(N,)`."""
    norm: Tensor = torch.linalg.vector_norm(activations.flatten(1), dim=1)
    return norm
