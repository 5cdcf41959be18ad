"""The other way: a regularizer's map in Captum's metrics."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from attrreg.call import Select
from attrreg.regularizer import AttributionRegularizer

Maps = Tensor | tuple[Tensor]


def explanation_func(
    regularizer: AttributionRegularizer, model: nn.Module, *, mask: Tensor | None = None, output: Select = None
) -> Callable[..., Maps]:
    """A regularizer's map as the function that `captum.metrics.sensitivity_max` takes.

    `sensitivity_max` passes the images in a tuple and wants the map in one. The rest of Captum that reads maps (`visualization`,
    `infidelity`) takes what `.attribute` returns, as it is.

    Args:
        regularizer: a single term that has a map.
        model: whose map it is; one with further inputs goes into a module that takes the images alone.
        mask: for baselines that are made from it, `(H, W)` or one for each image, as in `attribute`.
        output: where the logits are, as in calling the regularizer.

    Returns:
        `(inputs, target=None) -> map`, of images `(N, C, H, W)` or a tuple that holds them; the map comes in the same form. The target is
        `(N,)`, or one class for all.

    Cost:
        Each call costs what `regularizer.attribute` does, and raises what that raises.
    """

    def explain(inputs: Maps, target: Tensor | int | None = None) -> Maps:
        (x,) = inputs if isinstance(inputs, tuple) else (inputs,)
        classes = None if target is None else torch.as_tensor(target)
        if classes is not None and classes.numel() == 1:  # which Captum does not repeat with the images
            classes = classes.expand(x.shape[0], *classes.shape[1:])
        given = mask  # Captum gives each image several times, side by side
        if isinstance(mask, Tensor) and mask.dim() > 2:
            given = mask.repeat_interleave(max(1, x.shape[0] // mask.shape[0]), dim=0)
        map = regularizer.attribute(model, x, classes, mask=given, output=output).contiguous()  # Captum calls `view` on it
        return (map,) if isinstance(inputs, tuple) else map

    return explain
