"""Training and measuring: every method from the same weights, on the same batches, judged by the same yardstick."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from attrreg import InputGradient
from attrreg.bench import measure
from attrreg.bench.cases import Case
from attrreg.demo.settings import Settings
from attrreg.evidence.data import Split, Task
from attrreg.evidence.methods import Method
from attrreg.evidence.models import small
from attrreg.evidence.training import predict, step, train
from attrreg.metrics import accuracy, auc, share_inside
from attrreg.scores import TargetLogit

if TYPE_CHECKING:
    from attrreg.progress import Advance

WARMUP_ROUNDS = 3
SAMPLE = 250
YARDSTICK = InputGradient(score=TargetLogit())


@dataclass(frozen=True)
class Result:
    """What was measured of one method.

    Attributes:
        method: The name.
        test: Accuracy where the shortcut misleads.
        test_auc: AUC of the logit difference there; None unless there are two classes.
        clean: Accuracy where the shortcut is absent.
        outside_before: Share of |input gradient of the target logit| outside the mask, with the initial weights.
        outside_after: The same after training.
        own_plain: What the method penalises, without its weight, in the plainly trained model; None for plain itself.
        own_after: The same in the method's own model.
        cost: Time of a training step, as a multiple of a plain one.
        verdict: "better", "worse" or "unclear", on the test against plain training; None for plain itself.
    """

    method: str
    test: float
    test_auc: float | None
    clean: float
    outside_before: float
    outside_after: float
    own_plain: float | None
    own_after: float | None
    cost: float
    verdict: str | None


@dataclass(frozen=True)
class Run:
    """All methods' trained models, and what was measured of them."""

    settings: Settings
    task: Task
    models: tuple[nn.Module, ...]
    results: tuple[Result, ...]


def run(settings: Settings, progress: Advance = lambda doing, steps: None) -> Run:
    """Train and measure every method.

    Args:
        settings: What to run.
        progress: Told what is being done, and how many steps of the `total_steps` are done since it was last told.
    """
    task = settings.task()
    initial = small(task.classes, settings.seed).to(settings.device)
    models = []
    for method in settings.methods:
        model = copy.deepcopy(initial)
        for _ in train(model, task.train, method, settings.budget, settings.seed):
            progress(f"training: {method.name}", 1)
        models.append(model.eval())
    costs = step_costs(initial, task.train, settings, progress)
    results = _results(settings, task, initial, models, costs)
    return Run(settings, task, tuple(models), tuple(results))


def total_steps(settings: Settings) -> int:
    """Steps that `run` reports to its `progress`."""
    return len(settings.methods) * (settings.steps + WARMUP_ROUNDS + settings.rounds)


# Measuring


def attribution(model: nn.Module, data: Split) -> Tensor:
    """The yardstick: |d target logit / d image|, `(N, 1, 28, 28)`."""
    return YARDSTICK.attribute(model, data.images, target=data.labels).abs()


def share_outside(model: nn.Module, data: Split) -> float:
    """Mean over a sample of images of the share of |attribution| outside the mask.

    Images without any attribution are left out.
    """
    some = data.sample(SAMPLE)
    return 1 - share_inside(attribution(model, some), some.masks).nanmean().item()


def penalised(method: Method, model: nn.Module, data: Split) -> float | None:
    """What a method penalises, without its weight, on a sample of images; None if it penalises nothing."""
    if method.regularizer is None:
        return None
    some, draws = data.sample(SAMPLE), torch.Generator().manual_seed(0)
    return float(method.regularizer(model, some.images, some.masks, target=some.labels, generator=draws).detach())


def step_costs(initial: nn.Module, data: Split, settings: Settings, progress: Advance) -> list[float]:
    """Time of a step of each method, optimizer included, as a multiple of a plain one: as `attrreg bench` measures it, on one batch."""
    batch = data.take(torch.arange(settings.budget.batch, device=settings.device))
    draws = torch.Generator().manual_seed(settings.seed)
    steps = {}
    for method in settings.methods:
        model = copy.deepcopy(initial).train()
        optimizer = torch.optim.Adam(model.parameters(), settings.budget.rate)
        run = partial(step, model, optimizer, batch, method.term, draws)
        steps[method.name] = measure.Step(run, Case(method.name, model, batch.images, batch.labels, batch.masks))

    def note(rounds: float) -> None:
        progress("measuring the cost of a step", rounds * len(steps))

    return [cost.ratio for cost in measure.costs(steps, settings.rounds, WARMUP_ROUNDS, note).values()]


def compared(share: float, plain: float, count: int) -> str:
    """Whether a share of `count` images differs from the plain model's by more than three standard errors."""
    error = math.sqrt((share * (1 - share) + plain * (1 - plain)) / count)
    if abs(share - plain) <= 3 * error:
        return "unclear"
    return "better" if share > plain else "worse"


def _results(settings: Settings, task: Task, initial: nn.Module, models: list[nn.Module], costs: list[float]) -> Iterator[Result]:
    before = share_outside(initial.eval(), task.test)
    plain = accuracy(predict(models[0], task.test.images), task.test.labels)
    for method, model, cost in zip(settings.methods, models, costs, strict=True):
        logits = predict(model, task.test.images)
        test = accuracy(logits, task.test.labels)
        yield Result(
            method=method.name,
            test=test,
            test_auc=auc(logits, task.test.labels),
            clean=accuracy(predict(model, task.clean_test.images), task.clean_test.labels),
            outside_before=before,
            outside_after=share_outside(model, task.test),
            own_plain=penalised(method, models[0], task.test),
            own_after=penalised(method, model, task.test),
            cost=cost,
            verdict=None if model is models[0] else compared(test, plain, len(task.test)),
        )
