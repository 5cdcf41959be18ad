"""Needs: what a term asks of a trace before any pass runs, and whether it can be met. Hashable, so that equal needs are met once."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from attrreg import sites
from attrreg.call import Call
from attrreg.engines import Engine, FiniteDifference
from attrreg.points import CLEAN, Ascent, At, Clean, Path, Point, Rectified
from attrreg.scores import Score
from attrreg.settings import brief


@dataclass(frozen=True)
class Value:
    """The value at a site."""

    site: str
    at: Point = CLEAN

    def __post_init__(self) -> None:
        sites.check_layer_name(self.site)
        _check_point(self.at)


@dataclass(frozen=True)
class Grad:
    """The gradient, at a site, of the sum of a score over the batch. On a path: weighted and summed along it."""

    site: str
    score: Score
    at: Point = CLEAN

    def __post_init__(self) -> None:
        sites.check_layer_name(self.site)
        _check_score(self.score)
        _check_point(self.at)


@dataclass(frozen=True)
class Scored:
    """A score of each image."""

    score: Score
    at: Point = CLEAN

    def __post_init__(self) -> None:
        _check_score(self.score)
        _check_point(self.at)

    @property
    def site(self) -> str:
        """What the score reads."""
        return self.score.site


Need = Value | Grad | Scored


def _check_score(score: object) -> None:
    if not isinstance(score, Score):
        raise TypeError(f"score must be a scores.Score, got {brief(score)}. Write for example scores.TargetLogit().")


def _check_point(point: object) -> None:
    """Check that a pass can be run there: of what is no point, or a point of another class, it would run on the images as they are."""
    if not isinstance(point, Clean | At | Rectified | Ascent | Path):
        raise TypeError(
            f"at must be CLEAN, At(baseline), Rectified(rule) or a path, got {brief(point)}. Write At(baseline) for a baseline."
        )


def sites_at(point: Point, needs: Iterable[Need]) -> dict[str, bool]:
    """The sites that needs read at a point; True where a gradient is taken."""
    result: dict[str, bool] = {}
    for need in needs:
        if need.at == point:
            result[need.site] = result.get(need.site, False) or isinstance(need, Grad)
            if isinstance(need, Grad):
                result.setdefault(need.score.site, False)
    return result


def only_clean(needs: Iterable[Need]) -> bool:
    """Whether all needs are met by the pass on the clean images."""
    return all(need.at == CLEAN for need in needs)


def check_engine(needs: Sequence[Need], engine: Engine) -> None:
    """Check that an engine can differentiate what needs ask for.

    Raises:
        ValueError: it cannot.
    """
    if not isinstance(engine, FiniteDifference):
        return
    if any(isinstance(need, Grad) and need.site in (sites.FEATURES, sites.OUTPUT) for need in needs):
        raise ValueError(
            "Finite differences move images and what layers give: neither the features, which enter a layer, nor the logits. Name "
            "the layer that gives them, or use engines.DoubleBackward() for that term."
        )
    if any(isinstance(need.at, Rectified) for need in needs):
        raise ValueError(
            "Finite differences move a score, and what a rule for ReLU layers gives is the gradient of none. Use "
            "engines.DoubleBackward() for that term."
        )


def check_needs(needs: Iterable[Need], call: Call, name: str) -> None:
    """Check one term's needs against the call, before any pass.

    Raises:
        TypeError, ValueError: naming the term.
    """
    check_layers(needs, call.model, name)
    for score in dict.fromkeys(score for need in needs for score in _scores_of(need)):
        resolved = score.resolve(call.target, call.shown)
        if call.target is not None:
            resolved.check_target(call.target)
        elif resolved.needs_target:
            raise ValueError(f"{name}: {type(resolved).__name__} needs a target. Pass `target=`.")
    for need in needs:
        if isinstance(need.at, Path) and not (isinstance(need, Grad) and need.site == sites.INPUT):
            raise ValueError(f"{name}: on a path only the gradient at the input can be taken. Ask for Grad(INPUT, score, path).")
        if need.at.needs_mask and call.mask is None:
            raise ValueError(f"{name}: its baseline is made from the mask, and there is none. Pass `mask=`.")


def check_layers(needs: Iterable[Need], model: nn.Module, name: str) -> None:
    """Check that a model has the layers of one term's needs.

    Raises:
        TypeError, ValueError: naming the term.
    """
    if not isinstance(needs, Collection):  # a generator would be used up here
        raise TypeError(f"{name}: needs() gave a {type(needs).__name__}, but gives a tuple of needs. Write (need,).")
    for site in dict.fromkeys(site for need in needs for site in (need.site, *(score.site for score in _scores_of(need)))):
        try:
            sites.check_layer(model, site)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None


def _scores_of(need: Need) -> list[Score]:
    """The scores that meeting a need takes: its own, and the one that finds its images."""
    scores = [] if isinstance(need, Value) else [need.score]
    return [*scores, need.at.score] if isinstance(need.at, Ascent) else scores
