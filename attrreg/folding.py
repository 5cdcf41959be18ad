"""Places of a path that run as one batch, where that changes nothing but the time."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.jit import ScriptModule
from torch.nn import SyncBatchNorm
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from attrreg import sites
from attrreg.apart import SIZE_ERRORS, couples, output_key, probe_of, same_alone, state_key
from attrreg.differences import Differences, gradients_of
from attrreg.distributed import in_step
from attrreg.graph import trained_by
from attrreg.memory import lacks_memory
from attrreg.ops.channels import dense, memory_format
from attrreg.recording import Recording
from attrreg.runner import Runner
from attrreg.scores import Score
from attrreg.state import Rng
from attrreg.walk import modules


class PathGradients:
    """The gradients of scores at places of a path.

    Places share a batch if each can have the draws of the clean pass (`ops.draws` knows dropout and stochastic depth) and if images
    meet in nothing but batch normalisation of the whole batch, which our operator does place by place. Modules tell whether that is to
    be expected, the pass whether it was so, now and then by a forward and a backward more; if not, it is thrown away, and each place runs
    alone. What passes have shown is remembered for the model, its modes and hooks, the operators, the output and where scores read.

    A chunked path's backward keeps this object, so it holds nothing that passes computed.

    Attributes:
        runner: runs the passes; `call`: what it runs.
        reached: the trainable leaves that scores were computed from so far, by id.

    Args:
        runner: see above.
        scores: what is differentiated.
        differences: takes the gradients as leaves, to be moved by; None: they come with their graph.
    """

    def __init__(self, runner: Runner, scores: list[Score], differences: Differences | None) -> None:
        self.call = runner.call
        self.runner = runner
        self._wanted = {sites.INPUT: True} | {score.site: False for score in scores}
        self._scores = scores
        self._differences = differences
        sites_read = tuple(score.site for score in scores)
        self._kind = ("places", runner.twice, state_key(self.call.model), output_key(self.call.output), sites_read)
        self._probe = probe_of(self.call.model, *self._kind)  # False where places are known not to share
        self._coupled = any(map(couples, modules(self.call.model)))
        self._shares = self._may_share()
        self.reached: dict[int, Tensor] = {}
        self._alone_drew: tuple[Rng, list[torch.Size]] | None = None  # where a pass over the images alone ends, and shapes of what it drew

    def _may_share(self) -> bool:
        """Whether places may share a batch, as far as can be told before."""
        call = self.call
        if self._differences is not None or call.inputs is not None or not dense(call.x):  # draws go in memory's order
            return False
        if in_step(call.whole):  # each pass waits for all ranks, so all have as many, whatever their images
            return False
        if isinstance(call.output, nn.Module) and not _separable(call.output, ours=False):  # whose draws would not be of each place
            return False
        return self._probe.found is not False and _separable(call.model, self.runner.twice)

    def room(self, pending: int) -> int:
        """How many of the places that are left may come as one batch: as many in each, rather than a small rest."""
        if not self._shares:
            return 1
        x = self.call.x
        batches = math.ceil(pending / max(1, budget(x.device) // x.numel()))
        return math.ceil(pending / batches)

    def __call__(self, images: Sequence[Tensor], create_graph: bool) -> list[list[Tensor]]:
        """For each place, one gradient a score, of the shape of its images."""
        if len(images) == 1:
            return [self._alone(images[0], create_graph)]
        lasting = True
        try:
            found = self._together(images, create_graph)
        except SIZE_ERRORS as error:  # a model may know how many images it gets; any other mistake is raised again below
            found, lasting = None, not lacks_memory(error)
        if found is None:
            self._shares = False
            found = [self._alone(image, create_graph) for image in images]
            if lasting:  # they ran one by one, so what failed together was no mistake of the call: it is remembered
                self._probe.found = False
        return found

    def _alone(self, images: Tensor, create_graph: bool) -> list[Tensor]:
        """The gradients at one place, from a pass of its own."""
        recording = self.runner.replay(images, self._wanted)
        self._note_leaves(self.runner, recording, create_graph)
        last, wanted = len(self._scores) - 1, [sites.INPUT]
        return [
            gradients_of(self.runner, self._differences, recording, score, wanted, create_graph, retain=i < last)[0]
            for i, score in enumerate(self._scores)
        ]

    def _note_leaves(self, runner: Runner, recording: Recording, create_graph: bool) -> None:
        """Remember the leaves that the scores of a pass were computed from."""
        if not create_graph or not self.reached:  # else the pass repeats one that was noted, to have its graph
            self.reached.update((id(leaf), leaf) for leaf in trained_by(self.call.holding, *self._read(runner, recording)))

    def _read(self, runner: Runner, recording: Recording) -> list[Tensor]:
        """What the scores of a pass are computed from."""
        return [runner.at(recording, score.site) for score in self._scores]

    def _together(self, images: Sequence[Tensor], create_graph: bool) -> list[list[Tensor]] | None:
        """The gradients at several places, from one pass; None: it did not give what each place gets alone."""
        places = len(images)
        # The places of an image lie side by side, so that batch normalisation can see them as channels. Stacked, they lose their layout.
        batch = torch.stack(list(images), dim=1).flatten(0, 1).contiguous(memory_format=memory_format(self.call.x))
        runner = self.runner.repeated(batch.detach(), places)
        recording = runner.replay(batch, self._wanted)
        if recording.drew or (self._coupled and recording.phase.normalised != {batch.shape[0]}):
            return None
        if not self._draws_as_alone(recording, images[0]) or not self._apart(runner, recording, images):
            return None
        self._note_leaves(runner, recording, create_graph)
        found = [runner.backward(recording, score, [sites.INPUT], create_graph)[0] for score in self._scores]
        # Not by index, whose backward is a tensor of zeros for each place.
        return [list(each) for each in zip(*(gradient.unflatten(0, (-1, places)).unbind(1) for gradient in found), strict=True)]

    def _apart(self, runner: Runner, recording: Recording, images: Sequence[Tensor]) -> bool:
        """Whether places get what they get alone, and their scores depend on no other.

        It looks at the last place, the most unlike a baseline, and at one of the others, in turn: a model that divides by the largest value
        of the batch finds it at the last, which then depends on nothing else.
        """
        probe = probe_of(self.call.model, *self._kind, len(images[0]), runner.places)
        if not probe.due():
            return True
        last = runner.places - 1
        found = [self._place_apart(runner, recording, place, images[place].detach()) for place in (last, probe.calls.bit_length() % last)]
        if False in found:
            return False
        if None not in found:
            probe.found = True
        return True

    def _place_apart(self, runner: Runner, recording: Recording, place: int, images: Tensor) -> bool | None:
        """Whether one place is by itself; None: its gradients show nothing."""
        together = [value[place :: runner.places] for value in self._read(runner, recording)]
        # What depends on the place in the batch, or on draws of the model's own, has no gradient that would show it.
        if not same_alone(together, images, lambda image: self._read(self.runner, self.runner.replay(image, self._wanted, check=True))):
            return False
        shows = True
        for score in self._scores:
            gradient = runner.spread(recording, runner.scores(recording, score).unflatten(0, (-1, runner.places))[:, place].sum())
            if gradient is None or not bool(gradient.any()):  # a head that starts at zero shows nothing yet
                shows = False
                continue
            by_place = gradient.unflatten(0, (-1, runner.places)).clone()
            by_place[:, place] = 0
            if bool(by_place.any()):
                return False
        return True if shows else None

    def _draws_as_alone(self, recording: Recording, images: Tensor) -> bool:
        """Whether a pass drew what one over the images alone draws. To know that, one such forward has to run."""
        draws = recording.draws
        if draws.state.same(recording.rng):
            return True
        if self._alone_drew is None:
            with torch.no_grad():
                # The same sites: our operators, which note what is drawn, run only where gradients are taken.
                alone = self.runner.replay(images.detach(), self._wanted)
            self._alone_drew = alone.end, alone.draws.shapes
        state, shapes = self._alone_drew
        return draws.state.same(state) and draws.shapes == shapes


def budget(device: torch.device) -> int:
    """How many values the images of one pass may have. Smaller passes leave a machine idle between operators; larger ones gain nothing."""
    return 2**21 if device.type == "cpu" else 2**25  # an accelerator computes more in the time that Python takes to start an operator


def _separable(model: nn.Module, ours: bool) -> bool:
    """Whether nothing in a model is known to draw, or to let images meet, where our operators do not see it; `ours`: they run."""
    for module in modules(model):
        seen = ours and isinstance(module, _BatchNorm) and not isinstance(module, SyncBatchNorm)
        if isinstance(module, ScriptModule) or (couples(module) and not seen):
            return False
        drops = module.p if isinstance(module, _DropoutNd) else getattr(module, "drop_prob", 0)
        if module.training and not ours and isinstance(drops, (int, float)) and drops > 0:
            return False
    return True
