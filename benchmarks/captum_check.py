"""Is the parameter gradient of each Captum attribution right? Measured in float64 on a small network.

The reference is Captum's own map, differentiated numerically, or where that draws or is of one image our own: no graph has a part in it.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import captum.attr
import numpy as np
import torch
from captum.attr import Attribution
from torch import Tensor, nn

import attrreg
from attrreg.bench.today import gradients_with_graph
from attrreg.captum.bridge import ACCEPTED
from attrreg.captum.refusals import ABSTRACT
from attrreg.objectives import SquaredOutside

TOLERANCE = 1e-6
STEP = 1e-5
LAYER = "body"


class Net(nn.Module):
    """Smooth, or with a ReLU layer between curved ones, through which the penalty's backward passes forward and back."""

    def __init__(self, rectified: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.first = nn.Tanh()
        self.body = nn.Conv2d(4, 5, 3, stride=2, padding=1)
        self.middle = nn.ReLU() if rectified else nn.Tanh()
        self.third = nn.Conv2d(5, 6, 3, padding=1)
        self.last = nn.Tanh()
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `(N, 3)`."""
        h = self.middle(self.body(self.first(self.stem(x))))
        logits: Tensor = self.head(self.last(self.third(h)).mean(dim=(2, 3)))
        return logits


@dataclass(frozen=True)
class Case:
    """One attribution and how it is called.

    Attributes:
        settings: Captum's, of the class and of `attribute`; also those of `from_captum`, where it is accepted.
        rectified: it is about ReLU layers.
        draws: Captum and attrreg draw differently.
        single: Captum rounds its map to float32, too coarse for differences.
        runs: False where Captum's takes something else than a batch of images.
    """

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    rectified: bool = False
    draws: bool = False
    single: bool = False
    runs: bool = True

    @property
    def accepted(self) -> bool:
        """Whether `from_captum` takes it."""
        return self.name in ACCEPTED


def _images() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator(torch.get_default_device()).manual_seed(1)
    x, others = (torch.randn(n, 2, 8, 8, generator=generator, dtype=torch.float64) for n in (3, 4))
    mask = torch.zeros(3, 8, 8, dtype=torch.bool)
    mask[:, 2:4, 2:6] = True
    return x, mask, torch.tensor([0, 2, 1]), others


X, MASK, TARGET, OTHERS = _images()
SEGMENTS = (torch.arange(8).view(8, 1) // 4 * 2 + torch.arange(8) // 4).expand(1, 2, 8, 8).contiguous()
PATH = {"n_steps": 4, "baselines": OTHERS[:1]}
NEURON = {"layer": LAYER, "neuron_selector": (1, 2, 2)}
ABLATION = {"feature_mask": SEGMENTS, "baselines": OTHERS[:1]}
CASES = (
    Case("IntegratedGradients", PATH),
    Case("GradientShap", {"baselines": OTHERS}, draws=True),
    Case(
        "NoiseTunnel",
        {"attribution_method": captum.attr.InputXGradient, "nt_type": "smoothgrad_sq", "nt_samples": 2, "stdevs": 0.3},
        draws=True,
    ),
    Case("GuidedBackprop", rectified=True),
    Case("Deconvolution", rectified=True),
    Case("GuidedGradCam", {"layer": LAYER}, rectified=True),
    Case("FeatureAblation", ABLATION),
    Case("LayerActivation", {"layer": LAYER}),
    Case("LayerGradientXActivation", {"layer": LAYER}),
    Case("LayerGradCam", {"layer": LAYER}),
    Case("InternalInfluence", {"layer": LAYER, **PATH}),
    Case("LayerConductance", {"layer": LAYER, **PATH}),
    Case("NeuronGradient", NEURON),
    Case("NeuronIntegratedGradients", NEURON | PATH),
    Case("NeuronGradientShap", NEURON | {"baselines": OTHERS}, draws=True),
    Case("NeuronGuidedBackprop", {"layer": "third", "neuron_selector": (1, 2, 2)}, rectified=True),
    Case("NeuronDeconvolution", {"layer": "third", "neuron_selector": (1, 2, 2)}, rectified=True),
    Case("NeuronConductance", NEURON | PATH),
    Case("NeuronFeatureAblation", NEURON | ABLATION),
    Case("DeepLift", {"baselines": OTHERS[:1]}),
    Case("DeepLiftShap", {"baselines": OTHERS}),
    Case("LayerDeepLift", {"layer": LAYER, "baselines": OTHERS[:1]}),
    Case("LayerDeepLiftShap", {"layer": LAYER, "baselines": OTHERS}),
    Case("NeuronDeepLift", NEURON | {"baselines": OTHERS[:1]}),
    Case("NeuronDeepLiftShap", NEURON | {"baselines": OTHERS}),
    Case("LayerLRP", {"layer": LAYER}),
    Case("LayerIntegratedGradients", {"layer": LAYER, **PATH}),
    Case("LayerGradientShap", {"layer": LAYER, "baselines": OTHERS}),
    Case("Occlusion", {"sliding_window_shapes": (2, 4, 4), "strides": (2, 4, 4)}),
    Case("FeaturePermutation", {"feature_mask": SEGMENTS}, draws=True),
    Case("ShapleyValueSampling", {"feature_mask": SEGMENTS, "n_samples": 2}),
    Case("ShapleyValues", ABLATION, single=True),
    Case("Lime", {"feature_mask": SEGMENTS, "n_samples": 5}),
    Case("KernelShap", {"feature_mask": SEGMENTS, "n_samples": 5}),
    Case("LayerFeatureAblation", {"layer": LAYER}),
    Case("LayerFeaturePermutation", {"layer": LAYER}),
    Case("LimeBase", runs=False),
    Case("DataLoaderAttribution", runs=False),
    Case("LLMAttribution", runs=False),
    Case("LLMGradientAttribution", runs=False),
    Case("RemoteLLMAttribution", runs=False),
)


def cases() -> list[Case]:
    """All of captum.attr: first what is accepted, in the order of the documentation."""
    classes = [value for value in vars(captum.attr).values() if isinstance(value, type) and issubclass(value, Attribution)]
    names = [kind.__name__ for kind in classes if kind.__name__ not in ABSTRACT]
    ordered = [*(name for name in ACCEPTED if name in names), *(name for name in names if name not in ACCEPTED)]
    known = {case.name: case for case in CASES}
    return [known.get(name, Case(name)) for name in ordered]


def network(case: Case) -> nn.Module:
    """The network that a case is measured on."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net(case.rectified).double().eval()


# Captum's


def captums(case: Case, model: nn.Module, create_graph: bool = False, x: Tensor = X, target: Tensor = TARGET) -> Tensor:
    """Captum's map, with the graph that it has, from the same draws each time.

    Args:
        case, model, x, target: of what.
        create_graph: its gradient functions are replaced by ones that keep a graph, where it has any to be replaced.
    """
    settings = dict(case.settings)
    built = [model, *([model.get_submodule(settings.pop("layer"))] if "layer" in settings else [])]
    if "attribution_method" in settings:
        built = [settings.pop("attribution_method")(model)]
    attribution = getattr(captum.attr, case.name)(*built)
    parameters = inspect.signature(attribution.attribute).parameters
    if "target" in parameters or "kwargs" in parameters:  # which are those of what it wraps
        settings["target"] = target
    if create_graph:
        _keep_graph(attribution)
        if "grad_kwargs" in parameters:
            settings["grad_kwargs"] = {"create_graph": True}
    state = np.random.get_state()
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        np.random.seed(0)
        found: Tensor = attribution.attribute(x.clone().requires_grad_(), **settings)
    np.random.set_state(state)
    return found


def _keep_graph(attribution: Any) -> None:
    for part in (attribution, *vars(attribution).values()):
        if isinstance(part, Attribution) and hasattr(part, "gradient_func"):
            part.gradient_func = gradients_with_graph


# Ours


def ours(case: Case) -> attrreg.MapRegularizer:
    """The same attribution, as a regularizer."""
    return attrreg.from_captum(getattr(captum.attr, case.name), objective=SquaredOutside(), **case.settings)


def penalty(case: Case, model: nn.Module) -> Tensor:
    """Our penalty, from the same draws each time."""
    return ours(case)(model, X, MASK, TARGET, generator=torch.Generator().manual_seed(0))


# Numbers


def judged(map: Tensor) -> Tensor:
    """The penalty of a map."""
    relevant = attrreg.masks.resize(MASK.unsqueeze(1).to(map.dtype), (map.shape[-2], map.shape[-1]))
    return SquaredOutside()(map, relevant).mean()


def gradient_error(model: nn.Module, value: Tensor, function: Callable[[], Tensor]) -> float:
    """How far a value's parameter gradient is from a function's central differences, relative to the largest of those."""
    parameters = list(model.parameters())
    found = torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True)
    generator = torch.Generator(torch.get_default_device()).manual_seed(2)
    got, want = [], []
    for parameter, gradient in zip(parameters, found, strict=True):
        direction = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        got.append(float((gradient * direction).sum()))
        want.append(_slope(function, parameter, direction))
    mine, theirs = (torch.tensor(values, dtype=torch.float64) for values in (got, want))
    return float((mine - theirs).abs().max() / theirs.abs().max())  # not Python's max, which may pass over what is no number


def _slope(function: Callable[[], Tensor], parameter: nn.Parameter, direction: Tensor) -> float:
    start, values = parameter.detach().clone(), []
    for sign in (1, -1):
        with torch.no_grad():
            parameter.copy_(start + sign * STEP * direction)
        values.append(float(function().detach()))
    with torch.no_grad():
        parameter.copy_(start)
    return (values[0] - values[1]) / (2 * STEP)


@dataclass(frozen=True)
class Result:
    """What was measured of one attribution.

    Attributes:
        value: our map's relative distance from Captum's; None where it is refused, or draws.
        gradient: our parameter gradient's error; None where it is refused.
        captums: the error of the graph that Captum's map has: None for no graph, or a message.
        mended: the same with `create_graph=True` wherever Captum lets it in.
    """

    case: Case
    value: float | None
    gradient: float | None
    captums: float | str | None
    mended: float | str | None


def check(case: Case) -> Result:
    """Measure one attribution."""
    model = network(case)
    if not case.runs:
        return Result(case, None, None, None, None)
    value = gradient = None
    if case.accepted:
        own = case.draws or case.single
        function = (lambda: penalty(case, model)) if own else (lambda: judged(captums(case, model)))
        gradient = gradient_error(model, penalty(case, model), function)
    if case.accepted and not case.draws:
        want = captums(case, model).detach()
        value = float((ours(case).attribute(model, X, TARGET) - want).norm() / want.norm())
    return Result(case, value, gradient, graph(case, False), graph(case, True))


def graph(case: Case, create_graph: bool) -> float | str | None:
    """The error of the graph of Captum's own map; None: it has none. An exception is given by its message."""
    model = network(case)
    try:
        map = captums(case, model, create_graph)
        if not map.requires_grad:
            return None
        return gradient_error(model, judged(map), lambda: judged(captums(case, model)))
    except (RuntimeError, AssertionError, TypeError, ImportError) as error:
        return str(error).splitlines()[0]
