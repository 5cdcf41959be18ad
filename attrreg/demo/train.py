"""Training and measuring: every method from the same weights, on the same batches, judged by the same yardstick."""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attrreg import AttributionRegularizer, InputGradient
from attrreg.demo.data import Split, Task
from attrreg.demo.settings import Method, Settings
from attrreg.metrics import accuracy, auc, share_inside
from attrreg.scores import TargetLogit

WARMUP_ROUNDS = 3
CHUNK = 256
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


Progress = Callable[[str, int], None]


def run(settings: Settings, progress: Progress = lambda doing, steps: None) -> Run:
    """Train and measure every method.

    Args:
        settings: What to run.
        progress: Told what is being done, and how many steps of the `total_steps` are done since it was last told.
    """
    task = settings.task()
    initial = build_model(task.classes, settings.seed).to(settings.device)
    models = []
    for method in settings.methods:
        model = copy.deepcopy(initial)
        for _ in train(model, task.train, method.term, settings):
            progress(f"training: {method.name}", 1)
        models.append(model.eval())
    costs = step_costs(initial, task.train, settings, progress)
    results = _results(settings, task, initial, models, costs)
    return Run(settings, task, tuple(models), tuple(results))


def total_steps(settings: Settings) -> int:
    """Steps that `run` reports to its `progress`."""
    return len(settings.methods) * (settings.steps + WARMUP_ROUNDS + settings.rounds)


def build_model(classes: int, seed: int) -> nn.Module:
    """A small timm ResNet (373,000 parameters) whose last feature map is 4x4 for 28x28 images.

    Without `output_stride` that map would be 1x1, and Grad-CAM would have nothing to say about where.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = timm.create_model("test_resnet", in_chans=1, num_classes=classes, output_stride=8)
    return model


def train(model: nn.Module, data: Split, term: AttributionRegularizer | None, settings: Settings) -> Iterator[float]:
    """Train a model, yielding the loss after each step. The seed alone decides the batches and the draws."""
    order = torch.Generator().manual_seed(settings.seed)
    draws = torch.Generator().manual_seed(settings.seed)
    optimizer = torch.optim.Adam(model.parameters(), settings.rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.rate, total_steps=settings.steps)
    model.train()
    for _ in range(settings.epochs):
        shuffled = torch.randperm(len(data), generator=order).to(settings.device)
        for index in shuffled.split(settings.batch)[: len(data) // settings.batch]:
            loss = step(model, optimizer, data.take(index), term, draws)
            schedule.step()
            yield float(loss)


def step(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: Split, term: AttributionRegularizer | None, draws: torch.Generator
) -> Tensor:
    """One training step: this is all that a training loop needs."""
    optimizer.zero_grad()
    if term is None:
        loss = F.cross_entropy(model(batch.images), batch.labels)
    else:
        with term.attach(model):
            loss = F.cross_entropy(model(batch.images), batch.labels)
            loss = loss + term(model, batch.images, batch.masks, target=batch.labels, generator=draws)
    loss.backward()
    optimizer.step()
    return loss.detach()


# Measuring


def predict(model: nn.Module, images: Tensor) -> Tensor:
    """Logits `(N, classes)` of an evaluated model."""
    with torch.no_grad():
        return torch.cat([model(part) for part in images.split(CHUNK)])


def attribution(model: nn.Module, data: Split) -> Tensor:
    """The yardstick: |d target logit / d image|, `(N, 28, 28)`."""
    return YARDSTICK.attribute(model, data.images, target=data.labels).abs().sum(dim=1)


def share_outside(model: nn.Module, data: Split) -> float:
    """Mean over a sample of images of the share of |attribution| outside the mask.

    Images without any attribution are left out.
    """
    some = sample(data)
    return 1 - share_inside(attribution(model, some), some.masks).nanmean().item()


def penalty(model: nn.Module, regularizer: AttributionRegularizer, data: Split) -> float:
    """A regularizer's value on a sample of images."""
    some, draws = sample(data), torch.Generator().manual_seed(0)
    return float(regularizer(model, some.images, some.masks, target=some.labels, generator=draws).detach())


def sample(data: Split) -> Split:
    """At most `SAMPLE` images, drawn once and for all."""
    index = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:SAMPLE]
    return data.take(index.to(data.labels.device))


def step_costs(initial: nn.Module, data: Split, settings: Settings, progress: Progress) -> list[float]:
    """Time of a step of each method as a multiple of a plain one.

    All methods take turns on the same batch, and each time is divided by that of the plain step of the same round, so
    that a change in the machine's load hits both. Median over rounds, after some that are thrown away.
    """
    batch = data.take(torch.arange(settings.batch, device=settings.device))
    draws = torch.Generator().manual_seed(settings.seed)
    models = [copy.deepcopy(initial).train() for _ in settings.methods]
    optimizers = [torch.optim.Adam(model.parameters(), settings.rate) for model in models]
    rounds = []
    for _ in range(WARMUP_ROUNDS + settings.rounds):
        times = []
        for method, model, optimizer in zip(settings.methods, models, optimizers, strict=True):
            _finish(settings.device)
            start = time.perf_counter()
            step(model, optimizer, batch, method.term, draws)
            _finish(settings.device)
            times.append(time.perf_counter() - start)
            progress("measuring the cost of a step", 1)
        rounds.append([taken / times[0] for taken in times])
    return [statistics.median(ratios) for ratios in zip(*rounds[WARMUP_ROUNDS:], strict=True)]


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
            own_plain=_own(method, models[0], task.test),
            own_after=_own(method, model, task.test),
            cost=cost,
            verdict=None if model is models[0] else compared(test, plain, len(task.test)),
        )


def _own(method: Method, model: nn.Module, data: Split) -> float | None:
    return None if method.regularizer is None else penalty(model, method.regularizer, data)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
