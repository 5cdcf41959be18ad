"""Attributions of one neuron."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attrreg.attributions.path import check_share_varies
from attrreg.baselines import Baseline, Zero, as_baseline
from attrreg.captum.between import check_path, path_points
from attrreg.needs import Grad, Need, Value
from attrreg.objectives import LogOutside, Objective
from attrreg.regularizer import MapRegularizer
from attrreg.scores import ByTarget, Score
from attrreg.settings import is_integer
from attrreg.sites import INPUT, check_layer_name
from attrreg.trace import Trace


@dataclass(frozen=True, repr=False)
class Neuron(Score):
    """One neuron, a_l[:, index]: the score that Captum's neuron attributions differentiate. Needs no target.

    Args:
        layer: dotted name of the layer.
        index: where in the layer's output, without the batch axis; an integer where that has one axis.

    Raises:
        TypeError: naming the setting.
    """

    layer: str
    index: int | tuple[int, ...]

    def __post_init__(self) -> None:
        check_layer_name(self.layer)
        index: Any = self.index if isinstance(self.index, tuple) else (self.index,)
        if not index or not all(map(is_integer, index)):
            raise TypeError(f"Neuron: index must be an integer or a tuple of them, got {self.index!r}. Name one neuron.")
        object.__setattr__(self, "index", tuple(map(int, index)))

    @property
    def site(self) -> str:
        """The layer."""
        return self.layer

    def check_value(self, value: Tensor, target: Tensor | None) -> None:
        """Check that the layer has such a neuron."""
        assert isinstance(self.index, tuple)
        inside = all(-size <= n < size for n, size in zip(self.index, value.shape[1:], strict=False))
        if len(self.index) != value.dim() - 1 or not inside:
            raise ValueError(
                f"Neuron: layer {self.layer!r} gives {tuple(value.shape)}, in which {self.index} is no neuron. Give an index for each "
                "axis but the first."
            )

    def __call__(self, value: Tensor, target: Tensor | None) -> Tensor:
        """Score `(N,)` of a layer's output."""
        where: tuple[Any, ...] = (slice(None), *self.index)  # type: ignore[misc]  # a tuple since __post_init__
        return value[where]


@dataclass(frozen=True, repr=False)
class NeuronConductance(MapRegularizer):
    """What each pixel adds to the score through one neuron, along a straight path.

    phi = (x - b) * sum_k w_k (d score / d a) (d a / d z) at z_k = b + alpha_k (x - b), with a the neuron, `(N, C, H, W)`.

    Args:
        neuron: the neuron, as `Neuron(layer, index)`.
        steps: places on the path.
        baseline: where it starts, as in `IntegratedGradients`; none that draws.
        rule: Captum's name of the quadrature rule.
        multiply: by x - b, as above; else the average gradient itself.
        score: what is differentiated; by default the target's logit, or the sum of log-probabilities without targets.
        objective: the penalty of phi under the mask, `(map, mask) -> (N,)`: see `attrreg.objectives`.

    Raises:
        TypeError, ValueError: naming the setting.

    Cost:
        `steps` forwards and twice as many backwards, each differentiated again; all graphs are held at once. No gradient flows to `x`
        through the places.

    Source:
        Dhamdhere et al. 2018, arXiv 1805.12233. Equals Captum's `NeuronConductance`.
    """

    neuron: Neuron
    steps: int = 50
    baseline: Baseline | Tensor | float = Zero()
    rule: str = "riemann_trapezoid"
    multiply: bool = True
    score: Score = ByTarget(contrast=False)
    objective: Objective = LogOutside()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.neuron, Neuron):
            raise TypeError(f"NeuronConductance: neuron must be a captum.Neuron, got {self.neuron!r}. Write Neuron('layer4', (0, 1, 1)).")
        check_path(self)
        if self.multiply:  # the map is zero where image and baseline agree; without the factor it need not be
            check_share_varies(self)

    def needs(self) -> tuple[Need, ...]:
        """At each place, the score's gradient at the layer and the neuron's at the image."""
        pairs = [(Grad(self.neuron.layer, self.score, at), Grad(INPUT, self.neuron, at)) for at, _ in path_points(self)]
        return (Value(INPUT), *(need for pair in pairs for need in pair))

    def attribution(self, trace: Trace) -> Tensor:
        """The weighted sum of products."""
        products = []
        for at, weight in path_points(self):
            onward = self.neuron(trace.grad(self.neuron.layer, self.score, at), None)
            products.append(weight * onward.view(-1, 1, 1, 1) * trace.grad(INPUT, self.neuron, at))
        total = torch.stack(products).sum(dim=0)
        if not self.multiply:
            return total
        x = trace.value(INPUT)
        start = as_baseline(self.baseline)(x.detach(), trace.call.mask, torch.Generator(x.device))
        return (x - start) * total
