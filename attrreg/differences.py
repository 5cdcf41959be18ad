"""Finite differences in place of a double backward: the penalty reads gradients as leaves, and sites move along its slope there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from attrreg import sites
from attrreg.conditions import tensors_in
from attrreg.engines import FiniteDifference
from attrreg.graph import trainable_leaves
from attrreg.masks import at_least_float32
from attrreg.recording import Recording
from attrreg.runner import Runner
from attrreg.scores import Score
from attrreg.state import Rng, autocast_as, full_precision, isolated
from attrreg.walk import modules

HALVES = (torch.float16, torch.bfloat16)


class _Joined(Function):
    """The first, with the gradient of both: the value of the second may be infinite, as a score of classes that are masked by it."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, slope: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, gradient


@dataclass(frozen=True)
class LeafGradients:
    """The gradients of one backward, taken as leaves, to be differentiated by moving the places where they are.

    Attributes:
        image: what the pass ran on.
        score: whose gradients they are.
        chosen: the same score, with what it chose in that pass.
        places: the sites' values, by the names under which they can be moved.
        leaves: the gradients there, in the same order.
        rng: from which the score drew, if it does.
        autocast: what the pass computed in; None: no autocast.
    """

    image: Tensor
    score: Score
    chosen: Score
    places: Mapping[str, Tensor]
    leaves: Sequence[Tensor]
    rng: Rng
    autocast: torch.dtype | None


class Differences:
    """The gradients that one call took as leaves.

    Args:
        runner: runs the passes.
        engine: how far to move.
    """

    def __init__(self, runner: Runner, engine: FiniteDifference) -> None:
        self._runner = runner
        self._engine = engine
        self._gradients: list[LeafGradients] = []

    def leaves(self, recording: Recording, score: Score, wanted: list[str], retain: bool) -> list[Tensor]:
        """The gradients at the wanted sites, as leaves to be moved by; `retain`: see `Runner.backward`.

        Raises:
            ValueError: the automatic layer is overwritten, so that it cannot be moved where its gradient is.
        """
        rng = Rng.of(recording.x.device)
        found = self._runner.backward(recording, score, wanted, create_graph=False, retain=retain)
        if sites.SPATIAL in wanted and self._runner.map in recording.overwritten:
            raise ValueError(
                f"layer='auto' is {self._runner.map!r}, whose output the model overwrites in place, so finite differences cannot move it. "
                f"Name a layer: layer={self._runner.map!r} is its output before that."
            )
        names = [self._runner.map if site == sites.SPATIAL else site for site in wanted]
        # Another term may name the layer that `layer="auto"` is. It then moves once, along what both terms make of its gradient.
        leaves = {name: gradient.detach().requires_grad_() for name, gradient in zip(names, found, strict=True)}
        places = {name: self._runner.at(recording, site).detach() for name, site in zip(names, wanted, strict=True)}
        read = at_least_float32(self._runner.at(recording, score.site)).detach()
        chosen = score.chosen(read, self._runner.call.target)  # what it chose here, kept
        self._gradients.append(LeafGradients(recording.x, score, chosen, places, list(leaves.values()), rng, recording.autocast))
        return [leaves[name] for name in names]

    def differentiated(self, total: Tensor, images: Tensor) -> Tensor:
        """The penalty with its gradient through the leaves; `images`: the whole batch, which is nothing that a penalty trains.

        Raises:
            RuntimeError: it reaches no trainable parameter.
        """
        if not self._gradients:
            return total
        leaves = [leaf for taken in self._gradients for leaf in taken.leaves]
        with full_precision(images.device):  # as terms are computed
            found = iter(torch.autograd.grad(total, leaves, retain_graph=True, allow_unused=True, materialize_grads=True))
        for taken in self._gradients:
            slope = self._slope(taken, [next(found) for _ in taken.leaves])
            if not any(leaf is not images for leaf in trainable_leaves(slope)):
                raise RuntimeError(
                    f"{taken.score!r} has no path to any trainable parameter, so its term could train nothing. Unfreeze some."
                )
            total = _Joined.apply(total, slope)
        return total

    def _slope(self, taken: LeafGradients, directions: list[Tensor]) -> Tensor:
        """The derivative of a score along a direction of its sites, by a difference."""
        places = list(taken.places.values())
        scale = self._engine.scale(places, directions)
        moves = {name: scale * way for name, way in zip(taken.places, directions, strict=True)}
        there, back = (self._moved_score(taken, {name: sign * move for name, move in moves.items()}) for sign in (1, -1))
        return (there - back) / (2 * torch.where(scale > 0, scale, 1.0))  # without a direction, both are the same

    def _has_halves(self, image: Tensor) -> bool:
        """Whether something that a pass computes with has a half type."""
        call = self._runner.call
        weights = (weight for module in modules(call.holding) for weight in module._parameters.values() if weight is not None)
        return any(each.dtype in HALVES for each in (image, *tensors_in(call.inputs), *weights))

    def _moved_score(self, taken: LeafGradients, moves: dict[str, Tensor]) -> Tensor:
        layers = {name: move for name, move in moves.items() if name != sites.INPUT}
        image = taken.image + moves[sites.INPUT].to(taken.image.dtype) if sites.INPUT in moves else taken.image
        wanted = dict.fromkeys([taken.chosen.site, *layers], False)
        # What has a half type may meet something that only autocast brings to it.
        autocast = taken.autocast if self._has_halves(image) else None
        with isolated(self._runner.call.model, image.device, self._runner.start), autocast_as(image.device, autocast):
            recording = self._runner.forward(image, wanted, moves=layers)
            for name in layers:
                self._runner.at(recording, name)  # raises where it did not run this time, and so was not moved
            taken.rng.restore()  # so that what a score of the user's draws is the same on both sides
            return self._runner.scores(recording, taken.chosen).sum()


def gradients_of(
    runner: Runner, differences: Differences | None, recording: Recording, score: Score, wanted: list[str], create_graph: bool, retain: bool
) -> list[Tensor]:
    """The gradients at one pass, as the engine differentiates them: with their graph, or as leaves to be moved by.

    For `retain` see `Runner.backward`. A graph that is not needed again is not retained: compiled ones may refuse that.
    """
    if differences is not None:
        return differences.leaves(recording, score, wanted, retain)
    return runner.backward(recording, score, wanted, create_graph, retain)
