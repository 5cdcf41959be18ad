"""The measures as `torchmetrics.Metric`s: they accumulate over batches and ranks.

Import it by name: `from attrreg.metrics import modules`. It needs the package torchmetrics.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from attrreg.masks import check
from attrreg.metrics.judge import Attribution, judged
from attrreg.metrics.maps import Measure, energy_pointing_game, iou_at_mask_size, pointing_game, share_inside
from attrreg.metrics.predictions import check_binary, check_groups, check_shapes, is_correct, logit_difference, roc_area
from attrreg.settings import check_count, check_flag
from attrreg.spec import Spec, source

try:
    from torchmetrics import Metric
    from torchmetrics.utilities import dim_zero_cat
except ModuleNotFoundError as error:
    if error.name != "torchmetrics":
        raise
    raise ImportError("attrreg.metrics.modules needs torchmetrics. Install with: pip install 'attrreg[metrics]'") from None


def _name(setting: object) -> str:
    text, owner = source(setting), getattr(setting, "__self__", setting)  # of a method, its object
    text = repr(setting) if "<" in text or owner is not setting else text  # for a lambda with its address
    named = isinstance(owner, (bool, int, float, str, type, FunctionType, ModuleType, Spec))  # of others the text may not tell all
    return text if named else f"{text} at {id(owner):#x}"


class _Measure(Metric):
    """What a model is judged by, the higher the better. States keep their types. All take the keywords of `torchmetrics.Metric`, too."""

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    plot_lower_bound: float | None = 0.0
    plot_upper_bound: float | None = 1.0

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Draw the value, or `val`, one or several of them, as torchmetrics' own metrics do."""
        return self._plot(val, ax)

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> nn.Module:
        """Follow a module to its device, but not to its dtype: `module.to(torch.bfloat16)` would cast metrics too, and lose counts."""

        def moved(state: Tensor) -> Tensor:
            found = fn(state)
            return found.to(state.dtype) if state.is_meta else state.to(found.device)  # after `to_empty` there is nothing to move

        return super()._apply(fn if self._dtype_convert else moved, exclude_state)  # True within `set_dtype`


class _Mean(_Measure):
    """The mean over images of a measure, where it is defined. NaN when it was defined for none.

    Args:
        settings: the subclass's own, by which two of its metrics may differ.
    """

    total: Tensor
    images: Tensor
    undefined: Tensor

    def __init__(self, *, settings: tuple[object, ...] = (), **torchmetrics: Any) -> None:
        super().__init__(**torchmetrics)
        # A `MetricCollection` takes metrics whose states have the same names, and the same values after the first batch, for one metric,
        # and from then on updates only one of them. So the last state, always zero, is named after the class and the settings.
        kind = type(self)
        for name in ("total", "images", "undefined", f"{kind.__module__}.{kind.__qualname__}{tuple(map(_name, settings))}"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def persistent(self, mode: bool = False) -> None:
        """Choose whether states are saved. The one that tells metrics apart never is: a lambda's name is another in another process."""
        super().persistent(mode)
        for name in self._defaults.keys() - {"total", "images", "undefined"}:
            self._persistent[name] = False

    def add(self, values: Tensor) -> None:
        """Count values `(N,)` of images with a mask."""
        defined = ~values.isnan()
        self.total += values[defined].double().sum()
        self.images += defined.sum()
        self.undefined += (~defined).sum()

    def compute(self) -> Tensor:
        """The mean, 0-dim. `undefined` says how many annotated images it leaves out."""
        return self.total / self.images


def _annotated(annotated: Tensor | None, mask: Tensor, *parts: Tensor) -> tuple[Tensor, ...]:
    """The annotated images' part of a batch: of the mask, unless one `(H, W)` serves all images, and of all other tensors."""
    if annotated is None:
        return mask, *parts
    known = check(mask, parts[0], annotated).annotated
    return mask if mask.dim() == 2 else mask[known.to(mask.device)], *(part[known.to(part.device)] for part in parts)


class MapMetric(_Mean):
    """The mean over annotated images of a measure of maps."""

    @abstractmethod
    def measure(self, map: Tensor, mask: Tensor) -> Tensor:
        """One number per image."""

    def update(self, map: Tensor, mask: Tensor, annotated: Tensor | None = None) -> None:
        """Count a batch: maps `(N, C, H, W)`, masks as the regularizers take them, `annotated` boolean `(N,)`."""
        mask, map = _annotated(annotated, mask, map)
        if len(map):
            self.add(self.measure(map, mask))


class ShareInside(MapMetric):
    """Mean of `metrics.share_inside`."""

    measure = staticmethod(share_inside)


class EnergyPointingGame(MapMetric):
    """Mean of `metrics.energy_pointing_game`."""

    measure = staticmethod(energy_pointing_game)


class PointingGame(MapMetric):
    """Mean of `metrics.pointing_game`.

    Args:
        tolerance, signed: as there.
    """

    def __init__(self, tolerance: int = 0, signed: bool = False, **torchmetrics: Any) -> None:
        check_count("tolerance", tolerance, 0)
        check_flag("signed", signed)
        super().__init__(settings=(tolerance, signed), **torchmetrics)
        self.tolerance = tolerance
        self.signed = signed

    def measure(self, map: Tensor, mask: Tensor) -> Tensor:
        """One number per image."""
        return pointing_game(map, mask, self.tolerance, self.signed)


class IoUAtMaskSize(MapMetric):
    """Mean of `metrics.iou_at_mask_size`.

    Args:
        signed: as there.
    """

    def __init__(self, signed: bool = False, **torchmetrics: Any) -> None:
        check_flag("signed", signed)
        super().__init__(settings=(signed,), **torchmetrics)
        self.signed = signed

    def measure(self, map: Tensor, mask: Tensor) -> Tensor:
        """One number per image."""
        return iou_at_mask_size(map, mask, self.signed)


class Judged(_Mean):
    """Mean of `metrics.judged`: a measure of a model by an attribution other than the trained one.

    Args:
        attribution, measure: as there.
    """

    plot_lower_bound, plot_upper_bound = None, None  # a measure of the user's may have any range

    def __init__(self, attribution: Attribution, measure: Measure = share_inside, **torchmetrics: Any) -> None:
        super().__init__(settings=(attribution, measure), **torchmetrics)
        self.attribution = attribution
        self.measure = measure

    def update(self, model: nn.Module, x: Tensor, mask: Tensor, target: Tensor, annotated: Tensor | None = None) -> None:
        """Count a batch. Arguments as in `metrics.judged`."""
        mask, x, target = _annotated(annotated, mask, x, target)
        if len(x):
            self.add(judged(model, x, mask, target, self.attribution, self.measure))


class WorstGroupAccuracy(_Measure):
    """Lowest accuracy of a group that occurred, as `metrics.worst_group_accuracy`.

    Args:
        groups: how many there are.

    Raises:
        ValueError: `groups` is not a positive integer.
    """

    correct: Tensor
    images: Tensor

    def __init__(self, groups: int, **torchmetrics: Any) -> None:
        super().__init__(**torchmetrics)
        check_count("groups", groups, 1)
        self.add_state("correct", torch.zeros(groups, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("images", torch.zeros(groups, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, logits: Tensor, target: Tensor, groups: Tensor) -> None:
        """Count a batch, which may be empty: logits `(N, classes)`, target `(N,)`, groups `(N,)` in [0, groups).

        Raises:
            TypeError, ValueError: the shapes do not fit, or a group is no integer of that range.
        """
        if logits.shape[:1] == target.shape == groups.shape == (0,):
            return
        correct, count = is_correct(logits, target), len(self.images)
        check_groups(groups, target)
        groups = groups.long()
        if not 0 <= int(groups.min()) <= int(groups.max()) < count:
            raise ValueError(f"groups has numbers outside [0, {count}). Pass `WorstGroupAccuracy(groups=...)` as many as there are.")
        self.correct += torch.bincount(groups[correct], minlength=count)
        self.images += torch.bincount(groups, minlength=count)

    def compute(self) -> Tensor:
        """The lowest, 0-dim; NaN before any image."""
        return (self.correct.float() / self.images).nanquantile(0)  # without groups of which there is no image


class LogitDifferenceAUC(_Measure):
    """Area under the ROC curve of y1 - y0, as `metrics.auc`, over all batches.

    Exact: torchmetrics' own `BinaryAUROC` first takes a sigmoid of scores outside [0, 1], after which those of confident models tie.
    """

    scores: list[Tensor]
    targets: list[Tensor]

    def __init__(self, **torchmetrics: Any) -> None:
        super().__init__(**torchmetrics)
        self.add_state("scores", [], dist_reduce_fx="cat")
        self.add_state("targets", [], dist_reduce_fx="cat")

    @property
    def dtype(self) -> torch.dtype:
        """That of the states; torchmetrics also sends an empty tensor of it for a rank that had no batch."""
        return torch.float64

    def update(self, logits: Tensor, target: Tensor) -> None:
        """Keep a batch, which may be empty: logits `(N, 2)`, target `(N,)` of 0 and 1.

        Raises:
            ValueError: the logits or targets are not of two classes, or the shapes do not fit.
        """
        if logits.dim() != 2 or logits.shape[1] != 2:
            raise ValueError(f"logits must be (N, 2), got {tuple(logits.shape)}. The area is that of two classes.")
        if not logits.shape[:1] == target.shape == (0,):
            check_shapes(logits, target)
            check_binary(target)
        self.scores.append(logit_difference(logits.detach()))
        self.targets.append((target == 1).double())

    def compute(self) -> Tensor:
        """The area, 0-dim; NaN before any image."""
        if not len(self.scores):  # a list of batches, or the one tensor into which the ranks' were joined
            return torch.tensor(float("nan"), dtype=torch.float64, device=self.device)
        scores, targets = dim_zero_cat(self.scores), dim_zero_cat(self.targets)
        return torch.tensor(roc_area(scores, targets), dtype=torch.float64, device=scores.device)
