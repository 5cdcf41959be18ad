"""Where a comparison's tasks come from: a data set with its settings, and the model that goes with it."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from attrreg.evidence import arrays, models
from attrreg.evidence.data import Task
from attrreg.evidence.shortcuts import crosses, decoy_fashion_mnist, decoy_mnist
from attrreg.evidence.stampbirds import stampbirds


class Source(ABC):
    """A data set and its model. Subclasses are frozen dataclasses whose fields are numbers and strings, so that a row can be rerun.

    To compare on data of your own, subclass it, or write arrays and use `Folder`. A record knows a source by its fields alone, so what its
    code depends on, such as a version number, belongs into one: else rows that were trained before a change stand for those after it.

    Attributes:
        kind: the name of the data set, as tables call it.
    """

    kind: ClassVar[str]

    @property
    def label(self) -> str:
        """What tells it from others of its kind in a table."""
        return repr(self)

    @abstractmethod
    def task(self, seed: int) -> Task:
        """Make or read the data.

        Raises:
            packages.Missing: a package that it comes from is not here.
        """

    @abstractmethod
    def model(self, task: Task, seed: int) -> nn.Module:
        """Make the model, the same for every method."""


@dataclass(frozen=True)
class Crosses(Source):
    """The founding paper's synthetic task. There: ResNet-18 of width 64, masks as drawn for most methods and dilated by 3 or 4 for two.

    Args:
        train, valid, test, dilation: see `shortcuts.crosses`.
        width: channels of the first stage.
    """

    kind: ClassVar[str] = "crosses"
    train: int = 500
    valid: int = 128
    test: int = 128
    dilation: int = 3
    width: int = 8

    def task(self, seed: int) -> Task:
        """Draw the data."""
        return crosses(self.train, self.valid, self.test, seed, self.dilation)

    def model(self, task: Task, seed: int) -> nn.Module:
        """ResNet-18 for small images."""
        return models.resnet18(task.classes, 1, seed, self.width)


@dataclass(frozen=True)
class DecoyMNIST(Source):
    """Digits with a decoy: see `shortcuts.decoy_mnist`."""

    kind: ClassVar[str] = "decoy-mnist"
    train: int = 3000
    valid: int = 500
    test: int = 1000

    def task(self, seed: int) -> Task:
        """Put the decoys in."""
        return decoy_mnist(self.train, self.valid, self.test, seed)

    def model(self, task: Task, seed: int) -> nn.Module:
        """A small ResNet."""
        return models.small(task.classes, seed)


@dataclass(frozen=True)
class DecoyFashionMNIST(Source):
    """Clothes with a decoy: see `shortcuts.decoy_fashion_mnist`."""

    kind: ClassVar[str] = "decoy-fashion-mnist"
    train: int = 3000
    valid: int = 500
    test: int = 1000

    def task(self, seed: int) -> Task:
        """Put the decoys in."""
        return decoy_fashion_mnist(self.train, self.valid, self.test, seed)

    def model(self, task: Task, seed: int) -> nn.Module:
        """A small ResNet."""
        return models.small(task.classes, seed)


@dataclass(frozen=True)
class StampBirds(Source):
    """Birds and mammals on water and plants: see `stampbirds.stampbirds`."""

    kind: ClassVar[str] = "stampbirds"
    train: int = 400
    valid: int = 160
    test: int = 400
    correlation: float = 0.95
    size: int = 96

    @property
    def label(self) -> str:
        """By the correlation."""
        return f"correlation {100 * self.correlation:g}%"

    def task(self, seed: int) -> Task:
        """Compose the images."""
        return stampbirds(self.train, self.valid, self.test, self.correlation, self.size, seed)

    def model(self, task: Task, seed: int) -> nn.Module:
        """MobileNetV2 with ImageNet weights."""
        return models.pretrained_mobilenet(task.classes, seed)


@dataclass(frozen=True)
class Folder(Source):
    """Arrays in a folder: see `arrays.folder`.

    Args:
        root, similar, flip, dilation: as there.
        train, valid, test: the splits' names.
        sizes: how many images of each; none: all.
        contents: `arrays.digest` of the files, so that others are not taken for those of a record; "": not asked.
        width: channels of the ResNet-18's first stage.
    """

    kind: ClassVar[str] = "folder"
    root: str = "."
    train: str = "train"
    valid: str = "valid"
    test: str = "test"
    similar: str | None = None
    flip: bool = False
    sizes: tuple[int, ...] = ()
    dilation: int = 0
    width: int = 8
    contents: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "sizes", tuple(self.sizes))  # JSON has lists
        if len(self.sizes) not in (0, 3) or any(size < 1 for size in self.sizes):
            raise ValueError(
                f"sizes must be three numbers above 0, of training, validation and test images, got {self.sizes}. Write (500, 128, 128); "
                "on the command line 500,128,128."
            )

    def task(self, seed: int) -> Task:
        """Read the data; the seed decides what is drawn of it.

        Raises:
            ValueError: the files are not those of `contents`, or as `arrays.folder` says.
        """
        if self.contents and arrays.digest(self.root) != self.contents:
            raise ValueError(
                f"The files in {self.root} are no longer those of this record. Without --rerun, those that are there are trained on."
            )
        splits, sizes = (self.train, self.valid, self.test), (self.sizes[0], self.sizes[1], self.sizes[2]) if self.sizes else None
        return arrays.folder(self.root, splits, self.similar, flip=self.flip, sizes=sizes, dilation=self.dilation, seed=seed)

    def model(self, task: Task, seed: int) -> nn.Module:
        """ResNet-18 for small images."""
        return models.resnet18(task.classes, task.train.images.shape[1], seed, self.width)


KINDS: tuple[type[Source], ...] = (Crosses, DecoyMNIST, DecoyFashionMNIST, StampBirds, Folder)


def as_dict(source: Source) -> dict[str, Any]:
    """For JSON."""
    return {"kind": source.kind, **dataclasses.asdict(source)}  # type: ignore[call-overload]


def from_dict(data: dict[str, Any], kinds: tuple[type[Source], ...] = KINDS) -> Source:
    """Back from JSON.

    Raises:
        ValueError: there is no such kind.
    """
    for kind in kinds:
        if kind.kind == data["kind"]:
            return kind(**{name: value for name, value in data.items() if name != "kind"})
    raise ValueError(
        f"there is no data set {data['kind']!r} among {', '.join(kind.kind for kind in kinds)}; in Python, kinds=(...) names others"
    )
