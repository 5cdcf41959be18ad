"""DDP: wrappers in wrappers, what is refused, and what the user can say."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import attrreg
from attrreg.trace import passes
from tests.models import Batch, accumulated, assert_close, gradients
from tests.ranks import Ranks
from tests.test_ddp import TERMS, UNEVEN, Case, alone, annotated, shares, together
from tests.test_docs import ROOT, blocks

pytestmark = pytest.mark.cpu


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
    return accumulated(model)


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
    return accumulated(model)


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("unused", [False, True])
def test_a_wrapper_around_the_wrapper(two: Ranks, unused: bool, attached: bool) -> None:
    _, want = alone(Case(UNEVEN, regularizer=attrreg.InputGradient() + attrreg.GradCAM("body")), step=0)
    for found in two(held, unused, attached):
        assert_close(found, want, 1e-6)


def held_with_buffers(rank: int) -> list[Tensor]:
    """DDP hands buffers round in each forward: a rank must run no passes that others do not."""
    model, (x, mask, target) = Case((), norm=True).model().eval(), shares(2)[rank]
    entry = Holder(DistributedDataParallel(model))
    flags = torch.tensor([True] * (len(x) - 1) + [rank == 0])
    (F.cross_entropy(entry(x), target) + attrreg.InputGradient()(entry, x, mask, target, annotated=flags)).backward()
    return accumulated(model)


def test_a_wrapper_around_the_wrapper_of_a_model_with_buffers(two: Ranks) -> None:
    model, (x, mask, target) = Case((), norm=True).model().eval(), together(shares(2))
    flags = torch.tensor([True] * (len(x) - 1) + [False])
    want = gradients(model, F.cross_entropy(model(x), target) + attrreg.InputGradient()(model, x, mask, target, annotated=flags))
    for found in two(held_with_buffers):
        assert_close(found, want, 1e-6)


def passes_of_a_held_one(rank: int, term: Any, share: float) -> int:
    """Through a holder; the second rank has no annotated image where a share is drawn."""
    model, (x, mask, target) = Case((), norm=True).model().eval(), shares(2)[rank]
    entry, flags = Holder(DistributedDataParallel(model)), torch.full((len(x),), share == 1 or rank == 0)
    with term.attach(entry) if share < 1 else nullcontext(), passes() as counted:
        loss = F.cross_entropy(entry(x), target)
        (loss + term(entry, x, mask, target, annotated=flags, fraction=share)).backward()
    return counted.forward


@pytest.mark.parametrize(
    ("term", "share", "count"), [(attrreg.InputGradient(), 0.5, 1), (attrreg.IntegratedGradients(3, chunk=None), 1.0, 3)]
)
def test_a_wrapper_around_the_wrapper_takes_as_many_passes_on_each_rank(two: Ranks, term: Any, share: float, count: int) -> None:
    assert two(passes_of_a_held_one, term, share) == [count, count]


def compiled(rank: int, outside: bool) -> list[Tensor]:
    model, (x, mask, target) = Case(()).model(), shares(2)[rank]
    flags = annotated(UNEVEN[rank])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inner = model if outside else torch.compile(model, backend="aot_eager")
        wrapped: Any = DistributedDataParallel(inner)
        entry: Any = torch.compile(wrapped, backend="aot_eager") if outside else wrapped
        (F.cross_entropy(entry(x), target) + TERMS(entry, x, mask, target, annotated=flags)).backward()
    return accumulated(model)


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


def after_a_look(entry: DistributedDataParallel, share: Batch) -> None:
    with torch.no_grad():
        entry(share[0])  # the accuracy, say
    TERMS(entry, *share).backward()


def after_the_loss(entry: DistributedDataParallel, share: Batch) -> None:
    with TERMS.attach(entry):
        F.cross_entropy(entry(share[0]), share[2]).backward()
        TERMS(entry, *share).backward()


def joined(entry: DistributedDataParallel, share: Batch) -> None:
    with entry.join():
        TERMS(entry, *share)


def joined_by_name(entry: DistributedDataParallel, share: Batch) -> None:
    with entry.join():
        TERMS(entry, *share, group=dist.group.WORLD)


def synchronised_norm(entry: DistributedDataParallel, share: Batch) -> None:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(Case((), norm=True).model())
    attrreg.InputGradient()(model, *share, group=dist.group.WORLD)  # DDP itself takes none on the CPU


def flattened(entry: DistributedDataParallel, share: Batch, group: Any = None) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = FullyShardedDataParallel(Case(()).model(), device_id=torch.device("cpu"))
    TERMS(model, *share, group=group)


def flattened_alone(entry: DistributedDataParallel, share: Batch) -> None:
    flattened(entry, share, group=False)


def held_static(entry: DistributedDataParallel, share: Batch) -> None:
    holder = Holder(DistributedDataParallel(entry.module, static_graph=True))
    (F.cross_entropy(holder(share[0]), share[2]) + attrreg.InputGradient()(holder, *share)).backward()


def evaluated_while_attached(entry: DistributedDataParallel, share: Batch) -> None:
    static = DistributedDataParallel(entry.module, static_graph=True)
    with TERMS.attach(static):
        static(share[0])
        penalty = TERMS.evaluate(static, *share)
        (F.cross_entropy(penalty.output, share[2]) + penalty.total).backward()


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
        (after_a_look, r"RuntimeError: DistributedDataParallel took no part"),
        (after_the_loss, r"RuntimeError: DistributedDataParallel took no part.*call backward once"),
        (joined_by_name, r"RuntimeError: .*`join\(\)`.*as many batches, or pass group=False"),
        (joined, r"RuntimeError: .*`join\(\)`.*as many batches, or pass group=False"),
        (synchronised_norm, r"RuntimeError: .*SyncBatchNorm in train mode.*Use BatchNorm"),
        (flattened_alone, r"TypeError: .*FSDP1.*Use torch.distributed.fsdp.fully_shard"),
        (flattened, r"TypeError: .*FSDP1.*Use torch.distributed.fsdp.fully_shard"),
        (looked_at, r"^nothing$"),
        (held_static, r"RuntimeError: DistributedDataParallel took no part"),
        (evaluated_while_attached, r"RuntimeError: DistributedDataParallel took no part"),
        (no_group, r"TypeError: group must be a process group, False or None.*Leave it out"),
    ],
)
def test_refusals(two: Ranks, make: Callable[..., Any], message: str) -> None:

    for text in two(refused, make):
        assert re.search(message, text), text


def shown(rank: int) -> Tensor | None:
    model, (x, _, target) = Case(()).model(), shares(2)[rank]
    entry = DistributedDataParallel(model)
    return attrreg.InputGradient().attribute(entry, x, target) if rank == 0 else None


def test_a_map_that_is_shown_communicates_nothing(two: Ranks) -> None:
    x, _, target = shares(2)[0]
    found = two(shown)[0]  # which would wait for the other rank, that does not take part
    torch.testing.assert_close(found, attrreg.InputGradient().attribute(Case(()).model(), x, target))


def said(rank: int) -> tuple[float, ...]:
    model, (x, mask, target) = Case(()).model(), shares(2)[rank]
    flags = annotated(UNEVEN[rank])
    own = TERMS(model, x, mask, target, annotated=flags, group=False)
    groups: list[Any] = [dist.new_group([0]), dist.new_group([1])]
    same = TERMS(DistributedDataParallel(model), x, mask, target, annotated=flags, group=groups[rank])
    wrapped = TERMS(DistributedDataParallel(model, process_group=groups[rank]), x, mask, target, annotated=flags)
    return float(own.detach()), float(same.detach()), float(wrapped.detach())


def test_means_run_over_the_group_that_the_user_passes_or_wraps_with(two: Ranks) -> None:
    model = Case(()).model()
    for rank, values in enumerate(two(said)):
        x, mask, target = shares(2)[rank]
        want = TERMS(model, x, mask, target, annotated=annotated(UNEVEN[rank]))
        assert values == pytest.approx((float(want.detach()),) * 3, rel=1e-9)


class Centre(nn.Module):
    """Subtracts a running mean, also in train mode, as DINO's head does."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4, 1, 1, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        centred = x - self.mean
        with torch.no_grad():
            self.mean.lerp_(x.mean((0, 2, 3)).view_as(self.mean), 0.5)
        return centred


def centred(rank: int) -> tuple[float, float]:
    """The penalty from the first rank's buffers, handed round by hand and by the wrapper."""
    model, (x, mask, target) = Case(()).model(), shares(2)[rank]
    model.norm = Centre()  # type: ignore[assignment]
    entry = DistributedDataParallel(model)
    entry(x + 3 * rank)
    by_hand = copy.deepcopy(model)
    dist.broadcast(by_hand.get_buffer("norm.mean"), 0)
    want = TERMS(by_hand, x, mask, target, group=dist.group.WORLD)
    return float(TERMS.evaluate(entry, x, mask, target).total.detach()), float(want.detach())


def test_evaluate_starts_from_the_buffers_that_the_wrapper_hands_round(two: Ranks) -> None:
    for found, want in two(centred):
        assert found == pytest.approx(want, rel=1e-9)


def features_only(rank: int) -> float:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(Case((), norm=True).model()).eval()
    return float(TERMS(model, *shares(2)[rank], group=dist.group.WORLD).detach())


def test_frozen_statistics_need_no_synchronising(two: Ranks) -> None:
    x, mask, target = together(shares(2))
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
