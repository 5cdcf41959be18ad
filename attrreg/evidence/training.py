"""The training loop: every method from the same weights, on the same batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attrreg.evidence.data import Split
from attrreg.evidence.methods import LossTerm, Method
from attrreg.transforms import ReplaceOutside

CHUNK = 64  # larger ones take longer: the system has to find new memory for each layer's output


@dataclass(frozen=True)
class Budget:
    """How long and how fast to train.

    Attributes:
        epochs: Passes over the training images.
        batch: Images a step; what is left over of an epoch is left out.
        rate: Learning rate of Adam at the peak of its one cycle.
    """

    epochs: int
    batch: int
    rate: float

    def steps(self, images: int) -> int:
        """Training steps on so many images.

        Raises:
            ValueError: there are fewer images than a batch has, or a single step, at which the cycle's rate is next to zero.
        """
        if images < self.batch:
            raise ValueError(f"{images} training images are fewer than a batch of {self.batch}. Add some.")
        if (steps := self.epochs * (images // self.batch)) < 2:
            raise ValueError(
                f"{images} training images in batches of {self.batch} are one step, which trains nothing. Add epochs or images."
            )
        return steps


def train(model: nn.Module, data: Split, method: Method, budget: Budget, seed: int) -> Iterator[Tensor]:
    """Train a model, yielding the loss after each step. The seed alone decides the batches and the draws."""
    order = torch.Generator().manual_seed(seed)
    draws = torch.Generator().manual_seed(seed)
    term = method.term
    optimizer = torch.optim.Adam(model.parameters(), budget.rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, budget.rate, total_steps=budget.steps(len(data)))
    model.train()
    for _ in range(budget.epochs):
        shuffled = torch.randperm(len(data), generator=order).to(data.labels.device)
        for index in shuffled.split(budget.batch)[: len(data) // budget.batch]:
            yield step(model, optimizer, data.take(index), term, draws, method.transform)
            schedule.step()


def step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Split,
    term: LossTerm | None,
    draws: torch.Generator,
    transform: ReplaceOutside | None = None,
) -> Tensor:
    """One training step: this is all that a training loop needs."""
    optimizer.zero_grad()
    images = batch.images
    if transform is not None:
        images = transform(images, batch.masks, annotated=batch.annotated, generator=draws)
    if term is None:
        loss = F.cross_entropy(model(images), batch.labels)
    else:
        with term.attach(model):
            loss = F.cross_entropy(model(images), batch.labels)
            loss = loss + term(model, images, batch.masks, target=batch.labels, annotated=batch.annotated, generator=draws)
    loss.backward()
    optimizer.step()
    return loss.detach()


def predict(model: nn.Module, images: Tensor) -> Tensor:
    """Logits `(N, classes)` of an evaluated model."""
    with torch.no_grad():
        return torch.cat([model(part) for part in images.split(CHUNK)])
