"""Single passes: one forward on an image, one backward from a score."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from types import MappingProxyType

import torch
from torch import Tensor

from attrreg import automatic, sites
from attrreg.attach import suspended
from attrreg.call import Call
from attrreg.conditions import tensors_in, version
from attrreg.counting import counters
from attrreg.distributed import gather, reshard, sharded
from attrreg.features import find_features
from attrreg.graph import checkpoints_reentrant, ends_in_half, which_are_read
from attrreg.hooks import Tap
from attrreg.masks import at_least_float32
from attrreg.ops.rectify import Rule
from attrreg.own import check_scores
from attrreg.recording import Recording
from attrreg.scores import Score
from attrreg.spec import is_own
from attrreg.state import Rng, autocast_as, autocast_type, full_precision, isolated

DETACHED = (
    "The model's output carries no gradient: its forward runs under no_grad, detaches, or is checkpointed with use_reentrant=True. Enable "
    "gradients inside the model, checkpoint with use_reentrant=False, or leave the detached part to another term."
)

REENTRANT = (
    "The model checkpoints activations with use_reentrant=True, through which PyTorch cannot take a gradient of a gradient. "
    "Use torch.utils.checkpoint with use_reentrant=False."
)

FREED = (
    "A backward between the forward that was recorded and this penalty freed a part of its graph. Compute the penalty before that "
    "backward, or give it retain_graph=True."
)

DONATED = (
    "torch.compile made a backward that frees what it reads, and this penalty goes on with the graph after its inner backward. Write "
    "torch._functorch.config.donated_buffer = False before the first step."
)

FABRIC = (
    "Fabric refuses gradients of what its wrapper returned outside fabric.backward. Give the penalty the model inside, under "
    "fabric.autocast(): reg(model.module, x, mask), with several processes also with group=torch.distributed.group.WORLD."
)


class Runner:
    """Runs and counts the passes of one call.

    It holds nothing that passes computed: a chunked path keeps it for its backward, and a graph that led back to itself
    would never be freed.

    Attributes:
        call: the checked arguments.
        twice: gradients will be differentiated again.
        start: where the random number generators were before the clean pass, so that other passes draw the same; None: where they are.
        autocast: what autocast computes in, also in passes that run later, as while a term computes its value; None: it is off.
        places: how often the batch has each image, side by side.
        map: the layer that `layer="auto"` turned out to be.
        drew: a score of the user's drew random numbers.
    """

    def __init__(self, call: Call, twice: bool, start: Rng | None = None) -> None:
        self.call = call
        self.twice = twice
        self.start = start
        self.autocast = autocast_type(call.x.device)
        self.places = 1
        self.map = ""
        self.drew = False
        self._counters = counters()

    def repeated(self, images: Tensor, times: int) -> Runner:
        """A runner for a batch that has each image `times` times, side by side. Its passes count in the same `passes` blocks."""
        target = None if self.call.target is None else self.call.target.repeat_interleave(times, dim=0)
        runner = copy(self)
        runner.call, runner.places = replace(self.call, x=images, target=target), times
        return runner

    def forward(
        self,
        image: Tensor,
        wanted: dict[str, bool],
        as_users_forward: bool = False,
        moves: Mapping[str, Tensor] = MappingProxyType({}),
        rule: Rule | None = None,
        map: str | None = None,
        check: bool = False,
    ) -> Recording:
        """Run the model once on an image in place of `x`, recording the sites.

        Args:
            image: what the model gets.
            wanted: the sites; True where a gradient will be taken.
            as_users_forward: the pass stands in for the loop's own forward.
            moves, rule, map: see `hooks.Tap`.
            check: count it among `Passes.checks`.
        """
        for counter in self._counters:
            counter.forward += not check
            counter.checks += check
        x = self.call.x
        # Outputs of layers lie in memory as the images do, and dropout draws in that order: for the same mask, the images lie as `x`.
        if image.stride() != x.stride() and image.shape == x.shape:
            image = torch.empty_like(x, dtype=image.dtype).copy_(image)
        model, extra = self.call.model, not as_users_forward
        tap = Tap(model, wanted, map=map, twice=self.twice, moves=moves, places=self.places, rule=rule, extra=extra)
        with suspended(model, as_users_forward):
            try:
                output = self.call.run(tap.open(image), as_users_forward)
            finally:
                tap.close()
        recording = tap.recording(output)
        if sites.OUTPUT in wanted and callable(self.call.output):
            self.at(recording, sites.OUTPUT)  # now: a function that draws shall draw what it draws in each pass
        return recording

    def replay(self, image: Tensor, wanted: dict[str, bool], rule: Rule | None = None, check: bool = False) -> Recording:
        """A forward that starts from `start` and leaves no trace; for the arguments see `forward`."""
        device = self.call.x.device
        with isolated(self.call.model, device, self.start), autocast_as(device, self.autocast):
            return self.forward(image, wanted, rule=rule, check=check)

    def backward(self, recording: Recording, score: Score, wanted: list[str], create_graph: bool, retain: bool = True) -> list[Tensor]:
        """The gradients of a score at the wanted sites, all from one backward; not `retain`: which is the last through this pass."""
        read_at = self.at(recording, score.site)
        if not read_at.requires_grad:
            raise RuntimeError(DETACHED if score.site == sites.OUTPUT else _unreached(score, wanted[0], read_at))
        value = at_least_float32(read_at)
        total = self._scores(value, score).sum()
        half = torch.float16 in (recording.x.dtype, recording.autocast, read_at.dtype) or ends_in_half(read_at)
        shards = sharded(self.call.model) if score.site != sites.OUTPUT else []
        gather(shards)
        with _explained(recording):
            scale = _scale(total, value) if half else None
        find = sites.SPATIAL in wanted and sites.SPATIAL not in recording.values
        maps = self._maps(recording, score, total) if find else []
        named = [site for site in wanted if not (find and site == sites.SPATIAL)]
        inputs = [self.at(recording, site) for site in named] + [map for _, map in maps]
        if scale is None:
            grads = self._gradients(recording, total, inputs, create_graph, retain=retain)
        else:
            grads = self._scaled_gradients(recording, total, scale, inputs, create_graph)
        if not create_graph:
            reshard(shards)
        found = dict(zip(named, grads, strict=False))
        if find:
            found[sites.SPATIAL] = self._choose_map(recording, score, maps, grads[len(named) :])
        gradients: list[Tensor] = []
        for site in wanted:
            if (grad := found[site]) is None:
                raise RuntimeError(_unreached(score, site, total))
            gradients.append(at_least_float32(grad))
        return gradients

    def scores(self, recording: Recording, score: Score) -> Tensor:
        """The score of each image, `(N,)`, in float32 at least."""
        return self._scores(at_least_float32(self.at(recording, score.site)), score)

    def _scores(self, value: Tensor, score: Score) -> Tensor:
        if value.device != self.call.x.device:
            raise ValueError(
                f"{score!r} reads a tensor on {value.device}, but x is on {self.call.x.device}. For a model on several devices, move the "
                "logits to that of x by output=lambda logits: logits.to(x.device), and name layers that run there."
            )
        score.check_value(value, self.call.target)
        given = [part for part in (value, self.call.target) if part is not None]
        before, start = list(map(version, given)), Rng.of(value.device) if _runs_own(score) else None
        with full_precision(value.device):
            per_image = self._placewise(score, value)
        self.drew |= start is not None and not Rng.of(value.device).same(start)
        if list(map(version, given)) != before:
            raise ValueError(f"{score!r} writes into the value or the target that it is given, which others read too. Write into a copy.")
        check_scores(score, per_image, value, self.call.x.shape[0])
        return per_image

    def _placewise(self, score: Score, value: Tensor) -> Tensor:
        """The scores of each place by itself: a score that draws draws for an image, whatever its place."""
        target = self.call.target
        if self.places == 1:
            return score(value, target)
        values = value.unflatten(0, (-1, self.places)).unbind(1)
        targets = [None] * self.places if target is None else target.unflatten(0, (-1, self.places)).unbind(1)
        return torch.stack([score(*each) for each in zip(values, targets, strict=True)], dim=1).flatten()

    def spread(self, recording: Recording, total: Tensor) -> Tensor | None:
        """The gradient of a part of the scores, with respect to all images, to show which they depend on; None: on none."""
        return self._gradients(recording, total, [self.at(recording, sites.INPUT)], create_graph=False, check=True)[0]

    def _gradients(
        self, recording: Recording, total: Tensor, inputs: list[Tensor], create_graph: bool, check: bool = False, retain: bool = True
    ) -> tuple[Tensor | None, ...]:
        for counter in self._counters:
            counter.backward += not check
            counter.checks += check
        if not total.requires_grad:
            raise RuntimeError("The score has no gradient: it detaches what it reads, or gives a constant. Let gradients through it.")
        # A backward runs in the types of its forward.
        with _explained(recording), recording.phase.attributing(), full_precision(total.device):
            return torch.autograd.grad(total, inputs, create_graph=create_graph, retain_graph=create_graph or retain, allow_unused=True)

    def _scaled_gradients(
        self, recording: Recording, total: Tensor, scale: Tensor, inputs: list[Tensor], create_graph: bool
    ) -> tuple[Tensor | None, ...]:
        """Gradients through float16, which has no room for small ones: of the scaled score, unscaled in float32."""
        # Under FSDP2 a backward gathers weights, so that a rank must not run one more than others do.
        for attempt in (scale,) if sharded(self.call.model) else (scale, scale * 2.0**-8, scale * 2.0**-16):
            grads = self._gradients(recording, total * attempt, inputs, create_graph)
            found = tuple(None if grad is None else at_least_float32(grad) / attempt for grad in grads)
            if all(grad is None or bool(grad.detach().isfinite().all()) for grad in found):
                break
        return found

    def check_patches(self, x: Tensor, site: str, grad: Tensor) -> None:
        """Check that the patches of images have some of what is read as a map: a neuron of the class token may be read without."""
        # Class-token pooling: the score reads the class token alone, so at the last layers patches have no gradient at all.
        if site in sites.SPECIAL or grad.dim() != 3:
            return
        prefix = sites.layout(grad, self.call.model, x, site)
        if isinstance(prefix, int) and prefix and not grad[:, prefix:].any() and grad.any():
            raise RuntimeError(
                f"At layer {site!r} the gradient of every patch token is zero, because the score reads the class token alone from "
                "here on. Name an earlier layer, such as the norm before the last block's attention."
            )

    def find_map(self, recording: Recording) -> None:
        """Choose the layer for `layer="auto"` where no gradient is taken there."""
        total = self.at(recording, sites.OUTPUT).sum()
        maps = self._maps(recording, None, total)
        decided = automatic.is_grid(self.call.model, recording.x, *maps[-1])
        grads = (None,) if decided else self._gradients(recording, total, [map for _, map in maps], create_graph=False)
        self._choose_map(recording, None, maps, grads)

    def _maps(self, recording: Recording, score: Score | None, total: Tensor) -> list[automatic.NamedMap]:
        maps = automatic.candidates(self, recording, total)
        if not maps:
            raise RuntimeError(_unreached(score, sites.SPATIAL, total))
        return maps

    def _choose_map(
        self, recording: Recording, score: Score | None, maps: list[automatic.NamedMap], grads: Sequence[Tensor | None]
    ) -> Tensor | None:
        """Record the layer for `layer="auto"`; the gradient there."""
        place = automatic.choose(replace(self.call, x=recording.x), score, maps, grads)  # which may be of another size
        self.map, recording.values[sites.SPATIAL] = maps[place]
        return grads[place]

    def at(self, recording: Recording, site: str) -> Tensor:
        """What was recorded at a site.

        Raises:
            ValueError: nothing was, or it cannot be told which tensor the features are.
        """
        if site == sites.OUTPUT and site not in recording.values:
            recording.values[site] = recording.picked(self.call)
        if site == sites.SPATIAL and site not in recording.problems and site not in recording.values:
            self.find_map(recording)
        if site in recording.problems or site not in recording.values:
            assert site in recording.problems or site == sites.FEATURES, site
            missing = (
                "No layer ran that may be the classifier, whose input would be the features: the model has no linear or convolutional one, "
                "or not the one that its get_classifier() names. Name a layer."
            )
            raise ValueError(recording.problems.get(site, missing))
        return self._features(recording) if site == sites.FEATURES else recording.values[site]

    def _features(self, recording: Recording) -> Tensor:
        """What enters the classifier: of several layers that may be it, the one that made the logits, where it is known what these are."""
        likeliest = recording.values[sites.FEATURES]
        if len(recording.heads) < 2 or (self.call.output is None and not isinstance(recording.output, Tensor)):
            return likeliest
        logits = self.at(recording, sites.OUTPUT)
        own, given = [logits], tensors_in(recording.output)
        if callable(self.call.output) and not any(part is logits for part in given):
            own = [part for part, is_read in zip(given, which_are_read(logits, given), strict=True) if is_read]
        found = find_features(recording.heads, logits, own)
        return likeliest if found is None else found


@contextmanager
def _explained(recording: Recording) -> Iterator[None]:
    """Say what to do where PyTorch, or what wraps the model, refuses a backward."""
    try:
        yield
    except RuntimeError as error:
        if "use_reentrant=True" in str(error):
            raise RuntimeError(REENTRANT) from error
        if recording.conditions is not None and "a second time" in str(error):
            raise RuntimeError(FREED) from error
        if "donated buffers" in str(error):
            raise RuntimeError(DONATED) from error
        if "fabric.backward" in str(error):
            raise RuntimeError(FABRIC) from error
        raise


def _runs_own(score: Score) -> bool:
    """Whether it runs the user's code, at least in part."""
    return is_own(score) or getattr(score, "function", None) is not None


def _scale(total: Tensor, value: Tensor) -> Tensor:
    """A power of two by which the largest gradient at what the score reads becomes about 2^4.

    A smaller one loses gradients here; a larger one makes the second order overflow, which is in products of these gradients.
    """
    if not (total.requires_grad and value.requires_grad):
        return torch.ones_like(total)  # the backward itself will say what is wrong
    with full_precision(value.device):
        (gradient,) = torch.autograd.grad(total, value, retain_graph=True, allow_unused=True, materialize_grads=True)
    exponent = torch.frexp(gradient.abs().amax()).exponent.clamp(min=-100)  # the factor for next to nothing would be infinite
    return torch.ldexp(torch.ones_like(total), 4 - exponent).detach()


def _unreached(score: Score | None, site: str, total: Tensor) -> str:
    """Why a score has no gradient at a site, and what to do."""
    if checkpoints_reentrant(total):
        return REENTRANT
    what = "The output" if score is None else repr(score)
    if site in sites.SPECIAL:
        place = "the images" if site == sites.INPUT else "any layer with a spatial map"
        return (
            f"{what} does not depend on {place}: on the way to it the model detaches or runs under no_grad, as a first block "
            "checkpointed with use_reentrant=True does. Let gradients through, or choose another score or output."
        )
    return (
        f"{what} does not depend on layer {site!r}, so its gradient there is zero for every input. Name a layer between the images "
        "and the score."
    )
