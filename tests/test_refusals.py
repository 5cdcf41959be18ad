"""What PyTorch's operators refuse, ours leave to them, with PyTorch's own words; what PyTorch takes, they take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attrreg
from attrreg.ops import Phase, operators, twice_differentiable

R, ONES = torch.randn, torch.ones
H = R(4, 16, 8, 8)
LAST = H.to(memory_format=torch.channels_last)
Operator = Callable[[], Tensor]


def G(*shape: int) -> Tensor:
    """As of a model in training: distances of others are left to PyTorch at once."""
    return torch.randn(*shape, requires_grad=True)


def slope(function: Callable[[Tensor], Tensor]) -> Tensor:
    """The first derivative: some refuse there."""
    leaf = H.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(function(1 * leaf).sum(), leaf)
    return gradient


REFUSED: dict[str, Operator] = {
    "conv2d of two axes": lambda: F.conv2d(R(8, 8), R(4, 1, 3, 3)),
    "conv2d of one axis": lambda: F.conv2d(R(8), R(4, 1, 1, 1)),
    "conv1d of one axis": lambda: F.conv1d(R(8), R(4, 1, 3)),
    "conv2d of five axes": lambda: F.conv2d(R(2, 16, 8, 8, 8), R(4, 16, 3, 3)),
    "conv2d, other channels": lambda: F.conv2d(H, R(4, 15, 3, 3)),
    "1x1, other channels": lambda: F.conv2d(H, R(4, 15, 1, 1)),
    "1x1 of one position, other channels": lambda: F.conv2d(H[:, :, :1, :1], R(4, 15, 1, 1)),
    "patches, other channels": lambda: F.conv2d(H, R(4, 15, 4, 4), stride=4),
    "patches larger than the image": lambda: F.conv2d(H, R(4, 16, 16, 16), stride=16),  # of none the mean would be a penalty of zero
    "patches larger along one axis": lambda: F.conv2d(H, R(4, 16, 2, 16), stride=(2, 16)),
    "conv2d larger than the image": lambda: F.conv2d(H, R(4, 16, 9, 9)),
    "1x1, bias of one": lambda: F.conv2d(H, R(4, 16, 1, 1), R(1)),
    "patches, bias of one": lambda: F.conv2d(H, R(4, 16, 2, 2), R(1), stride=2),
    "1x1, another type of bias": lambda: F.conv2d(H, R(4, 16, 1, 1), R(4).double()),
    "conv2d, stride 0": lambda: F.conv2d(H, R(4, 16, 3, 3), stride=0),
    "conv2d, three strides": lambda: F.conv2d(H, R(4, 16, 3, 3), stride=(1, 1, 1)),
    "1x1, dilation 0": lambda: F.conv2d(H, R(4, 16, 1, 1), dilation=0),
    "conv2d, negative padding": lambda: F.conv2d(H, R(4, 16, 1, 1), padding=-1),
    "conv2d, unknown padding": lambda: F.conv2d(H, R(4, 16, 3, 3), padding="foo"),
    "conv2d, stride with same": lambda: F.conv2d(H, R(4, 16, 3, 3), stride=2, padding="same"),
    "conv2d of rows": lambda: F.conv2d(H[0], R(4, 8, 3)),
    "conv1d of images": lambda: F.conv1d(H, R(4, 16, 3, 3)),
    "conv3d of images": lambda: F.conv3d(H, R(4, 16, 1, 1)),
    "conv_transpose1d of images": lambda: F.conv_transpose1d(H, R(16, 4, 2, 2)),
    "conv2d, groups do not divide": lambda: F.conv2d(H, R(4, 16, 3, 3), groups=3),
    "conv_transpose2d of two axes": lambda: F.conv_transpose2d(R(8, 8), R(1, 4, 2, 2)),
    "conv_transpose2d, other channels": lambda: F.conv_transpose2d(H, R(15, 4, 2, 2)),
    "conv_transpose2d, too much output padding": lambda: F.conv_transpose2d(H, R(16, 4, 2, 2), output_padding=1),
    "batch_norm of other statistics": lambda: F.batch_norm(H, torch.zeros(1), ONES(1)),
    "batch_norm of other weights": lambda: F.batch_norm(H, torch.zeros(16), ONES(16), ONES(1)),
    "batch_norm, eps 0": lambda: F.batch_norm(H, None, None, training=True, eps=0.0),
    "batch_norm in eval mode, negative eps": lambda: F.batch_norm(H, torch.zeros(16), ONES(16), eps=-1.0),
    "batch_norm of one value a channel": lambda: F.batch_norm(H[:1, :, :1, :1], None, None, training=True),
    "batch_norm, mean alone": lambda: F.batch_norm(H, torch.zeros(16), None),
    "batch_norm in eval mode without statistics": lambda: F.batch_norm(H, None, None),
    "batch_norm in eval mode, another type of statistics": lambda: F.batch_norm(H, torch.zeros(16).double(), ONES(16).double()),
    "batch_norm of one axis": lambda: F.batch_norm(R(8), None, None, training=True),
    "batch_norm of integers": lambda: F.batch_norm(H.long(), torch.zeros(16), ONES(16)),
    "layer_norm of integers": lambda: F.layer_norm(H.long(), (8,)),
    "layer_norm, a number for a shape": lambda: F.layer_norm(H, 8),  # type: ignore[arg-type]
    "layer_norm, another shape": lambda: F.layer_norm(H, (7,)),
    "rms_norm, another shape": lambda: F.rms_norm(H, (1,)),
    "rms_norm, another weight": lambda: F.rms_norm(H, (8, 8), ONES(8)),
    "rms_norm of nothing": lambda: F.rms_norm(H, ()),
    "rms_norm, a number for a shape": lambda: F.rms_norm(H, 8),  # type: ignore[arg-type]
    "group_norm of one axis": lambda: F.group_norm(R(8), 1),
    "group_norm of one value": lambda: F.group_norm(R(1, 4, 1, 1), 4),
    "group_norm, groups do not divide": lambda: F.group_norm(H, 3),
    "group_norm, weight of one": lambda: F.group_norm(R(4, 16), 4, ONES(1)),
    "group_norm, another type of weights": lambda: F.group_norm(H.double(), 4, ONES(16), ONES(16)),
    "instance_norm of one position": lambda: F.instance_norm(H[:, :, :1, :1]),  # of which all would be zero
    "instance_norm by no statistics": lambda: F.instance_norm(H, use_input_stats=False),
    "instance_norm of one axis": lambda: F.instance_norm(R(8)),
    "instance_norm, variance alone": lambda: F.instance_norm(H, None, ONES(16)),
    "cdist, other columns": lambda: torch.cdist(G(3, 5), G(4, 1)),
    "cdist of one axis": lambda: torch.cdist(G(5), G(4, 5)),
    "cdist, negative p": lambda: torch.cdist(G(3, 5), G(4, 5), p=-1),
    "cdist, unknown mode": lambda: torch.cdist(G(3, 5), G(4, 5), compute_mode="fast"),
    "cdist of two types": lambda: torch.cdist(G(3, 5), G(4, 5).double()),
    "gelu, unknown approximation": lambda: F.gelu(H, approximate="cubic"),
    "linalg.norm, fro of four axes": lambda: torch.linalg.norm(H, "fro"),
    "linalg.norm, fro of one axis": lambda: torch.linalg.norm(H, "fro", dim=1),
    "linalg.norm of three axes": lambda: torch.linalg.norm(H, dim=(1, 2, 3)),
    "norm, fro of three axes": lambda: torch.norm(H, "fro", (1, 2, 3)),
    "matrix_norm in a narrower type": lambda: torch.linalg.matrix_norm(H.double(), dtype=torch.float32),
    "vector_norm in a narrower type": lambda: torch.linalg.vector_norm(H.double(), dtype=torch.float32),
    "vector_norm in a complex type": lambda: torch.linalg.vector_norm(H, dtype=torch.complex64),
    "leaky_relu in place, steeper below": lambda: slope(lambda x: F.leaky_relu(x, -0.3, inplace=True)),
    "hardtanh, a bound to train": lambda: F.hardtanh(H, torch.tensor(-1.0, requires_grad=True), 1.0),  # type: ignore[arg-type]
    "hardtanh, an upper bound to train": lambda: F.hardtanh(H, -1.0, torch.tensor(1.0, requires_grad=True)),  # type: ignore[arg-type]
    "leaky_relu, a slope to train": lambda: F.leaky_relu(H, torch.tensor(0.1, requires_grad=True)),  # type: ignore[arg-type]
    "cat along no axis": lambda: torch.cat([H, H], 7),
    "cat of numbers": lambda: torch.cat([H.sum(), H.sum()]),
}
TAKEN: dict[str, Operator] = {
    "group_norm, wide weights": lambda: F.group_norm(H.bfloat16(), 4, ONES(16), ONES(16)),
    "group_norm, wide weights, channels last": lambda: F.group_norm(
        H.bfloat16().to(memory_format=torch.channels_last), 4, ONES(16), ONES(16)
    ),
    "cdist of no columns": lambda: torch.cdist(G(3, 0), G(4, 0), p=float("inf")),
    "attention of no width": lambda: F.scaled_dot_product_attention(H[..., :0], H[..., :0], H),
    "attention, half with a wide mask": lambda: F.scaled_dot_product_attention(H.half(), H.half(), H.half(), R(8, 8)),
    "norm of three axes, by default": lambda: torch.norm(H, None, (1, 2, 3)),
    "norm of complex numbers": lambda: torch.norm(torch.complex(H, H.sin()), dim=1),
    "normalize of complex numbers": lambda: F.normalize(torch.complex(H, H.sin())),
    "normalize of zeros by less than a square has room for": lambda: F.normalize(0 * H, eps=1e-30),
    "normalize, an eps for each": lambda: F.normalize(H, eps=ONES(4, 1, 8, 8)),  # type: ignore[arg-type]
    "linear, weight of one axis": lambda: F.linear(H, R(8)),
    "batch_norm, eps 0": lambda: F.batch_norm(H, torch.zeros(16), ONES(16), eps=0.0),
    "batch_norm in eval mode, half": lambda: F.batch_norm(H.bfloat16(), torch.zeros(16), ONES(16)),
    "batch_norm in eval mode, half, with a weight to train": lambda: F.batch_norm(H.bfloat16(), torch.zeros(16), ONES(16), G(16)),
    "conv2d of no images": lambda: F.conv2d(H[:0], R(4, 16, 3, 3)),
    "conv2d, same padding": lambda: F.conv2d(H, R(4, 16, 3, 3), padding="same", dilation=2),
    "conv2d of one image": lambda: F.conv2d(H[0], R(4, 16, 1, 1), R(4)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    with pytest.raises((RuntimeError, TypeError, ValueError, IndexError, NotImplementedError)) as plain:
        REFUSED[name]()
    for context in (twice_differentiable(Phase()), operators(nn.Conv2d(1, 1, 1), Phase(), twice=True, at_once=True)):
        with context, pytest.raises(plain.type) as ours:
            REFUSED[name]()
        assert str(ours.value).split("[")[0] == str(plain.value).split("[")[0]


CPUS = ("group_norm, wide weights", "group_norm, wide weights, channels last")  # CUDA's has no mixed types


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.cpu if name in CPUS else ()) for name in TAKEN])
def test_taken(name: str) -> None:
    want = TAKEN[name]()
    torch.manual_seed(0)
    with twice_differentiable(Phase()):
        found = TAKEN[name]()
    assert found.dtype == want.dtype and found.stride() == want.stride()
    rtol, atol = {torch.float16: (0.01, 0.01), torch.bfloat16: (0.016, 1e-5)}.get(found.dtype, (1e-5, 1e-5))
    torch.testing.assert_close(found, want, rtol=rtol, atol=atol)


class Mixed(nn.Module):
    """In half precision, with its norm in float32."""

    def __init__(self, narrow: torch.dtype) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Conv2d(3, 8, 3).to(narrow), nn.GroupNorm(2, 8), nn.Conv2d(8, 4, 3).to(narrow)
        self.narrow = narrow

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x.to(self.narrow)))).mean((2, 3)).float()  # type: ignore[no-any-return]


@pytest.mark.cpu
@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_a_norm_in_float32_between_half_layers(narrow: torch.dtype) -> None:
    model, x, target = Mixed(narrow), R(2, 3, 12, 12), torch.tensor([0, 1])
    logits = model(x)
    with attrreg.InputGradient().attach(model):
        torch.testing.assert_close(model(x), logits, rtol=0.02, atol=0.02)
        value = attrreg.InputGradient()(model, x, torch.zeros(2, 12, 12), target)
    assert value.isfinite() and value > 0


@pytest.mark.parametrize("setting", [{"stride": 2.5}, {"padding": 0.9}, {"dilation": 1.5}])
def test_numbers_that_are_no_integers_are_refused(setting: Any) -> None:
    with twice_differentiable(Phase()), pytest.raises(TypeError):
        F.conv2d(H, R(4, 16, 3, 3), **setting)
