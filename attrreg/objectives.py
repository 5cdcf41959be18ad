"""Objectives: what is asked of a map. Each is `(map, mask) -> (N,)`, one penalty per image.

A map is `(N, C, H, W)`; the mask is `(N, 1, H, W)` of the same height and width, 1 = relevant. Any function with that
signature can be passed as an objective; one with settings is a frozen dataclass. An objective that is undefined for
a mask without any relevant pixel says so with `requires_region = True`.

Below, phi is the map, m the mask and o = 1 - m; sums run over channels and pixels of one image.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attrreg.masks import at_least_float32
from attrreg.settings import is_number
from attrreg.spec import Spec

Objective = Callable[[Tensor, Tensor], Tensor]


def _map_and_outside(map: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The map and o, in float32 at least: a sum over a map leaves the range of half precision, and eps is below it.

    Raises:
        ValueError: the mask is not one for each image, or one for all, of the map's height and width: it would meet other images' maps.
    """
    of = map.shape if mask.dim() == 4 else (1,)  # with fewer axes it is one for all: those of (N, H, W) would meet channels
    fits = map.dim() == 4 and 1 < mask.dim() < 5 and mask.shape[-2:] == map.shape[-2:]
    if not (fits and all(size in (1, most) for size, most in zip(mask.shape[:-2], of, strict=False))):
        raise ValueError(
            f"The map must be (N, C, H, W) and the mask (N, 1, H, W), got {tuple(map.shape)} and {tuple(mask.shape)}. Write "
            "mask[:, None] for (N, H, W), and attrreg.masks.resize(mask, size) for another size."
        )
    map = at_least_float32(map)
    return map, 1 - mask.to(map.dtype)


def requires_region(objective: Objective) -> bool:
    """Whether the objective is undefined for an image whose mask has no relevant pixel."""
    return bool(getattr(objective, "requires_region", False))


@dataclass(frozen=True, repr=False)
class SquaredOutside(Spec):
    """sum (o phi)^2: the squared attribution outside the mask.

    Not scale-free: it falls when all attributions shrink, and depends on the number of pixels.

    Source: Ross, Hughes and Doshi-Velez 2017, arXiv 1703.03717 (there summed over the batch too: `presets.rrr_ross2017`).
    """

    def __call__(self, map: Tensor, mask: Tensor) -> Tensor:
        """Penalty `(N,)` of maps `(N, C, H, W)` under masks `(N, 1, H, W)`."""
        map, outside = _map_and_outside(map, mask)
        return (outside * map).square().sum(dim=(1, 2, 3))


@dataclass(frozen=True, repr=False)
class AbsoluteOutside(Spec):
    """sum |o phi|: the absolute attribution outside the mask.

    Not scale-free, as `SquaredOutside`, but it drives attributions to exactly zero rather than to small ones.

    Source: GradMask (Simpson et al. 2019, arXiv 1904.07478) as in arXiv 1910.00199, there summed over the batch too:
        `presets.gradmask_viviano2019`.
    """

    def __call__(self, map: Tensor, mask: Tensor) -> Tensor:
        """Penalty `(N,)` of maps `(N, C, H, W)` under masks `(N, 1, H, W)`."""
        map, outside = _map_and_outside(map, mask)
        return (outside * map).abs().sum(dim=(1, 2, 3))


@dataclass(frozen=True, repr=False)
class LogOutside(Spec):
    """log(1 + (sum |o phi|)^2): the default, at a weight of 1.

    For a gradient of the images, the sum is the most that the score can change, to first order, when each irrelevant value of the
    images changes by one, whatever the resolution; scores count in nats, as the cross-entropy does. Where the sum is large, as in most
    untrained networks, its *relative* change is penalised, so that the term does not drown the loss. Where it is below one nat,
    and hardly moves a decision, the penalty fades, so that a model that has yet to learn is not pressed into ignoring its images.
    Normalise images, so that one is a usual change.

    Source: ours; the sum is GradMask's, arXiv 1910.00199. Measured in `benchmarks/default.py`.
    """

    def __call__(self, map: Tensor, mask: Tensor) -> Tensor:
        """Penalty `(N,)` of maps `(N, C, H, W)` under masks `(N, 1, H, W)`."""
        total = AbsoluteOutside()(map, mask)
        large = total > 1e8  # where 1 is nothing beside its square, which float32 may have no room for
        return torch.where(large, 2 * torch.where(large, total, 1).log(), torch.where(large, 0, total).square().log1p())


@dataclass(frozen=True, repr=False)
class NetOutside(Spec):
    """|sum o phi|: what the outside contributes to the score on balance.

    For path methods from `baselines.Masked()`, whose maps are zero inside, the sum of phi is what replacing the irrelevant part changes
    in the score. A map that is positive here and negative there may satisfy it; for maps of gradients take `AbsoluteOutside`.

    Source: ours, by the completeness of integrated gradients, arXiv 1703.01365.
    """

    def __call__(self, map: Tensor, mask: Tensor) -> Tensor:
        """Penalty `(N,)` of maps `(N, C, H, W)` under masks `(N, 1, H, W)`."""
        map, outside = _map_and_outside(map, mask)
        return (outside * map).sum(dim=(1, 2, 3)).abs()


@dataclass(frozen=True, repr=False)
class OutsideFraction(Spec):
    """sum o |phi| / (sum |phi| + eps): the share of attribution outside the mask, in [0, 1].

    Free of the scale of the attributions, of the image size and of the batch size. Zero, with zero gradient, where the map is zero
    everywhere (a head initialised with zeros).

    Args:
        eps: keeps the share finite for a map that is zero everywhere; in units of the map, finite and at least 0.

    Raises:
        ValueError: `eps` is negative or not finite.
    """

    eps: float = 1e-12
    requires_region: ClassVar[bool] = True  # with an empty mask the share is 1 whatever the model does

    def __post_init__(self) -> None:
        _check_eps(self, self.eps)

    def __call__(self, map: Tensor, mask: Tensor) -> Tensor:
        """Share `(N,)` of maps `(N, C, H, W)` under masks `(N, 1, H, W)`."""
        map, outside = _map_and_outside(map, mask)
        size = map.abs()
        return (outside * size).sum(dim=(1, 2, 3)) / (size.sum(dim=(1, 2, 3)) + self.eps)


@dataclass(frozen=True, repr=False)
class Energy(Spec):
    """1 - sum m phi+ / sum phi+, with phi+ = relu(phi): the share of positive attribution outside the mask, in [0, 1].

    The formula is constant, and so without gradient, for an image whose map is nowhere positive. For such an image |phi|
    takes the place of phi+, so that the penalty does not go silent; a map that is zero everywhere gives 0.

    Args:
        eps: keeps the share finite for a map that is zero everywhere; in units of the map, finite and at least 0.

    Raises:
        ValueError: `eps` is negative or not finite.

    Source: the energy loss of Rao et al. 2023 (Model Guidance), arXiv 2303.11932. There a map of several channels is summed over them, with
        signs, before phi+ (see `docs/objectives.md` for theirs); and a map that is nowhere positive has no gradient.
    """

    eps: float = 1e-12
    requires_region: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_eps(self, self.eps)

    def __call__(self, map: Tensor, mask: Tensor) -> Tensor:
        """Share `(N,)` of maps `(N, C, H, W)` under masks `(N, 1, H, W)`."""
        map, outside = _map_and_outside(map, mask)
        positive = map.relu()
        nowhere = positive.sum(dim=(1, 2, 3), keepdim=True) <= 0
        size = torch.where(nowhere, map.abs(), positive)
        return (outside * size).sum(dim=(1, 2, 3)) / (size.sum(dim=(1, 2, 3)) + self.eps)


@dataclass(frozen=True, repr=False)
class TotalVariation(Spec):
    """sum |phi(i+1, j) - phi(i, j)| + |phi(i, j+1) - phi(i, j)|: how rough a map is, wherever that is.

    A prior that does not look at the mask, which may then be any, as `torch.zeros(H, W)`. To compare with: if it helps as much, it was not
    the masks that helped. Not scale-free.

    Raises:
        ValueError: in a call, the map has one cell, which has no neighbours.

    Source: the image prior of Erion et al. 2021, arXiv 1906.10670 (there of expected gradients).
    """

    def __call__(self, map: Tensor, mask: Tensor) -> Tensor:
        """Penalty `(N,)` of maps `(N, C, H, W)`; `mask` is not read."""
        map = at_least_float32(map)
        if map.shape[2] * map.shape[3] == 1:
            raise ValueError("TotalVariation: the map has one cell, which has no neighbours. Name a layer with a finer map.")
        return map.diff(dim=2).abs().sum(dim=(1, 2, 3)) + map.diff(dim=3).abs().sum(dim=(1, 2, 3))


def _check_eps(objective: Spec, eps: float) -> None:
    if not is_number(eps) or eps < 0:
        raise ValueError(
            f"{type(objective).__name__}: eps must be a finite number of at least 0, got {eps!r}. Write for example eps=1e-12."
        )
