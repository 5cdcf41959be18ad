"""Schedules: the weight of a regularizer as a function of the training step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from attrreg import penalty
from attrreg.attach import Attachment
from attrreg.penalty import Penalty
from attrreg.regularizer import AttributionRegularizer
from attrreg.spec import Spec


class Schedule(Spec, ABC):
    """A weight for each step. Subclasses are frozen dataclasses."""

    @abstractmethod
    def __call__(self, step: int) -> float:
        """The weight at a step, counted from 0; 0 skips the penalty and its passes."""


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
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(f"steps must be an integer of at least 1, got {self.steps!r}. Write for example Every(4).")

    def __call__(self, step: int) -> float:
        """`steps` at each `steps`-th step, else 0."""
        return float(self.steps) if step % self.steps == 0 else 0.0


class Scheduled:
    """A regularizer whose weight follows a schedule; it counts its own steps, one a call.

    Used like the regularizer itself. At a step of weight 0 nothing is computed, an attached forward is left alone, and the
    penalty is exactly 0, with a graph.

        reg = attrreg.Scheduled(attrreg.InputGradient(), attrreg.schedules.Every(4))

    Args:
        regularizer: what is weighted.
        schedule: its weight.

    Attributes:
        step: how many calls there were.

    Raises:
        TypeError: naming the argument.

    Cost:
        That of the regularizer at steps of nonzero weight, none at others.
    """

    def __init__(self, regularizer: AttributionRegularizer, schedule: Schedule) -> None:
        if not isinstance(regularizer, AttributionRegularizer):
            raise TypeError(
                f"regularizer must be an AttributionRegularizer, got {regularizer!r}. Write attrreg.InputGradient(), for example."
            )
        if not isinstance(schedule, Schedule):
            raise TypeError(f"schedule must be a schedules.Schedule, got {schedule!r}. Write Every(4), for example.")
        self.regularizer = regularizer
        self.schedule = schedule
        self.step = 0

    @property
    def weight(self) -> float:
        """The weight of the next call."""
        return self.schedule(self.step)

    def __call__(self, model: nn.Module, x: Tensor, mask: Tensor, target: Tensor | None = None, **settings: Any) -> Tensor:
        """Compute the weighted penalty, and count the step. See `AttributionRegularizer.__call__`."""
        weight = self.weight
        value = weight * self.regularizer(model, x, mask, target, **settings) if weight else _zero(model, x)
        self.step += 1
        return value

    def evaluate(self, model: nn.Module, x: Tensor, mask: Tensor, target: Tensor | None = None, **settings: Any) -> Penalty:
        """Compute the weighted penalty in place of the loop's forward, and count the step. See `AttributionRegularizer.evaluate`."""
        weight = self.weight
        if weight:
            whole = self.regularizer.evaluate(model, x, mask, target, **settings)
            terms = {name: weight * value for name, value in whole.terms.items()}
            result = Penalty(weight * whole.total, terms, whole.output)
        else:
            inputs = settings.get("inputs")
            output = model(**inputs) if isinstance(inputs, dict) else model(*(inputs if inputs is not None else (x,)))
            zero = _zero(model, x)
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
        """Go on from a checkpoint."""
        self.step = state["step"]

    def __repr__(self) -> str:
        return f"attrreg.Scheduled({self.regularizer!r}, {self.schedule!r})"


class _Nothing(Function):
    """Zero as a function of something, without a gradient."""

    @staticmethod
    def forward(ctx: Any, anything: Tensor, like: Tensor) -> Tensor:
        return torch.zeros((), dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        return None, None


def _zero(model: nn.Module, x: Tensor) -> Tensor:
    trainable = next((parameter for parameter in model.parameters() if parameter.requires_grad), x)
    zero: Tensor = _Nothing.apply(trainable, x.detach())
    return zero
