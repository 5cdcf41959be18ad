"""What a comparison is made on: images with labels, masks, groups, in splits where a shortcut holds and where it misleads."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Split:
    """Images with their labels and relevance masks.

    Attributes:
        images: `(N, C, H, W)` float.
        labels: `(N,)` int64.
        masks: `(N, H, W)` bool; True is relevant.
        annotated: `(N,)` bool: who has a mask. None: all.
        groups: `(N,)` int64: over which the worst accuracy is taken. None: the labels.
    """

    images: Tensor
    labels: Tensor
    masks: Tensor
    annotated: Tensor | None = None
    groups: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def grouped(self) -> Tensor:
        """The groups, `(N,)`."""
        return self.labels if self.groups is None else self.groups

    def take(self, index: Tensor) -> Split:
        """The images at `index`, in that order."""
        annotated = None if self.annotated is None else self.annotated[index]
        groups = None if self.groups is None else self.groups[index]
        return Split(self.images[index], self.labels[index], self.masks[index], annotated, groups)

    def to(self, device: torch.device) -> Split:
        """The same split on another device."""
        annotated = None if self.annotated is None else self.annotated.to(device)
        groups = None if self.groups is None else self.groups.to(device)
        return Split(self.images.to(device), self.labels.to(device), self.masks.to(device), annotated, groups)


@dataclass(frozen=True)
class Task:
    """A shortcut task.

    Attributes:
        name: As `--data` spells it.
        classes: Number of classes.
        train: The shortcut gives the label away.
        similar: As in training, other images: what a user without shifted data can choose settings on.
        valid: The shortcut misleads, as in the test.
        test: The shortcut misleads.
        clean_test: The test images without the shortcut.
    """

    name: str
    classes: int
    train: Split
    similar: Split
    valid: Split
    test: Split
    clean_test: Split

    def to(self, device: torch.device) -> Task:
        """The same task on another device."""
        splits = (self.train, self.similar, self.valid, self.test, self.clean_test)
        return Task(self.name, self.classes, *(split.to(device) for split in splits))


def dilate(masks: Tensor, pixels: int) -> Tensor:
    """Grow the True region of `(N, H, W)` masks by `pixels` in all eight directions."""
    grown = F.max_pool2d(masks[:, None].float(), 2 * pixels + 1, stride=1, padding=pixels)
    return grown[:, 0] > 0
