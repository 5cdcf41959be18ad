"""What one forward computed."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from contextlib import ExitStack
from copy import copy
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from attrreg.call import Call
from attrreg.conditions import Conditions, tensors_in
from attrreg.features import Head
from attrreg.ops import Phase, twice_differentiable
from attrreg.ops.draws import Draws
from attrreg.sites import INPUT, OUTPUT, SPATIAL
from attrreg.state import Rng, autocast_as, autocast_type


class Question(NamedTuple):
    """What the layer for `layer="auto"` depends on, besides the model: `automatic.kind`, `call.picked_by`, and what the score reads."""

    kind: Hashable
    picked_by: Hashable
    site: str


class Request(NamedTuple):
    """What a call asks of its clean pass.

    Attributes:
        sites: what it reads; True where it takes a gradient.
        twice: it differentiates gradients.
        question: which one `layer="auto"` answers in it; None: no term has `layer="auto"`.
        alone: the call runs no other pass; one would have to start from the same buffers.
        returns_output: the call returns the model's output to the user.
    """

    sites: Mapping[str, bool]
    twice: bool
    question: Question | None
    alone: bool
    returns_output: bool


@dataclass(frozen=True)
class Recording:
    """What one forward computed.

    Attributes:
        x: the tensor that the model was called with.
        values: at each recorded site, the tensor, with its graph.
        taken: the sites at which a gradient was to be taken: operators can be differentiated twice from there on.
        problems: for each site that could not be recorded, why.
        maps: for the site `SPATIAL`, the last layers whose output is a map, by name, in the order they ran; the known one
            alone, if it is known; `overwritten`: those that were written to later, in place.
        heads: for the site `FEATURES`, the layers whose input it could be, the likeliest last.
        output: what the model returned, and `returned` what its wrappers made of that.
        rng: the state from which the forward drew, to replay it; `end`: that in which it ended.
        conditions: of the loop's own forward; None for a pass of our own.
        phase: shared with the operators of the forward, to be told what a backward is for.
        draws: what the forward drew.
        twice: whether its operators are those that can be differentiated twice.
        autocast: what autocast computed in; None: it was off.
    """

    x: Tensor
    values: dict[str, Tensor]
    taken: frozenset[str]
    problems: Mapping[str, str]
    maps: tuple[tuple[str, Tensor], ...]
    overwritten: frozenset[str]
    heads: tuple[Head, ...]
    output: Any
    returned: Any
    rng: Rng
    end: Rng
    conditions: Conditions | None
    phase: Phase
    draws: Draws
    twice: bool
    autocast: torch.dtype | None

    @property
    def drew(self) -> bool:
        """Whether the forward moved PyTorch's generators."""
        return not self.end.same(self.rng)

    def picked(self, call: Call) -> Tensor:
        """The logits, picked as in the forward: a function may be a head, which draws, and computes in types as autocast says."""
        with ExitStack() as within:
            within.enter_context(autocast_as(self.x.device, self.autocast))
            if self.twice and self.taken and callable(call.output):
                within.enter_context(twice_differentiable(self.phase))
                within.enter_context(self.phase.recomputing())  # a backward now is the head's own
            return call.logits(self.output, self.end)

    def serves(self, call: Call, request: Request) -> bool:
        """Whether this is the pass that a call would run itself."""
        sites, conditions = request.sites, self.conditions
        if (request.twice and not self.twice) or self.x is not call.x or conditions is None or not conditions.same_for(call):
            return False
        differences = not request.twice and any(sites.values())  # finite differences run other passes
        if (differences or not request.alone) and conditions.moved:  # other passes would compute with other buffers
            return False
        if not request.alone and self.autocast != autocast_type(call.x.device):
            return False
        if request.returns_output and not conditions.unchanged(self.returned):
            return False
        for site, differentiated in sites.items():
            found = site == OUTPUT or site in self.values or (site == SPATIAL and self.maps)
            if site not in self.problems and (not found or (differentiated and site not in self.taken and INPUT not in self.taken)):
                return False
        if OUTPUT in sites:
            if not conditions.still_in(self.output):
                return False
            logits = self.picked(call)
            if not conditions.logits_unchanged(logits):
                return False
            self.values[OUTPUT] = logits  # kept for the call, so that a function that picks them runs once: it may draw
        return True


def in_own_containers(output: Any) -> Any:
    """What a model returned, in containers of our own: the loop may put something else into its."""
    return tree_map(_own, output)


def _own(leaf: Any) -> Any:
    if isinstance(leaf, Tensor) or not tensors_in(leaf):
        return leaf
    try:
        return copy(leaf)
    except Exception:  # whatever an object of the user's raises must not end their forward
        return leaf
