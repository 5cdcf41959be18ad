"""`from_captum`: a Captum attribution as a regularizer that can be trained with."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from torch import Tensor

from attrreg.attributions import ExpectedGradients, GradCAM, InputGradient, InputXGradient, IntegratedGradients
from attrreg.baselines import Baseline, OneOf, OtherImage, Zero
from attrreg.captum.layer import InternalInfluence, LayerActivation, LayerConductance, LayerGradientXActivation
from attrreg.captum.neuron import Neuron, NeuronConductance
from attrreg.captum.noise import Kind, NoiseTunnel
from attrreg.captum.perturbation import FeatureAblation, ShapleyValues
from attrreg.captum.rectified import Deconvolution, GuidedBackprop, GuidedGradCam
from attrreg.captum.refusals import ABSTRACT, REFUSED
from attrreg.objectives import LogOutside, Objective
from attrreg.regularizer import MapRegularizer, Sum
from attrreg.scores import ByTarget, Score

Index = int | tuple[int, ...]
Images = Baseline | Tensor | float | None
Builder = Callable[..., MapRegularizer]
DEFAULT_SCORE, DEFAULT_OBJECTIVE = ByTarget(contrast=False), LogOutside()

# Captum's arguments that a call of the regularizer gives, and where.
AT_THE_CALL = MappingProxyType(
    {
        "forward_func": "model",
        "model": "model",
        "inputs": "x",
        "target": "target",
        "additional_forward_args": "inputs",
    }
)


def from_captum(
    attribution: type, /, *, score: Score = DEFAULT_SCORE, objective: Objective = DEFAULT_OBJECTIVE, **settings: Any
) -> MapRegularizer:
    """A Captum attribution as a regularizer, trained through exactly.

        reg = attrreg.from_captum(captum.attr.IntegratedGradients, n_steps=8)
        loss += reg(model, x, mask, target=y)

    What comes back is attrreg's own term with the same map, so it shares passes in sums, attaches, and leaves nothing behind.
    Captum's own code is not run: most of its attributions carry no graph or a wrong one. `docs/captum.md` lists, for each, what
    was measured.

    Args:
        attribution: a class of `captum.attr`.
        score: what is differentiated; by default the target's logit, as in Captum, or the sum of log-probabilities without
            targets. Neuron attributions have a score of their own.
        objective: the penalty of the map under the mask, `(map, mask) -> (N,)`: see `attrreg.objectives`.
        settings: Captum's settings with Captum's names and defaults, those of the class and those of its `attribute` method. A layer is
            given by its dotted name.

    Returns:
        A term; its `repr` says which.

    Raises:
        TypeError: `attribution` is not one of Captum's classes (subclasses of your own are refused too, because nothing shows that their
            gradient is right), or is one that cannot be trained through; the message has the reason and the way out.
        ValueError: an unknown setting, one that is missing, or one that belongs to the call.
    """
    name = _known_name(attribution)
    builder = ACCEPTED[name]
    of_neuron = name.startswith("Neuron") and name != "NeuronConductance"  # the plain attribution, with the neuron as its score
    _check_settings(name, (_settings_of(_neuron) if of_neuron else {}) | _settings_of(builder), settings)
    if of_neuron:
        if score != DEFAULT_SCORE:
            raise ValueError(f"from_captum: {name} differentiates a neuron, and no score. Leave score= out.")
        score = _neuron(settings.pop("layer"), settings.pop("neuron_selector"))
    return builder(score=score, objective=objective, **settings)


def _known_name(attribution: Any) -> str:
    import captum.attr  # slow to import

    name = getattr(attribution, "__name__", "")
    if isinstance(attribution, captum.attr.Attribution):
        raise TypeError(
            f"from_captum: pass the class captum.attr.{type(attribution).__name__}, not an object of it: the model comes with the call."
        )
    if not isinstance(attribution, type):
        raise TypeError(f"from_captum: pass a class of captum.attr, such as captum.attr.Saliency, got {attribution!r}.")
    if not issubclass(attribution, captum.attr.Attribution) or vars(captum.attr).get(name) is not attribution:
        raise TypeError(
            f"from_captum: {name} is not one of captum.attr's attributions, and nothing shows that its parameter gradient would be right. "
            "Write it as a MapRegularizer: see docs/extend.md."
        )
    if name in ABSTRACT:
        raise TypeError(f"from_captum: {name} is an abstract class. Pass a method, such as captum.attr.Saliency.")
    if name not in ACCEPTED:
        reason, way_out = REFUSED.get(
            name, ("attrreg does not know it, and so cannot say that its gradient is right", "See docs/extend.md")
        )
        raise TypeError(f"from_captum: {name} cannot be trained through: {reason}. {way_out}.")
    return name


def _settings_of(builder: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    return {name: parameter for name, parameter in inspect.signature(builder).parameters.items() if name not in ("score", "objective")}


def _check_settings(name: str, known: Mapping[str, inspect.Parameter], settings: Mapping[str, Any]) -> None:
    names = ", ".join(known) or "none"
    for key in settings:
        if key in AT_THE_CALL:
            raise ValueError(
                f"from_captum: {key} comes with the call: reg(model, x, mask, target=...), as {AT_THE_CALL[key]}. Leave it out."
            )
        if key not in known:
            raise ValueError(f"from_captum: {name} has no setting {key} here. Those it has: {names}.")
    for key, parameter in known.items():
        if parameter.default is inspect.Parameter.empty and key not in settings:
            raise ValueError(f"from_captum: {name} needs {key}. Its settings: {names}.")


def _or_zero(baselines: Images) -> Baseline | Tensor | float:
    """Where a path starts: None is zero, as in Captum."""
    return Zero() if baselines is None else baselines


def _distribution(baselines: Baseline | Tensor) -> Baseline:
    """What baselines are drawn from: a tensor holds the images."""
    if isinstance(baselines, Baseline):
        return baselines
    if not isinstance(baselines, Tensor):
        raise TypeError(
            "from_captum: baselines must be a tensor (K, C, H, W) of images to draw from, or one of attrreg.baselines, got a "
            f"{type(baselines).__name__}. Pass the images."
        )
    return OneOf(baselines)


def _neuron(layer: str, neuron_selector: Index) -> Neuron:
    """Its parameters are Captum's names of a neuron's settings: see `_settings_of`."""
    return Neuron(layer, neuron_selector)


# One builder for each attribution: its parameters are Captum's settings, with Captum's names and defaults. A neuron attribution has the
# builder of the attribution that it takes of the neuron.


def _saliency(score: Score, objective: Objective, abs: bool = True) -> MapRegularizer:
    return InputGradient(score, objective, abs)


def _gradient(score: Score, objective: Objective) -> MapRegularizer:
    return InputGradient(score, objective)


def _integrated_gradients(
    score: Score, objective: Objective, baselines: Images = None, n_steps: int = 50, method: str = "gausslegendre"
) -> MapRegularizer:
    return IntegratedGradients(n_steps, _or_zero(baselines), method, score=score, objective=objective)


def _gradient_shap(score: Score, objective: Objective, baselines: Baseline | Tensor, n_samples: int = 5) -> MapRegularizer:
    return ExpectedGradients(n_samples, _distribution(baselines), score=score, objective=objective)


def _guided_grad_cam(score: Score, objective: Objective, layer: str) -> MapRegularizer:
    return GuidedGradCam(layer, score, objective)


def _layer_grad_cam(score: Score, objective: Objective, layer: str, relu_attributions: bool = False) -> MapRegularizer:
    return GradCAM(layer, relu_attributions, score=score, objective=objective)


def _layer_gradient_x_activation(score: Score, objective: Objective, layer: str, multiply_by_inputs: bool = True) -> MapRegularizer:
    return LayerGradientXActivation(layer, multiply_by_inputs, score, objective)


def _layer_activation(score: Score, objective: Objective, layer: str) -> MapRegularizer:
    return LayerActivation(layer, score, objective)


def _internal_influence(
    score: Score, objective: Objective, layer: str, baselines: Images = None, n_steps: int = 50, method: str = "gausslegendre"
) -> MapRegularizer:
    return InternalInfluence(layer, n_steps, _or_zero(baselines), method, score, objective)


def _layer_conductance(
    score: Score, objective: Objective, layer: str, baselines: Images = None, n_steps: int = 50, method: str = "gausslegendre"
) -> MapRegularizer:
    return LayerConductance(layer, n_steps, _or_zero(baselines), method, score, objective)


def _neuron_conductance(
    score: Score,
    objective: Objective,
    layer: str,
    neuron_selector: Index,
    multiply_by_inputs: bool = True,
    baselines: Images = None,
    n_steps: int = 50,
    method: str = "riemann_trapezoid",
) -> MapRegularizer:
    neuron = Neuron(layer, neuron_selector)
    return NeuronConductance(neuron, n_steps, _or_zero(baselines), method, multiply_by_inputs, score, objective)


def _noise_tunnel(
    score: Score,
    objective: Objective,
    attribution_method: type | MapRegularizer,
    nt_type: Kind = "smoothgrad",
    nt_samples: int = 5,
    stdevs: float = 1.0,
) -> MapRegularizer:
    if isinstance(attribution_method, Sum):
        raise TypeError(
            "from_captum: attribution_method must be a plain term, not a sum, nor one with a weight, name, reduction or engine. Give "
            "those to what from_captum returns."
        )
    if isinstance(attribution_method, MapRegularizer) and score != DEFAULT_SCORE:
        raise ValueError("from_captum: the score of NoiseTunnel is that of its attribution_method. Give it there.")
    inside = attribution_method if isinstance(attribution_method, MapRegularizer) else from_captum(attribution_method, score=score)
    return NoiseTunnel(inside, nt_type, nt_samples, stdevs, objective)


def _feature_ablation(score: Score, objective: Objective, feature_mask: Tensor, baselines: Images = None) -> MapRegularizer:
    return FeatureAblation(feature_mask, _or_zero(baselines), score, objective)


def _feature_permutation(score: Score, objective: Objective, feature_mask: Tensor) -> MapRegularizer:
    return FeatureAblation(feature_mask, OtherImage(), score, objective)


def _shapley_values(score: Score, objective: Objective, feature_mask: Tensor, baselines: Images = None) -> MapRegularizer:
    return ShapleyValues(feature_mask, _or_zero(baselines), score, objective)


ACCEPTED: Mapping[str, Builder] = MappingProxyType(
    {
        "Saliency": _saliency,
        "InputXGradient": InputXGradient,
        "IntegratedGradients": _integrated_gradients,
        "GradientShap": _gradient_shap,
        "NoiseTunnel": _noise_tunnel,
        "GuidedBackprop": GuidedBackprop,
        "Deconvolution": Deconvolution,
        "GuidedGradCam": _guided_grad_cam,
        "FeatureAblation": _feature_ablation,
        "FeaturePermutation": _feature_permutation,
        "ShapleyValues": _shapley_values,
        "LayerActivation": _layer_activation,
        "LayerGradientXActivation": _layer_gradient_x_activation,
        "LayerGradCam": _layer_grad_cam,
        "InternalInfluence": _internal_influence,
        "LayerConductance": _layer_conductance,
        "NeuronGradient": _gradient,
        "NeuronIntegratedGradients": _integrated_gradients,
        "NeuronGradientShap": _gradient_shap,
        "NeuronGuidedBackprop": GuidedBackprop,
        "NeuronDeconvolution": Deconvolution,
        "NeuronConductance": _neuron_conductance,
        "NeuronFeatureAblation": _feature_ablation,
    }
)
