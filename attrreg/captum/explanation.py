"""The other way: a regularizer's map in Captum's metrics."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from attrreg.call import Select
from attrreg.regularizer import AttributionRegularizer

Maps = Tensor | tuple[Tensor]


def explanation_func(regularizer: AttributionRegularizer, model: nn.Module, *, output: Select = None) -> Callable[..., Maps]:
    """A regularizer's map as the function that `captum.metrics.sensitivity_max` takes.

    `sensitivity_max` passes the images in a tuple and wants the map in one. The rest of Captum that reads maps (`visualization`,
    `infidelity`) takes what `.attribute` returns, as it is.

    Args:
        regularizer: a single term that has a map.
        model: whose map it is.
        output: where the logits are, as in calling the regularizer.

    Returns:
        `(inputs, target=None) -> map`, of images `(N, C, H, W)` or a tuple that holds them; the map comes in the same form.

    Cost:
        Each call costs what `regularizer.attribute` does, and raises what that raises.
    """

    def explain(inputs: Maps, target: Tensor | None = None) -> Maps:
        (x,) = inputs if isinstance(inputs, tuple) else (inputs,)
        map = regularizer.attribute(model, x, target, output=output)
        return (map,) if isinstance(inputs, tuple) else map

    return explain
