"""What the loop's own forward depended on and left, and whether all of it is the same still."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from itertools import chain
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._pytree import tree_leaves, tree_map

from attrreg.call import Call
from attrreg.state import FUNCTIONS, GLOBAL_HOOKS, PLAIN
from attrreg.walk import modules

# Buffers of these types are compared by value; of others, the version alone tells.
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
COMPARED = (*FLOATS, torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
BufferState = tuple[Tensor, int, Tensor | None]  # a buffer, its version and its value
TensorState = tuple[Tensor, int, Any]  # a tensor, its version and its node in the graph


class Called(NamedTuple):
    """How the loop called the model, as it was before the forward.

    Attributes:
        args, kwargs: the arguments.
        images: how often the images were written to, and whether they require a gradient.
        buffers: what `keep_buffers` gave; None: nobody asks.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    images: tuple[int, bool]
    buffers: list[BufferState] | None


class Conditions:
    """What the loop's own forward depended on and left, to tell whether all of it is the same still.

    Args:
        model: the model, after the forward.
        output: what it returned.
        recorded: what was recorded of it.
        called: how it was called.
    """

    def __init__(self, model: nn.Module, output: Any, recorded: list[Tensor], called: Called) -> None:
        self._objects, self._numbers, self._settings = _model_state(model)
        self._arguments = tree_map(lambda leaf: leaf, (called.args, called.kwargs))  # in containers of our own
        self._images = called.images
        self._tensors = _tensor_states([*tensors_in((called.args, called.kwargs)), *recorded])
        self._output = _tensor_states(tensors_in(output))
        self._moved = [True] if called.buffers is None else _changes(buffers_read(model), called.buffers)

    @property
    def moved(self) -> bool:
        """Whether the forward changed what the next one will compute with, as spectral normalisation's does."""
        compared = [part for part in self._moved if isinstance(part, Tensor)]
        if any(part is True for part in self._moved) or not compared:
            return any(part is True for part in self._moved)
        # All at once: each by itself would wait for a GPU.
        return bool(torch.stack([part.to(compared[0].device) for part in compared]).any())

    def same_for(self, call: Call) -> bool:
        """Whether a call would meet the same."""
        if self._images != image_state(call.x):
            return False
        objects, numbers, settings = _model_state(call.model)
        same = numbers == self._numbers and len(objects) == len(self._objects) and all(map(is_, objects, self._objects))
        return same and self._settings_hold(call.model, settings) and _unwritten(self._tensors) and self._called_with(call)

    def still_in(self, output: Any) -> bool:
        """Whether the output still holds the tensors that the model returned, in order: the loop may have put others deep in an object."""
        held = iter(tensors_in(output))  # an iterator, so that each search goes on behind the last; there may be more, computed on demand
        return all(any(tensor is part for part in held) for tensor, _, _ in self._output)

    def unchanged(self, output: Any) -> bool:
        """Whether what the model returned still has its tensors, and none was written to."""
        return self.still_in(output) and _unwritten(self._output)

    def logits_unchanged(self, logits: Tensor) -> bool:
        """Whether the loop left the logits as they were, or all that the model returned if they are made of that."""
        own = [then for then in self._output if then[0] is logits]
        return _unwritten(own or self._output)

    def _settings_hold(self, model: nn.Module, now: list[tuple[object, ...]]) -> bool:
        """Whether modules still say how to compute by the same values; the tensors that some keep do not count."""
        # The usual case, compared by identity, which is quick.
        if all(map(is_, chain(*self._settings), chain(*now))) and list(map(len, now)) == list(map(len, self._settings)):
            return True
        pairs = zip(modules(model), self._settings, now, strict=True)
        return all(_counts(module) or _plain(then) == _plain(values) for module, then, values in pairs)

    def _called_with(self, call: Call) -> bool:
        inputs = (call.x,) if call.inputs is None else call.inputs
        args, kwargs = ((), dict(inputs)) if isinstance(inputs, Mapping) else (inputs, {})
        return _same(_bound(call.model, args, kwargs), _bound(call.model, *self._arguments))


def tensors_in(output: Any, depth: int = 3) -> list[Tensor]:
    """All tensors in what a model takes or returns, in objects that PyTorch's trees do not look into too."""
    leaves = tree_leaves(output)
    deeper = [part for leaf in leaves if depth for part in tensors_in(_inside(leaf), depth - 1)]
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)] + deeper


def _inside(leaf: Any) -> list[Any]:
    """The values that an object holds, if it is one to hold values."""
    if isinstance(leaf, Mapping):
        return list(leaf.values())
    if isinstance(leaf, (Tensor, nn.Module, type)):
        return []
    named = [slots for kind in type(leaf).__mro__ if (slots := kind.__dict__.get("__slots__"))]
    slots = [getattr(leaf, name, None) for names in named for name in ((names,) if isinstance(names, str) else names)]
    return [*getattr(leaf, "__dict__", {}).values(), *slots]


def _tensor_states(tensors: list[Tensor]) -> list[TensorState]:
    return [(tensor, version(tensor), tensor.grad_fn) for tensor in tensors]


def _unwritten(states: list[TensorState]) -> bool:
    """Whether tensors are as they were: not written to, nor cut from their graph by `detach_`, which leaves the version alone."""
    return all(version(tensor) == then and tensor.grad_fn is node for tensor, then, node in states)


def buffers_read(model: nn.Module) -> list[Tensor]:
    """Buffers that a forward may compute with and change."""
    return [buffer for module in modules(model) if not _accumulates(module) for buffer in module._buffers.values() if buffer is not None]


def keep_buffers(model: nn.Module) -> list[BufferState]:
    """Those buffers, each with its version and a copy of its values: a write through `.data` leaves the version as it was."""
    return [(buffer, version(buffer), buffer.detach().clone() if _compares(buffer) else None) for buffer in buffers_read(model)]


def _compares(buffer: Tensor) -> bool:
    """Whether it has values that can be compared."""
    plain = type(buffer) is Tensor and buffer.layout == torch.strided and not buffer.is_nested and not buffer.is_meta
    return plain and buffer.dtype in COMPARED


def _accumulates(module: nn.Module) -> bool:
    """Whether a module only accumulates statistics, unread in train mode: norms of PyTorch and timm. Subclasses may read theirs."""
    return isinstance(module, _NormBase) and type(module).forward.__module__.startswith(("torch.", "timm."))


def _changes(now: list[Tensor], before: list[BufferState]) -> list[bool | Tensor]:
    """For each buffer, whether it changed; where values were compared, a tensor on their device, so that nobody waits for a GPU yet."""
    found: list[bool | Tensor] = [len(now) != len(before)]
    for buffer, (earlier, then, value) in zip(now, before, strict=False):
        same = buffer is earlier and version(buffer) == then and (value is None or buffer.shape == value.shape)
        if same and value is not None:
            found.append(((buffer != value) & ((buffer == buffer) | (value == value))).any())  # NaN is NaN
        else:
            found.append(not same)
    return found


def _plain(values: tuple[object, ...]) -> list[object]:
    return [(type(value), value) for value in values if isinstance(value, (*PLAIN, *FUNCTIONS))]


def _counts(module: nn.Module) -> bool:
    """Whether it counts steps rather than computes logits: a metric, or the module of a training loop."""
    return any(kind.__module__.startswith(("torchmetrics.", "lightning.", "pytorch_lightning.")) for kind in type(module).__mro__)


def _model_state(model: nn.Module) -> tuple[list[object], list[int], list[tuple[object, ...]]]:
    """Modules, hooks, parameters and buffers; modes, what is trained, and versions; all that each module holds."""
    found = modules(model)
    # Comprehensions, and no calls: a step asks twice, of models of hundreds of modules.
    # Also those of backwards, which PyTorch builds into the graph as a layer runs.
    kinds = ((m._forward_pre_hooks, m._forward_hooks, m._backward_pre_hooks, m._backward_hooks) for m in found)
    hooks = [hook for held in chain(*kinds, GLOBAL_HOOKS.values()) if held for hook in held.values()]
    parameters = [each for module in found if module._parameters for each in module._parameters.values() if each is not None]
    buffers = [each for module in found if module._buffers for each in module._buffers.values() if each is not None]
    numbers: list[int] = [module.training for module in found]
    numbers += [parameter.requires_grad for parameter in parameters]
    numbers += _versions(parameters) + _versions(buffers)
    return [*found, *hooks, *parameters, *buffers], numbers, [tuple(module.__dict__.values()) for module in found]


def version(tensor: Tensor) -> int:
    """How often a tensor was written to, as far as PyTorch counts."""
    return -1 if tensor.is_inference() else tensor._version


def _versions(tensors: Sequence[Tensor]) -> list[int]:
    """The `version` of each, quicker."""
    try:
        return [tensor._version for tensor in tensors]
    except RuntimeError:  # one made under inference_mode has none
        return [version(tensor) for tensor in tensors]


def image_state(x: Tensor) -> tuple[int, bool]:
    """How often images were written to, and whether they require a gradient."""
    return version(x), x.requires_grad


def _bound(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[Any, Any]:
    """Arguments by name, whether they were given so, by position or not at all."""
    try:
        bound = inspect.signature(model.forward).bind(*args, **kwargs)
    except (TypeError, ValueError):
        return {**dict(enumerate(args)), **kwargs}
    bound.apply_defaults()
    return dict(bound.arguments)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, (tuple, list)) and type(a) is type(b):
        return len(a) == len(b) and all(map(_same, a, b))
    return a is b or (type(a) is type(b) and isinstance(a, PLAIN) and a == b)
