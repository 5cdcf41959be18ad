"""DDP: the gradients of several ranks are those of one process on all their images."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import attrreg
from attrreg import engines, schedules
from attrreg.regularizer import AttributionRegularizer, Reduction
from tests import oracles
from tests.models import Batch, SmoothNet, accumulated, assert_close, gradients, smooth_batch
from tests.ranks import Ranks

pytestmark = pytest.mark.cpu

ZERO = attrreg.baselines.Zero()
TERMS = 1.0 * attrreg.InputGradient() + 0.5 * attrreg.GradCAM("body") + 0.1 * attrreg.ActivationDifference(fill=ZERO)
PATH = attrreg.IntegratedGradients(steps=3)
SOME, FEW, NONE, ALL = "1101", "0100", "0000", "1111"


class Net(SmoothNet):
    """With a layer that the forward does not use."""

    def __init__(self, norm: bool, spare: bool) -> None:
        super().__init__(norm=norm)
        if spare:
            self.spare = nn.Linear(2, 2)


@dataclass(frozen=True)
class Case:
    """One training step.

    Attributes:
        flags: which images are annotated, on each rank.
        way: how the penalty is called.
        before: the penalty is computed before the model's forward.
    """

    flags: tuple[str, ...]
    regularizer: AttributionRegularizer = TERMS
    way: str = "unattached"
    before: bool = False
    norm: bool = False
    unused: bool = False
    static: bool = False
    inner: bool = False

    def model(self) -> Net:
        torch.manual_seed(1)
        return Net(self.norm, self.unused).double()


def shares(ranks: int) -> list[Batch]:
    """A batch of four images for each rank."""
    torch.manual_seed(2)
    whole = smooth_batch(4 * ranks)
    return [(whole[0][rank::ranks], whole[1][rank::ranks], whole[2][rank::ranks]) for rank in range(ranks)]


def together(parts: list[Batch]) -> Batch:
    """The images of all ranks, as one process has them."""
    x, mask, target = (torch.cat(part) for part in zip(*parts, strict=True))
    return x, mask, target


def annotated(flags: str) -> Tensor:
    return torch.tensor([flag == "1" for flag in flags])


def loss_of(case: Case, entry: nn.Module, model: nn.Module, share: Batch, flags: str) -> tuple[Tensor, Tensor]:
    """The loss and the penalty."""
    (x, mask, target), regularizer = share, case.regularizer
    settings: dict[str, Any] = {"annotated": annotated(flags)}
    if case.inner:
        settings["group"] = dist.group.WORLD
    called = model if case.inner else entry
    if case.way == "evaluate":
        found = regularizer.evaluate(called, x, mask, target, **settings)
        output = entry(x) if case.inner else found.output
        return F.cross_entropy(output, target) + found.total, found.total
    with regularizer.attach(called) if case.way == "attached" else nullcontext():
        early = regularizer(called, x, mask, target, **settings) if case.before else None
        loss = F.cross_entropy(entry(x), target)
        penalty = regularizer(called, x, mask, target, **settings) if early is None else early
    return loss + penalty, penalty


def train(rank: int, case: Case) -> tuple[float, list[Tensor]]:
    """The penalty and the gradients of a second step, as DDP's first one is special."""
    model = case.model()
    entry = DistributedDataParallel(model, find_unused_parameters=case.unused, static_graph=case.static)
    for step in range(2):
        model.zero_grad()
        loss, penalty = loss_of(case, entry, model, shares(dist.get_world_size())[rank], case.flags[(rank + step) % len(case.flags)])
        loss.backward()
    return float(penalty.detach()), [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]


def alone(case: Case, step: int = 1) -> tuple[float, list[Tensor]]:
    """The penalty and the gradients of one process, in whose forward each rank's images are apart only where BatchNorm couples them."""
    model, ranks = case.model(), len(case.flags)
    flags = [case.flags[(rank + step) % ranks] for rank in range(ranks)]
    if not case.norm:
        x, mask, target = together(shares(ranks))
        penalty = case.regularizer(model, x, mask, target, annotated=annotated("".join(flags)))
        return float(penalty.detach()), gradients(model, F.cross_entropy(model(x), target) + penalty)
    count = max(1, "".join(flags).count("1"))
    loss, penalty = torch.zeros(()), torch.zeros(())
    for (x, mask, target), here in zip(shares(ranks), flags, strict=True):
        loss = loss + F.cross_entropy(model(x), target) / ranks
        penalty = penalty + case.regularizer.reduced("sum")(model, x, mask, target, annotated=annotated(here)) / count
    return float(penalty.detach()), gradients(model, loss + penalty)


def check(ranks: Ranks, case: Case, training: Callable[..., Any] = train, *settings: Any) -> None:
    """Compare what `training(rank, case, *settings)` gives on all ranks with one process."""
    value, want = alone(case)
    results = ranks(training, case, *settings)
    assert sum(penalty for penalty, _ in results) / ranks.count == pytest.approx(value, rel=1e-9)
    for _, found in results:
        assert_close(found, want, 1e-6)


UNEVEN = (SOME, FEW)
CASES = {
    "unattached": Case(UNEVEN),
    "attached": Case(UNEVEN, way="attached"),
    "evaluate": Case(UNEVEN, way="evaluate"),
    "all annotated": Case((ALL, ALL), way="attached"),
    "one rank has none": Case((NONE, SOME), way="attached"),
    "one rank has none, unattached": Case((NONE, SOME)),
    "nobody has any": Case((NONE, NONE), way="attached"),
    "the penalty first": Case(UNEVEN, before=True),
    "path": Case(UNEVEN, regularizer=PATH),
    "path in one": Case((NONE, SOME), regularizer=replace(PATH, chunk=None)),
    "finite differences": Case(UNEVEN, regularizer=TERMS.using(engines.FiniteDifference(step=1e-4))),
    "batch norm": Case(UNEVEN, norm=True),
    "batch norm, attached": Case((NONE, SOME), norm=True, way="attached"),
    "batch norm, evaluate": Case(UNEVEN, norm=True, way="evaluate"),
    "unused": Case(UNEVEN, unused=True),
    "unused, attached": Case((NONE, SOME), unused=True, way="attached"),
    "unused, evaluate": Case(UNEVEN, unused=True, way="evaluate"),
    "unused, the penalty first": Case(UNEVEN, unused=True, before=True),
    "static": Case(UNEVEN, static=True),
    "static, attached": Case((NONE, SOME), static=True, way="attached"),
    "static, evaluate": Case(UNEVEN, static=True, way="evaluate"),
    "static, the penalty first": Case(UNEVEN, static=True, before=True),
    "the inner module": Case(UNEVEN, inner=True),
    "the inner module, attached": Case(UNEVEN, inner=True, way="attached"),
    "the inner module, static": Case(UNEVEN, inner=True, static=True, before=True),
    "sum": Case(UNEVEN, regularizer=TERMS.reduced("sum")),
    "batchmean": Case(UNEVEN, regularizer=TERMS.reduced("batchmean")),
}


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_one_process(two: Ranks, name: str) -> None:
    check(two, CASES[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["attached", "unattached", "static, attached", "unused", "batch norm"])
def test_four_ranks(four: Ranks, name: str) -> None:
    check(four, replace(CASES[name], flags=(SOME, NONE, FEW, ALL)))


def test_against_an_oracle(two: Ranks) -> None:
    case = Case((SOME, NONE), regularizer=attrreg.InputGradient(), way="attached")
    model = case.model()
    x, mask, target = together(shares(2))
    flags = annotated(NONE + SOME)  # in the second step they have changed places
    map = oracles.input_gradient(model, x, target, oracles.score_contrast)
    penalty = oracles.log_outside(map, mask.double().unsqueeze(1))[flags].mean()
    want = gradients(model, F.cross_entropy(model(x), target) + penalty)
    results = two(train, case)
    assert sum(value for value, _ in results) / 2 == pytest.approx(float(penalty.detach()), rel=1e-9)
    for _, found in results:
        assert_close(found, want, 1e-6)


def buffers_after(rank: int, way: str) -> list[Tensor]:
    case = Case((ALL, ALL), norm=True, way=way)
    model = case.model()
    entry, (x, mask, target) = DistributedDataParallel(model), shares(2)[rank]
    for _ in range(2):
        if way == "evaluate":
            TERMS.evaluate(entry, x, mask, target)
        else:
            entry(x)
            TERMS(entry, x, mask, target)
    return [buffer.detach().clone() for buffer in model.buffers()]


def test_buffers_are_those_of_the_loops_own_forward(two: Ranks) -> None:
    for one, other in zip(two(buffers_after, "evaluate"), two(buffers_after, "own"), strict=True):
        for got, want in zip(one, other, strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=0)


# Accumulation, shares of the batch, schedules


def accumulate(rank: int) -> list[Tensor]:
    case = Case((SOME, NONE))
    model = case.model()
    entry = DistributedDataParallel(model)
    with TERMS.attach(entry):
        for step in range(3):
            x, mask, target = shares(2)[rank]
            with entry.no_sync() if step < 2 else nullcontext():
                images = x + step
                loss = F.cross_entropy(entry(images), target)
                loss = loss + TERMS(entry, images, mask, target, annotated=annotated(case.flags[(rank + step) % 2]))
                (loss / 3).backward()
    return accumulated(model)


def accumulated_alone() -> list[Tensor]:
    """The gradients of one process, after three parts in which the ranks' annotations change places."""
    model = Case(()).model()
    x, mask, target = together(shares(2))
    loss = torch.zeros(())
    for step in range(3):
        flags = annotated(SOME + NONE if step % 2 == 0 else NONE + SOME)
        loss = loss + (F.cross_entropy(model(x + step), target) + TERMS(model, x + step, mask, target, annotated=flags)) / 3
    return gradients(model, loss)


def test_accumulation_without_synchronising(two: Ranks) -> None:
    want = accumulated_alone()
    for found in two(accumulate):
        assert_close(found, want, 1e-6)


def draw(rank: int, reduction: Reduction) -> list[Tensor]:
    model = Case(()).model()
    entry, (x, mask, target) = DistributedDataParallel(model), alike(rank)
    flags, generator = annotated((SOME, "0010")[rank]), torch.Generator().manual_seed(rank)
    penalty = TERMS.reduced(reduction)(entry, x, mask, target, annotated=flags, fraction=0.5, generator=generator)
    (F.cross_entropy(entry(x), target) + penalty).backward()
    return accumulated(model)


def alike(rank: int) -> Batch:
    """Each rank has one image four times, so that it does not matter which are drawn."""
    x, mask, target = shares(2)[rank]
    return x[:1].repeat(4, 1, 1, 1), mask[:1].repeat(4, 1, 1), target[:1].repeat(4)


@pytest.mark.parametrize("reduction", ["mean", "sum", "batchmean"])
def test_a_fraction_stands_for_its_rank(two: Ranks, reduction: Reduction) -> None:
    model = Case(()).model()
    x, mask, target = together([alike(0), alike(1)])
    penalty = TERMS.reduced(reduction)(model, x, mask, target, annotated=annotated(SOME + "0010"))
    want = gradients(model, F.cross_entropy(model(x), target) + penalty)
    for found in two(draw, reduction):
        assert_close(found, want, 1e-6)


def skip_steps(rank: int, static: bool) -> list[list[Tensor]]:
    model, found = Case(()).model(), []
    entry, (x, mask, target) = DistributedDataParallel(model, static_graph=static), shares(2)[rank]
    regularizer = attrreg.Scheduled(TERMS, schedules.Every(2))
    with regularizer.attach(entry):
        for _ in range(4):
            model.zero_grad()
            (F.cross_entropy(entry(x), target) + regularizer(entry, x, mask, target)).backward()
            found.append(accumulated(model))
    return found


@pytest.mark.parametrize("static", [False, True])
def test_skipped_steps(two: Ranks, static: bool) -> None:
    model = Case(()).model()
    x, mask, target = together(shares(2))
    task = F.cross_entropy(model(x), target)
    plain, full = gradients(model, task), gradients(model, F.cross_entropy(model(x), target) + 2 * TERMS(model, x, mask, target))
    for steps in two(skip_steps, static):
        for step, found in enumerate(steps):
            assert_close(found, full if step % 2 == 0 else plain, 1e-6)
