"""Places of a path that run as one batch, where that changes nothing but the time."""

from __future__ import annotations

from torch import Tensor
from torch.jit import ScriptModule
from torch.nn import SyncBatchNorm
from torch.nn.modules.batchnorm import _BatchNorm

from attrreg import sites
from attrreg.part import couples
from attrreg.runner import Runner
from attrreg.scores import Score
from attrreg.state import Rng, isolated

# Values in one pass's images. Small passes leave a machine idle between operators; beyond this size folding saved nothing on a CPU.
BUDGET = 2**21


class PathGradients:
    """The gradients of scores at places of a path.

    The first place runs alone and tells whether the others may share a batch: nothing was drawn (each place repeats the draws of the
    clean pass), and what couples the images of a batch is batch normalisation in train mode, of the whole batch, which our operator
    can do place by place.

    A chunked path's backward keeps this object, so it holds nothing that passes computed.

    Args:
        runner: runs the passes.
        wanted: the sites to record.
        scores: what is differentiated.
        replay: from where each pass draws.
    """

    def __init__(self, runner: Runner, wanted: dict[str, bool], scores: list[Score], replay: Rng) -> None:
        self._runner = runner
        self._wanted = wanted
        self._scores = scores
        self._replay = replay
        self._separable: bool | None = None  # until the first pass has told

    def room(self, pending: int) -> int:
        """How many of the places that are left may come as one batch."""
        return max(1, min(pending, BUDGET // self._runner.call.x.numel())) if self._separable else 1

    def __call__(self, images: Tensor, places: int, create_graph: bool) -> list[Tensor]:
        """One gradient a score, of the shape of `images`: those of so many places, one after the other."""
        runner = self._runner.repeated(places)
        with isolated(runner.call.model, self._replay):
            recording = runner.forward(images, self._wanted, places=places)
            if self._separable is None:
                drew = not Rng.of(images.device).same(self._replay)
                self._separable = not drew and runner.call.inputs is None and self._by_place(recording.phase.normalised)
        return [runner.backward(recording, score, [sites.INPUT], create_graph)[0] for score in self._scores]

    def _by_place(self, normalised: set[int]) -> bool:
        """Whether images of several places do not meet, given the batch sizes that our operator normalised."""
        call = self._runner.call
        coupling = [module for module in call.model.modules() if couples(module)]
        if not coupling:
            return True
        ours = all(isinstance(module, _BatchNorm) and not isinstance(module, (SyncBatchNorm, ScriptModule)) for module in coupling)
        return ours and self._runner.twice and normalised == {call.x.shape[0]}
