"""Passes that are differentiated once: their faster operators have PyTorch's values, and leave nothing behind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils.parametrizations import spectral_norm
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils.checkpoint import checkpoint

from attrreg import ActivationDifference, GradCAM, baselines
from attrreg.ops import Phase, conv, once, operators
from tests.models import assert_close, batch, gradients
from tests.test_linear import always_onednn, needs_onednn

pytestmark = pytest.mark.cpu

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


class Squeeze(nn.Module):
    """Squeeze-and-excitation."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        weights: Tensor = x * self.up(F.silu(self.down(x.mean((2, 3), keepdim=True)))).sigmoid()
        return weights


class Block(nn.Module):
    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        self.checkpointed = checkpointed
        self.wide = nn.Conv2d(8, 8, 5, padding=2, groups=8, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.squeeze = Squeeze()

    def inside(self, x: Tensor) -> Tensor:
        result: Tensor = self.squeeze(F.silu(self.norm(self.wide(x))))
        return result

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = checkpoint(self.inside, x, use_reentrant=False) if self.checkpointed else self.inside(x)
        return result


class Net(nn.Module):
    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.blocks = nn.Sequential(Block(), Block(checkpointed), Block())
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.blocks(self.stem(x)).mean((2, 3)))
        return logits


@contextmanager
def counted() -> Iterator[list[tuple[int, ...]]]:
    """The weights of the convolutions that were ours."""
    ours: list[tuple[int, ...]] = []

    def applied(x: Tensor, w: Tensor, *rest: Any) -> Tensor:
        ours.append(tuple(w.shape))
        return original(x, w, *rest)

    original = conv._apply
    with patch.object(conv, "_apply", applied):
        yield ours


@contextmanager
def pytorch_alone() -> Iterator[None]:
    with patch.object(once, "_may_gain", lambda layer: False):
        yield


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize(
    "reg", [ActivationDifference("blocks.1", fill=baselines.Zero()), GradCAM(layer="blocks.2")], ids=["difference", "map"]
)
def test_gradients_are_pytorchs(reg: Any, dtype: torch.dtype, attached: bool, checkpointed: bool) -> None:
    model, (x, mask, target) = Net(checkpointed).to(dtype), batch(dtype=dtype)

    def step() -> list[Tensor]:
        model.blocks[1].norm.reset_running_stats()  # type: ignore[operator, union-attr]
        if not attached:
            return gradients(model, reg(model, x, mask, target=target))
        with reg.attach(model):
            logits = model(x)
            return gradients(model, F.cross_entropy(logits, target) + reg(model, x, mask, target=target))

    with counted() as ours:
        got = step()
    with counted() as none, pytorch_alone():
        want = step()
    assert_close(got, want, TOLERANCE[dtype])
    assert ours.count((8, 1, 5, 5)) > none.count((8, 1, 5, 5))
    assert ours.count((4, 8, 1, 1)) > none.count((4, 8, 1, 1))


class Perceptron(nn.Module):
    def __init__(self, checkpointed: bool) -> None:
        super().__init__()
        self.checkpointed = checkpointed
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.body = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.stem(x).flatten(2).transpose(1, 2)
        tokens = checkpoint(self.body, tokens, use_reentrant=False) if self.checkpointed else self.body(tokens)
        logits: Tensor = self.head(tokens.mean(1))
        return logits


@needs_onednn
@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("reg", [ActivationDifference(fill=baselines.Zero()), GradCAM(layer="body.2")], ids=["difference", "map"])
def test_linear_layers_are_onednns_where_mkl_is_slow(reg: Any, attached: bool, checkpointed: bool) -> None:
    model, (x, mask, target) = Perceptron(checkpointed), batch()

    def step() -> list[Tensor]:
        with reg.attach(model) if attached else nullcontext():
            return gradients(model, F.cross_entropy(model(x), target) + reg(model, x, mask, target=target))

    with always_onednn() as ours:
        got = step()
    with always_onednn() as none, pytorch_alone():
        want = step()
    assert_close(got, want, 1e-5)
    assert (len(ours) > len(none)) == (not checkpointed)  # a checkpointed block keeps PyTorch's


@needs_onednn
def test_multi_head_attention_is_of_onednns_products_where_mkl_is_slow() -> None:
    layer, x = nn.MultiheadAttention(8, 2, batch_first=True), torch.randn(2, 5, 8)
    with always_onednn() as ours, operators(layer, Phase(), False, False):
        got = layer(x, x, x)[0]
        assert not _get_current_function_mode_stack()
    assert len(ours) == 2  # the projections into it and out of it
    torch.testing.assert_close(got, layer(x, x, x)[0])


def test_layers_that_would_gain_nothing_keep_pytorchs_convolution() -> None:
    layers = [
        nn.Conv2d(8, 8, 3, padding=1, groups=8),  # PyTorch's weight gradients are fast
        nn.Conv2d(8, 8, 1, bias=False),
        nn.Conv2d(8, 8, 5, padding=2, groups=8, padding_mode="reflect"),
        nn.Conv2d(256, 256, 1),
    ]
    x = torch.randn(2, 8, 12, 12)
    with counted() as ours, operators(nn.ModuleList(layers), Phase(), False, False):
        for layer in layers[:3]:
            layer(x)
        layers[3](torch.randn(2, 256, 12, 12))
    assert ours == [(8, 1, 5, 5)]


@pytest.mark.parametrize("layer", [nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 5, padding=2, groups=8)])
def test_calls_by_name_and_mistakes_are_pytorchs(layer: nn.Conv2d) -> None:
    x = torch.randn(2, 8, 1, 1)
    with operators(layer, Phase(), False, False):
        torch.testing.assert_close(layer(input=x), layer(x))
        for arguments in ((), ("no tensor",)):
            with pytest.raises(TypeError, match=r"missing|invalid combination"):
                layer(*arguments)
        with pytest.raises(RuntimeError, match="to have 8 channels, but got 7"):
            layer(x[:, :7])


def test_autocast_and_strings_of_padding_and_images_alone_are_pytorchs() -> None:
    layer, wide = nn.Conv2d(8, 8, 5, padding="same", groups=8), nn.Conv2d(8, 8, 5, padding=2, groups=8)
    with counted() as ours, operators(nn.ModuleList([layer, wide]), Phase(), False, False):
        layer(torch.randn(2, 8, 6, 6))
        assert wide(torch.randn(8, 6, 6)).shape == (8, 6, 6)
        with torch.autocast("cpu"):
            assert wide(torch.randn(2, 8, 6, 6)).dtype == torch.bfloat16
    assert not ours


class Sees(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def test_modes_of_others_stay() -> None:
    model, x, sees = Net(), batch()[0], Sees()
    with sees, counted() as ours, operators(model, Phase(), False, False):
        model(x)
        assert _get_current_function_mode_stack() == [sees]
    assert ours
    assert F.linear in sees.seen


class Fails(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        raise ArithmeticError("from inside a layer")


@pytest.mark.parametrize("attached", [False, True])
def test_a_layer_that_fails_leaves_nothing(attached: bool) -> None:
    model, (x, mask, _) = Net(), batch()
    model.blocks[1].squeeze.up = Fails(4, 8, 1)  # type: ignore[union-attr]
    reg = ActivationDifference("blocks.2")
    with pytest.raises(ArithmeticError):
        if attached:
            with reg.attach(model):
                model(x)
        else:
            reg(model, x, mask)
    assert not _get_current_function_mode_stack()
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in model.modules())


def test_a_layer_whose_failure_the_model_catches_leaves_nothing_either() -> None:
    class Tries(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Fails(4, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            with pytest.raises(ArithmeticError):
                self.inner(x)
            assert not _get_current_function_mode_stack()  # what follows is PyTorch's
            return x

    model = Tries()
    with operators(model, Phase(), False, False):
        model(torch.randn(2, 4, 1, 1))


def test_layers_inside_layers() -> None:
    class Adapted(nn.Conv2d):
        def __init__(self) -> None:
            super().__init__(8, 8, 5, padding=2, groups=8)
            self.base = nn.Conv2d(8, 8, 5, padding=2, groups=8)

        def forward(self, input: Tensor) -> Tensor:
            result: Tensor = super().forward(input) + self.base(input)
            return result

    model, x = Adapted(), torch.randn(2, 8, 6, 6)
    with counted() as ours, operators(model, Phase(), False, False):
        got = model(x)
        assert not _get_current_function_mode_stack()
    assert len(ours) == 2
    torch.testing.assert_close(got, model(x))


def test_parametrized_weights_are_not_asked_for() -> None:
    model = spectral_norm(nn.Conv2d(8, 8, 5, padding=2, groups=8)).train()
    before = [buffer.clone() for buffer in model.buffers()]
    with operators(model, Phase(), False, False):
        pass
    for buffer, was in zip(model.buffers(), before, strict=True):
        torch.testing.assert_close(buffer, was, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # which PyTorch itself calls
@pytest.mark.parametrize("twice", [False, True])
def test_forward_mode_derivatives_inside_are_pytorchs(twice: bool) -> None:
    layer, x = nn.Conv2d(8, 8, 5, padding=2, groups=8), torch.randn(2, 8, 6, 6)

    def tangent() -> Any:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(F.silu(layer(forward_ad.make_dual(x, torch.ones_like(x))))).tangent

    want = tangent()
    with operators(layer, Phase(), twice, twice):
        torch.testing.assert_close(tangent(), want)


class Probed(nn.Module):
    """A frozen encoder, which PyTorch runs as a whole, between a stem and a head that only our operators differentiate twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), 2)
        self.head = nn.Sequential(nn.Linear(8, 8), nn.Hardsigmoid(), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.encoder(self.stem(x).flatten(2).mT).mean(1))
        return logits


def test_operators_that_start_inside_an_encoder_go_on_behind_it() -> None:
    model = Probed()
    model.stem.requires_grad_(False)
    model.encoder.requires_grad_(False).eval()
    x, mask = torch.rand(2, 3, 16, 16), torch.zeros(2, 16, 16)
    GradCAM("encoder.layers.0")(model, x, mask, torch.tensor([0, 1])).backward()
    assert model.head[0].weight.grad is not None and model.head[2].weight.grad is not None
