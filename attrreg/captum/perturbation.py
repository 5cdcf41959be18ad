"""Attributions by taking parts of the image away: no gradient is taken, so nothing is differentiated twice."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attrreg.baselines import Baseline, Fixed, Zero, as_baseline
from attrreg.needs import Need, Scored
from attrreg.objectives import Objective, SquaredOutside, check_score_and_objective
from attrreg.points import CLEAN, At
from attrreg.regularizer import MapRegularizer
from attrreg.scores import ByTarget, Score
from attrreg.trace import Trace


@dataclass(frozen=True, repr=False)
class Without(Baseline):
    """The image with one of its segments replaced by a baseline."""

    segments: Fixed
    segment: int
    baseline: Baseline

    @property
    def needs_mask(self) -> bool:
        """Whether the baseline requires a mask."""
        return self.baseline.needs_mask

    def region(self, x: Tensor) -> Tensor:
        """Where the segment is, boolean, of the shape of `x`.

        Raises:
            ValueError: the segments do not fit the images.
        """
        here = self.segments.image.to(x.device) == self.segment
        try:
            return here.expand_as(x)
        except RuntimeError as error:
            raise ValueError(
                f"FeatureAblation: segments of shape {tuple(here.shape)} do not broadcast to x of shape {tuple(x.shape)}. Give them as "
                "(H, W), (C, H, W) or (1, C, H, W)."
            ) from error

    def __call__(self, x: Tensor, mask: Tensor | None, generator: torch.Generator) -> Tensor:
        """`x` without the segment."""
        return torch.where(self.region(x), self.baseline(x, mask, generator), x)


@dataclass(frozen=True, repr=False)
class FeatureAblation(MapRegularizer):
    """By how much the score falls when a segment of the image is replaced.

    phi = score(x) - score(x with the segment from b), at each pixel of the segment, `(N, C, H, W)`, in units of the score.

    Args:
        segments: integers that number the segments, `(H, W)` or anything that broadcasts to `x`: a grid, superpixels.
        baseline: what takes a segment's place: a number, a tensor that broadcasts to `x`, or one of `attrreg.baselines` that
            does not draw.
        score: what is compared; by default the target's logit, or the sum of log-probabilities without targets.
        objective: what is asked of phi.

    Raises:
        TypeError, ValueError: naming the setting.

    Cost:
        One forward a segment, and the clean one, which is free when attached. No inner backward, and nothing is differentiated
        twice: it runs on compiled models too. What made x gets no gradient through the ablated images.

    Source:
        Equals Captum's `FeatureAblation`; Zeiler and Fergus 2013, arXiv 1311.2901, have a sliding window.
    """

    segments: Fixed | Tensor
    baseline: Baseline | Tensor | float = Zero()
    score: Score = ByTarget()
    objective: Objective = SquaredOutside()

    def __post_init__(self) -> None:
        check_score_and_objective(self)
        segments = self.segments.image if isinstance(self.segments, Fixed) else self.segments
        if not isinstance(segments, Tensor) or segments.is_floating_point() or segments.dtype is torch.bool:
            kind = segments.dtype if isinstance(segments, Tensor) else type(segments).__name__
            raise TypeError(f"FeatureAblation: segments must be a tensor of integers, got {kind}. Number the segments of the image.")
        if segments.dim() == 4 and segments.shape[0] != 1:
            raise ValueError(
                f"FeatureAblation: segments are {tuple(segments.shape)}, but there is one set of segments for all images. Give (H, W), "
                "(C, H, W) or (1, C, H, W)."
            )
        baseline = as_baseline(self.baseline)
        if baseline.draws:
            raise ValueError(f"FeatureAblation: {baseline!r} would draw anew for each segment. Use a baseline that does not draw.")
        object.__setattr__(self, "segments", Fixed(segments))
        object.__setattr__(self, "baseline", baseline)

    @property
    def _points(self) -> list[At]:
        assert isinstance(self.segments, Fixed) and isinstance(self.baseline, Baseline)
        return [At(Without(self.segments, number, self.baseline)) for number in self.segments.image.unique().tolist()]

    def needs(self) -> tuple[Need, ...]:
        """The score of the image, and without each segment."""
        return tuple(Scored(self.score, at) for at in (CLEAN, *self._points))

    def attribution(self, trace: Trace) -> Tensor:
        """The falls, each on its segment."""
        x, clean = trace.call.x.detach(), trace.score(self.score)
        falls = []
        for point in self._points:
            assert isinstance(point.image, Without)
            fall = (clean - trace.score(self.score, point)).view(-1, 1, 1, 1)
            falls.append(torch.where(point.image.region(x), fall, torch.zeros_like(fall)))
        return torch.stack(falls).sum(dim=0)
