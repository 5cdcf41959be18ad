"""What a comparison is made on: images with labels, masks, groups, in splits where a shortcut holds and where it misleads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

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
        return self._each(lambda values: values[index])

    def to(self, device: torch.device) -> Split:
        """The same split on another device."""
        return self._each(lambda values: values.to(device))

    def sample(self, count: int) -> Split:
        """At most so many of the images, drawn once and for all."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(0))
        return self.take(order[:count].to(self.labels.device))

    def mirrored(self) -> Split:
        """Images and masks sidewards."""
        return replace(self, images=self.images.flip(-1), masks=self.masks.flip(-1))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Split:
        """All that there is of each image, changed alike."""
        known = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: change(values) for name, values in known.items() if values is not None})


@dataclass(frozen=True)
class Task:
    """A shortcut task.

    Attributes:
        name: Of the data set; for a folder, the folder's.
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


def first_of_each(labels: Tensor, count: Callable[[int], int]) -> Tensor:
    """The first images of each class, `(N,)` bool; `count`: from the number of images in a class to how many of them."""
    chosen = torch.zeros_like(labels, dtype=torch.bool)
    for label in labels.unique():
        own = (labels == label).nonzero()[:, 0]
        chosen[own[: count(len(own))]] = True
    return chosen


def dilate(masks: Tensor, pixels: int) -> Tensor:
    """Grow the True region of `(N, H, W)` masks by `pixels` in all eight directions."""
    grown = F.max_pool2d(masks[:, None].float(), 2 * pixels + 1, stride=1, padding=pixels)
    return grown[:, 0] > 0
