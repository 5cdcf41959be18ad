"""Captum's attributions as regularizers: `from_captum`, and the kinds that attrreg itself does not have; and the way back."""

from attrreg.captum.bridge import from_captum
from attrreg.captum.explanation import explanation_func
from attrreg.captum.layer import InternalInfluence, LayerActivation, LayerConductance, LayerGradientXActivation
from attrreg.captum.neuron import Neuron, NeuronConductance
from attrreg.captum.noise import NoiseTunnel
from attrreg.captum.perturbation import FeatureAblation, ShapleyValues
from attrreg.captum.rectified import Deconvolution, GuidedBackprop, GuidedGradCam

__all__ = [
    "Deconvolution",
    "FeatureAblation",
    "GuidedBackprop",
    "GuidedGradCam",
    "InternalInfluence",
    "LayerActivation",
    "LayerConductance",
    "LayerGradientXActivation",
    "Neuron",
    "NeuronConductance",
    "NoiseTunnel",
    "ShapleyValues",
    "explanation_func",
    "from_captum",
]
