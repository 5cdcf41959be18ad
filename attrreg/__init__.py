"""attrreg: train a vision model to be right for the right reasons.

loss += reg(model, x, mask)
"""

from attrreg import baselines, captum, data, engines, masks, metrics, objectives, plot, presets, schedules, scores, trace, transforms
from attrreg.adversarial import AdversarialInvariance
from attrreg.attributions import (
    ActivationDifference,
    ExpectedGradients,
    GradCAM,
    InputGradient,
    InputXGradient,
    IntegratedGradients,
    PGDEx,
)
from attrreg.captum import from_captum
from attrreg.layers import layers
from attrreg.memory import keep_memory
from attrreg.penalty import Penalty
from attrreg.regularizer import AttributionRegularizer, MapRegularizer, SingleRegularizer
from attrreg.schedules import Scheduled

__version__ = "0.1.0"

__all__ = [
    "ActivationDifference",
    "AdversarialInvariance",
    "AttributionRegularizer",
    "ExpectedGradients",
    "GradCAM",
    "InputGradient",
    "InputXGradient",
    "IntegratedGradients",
    "MapRegularizer",
    "PGDEx",
    "Penalty",
    "Scheduled",
    "SingleRegularizer",
    "baselines",
    "captum",
    "data",
    "engines",
    "from_captum",
    "keep_memory",
    "layers",
    "masks",
    "metrics",
    "objectives",
    "plot",
    "presets",
    "schedules",
    "scores",
    "trace",
    "transforms",
]
