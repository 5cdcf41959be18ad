"""The operators of a pass: those of `modes.ONCE` where it is differentiated once, and then those that can be differentiated twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode

from attrreg.ops import depthwise, linear, pointwise
from attrreg.ops.modes import ONCE, Replace, set_stack, take_off, twice_differentiable
from attrreg.ops.phase import Phase
from attrreg.ops.process import checkpoints_recompute_inside
from attrreg.walk import modules, runs_whole


@contextmanager
def operators(model: nn.Module, phase: Phase, twice: bool, at_once: bool) -> Iterator[Callable[[], None]]:
    """Run a model with faster operators where it is differentiated once, and with twice differentiable ones where twice.

    Args:
        model: the model.
        phase: see `twice_differentiable`.
        twice: whether anything will be differentiated twice.
        at_once: it will be from the start on; False: from the call of what this yields on.
    """
    layers = modules(model)
    encoders = [*filter(runs_whole, layers)]
    within = {layer for encoder in encoders for layer in modules(encoder)}
    with ExitStack() as entered:
        steps: list[Callable[[], None]] = []
        for encoder in encoders:
            entered.enter_context(_whole(encoder))
        if not (twice and at_once):
            steps.append(entered.enter_context(_faster([layer for layer in layers if _may_gain(layer) and layer not in within], phase)))
        if twice:
            steps.append(entered.enter_context(twice_differentiable(phase, at_once)))

        def start_twice() -> None:
            for step in steps:
                step()

        yield start_twice


@contextmanager
def _whole(encoder: nn.Module) -> Iterator[None]:
    """Take our modes off while such an encoder runs on what needs no gradient: with one on, PyTorch computes something else for padding."""
    stacks: list[list[TorchFunctionMode] | None] = []  # None: no mode was taken off, so none comes back: ours may start inside

    def before(encoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        stack = _get_current_function_mode_stack()
        kept = [mode for mode in stack if not isinstance(mode, Replace)]
        whole = not any(isinstance(value, Tensor) and value.requires_grad for value in (*args, *kwargs.values()))
        stacks.append(stack if whole and len(kept) < len(stack) else None)
        if stacks[-1] is not None:
            set_stack(kept)

    def after(encoder: nn.Module, args: Any, output: Any) -> None:
        if (stack := stacks.pop()) is not None:
            set_stack(stack)

    with encoder.register_forward_pre_hook(before, with_kwargs=True), encoder.register_forward_hook(after, always_call=True):
        yield


def _may_gain(layer: nn.Module) -> bool:
    """Whether a layer may be faster by `modes.ONCE`, as far as its settings tell."""
    if isinstance(layer, nn.MultiheadAttention):
        layer = getattr(layer, "out_proj", layer)
    if not isinstance(layer, (nn.Conv2d, nn.Linear)):
        return False
    weight = layer._parameters.get("weight")  # not the attribute: where that is computed, to ask for it may change buffers
    if weight is None or weight.device.type != "cpu":
        return False
    if isinstance(layer, nn.Linear):
        return linear.MKL_IS_SLOW
    if layer.groups == 1:  # a bias tells squeeze-and-excitation from what batch normalisation follows
        return layer.kernel_size == (1, 1) and layer._parameters.get("bias") is not None
    return layer.groups == layer.in_channels and min(layer.kernel_size) >= depthwise.WIDE_KERNEL


def _gains(layer: nn.Module, args: tuple[Any, ...]) -> bool:
    """Whether a layer that may gain does on these images: a 1x1 convolution only at few positions, as in squeeze-and-excitation."""
    if not isinstance(layer, nn.Conv2d) or layer.groups != 1:
        return True
    return bool(args) and isinstance(args[0], Tensor) and args[0].shape[-2:].numel() <= pointwise.FEW_POSITIONS


@contextmanager
def _faster(layers: Sequence[nn.Module], phase: Phase) -> Iterator[Callable[[], None]]:
    """Compute layers that may gain faster until what this yields is called, or the first checkpointed block starts.

    Such a block is recomputed when all this is over, and has to compute the same then. The mode is on inside these layers and nowhere
    else: PyTorch calls a mode for every operation, which costs a few percent of a pass of small layers.
    """
    mode, active = Replace(ONCE, phase), True

    def before(layer: nn.Module, args: Any) -> None:
        if active and _gains(layer, args):
            _push_mode(mode)

    def after(layer: nn.Module, args: Any, output: Any) -> None:
        if _get_current_function_mode_stack()[-1:] == [mode]:
            _pop_mode()

    def leave() -> None:
        nonlocal active
        active = False

    with ExitStack() as exits:
        exits.callback(take_off, mode)  # which is on where a layer failed
        for layer in layers:
            exits.enter_context(layer.register_forward_pre_hook(before))
            exits.enter_context(layer.register_forward_hook(after, prepend=True, always_call=True))
        if layers:
            exits.enter_context(checkpoints_recompute_inside(nullcontext, leave))
        yield leave
