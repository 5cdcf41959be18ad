"""FSDP2: the gradients of a sharded model are those of one process on all images."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass, replace
from typing import Any, ClassVar
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import attrreg
from attrreg import engines, folding, schedules
from attrreg.regularizer import AttributionRegularizer
from tests.models import Batch, SmoothNet, accumulated, assert_close, gradients
from tests.ranks import Ranks
from tests.test_ddp import FEW, NONE, PATH, SOME, TERMS, UNEVEN, ZERO, Case, accumulated_alone, annotated, check, loss_of, shares, together

pytestmark = pytest.mark.cpu


@dataclass(frozen=True)
class Sharding:
    """How the model is sharded: `fully_shard`'s default, or with a setting changed."""

    reshard_after_forward: bool | None = None
    replicas: int = 1
    whole: bool = False  # the root alone, not layer by layer
    grouped: bool = False  # all three layers as one


def shard(model: SmoothNet, sharding: Sharding = Sharding()) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        size = dist.get_world_size() // sharding.replicas
        shape, names = ((sharding.replicas, size), ("replicas", "shards")) if sharding.replicas > 1 else ((size,), ("shards",))
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    settings: dict[str, Any] = {"mesh": mesh}
    if sharding.reshard_after_forward is not None:
        settings["reshard_after_forward"] = sharding.reshard_after_forward
    layers = [model.stem, model.body, model.head]
    for layer in [layers] if sharding.grouped else [] if sharding.whole else layers:
        fully_shard(layer, **settings)
    return fully_shard(model, **settings)


def full(model: nn.Module) -> list[Tensor]:
    """The gradients, gathered from all ranks."""
    return [p.grad.full_tensor() for p in model.parameters() if p.grad is not None]  # type: ignore[attr-defined]


def train(rank: int, case: Case, sharding: Sharding) -> tuple[float, list[Tensor]]:
    """The penalty and the gradients of a second step."""
    model = shard(case.model(), sharding)
    for step in range(2):
        model.zero_grad()
        flags = case.flags[(rank + step) % len(case.flags)]
        loss, penalty = loss_of(case, model, model, shares(dist.get_world_size())[rank], flags)
        loss.backward()
    groups = [module._get_fsdp_state()._fsdp_param_group for module in model.modules() if hasattr(module, "_get_fsdp_state")]
    assert any(group is not None for group in groups)
    assert all(group.reshard_after_backward for group in groups if group is not None)
    assert all(group.is_sharded for group in groups if group is not None), "weights are left gathered"
    return float(penalty.detach()), full(model)


FINE = engines.FiniteDifference(step=1e-4)
CASES = {
    "unattached": Case(UNEVEN),
    "attached": Case(UNEVEN, way="attached"),
    "evaluate": Case(UNEVEN, way="evaluate"),
    "one rank has none": Case((NONE, SOME), way="attached"),
    "the penalty first": Case(UNEVEN, before=True),
    "the penalty first, of gradients alone": Case(UNEVEN, regularizer=attrreg.InputGradient(), before=True),
    "path": Case(UNEVEN, regularizer=PATH),
    "path in one": Case(UNEVEN, regularizer=replace(PATH, chunk=None)),
    "finite differences": Case(UNEVEN, regularizer=TERMS.using(FINE)),
    "finite differences, attached": Case((NONE, SOME), regularizer=TERMS.using(FINE), way="attached"),
    "finite differences, path": Case(UNEVEN, regularizer=PATH.using(FINE)),
    "batch norm": Case(UNEVEN, norm=True, way="attached"),
}


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_one_process(two: Ranks, name: str) -> None:
    check(two, CASES[name], train, Sharding())


@pytest.mark.parametrize("sharding", [Sharding(reshard_after_forward=False), Sharding(reshard_after_forward=True), Sharding(whole=True)])
@pytest.mark.parametrize("name", ["attached", "path"])
def test_other_ways_to_shard(two: Ranks, name: str, sharding: Sharding) -> None:
    check(two, CASES[name], train, sharding)


@dataclass(frozen=True, repr=False)
class OfLayer(attrreg.scores.Score):
    """The size of what a layer gives."""

    site: ClassVar[str] = "body"

    def __call__(self, value: Tensor, target: Tensor | None) -> Tensor:
        return value.square().flatten(1).sum(dim=1)


INSIDE = [attrreg.ActivationDifference("body", fill=ZERO), attrreg.InputGradient(OfLayer()), attrreg.InputGradient(OfLayer()).using(FINE)]


@pytest.mark.parametrize("way", ["unattached", "attached", "evaluate"])
@pytest.mark.parametrize("regularizer", INSIDE, ids=["values", "gradients", "differences"])
def test_a_layer_inside_a_shard(two: Ranks, regularizer: AttributionRegularizer, way: str) -> None:
    check(two, Case(UNEVEN, regularizer=regularizer, way=way), train, Sharding(reshard_after_forward=True, grouped=True))


def nearly_all(rank: int) -> tuple[float, list[Tensor]]:
    """A fraction so large that all annotated images are drawn; one rank has none, so that no pass is needed for its own sake."""
    model, (x, mask, target) = shard(Case(()).model()), shares(2)[rank]
    with TERMS.attach(model):
        loss = F.cross_entropy(model(x), target)
        penalty = TERMS(model, x, mask, target, annotated=annotated((SOME, NONE)[rank]), fraction=0.99)
    (loss + penalty).backward()
    return float(penalty.detach()), full(model)


def test_ranks_run_as_many_passes_with_a_fraction(two: Ranks) -> None:
    model, (x, mask, target) = Case(()).model(), together(shares(2))
    penalty = TERMS(model, x, mask, target, annotated=annotated(SOME + NONE))
    want = gradients(model, F.cross_entropy(model(x), target) + penalty)
    results = two(nearly_all)
    assert sum(value for value, _ in results) / 2 == pytest.approx(float(penalty.detach()), rel=1e-9)
    for _, found in results:
        assert_close(found, want, 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("sharding", [Sharding(), Sharding(replicas=2)])
@pytest.mark.parametrize("name", ["attached", "path", "finite differences"])
def test_four_ranks(four: Ranks, name: str, sharding: Sharding) -> None:
    check(four, replace(CASES[name], flags=(SOME, NONE, FEW, SOME)), train, sharding)


def narrow(rank: int, case: Case, sharding: Sharding) -> tuple[float, list[Tensor]]:
    """With room for three images in a pass of a path."""
    with mock.patch.object(folding, "budget", lambda device: 3 * shares(2)[0][0][0].numel()):
        return train(rank, case, sharding)


def test_ranks_run_as_many_passes_whatever_they_hold(two: Ranks) -> None:
    check(two, CASES["path in one"], narrow, Sharding())  # else one of them waits for ever


class Centred(SmoothNet):
    """Its images meet in a forward's own code, where no module tells."""

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        return (3 * (logits - logits.mean(dim=0))).tanh()


def centred(rank: int, regularizer: AttributionRegularizer) -> tuple[list[float], list[Tensor], list[Tensor]]:
    """The penalty of a rank's own images, of a model and of the same sharded; then the gradients of each."""
    model, (x, mask, target) = Centred().double(), shares(2)[rank]
    both = model, shard(copy.deepcopy(model))
    values = [regularizer(each, x, mask, target, annotated=annotated(SOME), group=False) for each in both]
    (torch.stack(values).sum() + F.cross_entropy(both[0](x), target) + F.cross_entropy(both[1](x), target)).backward()
    return [float(value.detach()) for value in values], accumulated(model), full(both[1])


@pytest.mark.parametrize("regularizer", [attrreg.InputGradient(), replace(PATH, chunk=None)])
def test_images_that_meet_in_a_forwards_own_code(two: Ranks, regularizer: AttributionRegularizer) -> None:
    results = two(centred, regularizer)
    want = [torch.stack(parts).mean(dim=0) for parts in zip(*(own for _, own, _ in results), strict=True)]
    for values, _, found in results:
        assert values[1] == pytest.approx(values[0], rel=1e-9)
        assert_close(found, want, 1e-6)


def sizes(model: Any) -> list[int]:
    """How many bytes of gathered weights each module holds."""
    found = []
    for module in model.modules():
        group = module._get_fsdp_state()._fsdp_param_group if hasattr(module, "_get_fsdp_state") else None
        if group is not None:
            parameters = [p._unsharded_param for p in group.fsdp_params if hasattr(p, "_unsharded_param")]
            found.append(sum(parameter.untyped_storage().size() for parameter in parameters))
    return found


def keep(rank: int) -> tuple[list[int], list[int], list[Tensor]]:
    """A user who keeps weights gathered between backwards, and two penalties in one backward."""
    model = shard(Case(()).model())
    x, mask, target = shares(2)[rank]
    own: list[list[int]] = []
    for step in range(2):
        for module in (model.stem, model.body, model.head, model):
            module.reshard()  # zero_grad sees the parameters that are registered, sharded or gathered
        model.set_reshard_after_backward(step == 1)
        model.zero_grad()
        loss = F.cross_entropy(model(x), target) + TERMS(model, x, mask, target) + attrreg.InputXGradient()(model, x, mask, target)
        loss.backward()
        own.append(sizes(model))
    return own[0], own[1], full(model)


def test_the_users_own_resharding_is_kept(two: Ranks) -> None:
    model = Case(()).model()
    x, mask, target = together(shares(2))
    both = TERMS + attrreg.InputXGradient()
    want = gradients(model, F.cross_entropy(model(x), target) + both(model, x, mask, target))
    for kept, freed, found in two(keep):
        assert all(kept) and not any(freed)
        assert_close(found, want, 1e-6)


def accumulate(rank: int) -> list[Tensor]:
    model = shard(Case(()).model())
    with TERMS.attach(model):
        for step in range(3):
            x, mask, target = shares(2)[rank]
            images = x + step
            model.set_requires_gradient_sync(step == 2)
            model.set_is_last_backward(step == 2)
            loss = F.cross_entropy(model(images), target)
            flags = annotated((SOME, NONE)[(rank + step) % 2])
            ((loss + TERMS(model, images, mask, target, annotated=flags)) / 3).backward()
    return full(model)


def test_accumulation(two: Ranks) -> None:
    want = accumulated_alone()
    for found in two(accumulate):
        assert_close(found, want, 1e-6)


def accumulate_replicas(rank: int) -> list[Tensor]:
    """Each replica for itself at first, with gradients of the penalty that come after FSDP2 has done with a layer."""
    model, regularizer = shard(Case(()).model(), Sharding(replicas=2)), attrreg.InputGradient()
    x, mask, target = shares(2)[rank]
    for step in range(2):
        model.set_requires_all_reduce(step == 1)
        penalty = regularizer(model, x + step, mask, target)
        (F.cross_entropy(model(x + step), target) + penalty).backward()
    return full(model)


def test_accumulation_of_replicas(two: Ranks) -> None:
    model, (x, mask, target) = Case(()).model(), together(shares(2))
    losses = [F.cross_entropy(model(images), target) + attrreg.InputGradient()(model, images, mask, target) for images in (x, x + 1)]
    want = gradients(model, torch.stack(losses).sum())
    for found in two(accumulate_replicas):
        assert_close(found, want, 1e-6)


def shown(rank: int) -> list[int]:
    model = shard(Case(()).model(), Sharding(whole=True))
    x, _, target = shares(2)[rank]
    attrreg.GradCAM("stem", score=OfLayer()).attribute(model, x, target)
    return sizes(model)


def test_a_map_that_is_shown_leaves_no_weights_gathered(two: Ranks) -> None:
    for found in two(shown):
        assert not any(found)


def trained(model: nn.Module, regularizer: AttributionRegularizer, data: Batch) -> tuple[list[float], Tensor]:
    """The losses of four steps, each other one with a penalty, and the map at the end."""
    optimizer, (x, mask, target) = torch.optim.AdamW(model.parameters(), 1e-2), data
    scheduled, losses = attrreg.Scheduled(regularizer, schedules.Every(2)), []
    with scheduled.attach(model):
        for _ in range(4):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), target) + scheduled(model, x, mask, target)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(float(loss.detach()))
    return losses, attrreg.InputGradient().attribute(model, x, target)


def run(rank: int, regularizer: AttributionRegularizer) -> tuple[list[float], Tensor, list[Tensor]]:
    model = shard(Case(()).model())
    losses, map = trained(model, regularizer, shares(2)[rank])
    return losses, map, [parameter.full_tensor().detach() for parameter in model.parameters()]


@pytest.mark.parametrize("engine", [engines.DoubleBackward(), FINE])
def test_training_is_that_of_one_process(two: Ranks, engine: engines.Engine) -> None:
    model = Case(()).model()
    losses, map = trained(model, TERMS, together(shares(2)))
    results = two(run, TERMS.using(engine))
    for step, value in enumerate(losses):
        assert sum(found[step] for found, _, _ in results) / 2 == pytest.approx(value, rel=1e-6)
    maps = torch.cat([part for _, part, _ in results])
    assert_close([maps, *results[0][2]], [map, *(p.detach() for p in model.parameters())], 1e-5)


def half(rank: int, dtype: torch.dtype) -> tuple[float, list[Tensor]]:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model, (x, mask, target) = Case(()).model().float(), shares(2)[rank]
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for layer in (model.stem, model.body, model.head):
        fully_shard(layer, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    x = x.float()
    with TERMS.attach(model):
        penalty = F.cross_entropy(model(x).float(), target) + TERMS(model, x, mask, target)
        penalty.backward()
    assert penalty.dtype == torch.float32
    return float(penalty.detach()), full(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(two: Ranks, dtype: torch.dtype) -> None:
    model = Case(()).model()
    x, mask, target = together(shares(2))
    loss = F.cross_entropy(model(x), target) + TERMS(model, x, mask, target)
    want = torch.cat([gradient.flatten() for gradient in gradients(model, loss)])
    results = two(half, dtype)
    assert sum(value for value, _ in results) / 2 == pytest.approx(float(loss.detach()), rel=0.02)
    for _, found in results:
        got = torch.cat([gradient.flatten() for gradient in found]).double()
        assert float((got - want).norm() / want.norm()) < (0.03 if dtype == torch.bfloat16 else 0.005)
