"""Places on the way from a baseline to the image, as points of their own: for terms that read more than gradients at the image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attrreg.attributions.path import check_rule
from attrreg.baselines import Baseline, keep_baseline
from attrreg.points import At, places


@dataclass(frozen=True, repr=False)
class Between(Baseline):
    """b + alpha (x - b): an image on the straight path from a baseline."""

    baseline: Baseline
    alpha: float

    @property
    def needs_mask(self) -> bool:
        """Whether the baseline requires a mask."""
        return self.baseline.needs_mask

    def __call__(self, x: Tensor, mask: Tensor | None, generator: torch.Generator) -> Tensor:
        """The image at this place."""
        start = self.baseline(x, mask, generator)
        return start + self.alpha * (x - start)


def stops(path: Any, more: int = 0) -> list[tuple[At, float]]:
    """The places of a path that `check_path` has checked, or of one with some more steps, as points, each with its weight."""
    return [(At(Between(path.baseline, alpha)), weight) for alpha, weight in places(path.rule, path.steps + more)]


def check_path(regularizer: Any, least: int = 2) -> None:
    """Check the settings of a path whose places are points of their own, as `check_rule` does, and keep its baseline as an object.

    Raises:
        TypeError, ValueError: naming the setting.
    """
    baseline = keep_baseline(regularizer)
    if baseline.draws:
        raise ValueError(
            f"{type(regularizer).__name__}: each place would draw another {type(baseline).__name__}, and there would be no path. Use a "
            "baseline that does not draw."
        )
    check_rule(regularizer, least)
