"""What an autograd graph leads to."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from attrreg.walk import modules

LITTLE = 64  # how many operators before a value are looked at: a head has fewer, and to look at a whole model would take time
LEAF = "_attrreg_leaf"  # marks tensors that we made to be differentiated: its value is the phase of the pass


def nodes(*values: Tensor, around: Iterable[Any] = ()) -> Iterator[Any]:
    """The nodes that values were computed by, each once, the nearest first; `around`: nodes at which the search stops."""
    pending, seen = deque(value.grad_fn for value in values), {*around}
    while pending:
        node = pending.popleft()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        pending.extend(parent for parent, _ in node.next_functions)


def trainable_leaves(*values: Tensor, around: Iterable[Any] = ()) -> Iterator[Tensor]:
    """The leaves that a graph leads to, without those that a pass made to be differentiated; `around`: see `nodes`."""
    for node in nodes(*values, around=around):
        variable = getattr(node, "variable", None)
        if variable is not None and not hasattr(variable, LEAF):
            yield variable


def trained_by(model: nn.Module, *values: Tensor) -> list[Tensor]:
    """What values can train: the leaves that they lead to; in place of those behind a parameter with a graph, as if lent, that one."""
    held = [parameter for module in modules(model) for parameter in module._parameters.values() if parameter is not None]
    lent = [parameter for parameter in held if parameter.grad_fn is not None]
    if not lent:
        return list(trainable_leaves(*values))
    found = set(nodes(*values))
    return [*trainable_leaves(*values, around=[each.grad_fn for each in lent]), *(each for each in lent if each.grad_fn in found)]


def leads_to_ours(node: Any, phase: Any) -> bool:
    """Whether a gradient at a node would go on to nothing but the leaf that this pass made: no, at the first node with several inputs."""
    while len(following := node.next_functions) == 1 and following[0][0] is not None:
        ((node, _),) = following
    # The loop may ask for the gradient on the way, where its own model made the images differentiable; then it does not go on to the leaf.
    return getattr(getattr(node, "variable", None), LEAF, None) is phase and executes(node, leaf=False)


def which_are_read(total: Tensor, values: Sequence[Tensor]) -> list[bool]:
    """Of each value, whether a total was computed from it."""
    found = set(nodes(total))
    leaves = {id(node.variable) for node in found if hasattr(node, "variable")}
    return [value is total or value.grad_fn in found or id(value) in leaves for value in values]


def checkpoints_reentrant(total: Tensor) -> bool:
    """Whether a graph has blocks checkpointed with `use_reentrant=True`."""
    return any(type(node).__name__ == "CheckpointFunctionBackward" for node in nodes(total))


def ends_in_half(value: Tensor) -> bool:
    """Whether a value was computed in float16 a little earlier: the model has an autocast of its own."""
    return any(of.dtype == torch.float16 for node in islice(nodes(value), LITTLE) for of in node._input_metadata)


def made_by(total: Tensor, node: Any, around: Any = None) -> bool:
    """Whether a total was computed by a node; `around`: by a way around a later one, as by the shortcut around a residual branch."""
    return any(each is node for each in nodes(total, around=[around]))


def executes(node: Any, leaf: bool) -> bool:
    """Whether the running backward reaches a node; `leaf`: the answer for a leaf that `autograd.grad` was asked for: PyTorch raises."""
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:
        return leaf
