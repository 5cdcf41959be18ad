"""Which layers of a model have a spatial map, so that a user can choose one by name."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attrreg import call as calls
from attrreg import hooks, sites
from attrreg.attach import suspended
from attrreg.call import Call, Inputs
from attrreg.ops.process import transformed
from attrreg.state import isolated


@dataclass(frozen=True)
class LayerInfo:
    """A layer with a spatial map.

    Attributes:
        name: dotted name, for `GradCAM(layer=)` and `ActivationDifference(layers=)`.
        kind: class of the module.
        shape: of its output.
        layout: "NCHW", "NHWC", "NCL" or "tokens".
        grid: height and width of the map.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    layout: str
    grid: tuple[int, int]


def layers(model: nn.Module, x: Tensor, *, inputs: Inputs = None) -> list[LayerInfo]:
    """List the layers whose output is a map, in the order they run.

    Args:
        model: the model; it is left as it was.
        x: images `(N, C, H, W)`.
        inputs: all that the model is called with, as in calling a regularizer.

    Returns:
        One entry a layer that ran once. What holds several layers (a stage, say) comes after them.

    Raises:
        TypeError, ValueError: naming the argument.
        RuntimeError: the call is being compiled.

    Cost:
        One forward, without gradients.
    """
    calls.check_images(model, x)
    calls.check_options(x, inputs=inputs)
    call = Call(model, x, inputs=inputs)
    found: list[LayerInfo] = []
    runs: Counter[str] = Counter()

    def see(name: str, module: nn.Module, args: Any, output: Any) -> None:
        runs[name] += 1  # those that give no map count too: the layer cannot be named
        if isinstance(output, Tensor) and not transformed() and (layout := sites.layout(output, call.model, x, name)) is not None:
            grid = sites.to_grid(output, call.model, x, name).shape[-2:]
            text = layout if isinstance(layout, str) else "tokens"
            found.append(LayerInfo(name, type(module).__name__, tuple(output.shape), text, (grid[0], grid[1])))

    with torch.no_grad(), isolated(call.model, x.device), suspended(call.model), hooks.observed(call.model, see):
        call.run(x.clone(), as_users_forward=False)
    return [layer for layer in found if runs[layer.name] == 1]
