"""Measures of a map under a mask: each is `(map, mask) -> (N,)`, one number an image, NaN where it is undefined.

A map is `(N, C, H, W)` or `(N, H, W)`, as `.attribute` returns it; a mask is what the regularizers take, of any size, 1 = relevant.
Of no images, as of a batch in which none is annotated, there are no numbers: `(0,)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from attrreg import masks
from attrreg.objectives import OutsideFraction
from attrreg.settings import check_count
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

    Several highest pixels share the vote. A soft pixel is in the mask from a half on.

    Args:
        map, mask: as in `share_inside`. The mask is resized to the map.
        tolerance: pixels of the map, in all eight directions.
        signed: take the sum of phi over channels, as for Grad-CAM; else of |phi|, as for gradients.

    Returns:
        `(N,)`; NaN where the map is constant, so that nothing is pointed at, or so coarse that the mask fills half of none of its pixels:
        enlarge it.

    Raises:
        TypeError, ValueError: naming the argument.

    Source:
        Zhang et al. 2016, arXiv 1608.00507, with a tolerance of 15 pixels, and there averaged over classes.
    """
    check_count("tolerance", tolerance, 0)
    tolerance = int(tolerance)  # small ones of NumPy's overflow
    map, relevant = _aligned(map, mask)
    height = _height(map, signed)
    inside = relevant >= 0.5
    lost = (relevant > 0).flatten(1).any(dim=1) & ~inside.flatten(1).any(dim=1)
    allowed = torch.nn.functional.max_pool2d(inside.to(height.dtype), 2 * tolerance + 1, stride=1, padding=tolerance).flatten(1)
    highest = (height == height.amax(dim=1, keepdim=True)).to(height.dtype)
    return _defined((highest * allowed).sum(dim=1) / highest.sum(dim=1), height).masked_fill(lost, math.nan)


@dataclass(frozen=True, repr=False)
class PointingGame(Spec):
    """`pointing_game` with its settings, as a measure.

    Args:
        tolerance, signed: as there.
    """

    tolerance: int = 0
    signed: bool = False

    def __call__(self, map: Tensor, mask: Tensor) -> Tensor:
        """Hits `(N,)`."""
        return pointing_game(map, mask, self.tolerance, self.signed)


def iou_at_mask_size(map: Tensor, mask: Tensor, signed: bool = False) -> Tensor:
    """Intersection over union of the mask and the map's highest pixels, as many as the mask has.

    Of pixels that tie at the threshold each counts in part, as many parts as there is room for: the order of pixels plays no role.

    Args:
        map, mask: as in `share_inside`. The mask is resized to the map, where a pixel is in it from a half on.
        signed: as in `pointing_game`.

    Returns:
        `(N,)` in [0, 1]; NaN where the map is constant or no pixel is in the mask.

    Raises:
        TypeError, ValueError: naming `map` or `mask`.

    Source:
        The localisation score of the founding paper, arXiv 1910.00199, of |input gradient|, integrated gradients and occlusion.
    """
    map, relevant = _aligned(map, mask)
    height, inside = _height(map, signed), (relevant >= 0.5).flatten(1)
    size = inside.sum(dim=1)
    ordered = height.sort(dim=1, descending=True).values
    threshold = ordered.gather(1, (size - 1).clamp(min=0).unsqueeze(1))
    above, level = height > threshold, height == threshold
    part = (size - above.sum(dim=1)).to(height.dtype) / level.sum(dim=1)
    both = (above & inside).sum(dim=1) + part * (level & inside).sum(dim=1)
    return _defined(both / (2 * size - both), height)


def _aligned(map: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The map as `(N, C, H, W)` of at least float32, and the mask at its size, checked."""
    if not isinstance(map, Tensor) or not map.is_floating_point():
        kind = map.dtype if isinstance(map, Tensor) else type(map).__name__
        raise TypeError(f"map must be a floating-point tensor, got {kind}. Pass what `.attribute` returns.")
    if map.dim() == 3:
        map = map.unsqueeze(1)
    if map.dim() != 4 or 0 in map.shape[1:]:
        raise ValueError(f"map must be (N, C, H, W) or (N, H, W), got {tuple(map.shape)}. Add or drop axes.")
    map = map.detach().to(masks.penalty_dtype(map.dtype))
    if not bool(map.isfinite().all()):
        raise ValueError("map has values that are not finite. Look for what made them so in the model.")
    relevant = masks.check(mask, map, None).relevant
    return map, masks.resize(relevant, (map.shape[-2], map.shape[-1]))


def _height(map: Tensor, signed: bool) -> Tensor:
    return (map if signed else map.abs()).sum(dim=1).flatten(1)


def _defined(value: Tensor, height: Tensor) -> Tensor:
    return torch.where(height.amax(dim=1) > height.amin(dim=1), value, torch.full_like(value, float("nan")))
