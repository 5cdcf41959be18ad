"""Trace: meet the needs of all terms of one call with as few passes as possible.

One forward a point, one backward for each score at a point, whatever the number of terms.
"""

from __future__ import annotations

from collections.abc import Iterable
from copy import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attrreg import automatic, own, sites
from attrreg.apart import images_apart, output_key, probe_of
from attrreg.attach import attached
from attrreg.call import Call
from attrreg.conditions import version
from attrreg.counting import Passes, passes
from attrreg.differences import Differences, gradients_of
from attrreg.distributed import in_step, synchronise_buffers
from attrreg.engines import Engine, FiniteDifference
from attrreg.folding import PathGradients
from attrreg.graph import which_are_read
from attrreg.masks import Annotation, at_least_float32
from attrreg.needs import Grad, Need, Scored, Value, only_clean, sites_at
from attrreg.points import CLEAN, Ascent, At, Path, Point, Rectified
from attrreg.recompute import sum_along
from attrreg.recording import Question, Recording, Request
from attrreg.runner import Runner
from attrreg.scores import Score
from attrreg.state import Buffers, Rng, autocast_as, detach_buffers, drawn_seed, isolated

__all__ = ["Passes", "Trace", "passes"]


class Trace:
    """The passes of one call. A term reads what it declared from here.

    Args:
        call: the checked arguments.
        needs: of all terms together.
        differentiable: what is read will be differentiated with respect to parameters.
        engine: how the penalty's parameter gradient is then obtained.
    """

    def __init__(self, call: Call, needs: Iterable[Need], differentiable: bool, engine: Engine) -> None:
        self._differentiable = differentiable
        self._needs = list(dict.fromkeys(needs))
        self._here: Point = CLEAN
        # Layers inside a compiled graph cannot be reached.
        reached = {need.site for need in self._needs} | {need.score.site for need in self._needs if isinstance(need, Grad)}
        self.call = call if engine.twice else replace(call, as_compiled=reached <= {sites.INPUT, sites.OUTPUT})
        self._runner = Runner(self.call, twice=engine.twice and differentiable)
        self._differences: Differences | None = None  # takes gradients as leaves; None: they come with their graph
        if differentiable and isinstance(engine, FiniteDifference):
            self._differences = Differences(self._runner, engine)
        self._recordings: dict[Point, Recording] = {}
        self._grads: dict[tuple[str, Score, Point], Tensor] = {}
        self._score_seeds: dict[Score, int] = {}
        self._to_commit: Buffers | None = None  # those of a clean pass that stands in for the user's forward
        self._given_out: list[tuple[Tensor, int]] = []  # what terms read, each with its version

    # What terms read

    def value(self, site: str, at: Point = CLEAN) -> Tensor:
        """The value at a site, in float32 at least; images `(N, C, H, W)` at `INPUT`, logits at `OUTPUT`."""
        at = self._seen(at)
        images = site == sites.INPUT and (at == CLEAN or at in self._recordings)  # which each pass has
        if not images and Value(site, at) not in self._needs:
            raise ValueError(f"Value({site!r}, {at!r}) was read, but not declared. Let needs() of the term return it.")
        recording = self._recordings.get(at)
        if recording is None:
            return self._give_out(at_least_float32(self.call.x))
        return self._give_out(at_least_float32(self._runner.at(recording, site)))

    def grad(self, site: str, score: Score, at: Point = CLEAN) -> Tensor:
        """The gradient of a score at a site, of the shape and type of its value; on a path, the weighted sum along it."""
        if (key := (site, score, self._seen(at))) not in self._grads:
            raise ValueError(f"Grad({site!r}, {score!r}, {key[2]!r}) was read, but not declared. Let needs() of the term return it.")
        return self._give_out(self._grads[key])

    def score(self, score: Score, at: Point = CLEAN) -> Tensor:
        """A score of each image, `(N,)`."""
        if Scored(score, at := self._seen(at)) not in self._needs:
            raise ValueError(f"Scored({score!r}, {at!r}) was read, but not declared. Let needs() of the term return it.")
        return self._runner.scores(self._recordings[at], self._concrete(score))

    def _give_out(self, tensor: Tensor) -> Tensor:
        self._given_out.append((tensor, version(tensor)))
        return tensor

    def check_unwritten(self, name: str) -> None:
        """Check that a term has left alone what it has read.

        Raises:
            ValueError: naming the term.
        """
        if any(version(tensor) != then for tensor, then in self._given_out):
            raise ValueError(
                f"{name} writes into what it reads from the trace, which other terms and the loop read too. Let it make new tensors, for "
                "example map.abs() in place of map.abs_()."
            )

    def sees_images(self, site: str, at: Point) -> bool:
        """Whether the value at a site depends on the images. Runs the model again, until the answer was yes once.

        Args:
            site: where the values hardly differ, perhaps by rounding alone.
            at: a point whose images differ from the clean ones.
        """
        model, images = self.call.model, (self.call.x.detach(), self._recordings[at].x.detach())
        if in_step(self.call.whole):  # a forward that other ranks do not run would wait for them
            return True
        probe = probe_of(model, "sites", site, automatic.kind(self.call.x, model), output_key(self.call.output))
        if probe.found:
            return True

        recording = self._runner.replay(images[0], {sites.INPUT: True, site: False}, check=True)
        found = which_are_read(self._runner.at(recording, site), [recording.values[sites.INPUT]])[0]
        if not found:  # there may be no graph, as from frozen layers under no_grad; the terms' own passes may differ by rounding alone
            with torch.no_grad():
                found = not torch.equal(*(self._runner.at(self._runner.replay(image, {site: False}, check=True), site) for image in images))
        if found:
            probe.found = True
        return found

    def images_apart(self) -> bool:
        """Whether what the model gives for an image depends on that alone. Runs it again, now and then."""
        with autocast_as(self.call.x.device, self._runner.autocast):  # terms compute outside the loop's
            return images_apart(self.call)

    def seen_from(self, point: Point) -> Trace:
        """The same passes, with a point in place of the clean images."""
        view = copy(self)
        view._here = point
        return view

    def _seen(self, at: Point) -> Point:
        """The point that a term means: in a view by `seen_from`, another one in place of the clean images."""
        return self._here if at == CLEAN else at

    def grid(self, site: str, value: Tensor, at: Point = CLEAN) -> Tensor:
        """A value or gradient of a layer, or of the images, as a map `(N, C, h, w)`.

        Args:
            site, at: where it was read.
            value: what was read there.

        Raises:
            ValueError: the layer has no spatial map.
            RuntimeError: a gradient of tokens is zero at all but the class token.
        """
        recording = self._recordings.get(self._seen(at))
        x = self.call.x if recording is None else recording.x
        if any(value is gradient for gradient in self._grads.values()):
            self._runner.check_patches(x, site, value)  # the automatic layer was chosen by them
        return sites.to_grid(value, self.call.model, x, self._runner.map if site == sites.SPATIAL else site)

    @property
    def mask(self) -> Tensor:
        """The canonical mask `(N, 1, H, W)`."""
        return self._give_out(self.annotation.relevant)

    @property
    def target(self) -> Tensor:
        """The target that was passed, a row for each image."""
        if self.call.target is None:
            raise ValueError("A term reads the target, and there is none. Pass `target=`.")
        return self._give_out(self.call.target)

    @property
    def annotation(self) -> Annotation:
        """That mask, and which images have one."""
        if self.call.annotation is None:  # for a map that is shown
            raise ValueError("The map is made from the mask, and there is none. Pass `mask=`.")
        return self.call.annotation

    @property
    def output(self) -> Any:
        """What the user's call of the model returned for the clean images."""
        return self._recordings[CLEAN].returned

    # Running

    def run(self, as_users_forward: bool = False) -> None:
        """Run all passes.

        Args:
            as_users_forward: the clean pass stands in for the user's own forward, so it moves BatchNorm's statistics and
                the random number generators as that would; `commit` makes the former final.
        """
        self._clean_pass(sites_at(CLEAN, self._needs), as_users_forward)
        self._runner.start = self._recordings[CLEAN].rng if CLEAN in self._recordings else Rng.of(self.call.x.device)
        # Draws come after the clean pass, as they do in a loop whose own forward is reused.
        seeds = self._draw()
        for point in self._points():
            if isinstance(point, Path):
                self._run_path(point, seeds[point])
                continue
            if point != CLEAN:
                self._recordings[point] = self._pass(point, seeds[point])
            self._differentiate(point)

    def commit(self) -> None:
        """Make what the clean pass did to the model's buffers final, where it stood in for the user's forward."""
        if self._to_commit is not None:
            self._to_commit.commit()
            detach_buffers(self.call.model)

    def _clean_pass(self, wanted: dict[str, bool], as_users_forward: bool) -> None:
        call, question = self.call, self._question()
        attachment = attached(call.model) if self._differentiable else None
        recording = None
        # The recording is taken even if only the images are read, which need no pass: passes at other points replay its draws.
        if attachment is not None:
            recording = attachment.take(call, Request(wanted, self._runner.twice, question, only_clean(self._needs), as_users_forward))
        if recording is None and (as_users_forward or wanted not in ({}, {sites.INPUT: False})):
            if as_users_forward:
                synchronise_buffers(call.entry)
            recording = self._own_clean_pass(wanted, as_users_forward, automatic.known(call, question))
        if recording is not None:
            self._recordings[CLEAN] = recording
            if sites.SPATIAL in recording.values:
                self._runner.map = recording.maps[-1][0]

    def _own_clean_pass(self, wanted: dict[str, bool], as_users_forward: bool, map: str | None) -> Recording:
        """A clean pass of our own; `map`: the layer for `layer="auto"`, if it is known."""
        device = self.call.x.device
        with isolated(self.call.model, device) as buffers:
            recording = self._runner.forward(self.call.x, wanted, as_users_forward, map=map)
            after = Rng.of(device)
        if map is not None and sites.SPATIAL not in recording.values:  # this pass went another way through the model
            return self._own_clean_pass(wanted, as_users_forward, map=None)
        if as_users_forward:
            self._to_commit = buffers
            after.restore()
        return recording

    def _question(self) -> Question | None:
        """What is asked of the layer for `layer="auto"`; None: nothing."""
        needs = [need for need in self._needs if need.site == sites.SPATIAL and need.at == CLEAN]
        scores = (need.score.resolve(self.call.target, self.call.shown) for need in needs if isinstance(need, Grad))
        return automatic.question_of(self.call, next(scores, None)) if needs else None

    def _points(self) -> list[Point]:
        return list(dict.fromkeys(need.at for need in self._needs))

    def _draw(self) -> dict[Point, int]:
        """One seed for each point and score that draws, in the order of the terms: equal ones share a draw."""
        for score in dict.fromkeys(need.score for need in self._needs if not isinstance(need, Value)):
            if score.draws:
                self._score_seeds[score] = drawn_seed(self.call.generator)
        return {point: drawn_seed(self.call.generator) if point.draws else 0 for point in self._points()}

    def _concrete(self, score: Score) -> Score:
        resolved = score.resolve(self.call.target, self.call.shown)
        return resolved.drawn(self._score_seeds[score]) if score.draws else resolved

    def _pass(self, point: Point, seed: int) -> Recording:
        """The pass on the images that a point makes of the clean ones."""
        image, rule = self.call.x, point.rule if isinstance(point, Rectified) else None
        if isinstance(point, At):
            image = own.made(point.baseline, point.baseline, self.call.x.detach(), self.call.mask, seed)
            if not isinstance(image, Tensor):
                raise TypeError(f"{point.baseline!r} gave a {type(image).__name__}, but a baseline gives images (N, C, H, W).")
            image = image.to(self.call.x.dtype)
        if isinstance(point, Ascent):
            image = self._ascend(point)
        return self._runner.replay(image, sites_at(point, self._needs), rule=rule)

    def _differentiate(self, point: Point) -> None:
        """All gradients at one point: one backward for each distinct score."""
        groups: dict[Score, list[Grad]] = {}
        for need in self._needs:
            if isinstance(need, Grad) and need.at == point:
                groups.setdefault(self._concrete(need.score), []).append(need)
        for i, (score, needs) in enumerate(groups.items(), start=1):
            recording, wanted = self._recordings[point], list(dict.fromkeys(need.site for need in needs))
            retain = i < len(groups) or self._read_later(point, recording)
            found = gradients_of(self._runner, self._differences, recording, score, wanted, self._runner.twice, retain)
            for need in needs:
                self._grads[need.site, need.score, point] = found[wanted.index(need.site)]

    def _read_later(self, point: Point, recording: Recording) -> bool:
        """Whether the graph of a pass is needed after its gradients were taken: by the loop, or by terms that read its values."""
        loops = recording.conditions is not None or (point == CLEAN and self._to_commit is not None)
        return loops or any(need.at == point and need.site != sites.INPUT and not isinstance(need, Grad) for need in self._needs)

    def differentiated(self, total: Tensor, images: Tensor) -> Tensor:
        """The penalty with the gradients that the engine gives it; `images`: the whole batch.

        Raises:
            RuntimeError: they reach no trainable parameter.
        """
        return total if self._differences is None else self._differences.differentiated(total, images)

    def _ascend(self, point: Ascent) -> Tensor:
        """The images of an ascent, by passes on its way, of which nothing is kept."""
        runner = Runner(self.call, twice=False, start=self._runner.start)
        score = self._concrete(point.score)
        image = self.call.x.detach()
        for _ in range(point.steps):
            recording = runner.replay(image, {sites.INPUT: True, score.site: False})
            (gradient,) = runner.backward(recording, score, [sites.INPUT], create_graph=False, retain=False)
            image = point.step(self.call.x.detach(), image, gradient, self.mask)
        return image

    def _run_path(self, path: Path, seed: int) -> None:
        """All gradients along one path: for each distinct score, summed over its places."""
        needs = [need for need in self._needs if isinstance(need, Grad) and need.at == path]
        made = {score: self._concrete(score) for score in dict.fromkeys(need.score for need in needs)}
        concrete = list(dict.fromkeys(made.values()))
        stops = own.made(path, path.stops, self.call.x.detach(), self.call.mask, seed)
        gradients = PathGradients(self._runner, concrete, self._differences)
        # Finite differences hold no graph of the gradients, so there is nothing to save by computing them again. What they hold of each
        # place, two moved forwards, comes later.
        chunk = path.chunk if self._differences is None else None
        sums = dict(zip(concrete, sum_along(stops, gradients, chunk, self._differentiable), strict=True))
        for need in needs:
            self._grads[need.site, need.score, path] = sums[made[need.score]]
