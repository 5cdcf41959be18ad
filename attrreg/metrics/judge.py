"""Judging a model by an attribution other than the one it was trained on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attrreg import call as calls
from attrreg import own
from attrreg.attach import suspended
from attrreg.baselines import Baseline, Zero, as_baseline, keep_baseline
from attrreg.masks import at_least_float32
from attrreg.metrics.maps import Measure, share_inside
from attrreg.regularizer import AttributionRegularizer
from attrreg.settings import keep_count
from attrreg.spec import Spec, source
from attrreg.state import isolated
from attrreg.targets import check_classes, check_logits
from attrreg.wrappers import undistributed

Attribution = Callable[[nn.Module, Tensor, Tensor], Tensor]


@dataclass(frozen=True, repr=False)
class Occlusion(Spec):
    """How much the target's logit falls when a window of the image is covered: an attribution without gradients.

    phi at a pixel = mean over the windows that cover it of y_t(x) - y_t(x with the window filled).

    Args:
        window: side of the square window, in pixels.
        stride: from one window to the next, in pixels; at most `window`.
        fill: what the window shows: a number, a tensor that broadcasts to `x`, or one of `attrreg.baselines` that needs no mask. One that
            draws has a fixed seed, so that maps can be repeated.

    Raises:
        TypeError, ValueError: naming the setting.

    Cost:
        One forward of the batch, and one a window, in the mode that the model is in; no backward.

    Source:
        Zeiler and Fergus 2013, arXiv 1311.2901; Captum's `Occlusion`, which does the work.
    """

    window: int = 3
    stride: int = 1
    fill: Baseline | Tensor | float = Zero()

    def __post_init__(self) -> None:
        keep_count(self, "window", 1)
        keep_count(self, "stride", 1)
        if self.stride > self.window:
            raise ValueError(
                f"stride={self.stride} leaves pixels between windows of {self.window} uncovered. Choose a stride of at most {self.window}."
            )
        if keep_baseline(self, "fill").needs_mask:
            raise ValueError(f"fill={self.fill!r} depends on the mask that the map is to be judged by. Use baselines.Zero(), for example.")

    def __call__(self, model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
        """The map `(N, C, H, W)`, the same in all channels, of a model whose output is logits `(N, classes)`, for targets `(N,)`.

        Raises:
            TypeError, ValueError: naming the argument.
        """
        from captum.attr import Occlusion as Captum

        calls.check_images(model, x)
        model = undistributed(model)  # whose forward talks to ranks that may have nothing to judge
        if self.window > min((side for side in x.shape[-2:] if side > 1), default=1):  # signals have one axis
            raise ValueError(f"window={self.window} is larger than images of {tuple(x.shape[-2:])}. Choose a smaller one.")
        classes = calls.check_target(target, x)
        if classes is None:
            raise TypeError("target must be class indices (N,), got None. Pass the classes whose logits are judged.")
        check_classes(classes)
        fill = as_baseline(self.fill)
        filled = own.made(fill, fill, x.detach(), mask=None, seed=0)
        window, stride = ((x.shape[1], *(min(length, side) for side in x.shape[-2:])) for length in (self.window, self.stride))
        with torch.no_grad(), suspended(model), isolated(model, x.device):
            phi: Tensor = Captum(_logits_of(model, classes)).attribute(
                x.detach(),
                sliding_window_shapes=window,
                strides=stride,
                baselines=filled,
                target=classes,
            )
        return phi


def _logits_of(model: nn.Module, target: Tensor) -> Callable[[Tensor], Tensor]:
    """The model, whose output is checked first."""

    def forward(images: Tensor) -> Tensor:
        output = model(images)
        if not isinstance(output, Tensor):
            raise TypeError(f"model returned a {type(output).__name__} and not logits. Pass a module that picks them out.")
        check_logits("Occlusion", output, 1, target)
        return at_least_float32(output)  # in which Captum sums up overlapping windows

    return forward


def judged(
    model: nn.Module,
    x: Tensor,
    mask: Tensor,
    target: Tensor,
    attribution: Attribution,
    measure: Measure = share_inside,
) -> Tensor:
    """Measure where a model looks by an attribution of your choice: choose another one than that of the penalty.

    A penalty on input gradients makes input gradients obey. Whether the model does is another question: occlusion can answer it.

        judged(model, x, mask, target=y, attribution=metrics.Occlusion(window=5))
        judged(model, x, mask, target=y, attribution=attrreg.IntegratedGradients(steps=32).attribute)

    Args:
        model: in the mode in which it is to be judged, usually `eval()`.
        x: images `(N, C, H, W)`.
        mask: as in `share_inside`.
        target: `(N,)` class indices.
        attribution: `(model, x, target) -> map`: an `Occlusion`, or the `.attribute` of a regularizer.
        measure: `(map, mask) -> (N,)`.

    Returns:
        `(N,)`; NaN where the measure is undefined. Of a batch without images, none.

    Raises:
        TypeError, ValueError: naming the argument.

    Cost:
        That of the attribution.
    """
    if not callable(attribution) or isinstance(attribution, AttributionRegularizer):
        raise TypeError(
            f"attribution must be a function (model, x, target) -> map, got {attribution!r}. Pass a regularizer's `.attribute`, "
            "or metrics.Occlusion()."
        )
    if not callable(measure):
        raise TypeError(f"measure must be a function (map, mask) -> (N,), got {measure!r}. Pass for example metrics.share_inside.")
    if isinstance(x, Tensor) and x.shape[:1] == (0,):  # of a label that no image of the batch has
        return at_least_float32(x.new_zeros(0))
    with torch.enable_grad():  # evaluations, and torchmetrics' updates, turn it off
        map = attribution(model, x, target)
    values = measure(map, mask)
    if getattr(values, "shape", None) != (len(x),):
        got = tuple(values.shape) if isinstance(values, Tensor) else f"a {type(values).__name__}"
        raise ValueError(
            f"measure {source(measure)} gave {got}, but a measure is ({len(x)},), one number an image. Do not reduce over the batch."
        )
    return values
