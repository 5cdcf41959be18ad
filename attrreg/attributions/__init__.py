"""The kinds of regularizer, one method a file."""

from attrreg.attributions.activation_difference import ActivationDifference
from attrreg.attributions.gradcam import GradCAM
from attrreg.attributions.input_gradient import InputGradient, InputXGradient
from attrreg.attributions.path import ExpectedGradients, IntegratedGradients
from attrreg.attributions.pgd_ex import PGDEx

__all__ = ["ActivationDifference", "ExpectedGradients", "GradCAM", "InputGradient", "InputXGradient", "IntegratedGradients", "PGDEx"]
