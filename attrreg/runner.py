"""Single passes: one forward on an image, one backward from a score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor, nn

from attrreg import hooks, sites
from attrreg.attach import attached, suspended
from attrreg.call import Call
from attrreg.ops.rectify import Rule
from attrreg.scores import Score


@dataclass
class Passes:
    """Passes that attrreg itself ran. The loop's own forward, when it is reused, is not among them.

    Attributes:
        forward: forwards through the model.
        backward: inner backwards, those that make attributions.
    """

    forward: int = 0
    backward: int = 0


class Runner:
    """Runs and counts the passes of one call.

    It holds nothing that passes computed: a chunked path keeps it for its backward, and a graph that led back to itself
    would never be freed.

    Attributes:
        call: the checked arguments.
        twice: gradients will be differentiated again.
        map: the layer that `layer="auto"` turned out to be.
    """

    def __init__(self, call: Call, counters: Sequence[Passes], twice: bool = True) -> None:
        self.call = call
        self.twice = twice
        self.map = ""
        self._counters = counters

    def repeated(self, times: int) -> Runner:
        """A runner for so many copies of the images in one batch, that counts for the same blocks."""
        if times == 1:
            return self
        x, target = self.call.x.detach(), self.call.target
        repeated = None if target is None else target.repeat(times, *[1] * (target.dim() - 1))
        return Runner(replace(self.call, x=x.repeat(times, 1, 1, 1), target=repeated), self._counters, self.twice)

    def forward(
        self,
        image: Tensor,
        wanted: dict[str, bool],
        as_users_forward: bool = False,
        moves: Mapping[str, Tensor] = MappingProxyType({}),
        places: int = 1,
        rule: Rule | None = None,
    ) -> hooks.Recording:
        """Run the model once on an image in place of `x`, recording the wanted sites. For `moves` and `rule` see `hooks.Tap`."""
        for counter in self._counters:
            counter.forward += 1
        with suspended(self.call.model):
            run = partial(self.call.run, as_users_forward=as_users_forward)
            return hooks.forward(self.call.model, image, wanted, run, self.twice, moves, places, rule)

    def backward(self, recording: hooks.Recording, score: Score, wanted: list[str], create_graph: bool) -> list[Tensor]:
        """The gradients of a score at the wanted sites, all from one backward."""
        per_image = self.scores(recording, score)
        total = per_image.sum()
        if sites.SPATIAL in wanted and sites.SPATIAL not in recording.values:
            self._find_map(recording, total)
        inputs = [self.at(recording, site) for site in wanted]
        grads = self._gradients(recording, total, inputs, create_graph)
        for site, grad in zip(wanted, grads, strict=True):
            if grad is None:
                raise RuntimeError(
                    f"{score!r} does not depend on layer {site!r}, so its gradient there is zero for every input. Name a layer between "
                    "the images and the score."
                )
            self._check_patches(site, grad)
        return [grad for grad in grads if grad is not None]

    def scores(self, recording: hooks.Recording, score: Score) -> Tensor:
        """The score of each image, `(N,)`."""
        value = self.at(recording, score.site)
        score.check_value(value, self.call.target)
        per_image = score(value, self.call.target)
        if per_image.shape != (self.call.x.shape[0],):
            raise ValueError(
                f"{score!r} gave {tuple(per_image.shape)}, but a score is ({self.call.x.shape[0]},), one number an image. Do not "
                "reduce over the batch: a loss, for example, takes reduction='none'."
            )
        return per_image

    def _gradients(self, recording: hooks.Recording, total: Tensor, inputs: list[Tensor], create_graph: bool) -> tuple[Tensor | None, ...]:
        for counter in self._counters:
            counter.backward += 1
        try:
            with recording.phase.attributing():
                return torch.autograd.grad(total, inputs, create_graph=create_graph, retain_graph=True, allow_unused=True)
        except RuntimeError as error:
            if "use_reentrant=True" not in str(error):
                raise
            raise RuntimeError(
                "The model checkpoints activations with use_reentrant=True, through which PyTorch cannot take a gradient of a gradient. "
                "Use torch.utils.checkpoint with use_reentrant=False."
            ) from error

    def _check_patches(self, site: str, grad: Tensor) -> None:
        # Class-token pooling: the score reads the class token alone, so at the last layers patches have no gradient at all.
        if site in sites.SPECIAL or grad.dim() != 3 or grad.shape[0] != self.call.x.shape[0]:
            return
        prefix = sites.layout(grad, self.call.model, self.call.x, site)
        if isinstance(prefix, int) and prefix and not grad[:, prefix:].any() and grad.any():
            raise RuntimeError(
                f"At layer {site!r} the gradient of every patch token is zero, because the score reads the class token alone from "
                "here on. Name an earlier layer, such as the norm before the last block's attention."
            )

    def _find_map(self, recording: hooks.Recording, total: Tensor) -> None:
        """Choose the layer for `layer="auto"`: the last map that the score depends on."""
        if not recording.maps:
            raise ValueError("layer='auto' found no layer with a spatial map. Name a layer whose output is (N, C, h, w).")
        # Queries, keys and hidden features have maps too, but of another meaning or width: rather not those.
        width = getattr(self.call.model, "num_features", None)
        outside = [(name, map) for name, map in recording.maps if not _inside_attention(self.call.model, name)]
        usual = [(name, map) for name, map in outside if width in map.shape[1:]] or outside or list(recording.maps)
        chosen = last, value = usual[-1]
        decided = isinstance(sites.layout(value, self.call.model, self.call.x, last), str)
        if not decided:
            # Tokens. Where a class token is pooled, the last layers' patches are read by nobody.
            alike = [(name, map) for name, map in usual if map.shape[1:] == value.shape[1:]]
            grads = self._gradients(recording, total, [map for _, map in alike], create_graph=False)
            for (name, map), grad in zip(alike, grads, strict=True):
                if grad is not None and sites.to_grid(grad, self.call.model, self.call.x, name).any():
                    chosen, decided = (name, map), True
            # All zero is a head that starts at zero. A gradient at the class token alone is a model that never reads patches.
            if not decided and any(grad is not None and grad.any() for grad in grads):
                raise RuntimeError(
                    "layer='auto' found no layer whose patches the score reads, only a class token. Name an earlier layer, from "
                    "attrreg.layers(model, x)."
                )
        self.map, recording.values[sites.SPATIAL] = chosen
        attachment = attached(self.call.model)
        if decided and attachment is not None:
            attachment.found_map(self.map)

    def at(self, recording: hooks.Recording, site: str) -> Tensor:
        """What was recorded at a site."""
        if site == sites.OUTPUT:
            return self.call.logits(recording.output)
        if site in recording.problems or site not in recording.values:
            raise ValueError(recording.problems.get(site, f"The model has nothing that could be {site}. Name a layer."))
        return recording.values[site]


def _inside_attention(model: nn.Module, name: str) -> bool:
    parts = name.split(".")
    holders = [model.get_submodule(".".join(parts[:depth])) for depth in range(1, len(parts))]
    return any("attn" in part.lower().replace("attn_block", "") for part in parts[:-1]) or any(
        "attention" in type(holder).__name__.lower().replace("attentionblock", "") for holder in holders
    )
