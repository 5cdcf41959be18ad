"""The state that passes run in, and must not leave changed: buffers, random number generators, autocast."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from types import MappingProxyType

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


_REGISTRIES = (
    "_modules",
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_backward_pre_hooks", "_backward_hooks"),
)


_EMPTY: dict[str, object] = {}
PLAIN = (bool, int, float, str)


class Settings:
    """The layers, parameters, hooks and plain settings, modes included, that a model has now: for a pass to be run later as it would now.

    Until then `torch.func.functional_call` may have taken back the parameters that it lent, or a `with` block a hook or a temperature.

    Args:
        model: the model.
        sharded: leave parameters alone: FSDP2 itself puts others in place in every pass.
    """

    def __init__(self, model: nn.Module, sharded: bool) -> None:
        held, names = [vars(module) for module in modules(model)], _REGISTRIES if sharded else ("_parameters", *_REGISTRIES)
        registries = [values[name] for values in held for name in names if isinstance(values.get(name), dict)]  # not TorchScript's
        self._registries = [(registry, dict(registry) if registry else _EMPTY) for registry in registries]  # most are
        self._plain = [(values, {name: value for name, value in values.items() if isinstance(value, PLAIN)}) for values in held]

    @contextmanager
    def back(self) -> Iterator[None]:
        """Run a block with these in place."""
        held = [(live, then) for live, then in self._registries if live or then]
        moved = [(live, then, dict(live)) for live, then in held if [*map(id, live.values())] != [*map(id, then.values())]]
        others = [[k for k, v in then.items() if live.get(k, v) is not v] for live, then in self._plain]
        changed = [(live, then, names) for (live, then), names in zip(self._plain, others, strict=True) if names]
        plain = [(live, {k: then[k] for k in names}, {k: live[k] for k in names}) for live, then, names in changed]
        try:
            for live, then, _ in moved:
                live.clear()
                live.update(then)
            for live, then, _ in plain:
                live.update(then)
            yield
        finally:
            for live, _, now in moved:
                live.clear()
                live.update(now)
            for live, _, now in plain:
                live.update(now)


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
            if left.keys() != buffers.keys():
                module._buffers.clear()
            for name, buffer in buffers.items():
                module._buffers[name] = buffer

    def commit(self) -> None:
        """Make what the pass did final (the originals are in place again)."""
        for module, buffers, left in self._left:
            for name, buffer in left.items():
                original = buffers.get(name)
                if original is not None and buffer is self._copies[id(original)]:
                    # .data, as a forward writes its own statistics: without telling autograd, which would refuse an
                    # earlier graph that saved the buffer.
                    if original.shape == buffer.shape:
                        original.data.copy_(buffer)
                    else:  # resized in place, as observers for quantisation do at first
                        original.data = buffer.detach().clone()
                else:  # the forward assigned a new tensor
                    module._buffers[name] = buffer


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
