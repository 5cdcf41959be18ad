"""Attributions smoothed over noisy copies of the image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from attrreg.baselines import Baseline, Noise
from attrreg.needs import Need
from attrreg.objectives import LogOutside, Objective
from attrreg.points import CLEAN, At
from attrreg.regularizer import MapRegularizer
from attrreg.scores import Score
from attrreg.settings import is_number, keep_count
from attrreg.trace import Trace

Kind = Literal["smoothgrad", "smoothgrad_sq", "vargrad"]
REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "smoothgrad": lambda maps: maps.mean(dim=0),
    "smoothgrad_sq": lambda maps: maps.square().mean(dim=0),
    "vargrad": lambda maps: maps.var(dim=0, correction=0),
}


@dataclass(frozen=True, repr=False)
class Noisy(Baseline):
    """The image plus Gaussian noise.

    Attributes:
        draw: number of the copy. Points that are equal share one draw; this makes them differ.
    """

    noise: Noise
    draw: int
    draws: ClassVar[bool] = True

    def __call__(self, x: Tensor, mask: Tensor | None, generator: torch.Generator) -> Tensor:
        """A noisy copy of `x`."""
        return x + self.noise(x, mask, generator)


@dataclass(frozen=True, repr=False)
class NoiseTunnel(MapRegularizer):
    """Another attribution at noisy copies of the image: their mean, mean square or variance.

    phi = mean_k psi(x + e_k) for "smoothgrad"; mean_k psi^2 for "smoothgrad_sq"; mean_k (psi - mean psi)^2 for "vargrad", with
    e_k ~ N(0, std^2) drawn anew each call.

    Args:
        of: psi, a map that reads the images as they are: `InputGradient`, `InputXGradient`, `GradCAM` or a layer's. Its
            score is what is differentiated, its objective is not read.
        kind: see above.
        samples: noisy copies.
        std: of the noise, in units of `x`.
        objective: the penalty of phi under the mask, `(map, mask) -> (N,)`: see `attrreg.objectives`.

    Raises:
        TypeError, ValueError: naming the setting.

    Cost:
        `samples` times that of `of`, the forwards included; all graphs are held at once. No gradient flows to `x`.

    Source:
        Smilkov et al. 2017, arXiv 1706.03825; "vargrad": Adebayo et al. 2018, arXiv 1810.03307. Equals Captum's `NoiseTunnel`,
        given its noise; that has all copies in one batch, which under train-mode BatchNorm is another number.
    """

    of: MapRegularizer
    kind: Kind = "smoothgrad"
    samples: int = 5
    std: float = 1.0
    objective: Objective = LogOutside()

    def __post_init__(self) -> None:
        if not isinstance(self.of, MapRegularizer) or any(need.at != CLEAN for need in self.of.needs()):
            raise TypeError(
                f"NoiseTunnel: of must be a map that reads the images as they are, got {type(self.of).__name__}. Use InputGradient(), "
                "InputXGradient(), GradCAM() or a map of a layer."
            )
        if self.kind not in get_args(Kind):
            raise ValueError(f"NoiseTunnel: unknown kind {self.kind!r}. Use one of {', '.join(map(repr, get_args(Kind)))}.")
        keep_count(self, "samples", 2 if self.kind == "vargrad" else 1)
        if not is_number(self.std) or self.std < 0 or (self.std == 0 and self.kind == "vargrad"):
            least = "above 0 for vargrad" if self.kind == "vargrad" else "of at least 0"
            raise ValueError(f"NoiseTunnel: std (Captum's stdevs) must be a number {least}, got {self.std!r}. Write for example 0.1.")
        super().__post_init__()

    @property
    def score(self) -> Score:  # type: ignore[override]
        """That of the attribution inside."""
        return self.of.score

    @property
    def _points(self) -> list[At]:
        return [At(Noisy(Noise(self.std), draw)) for draw in range(self.samples)]

    def needs(self) -> tuple[Need, ...]:
        """What the attribution inside needs, at each noisy copy."""
        return tuple(replace(need, at=point) for point in self._points for need in self.of.needs())

    def attribution(self, trace: Trace) -> Tensor:
        """The attributions there, reduced."""
        maps = torch.stack([self.of.attribution(trace.seen_from(point)) for point in self._points])
        return REDUCTIONS[self.kind](maps)
