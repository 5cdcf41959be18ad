"""Layers that are split over ranks: PyTorch exchanges their gradients where its graph does not follow."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn

import attrreg
from tests.models import accumulated, assert_close
from tests.ranks import Ranks
from tests.test_ddp import ZERO, shares

pytestmark = pytest.mark.cpu


class Split(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fc1, self.fc2, self.head = nn.Conv2d(2, 4, 3, padding=1), nn.Linear(4, 8), nn.Linear(8, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.fc2(self.fc1(self.stem(x).tanh().mean((2, 3))).tanh()).tanh())
        return logits


def tensor_parallel(rank: int) -> tuple[str, list[Tensor], list[Tensor]]:
    """What is said of exact gradients; and, of the whole model and of the split one, those of a finite difference and of activations."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    torch.manual_seed(1)
    whole, (x, mask, target), message = Split().double(), shares(2)[0], "nothing"
    plan = {"fc1": ColwiseParallel(), "fc2": RowwiseParallel()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        split = parallelize_module(copy.deepcopy(whole), init_device_mesh("cpu", (2,)), plan)
    try:
        attrreg.InputGradient()(split, x, mask, target, group=False)
    except RuntimeError as error:
        message = str(error)
    found = []
    for model in (whole, split):
        attrreg.InputGradient().using(attrreg.engines.FiniteDifference())(model, x, mask, target, group=False).backward()
        attrreg.ActivationDifference("fc2", ZERO)(model, x, mask, target, group=False).backward()
        found.append([grad.full_tensor() if hasattr(grad, "full_tensor") else grad for grad in accumulated(model)])
    return message, found[0], found[1]


def in_ddp(rank: int) -> str:
    """What is said of a model whose split layers DDP has put parts in place of."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    (x, mask, target), plan = shares(2)[0], {"fc1": ColwiseParallel(), "fc2": RowwiseParallel()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))
        model = nn.parallel.DistributedDataParallel(parallelize_module(Split().double(), mesh["tp"], plan), device_mesh=mesh["dp"])
        try:
            attrreg.InputGradient()(model, x, mask, target)
        except RuntimeError as error:
            return str(error)
    return "nothing"


def test_tensor_parallel_layers_are_refused_in_ddp_too(two: Ranks) -> None:
    assert all("tensor-parallel layers" in message for message in two(in_ddp))


def test_tensor_parallel_layers_take_finite_differences_alone(two: Ranks) -> None:
    for message, want, got in two(tensor_parallel):
        assert "tensor-parallel layers" in message and "FiniteDifference" in message
        assert_close(got, want, 1e-6)
