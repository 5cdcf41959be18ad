"""Scores: what is differentiated. Each maps what the model computes to one number per image.

The attribution of a batch is the gradient of the sum of its scores. Logits are `(N, C)`, targets `(N,)` integers in [0, C), by default.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from attrreg.settings import keep_integer
from attrreg.sites import OUTPUT, check_layer_name, feature_site
from attrreg.spec import Key
from attrreg.targets import check_binary, check_classes, check_logits, check_loss, check_maps, check_multi_hot, check_task, required


class Score(Key, ABC):
    """A number per image, to be differentiated.

    Subclasses implement `__call__`; set `needs_target` if they need labels, `classes` to the fewest they make sense for, `draws` if they
    draw, `by_place` if an image's score depends on its place in the batch; override `site` to read a layer, and the checks for another
    task.
    """

    needs_target: ClassVar[bool] = False
    classes: ClassVar[int] = 0
    draws: ClassVar[bool] = False
    by_place: ClassVar[bool] = False

    @property
    def site(self) -> str:
        """Where the value passed to `__call__` is taken: the model's output by default."""
        return OUTPUT

    def resolve(self, target: Tensor | None, shown: bool = False) -> Score:
        """The score to use in a call with this target, or for a map that is shown: itself."""
        return self

    def drawn(self, seed: int) -> Score:
        """The score with its random draws fixed by a seed: itself where nothing is drawn."""
        return self

    def chosen(self, value: Tensor, target: Tensor | None) -> Score:
        """The score with its choice, such as the predicted class, fixed to the one for this value: itself where it chooses nothing.

        Finite differences compare two scores a step apart: if they chose differently, that would count for more than the slope.
        """
        return self

    def check_target(self, target: Tensor) -> None:
        """Check a target before any pass, by default that it is `(N,)` class indices; a TypeError or ValueError names `target`."""
        if self.needs_target:
            check_classes(target)

    def check_value(self, value: Tensor, target: Tensor | None) -> None:
        """Check a value before it is scored: outputs, and what a score with `classes` reads, must be logits `(N, C)`, else a ValueError."""
        if self.site == OUTPUT or self.classes:
            check_logits(type(self).__name__, value, max(1, self.classes), target if self.needs_target else None)

    @abstractmethod
    def __call__(self, value: Tensor, target: Tensor | None) -> Tensor:
        """Score `(N,)` of logits `(N, C)` (or of the layer `site`) for targets `(N,)`."""


@dataclass(frozen=True, repr=False)
class SumLogProb(Score):
    """sum_k log p_k: needs no label. Source: Ross, Hughes and Doshi-Velez 2017, arXiv 1703.03717."""

    classes: ClassVar[int] = 2

    def __call__(self, value: Tensor, target: Tensor | None) -> Tensor:
        """Score `(N,)` of logits `(N, C)`."""
        return F.log_softmax(value, dim=1).sum(dim=1)


@dataclass(frozen=True, repr=False)
class TargetLogit(Score):
    """y_t: the logit of the target class, as Captum differentiates."""

    needs_target: ClassVar[bool] = True
    classes: ClassVar[int] = 1

    def __call__(self, value: Tensor, target: Tensor | None) -> Tensor:
        """Score `(N,)` of logits `(N, C)` for targets `(N,)`."""
        return value.gather(1, required(target).unsqueeze(1)).squeeze(1)


@dataclass(frozen=True, repr=False)
class TargetLogProb(Score):
    """log p_t: the log-probability of the target class."""

    needs_target: ClassVar[bool] = True
    classes: ClassVar[int] = 2

    def __call__(self, value: Tensor, target: Tensor | None) -> Tensor:
        """Score `(N,)` of logits `(N, C)` for targets `(N,)`."""
        return F.log_softmax(value, dim=1).gather(1, required(target).unsqueeze(1)).squeeze(1)


@dataclass(frozen=True, repr=False, eq=False)
class _SignedLogits(Score):
    """A sum of some logits of each image, with signs: `(N, K)` classes and as many factors."""

    index: Tensor
    sign: Tensor

    def __call__(self, value: Tensor, target: Tensor | None) -> Tensor:
        return (value.gather(1, self.index) * self.sign).sum(dim=1)


class _Choosing(Score):
    """A score of the logits that it chooses by their values, in `chosen`. The choice itself has no gradient."""

    def __call__(self, value: Tensor, target: Tensor | None) -> Tensor:
        return self.chosen(value.detach(), target)(value, target)


@dataclass(frozen=True, repr=False)
class PredictedLogit(_Choosing):
    """max_k y_k: the logit of the predicted class. Needs no label."""

    def chosen(self, value: Tensor, target: Tensor | None) -> Score:
        """The logit of the class that is predicted here."""
        index = value.argmax(dim=1, keepdim=True)
        return _SignedLogits(index, value.new_ones(index.shape))


@dataclass(frozen=True, repr=False)
class Contrast(_Choosing):
    """|y_t - max_{k != t} y_k|: the target class against the best other; for two classes |y_0 - y_1|.

    Source: GradMask, arXiv 1904.07478 and 1910.00199, which has the two-class form; the general one is ours.
    """

    needs_target: ClassVar[bool] = True
    classes: ClassVar[int] = 2

    def chosen(self, value: Tensor, target: Tensor | None) -> Score:
        """The target class against the one that is the best other here, the larger of the two minus the smaller."""
        own = required(target).unsqueeze(1)
        other = value.scatter(1, own, float("-inf")).argmax(dim=1, keepdim=True)
        margin = value.gather(1, own) - value.gather(1, other)
        sign = margin.sign().where(~margin.isnan(), margin)  # the sign of NaN is 0, and the penalty would look clean
        return _SignedLogits(torch.cat((own, other), dim=1), torch.cat((sign, -sign), dim=1))


@dataclass(frozen=True, repr=False)
class TaskLoss(Score):
    """The training loss of each image.

    Args:
        function: `(logits, target) -> (N,)`, a loss that is not reduced over images. None: cross-entropy.
    """

    function: Callable[[Tensor, Tensor], Tensor] | None = None
    needs_target: ClassVar[bool] = True
    classes: ClassVar[int] = 2

    def __post_init__(self) -> None:
        check_loss(self.function)

    def check_target(self, target: Tensor) -> None:
        """A function of the user's may take any target."""
        if self.function is None:
            check_task(target)

    def check_value(self, value: Tensor, target: Tensor | None) -> None:
        """A function of the user's may take any output."""
        if self.function is None:
            Score.check_value(self, value, target)

    def __call__(self, value: Tensor, target: Tensor | None) -> Tensor:
        """Loss `(N,)` of logits `(N, C)` for targets `(N,)`."""
        target = required(target)
        return F.cross_entropy(value, target, reduction="none") if self.function is None else self.function(value, target)


@dataclass(frozen=True, repr=False)
class RandomProjection(Score):
    """v . h(x), with h the features at a layer and v ~ N(0, I) drawn anew each call, a direction of its own for each image.

    Asks the same of every direction of the representation, where a class score asks only of one: see `docs/concepts.md`. With one
    direction for the whole batch, the mean over it would vary as much as for one image.

    Args:
        layer: dotted name of the layer, or "auto": the features that enter the classifier; `sites.OUTPUT`: the logits.
        seed: fixes one direction for each place in the batch; a batch of another size may have others. None: drawn anew each call.

    Source: ours; at x alone it gives twice the Jacobian regularizer of Hoffman et al. 2019, arXiv 1908.02729 (there of the logits).
    """

    layer: str = "auto"
    seed: int | None = None
    by_place: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_layer_name(self.layer)
        keep_integer(self, "seed", or_none=True)

    @property
    def draws(self) -> bool:  # type: ignore[override]
        """True while the seed is not fixed."""
        return self.seed is None

    @property
    def site(self) -> str:
        """The layer projected."""
        return feature_site(self.layer)

    def drawn(self, seed: int) -> Score:
        """The same projection with its directions fixed."""
        return replace(self, seed=seed) if self.seed is None else self

    def __call__(self, value: Tensor, target: Tensor | None) -> Tensor:
        """Score `(N,)` of features `(N, ...)`."""
        features = value.reshape(*value.shape[:1], -1)  # one number an image is a feature too
        generator = torch.Generator(features.device).manual_seed(self.seed or 0)
        directions = torch.randn(features.shape, generator=generator, device=features.device, dtype=features.dtype)
        return (features * directions).sum(dim=-1)


@dataclass(frozen=True, repr=False)
class MultiLabelLogit(Score):
    """sum_c t_c y_c: the logits of an image's labels; of none 0, and no penalty. Logits `(N, C)`, targets `(N, C)` in [0, 1], multi-hot."""

    needs_target: ClassVar[bool] = True

    def check_target(self, target: Tensor) -> None:
        """Check that the target is multi-hot."""
        check_multi_hot(target)

    def check_value(self, value: Tensor, target: Tensor | None) -> None:
        """Check that logits and target have one shape."""
        if target is not None and value.shape != target.shape:
            raise ValueError(f"target is {tuple(target.shape)}, but the logits are {tuple(value.shape)}. Pass one label a logit.")

    def __call__(self, value: Tensor, target: Tensor | None) -> Tensor:
        """Score `(N,)` of logits `(N, C)` for targets `(N, C)`."""
        share = required(target).to(value.dtype)
        return (torch.where(share != 0, value, 0) * share).sum(dim=1)  # a class that is masked by -inf counts nothing


@dataclass(frozen=True, repr=False)
class BinaryLogit(Score):
    """(2 t - 1) y: the one logit of a binary classifier, for the class that the image has. Logits `(N,)` or `(N, 1)`, t in {0, 1}."""

    needs_target: ClassVar[bool] = True

    def check_target(self, target: Tensor) -> None:
        """Check that the target is 0 or 1."""
        check_binary(target)

    def check_value(self, value: Tensor, target: Tensor | None) -> None:
        """Check that there is one logit an image."""
        if value.shape[:1] != required(target).shape[:1] or value[0].numel() != 1:
            raise ValueError(f"BinaryLogit needs one logit an image, but the model returned {tuple(value.shape)}. Select it by `output=`.")

    def __call__(self, value: Tensor, target: Tensor | None) -> Tensor:
        """Score `(N,)` of logits `(N,)` or `(N, 1)` for targets `(N,)`."""
        return value.flatten() * (2 * required(target).flatten().to(value.dtype) - 1)


@dataclass(frozen=True, repr=False)
class SegmentationLogit(Score):
    """Sum over pixels of the logit of the pixel's class. Logits `(N, C, H, W)`, targets `(N, H, W)` class indices.

    One logit a pixel, `(N, 1, H, W)`, counts for class 1, its negative for class 0.

    Args:
        ignore_index: the class of pixels that are left out, so that a region can be scored alone.
    """

    ignore_index: int = -100
    needs_target: ClassVar[bool] = True

    def __post_init__(self) -> None:
        keep_integer(self, "ignore_index")

    def check_target(self, target: Tensor) -> None:
        """Check that the target is a map of classes."""
        if target.dim() != 3 or target.is_floating_point() or target.dtype is torch.bool:
            found = f"{target.dtype} {tuple(target.shape)}"
            raise ValueError(f"target must be a label map, (N, H, W) integers, got {found}. Pass one; a mask is passed as mask=.")

    def check_value(self, value: Tensor, target: Tensor | None) -> None:
        """Check that logits and target are maps of one size, and that the classes are in range."""
        check_maps(value, required(target), self.ignore_index)

    def __call__(self, value: Tensor, target: Tensor | None) -> Tensor:
        """Score `(N,)` of logits `(N, C, H, W)` for targets `(N, H, W)`."""
        kept = required(target) != self.ignore_index
        value = torch.cat((-value, value), dim=1) if value.shape[1] == 1 else value
        chosen = value.gather(1, torch.where(kept, required(target), 0).unsqueeze(1)).squeeze(1)
        return torch.where(kept, chosen, 0).sum(dim=(1, 2))


@dataclass(frozen=True, repr=False)
class RegressionOutput(Score):
    """The predicted number, or the sum of several. Outputs `(N,)` or `(N, K)`; needs no target.

    Args:
        index: which of several outputs; None: all, summed.
    """

    index: int | None = None

    def __post_init__(self) -> None:
        keep_integer(self, "index", or_none=True)

    def check_value(self, value: Tensor, target: Tensor | None) -> None:
        """Check that the outputs are numbers, and that there are enough."""
        if value.dim() not in (1, 2) or (self.index is not None and not -1 < self.index < value[0].numel()):
            raise ValueError(f"{self!r} does not fit outputs of shape {tuple(value.shape)}. Pass (N,) or (N, K), index in range or None.")

    def __call__(self, value: Tensor, target: Tensor | None) -> Tensor:
        """Score `(N,)` of outputs `(N,)` or `(N, K)`."""
        outputs = value.reshape(value.shape[0], -1)
        return outputs.sum(dim=1) if self.index is None else outputs[:, self.index]


@dataclass(frozen=True, repr=False)
class ByTarget(Score):
    """The default of every regularizer: `SumLogProb` in a call without `target=`; in one with it, by the target's shape.

    `(N,)` class indices: `Contrast`, because a shortcut can also act on the other logits; but `TargetLogit`, as in Captum, in `.attribute`,
    and everywhere with `contrast=False`. `(N, C)` with C > 1: `MultiLabelLogit`. `(N, H, W)`: `SegmentationLogit`.
    """

    contrast: bool = True

    def resolve(self, target: Tensor | None, shown: bool = False) -> Score:
        """The score that the call uses."""
        if target is None:
            return SumLogProb()
        if target.dim() == 2 and target.shape[1] == 1:  # its logit times the label would say nothing of images of class 0
            raise ValueError(
                f"target is {tuple(target.shape)}, one label an image. Squeeze it. For one logit name the score: scores.BinaryLogit()."
            )
        usual = Contrast() if self.contrast and not shown else TargetLogit()
        return {2: MultiLabelLogit(), 3: SegmentationLogit()}.get(target.dim(), usual)

    def __call__(self, value: Tensor, target: Tensor | None) -> Tensor:
        """The score that the target's shape says."""
        return self.resolve(target)(value, target)
