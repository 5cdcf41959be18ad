"""Path methods: gradients summed between a baseline and the image."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attrreg import own
from attrreg.baselines import Baseline, Masked, OtherImage, Shuffle, Zero, as_baseline, keep_baseline
from attrreg.needs import Grad, Need
from attrreg.objectives import LogOutside, Objective, requires_region
from attrreg.points import RULES, Path, Quadrature, RandomPlaces
from attrreg.regularizer import MapRegularizer
from attrreg.scores import ByTarget, Score
from attrreg.settings import brief, keep_count
from attrreg.sites import INPUT
from attrreg.trace import Trace


class _PathMethod(MapRegularizer):
    """The gradient of the score, summed along a path; kept are the baseline as a `Baseline` and the chunk as an `int`."""

    baseline: Baseline | Tensor | float
    chunk: int | None

    def __post_init__(self) -> None:
        super().__post_init__()
        keep_baseline(self)
        check_share_varies(self)
        if self.chunk is not None:
            keep_count(self, "chunk", 1)

    @property
    @abstractmethod
    def _path(self) -> Path:
        """Where the gradient is taken."""

    def needs(self) -> tuple[Need, ...]:
        """The gradient summed along the path."""
        return (Grad(INPUT, self.score, self._path),)

    def attribution(self, trace: Trace) -> Tensor:
        """The weighted sum."""
        return trace.grad(INPUT, self.score, self._path)


@dataclass(frozen=True, repr=False)
class IntegratedGradients(_PathMethod):
    """Gradients averaged along the straight path from a baseline to the image, times their difference.

    phi = (x - b) * sum_k w_k d score / d z at z_k = b + a_k (x - b), `(N, C, H, W)`, in units of the score. Its sum over
    pixels approaches score(x) - score(b) as steps grow.

    Args:
        steps: number of places on the path; at least 1, and 2 for the Riemann rules.
        baseline: where the path starts: a number, a tensor that broadcasts to `x`, or one of `attrreg.baselines`.
        rule: Captum's name of the quadrature rule. The weights of "riemann_trapezoid" sum to 1 - 1 / steps, as Captum's.
        chunk: how many steps' graphs are held in memory at a time; None: those of all. If that is fewer than `steps`, each step is computed
            twice: for the map, whose graph is not kept, and again, with its graph, in the penalty's backward. The steps of a chunk run as
            one batch where that gives the same map: where no layer mixes images but batch normalisation, which then normalises each step
            by itself, and the model draws nothing but dropout and stochastic depth.
        score: what is differentiated; by default chosen by the target (`scores.ByTarget`): for class indices the target's logit against the
            best other, without a target the sum of log-probabilities.
        objective: the penalty of phi under the mask, `(map, mask) -> (N,)`: see `attrreg.objectives`.

    Raises:
        TypeError, ValueError: naming the setting.

    Cost:
        A forward and a backward for each of `steps`, the backward differentiated again; both twice where `chunk` is less than `steps`.
        Nothing is saved by attaching. Steps that run as one batch are one pass.

    Source:
        Sundararajan et al. 2017, arXiv 1703.01365. Equals Captum's `IntegratedGradients` (its default has 50 steps), which
        evaluates all steps as one batch: under train-mode BatchNorm that is another number.
    """

    steps: int = 16
    baseline: Baseline | Tensor | float = Zero()
    rule: str = "gausslegendre"
    chunk: int | None = 1
    score: Score = ByTarget()
    objective: Objective = LogOutside()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rule(self)

    @property
    def _path(self) -> Path:
        return Quadrature(as_baseline(self.baseline), self.steps, self.rule, self.chunk)


@dataclass(frozen=True, repr=False)
class ExpectedGradients(_PathMethod):
    """Integrated gradients in expectation over baselines and places, by fresh draws each call.

    phi = mean over draws of (x - b) * d score / d z at z = b + a (x - b), with b a random baseline and a ~ U(0, 1), both
    drawn for each image. One draw in each training step is an unbiased estimate of the expectation.

    Args:
        samples: how many pairs (b, a) are drawn in a call.
        baseline: what b is drawn from; by default the other images of the batch. `baselines.Masked(fill)` compares the image
            with itself without its irrelevant part.
        chunk: how many samples' graphs are held in memory at a time, as in `IntegratedGradients`.
        score: what is differentiated; by default chosen by the target (`scores.ByTarget`): for class indices the target's logit against the
            best other, without a target the sum of log-probabilities.
        objective: the penalty of phi under the mask, `(map, mask) -> (N,)`: see `attrreg.objectives`.

    Raises:
        TypeError, ValueError: naming the setting.

    Cost:
        That of `IntegratedGradients` with as many steps.

    Source:
        Erion et al. 2021, arXiv 1906.10670, where baselines come from the training set.
    """

    samples: int = 1
    baseline: Baseline | Tensor | float = OtherImage()
    chunk: int | None = 1
    score: Score = ByTarget()
    objective: Objective = LogOutside()

    def __post_init__(self) -> None:
        super().__post_init__()
        keep_count(self, "samples", 1)

    @property
    def _path(self) -> Path:
        return RandomPlaces(as_baseline(self.baseline), self.samples, self.chunk)


def check_share_varies(regularizer: Any) -> None:
    """Refuse an objective that is a share of attribution where only irrelevant pixels differ from the baseline: it would be constant.

    Raises:
        ValueError: naming the baseline.
    """
    baseline, objective = regularizer.baseline, regularizer.objective
    if requires_region(objective) and _keeps_the_relevant(baseline):
        raise ValueError(
            f"{type(regularizer).__name__}: from {type(baseline).__name__} to the image only irrelevant pixels change, so a share of "
            "attribution would not tell whether the relevant ones are used. Use objectives.LogOutside(), or another baseline."
        )


def _keeps_the_relevant(baseline: Baseline) -> bool:
    """Whether relevant pixels stay as they are; of one of the user's that reads the mask, whether they do in a trial."""
    if isinstance(baseline, (Masked, Shuffle)) or not baseline.needs_mask:
        return baseline.needs_mask
    cpu = torch.device("cpu")
    x, mask = torch.rand(2, 3, 8, 8, generator=torch.Generator(cpu).manual_seed(0), device=cpu), torch.zeros(2, 1, 8, 8, device=cpu)
    mask[..., 2:6, 2:6] = 1
    try:
        with torch.random.fork_rng(devices=[]):
            image = own.made(baseline, baseline, x, mask, seed=0)
        return bool(((image == x) | (mask == 0)).all())
    except Exception:  # it may be for other images, or of another device; then nothing is known
        return False


def check_rule(regularizer: Any, least: int = 2) -> None:
    """Check the quadrature rule and the number of steps, and keep that as an `int`; `least`: the fewest steps for a Riemann rule.

    Raises:
        ValueError: naming the setting.
    """
    if regularizer.rule not in RULES:
        raise ValueError(f"rule {brief(regularizer.rule)} is unknown. Use one of {', '.join(map(repr, RULES))}.")
    keep_count(regularizer, "steps", 1 if regularizer.rule == "gausslegendre" else least)
