"""Schedules: the weight of a regularizer as a function of the training step.

A schedule is a factor for each step, counted from 0; `*` multiplies schedules.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attrreg import penalty
from attrreg.attach import Attachment, attached, suspended
from attrreg.call import Call, Inputs, Select
from attrreg.distributed import Group
from attrreg.ops.precision import compute_dtype
from attrreg.penalty import Penalty
from attrreg.recording import Request
from attrreg.regularizer import AttributionRegularizer
from attrreg.settings import brief, is_integer, is_number, keep_count
from attrreg.spec import Spec


class Schedule(Spec, ABC):
    """A weight for each step. Subclasses are frozen dataclasses; `*` multiplies them."""

    @abstractmethod
    def __call__(self, step: int) -> float:
        """The weight at a step, counted from 0: finite and at least 0. A weight of 0 skips the penalty and its passes."""

    def __mul__(self, other: object) -> Product:
        return Product(_factors(self) + _factors(other)) if isinstance(other, Schedule) else NotImplemented


@dataclass(frozen=True, repr=False)
class Every(Schedule):
    """Lazy regularization: each `steps`-th step, `steps` times as strong, so that the sum over steps stays as it is.

    Args:
        steps: at least 1.

    Raises:
        ValueError: `steps` is not such a number.

    Source:
        As the path length and R1 penalties of StyleGAN2, arXiv 1912.04958.
    """

    steps: int

    def __post_init__(self) -> None:
        keep_count(self, "steps", 1)

    def __call__(self, step: int) -> float:
        """`steps` at each `steps`-th step, else 0."""
        return float(self.steps) if step % self.steps == 0 else 0.0


@dataclass(frozen=True, repr=False)
class Linear(Schedule):
    """From one weight to another on a line, then constant; by default a warm-up.

    w(t) = first + (last - first) min(t / steps, 1)

    A warm-up from 0 skips step 0.

    Args:
        steps: at least 1; the weight is `last` from step `steps` on.
        first: the weight at step 0; finite and at least 0, as is `last`.
        last: the weight at the end.

    Raises:
        ValueError: naming the setting.
    """

    steps: int
    first: float = 0.0
    last: float = 1.0

    def __post_init__(self) -> None:
        keep_count(self, "steps", 1)
        _check_weights(self.first, self.last)

    def __call__(self, step: int) -> float:
        """The weight at a step."""
        return _between(self.first, self.last, min(step / self.steps, 1.0))


@dataclass(frozen=True, repr=False)
class Cosine(Schedule):
    """From one weight to another on half a cosine, then constant; by default a decay.

    w(t) = last + (first - last) (1 + cos(pi min(t / steps, 1))) / 2

    Args:
        steps: at least 1; the weight is `last` from step `steps` on.
        first: the weight at step 0; finite and at least 0, as is `last`.
        last: the weight at the end.

    Raises:
        ValueError: naming the setting.

    Source:
        As the learning rate of SGDR without restarts, arXiv 1608.03983.
    """

    steps: int
    first: float = 1.0
    last: float = 0.0

    def __post_init__(self) -> None:
        keep_count(self, "steps", 1)
        _check_weights(self.first, self.last)

    def __call__(self, step: int) -> float:
        """The weight at a step."""
        return _between(self.last, self.first, (1 + math.cos(math.pi * min(step / self.steps, 1.0))) / 2)


@dataclass(frozen=True, repr=False)
class Product(Schedule):
    """The product of schedules, as `*` makes it: `Linear(1000) * Every(4)` warms up a lazy penalty.

    All factors count the same steps.
    """

    factors: tuple[Schedule, ...]

    def __call__(self, step: int) -> float:
        """The product of the factors' weights at a step."""
        weights = [_number(factor(step)) for factor in self.factors]
        # Two negative weights must not make a positive one: of NaN, `Scheduled` says what is wrong.
        return math.prod(weights) if all(weight >= 0 for weight in weights) else math.nan

    def __repr__(self) -> str:
        return " * ".join(map(repr, self.factors))


def _factors(schedule: Schedule) -> tuple[Schedule, ...]:
    return schedule.factors if isinstance(schedule, Product) else (schedule,)


def _check_weights(first: float, last: float) -> None:
    for name, weight in (("first", first), ("last", last)):
        if not is_number(weight) or weight < 0:
            raise ValueError(
                f"{name} must be a finite weight of at least 0, got {weight!r}. Choose another; a negative one would be a reward."
            )


class Scheduled:
    """A regularizer whose weight follows a schedule; it counts its own steps, one a call.

    Called, evaluated and attached like the regularizer itself. At a step of weight 0 no penalty is computed, an attached forward runs
    without what makes it differentiable twice, and the penalty is exactly 0, with a graph. `evaluate` then runs the plain forward, unless
    one was recorded.

        reg = attrreg.Scheduled(attrreg.InputGradient(), attrreg.schedules.Every(4))

    Args:
        regularizer: what is weighted.
        schedule: its weight.

    Attributes:
        step: how many calls there were.

    Raises:
        TypeError: naming the argument.
        ValueError: in a call, naming the schedule, where it gives no weight: a negative one would be a reward.

    Cost:
        That of the regularizer at steps of nonzero weight, none at others.
    """

    def __init__(self, regularizer: AttributionRegularizer, schedule: Schedule) -> None:
        if not isinstance(regularizer, AttributionRegularizer):
            raise TypeError(
                f"regularizer must be an AttributionRegularizer, got {brief(regularizer)}. Write attrreg.InputGradient(), for example."
            )
        if not isinstance(schedule, Schedule):
            raise TypeError(f"schedule must be a schedules.Schedule, got {brief(schedule)}. Write Every(4), for example.")
        self.regularizer = regularizer
        self.schedule = schedule
        self.step = 0

    @property
    def weight(self) -> float:
        """The weight of the next call; a ValueError where the schedule gives none."""
        weight = self.schedule(self.step)
        number = _number(weight)
        if not 0 <= number < math.inf:
            raise ValueError(
                f"{type(self.schedule).__name__} gives {brief(weight)} at step {self.step}, but a weight must be finite and at least 0. "
                "Let it return such a number; a negative one would be a reward."
            )
        return number

    def __call__(
        self,
        model: nn.Module,
        x: Tensor,
        mask: Tensor,
        target: Tensor | None = None,
        *,
        annotated: Tensor | None = None,
        generator: torch.Generator | None = None,
        output: Select = None,
        inputs: Inputs = None,
        fraction: float = 1.0,
        group: Group = None,
    ) -> Tensor:
        """Compute the weighted penalty, and count the step. See `AttributionRegularizer.__call__`."""
        if weight := self.weight:
            value = weight * self.regularizer(
                model,
                x,
                mask,
                target,
                annotated=annotated,
                generator=generator,
                output=output,
                inputs=inputs,
                fraction=fraction,
                group=group,
            )
        else:
            value = _zero(x)
        self.step += 1
        return value

    def evaluate(
        self,
        model: nn.Module,
        x: Tensor,
        mask: Tensor,
        target: Tensor | None = None,
        *,
        annotated: Tensor | None = None,
        generator: torch.Generator | None = None,
        output: Select = None,
        inputs: Inputs = None,
        group: Group = None,
    ) -> Penalty:
        """Compute the weighted penalty in place of the loop's forward, and count the step. See `AttributionRegularizer.evaluate`."""
        weight = self.weight
        if weight:
            whole = self.regularizer.evaluate(  # its own, which a subclass may have written
                model, x, mask, target, annotated=annotated, generator=generator, output=output, inputs=inputs, group=group
            )
            terms = {name: weight * value for name, value in whole.terms.items()}
            result = Penalty(weight * whole.total, terms, whole.output)
        else:
            call = Call(model, x, inputs=inputs, as_compiled=True)
            attachment = attached(call.model)
            request = Request({}, twice=False, question=None, alone=True, returns_output=True)
            recording = None if attachment is None else attachment.take(call, request)
            if recording is None:
                with suspended(call.model, as_users_forward=True):  # else the attachment would give this forward out at the next call
                    output = call.run(x, as_users_forward=True)
            else:
                output = recording.returned
            zero = _zero(x)
            result = Penalty(zero, {term.name: zero.detach() for term in self.regularizer.terms}, output)
        self.step += 1
        return result

    def attach(self, model: nn.Module) -> Attachment:
        """Record the loop's forwards at the steps that need one. See `AttributionRegularizer.attach`."""
        return penalty.attach(self.regularizer.terms, model, self.regularizer.engine, due=lambda: bool(self.weight))

    def state_dict(self) -> dict[str, int]:
        """The count, for a checkpoint of the training."""
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from a checkpoint.

        Raises:
            ValueError: it is not what `state_dict` gave.
        """
        step: Any = state.get("step") if isinstance(state, Mapping) else None
        if not is_integer(step) or step < 0 or len(state) != 1:
            raise ValueError(f"state must be {{'step': count}}, as state_dict() gives it, got {brief(state)}. Pass what was saved of it.")
        self.step = int(step)

    def __repr__(self) -> str:
        return f"attrreg.Scheduled({self.regularizer!r}, {self.schedule!r})"


def _between(first: float, last: float, part: float) -> float:
    """So far from one weight to another: exactly these at 0 and 1."""
    return first * (1 - part) + last * part


def _number(weight: Any) -> float:
    """What a user's schedule returned, as a float: a number of Python's or NumPy's, or a 0-dim tensor; NaN where it is none of these."""
    try:
        return math.nan if isinstance(weight, (str, bytes)) else float(weight.detach() if isinstance(weight, Tensor) else weight)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return math.nan


def _zero(x: Tensor) -> Tensor:
    """Zero, 0-dim, with a graph so that a loop can call backward on it. It leads to no parameter, whose hooks would see a gradient of 0."""
    return torch.zeros(
        (), dtype=compute_dtype(x), device=x.device, requires_grad=True
    ).clone()  # a loop may add to it in place, not to a leaf
