"""Paths whose places are points of their own, for terms that read layers there: `points.Path` sums gradients at the image alone."""

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
    def needs_mask(self) -> bool:  # type: ignore[override]
        """Whether the baseline requires a mask."""
        return self.baseline.needs_mask

    def __call__(self, x: Tensor, mask: Tensor | None, generator: torch.Generator) -> Tensor:
        """The image at this place."""
        start = self.baseline(x, mask, generator)
        return start + self.alpha * (x - start)


def path_points(path: Any, extra_steps: int = 0) -> list[tuple[At, float]]:
    """The places of a path as points, each with its quadrature weight.

    Args:
        path: a regularizer with `baseline`, `rule` and `steps`, as `check_path` leaves them.
        extra_steps: places beyond `steps`.
    """
    return [(At(Between(path.baseline, alpha)), weight) for alpha, weight in places(path.rule, path.steps + extra_steps)]


def check_path(regularizer: Any, least: int = 2) -> None:
    """Check baseline, rule and steps of such a path, and keep the baseline as a `Baseline`; `least`: as in `check_rule`.

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
