"""Measures of a map under a mask: each is `(map, mask) -> (N,)`, one number per image, NaN where it is undefined.

A map is `(N, C, H, W)` or `(N, H, W)`, as `.attribute` returns it; a mask is what the regularizers take, of any size, 1 = relevant.
A batch without images, such as the annotated ones of a batch that has none, gives an empty result, `(0,)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from attrreg import masks
from attrreg.objectives import OutsideFraction
from attrreg.settings import check_count, keep_count, keep_flag
from attrreg.spec import Spec

Measure = Callable[[Tensor, Tensor], Tensor]


def share_inside(map: Tensor, mask: Tensor) -> Tensor:
    """sum m |phi| / sum |phi|: the share of attribution inside the mask, in [0, 1].

    Args:
        map: `(N, C, H, W)` or `(N, H, W)`, floating point.
        mask: `(N, H, W)`, `(N, 1, H, W)` or `(H, W)`, boolean or in [0, 1], of any size.

    Returns:
        `(N,)`; NaN where the map is zero everywhere. The complement of `objectives.OutsideFraction`.

    Raises:
        TypeError, ValueError: naming `map` or `mask`.
    """
    return 1 - OutsideFraction(eps=0.0)(*_aligned(map, mask))


def energy_pointing_game(map: Tensor, mask: Tensor) -> Tensor:
    """sum m phi+ / sum phi+, with phi+ = relu(phi): the share of positive attribution inside the mask, in [0, 1].

    Args:
        map, mask: as in `share_inside`.

    Returns:
        `(N,)`; NaN where the map is nowhere positive. There `objectives.Energy`, which needs a gradient, falls back to |phi|.

    Raises:
        TypeError, ValueError: naming `map` or `mask`.

    Source:
        Score-CAM, Wang et al. 2020, arXiv 1910.01279.
    """
    map, relevant = _aligned(map, mask)
    return 1 - OutsideFraction(eps=0.0)(map.relu(), relevant)


def pointing_game(map: Tensor, mask: Tensor, tolerance: int = 0, signed: bool = False) -> Tensor:
    """1 where the map's highest pixel lies in the mask, or no further than `tolerance` from it, else 0.

    Where several pixels are the highest, the value is the share of them that hit. A pixel of a soft mask is in it from 0.5 on.

    Args:
        map, mask: as in `share_inside`. The mask is resized to the map.
        tolerance: pixels of the map, in all eight directions.
        signed: take the sum of phi over channels, as for Grad-CAM; else of |phi|, as for gradients.

    Returns:
        `(N,)` in [0, 1]; NaN where the map is constant, so that it points at nothing, or too coarse: where the mask has relevant pixels,
        but fills no pixel of the map by half. Enlarge such maps first.

    Raises:
        TypeError, ValueError: naming the argument.

    Source:
        Zhang et al. 2016, arXiv 1608.00507, with a tolerance of 15 pixels, and there averaged over classes.
    """
    check_count("tolerance", tolerance, 0)
    tolerance = int(tolerance)  # 2 * tolerance + 1 could overflow one of NumPy's small integers
    map, relevant = _aligned(map, mask)
    saliency = _saliency(map, signed)
    inside = relevant >= 0.5
    lost = (relevant > 0).flatten(1).any(dim=1) & ~inside.flatten(1).any(dim=1)
    allowed = torch.nn.functional.max_pool2d(inside.to(saliency.dtype), 2 * tolerance + 1, stride=1, padding=tolerance).flatten(1)
    highest = (saliency == saliency.amax(dim=1, keepdim=True)).to(saliency.dtype)
    return _defined((highest * allowed).sum(dim=1) / highest.sum(dim=1), saliency).masked_fill(lost, math.nan)


@dataclass(frozen=True, repr=False)
class PointingGame(Spec):
    """`pointing_game` with its settings, as a measure.

    Args:
        tolerance, signed: as there.

    Raises:
        TypeError, ValueError: naming the setting.
    """

    tolerance: int = 0
    signed: bool = False

    def __post_init__(self) -> None:
        keep_count(self, "tolerance", 0)
        keep_flag(self, "signed")

    def __call__(self, map: Tensor, mask: Tensor) -> Tensor:
        """Hits `(N,)`."""
        return pointing_game(map, mask, self.tolerance, self.signed)


def iou_at_mask_size(map: Tensor, mask: Tensor, signed: bool = False) -> Tensor:
    """Intersection over union of the mask and the map's highest pixels, as many as the mask has.

    Pixels that tie at the threshold share the places that are left, and each counts in part, so that their order does not matter.

    Args:
        map, mask: as in `share_inside`. The mask is resized to the map; a pixel is in it from 0.5 on.
        signed: as in `pointing_game`.

    Returns:
        `(N,)` in [0, 1]; NaN where the map is constant or no pixel is in the mask.

    Raises:
        TypeError, ValueError: naming `map` or `mask`.

    Source:
        The localisation score of the founding paper, arXiv 1910.00199, of |input gradient|, integrated gradients and occlusion.
    """
    map, relevant = _aligned(map, mask)
    saliency, inside = _saliency(map, signed), (relevant >= 0.5).flatten(1)
    size = inside.sum(dim=1)
    ordered = saliency.sort(dim=1, descending=True).values
    threshold = ordered.gather(1, (size - 1).clamp(min=0).unsqueeze(1))
    above, level = saliency > threshold, saliency == threshold
    part = (size - above.sum(dim=1)).to(saliency.dtype) / level.sum(dim=1)
    both = (above & inside).sum(dim=1) + part * (level & inside).sum(dim=1)
    return _defined(both / (2 * size - both), saliency)


def _aligned(map: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The map as `(N, C, H, W)` of at least float32, and the mask at its size, checked."""
    if not isinstance(map, Tensor) or not map.is_floating_point():
        kind = map.dtype if isinstance(map, Tensor) else type(map).__name__
        raise TypeError(f"map must be a floating-point tensor, got {kind}. Pass what `.attribute` returns.")
    if map.dim() == 3:
        map = map.unsqueeze(1)
    if map.dim() != 4 or 0 in map.shape[1:]:
        raise ValueError(f"map must be (N, C, H, W) or (N, H, W), got {tuple(map.shape)}. Add or drop axes.")
    map = masks.at_least_float32(map.detach())
    if not bool(map.isfinite().all()):
        raise ValueError("map has values that are not finite. Look for what made them so in the model.")
    relevant = masks.check(mask, map, None).relevant
    return map, masks.resize(relevant, (map.shape[-2], map.shape[-1]))


def _saliency(map: Tensor, signed: bool) -> Tensor:
    """One number a pixel, `(N, H * W)`: the sum over channels of phi, or of |phi|."""
    return (map if signed else map.abs()).sum(dim=1).flatten(1)


def _defined(value: Tensor, saliency: Tensor) -> Tensor:
    """The values `(N,)`, NaN where all pixels are alike."""
    return value.masked_fill(saliency.amax(dim=1) == saliency.amin(dim=1), math.nan)
