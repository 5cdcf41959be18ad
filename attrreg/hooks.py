"""Hooks: record what a forward computes at named sites, in a pass of our own or in the loop's.

All hooks of the library live here. A `Tap` opens before one forward and closes after it; `Attachment` opens and closes
one around each of the loop's own forwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from attrreg.ops import twice_differentiable
from attrreg.sites import FEATURES, INPUT, OUTPUT, SPATIAL, check_layer
from attrreg.state import Rng

PROJECTIONS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Recording:
    """What one forward computed.

    Attributes:
        x: the tensor that the model was called with, and `version` its state then.
        values: at each recorded site, the tensor, with its graph.
        problems: for each site that could not be recorded, why.
        leaves: tensors that the recording made to be differentiated; no parameter lies behind them.
        output: what the model returned.
        rng: the state from which the forward drew, to replay it.
        weights: the versions of the parameters, to tell whether an optimizer has stepped since.
    """

    x: Tensor
    version: int
    values: Mapping[str, Tensor]
    problems: Mapping[str, str]
    leaves: tuple[Tensor, ...]
    output: Any
    rng: Rng
    weights: tuple[int, ...]

    def serves(self, model: nn.Module, x: Tensor, sites: Mapping[str, bool]) -> bool:
        """Whether this is the pass that a call on `x` would run itself."""
        known = self.values.keys() | self.problems.keys() | {OUTPUT}
        return self.x is x and self.version == x._version and sites.keys() <= known and self.weights == _versions(model)


class Tap:
    """Records one forward.

    Args:
        model: the model.
        sites: what to record; True where a gradient will be taken.
    """

    def __init__(self, model: nn.Module, sites: Mapping[str, bool]) -> None:
        self._model = model
        self._sites = sites
        self._values: dict[str, Tensor] = {}
        self._problems: dict[str, str] = {}
        self._leaves: list[Tensor] = []
        self._hooks: list[RemovableHandle] = []
        self._operators = ExitStack()

    def open(self, x: Tensor) -> Tensor:
        """Put the hooks in place, for a forward on `x`; returns the tensor to call the model with."""
        self._x, self._version, self._rng = x, x._version, Rng.of(x.device)
        try:
            self._register()
            self._operators.enter_context(twice_differentiable())
        except BaseException:
            self.close()
            raise
        if not self._sites.get(INPUT, False):
            self._values[INPUT] = x
            return x
        self._values[INPUT] = image = self._leaf(x)
        # A copy, so that a model that works on its input in place neither fails on a leaf nor shifts what is differentiated.
        return image.clone() if image is not x else x

    def close(self) -> None:
        """Take the hooks away; safe to call twice."""
        self._operators.close()
        while self._hooks:
            self._hooks.pop().remove()

    def recording(self, output: Any) -> Recording:
        """What was recorded, for a forward that returned `output`."""
        for site in self._sites.keys() - {INPUT, OUTPUT} - self._values.keys() - self._problems.keys():
            self._problems[site] = f"layer {site!r} did not run in the forward. Name a layer that the model uses."
        return Recording(
            self._x, self._version, self._values, self._problems, tuple(self._leaves), output, self._rng, _versions(self._model)
        )

    def _leaf(self, value: Tensor) -> Tensor:
        if value.requires_grad:
            return value
        leaf = value.detach().requires_grad_()
        self._leaves.append(leaf)
        return leaf

    def _register(self) -> None:
        for site in self._sites:
            if site == FEATURES:
                for module in self._model.modules():
                    if isinstance(module, PROJECTIONS):
                        self._hooks.append(module.register_forward_pre_hook(self._take_features))
            elif site == SPATIAL:
                for module in self._model.modules():
                    if module is not self._model:
                        self._hooks.append(module.register_forward_hook(self._take_spatial))
            elif site not in (INPUT, OUTPUT):
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
            self._values[site] = value = self._leaf(output) if self._sites[site] else output
            # A copy goes on, because what follows may work in place, and an in-place ReLU would silently turn what was
            # recorded into its own output.
            return value.clone()

        return hook

    def _take_features(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor):
            self._values[FEATURES] = args[0]  # the last one stays

    def _take_spatial(self, module: nn.Module, args: Any, output: Any) -> None:
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return
        if output.dim() == 4 and output.shape[-1] * output.shape[-2] > 1 and output.requires_grad:
            self._problems.pop(SPATIAL, None)
            self._values[SPATIAL] = output
        elif output.dim() == 3 and output.shape[1] > 1:
            self._problems[SPATIAL] = (
                "layer='auto' found tokens where the last spatial map should be. Name the layer, for example one of "
                f"{[name for name, _ in self._model.named_children()]} or a layer inside."
            )


def forward(model: nn.Module, x: Tensor, sites: Mapping[str, bool]) -> Recording:
    """Run the model once on `x`, recording the sites."""
    tap = Tap(model, sites)
    with _suspended(model):  # an attachment must not take this pass for the loop's
        try:
            output = model(tap.open(x))
        finally:
            tap.close()
    return tap.recording(output)


class Attachment:
    """Handle of `reg.attach(model)`: records the loop's own forwards until it is removed.

    A context manager; `remove()` does the same as leaving it. Nothing is recorded while gradients are disabled.
    """

    def __init__(self, model: nn.Module, sites: Mapping[str, bool]) -> None:
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
        self.suspended = False
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
        self._recording = None
        return recording

    @property
    def live(self) -> bool:
        """False once removed, and on a copy."""
        return bool(self._hooks)

    def _discard(self) -> None:
        self._recording = None
        if self._tap is not None:
            self._tap.close()
            self._tap = None

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        if self.suspended or not self.live:
            return None
        self._discard()  # the last step's graph, and what an interrupted forward left
        if not torch.is_grad_enabled() or not args or not isinstance(args[0], Tensor) or not args[0].is_floating_point():
            return None
        self._tap = Tap(model, self._sites)
        return (self._tap.open(args[0]), *args[1:]), kwargs

    def _after(self, model: nn.Module, args: Any, output: Any) -> None:
        if self.suspended or self._tap is None:
            return
        tap, self._tap = self._tap, None
        tap.close()
        if output is not None:  # None: the forward raised
            self._recording = tap.recording(output)


def attached(model: nn.Module) -> Attachment | None:
    """The attachment of a model, found among its hooks: the library keeps no list of its own."""
    for hook in model._forward_pre_hooks.values():
        owner = getattr(hook, "__self__", None)
        if isinstance(owner, Attachment) and owner.live:
            return owner
    return None


def _inert() -> Attachment:
    copy = object.__new__(Attachment)
    copy._hooks, copy._tap, copy._recording, copy.suspended = [], None, None, True
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


def _versions(model: nn.Module) -> tuple[int, ...]:
    return tuple(parameter._version for parameter in model.parameters())
