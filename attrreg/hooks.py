"""Hooks: record what a forward computes at named sites.

A `Tap` opens before one forward and closes after it.
"""

from __future__ import annotations

import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from attrreg.conditions import Called, Conditions
from attrreg.features import Head, Heads
from attrreg.graph import LEAF
from attrreg.ops import Phase, checkpoints_recompute_inside, operators
from attrreg.ops.draws import Draws
from attrreg.ops.process import transformed
from attrreg.ops.rectify import Rule, rectify
from attrreg.recording import Recording, in_own_containers
from attrreg.sites import FEATURES, INPUT, SPATIAL, SPECIAL, check_layer, is_map
from attrreg.state import Rng, autocast_type, copied_buffers, detach_buffers
from attrreg.walk import modules, within_whole

MAPS = 256  # how many of the last maps are kept for layer="auto": more than the last block of any timm model has


class Tap:
    """Records one forward.

    Args:
        model: the model.
        sites: what to record; True where a gradient will be taken.
        map: the layer that `SPATIAL` is known to be; None: keep the last few that it could be.
        twice: gradients will be differentiated again.
        moves: what is added to the outputs of layers.
        places: how many places of a path share the batch.
        rule: how gradients pass `nn.ReLU` layers; None: as they do.
        extra: the user's loop has no such pass, so nothing of it may reach the buffers.
        called: how the loop called the model, if the forward is its own; None: the library runs it.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Mapping[str, bool],
        map: str | None,
        twice: bool,
        moves: Mapping[str, Tensor] = MappingProxyType({}),
        places: int = 1,
        rule: Rule | None = None,
        extra: bool = False,
        called: Called | None = None,
    ) -> None:
        self._model = model
        self._extra = extra
        self._map = map
        self._sites = sites
        self._taken = frozenset(site for site, gradient in sites.items() if gradient)
        self._called = called
        self._twice = twice
        self._moves = moves
        self._rule = rule
        self._rectified = 0
        self._values: dict[str, Tensor] = {}
        self._problems: dict[str, str] = {}
        self._maps: deque[tuple[str, Tensor, int]] = deque(maxlen=MAPS)  # with how often it had been written to
        self._heads: Heads | None = None
        self._again: list[tuple[nn.Module, Any]] = []  # layers whose output was changed, with hooks that do so in a recomputation
        self._runs: Counter[str] = Counter()
        self._output: Any = None
        self._exits = ExitStack()
        self._begin: Callable[[], None] = lambda: None
        self._phase = Phase(places=places)

    def open(self, x: Tensor) -> Tensor:
        """Put the hooks in place, for a forward on `x`; returns the tensor to call the model with."""
        self._x, self._rng, self._autocast = x, Rng.of(x.device), autocast_type(x.device)
        self._phase.running, self._phase.rows = True, x.shape[0]
        self._phase.draws = self._draws = Draws(x.shape[0], self._phase.places, self._rng)
        try:
            self._register()
            self._exits.enter_context(checkpoints_recompute_inside(_recomputing(self._model, self._phase, self._extra, self._again)))
            if self._twice:  # else the model computes as it does by itself
                # Operators before the first site with a gradient are differentiated once, and stay PyTorch's. Ours run from the start where
                # that site is the images, or is not known yet.
                at_once = INPUT in self._taken or (SPATIAL in self._taken and self._map is None)
                self._begin = self._exits.enter_context(operators(self._model, self._phase, bool(self._taken), at_once))
        except BaseException:
            self.close()
            raise
        differentiated = not self._taken.isdisjoint((INPUT, FEATURES))  # what enters a head may come from the images alone
        # Not x itself, whose hooks and `.grad` are for the gradient of the loss.
        self._values[INPUT] = (x.view_as(x) if x.requires_grad else self._differentiable(x)) if differentiated else x
        # A copy, because a model may work on its input in place: that would change the caller's images, fail on a leaf, and
        # shift what is differentiated.
        return self._values[INPUT].clone() if differentiated or self._called is None else x

    def close(self) -> None:
        """Take hooks and operators away; safe to call twice."""
        self._exits.close()
        self._phase.running = False

    def recording(self, output: Any) -> Recording:
        """What was recorded, for a forward that returned `output`."""
        if self._rule is not None and not self._rectified:
            raise ValueError(
                "No nn.ReLU layer ran in the forward, so a rule for gradients through them changes nothing. Use InputGradient, or write "
                "the model's ReLUs as layers."
            )
        for site in self._sites.keys() - set(SPECIAL) - self._values.keys() - self._problems.keys():
            self._problems[site] = (
                f"layer {site!r} did not run in the forward, or not by a call that hooks see (layer(x) is one, layer.forward(x) is not). "
                "Name a layer that the model uses."
            )
        once = [(name, value) for name, value, _ in self._maps if self._runs[name] == 1]  # else the name does not tell which run
        # Of layers that gave the same tensor, as one that works in place does, the last.
        maps = tuple(named for place, named in enumerate(once) if not any(named[1] is later for _, later in once[place + 1 : place + 2]))
        if self._maps and not maps and self._map is None:
            self._problems[SPATIAL] = "every layer with a map ran more than once in one forward. Let the model run once on each image."
        if self._map is not None and maps:
            self._values[SPATIAL] = maps[-1][1]
        heads: tuple[Head, ...] = ()
        if self._heads is not None and self._heads.features is not None:
            self._values[FEATURES], heads = self._heads.features, self._heads.found()
        # Scores are taken inside DDP's wrapper: under static_graph, a backward through that makes it believe the step's is done.
        inner = output if self._output is None else self._output
        conditions = None
        if self._called is not None:
            recorded = [*self._values.values(), *(value for _, value in maps)]
            if len(heads) > 1:  # of which the logits tell one
                recorded += [head.input for head in heads]
            conditions = Conditions(self._model, inner, recorded, self._called)
            inner = in_own_containers(inner)
        return Recording(
            x=self._x,
            values=self._values,
            taken=self._taken,
            problems=self._problems,
            maps=maps,
            overwritten=frozenset(name for name, value, written in self._maps if value._version != written),
            heads=heads,
            output=inner,
            returned=output,
            rng=self._rng,
            end=Rng.of(self._x.device),
            conditions=conditions,
            phase=self._phase,
            draws=self._draws,
            twice=self._twice,
            autocast=self._autocast,
        )

    def _take_output(self, module: nn.Module, args: Any, output: Any) -> None:
        if module is self._model:  # and not a replica of it
            self._output = output

    def _register(self) -> None:
        if self._rule is not None:
            for module in modules(self._model):
                if isinstance(module, nn.ReLU):
                    self._replace_relu(module, self._rule)
        if self._called is None:
            self._hook(self._model, self._take_output)
        for site in self._sites:
            if site not in SPECIAL and self._is_there(site):
                self._hook(self._model.get_submodule(site), self._take(site))
        if FEATURES in self._sites:
            self._heads = Heads(self._model)
            for module in self._heads.layers:
                self._hook(module, self._heads.take, with_kwargs=True)
                if FEATURES in self._taken:  # the layer itself PyTorch differentiates twice, and what follows may not be so
                    self._hook(module, lambda *_: self._begin())
        # After the named layers: from one of those the model goes on with a copy, and the map has to be that copy.
        if SPATIAL in self._sites:
            if self._map is not None and not self._is_there(self._map):
                self._map = None
            known = None if self._map is None else [(self._map, self._model.get_submodule(self._map))]
            for name, module in known or _map_candidates(self._model):
                self._hook(module, self._take_map(name))

    def _hook(self, module: nn.Module, hook: Any, with_kwargs: bool = False) -> None:
        self._exits.enter_context(module.register_forward_hook(hook, with_kwargs=with_kwargs))

    def _is_there(self, site: str) -> bool:
        """Whether the model still has a layer; if not, keep the problem for the penalty to raise: the loop's own forward must not fail."""
        try:
            check_layer(self._model, site)
        except ValueError as error:
            self._problems[site] = str(error)
        return site not in self._problems

    def _replace_relu(self, module: nn.ReLU, rule: Rule) -> None:
        if type(module).forward is not nn.ReLU.forward:
            raise ValueError(
                f"{type(module).__name__} is a ReLU with a forward of its own, which a rule for gradients through nn.ReLU layers does not "
                "know. Make it an nn.ReLU layer and a layer with the rest."
            )
        entered: list[Tensor] = []

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Tensor], dict[str, Any]]:
            entered.append(args[0] if args else kwargs["input"])
            return (entered[-1].detach(),), {}  # what the layer computes is dropped

        def after(module: nn.ReLU, args: Any, output: Tensor) -> Tensor:
            self._rectified += 1
            x = entered.pop()
            y = rectify(x, rule, self._phase)
            return x.copy_(y) if module.inplace else y  # in place as the layer itself, because others may read that memory

        self._exits.enter_context(module.register_forward_pre_hook(before, with_kwargs=True))
        self._exits.enter_context(module.register_forward_hook(after, prepend=True))  # other hooks see what the layer gives

    def _take(self, site: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> Tensor | None:
            if transformed():
                self._problems[site] = f"layer {site!r} ran under torch.func, where no hook can read it. Name a layer outside."
                return None
            if problem := self._unfit(site, output):
                self._problems[site] = problem
                return None
            if site in self._moves:
                move = self._moves[site].to(output.dtype)
                self._again.append((module, partial(_moved, move)))
                output = output + move
            value: Tensor = output
            if self._sites[site]:
                value = self._differentiable(output, module)
                self._begin()
            self._values[site] = value
            # A copy goes on, because what follows may work in place, and an in-place ReLU would silently turn what was
            # recorded into its own output.
            return value.clone()

        return hook

    def _unfit(self, site: str, output: Any) -> str:
        """Why what a layer gave cannot be recorded; empty: it can."""
        if not isinstance(output, Tensor) or not output.is_floating_point():
            kind = output.dtype if isinstance(output, Tensor) else type(output).__name__
            return f"layer {site!r} returned {kind}, not a floating-point tensor. Name a layer inside it."
        if site in self._values:
            return f"layer {site!r} ran more than once in one forward. Name a layer that runs once."
        if self._sites[site] and not torch.is_grad_enabled():
            return (
                f"layer {site!r} ran under no_grad, or in a block checkpointed with use_reentrant=True, so no gradient can be taken "
                "there. Name a later layer, or use torch.utils.checkpoint with use_reentrant=False."
            )
        return ""

    def _differentiable(self, value: Tensor, module: nn.Module | None = None) -> Tensor:
        """The tensor itself, if a graph leads to it; else a leaf in its place, marked as one that nobody can train; `module`: gave it."""
        if value.requires_grad:
            return value
        if module is not None:
            self._again.append((module, _as_leaf))
        leaf = (value.clone() if value.is_inference() else value.detach()).requires_grad_()
        setattr(leaf, LEAF, self._phase)
        return leaf

    def _take_map(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> Tensor | None:
            self._runs[name] += 1
            if isinstance(module, nn.AdaptiveAvgPool2d) or transformed():  # may repeat one position to fill its grid
                return None
            # What was made under inference_mode has no gradient, nor a version.
            if not isinstance(output, Tensor) or output.is_inference() or not is_map(output, self._model, self._x, name):
                return None
            value = self._differentiable(output, module)
            goes_on = output
            if value is not output:  # behind frozen layers the first map becomes a leaf, from which the later ones are computed
                goes_on = value.clone()
                value = goes_on if goes_on.requires_grad else value  # under no_grad
            self._begin()
            while self._maps and self._maps[-1][1] is value:
                last, _, written = self._maps[-1]
                if not last.startswith(f"{name}."):
                    if value._version == written:
                        return None  # an identity
                    break  # a layer that works in place: which of the two it is shows at the end, when it is known which ran once
                self._maps.pop()  # from a container of that layer: the later name
            self._maps.append((name, value, value._version))
            return goes_on

        return hook


def _map_candidates(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The layers that `layer="auto"` may be, by name: none inside an encoder that would run otherwise with hooks inside."""
    whole = within_whole(model)
    return [(name, module) for name, module in _hookable(model) if module not in whole]


def _as_leaf(module: nn.Module, args: Any, output: Any) -> Tensor | None:
    # In the first run this output was a leaf, so what followed saved tensors, as it has to in the recomputation.
    return output.detach().requires_grad_().clone() if isinstance(output, Tensor) and not output.requires_grad else None


def _moved(move: Tensor, module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output + move


def _recomputing(
    model: nn.Module, phase: Phase, extra: bool, again: list[tuple[nn.Module, Any]]
) -> Callable[[], AbstractContextManager[object]]:
    """Where checkpointed blocks are recomputed, without holding on to what the pass recorded.

    Args:
        model, phase, extra: see `Tap`.
        again: layers whose output the pass changed, each with a hook that does so again.
    """
    # The checkpoint's frame hangs on nodes that Python's garbage collection does not see through: it must not hold the model, whose hooks
    # lead back to the frame if a forward of an attached model never sees a backward.
    reference = weakref.ref(model)

    @contextmanager
    def recomputing() -> Iterator[None]:
        model = reference()
        # BatchNorm counts a recomputation as a batch. In the backward of the loop's own forward that is PyTorch's way.
        copied = copied_buffers(model) if model is not None and (extra or phase.inner) else nullcontext()
        with ExitStack() as hooks, copied:
            for module, hook in again:
                hooks.enter_context(module.register_forward_hook(hook))
            try:
                yield
            finally:
                if model is not None:
                    detach_buffers(model)

    return recomputing


@contextmanager
def observed(model: nn.Module, see: Callable[[str, nn.Module, Any, Any], None]) -> Iterator[None]:
    """Show every layer's arguments and output as they come, by its name and module."""
    with ExitStack() as hooks:
        for name, module in _hookable(model):
            hooks.enter_context(module.register_forward_hook(partial(see, name)))
        yield


def _hookable(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The layers of a model that take hooks, by name: TorchScript's do not."""
    return [(name, module) for name, module in model.named_modules() if name and not isinstance(module, torch.jit.ScriptModule)]
