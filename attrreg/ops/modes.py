"""Which of PyTorch's functions are replaced by what: `TWICE` and `ONCE`; and the function mode that replaces them.

It is on inside the regularizer's own passes and the attached forward only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode

from attrreg.ops import activation, attention, batch_norm, concatenate, conv, distance, linear, norm, pool, recurrent
from attrreg.ops.draws import Draws
from attrreg.ops.phase import Phase
from attrreg.ops.process import BY_MATH, attention_by, attention_kernels, checkpoints_recompute_inside, transformed


def _drawn(function: Callable[..., Tensor], by_draws: Callable[..., Tensor], phase: Phase, *args: Any, **kwargs: Any) -> Tensor:
    """A function that draws random numbers: by that method of the pass's `Draws`, if it has one."""
    return function(*args, **kwargs) if phase.draws is None else by_draws(phase.draws, function, *args, **kwargs)


def _multi_head(phase: Phase, *args: Any, **settings: Any) -> Any:
    """`F.multi_head_attention_forward`; what ours leave of it by PyTorch's math path, whatever kernels the model has chosen meanwhile."""
    with attention_by(BY_MATH):
        return attention.multi_head(Replace(TWICE, phase), *args, **settings)


def _any_phase(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function that has nothing to be told of the pass."""
    return lambda phase, *args, **kwargs: function(*args, **kwargs)


Replacements = Mapping[Callable[..., Any], Callable[..., Any]]

_FOR_ANY_PHASE: Replacements = {
    **dict.fromkeys((F.relu, torch.relu, Tensor.relu), partial(activation.piecewise, kind=activation.RELU)),
    **dict.fromkeys((torch.relu_, Tensor.relu_), partial(activation.piecewise, kind=activation.RELU, inplace=True)),
    F.relu6: partial(activation.hardtanh, min_val=0.0, max_val=6.0),
    F.hardtanh: activation.hardtanh,
    F.leaky_relu: activation.leaky_relu,
    F.hardsigmoid: partial(activation.piecewise, kind=activation.HARDSIGMOID),
    F.hardswish: partial(activation.smooth, kind=activation.HARDSWISH),
    F.silu: partial(activation.smooth, kind=activation.SILU),
    F.gelu: activation.gelu,
    **dict.fromkeys((torch.cat, torch.concat, torch.concatenate), concatenate.concatenate),
    F.max_pool2d: pool.max_pool2d,
    **dict.fromkeys((torch.norm, Tensor.norm), distance.norm),
    torch.linalg.norm: distance.linalg_norm,
    torch.linalg.vector_norm: distance.vector_norm,
    torch.cdist: distance.cdist,
    **dict.fromkeys((torch.std, Tensor.std), distance.std),
    torch.std_mean: distance.std_mean,
    torch.linalg.matrix_norm: distance.matrix_norm,
    F.cosine_similarity: distance.cosine_similarity,
}

# The functions that can be differentiated twice in place of PyTorch's, with the phase of the pass before their arguments.
TWICE: Replacements = {
    **{function: _any_phase(ours) for function, ours in _FOR_ANY_PHASE.items()},
    F.conv1d: partial(conv.convolve, axes=1),
    F.conv2d: conv.convolve,
    F.conv3d: partial(conv.convolve, axes=3),
    F.conv_transpose1d: partial(conv.convolve_transposed, axes=1),
    F.conv_transpose2d: conv.convolve_transposed,
    F.conv_transpose3d: partial(conv.convolve_transposed, axes=3),
    F.linear: linear.linear,
    F.scaled_dot_product_attention: attention.attention,
    F.multi_head_attention_forward: _multi_head,
    F.batch_norm: batch_norm.batch_norm,
    F.layer_norm: norm.layer_norm,
    F.group_norm: norm.group_norm,
    F.instance_norm: norm.instance_norm,
    F.rms_norm: norm.rms_norm,
    F.normalize: norm.normalize,
    torch.lstm: recurrent.lstm,
    **{function: partial(_drawn, function, Draws.dropout) for function in (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d)},
    Tensor.bernoulli_: partial(_drawn, Tensor.bernoulli_, Draws.bernoulli_),
}

# Those that are faster also where they are differentiated once: `once` puts them in, inside the layers that gain.
ONCE: Replacements = {
    F.conv2d: conv.convolve_if_faster,
    F.linear: linear.linear,
    F.multi_head_attention_forward: lambda phase, *args, **settings: attention.multi_head(Replace(ONCE, phase), *args, **settings),
}

NUMPY = {"axis": "dim", "keepdims": "keepdim", "x": "input", "a": "input"}  # NumPy's names of arguments, which PyTorch's functions take too


class Replace(TorchFunctionMode):
    """Computes functions by others, which are told the phase of the pass."""

    def __init__(self, by: Replacements, phase: Phase) -> None:
        super().__init__()
        self._by, self._phase = by, phase

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in self._by or transformed():  # in this order: a model asks for shapes more often than it computes
            return func(*args, **kwargs)
        first = args[0] if args else next(iter(kwargs.values()), None)
        if isinstance(first, (tuple, list)) and first:
            first = first[0]
        if getattr(first, "is_nested", False) or kwargs.get("out") is not None:  # whose shape is none for ours; which has no gradient
            return func(*args, **kwargs)
        kwargs.pop("out", None)  # ours have none
        if kwargs and not NUMPY.keys().isdisjoint(kwargs):
            kwargs = {NUMPY.get(name, name): value for name, value in kwargs.items()}
        ours = self._by[func]
        # A subclass of tensors may have a function of its own in place of this one, as a quantised weight has. And it may make a view of
        # each result, as MONAI's, which inside our Functions could not be written into in place: it is to wrap what ours give as a whole.
        # So it is asked first, and what it leaves comes back here, without types. Multi-head attention asks it by itself.
        kind = next((kind for kind in types if kind is not Tensor), None) if types else None
        if kind is None or func is attention.MULTI_HEAD:
            return ours(self._phase, *args, **kwargs)
        with self:
            return kind.__torch_function__(func, types, args, kwargs)


@contextmanager
def twice_differentiable(phase: Phase, at_once: bool = True) -> Iterator[Callable[[], None]]:
    """Compute with operators that have a second derivative. The user's settings are back at the end.

    Attention that ours does not compute takes PyTorch's math path: its fused kernels have no double backward (pytorch#116350). A
    checkpointed block (`use_reentrant=False`) that runs inside is recomputed with the same operators, whenever that happens.

    Args:
        phase: tells the operators what the backward through them is for.
        at_once: False: they start with the first checkpointed block, or when what this yields is called. Nothing costs time until then:
            PyTorch shows a mode every call, those that it leaves as they are too.
    """
    mode, begun = Replace(TWICE, phase), False
    depth = len(_get_current_function_mode_stack())

    def begin() -> None:
        nonlocal begun
        if not begun:
            begun = True
            stack = _get_current_function_mode_stack()  # the model may be inside modes and choices of its own, and leaves them from the top
            set_stack([*stack[:depth], mode, *stack[depth:]])
            choose_kernels(BY_MATH)

    def start() -> None:
        begin()  # the recomputation must not change operators midway, where the first run did
        phase.draws = None  # PyTorch winds back its own generators only

    try:
        # PyTorch captures autocast and generators for the recomputation, but not function modes or attention kernels.
        with attention_kernels() as choose_kernels, checkpoints_recompute_inside(lambda: _operators(phase), start):
            if at_once:
                begin()
            yield begin
    finally:
        take_off(mode)


@contextmanager
def _operators(phase: Phase) -> Iterator[None]:
    """Around the recomputation of a checkpointed block."""
    with phase.recomputing(), attention_by(BY_MATH), Replace(TWICE, phase):
        yield


def take_off(mode: TorchFunctionMode) -> None:
    """Take a function mode off wherever it is, if it is on."""
    stack = _get_current_function_mode_stack()
    if mode in stack:
        set_stack([entered for entered in stack if entered is not mode])


def set_stack(modes: list[TorchFunctionMode]) -> None:
    """Put these function modes on in place of those that are."""
    for _ in _get_current_function_mode_stack():
        _pop_mode()
    for mode in modes:
        _push_mode(mode)
