"""One call's arguments, checked before any pass runs."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from inspect import Parameter, signature
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from attrreg import masks
from attrreg.distributed import Groups
from attrreg.ops.process import checkpoints_recompute_inside
from attrreg.settings import is_integer
from attrreg.state import Rng, copied_buffers, isolated
from attrreg.walk import attributes, modules
from attrreg.wrappers import compiling, eager, on_one_device, refuse_compiling, undistributed, unwrap

Select = Callable[[Any], Tensor] | str | int | None
Inputs = tuple[Any, ...] | Mapping[str, Any] | None


@dataclass(frozen=True)
class Call:
    """The arguments of `reg(model, x, mask, ...)`, checked.

    Attributes:
        entry: what the user calls; `model` is the module inside its wrappers, whose layers have the names.
        annotation: the mask; None where none was given (`attribute` without a mask).
        target: on the device of `x`, or None.
        output: picks the logits out of what the model returns.
        inputs: all that the model is called with, `x` among it; None: `x` alone.
        as_compiled: parts under `torch.compile` may run compiled; otherwise they run eagerly.
        groups: the process groups over which means run.
        shown: this is a call of `.attribute`, for a map, and not for a penalty.
        fraction: the share of the annotated images to compute the penalty on.
    """

    entry: nn.Module
    x: Tensor
    annotation: masks.Annotation | None = None
    target: Tensor | None = None
    generator: torch.Generator | None = None
    output: Select = None
    inputs: Inputs = None
    as_compiled: bool = False
    groups: Groups = ()
    shown: bool = False
    fraction: float = 1.0

    @property
    def model(self) -> nn.Module:
        """The module inside the wrappers."""
        return unwrap(self.entry)

    def run(self, image: Tensor, as_users_forward: bool) -> Any:
        """Run the model on an image in place of `x`; through its wrappers where that is the user's own forward."""
        module = on_one_device(self.entry) if as_users_forward else undistributed(self.entry) if self.as_compiled else self.model
        places: tuple[Any, ...] = (image,)
        names: dict[str, Any] = {}
        if isinstance(self.inputs, Mapping):
            places, names = (), {name: image if value is self.x else value for name, value in self.inputs.items()}
        elif self.inputs is not None:
            places = tuple(image if value is self.x else value for value in self.inputs)
        with nullcontext() if self.as_compiled else eager(module):
            try:
                return module(*places, **names)
            except TypeError as error:
                if not _is_of_the_call(error, self.model, places, names):
                    raise
                if self.inputs is not None:
                    raise TypeError(f"inputs= does not fit the model's forward{signature(self.model.forward)}: {error}") from error
                further = ", ".join(_required(self.model)[1:])
                cause = f"also takes {further}" if further else f"is forward{signature(self.model.forward)}"
                raise TypeError(
                    f"The model is called with the images alone, but its forward {cause}. Pass all that it is called with by `inputs=`: a "
                    "tuple with x in it, or a dictionary."
                ) from error

    @property
    def modules(self) -> list[nn.Module]:
        """All modules that a pass runs."""
        return modules(self.whole)

    @property
    def whole(self) -> nn.Module:
        """All that a pass runs: the model, and `output=`, if that is a module."""
        return nn.ModuleList([self.model, self.output]) if isinstance(self.output, nn.Module) else self.model

    @property
    def holding(self) -> nn.Module:
        """All whose buffers a pass may change: `whole`, and what a function for `output=` may run."""
        return nn.ModuleList(held) if (held := self._held_by_function()) else self.model

    def _held_by_function(self) -> list[nn.Module]:
        """The model and the modules that a function for `output=` may run; none, if it reads nothing but its argument."""
        return [self.model, *held_by(self.output)] if picked_by(self.output) is ... else []

    @property
    def mask(self) -> Tensor | None:
        """The canonical mask."""
        return None if self.annotation is None else self.annotation.relevant

    def logits(self, output: Any, start: Rng) -> Tensor:
        """Pick the logits out of what the model returned.

        Args:
            output: what it returned.
            start: the random state from which a function draws.

        Raises:
            TypeError: it is not a tensor, and no selector was given, or the selector does not fit.
        """
        try:
            chosen = self._chosen(output, start)
        except (KeyError, IndexError, AttributeError, TypeError) as error:
            remedy = "Select the logits in it."
            if isinstance(output, Tensor) and not callable(self.output):
                remedy = "Leave output= out, or pass a function if the model returns something else in train mode."
            raise TypeError(f"output={self.output!r} does not fit {_described(output)}, which the model returned. {remedy}") from error
        if not isinstance(chosen, Tensor):
            selected = "" if self.output is None else f", in which output={self.output!r} is {_described(chosen)}"
            raise TypeError(
                f"output: the model returned {_described(output)}{selected} and not a tensor of logits. Say where they are with "
                "`output=`: an index, a key or attribute, or a function of what the model returns."
            )
        return chosen

    def _chosen(self, output: Any, start: Rng) -> Any:
        if self.output is None:
            return output
        if callable(self.output):
            # A head, or a function that may run one: it may draw, and its batch norms would count the batch once more.
            held = [self.output] if isinstance(self.output, nn.Module) else self._held_by_function()
            with isolated(nn.ModuleList(held), self.x.device, start), checkpoints_recompute_inside(_on_copies(held)):
                return self.output(output)
        if isinstance(output, Tensor):  # where there are auxiliary heads in train mode only; an index would pick an image
            raise TypeError("a tensor has no parts that are logits")
        if isinstance(self.output, str) and not isinstance(output, Mapping):
            return getattr(output, self.output)
        return output[self.output]


def _on_copies(heads: Sequence[nn.Module]) -> Callable[[], AbstractContextManager[object]]:
    """Where checkpointed blocks of heads are recomputed: by weak references, since their graph would hold this."""
    references = [weakref.ref(head) for head in heads]
    return lambda: copied_buffers(nn.ModuleList([alive for reference in references if (alive := reference()) is not None]))


def held_by(function: Any, depth: int = 3) -> list[nn.Module]:
    """The modules that a function may run: in what it is bound to, its arguments, its closure, and the globals that it names."""
    if isinstance(function, nn.Module):
        return [function]
    held: Iterable[Any] = ()
    if isinstance(function, partial):
        held = [function.func, *function.args, *function.keywords.values()]
    elif isinstance(function, MethodType):
        held = [function.__self__, function.__func__]
    elif isinstance(function, FunctionType):
        cells = [cell.cell_contents for cell in function.__closure__ or () if cell != CellType()]  # not empty
        codes = [function.__code__, *(part for part in function.__code__.co_consts if isinstance(part, CodeType))]  # as of comprehensions
        names = (function.__globals__.get(name) for code in codes for name in code.co_names)
        held = [*cells, *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values(), *names]
    elif isinstance(function, (list, tuple, Mapping)) and len(function) < 1000:  # heads, and no data
        held = function.values() if isinstance(function, Mapping) else function
    elif not isinstance(function, (type, ModuleType, Tensor)):  # an object that has them
        held = getattr(function, "__dict__", {}).values()
    return [module for part in held if depth for module in held_by(part, depth - 1)]


def picked_by(output: Select) -> Hashable:
    """A key for how `output=` picks the logits, under which a result can be remembered without keeping anything alive.

    An index, a key or a name is its own; of a function that reads nothing but its argument it is the code. `...` (Ellipsis) stands for
    every other callable: it may hold the model, and pick otherwise at another time, so nothing may be remembered by it.
    """
    if not callable(output):
        return output
    if not isinstance(output, FunctionType) or output.__closure__ or output.__defaults__ or output.__kwdefaults__:
        return ...
    code = output.__code__  # the same object at each step, also of a lambda that is written inside the loop
    inside = any(isinstance(constant, CodeType) for constant in code.co_consts)
    return ... if inside or set(code.co_names) & output.__globals__.keys() else code


def _is_of_the_call(error: TypeError, model: nn.Module, places: tuple[Any, ...], names: dict[str, Any]) -> bool:
    """Whether a forward could not be called so, rather than failed inside. A hook may give it more than it is called with."""
    if "argument" not in str(error) and "keywords" not in str(error):
        return False
    try:
        signature(model.forward).bind(*places, **names)
    except TypeError:
        return True
    return False


def _required(model: nn.Module) -> list[str]:
    """The arguments that a model's forward cannot do without, by name."""
    free = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
    arguments = signature(model.forward).parameters.values()
    return [argument.name for argument in arguments if argument.default is Parameter.empty and argument.kind not in free]


def _described(output: Any) -> str:
    keys = f" with the keys {sorted(map(str, output))}" if isinstance(output, Mapping) else ""
    return f"a {type(output).__name__}{keys}"


def check_options(x: Tensor, generator: torch.Generator | None = None, output: Select = None, inputs: Inputs = None) -> None:
    """Check the optional arguments of every call.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    if inputs is not None:
        if not isinstance(inputs, (tuple, Mapping)):
            raise TypeError(f"inputs must be a tuple of arguments or a mapping of keywords, got {type(inputs).__name__}. Pass it as one.")
        if sum(value is x for value in (inputs.values() if isinstance(inputs, Mapping) else inputs)) != 1:
            raise ValueError(
                "inputs must hold x itself, once and not inside another container: the tensor that is attributed. Pass the same object as "
                "x and in inputs, or wrap a model that takes containers in a module that makes them of x."
            )
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}. Write torch.Generator().manual_seed(0).")
    if isinstance(output, (bool, type)) or not (output is None or is_integer(output) or isinstance(output, str) or callable(output)):
        raise TypeError(f"output must be an index, a key, an attribute or a function, got {output!r}. Say where the logits are.")


def out_of_inference(*arguments: Any) -> tuple[Any, ...]:
    """The arguments, with tensors made under inference_mode cloned, each once: a graph cannot save those. The rest stays as it is."""
    clones: dict[int, Tensor] = {}

    def normal(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_inference():
            return clones.setdefault(id(value), value.clone())
        return value

    return tuple(tree_map(normal, dict(argument) if isinstance(argument, Mapping) else argument) for argument in arguments)


def check_differentiable(model: nn.Module, x: Tensor, output: Select, inputs: Inputs) -> None:
    """Check that a penalty's gradient could reach anything.

    Raises:
        RuntimeError: gradients are disabled, or nothing is trainable.
    """
    if torch.is_inference_mode_enabled() or x.is_inference():
        raise RuntimeError("A penalty needs gradients, but runs under torch.inference_mode() or on a tensor made there. Call it outside.")
    if not torch.is_grad_enabled():
        raise RuntimeError(
            "A penalty needs gradients, but runs under torch.no_grad(). Call it outside, or use `.attribute` for the map alone."
        )
    if any(parameter.requires_grad for parameter in model.parameters()):
        return
    # All parameters are frozen. Still trainable may be: what made x, a function that makes the logits, other inputs, and tensors that the
    # model holds. Where there is such a thing, the penalty's graph tells later whether it is reached.
    elsewhere = callable(output) or (x.requires_grad and not x.is_leaf)
    others = (value for value in tree_leaves((inputs, *model.buffers(), *attributes(model))) if value is not x)
    if not elsewhere and not any(isinstance(value, Tensor) and value.requires_grad for value in others):
        if next(model.parameters(), None) is None:
            raise RuntimeError("The model has no parameters, so the penalty could train nothing. Pass the one that is trained.")
        raise RuntimeError(
            "All parameters of the model are frozen, so the penalty could train nothing. Set requires_grad on those to be trained."
        )


def check_model(model: nn.Module) -> None:
    """Check the model.

    Raises:
        TypeError: naming `model`.
        RuntimeError: the call is being compiled.
    """
    if compiling():
        refuse_compiling()
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}. Pass the model itself, not a function of it.")


def check_images(model: nn.Module, x: Tensor) -> None:
    """Check the model and its images.

    Raises:
        TypeError, ValueError: naming `model` or `x`.
        RuntimeError: the call is being compiled.
    """
    check_model(model)
    check_batch(x)


def check_batch(x: Tensor) -> None:
    """Check images.

    Raises:
        TypeError, ValueError: naming `x`.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        remedy = "Scale and normalise the images first, for example `x.float() / 255`."
        if isinstance(x, (list, tuple)):
            remedy = "Stack the images: torch.stack(x). A model that takes a list of them is wrapped in a module that takes a tensor."
        elif not isinstance(x, Tensor):
            remedy = "Make a normalised tensor (N, C, H, W) of the images, as the model takes it; the order is (model, x, mask)."
        elif x.dtype is torch.bool:
            remedy = "It looks like a mask: the order is (model, x, mask)."
        raise TypeError(f"x must be a floating-point tensor, got {kind}. {remedy}")
    if x.dim() == 4 and x.numel() == 0:
        raise ValueError(f"x holds no image, or images without pixels: its shape is {tuple(x.shape)}. Skip batches without images.")
    if x.dim() != 4:
        remedy = "Add or keep the missing axes."
        if x.dim() > 4:
            remedy = (
                "Put frames or slices below each other, (N, C, D * H, W), as their masks, or into the channels under one mask for all, or "
                "into the batch with a row of logits for each, and wrap the model in a module that takes them apart."
            )
        raise ValueError(f"x must be a batch of images (N, C, H, W), got {tuple(x.shape)}. {remedy}")


def check_target(target: Tensor | None, x: Tensor) -> Tensor | None:
    """Check a target as far as every task agrees; the rest is the score's to check.

    Returns:
        The target on the device of `x`, integers as int64.

    Raises:
        TypeError, ValueError: naming `target`.
    """
    if target is None:
        return None
    if not isinstance(target, Tensor) or target.is_complex():
        kind = target.dtype if isinstance(target, Tensor) else type(target).__name__
        parts: Sequence[Any] = target if isinstance(target, (list, tuple)) else ()
        several = isinstance(target, Mapping) or any(isinstance(part, Tensor) and part.shape[:1] == x.shape[:1] for part in parts)
        remedy = "Put the labels that the score reads into one: torch.stack(labels, dim=1)." if several else "Use torch.as_tensor(target)."
        raise TypeError(f"target must be a tensor of labels, got {kind}. {remedy}")
    if target.dim() == 0 or target.shape[0] != x.shape[0]:
        remedy = "Reshape it."
        if target.numel() == 1 and target.dim() < 2:
            remedy = f"For one class for all images write target.expand({x.shape[0]})."
        raise ValueError(f"target must be ({x.shape[0]},), one class an image of x, got {tuple(target.shape)}. {remedy}")
    integral = not target.is_floating_point() and target.dtype is not torch.bool
    # A copy, because a chunked path reads it again in the penalty's backward, when the loop may have written into it.
    return target.detach().to(device=x.device, dtype=torch.int64 if integral else target.dtype, copy=True)
