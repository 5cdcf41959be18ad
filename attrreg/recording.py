"""What one forward computed, and whether another one would compute the same."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from copy import copy
from dataclasses import dataclass
from itertools import chain
from operator import is_
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._pytree import tree_leaves, tree_map

from attrreg.call import Call
from attrreg.features import Head
from attrreg.ops import Phase, twice_differentiable
from attrreg.ops.draws import Draws
from attrreg.sites import INPUT, OUTPUT, SPATIAL
from attrreg.state import Rng, autocast_as, autocast_type
from attrreg.walk import modules

if TYPE_CHECKING:
    from attrreg.automatic import Question

PLAIN = (bool, int, float, str)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Buffers of these types are compared by value; of others, the version alone tells.
COMPARED = (*FLOATS, torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
BufferState = tuple[Tensor, int, Tensor | None]  # a buffer, its version and its value
Version = tuple[Tensor, int, Any]  # a tensor, how often it was written to, and its node in the graph


class Called(NamedTuple):
    """How the loop called the model, as it was before the forward.

    Attributes:
        args, kwargs: the arguments.
        images: how often the images were written to, and whether they require a gradient.
        question: what was asked of the layer for `layer="auto"`, where that one layer is recorded; None: all are.
        buffers: what `keep_buffers` gave; None: nobody asks.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    images: tuple[int, bool]
    question: Question | None
    buffers: list[BufferState] | None


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


class Conditions:
    """What the loop's own forward depended on and left, to tell whether all of it is the same still.

    Args:
        model: the model, after the forward.
        output: what it returned.
        recorded: what was recorded of it.
        called: how it was called.

    Attributes:
        question: see `Called`.
    """

    def __init__(self, model: nn.Module, output: Any, recorded: list[Tensor], called: Called) -> None:
        self._objects, self._numbers, self._settings = _state(model)
        self._arguments = tree_map(lambda leaf: leaf, (called.args, called.kwargs))  # in containers of our own
        self._images = called.images
        self._tensors = _versions([*parts((called.args, called.kwargs)), *recorded])
        self._output = _versions(parts(output))
        self.question = called.question
        self._moved = [True] if called.buffers is None else _differences(buffers_read(model), called.buffers)

    @property
    def moved(self) -> bool:
        """Whether the forward changed what the next one will compute with, as spectral normalisation's does."""
        return any(map(bool, self._moved))

    def same_for(self, call: Call) -> bool:
        """Whether a call would meet the same."""
        if self._images != image_state(call.x):
            return False
        objects, numbers, settings = _state(call.model)
        same = numbers == self._numbers and len(objects) == len(self._objects) and all(map(is_, objects, self._objects))
        return same and self._settings_hold(call.model, settings) and _unwritten(self._tensors) and self._called_with(call)

    def still_in(self, output: Any) -> bool:
        """Whether the output still holds the tensors that the model returned, in order: the loop may have put others deep in an object."""
        held = iter(parts(output))  # an iterator, so that each search goes on behind the last; there may be more, computed on demand
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
    twice: bool
    autocast: torch.dtype | None

    @property
    def draws(self) -> Draws:
        """What the forward drew."""
        assert self.phase.draws is not None  # since the tap was opened
        return self.phase.draws

    @property
    def drew(self) -> bool:
        """Whether the forward moved PyTorch's generators."""
        return not self.end.same(self.rng)

    @property
    def half(self) -> bool:
        """Whether it ran in float16."""
        return torch.float16 in (self.x.dtype, self.autocast)

    def picked(self, call: Call) -> Tensor:
        """The logits, picked as in the forward: a function may be a head, which draws, and computes in types as autocast says."""
        with ExitStack() as within:
            within.enter_context(autocast_as(self.x.device, self.autocast))
            if self.twice and self.taken and callable(call.output):
                within.enter_context(twice_differentiable(self.phase))
                within.callback(setattr, self.phase, "running", False)
                self.phase.running = True  # a backward now is the head's own
            return call.logits(self.output, self.end)

    def serves(self, call: Call, request: Request) -> bool:
        """Whether this is the pass that a call would run itself."""
        sites, twice, question, alone, returns_output = request
        if (twice and not self.twice) or self.x is not call.x or self.conditions is None or not self.conditions.same_for(call):
            return False
        differences = not twice and any(sites.values())  # finite differences start from the same buffers, but leave the loop's autocast
        if (differences or not alone) and self.conditions.moved:  # the call's other passes would compute with other buffers
            return False
        if not alone and self.autocast != autocast_type(call.x.device):
            return False
        if SPATIAL in sites and self.conditions.question not in (None, question):  # the one recorded layer answers another question
            return False
        if returns_output and not self.conditions.unchanged(self.returned):
            return False
        for site, differentiated in sites.items():
            found = site == OUTPUT or site in self.values or (site == SPATIAL and self.maps)
            if site not in self.problems and (not found or (differentiated and site not in self.taken and INPUT not in self.taken)):
                return False
        if OUTPUT in sites:
            if not self.conditions.still_in(self.output):
                return False
            logits = self.picked(call)
            if not self.conditions.logits_unchanged(logits):
                return False
            self.values[OUTPUT] = logits  # kept for the call, so that a function that picks them runs once: it may draw
        return True


def in_own_containers(output: Any) -> Any:
    """What a model returned, in containers of our own: the loop may put something else into its."""
    return tree_map(_own, output)


def _own(leaf: Any) -> Any:
    if isinstance(leaf, Tensor) or not parts(leaf):
        return leaf
    try:
        return copy(leaf)
    except Exception:  # whatever an object of the user's raises must not end their forward
        return leaf


def parts(output: Any, depth: int = 3) -> list[Tensor]:
    """All tensors in what a model takes or returns, in objects that PyTorch's trees do not look into too."""
    leaves = tree_leaves(output)
    deeper = [part for leaf in leaves if depth for part in parts(_inside(leaf), depth - 1)]
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)] + deeper


def _inside(leaf: Any) -> list[Any]:
    """The values that an object holds, if it is one to hold values."""
    if isinstance(leaf, Mapping):
        return list(leaf.values())
    if isinstance(leaf, (Tensor, nn.Module, type)) or callable(leaf):
        return []
    named = [slots for kind in type(leaf).__mro__ if (slots := kind.__dict__.get("__slots__"))]
    slots = [getattr(leaf, name, None) for names in named for name in ((names,) if isinstance(names, str) else names)]
    return [*getattr(leaf, "__dict__", {}).values(), *slots]


def _versions(tensors: list[Tensor]) -> list[Version]:
    return [(tensor, version(tensor), tensor.grad_fn) for tensor in tensors]


def _unwritten(versions: list[Version]) -> bool:
    """Whether tensors are as they were: not written to, nor cut from their graph by `detach_`, which leaves the version alone."""
    return all(version(tensor) == then and tensor.grad_fn is node for tensor, then, node in versions)


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


def _differences(now: list[Tensor], before: list[BufferState]) -> list[bool | Tensor]:
    """For each buffer, whether it changed; where values were compared, a tensor on their device, so that nobody waits for a GPU yet."""
    found: list[bool | Tensor] = [len(now) != len(before)]
    for buffer, (earlier, then, value) in zip(now, before, strict=False):
        same = buffer is earlier and version(buffer) == then
        if same and value is not None and buffer.shape == value.shape:
            found.append(((buffer != value) & ((buffer == buffer) | (value == value))).any())  # NaN is NaN
        else:
            found.append(not same)
    return found


def _plain(values: tuple[object, ...]) -> list[object]:
    return [(type(value), value) for value in values if isinstance(value, PLAIN)]


def _counts(module: nn.Module) -> bool:
    """Whether it counts steps rather than computes logits: a metric, or the module of a training loop."""
    return any(kind.__module__.startswith(("torchmetrics.", "lightning.", "pytorch_lightning.")) for kind in type(module).__mro__)


def _state(model: nn.Module) -> tuple[list[object], list[int], list[tuple[object, ...]]]:
    """Modules, hooks, parameters and buffers; modes, what is trained, and versions; all that each module holds."""
    found = modules(model)
    # Comprehensions, and no calls: a step asks twice, of models of hundreds of modules.
    hooks = [hook for module in found for held in (module._forward_pre_hooks, module._forward_hooks) if held for hook in held.values()]
    parameters = [each for module in found if module._parameters for each in module._parameters.values() if each is not None]
    buffers = [each for module in found if module._buffers for each in module._buffers.values() if each is not None]
    numbers: list[int] = [module.training for module in found]
    numbers += [parameter.requires_grad for parameter in parameters]
    numbers += [*_counts_of_writes(parameters), *_counts_of_writes(buffers)]
    return [*found, *hooks, *parameters, *buffers], numbers, [tuple(module.__dict__.values()) for module in found]


def version(tensor: Tensor) -> int:
    """How often a tensor was written to, as far as PyTorch counts."""
    return -1 if tensor.is_inference() else tensor._version


def _counts_of_writes(tensors: Sequence[Tensor]) -> list[int]:
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
