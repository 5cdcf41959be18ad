"""Which layer `layer="auto"` stands for in a model, and what is remembered of it.

A pass that is not told the layer records the last maps (`hooks.Tap`). When the score is known, `candidates` are the maps that it reads, and
`choose` takes one of them by the gradients there, and remembers its layer for the `Question` that the call asked. A later pass records that
layer alone: one of our own if its call asks the same (`known`), the loop's own, which runs before any question, if all calls asked the same
(`sole_question`).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from types import CodeType
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from attrreg import sites
from attrreg.call import Call, picked_by
from attrreg.graph import made_by, which_are_read
from attrreg.recording import Question, Recording
from attrreg.scores import Score
from attrreg.walk import modules, path_to

if TYPE_CHECKING:
    from attrreg.runner import Runner

NamedMap = tuple[str, Tensor]


# The layer that was found for each question about a model: only what runs from there on must be differentiable twice.
_KNOWN: WeakKeyDictionary[nn.Module, dict[Question, str]] = WeakKeyDictionary()


def kind(x: Tensor, model: nn.Module) -> Hashable:
    """What the layer depends on that a forward itself tells: the shape of an image, the mode, the number of modules."""
    # The number, because others may have been added behind the layer that was the last.
    return x.shape[1:], model.training, len(modules(model))


def question_of(call: Call, score: Score | None) -> Question:
    """The question of a call; `score`: what is differentiated there, None: nothing."""
    return Question(kind(call.x, call.model), picked_by(call.output), sites.OUTPUT if score is None else score.site)


def known(call: Call, question: Question | None) -> str | None:
    """The layer that an earlier call with the same question found, which the model may have lost since; None: it has to be found."""
    if question is None or question.picked_by is ... or isinstance(question.picked_by, CodeType):  # a function may pick by its argument
        return None
    return _KNOWN.get(call.model, {}).get(question)


def forget(model: nn.Module) -> None:
    """Forget what was found for a model: it may have changed, and the loop that attaches now may ask another question."""
    _KNOWN.pop(model, None)


def sole_question(model: nn.Module, kind: Hashable) -> tuple[Question, str] | None:
    """The question that all calls on forwards of a kind asked, with its layer; None: none was asked, several were, or it may change."""
    found = [item for item in _KNOWN.get(model, {}).items() if item[0].kind == kind]
    return found[0] if len(found) == 1 and found[0][0].picked_by is not ... else None


def candidates(runner: Runner, recording: Recording, total: Tensor) -> list[NamedMap]:
    """The last map that a score depends on; if that is of tokens, also the earlier maps of its shape. Empty: it depends on none.

    Raises:
        ValueError: no layer has a map.
    """
    model = runner.call.model
    if not recording.maps:
        cause = recording.problems.get(sites.SPATIAL, "no layer has one. Name a layer whose output is (N, C, h, w).")
        raise ValueError(f"layer='auto' found no layer with a spatial map: {cause}")
    # Auxiliary heads have maps that the score does not read.
    on_path = which_are_read(total, [map for _, map in recording.maps])
    maps = [named for named, is_read in zip(recording.maps, on_path, strict=True) if is_read]
    if maps and runner.call.inputs is not None:  # what comes from another input may look like a map, as a text's tokens do
        reached = _reached(runner)
        maps = [(name, map) for name, map in maps if name in reached]
    if not maps:
        return []
    # Queries, keys and hidden features have maps too, but of another meaning or width: rather not those.
    width = getattr(model, "num_features", None)
    outside = [(name, map) for name, map in maps if not _inside(model, name)]
    usual = [(name, map) for name, map in outside if width in map.shape[1:]] or outside or maps
    last = _before_block(model, total, outside or maps, usual[-1])
    if is_grid(model, recording.x, *last):
        return [last]
    return [named for named in usual if named[1].shape[1:] == last[1].shape[1:]]


def is_grid(model: nn.Module, x: Tensor, name: str, map: Tensor) -> bool:
    """Whether it is a map as it is, and not of tokens."""
    return isinstance(sites.layout(map, model, x, name), str)


def choose(call: Call, score: Score | None, maps: list[NamedMap], grads: Sequence[Tensor | None]) -> int:
    """Which of the candidates it is, by the score's gradients there: the last whose patches have one.

    Where a class token is pooled, nobody reads the patches of the last layers.

    Raises:
        RuntimeError: only a class token is read.
    """
    decided = [
        place
        for place, ((name, map), grad) in enumerate(zip(maps, grads, strict=True))
        if is_grid(call.model, call.x, name, map) or (grad is not None and sites.to_grid(grad, call.model, call.x, name).any())
    ]
    if not decided:
        # All are zero where a head starts at zero. Where the class token alone has a gradient, the model never reads patches.
        if any(grad is not None and grad.any() for grad in grads):
            raise RuntimeError(
                "layer='auto' found no layer whose patches the score reads, only a class token. Name an earlier layer, from "
                "attrreg.layers(model, x)."
            )
        return len(maps) - 1
    question = question_of(call, score)
    if question.picked_by is not ... or not call.shown:  # a map that is looked at is no question of the loop's
        _KNOWN.setdefault(call.model, {})[question] = maps[decided[-1]][0]
    return decided[-1]


def _before_block(model: nn.Module, total: Tensor, maps: list[NamedMap], last: NamedMap) -> NamedMap:
    """The last map; or the map that enters its block, if a shortcut leads around the last one.

    On small images a residual block's own output may be a single position, which is no map: the last one then lies in its branch.
    """
    first, end = maps[0][1].grad_fn, next(place for place, (name, _) in enumerate(maps) if name == last[0])
    if last[1].dim() != 4 or not made_by(total, first, around=last[1].grad_fn):
        return last
    for place in reversed(range(end)):
        name, map = maps[place]
        inside = [later for later, _ in maps[place + 1 : end + 1]]
        block = _around(inside)
        runs = block and not isinstance(model.get_submodule(block), (nn.ModuleList, nn.ModuleDict))
        apart = runs and not name.startswith(f"{block}.")
        alone = apart and map.shape[2:] == last[1].shape[2:] and (place == 0 or not made_by(total, first, around=map.grad_fn))
        if alone and made_by(last[1], map.grad_fn):  # else it is of another stream, as in an ensemble
            return name, map
    return last


def _reached(runner: Runner) -> set[str]:
    """Layers whose map comes from the images; takes a forward."""
    recording = runner.replay(runner.call.x.detach(), {sites.INPUT: True, sites.SPATIAL: False})
    images = [recording.values[sites.INPUT]]
    return {name for name, map in recording.maps if which_are_read(map, images)[0]}


def _around(names: Sequence[str]) -> str:
    """The innermost module that layers are in."""
    first, *others = (name.split(".")[:-1] for name in names)
    return ".".join(part for place, part in enumerate(first, 1) if all(other[:place] == first[:place] for other in others))


def _inside(model: nn.Module, name: str) -> bool:
    """Whether a layer is a part of attention, or of the perceptron that follows it."""
    names = name.lower().split(".")[:-1]
    kinds = [type(module).__name__.lower() for module in path_to(model, name)[1:-1]]
    # A block of attention is more than that: its output is the map.
    if any("attention" in kind.replace("attentionblock", "") for kind in kinds):
        return True
    return any(part in ("mlp", "ffn", "xca") or "attn" in part.replace("attn_block", "") for part in names)
