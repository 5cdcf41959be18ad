"""The Lightning callback under DDP: the gradients of one process on all images, and its penalties in the log."""

from __future__ import annotations

import os
import warnings
from typing import Any
from unittest.mock import patch

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.utils.data import DataLoader

from attrreg.data import Sample
from attrreg.integrations.lightning import AttributionPenalty
from tests.models import assert_close
from tests.ranks import Ranks
from tests.test_ddp import NONE, SOME, TERMS, UNEVEN, Case, alone, annotated, shares

pytestmark = pytest.mark.cpu


class Module(pl.LightningModule):
    """Keeps the gradients of its last step."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Case(()).model()
        self.found: list[Tensor] = []

    def training_step(self, batch: Sample, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch.image), batch.label)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.found = [parameter.grad.clone() for parameter in self.net.parameters() if parameter.grad is not None]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def train(rank: int, flags: tuple[str, str], settings: dict[str, Any], world: bool | None = None) -> tuple[list[Tensor], dict[str, float]]:
    group: Any = None if world is None else (lambda: dist.group.WORLD) if world else False
    samples: Any = [Sample(*sample) for sample in zip(*shares(2)[rank], annotated(flags[rank]), strict=True)]
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "GROUP_RANK": 0}
    with patch.dict(os.environ, {name: str(value) for name, value in place.items()}), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's own
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=2,
            strategy=DDPStrategy(cluster_environment=TorchElasticEnvironment(), process_group_backend="gloo", **settings),
            use_distributed_sampler=False,  # each rank has its own samples
            max_epochs=2,
            callbacks=[AttributionPenalty(TERMS, model="net", group=group)],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        module = Module()
        trainer.fit(module, DataLoader(samples, batch_size=4))
    return module.found, {name: float(value) for name, value in trainer.callback_metrics.items()}


@pytest.mark.parametrize("settings", [{}, {"static_graph": True}, {"find_unused_parameters": True}], ids=str)
@pytest.mark.parametrize("flags", [UNEVEN, (NONE, SOME)])
def test_gradients_and_logged_terms_are_those_of_one_process(two: Ranks, flags: tuple[str, str], settings: dict[str, Any]) -> None:
    value, want = alone(Case(flags), step=0)
    for found, logged in two(train, flags, settings):
        assert_close(found, want, 1e-6)
        assert logged.keys() == {f"penalty/{term.name}" for term in TERMS.terms}
        assert sum(logged.values()) == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize("world", [True, False])
def test_means_run_over_the_group_that_is_named(two: Ranks, world: bool) -> None:
    value, own = alone(Case(UNEVEN), step=0)[0], []
    for (x, mask, target), flags in zip(shares(2), UNEVEN, strict=True):
        own.append(float(TERMS(Case(()).model(), x, mask, target, annotated=annotated(flags)).detach()))
    assert value != pytest.approx(sum(own) / 2, rel=1e-4)  # 3 images and 1 are annotated
    for _, logged in two(train, UNEVEN, {}, world):
        assert sum(logged.values()) == pytest.approx(value if world else sum(own) / 2, rel=1e-6)
