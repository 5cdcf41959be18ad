"""Captum's attributions that cannot be trained through, each with its reason and the way out."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

_RESCALE = (
    "Captum's DeepLift hooks hold the multipliers delta out / delta in constant (they detach both), so its parameter gradient is not "
    "that of its map"
)
_LRP = (
    "Captum's LRP writes activations and relevances through `.data`, and so cuts them off from the parameters; its parameter gradient is "
    "not that of its map"
)
_NO_GRAD = "Captum runs its forwards under torch.no_grad(), so no gradient reaches the parameters"
_FIT = "Captum fits a linear model to forwards that run under torch.no_grad(), one image at a time"
_ABLATION_OUT = "Use FeatureAblation(feature_mask=...), which runs here with gradients"
_LANGUAGE = "it attributes to the tokens of a language model's prompt, and not to images"

# name in captum.attr -> (reason, way out)
REFUSED: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "DeepLift": (_RESCALE, "Use IntegratedGradients, which DeepLift approximates and which adds up to the same difference of scores"),
        "DeepLiftShap": (_RESCALE, "Use GradientShap, which compares with a distribution of baselines too"),
        "LayerDeepLift": (_RESCALE, "Use LayerConductance, which adds up to the same difference of scores"),
        "LayerDeepLiftShap": (_RESCALE, "Use LayerConductance, which adds up to the difference of scores from one baseline"),
        "NeuronDeepLift": (_RESCALE, "Use NeuronIntegratedGradients, which adds up to the same difference"),
        "NeuronDeepLiftShap": (_RESCALE, "Use NeuronGradientShap, which compares with a distribution of baselines too"),
        "LRP": (_LRP, "Use InputXGradient, which the epsilon rule equals on ReLU networks"),
        "LayerLRP": (_LRP, "Use LayerGradientXActivation, which the epsilon rule equals on ReLU networks"),
        "LayerIntegratedGradients": (
            "Captum computes the layer's activations under torch.no_grad() and runs the rest of the model from detached copies, so nothing "
            "reaches the layers before",
            "Use LayerConductance, which adds up to the same difference of scores and is trained through at every layer",
        ),
        "LayerGradientShap": (
            "Captum computes the layer's activations, and all of its samples, under torch.no_grad()",
            "Use LayerConductance with a baseline, or GradientShap at the image",
        ),
        "Occlusion": (
            "Captum runs its forwards under torch.no_grad(), and how many windows there are depends on the images, which a term does not "
            "know before a call",
            _ABLATION_OUT + ", with windows that do not overlap",
        ),
        "ShapleyValueSampling": (_NO_GRAD, "Use ShapleyValues, which it estimates"),
        "Lime": (_FIT, _ABLATION_OUT),
        "LimeBase": (_FIT, _ABLATION_OUT),
        "KernelShap": (_FIT, "Use ShapleyValues, which it estimates"),
        "LayerFeatureAblation": (_NO_GRAD, "Use LayerGradientXActivation or LayerConductance, or FeatureAblation at the image"),
        "LayerFeaturePermutation": (_NO_GRAD, "Use LayerGradientXActivation or LayerConductance, or FeatureAblation at the image"),
        "DataLoaderAttribution": ("it attributes a statistic of a whole data loader, and not images of a batch", _ABLATION_OUT),
        "LLMAttribution": (_LANGUAGE, "Use Saliency or IntegratedGradients on images"),
        "LLMGradientAttribution": (_LANGUAGE, "Use Saliency or IntegratedGradients on images"),
        "RemoteLLMAttribution": (_LANGUAGE, "Use Saliency or IntegratedGradients on images"),
    }
)
ABSTRACT = ("Attribution", "GradientAttribution", "PerturbationAttribution", "LayerAttribution", "NeuronAttribution")
