"""Networks of random layers under random sums, against plain autograd: what no test names one by one."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import timm.layers
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import attrreg
from attrreg import baselines
from attrreg.objectives import SquaredOutside
from attrreg.regularizer import AttributionRegularizer
from attrreg.scores import TargetLogit
from tests import oracles
from tests.models import assert_close, batch, flat, gradients, stir

Draw = Callable[[st.SearchStrategy[Any]], Any]
CLASSES = 4


class Residual(nn.Module):
    def __init__(self, body: nn.Module, how: str) -> None:
        super().__init__()
        self.body, self.how = body, how

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        if self.how == "in place":
            y += x
            return y
        if self.how == "gate":
            return x * torch.sigmoid(y)
        return x + y

    def extra_repr(self) -> str:
        return self.how


class Concatenated(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.body(x)], 1)


class Checkpointed(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(self.body, x, use_reentrant=False)
        return y


class Tokens(nn.Module):
    """A body that sees `(N, positions, C)`."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x.flatten(2).transpose(1, 2))
        return y.transpose(1, 2).reshape(x.shape)


class Attention(nn.Module):
    def __init__(self, channels: int, heads: int, how: str) -> None:
        super().__init__()
        self.qkv, self.heads, self.how = nn.Linear(channels, 3 * channels), heads, how

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, channels = x.shape
        q, k, v = self.qkv(x).reshape(n, tokens, 3, self.heads, channels // self.heads).permute(2, 0, 3, 1, 4)
        how: dict[str, Any] = {"causal": {"is_causal": True}, "mask": {"attn_mask": q[:, :, :, :1] - k[:, :, :, :1].transpose(-2, -1)}}
        y = F.scaled_dot_product_attention(q, k, v, **how.get(self.how, {}))
        return x + y.transpose(1, 2).reshape(x.shape)

    def extra_repr(self) -> str:
        return self.how


class Recurrent(nn.Module):
    def __init__(self, kind: Callable[..., nn.Module], channels: int) -> None:
        super().__init__()
        self.layer = kind(channels, channels // 2, batch_first=True, bidirectional=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)[0]
        return y


class ChannelsLastNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


ACTIVATIONS: list[Callable[[], nn.Module]] = [
    *(nn.ReLU, nn.ReLU6, nn.Hardswish, nn.Hardtanh, nn.LeakyReLU, nn.PReLU),
    *(nn.SiLU, nn.GELU, nn.ELU, nn.Mish, nn.Softplus, nn.Tanh, nn.Sigmoid),
    *(partial(kind, inplace=True) for kind in (nn.ReLU, nn.ReLU6, nn.Hardswish, nn.SiLU, nn.LeakyReLU)),
    partial(nn.GELU, "tanh"),
]
# Without nn.InstanceNorm2d: where an RNN follows, the gradient that PyTorch gives it is wrong (by finite differences; ours is right).
NORMS: list[Callable[[int], nn.Module]] = [
    nn.BatchNorm2d,
    partial(nn.BatchNorm2d, affine=False),
    partial(nn.BatchNorm2d, track_running_stats=False),
    partial(nn.GroupNorm, 2),
    partial(nn.GroupNorm, 1),
    ChannelsLastNorm,
    timm.layers.LayerNorm2d,
    timm.layers.RmsNorm2d,
    nn.Identity,
]
POOLS: list[Callable[[], nn.Module]] = [
    *(partial(nn.MaxPool2d, 2), partial(nn.MaxPool2d, 3, 2, 1), partial(nn.AvgPool2d, 2), partial(nn.AdaptiveMaxPool2d, 4)),
    partial(nn.Upsample, scale_factor=0.5, mode="bilinear"),
]


def some(draw: Draw, *choices: Any) -> Any:
    return draw(st.sampled_from(choices))


def convolution(draw: Draw, channels: int, out: int, stride: int = 1) -> nn.Module:
    """With the output's side that of the images over the stride."""
    kernel, groups = some(draw, 1, 3, 5), some(draw, 1, 1, channels, channels // 2 if channels % 2 == 0 else 1)
    dilation = 2 if kernel == 3 and draw(st.booleans()) else 1
    settings: dict[str, Any] = {"stride": stride, "groups": groups, "bias": draw(st.booleans()), "dilation": dilation}
    layer = nn.Conv2d(channels, out if out % groups == 0 else channels, kernel, padding=dilation * (kernel // 2), **settings)
    layers = [layer] if layer.out_channels == out else [layer, nn.Conv2d(layer.out_channels, out, 1)]
    if draw(st.booleans()):
        layers[0] = nn.utils.parametrizations.weight_norm(layer)
    return nn.Sequential(*layers)


def tokens(draw: Draw, channels: int) -> nn.Module:
    kind = some(draw, "attention", "perceptron", "recurrent", "multi-head")
    if kind == "attention":
        mixer: nn.Module = Attention(channels, some(draw, 1, 2), some(draw, "plain", "causal", "mask"))
    elif kind == "perceptron":
        mixer = nn.Sequential(nn.Linear(channels, 2 * channels), some(draw, *ACTIVATIONS)(), nn.Linear(2 * channels, channels))
    elif kind == "recurrent":
        mixer = Recurrent(some(draw, nn.LSTM, nn.GRU), channels)
    else:
        mixer = nn.TransformerEncoderLayer(channels, 2, 2 * channels, some(draw, 0.0, 0.1), batch_first=True)
    return Tokens(nn.Sequential(some(draw, nn.LayerNorm, nn.RMSNorm, nn.Identity)(channels), mixer))


def body(draw: Draw, channels: int, depth: int = 0) -> nn.Module:
    """Layers that keep the shape."""
    kind = some(
        draw, "convolution", "norm", "activation", "dropout", "tokens", "transposed", *(["residual", "checkpoint", "several"][: 3 - depth])
    )
    inner = partial(body, draw, channels, depth + 1)
    if kind == "convolution":
        return convolution(draw, channels, channels)
    if kind == "norm":
        return some(draw, *NORMS)(channels)  # type: ignore[no-any-return]
    if kind == "activation":
        return some(draw, *ACTIVATIONS)()  # type: ignore[no-any-return]
    if kind == "dropout":
        return some(draw, nn.Dropout, nn.Dropout2d, timm.layers.DropPath)(0.2)  # type: ignore[no-any-return]
    if kind == "tokens":
        return tokens(draw, channels)
    if kind == "transposed":
        return nn.Sequential(nn.ConvTranspose2d(channels, channels, 2, 2, groups=some(draw, 1, 2)), nn.AvgPool2d(2))
    if kind == "residual":
        return Residual(inner(), some(draw, "sum", "in place", "gate"))
    if kind == "checkpoint":
        return Checkpointed(inner())
    return nn.Sequential(convolution(draw, channels, channels), some(draw, *NORMS)(channels), some(draw, *ACTIVATIONS)(), inner())


@dataclass
class Case:
    net: nn.Module
    size: int
    training: bool
    channels_last: bool
    layer: str
    terms: tuple[str, ...]


@st.composite
def cases(draw: Draw) -> Case:
    torch.manual_seed(0)
    size, channels, stride = some(draw, 12, 16), some(draw, 4, 8, 16), some(draw, 1, 2)
    blocks, side = [convolution(draw, 3, channels, stride)], size // stride
    for _ in range(draw(st.integers(1, 4))):
        kind = some(draw, "body", "body", "body", "wider", "pool", "concatenated")
        if kind == "pool" and side >= 6:
            blocks.append(some(draw, *POOLS)())
            side = 4 if isinstance(blocks[-1], nn.AdaptiveMaxPool2d) else side // 2
        elif kind == "wider":
            out = some(draw, 4, 8, 16)
            blocks.append(convolution(draw, channels, out))
            channels = out
        elif kind == "concatenated" and channels <= 8:
            blocks.append(Concatenated(nn.Sequential(convolution(draw, channels, channels), some(draw, *ACTIVATIONS)())))
            channels *= 2
        else:
            blocks.append(body(draw, channels))
    head = nn.Sequential(
        some(draw, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)(1), nn.Flatten(), nn.Dropout(0.1), nn.Linear(channels, CLASSES)
    )
    net = nn.Sequential(nn.Sequential(*blocks), head).double()
    stir(net, 0.02)
    terms = draw(st.lists(st.sampled_from(sorted(TERMS)), min_size=1, max_size=3, unique=True))
    layer = f"0.{draw(st.integers(0, len(blocks) - 1))}"
    return Case(net, size, draw(st.booleans()), draw(st.booleans()), layer, tuple(terms))


SETTINGS: dict[str, Any] = {"score": TargetLogit(), "objective": SquaredOutside()}
TERMS: dict[str, Callable[[str], AttributionRegularizer]] = {
    "input gradient": lambda layer: attrreg.InputGradient(**SETTINGS),
    "path": lambda layer: attrreg.IntegratedGradients(3, chunk=None, **SETTINGS),
    "path in chunks": lambda layer: 0.5 * attrreg.IntegratedGradients(3, chunk=2, **SETTINGS).named("chunks"),
    "grad-cam": lambda layer: attrreg.GradCAM(layer, **SETTINGS),
    "difference": lambda layer: 2 * attrreg.ActivationDifference(layer, fill=baselines.Zero()),
}


def expected(term: str, case: Case, x: Tensor, mask: Tensor, target: Tensor) -> Tensor:
    """A term's penalty, each forward from the same generator state."""

    def same_draws(module: nn.Module, args: Any) -> None:
        torch.manual_seed(1)

    relevant = mask.unsqueeze(1).to(x.dtype)
    with case.net.register_forward_pre_hook(same_draws):
        if term == "difference":
            return 2 * oracles.activation_difference(case.net, x, relevant * x, case.layer).mean()
        if term == "grad-cam":
            map = oracles.grad_cam(case.net, x, target, oracles.score_target_logit, case.layer)
            relevant = F.adaptive_avg_pool2d(relevant, (map.shape[2], map.shape[3]))
        elif term == "input gradient":
            map = oracles.input_gradient(case.net, x, target, oracles.score_target_logit)
        else:
            map = oracles.integrated_gradients(case.net, x, target, oracles.score_target_logit, 3)
    return (0.5 if term == "path in chunks" else 1.0) * oracles.squared_outside(map, relevant).mean()


def check(case: Case) -> None:
    x, mask, target = batch(3, size=case.size, classes=CLASSES, dtype=torch.float64)
    format = torch.channels_last if case.channels_last else torch.contiguous_format
    net, x = case.net.train(case.training).to(memory_format=format), x.to(memory_format=format)
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    try:
        with sdpa_kernel(SDPBackend.MATH):
            total = torch.stack([expected(term, case, x, mask, target) for term in case.terms]).sum()
            want = [total, *gradients(net, total)]
    except RuntimeError:  # PyTorch refuses the network: something was written over that a derivative needs
        reject()
    if not 1e-8 < float(flat(want[1:]).abs().max()) < math.inf:  # NaN where there is one
        reject()  # no image gets through, or one is dropped in both passes: a distance of zero, whose root the oracle cannot differentiate
    regularizer = sum((TERMS[term](case.layer) for term in case.terms[1:]), start=TERMS[case.terms[0]](case.layer))
    for attached in (False, True):
        net.load_state_dict(before, strict=False)
        torch.manual_seed(1)
        with regularizer.attach(net) if attached else nullcontext():
            if attached:
                net(x)
            penalty = regularizer(net, x, mask, target)
        assert_close([penalty, *gradients(net, penalty)], want, 1e-7)


@given(cases())
@settings(deadline=None, max_examples=60, derandomize=True, suppress_health_check=list(HealthCheck))
def test_penalties_of_random_networks_are_plain_autograds(case: Case) -> None:
    check(case)


@pytest.mark.slow
@given(cases())
@settings(deadline=None, max_examples=1000, suppress_health_check=list(HealthCheck))
def test_penalties_of_many_random_networks_are_plain_autograds(case: Case) -> None:
    check(case)
