"""Engines: how the parameter gradient of a penalty is obtained."""

from __future__ import annotations

import math
from abc import ABC
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attrreg.settings import is_number
from attrreg.spec import Spec


class Engine(Spec, ABC):
    """How the parameter gradient of a penalty is obtained.

    Attributes:
        twice: passes keep graphs that can be differentiated twice.
    """

    twice: ClassVar[bool]


@dataclass(frozen=True, repr=False)
class DoubleBackward(Engine):
    """Differentiate the attribution's own backward: exact. The default.

    Cost:
        A training step with an attached `InputGradient` takes twice the operations of one without, the loss's own passes counted in both.
    """

    twice: ClassVar[bool] = True


@dataclass(frozen=True, repr=False)
class FiniteDifference(Engine):
    """Difference the score along the direction in which the penalty moves its attributions: first order only.

    With g the gradients of a score s at the sites, P(g) the penalty and v = dP/dg, the missing gradient is that of the
    directional derivative of s along v, taken as [s(a + eps v) - s(a - eps v)] / 2 eps, all sites a moved at once. The
    penalty's value, and its gradient through activations, are exact.

    For models that cannot be differentiated twice, compiled or with fused attention, and for sharded ones whose weights must not all be
    gathered at once. On smooth networks without BatchNorm the gradient is close to the exact one (cosines: `docs/paying_less.md`). On
    ReLU networks it is a smoothed estimator, not an approximation of the exact gradient, because the kinks that a step crosses count at
    first order. One step serves the whole batch, so that under objectives that divide by a map's size an image with a tiny map makes it
    tiny for all, and the part of the others may be lost in rounding.

    Args:
        step: length of eps v relative to the site's activations (to units, where those are all zero), of the images that move; positive.

    Raises:
        ValueError: `step` is not positive.

    Cost:
        Two forwards and their gradients for each point and score, besides the attribution's own forward and backward. They run in
        the precision of the images, without any autocast but the model's own (where images, weights or other inputs have a half type: with
        the loop's, where a larger step is better: bfloat16 has 8 bits), and repeat the random draws of the first pass. On a path, the
        graphs of both forwards are held for each place, whatever its `chunk`.

    Source:
        As the Hessian-vector products of DARTS, arXiv 1806.09055, here with several sites and activations.
    """

    step: float = 1e-2
    twice: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not is_number(self.step) or self.step <= 0:
            raise ValueError(f"step must be a positive number, got {self.step!r}. Write for example FiniteDifference(step=1e-2).")

    def scale(self, places: Sequence[Tensor], directions: Sequence[Tensor]) -> Tensor:
        """The factor eps by which all sites move along their directions: the least over sites of step |a| / |v|.

        Args:
            places: the values a at the sites, images first.
            directions: the directions v, of the same shapes.

        Returns:
            A 0-dim tensor; 0 where all directions are zero.
        """
        with torch.no_grad():
            found = []
            for place, way in zip(places, directions, strict=True):
                lengths, ways = (rows.to(way.dtype).reshape(len(way), -1).norm(dim=1) for rows in (place, way))
                moves = ways > 0  # the others, as images without annotation, say nothing of a step
                norm = torch.where(moves, lengths, 0).norm()
                # A place that is zero everywhere, such as the start of a path, has no length: there the step is that of units.
                units = (moves.sum() * place[:1].numel()).to(norm.dtype).sqrt()
                found.append(torch.where(norm > 0, norm, units) / ways.norm())
            ratios = torch.stack(found)
            least = self.step * torch.where(ratios > 0, ratios, math.inf).amin()
            return torch.where(least.isfinite(), least, 0.0)
