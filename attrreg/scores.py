"""Scores: what is differentiated. Each maps what the model computes to one number an image.

The attribution of a batch is the gradient of the sum of its images' scores. Logits are `(N, C)`; a target is `(N,)`
integers in [0, C).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from attrreg.sites import FEATURES, OUTPUT
from attrreg.spec import Spec


class Score(Spec, ABC):
    """A number an image, to be differentiated.

    Subclasses implement `__call__`; they set `needs_target` if they need labels, `classes` to the fewest classes for
    which they mean something, and override `site` to read a layer instead of the logits.
    """

    needs_target: ClassVar[bool] = False
    classes: ClassVar[int] = 1
    draws: ClassVar[bool] = False

    @property
    def site(self) -> str:
        """Where the value passed to `__call__` is taken: the model's output by default."""
        return OUTPUT

    def resolve(self, has_target: bool) -> Score:
        """The score to use in a call with or without targets: itself."""
        return self

    def drawn(self, seed: int) -> Score:
        """The score with its random draws fixed by a seed: itself where nothing is drawn."""
        return self

    @abstractmethod
    def __call__(self, value: Tensor, target: Tensor | None) -> Tensor:
        """Score `(N,)` of logits `(N, C)` (or of the layer `site`) for targets `(N,)`."""


@dataclass(frozen=True, repr=False)
class SumLogProb(Score):
    """sum_k log p_k: needs no label.

    Source: Ross, Hughes and Doshi-Velez 2017, arXiv 1703.03717.
    """

    classes: ClassVar[int] = 2

    def __call__(self, value: Tensor, target: Tensor | None) -> Tensor:
        """Score `(N,)` of logits `(N, C)`."""
        return F.log_softmax(value, dim=1).sum(dim=1)


@dataclass(frozen=True, repr=False)
class TargetLogit(Score):
    """y_t: the logit of the target class, as Captum differentiates."""

    needs_target: ClassVar[bool] = True

    def __call__(self, value: Tensor, target: Tensor | None) -> Tensor:
        """Score `(N,)` of logits `(N, C)` for targets `(N,)`."""
        return _at(value, _required(target))


@dataclass(frozen=True, repr=False)
class TargetLogProb(Score):
    """log p_t: the log-probability of the target class."""

    needs_target: ClassVar[bool] = True
    classes: ClassVar[int] = 2

    def __call__(self, value: Tensor, target: Tensor | None) -> Tensor:
        """Score `(N,)` of logits `(N, C)` for targets `(N,)`."""
        return _at(F.log_softmax(value, dim=1), _required(target))


@dataclass(frozen=True, repr=False)
class PredictedLogit(Score):
    """max_k y_k: the logit of the predicted class. Needs no label."""

    def __call__(self, value: Tensor, target: Tensor | None) -> Tensor:
        """Score `(N,)` of logits `(N, C)`."""
        return _at(value, value.argmax(dim=1))


@dataclass(frozen=True, repr=False)
class Contrast(Score):
    """|y_t - max_{k != t} y_k|: the target class against the best other; for two classes |y_0 - y_1|.

    Source: GradMask, arXiv 1910.00199, which has the two-class form; the general one is ours.
    """

    needs_target: ClassVar[bool] = True
    classes: ClassVar[int] = 2

    def __call__(self, value: Tensor, target: Tensor | None) -> Tensor:
        """Score `(N,)` of logits `(N, C)` for targets `(N,)`."""
        target = _required(target)
        others = value.scatter(1, target.unsqueeze(1), float("-inf"))
        return (_at(value, target) - others.amax(dim=1)).abs()


@dataclass(frozen=True, repr=False)
class TaskLoss(Score):
    """The training loss of each image.

    Args:
        function: `(logits, target) -> (N,)`, a loss that is not reduced over images. None: cross-entropy.
    """

    function: Callable[[Tensor, Tensor], Tensor] | None = None
    needs_target: ClassVar[bool] = True

    def __call__(self, value: Tensor, target: Tensor | None) -> Tensor:
        """Loss `(N,)` of logits `(N, C)` for targets `(N,)`."""
        target = _required(target)
        if self.function is not None:
            return self.function(value, target)
        if value.shape[1] < 2:
            raise ValueError("TaskLoss is cross-entropy by default, which is constant for one class. Pass TaskLoss(function=...).")
        return F.cross_entropy(value, target, reduction="none")


@dataclass(frozen=True, repr=False)
class RandomProjection(Score):
    """v . h(x), with h the features at a layer and v ~ N(0, I) drawn anew each call, one direction for the batch.

    Asks the same of every direction of the representation, where a class score asks only of one: see `docs/concepts.md`.

    Args:
        layer: dotted name of the layer, or "auto": the features that enter the classifier.
        seed: fixes the direction; None draws one each call.

    Source: ours; at x only, the mean of its squared gradient is the Jacobian regularizer of Hoffman et al. 2019,
        arXiv 1908.02729 (there of the logits).
    """

    layer: str = "auto"
    seed: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.layer, str) or not self.layer:
            raise TypeError(f"layer must be the dotted name of a layer, got {self.layer!r}. Find it with model.named_modules().")

    @property
    def draws(self) -> bool:  # type: ignore[override]
        """True while the seed is not fixed."""
        return self.seed is None

    @property
    def site(self) -> str:
        """The layer projected."""
        return FEATURES if self.layer == "auto" else self.layer

    def drawn(self, seed: int) -> Score:
        """The same projection with its direction fixed."""
        return replace(self, seed=seed) if self.seed is None else self

    def __call__(self, value: Tensor, target: Tensor | None) -> Tensor:
        """Score `(N,)` of features `(N, ...)`."""
        features = value.flatten(1)
        generator = torch.Generator(features.device).manual_seed(self.seed or 0)
        direction = torch.randn(features.shape[1], generator=generator, device=features.device, dtype=features.dtype)
        return features @ direction


@dataclass(frozen=True, repr=False)
class ByTarget(Score):
    """`TargetLogit` in a call with `target=`, `SumLogProb` in a call without: the default of every regularizer."""

    def resolve(self, has_target: bool) -> Score:
        """The score that the call uses."""
        return TargetLogit() if has_target else SumLogProb()

    def __call__(self, value: Tensor, target: Tensor | None) -> Tensor:
        """Score `(N,)` of logits `(N, C)`, for targets `(N,)` if given."""
        return self.resolve(target is not None)(value, target)


def check_output(score: Score, value: object, target_max: int | None) -> None:
    """Check what a score is about to read, once the model's output is known.

    Raises:
        ValueError: naming the score, for a shape or number of classes it cannot use, or a target out of range.
    """
    if score.site != OUTPUT or not isinstance(value, Tensor):
        return
    name = type(score).__name__
    if value.dim() != 2:
        raise ValueError(
            f"{name} needs logits (N, C), but the model returned {tuple(value.shape)}. Select or pool them with `output=`, a function of "
            "what the model returns."
        )
    classes = value.shape[1]
    if classes < score.classes:
        raise ValueError(
            f"{name} needs at least {score.classes} classes, but the model has {classes}. Use scores.PredictedLogit(), or "
            "give it two logits with `output=`."
        )
    if score.needs_target and target_max is not None and target_max >= classes:
        raise ValueError(f"target has the class {target_max}, but the model has {classes} classes. Pass class indices in [0, {classes}).")


def _at(values: Tensor, target: Tensor) -> Tensor:
    return values.gather(1, target.unsqueeze(1)).squeeze(1)


def _required(target: Tensor | None) -> Tensor:
    if target is None:
        raise ValueError("This score needs a target. Pass `target=`, (N,) class indices.")
    return target
