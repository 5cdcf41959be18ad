"""Needs: what a term asks of a trace before any pass runs. Hashable, so that equal needs are met once."""

from __future__ import annotations

from dataclasses import dataclass

from attrreg.points import CLEAN, Point
from attrreg.scores import Score


@dataclass(frozen=True)
class Value:
    """The value at a site."""

    site: str
    at: Point = CLEAN


@dataclass(frozen=True)
class Grad:
    """The gradient, at a site, of the sum of a score over the batch. On a path: weighted and summed along it."""

    site: str
    score: Score
    at: Point = CLEAN


@dataclass(frozen=True)
class Scored:
    """A score of each image."""

    score: Score
    at: Point = CLEAN

    @property
    def site(self) -> str:
        """What the score reads."""
        return self.score.site


Need = Value | Grad | Scored
