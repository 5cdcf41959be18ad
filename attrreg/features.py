"""Which tensor the features are: what enters the classifier."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from attrreg.graph import made_by, nodes, trainable_leaves
from attrreg.ops.process import transformed
from attrreg.walk import modules, within_whole

LARGE = 4  # of layers whose outputs are maps or tokens, which take memory, so many of the last are kept; of those with vectors, all are
PROJECTIONS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Head(NamedTuple):
    """A layer that may be the classifier, in one forward.

    Attributes:
        input, output: what it was called with, and what it returned.
        node: the output's node in the graph, kept because a loop that writes into the output gives it another one.
        named: the model itself names the layer as its classifier.
        layer: the module.
    """

    input: Tensor
    output: Tensor
    node: Any
    named: bool
    layer: nn.Module


class Heads:
    """The layers of a model that may be the classifier, in one forward.

    Attributes:
        layers: those to register `take` on: the classifiers that the model names, or else all linear layers and convolutions.
        features: what entered the likeliest of them so far; None: none has run.
    """

    def __init__(self, model: nn.Module) -> None:
        named = _classifiers(model)
        self._named = bool(named)
        whole = within_whole(model)
        self.layers = named or [module for module in modules(model) if isinstance(module, PROJECTIONS) and module not in whole]
        self.features: Tensor | None = None
        self._first = len(named) > 1  # of heads that the model names, the first is its main one; else the last that ran is
        self._found: list[Head] = []

    def take(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """A forward hook, with keywords."""
        entered = args[0] if args else kwargs.get("input")
        if not isinstance(entered, Tensor) or transformed():
            return
        if self.features is None or not self._first:
            self.features = entered
        if isinstance(output, Tensor):
            large = [head for head in self._found if head.output.dim() > 2]
            if output.dim() > 2 and len(large) == LARGE:
                self._found = [head for head in self._found if head is not large[0]]
            self._found.append(Head(entered, output, output.grad_fn, self._named, module))

    def found(self) -> tuple[Head, ...]:
        """Those that ran, the likeliest last."""
        return tuple(reversed(self._found) if self._first else self._found)


def find_features(heads: Sequence[Head], logits: Tensor, own: Sequence[Tensor]) -> Tensor | None:
    """What entered the likeliest layer that the logits come from: an auxiliary head may run after it; None: that cannot be told.

    Args:
        heads: the layers.
        logits: the logits.
        own: what they are read from of what the model returned: a head that `output=` applies does not count.

    Raises:
        ValueError: the logits come from none of the layers, or the classifier is no layer, or ran several times.
    """
    for head in reversed(heads):
        if head.output is logits or made_by(logits, head.node):
            if not head.named and _weights_after(heads, head, own):
                raise ValueError(
                    "Other weights than those of the last linear or convolutional layer come after it or beside it, so it may not be the "
                    "classifier. Name the layer of the features."
                )
            if _ran_beside(heads, head, logits):
                raise ValueError(
                    "The classifier ran more than once in one forward, as on several crops, so that what enters it is not one tensor. "
                    "Name a layer that runs once, or let the model run once on each crop."
                )
            return _beside(heads, head, logits).input
    if logits.grad_fn is not None and any(head.node is not None for head in heads):
        raise ValueError("The logits come from none of the layers that features are looked for in. Name the layer of the features.")
    return None


def _weights_after(heads: Sequence[Head], head: Head, own: Sequence[Tensor]) -> bool:
    """Whether matrices make the model's output past a layer that are the weights of none, as those of a head without a layer do."""
    before = [*(each.node for each in heads), head.input.grad_fn]  # what it reads itself, too
    found = [leaf for leaf in trainable_leaves(*own, around=before) if sum(size > 1 for size in leaf.shape) > 1]
    known = {id(weight) for each in heads for weight in each.layer.parameters()} if found else set()
    return any(id(leaf) not in known for leaf in found)


def _ran_beside(heads: Sequence[Head], last: Head, logits: Tensor) -> bool:
    """Whether the logits come from another run of a layer, too, on other features, that is not before this one."""
    runs = [head for head in heads if head.layer is last.layer and head.input is not last.input]
    return any(made_by(logits, head.node, around=last.node) for head in runs)


def _beside(heads: Sequence[Head], last: Head, logits: Tensor) -> Head:
    """The layer that an adapter of low rank (LoRA) runs beside, if `last` is the second of its two: nothing is between them."""
    first = next((head for head in heads if head.output is last.input), None)
    if first is None:
        return last
    before = set(nodes(last.input))  # what runs before both is not beside them
    for head in heads:
        alike = head.input.shape == first.input.shape and head.output.shape == last.output.shape
        if not alike or head.node in before:
            continue
        if head.node is None or made_by(logits, head.node, around=last.node):
            return head
    return last


def _classifiers(model: nn.Module) -> list[nn.Module]:
    """Where the features enter, if the model names it as timm's do; the first is its main one."""
    classifier = getattr(model, "get_classifier", None)
    try:
        named = classifier() if callable(classifier) else None
    except TypeError:  # one of the user's own, which takes arguments
        named = None
    heads = named if isinstance(named, (tuple, list)) else [named]
    found = [layer for head in heads if isinstance(head, nn.Module) and (layer := _projection(head)) is not None]
    return found if len(found) == len(heads) else []


def _projection(head: nn.Module) -> nn.Module | None:
    """The layer by which a classifier projects: itself, or the only one in it, as LeViT's normalise first."""
    if isinstance(head, PROJECTIONS):
        return head
    inside = [layer for layer in modules(head) if isinstance(layer, PROJECTIONS)]
    alone = len(inside) == sum(weight.dim() > 1 for weight in head.parameters()) == 1
    return inside[0] if alone else None
