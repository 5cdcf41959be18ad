"""Attributions by taking parts of the image away: no gradient is taken, so nothing is differentiated twice."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from attrreg.attributions.path import check_share_varies
from attrreg.baselines import Baseline, Fixed, Zero, as_baseline, keep_baseline
from attrreg.needs import Need, Scored
from attrreg.objectives import LogOutside, Objective
from attrreg.points import CLEAN, At, Point
from attrreg.regularizer import MapRegularizer
from attrreg.scores import ByTarget, Score
from attrreg.trace import Trace


@dataclass(frozen=True, repr=False)
class Without(Baseline):
    """The image with some of its segments replaced by a baseline."""

    segments: Fixed
    removed: tuple[int, ...]
    baseline: Baseline

    @property
    def draws(self) -> bool:  # type: ignore[override]
        """Whether the baseline draws."""
        return self.baseline.draws

    @property
    def needs_mask(self) -> bool:  # type: ignore[override]
        """Whether the baseline requires a mask."""
        return self.baseline.needs_mask

    def region(self, x: Tensor) -> Tensor:
        """Where the segments are, boolean, of the shape of `x`.

        Raises:
            ValueError: the segments do not fit the images.
        """
        numbers = self.segments.image.to(x.device)
        here = torch.isin(numbers, torch.tensor(self.removed, device=x.device))
        try:
            return here.expand_as(x)
        except RuntimeError as error:
            raise ValueError(
                f"segments of shape {tuple(here.shape)} do not broadcast to x of shape {tuple(x.shape)}. Give them as "
                "(H, W), (C, H, W) or (1, C, H, W)."
            ) from error

    def __call__(self, x: Tensor, mask: Tensor | None, generator: torch.Generator) -> Tensor:
        """`x` without the segments."""
        return torch.where(self.region(x), self.baseline(x, mask, generator), x)


class _OnSegments(MapRegularizer):
    """A map with one value a segment; kept are the segments as an object that can be compared, and the baseline as a `Baseline`."""

    segments: Fixed | Tensor
    baseline: Baseline | Tensor | float

    def __post_init__(self) -> None:
        super().__post_init__()
        name, segments = type(self).__name__, self.segments.image if isinstance(self.segments, Fixed) else self.segments
        if not isinstance(segments, Tensor) or segments.is_floating_point() or segments.dtype is torch.bool:
            kind = segments.dtype if isinstance(segments, Tensor) else type(segments).__name__
            raise TypeError(f"{name}: segments must be a tensor of integers, got {kind}. Number the segments of the image.")
        if segments.dim() == 4 and segments.shape[0] != 1:
            raise ValueError(
                f"{name}: segments are {tuple(segments.shape)}, but there is one set of segments for all images. Give (H, W), (C, H, W) or "
                "(1, C, H, W)."
            )
        object.__setattr__(self, "segments", Fixed(segments))
        keep_baseline(self)
        check_share_varies(self)

    @property
    def _numbers(self) -> tuple[int, ...]:
        assert isinstance(self.segments, Fixed)
        return tuple(self.segments.image.unique().tolist())

    def _without(self, *removed: int) -> Without:
        assert isinstance(self.segments, Fixed)
        return Without(self.segments, removed, as_baseline(self.baseline))

    def _map(self, values: Mapping[int, Tensor], trace: Trace) -> Tensor:
        """The map that has, at the pixels of each segment, its value `(N,)`."""
        x = trace.call.x.detach()
        map = torch.zeros_like(x)
        for number, value in values.items():
            map = map + torch.where(self._without(number).region(x), value.view(-1, 1, 1, 1), 0)
        return map


@dataclass(frozen=True, repr=False)
class FeatureAblation(_OnSegments):
    """By how much the score falls when a segment of the image is replaced.

    phi = score(x) - score(x with the segment from b), at each pixel of the segment, `(N, C, H, W)`, in units of the score.

    Args:
        segments: integers that number the segments, `(H, W)` or anything that broadcasts to `x`: a grid, superpixels.
        baseline: what takes a segment's place: a number, a tensor that broadcasts to `x`, or one of `attrreg.baselines`. One that draws is
            drawn anew for each segment.
        score: what is compared; by default the target's logit, or the sum of log-probabilities without targets.
        objective: the penalty of phi under the mask, `(map, mask) -> (N,)`: see `attrreg.objectives`.

    Raises:
        TypeError, ValueError: naming the setting.

    Cost:
        One forward a segment, and the clean one, which is free when attached. No inner backward, so nothing is differentiated twice. No
        gradient flows to `x` through the ablated images.

    Source:
        Equals Captum's `FeatureAblation`, and with `baselines.OtherImage()` its `FeaturePermutation`, except that Captum's permutation may
        leave some images where they are. Zeiler and Fergus 2013, arXiv 1311.2901, use a sliding window.
    """

    segments: Fixed | Tensor
    baseline: Baseline | Tensor | float = Zero()
    score: Score = ByTarget(contrast=False)
    objective: Objective = LogOutside()

    @property
    def _points(self) -> dict[int, Point]:
        """Where the score is taken without each segment."""
        return {number: At(self._without(number)) for number in self._numbers}

    def needs(self) -> tuple[Need, ...]:
        """The score of the image, and without each segment."""
        return tuple(Scored(self.score, at) for at in (CLEAN, *self._points.values()))

    def attribution(self, trace: Trace) -> Tensor:
        """The falls, each on its segment."""
        clean = trace.score(self.score)
        return self._map({number: clean - trace.score(self.score, at) for number, at in self._points.items()}, trace)


MAX_SEGMENTS = 10  # each one more doubles the forwards


@dataclass(frozen=True, repr=False)
class ShapleyValues(_OnSegments):
    """What a segment adds to the score on average, over all orders in which segments could be put into the image.

    phi_i = sum over sets S of other segments of |S|! (K - |S| - 1)! / K! (score(S and i) - score(S)), at each pixel of segment i,
    `(N, C, H, W)`, in units of the score. score(S) is that of the image whose segments outside S are replaced by the baseline.

    Args:
        segments: integers that number the segments, as in `FeatureAblation`; at most 10 different ones.
        baseline: what takes a segment's place, as in `FeatureAblation`; none that draws.
        score: what is compared; by default the target's logit, or the sum of log-probabilities without targets.
        objective: the penalty of phi under the mask, `(map, mask) -> (N,)`: see `attrreg.objectives`.

    Raises:
        TypeError, ValueError: naming the setting.

    Cost:
        2^K - 1 forwards for K segments, and the clean one, which is free when attached. No inner backward. No gradient flows to `x` through
        the ablated images.

    Source:
        Shapley 1953; Castro et al. 2009. Equals Captum's `ShapleyValues`, which `ShapleyValueSampling` and `KernelShap` estimate.
    """

    segments: Fixed | Tensor
    baseline: Baseline | Tensor | float = Zero()
    score: Score = ByTarget(contrast=False)
    objective: Objective = LogOutside()

    def __post_init__(self) -> None:
        super().__post_init__()
        baseline = as_baseline(self.baseline)
        if baseline.draws:
            raise ValueError(
                f"ShapleyValues: {type(baseline).__name__} would draw anew for each set of segments. Use a baseline that does not draw."
            )
        count = len(self._numbers)
        if count > MAX_SEGMENTS:
            raise ValueError(
                f"ShapleyValues: {count} segments take 2**{count} forwards. Give at most {MAX_SEGMENTS}, or use FeatureAblation."
            )

    @property
    def _points(self) -> dict[frozenset[int], Point]:
        """Where the score is taken of each set of segments that are in the image."""
        numbers = self._numbers
        sets = [frozenset(some) for size in range(len(numbers) + 1) for some in combinations(numbers, size)]
        removed = {some: tuple(number for number in numbers if number not in some) for some in sets}
        return {some: At(self._without(*rest)) if rest else CLEAN for some, rest in removed.items()}

    def needs(self) -> tuple[Need, ...]:
        """The score of each set of segments."""
        return tuple(Scored(self.score, at) for at in self._points.values())

    def attribution(self, trace: Trace) -> Tensor:
        """The mean gains, each on its segment."""
        scores = {present: trace.score(self.score, at) for present, at in self._points.items()}
        numbers = self._numbers
        means: dict[int, Tensor] = {}
        for number in numbers:
            gains = []
            for present in (some for some in scores if number not in some):
                weight = 1 / (len(numbers) * math.comb(len(numbers) - 1, len(present)))
                gains.append(weight * (scores[present | {number}] - scores[present]))
            means[number] = torch.stack(gains).sum(dim=0)
        return self._map(means, trace)
