"""Ways of training: what a comparison compares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from attrreg import ActivationDifference, AttributionRegularizer, ExpectedGradients, GradCAM, InputGradient, IntegratedGradients, PGDEx
from attrreg.adversarial import AdversarialInvariance
from attrreg.baselines import Masked, Shuffle
from attrreg.objectives import AbsoluteOutside, NetOutside, SquaredOutside
from attrreg.scores import Contrast, RandomProjection, SumLogProb
from attrreg.transforms import ReplaceOutside

LossTerm = AttributionRegularizer | AdversarialInvariance


@dataclass(frozen=True)
class Method:
    """A way of training.

    Attributes:
        name: As tables and pictures call it.
        regularizer: What is added to the loss; None: nothing.
        weight: Its weight; tuning searches around it.
        fixed: The weight is not searched: the claim is that it needs none.
        transform: What is made of the training batch; None: nothing.
        adversary: Makes what is added to the loss from its weight, for what has a state.
    """

    name: str
    regularizer: AttributionRegularizer | None = None
    weight: float = 1.0
    transform: ReplaceOutside | None = None
    adversary: Callable[[float], AdversarialInvariance] | None = None
    fixed: bool = False

    @property
    def weighted(self) -> bool:
        """Whether there is a weight."""
        return self.regularizer is not None or self.adversary is not None

    @property
    def term(self) -> LossTerm | None:
        """What is added to the loss, weighted; a fresh one where it has a state."""
        if self.adversary is not None:
            return self.adversary(self.weight)
        return None if self.regularizer is None else self.weight * self.regularizer

    def __str__(self) -> str:
        """What is done, as source."""
        term = self.term
        return "nothing" if term is None and self.transform is None else repr(self.transform if term is None else term)


def _adversary(weight: float) -> AdversarialInvariance:
    return AdversarialInvariance(weight, rate=1e-2)


PLAIN = Method("plain")
# A weight is that of the paper where it has one, for a mean over the batch: GradMask's is .203 of a sum over 32 images, the adversary's
# 10 of a sum of two terms, which is 20 of their mean. RRR's lies between the .015 of its own paper (1000 for pixels in 0..255) and the 320
# of the founding one (10, of a sum over 32 images).
# `benchmarks.tune_demo` had chosen before, on validation images of digits and crosses: ActDiff's weight (the founding paper has 1), all of
# integrated gradients, Grad-CAM's score and objective, the feature path's score and baseline.
METHODS = (
    PLAIN,
    Method("masked", transform=ReplaceOutside()),
    Method("shuffled", transform=ReplaceOutside(Shuffle())),
    Method("adversarial", adversary=_adversary, weight=20.0),
    Method("PGD-Ex", PGDEx(epsilon=1.0, steps=2), 1.0),
    Method("GradMask", InputGradient(Contrast(), AbsoluteOutside()), 6.5),
    Method("RRR", InputGradient(SumLogProb(), SquaredOutside()), 2.0),
    Method("ActDiff", ActivationDifference(), 0.3),
    Method(
        "integrated gradients",
        IntegratedGradients(steps=2, chunk=None, baseline=Masked(), score=Contrast(), objective=AbsoluteOutside()),
        0.3,
    ),
    Method("expected gradients", ExpectedGradients(chunk=None, score=Contrast(), objective=AbsoluteOutside()), 0.3),
    Method("feature path", ExpectedGradients(baseline=Masked(), score=RandomProjection(), objective=NetOutside(), chunk=None), 1.0),
    Method("Grad-CAM", GradCAM(score=SumLogProb(), objective=AbsoluteOutside()), 0.3),
    Method("default", InputGradient(), 1.0, fixed=True),
)


def method(name: str) -> Method:
    """One of `METHODS` by its name.

    Raises:
        ValueError: there is none of this name.
    """
    for known in METHODS:
        if known.name == name:
            return known
    raise ValueError(f"method {name!r} is unknown. Use one of {', '.join(repr(known.name) for known in METHODS)}.")
