"""The state that passes run in, and must not leave changed: buffers, random number generators, settings, autocast."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from operator import is_
from types import BuiltinFunctionType, FunctionType, MappingProxyType, MethodType, NoneType
from typing import Any

import torch
from torch import Tensor, nn

from attrreg.graph import trainable_leaves
from attrreg.walk import modules


@dataclass(frozen=True)
class Rng:
    """The state of PyTorch's default generators: the CPU's, and that of the device in use."""

    device: torch.device
    cpu: Tensor
    accelerator: Tensor | None

    @staticmethod
    def of(device: torch.device) -> Rng:
        """The present state."""
        accelerator = None
        if device.type != "cpu":
            accelerator = torch.get_device_module(device).get_rng_state(device)
        return Rng(device, torch.get_rng_state(), accelerator)

    def same(self, other: Rng) -> bool:
        """Whether nothing was drawn between the two."""
        if not torch.equal(self.cpu, other.cpu):
            return False
        return self.accelerator is None or other.accelerator is None or torch.equal(self.accelerator, other.accelerator)

    def restore(self) -> None:
        """Go back to this state."""
        torch.set_rng_state(self.cpu)
        if self.accelerator is not None:
            torch.get_device_module(self.device).set_rng_state(self.accelerator, self.device)


def drawn_seed(generator: torch.Generator | None) -> int:
    """Draw a seed from a generator; None: from PyTorch's default generator on the CPU."""
    device = torch.device("cpu") if generator is None else generator.device
    return int(torch.randint(2**62, (), generator=generator, device=device))


BufferValues = Mapping[tuple[nn.Module, str], Tensor]  # what buffers held, by their module and name


def buffer_values(model: nn.Module) -> BufferValues:
    """What a model's buffers hold now, for a pass to be run later as it would have run now."""
    return {(module, name): buffer.clone() for module in modules(model) for name, buffer in module._buffers.items() if buffer is not None}


PLAIN = (bool, int, float, str)
_FLAGS = (*PLAIN, NoneType, tuple)
_EMPTY: dict[Any, Any] = {}  # what most registries hold
FUNCTIONS = (FunctionType, MethodType, BuiltinFunctionType)
_SETTINGS = (*PLAIN, NoneType, *FUNCTIONS)  # types of what may say how to compute
# The hooks on all modules, which PyTorch keeps for the whole process.
GLOBAL_HOOKS: dict[str, dict[Any, Any]] = {
    name: held for name, held in vars(nn.modules.module).items() if name.startswith(("_global_forward", "_global_backward"))
}
# Where modules keep layers, buffers and hooks.
_REGISTRIES = frozenset(
    (
        *GLOBAL_HOOKS,
        *("_modules", "_buffers"),
        *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
        *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
        *("_backward_pre_hooks", "_backward_hooks"),
    )
)


@dataclass(frozen=True)
class _Held:
    """What a module held at one time.

    Attributes:
        attributes: the module's own dict.
        names: of all attributes there were.
        values: those attributes that are put back.
        registries: what was in the registries among them.
    """

    attributes: dict[str, Any]
    names: list[str]
    values: dict[str, Any]
    registries: list[tuple[dict[Any, Any], dict[Any, Any]]]

    @staticmethod
    def of(attributes: dict[str, Any], registries: Set[str], everything: bool = False) -> _Held:
        """What a module holds now; `everything`: also what could hold a graph, which would then stay in memory."""
        kept = {
            name: value
            for name, value in attributes.items()
            if type(value) in _SETTINGS or name in registries or everything or _is_setting(value)  # the quickest first
        }
        found = [kept[name] for name in registries if isinstance(kept.get(name), dict)]  # TorchScript has others
        return _Held(attributes, [*attributes], kept, [(registry, dict(registry) if registry else _EMPTY) for registry in found])

    def same(self) -> bool:
        """Whether the module holds this now."""
        now = self.attributes
        if [*now] != self.names or any(now[name] is not value for name, value in self.values.items()):
            return False
        held = ((live, then) for live, then in self.registries if live or then)
        return all([*live] == [*then] and all(map(is_, live.values(), then.values())) for live, then in held)

    def put(self) -> None:
        """Make the module hold this."""
        for name in self.attributes.keys() - set(self.names):
            del self.attributes[name]
        self.attributes.update(self.values)
        for registry, content in self.registries:
            registry.clear()
            registry.update(content)


def _is_setting(value: object) -> bool:
    """Whether it may say how to compute, and holds no graph, as features that a forward keeps do."""
    if isinstance(value, Tensor):
        return value.grad_fn is None
    if isinstance(value, tuple):
        return all(map(_is_setting, value))
    return isinstance(value, _SETTINGS)


class Settings:
    """The layers, parameters, hooks and settings, modes included, that a model has now: for a pass to be run later as it would be now.

    Until then `torch.func.functional_call` may have taken back the parameters that it lent, or a `with` block a hook or a temperature.

    Args:
        model: the model.
        sharded: leave parameters alone: FSDP2 itself puts others in place in every pass.
    """

    def __init__(self, model: nn.Module, sharded: bool) -> None:
        found = modules(model)
        self._registries = _REGISTRIES if sharded else _REGISTRIES | {"_parameters"}
        self._held = [_Held.of(attributes, self._registries) for attributes in (*map(vars, found), GLOBAL_HOOKS)]
        self._scripted = [(module, module.training) for module in found if "training" not in vars(module)]

    @contextmanager
    def back(self) -> Iterator[None]:
        """Run a block with these in place."""
        changed = [held for held in self._held if not held.same()]
        now = [_Held.of(held.attributes, self._registries, everything=True) for held in changed]
        modes = [(module, then, module.training) for module, then in self._scripted if module.training != then]
        try:
            for held in changed:
                held.put()
            for module, then, _ in modes:
                module.training = then
            yield
        finally:
            for held in now:
                held.put()
            for module, _, mode in modes:
                module.training = mode


def _is_pytorchs(module: nn.Module) -> bool:
    """Whether its class is PyTorch's: parametrised and sharded modules of others have classes made by PyTorch, too."""
    return all(kind.__module__.startswith("torch.") for kind in type(module).__mro__[:-1])


class Buffers:
    """Copies of a model's buffers that stand in for them during a pass.

    The originals are set aside, not written back over: the graph of the user's own forward may have saved them, and
    writing would make its backward fail. Where one has a graph, as prototypes that a network makes, that leads on from its copy.

    Args:
        model: the model.
        values: what the copies shall hold; of a buffer that is not among them, what it holds now.
    """

    def __init__(self, model: nn.Module, values: BufferValues) -> None:
        self._originals = [(module, dict(module._buffers) if module._buffers else {}) for module in modules(model)]
        self._copies: dict[int, Tensor] = {}  # one shared by two modules stays shared
        for module, buffers in self._originals:
            for name, buffer in buffers.items():
                if buffer is not None and id(buffer) not in self._copies:
                    self._copies[id(buffer)] = values.get((module, name), buffer).clone()
        self._left: list[tuple[nn.Module, dict[str, Tensor | None], dict[str, Tensor | None]]] = []
        # What goes with a buffer, as a flag that says that the first batch has set it, goes back with it. PyTorch's own layers have none.
        holders = [vars(module) for module, buffers in self._originals if buffers and not _is_pytorchs(module)]
        self._flags = [(held, {name: value for name, value in held.items() if isinstance(value, _FLAGS)}) for held in holders]
        self._moved: list[tuple[dict[str, Any], dict[str, Any]]] = []

    def stand_in(self) -> None:
        """Put the copies in place."""
        for module, buffers in self._originals:
            for name, buffer in buffers.items():  # one by one: TorchScript's have no `update`
                if buffer is not None:
                    module._buffers[name] = self._copies[id(buffer)]

    def put_back(self) -> None:
        """Put the originals in place, as they were, and remember what the pass left in theirs."""
        self._left = [(module, buffers, dict(left)) for module, buffers in self._originals if (left := module._buffers) or buffers]
        for module, buffers, left in self._left:
            # The first buffers of a module stay: a flag that says that they are there was not noted, and would say so still.
            if buffers and left.keys() != buffers.keys():
                module._buffers.clear()
            for name, buffer in buffers.items():
                module._buffers[name] = buffer
        changed = [(held, then) for held, then in self._flags if any(held.get(name) is not value for name, value in then.items())]
        self._moved = [(held, {name: held[name] for name in then if name in held}) for held, then in changed]
        for held, then in changed:
            held.update(then)

    def commit(self) -> None:
        """Make what the pass did final (the originals are in place again)."""
        for held, flags in self._moved:
            held.update(flags)
        for module, buffers, left in self._left:
            for name, buffer in left.items():
                original = buffers.get(name)
                if original is not None and buffer is self._copies[id(original)]:
                    if not _is_writable(original):  # the forward itself could not have moved it
                        continue
                    # .data, as a forward writes its own statistics: without telling autograd, which would refuse an
                    # earlier graph that saved the buffer.
                    if original.shape == buffer.shape:
                        original.data.copy_(buffer)
                    else:  # resized in place, as observers for quantisation do at first
                        original.data = buffer.detach().clone()
                else:  # the forward assigned a new tensor
                    module._buffers[name] = buffer


def _is_writable(buffer: Tensor) -> bool:
    """Whether a forward may write into a buffer: not if it was made under inference_mode, or holds one value in several places."""
    if buffer.is_inference():
        return False
    strided = buffer.layout == torch.strided and not buffer.is_nested
    return not (strided and any(size > 1 and stride == 0 for size, stride in zip(buffer.shape, buffer.stride(), strict=True)))


def detach_buffers(model: nn.Module) -> None:
    """Detach buffers whose graph leads to nothing but tensors that we made to be differentiated: in a plain step they have none."""
    detached: dict[int, Tensor] = {}  # one shared by two modules stays shared
    for module in modules(model):
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.grad_fn is not None and next(trainable_leaves(buffer), None) is None:
                # Not in place: what a graph has saved may be the buffer itself.
                module._buffers[name] = detached.setdefault(id(buffer), buffer.detach())


@contextmanager
def copied_buffers(model: nn.Module, values: BufferValues = MappingProxyType({})) -> Iterator[Buffers]:
    """Run passes on copies of a model's buffers; `values`: see `Buffers`."""
    buffers = Buffers(model, values)
    try:
        buffers.stand_in()
        yield buffers
    finally:
        buffers.put_back()


@contextmanager
def isolated(model: nn.Module, device: torch.device, start: Rng | None = None) -> Iterator[Buffers]:
    """Run passes that leave no trace in the model's buffers or the random number generators.

    Args:
        model: the model.
        device: the device whose generator is kept, besides the CPU's.
        start: the state to start from, so that the pass draws what an earlier one drew; None: the present one.
    """
    before = Rng.of(device)
    try:
        with copied_buffers(model) as buffers:
            if start is not None:
                start.restore()
            yield buffers
    finally:
        before.restore()


def autocast_type(device: torch.device) -> torch.dtype | None:
    """What autocast computes in now; None: it is off."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def autocast_as(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[object]:
    """Autocast as `autocast_type` found it; None: off. Where it is so already, nothing is entered, because that takes time."""
    return nullcontext() if autocast_type(device) == dtype else torch.autocast(device.type, dtype, enabled=dtype is not None)


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Leave autocast: tensors are computed with in the types that they have."""
    # As `autocast_as(device, None)`, but quicker: operators ask for it, too.
    return torch.autocast(device.type, enabled=False) if torch.is_autocast_enabled(device.type) else nullcontext()


@contextmanager
def undone_on_error(device: torch.device, generator: torch.Generator | None) -> Iterator[None]:
    """Put the random number generators back as they were if the block raises."""
    before = Rng.of(device)
    own = generator.get_state() if generator is not None else None
    try:
        yield
    except BaseException:
        before.restore()
        if generator is not None and own is not None:
            generator.set_state(own)
        raise
