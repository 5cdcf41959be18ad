"""DDP: the gradients of several ranks are those of one process on all their images."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
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
from tests.models import Batch, SmoothNet, assert_close, gradients, smooth_batch
from tests.ranks import Ranks
from tests.test_docs import ROOT, blocks

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


def train(rank: int, case: Case, steps: int = 2) -> tuple[list[float], list[Tensor], list[Tensor]]:
    """Penalties, and the last step's gradients and buffers. Several steps, as DDP's first one is special."""
    model = case.model()
    entry = DistributedDataParallel(model, find_unused_parameters=case.unused, static_graph=case.static)
    values = []
    for step in range(steps):
        model.zero_grad()
        loss, penalty = loss_of(case, entry, model, shares(dist.get_world_size())[rank], case.flags[(rank + step) % len(case.flags)])
        loss.backward()
        values.append(float(penalty.detach()))
    found = [torch.zeros_like(p) if p.grad is None else p.grad.detach() for p in model.parameters()]
    return values, found, [buffer.detach() for buffer in model.buffers()]


def alone(case: Case, step: int = 1) -> tuple[float, list[Tensor]]:
    """The penalty and the gradients of one process, in whose forward each rank's images are apart only where BatchNorm couples them."""
    model, ranks = case.model(), len(case.flags)
    flags = [case.flags[(rank + step) % ranks] for rank in range(ranks)]
    if not case.norm:
        x, mask, target = (torch.cat(parts) for parts in zip(*shares(ranks), strict=True))
        penalty = case.regularizer(model, x, mask, target, annotated=annotated("".join(flags)))
        return float(penalty.detach()), gradients(model, F.cross_entropy(model(x), target) + penalty)
    count = max(1, "".join(flags).count("1"))
    loss, penalty = torch.zeros(()), torch.zeros(())
    for (x, mask, target), here in zip(shares(ranks), flags, strict=True):
        loss = loss + F.cross_entropy(model(x), target) / ranks
        penalty = penalty + case.regularizer.reduced("sum")(model, x, mask, target, annotated=annotated(here)) / count
    return float(penalty.detach()), gradients(model, loss + penalty)


def check(ranks: Ranks, case: Case) -> None:
    value, want = alone(case)
    results = ranks(train, case)
    assert sum(values[1] for values, _, _ in results) / ranks.count == pytest.approx(value, rel=1e-9)
    for _, found, _ in results:
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
    x, mask, target = (torch.cat(parts) for parts in zip(*shares(2), strict=True))
    flags = annotated(NONE + SOME)  # in the second step they have changed places
    map = oracles.input_gradient(model, x, target, oracles.score_target_logit)
    penalty = oracles.squared_outside(map, mask.double().unsqueeze(1))[flags].mean()
    want = gradients(model, F.cross_entropy(model(x), target) + penalty)
    results = two(train, case)
    assert sum(values[1] for values, _, _ in results) / 2 == pytest.approx(float(penalty.detach()), rel=1e-9)
    for _, found, _ in results:
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
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def test_accumulation_without_synchronising(two: Ranks) -> None:
    model = Case(()).model()
    x, mask, target = (torch.cat(parts) for parts in zip(*shares(2), strict=True))
    loss = torch.zeros(())
    for step in range(3):
        flags = annotated(SOME + NONE if step % 2 == 0 else NONE + SOME)
        loss = loss + (F.cross_entropy(model(x + step), target) + TERMS(model, x + step, mask, target, annotated=flags)) / 3
    want = gradients(model, loss)
    for found in two(accumulate):
        assert_close(found, want, 1e-6)


def draw(rank: int, reduction: Reduction) -> list[Tensor]:
    model = Case(()).model()
    entry, (x, mask, target) = DistributedDataParallel(model), alike(rank)
    flags, generator = annotated((SOME, "0010")[rank]), torch.Generator().manual_seed(rank)
    penalty = TERMS.reduced(reduction)(entry, x, mask, target, annotated=flags, fraction=0.5, generator=generator)
    (F.cross_entropy(entry(x), target) + penalty).backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def alike(rank: int) -> Batch:
    """Each rank has one image four times, so that it does not matter which are drawn."""
    x, mask, target = shares(2)[rank]
    return x[:1].repeat(4, 1, 1, 1), mask[:1].repeat(4, 1, 1), target[:1].repeat(4)


@pytest.mark.parametrize("reduction", ["mean", "sum", "batchmean"])
def test_a_fraction_stands_for_its_rank(two: Ranks, reduction: Reduction) -> None:
    model = Case(()).model()
    x, mask, target = (torch.cat(parts) for parts in zip(alike(0), alike(1), strict=True))
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
            found.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    return found


@pytest.mark.parametrize("static", [False, True])
def test_skipped_steps(two: Ranks, static: bool) -> None:
    model = Case(()).model()
    x, mask, target = (torch.cat(parts) for parts in zip(*shares(2), strict=True))
    task = F.cross_entropy(model(x), target)
    plain, full = gradients(model, task), gradients(model, F.cross_entropy(model(x), target) + 2 * TERMS(model, x, mask, target))
    for steps in two(skip_steps, static):
        for step, found in enumerate(steps):
            assert_close(found, full if step % 2 == 0 else plain, 1e-6)


class Training(nn.Module):
    """As Lightning's: the whole training step runs inside the wrapper's forward."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, mask: Tensor, target: Tensor, flags: Tensor) -> Tensor:
        return F.cross_entropy(self.net(x), target) + TERMS(self.net, x, mask, target, annotated=flags)


def inside(rank: int) -> list[Tensor]:
    model = Case(()).model()
    DistributedDataParallel(Training(model))(*shares(2)[rank], annotated(UNEVEN[rank])).backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def test_a_penalty_inside_the_wrappers_forward(two: Ranks) -> None:
    _, want = alone(Case(UNEVEN), step=0)
    for found in two(inside):
        assert_close(found, want, 1e-6)


class Holder(nn.Module):
    """As Fabric's: a wrapper around the wrapper."""

    def __init__(self, wrapped: nn.Module) -> None:
        super().__init__()
        self.wrapped = wrapped

    def forward(self, x: Tensor) -> Any:
        return self.wrapped(x)


def held(rank: int, unused: bool, attached: bool) -> list[Tensor]:
    case = Case((), unused=unused)
    model, (x, mask, target) = case.model(), shares(2)[rank]
    entry = Holder(DistributedDataParallel(model, find_unused_parameters=unused))
    regularizer = attrreg.InputGradient() + attrreg.GradCAM("wrapped.module.body")
    with regularizer.attach(entry) if attached else nullcontext():
        loss = F.cross_entropy(entry(x), target) + regularizer(entry, x, mask, target, annotated=annotated(UNEVEN[rank]))
        loss.backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("unused", [False, True])
def test_a_wrapper_around_the_wrapper(two: Ranks, unused: bool, attached: bool) -> None:
    _, want = alone(Case(UNEVEN, regularizer=attrreg.InputGradient() + attrreg.GradCAM("body")), step=0)
    for found in two(held, unused, attached):
        assert_close(found, want, 1e-6)


def compiled(rank: int, outside: bool) -> list[Tensor]:
    model, (x, mask, target) = Case(()).model(), shares(2)[rank]
    flags = annotated(UNEVEN[rank])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inner = model if outside else torch.compile(model, backend="aot_eager")
        wrapped: Any = DistributedDataParallel(inner)
        entry: Any = torch.compile(wrapped, backend="aot_eager") if outside else wrapped
        (F.cross_entropy(entry(x), target) + TERMS(entry, x, mask, target, annotated=flags)).backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("outside", [False, True])
def test_a_compiled_model(two: Ranks, outside: bool) -> None:
    _, want = alone(Case(UNEVEN), step=0)
    for found in two(compiled, outside):
        assert_close(found, want, 1e-6)


# What is refused, and what the user can say


def refused(rank: int, make: Callable[[DistributedDataParallel, Batch], Any]) -> str:
    """The error's message."""
    model = Case(()).model()
    try:
        make(DistributedDataParallel(model), shares(2)[rank])
    except (RuntimeError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def bare(entry: DistributedDataParallel, share: Batch) -> None:
    TERMS(entry.module, *share)


def on_its_own(entry: DistributedDataParallel, share: Batch) -> None:
    TERMS(entry, *share).backward()


def after_the_loss(entry: DistributedDataParallel, share: Batch) -> None:
    with TERMS.attach(entry):
        F.cross_entropy(entry(share[0]), share[2]).backward()
        TERMS(entry, *share).backward()


def joined(entry: DistributedDataParallel, share: Batch) -> None:
    with entry.join():
        TERMS(entry, *share)


def synchronised_norm(entry: DistributedDataParallel, share: Batch) -> None:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(Case((), norm=True).model())
    attrreg.InputGradient()(model, *share, group=dist.group.WORLD)  # DDP itself takes none on the CPU


def flattened(entry: DistributedDataParallel, share: Batch) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = FullyShardedDataParallel(Case(()).model(), device_id=torch.device("cpu"))
    TERMS(model, *share)


def held_static(entry: DistributedDataParallel, share: Batch) -> None:
    holder = Holder(DistributedDataParallel(entry.module, static_graph=True))
    (F.cross_entropy(holder(share[0]), share[2]) + attrreg.InputGradient()(holder, *share)).backward()


def looked_at(entry: DistributedDataParallel, share: Batch) -> None:
    """Its gradient is taken, but accumulated nowhere, as one does to compare sizes of gradients."""
    penalty = TERMS(entry, *share)
    found = torch.autograd.grad(penalty, list(entry.parameters()), retain_graph=True, allow_unused=True)
    torch.autograd.grad(penalty, entry.module.stem.weight, retain_graph=True)
    assert found[0].any()
    (F.cross_entropy(entry(share[0]), share[2]) + penalty).backward()


def no_group(entry: DistributedDataParallel, share: Batch) -> None:
    TERMS(entry, *share, group="world")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (bare, r"RuntimeError: 2 processes are running.*neither.*Pass the wrapped model; or say group="),
        (on_its_own, r"RuntimeError: DistributedDataParallel took no part.*Call the wrapped model, add the penalty.*once"),
        (after_the_loss, r"RuntimeError: DistributedDataParallel took no part.*call backward once"),
        (joined, r"RuntimeError: .*`join\(\)`.*as many batches, or pass group=False"),
        (synchronised_norm, r"RuntimeError: .*SyncBatchNorm in train mode.*Use BatchNorm"),
        (flattened, r"TypeError: .*FSDP1.*Use torch.distributed.fsdp.fully_shard"),
        (looked_at, "nothing"),
        (held_static, r"RuntimeError: DistributedDataParallel took no part"),
        (no_group, r"TypeError: group must be a process group, False or None.*Leave it out"),
    ],
)
def test_refusals(two: Ranks, make: Callable[..., Any], message: str) -> None:

    for text in two(refused, make):
        assert re.search(message, text), text


def said(rank: int) -> tuple[float, float]:
    model, (x, mask, target) = Case(()).model(), shares(2)[rank]
    flags = annotated(UNEVEN[rank])
    own = TERMS(model, x, mask, target, annotated=flags, group=False)
    groups: list[Any] = [dist.new_group([0]), dist.new_group([1])]
    same = TERMS(DistributedDataParallel(model), x, mask, target, annotated=flags, group=groups[rank])
    return float(own.detach()), float(same.detach())


def test_a_group_of_the_users(two: Ranks) -> None:
    model = Case(()).model()
    for rank, values in enumerate(two(said)):
        x, mask, target = shares(2)[rank]
        want = TERMS(model, x, mask, target, annotated=annotated(UNEVEN[rank]))
        assert values == pytest.approx((float(want.detach()),) * 2, rel=1e-9)


def features_only(rank: int) -> float:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(Case((), norm=True).model()).eval()
    return float(TERMS(model, *shares(2)[rank], group=dist.group.WORLD).detach())


def test_frozen_statistics_need_no_synchronising(two: Ranks) -> None:
    x, mask, target = (torch.cat(parts) for parts in zip(*shares(2), strict=True))
    value = TERMS(Case((), norm=True).model().eval(), x, mask, target)
    assert sum(two(features_only)) / 2 == pytest.approx(float(value.detach()), rel=1e-9)


def test_the_documented_script_runs_under_torchrun(tmp_path: Path) -> None:
    page = ROOT / "docs" / "distributed.md"
    script = tmp_path / "train.py"
    script.write_text(next(block.code for block in blocks(page) if block.language == "python"), encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", str(script)]
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, timeout=120, capture_output=True, text=True, env=settings)
    assert result.returncode == 0, result.stderr
