"""Hooks: record what a forward computes at named sites, in a pass of our own or in the loop's.

All hooks of the library live here. A `Tap` opens before one forward and closes after it; `Attachment` opens and closes
one around each of the loop's own forwards.
"""

from __future__ import annotations

import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from attrreg.ops import Phase, twice_differentiable
from attrreg.sites import FEATURES, INPUT, OUTPUT, SPATIAL, SPECIAL, check_layer, varies
from attrreg.state import Rng
from attrreg.wrappers import compiled, unwrap

LEAF = "_attrreg_leaf"  # marks tensors that we made to be differentiated
MAPS = 32  # how many of the last maps are kept for layer="auto": more than the last block of any model known to us has
PROJECTIONS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Recording:
    """What one forward computed.

    Attributes:
        x: the tensor that the model was called with, and `version` its state then.
        values: at each recorded site, the tensor, with its graph.
        problems: for each site that could not be recorded, why.
        maps: for the site `SPATIAL`, the last layers whose output is a map, by name, in the order they ran; the known one
            alone, if it is known.
        output: what the model returned.
        rng: the state from which the forward drew, to replay it.
        state: of the model, to tell whether it is the same still.
        phase: shared with the operators of the forward, to be told what a backward is for.
    """

    x: Tensor
    version: int
    values: dict[str, Tensor]
    problems: Mapping[str, str]
    maps: tuple[tuple[str, Tensor], ...]
    output: Any
    rng: Rng
    state: tuple[int, ...]
    phase: Phase

    def serves(self, model: nn.Module, x: Tensor, sites: Mapping[str, bool]) -> bool:
        """Whether this is the pass that a call on `x` would run itself."""
        if self.x is not x or self.version != x._version or self.state != _state(model):
            return False
        for site, differentiated in sites.items():
            value = self.values.get(site)
            if site in (OUTPUT, SPATIAL) and (site == OUTPUT or self.maps):
                continue
            if site not in self.problems and (value is None or (differentiated and not value.requires_grad)):
                return False
        return True


class Tap:
    """Records one forward.

    Args:
        model: the model.
        sites: what to record; True where a gradient will be taken.
        own: the pass is the library's own, so the model works on a copy of the images.
        map: the layer that `SPATIAL` is known to be; None: keep the last few that it could be.
    """

    def __init__(self, model: nn.Module, sites: Mapping[str, bool], own: bool, map: str | None = None) -> None:
        self._model = model
        self._map = map
        self._sites = sites
        self._own = own
        self._values: dict[str, Tensor] = {}
        self._problems: dict[str, str] = {}
        self._maps: deque[tuple[str, Tensor]] = deque(maxlen=MAPS)
        self._hooks: list[RemovableHandle] = []
        self._operators = ExitStack()
        self._phase = Phase()

    def open(self, x: Tensor) -> Tensor:
        """Put the hooks in place, for a forward on `x`; returns the tensor to call the model with."""
        self._x, self._version, self._rng = x, x._version, Rng.of(x.device)
        try:
            self._register()
            self._operators.enter_context(twice_differentiable(self._phase))
        except BaseException:
            self.close()
            raise
        differentiated = self._sites.get(INPUT, False)
        self._values[INPUT] = _differentiable(x) if differentiated else x
        # A copy, because a model may work on its input in place: that would change the caller's images, fail on a leaf, and
        # shift what is differentiated.
        return self._values[INPUT].clone() if differentiated or self._own else x

    def close(self) -> None:
        """Take the hooks away; safe to call twice."""
        self._operators.close()
        while self._hooks:
            self._hooks.pop().remove()

    def recording(self, output: Any) -> Recording:
        """What was recorded, for a forward that returned `output`."""
        for site in self._sites.keys() - set(SPECIAL) - self._values.keys() - self._problems.keys():
            self._problems[site] = f"layer {site!r} did not run in the forward. Name a layer that the model uses."
        if self._map is not None and self._maps:
            self._values[SPATIAL] = self._maps[-1][1]
        state = _state(self._model)
        return Recording(self._x, self._version, self._values, self._problems, tuple(self._maps), output, self._rng, state, self._phase)

    def _register(self) -> None:
        for site in self._sites:
            if site == FEATURES:
                for module in self._model.modules():
                    if isinstance(module, PROJECTIONS):
                        self._hooks.append(module.register_forward_pre_hook(self._take_features))
            elif site == SPATIAL:
                for name, module in self._model.named_modules():
                    if name and self._map in (None, name):
                        self._hooks.append(module.register_forward_hook(self._take_map(name)))
            elif site not in SPECIAL:
                self._hooks.append(self._model.get_submodule(site).register_forward_hook(self._take(site)))

    def _take(self, site: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> Tensor | None:
            if not isinstance(output, Tensor) or not output.is_floating_point():
                kind = output.dtype if isinstance(output, Tensor) else type(output).__name__
                self._problems[site] = f"layer {site!r} returned {kind}, not a floating-point tensor. Name a layer inside it."
                return None
            if site in self._values:
                self._problems[site] = f"layer {site!r} ran more than once in one forward. Name a layer that runs once."
                return None
            self._values[site] = value = _differentiable(output) if self._sites[site] else output
            # A copy goes on, because what follows may work in place, and an in-place ReLU would silently turn what was
            # recorded into its own output.
            return value.clone()

        return hook

    def _take_features(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor):
            self._values[FEATURES] = args[0]  # the last one stays

    def _take_map(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> Tensor | None:
            if not isinstance(output, Tensor) or not varies(output, self._model, self._x, name):
                return None
            # Behind frozen layers the first map becomes the leaf that later ones hang on.
            value = _differentiable(output)
            if self._maps and self._maps[-1][1] is value:
                self._maps.pop()  # a container returns what its last layer did: the container names it
            self._maps.append((name, value))
            return None if value is output else value.clone()

        return hook


def _differentiable(value: Tensor) -> Tensor:
    """The tensor itself, if a graph leads to it; else a leaf in its place, marked as one that nobody can train."""
    if value.requires_grad:
        return value
    leaf = value.detach().requires_grad_()
    setattr(leaf, LEAF, True)
    return leaf


def forward(model: nn.Module, x: Tensor, sites: Mapping[str, bool], run: Callable[[Tensor], Any]) -> Recording:
    """Run the model once on `x` by `run`, recording the sites."""
    tap = Tap(model, sites, own=True)
    with _suspended(model):  # an attachment must not take this pass for the loop's
        try:
            output = run(tap.open(x))
        finally:
            tap.close()
    return tap.recording(output)


@contextmanager
def observed(model: nn.Module, see: Callable[[str, nn.Module, Any], None]) -> Iterator[None]:
    """Show every layer's output as it comes, by name, module and value."""

    def watch(name: str) -> Any:
        return lambda module, args, output: see(name, module, output)

    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    try:
        with _suspended(model):
            yield
    finally:
        for handle in handles:
            handle.remove()


class Attachment:
    """Handle of `reg.attach(model)`: records the loop's own forwards until it is removed.

    A context manager; `remove()` does the same as leaving it. Nothing is recorded while gradients are disabled.
    """

    def __init__(self, entry: nn.Module, sites: Mapping[str, bool]) -> None:
        model = unwrap(entry)
        for site in sites:
            check_layer(model, site)
        if attached(model) is not None:
            raise RuntimeError(
                "attach: this model already has an attachment. Remove it first (`handle.remove()`, or leave its `with` block), and "
                "attach the sum of the regularizers."
            )
        self._model = model
        self._sites = dict(sites)
        self._tap: Tap | None = None
        self._recording: Recording | None = None
        self._map: str | None = None
        self.suspended = False
        self._watches: list[RemovableHandle] = []
        self._hooks: list[RemovableHandle] = []
        if compiled(entry):
            warnings.warn(
                "The model is compiled, and PyTorch cannot differentiate a compiled graph twice (pytorch#91469). Its forwards are left as "
                "they are, and each penalty runs its own, uncompiled.",
                stacklevel=3,
            )
            return
        self._hooks = [
            model.register_forward_pre_hook(self._before, prepend=True, with_kwargs=True),
            model.register_forward_hook(self._after, always_call=True),
        ]

    def remove(self) -> None:
        """Take all hooks away and drop what was recorded; safe to call twice."""
        self._discard()
        while self._hooks:
            self._hooks.pop().remove()

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def __deepcopy__(self, memo: dict[int, Any]) -> Attachment:
        # A copy of the model (an average of its weights, say) carries the hooks along; there they do nothing.
        return _inert()

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return _inert, ()

    def take(self, model: nn.Module, x: Tensor, sites: Mapping[str, bool]) -> Recording | None:
        """The recorded pass, if it is the one a call on `x` needs. It is given out once: its graph may be freed after."""
        recording = self._recording
        if recording is None or not recording.serves(model, x, sites):
            return None
        self._forget()
        return recording

    def found_map(self, name: str) -> None:
        """Say which layer `layer="auto"` turned out to be, so that later forwards record that one alone."""
        self._map = name

    @property
    def live(self) -> bool:
        """False once removed, and on a copy."""
        return bool(self._hooks)

    def _forget(self) -> None:
        self._recording = None
        while self._watches:
            self._watches.pop().remove()

    def _discard(self) -> None:
        self._forget()
        if self._tap is not None:
            self._tap.close()
            self._tap = None

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        if self.suspended or not self.live:
            return None
        self._discard()  # the last step's graph, and what an interrupted forward left
        arguments: dict[int | str, Any] = dict(enumerate(args)) | kwargs
        tensors = [(key, value) for key, value in arguments.items() if isinstance(value, Tensor) and value.is_floating_point()]
        images = next((item for item in tensors if item[1].dim() == 4), None)
        if not torch.is_grad_enabled() or images is None:
            return None
        self._tap = Tap(model, self._sites, own=False, map=self._map)
        arguments[images[0]] = self._tap.open(images[1])
        return tuple(arguments[i] for i in range(len(args))), {name: arguments[name] for name in kwargs}

    def _after(self, model: nn.Module, args: Any, output: Any) -> None:
        if self.suspended or self._tap is None:
            return
        tap, self._tap = self._tap, None
        tap.close()
        if output is None:  # the forward raised
            return
        self._recording = tap.recording(output)
        for leaf in tree_leaves(output):
            # A backward that reaches the output frees the graph: from then on a call must run its own forward.
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                self._watches.append(leaf.register_hook(_Forget(self)))


class _Forget:
    """Drops a recording; holds its owner weakly, because the output that it watches is part of the recording."""

    def __init__(self, owner: Attachment) -> None:
        self._owner = weakref.ref(owner)

    def __call__(self, gradient: Tensor) -> None:
        owner = self._owner()
        if owner is not None:
            owner._recording = None


def attached(model: nn.Module) -> Attachment | None:
    """The attachment of a model, found among its hooks: the library keeps no list of its own."""
    for hook in model._forward_pre_hooks.values():
        owner = getattr(hook, "__self__", None)
        if isinstance(owner, Attachment) and owner.live:
            return owner
    return None


def _inert() -> Attachment:
    copy = object.__new__(Attachment)
    copy._hooks, copy._watches, copy._tap, copy._recording, copy.suspended = [], [], None, None, True
    return copy


@contextmanager
def _suspended(model: nn.Module) -> Iterator[None]:
    attachment = attached(model)
    if attachment is None:
        yield
        return
    attachment.suspended = True
    try:
        yield
    finally:
        attachment.suspended = False


def _state(model: nn.Module) -> tuple[int, ...]:
    return (*(parameter._version for parameter in model.parameters()), *(module.training for module in model.modules()))
