"""Second derivatives that CUDA computes in one pass over memory, by Triton.

What they replace are chains of PyTorch's operators, each of which reads and writes whole tensors. The chains stay: for the CPU, for types
wider than float32, and where there is no Triton or no C compiler for it. Sums are in float32, whatever type is stored.
Imported by `attrreg.ops.fused` alone, on the first use on CUDA.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
MAX_ROW = 8192  # values that one program can hold
MAX_PROGRAMS = 1024  # programs for rows, each of which leaves one partial sum for the scale
ACTIVATIONS = ("SILU", "GELU", "TANH_GELU", "HARDSWISH")


@triton.jit  # type: ignore[untyped-decorator]
def _batch_norm(x, u, gx, out, mu, r, g, v_xhat, gy_xhat, d_g, size, channels, inner, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    channel = (at // inner) % channels
    deviation = tl.load(r + channel, inside)
    q = -deviation / count
    slope = q * deviation * tl.load(g + channel, inside) * tl.load(d_g + channel, inside)
    value = (tl.load(x + at, inside).to(tl.float32) - tl.load(mu + channel, inside)) * slope
    value += tl.load(u + at, inside).to(tl.float32) * (q * tl.load(gy_xhat + channel, inside))
    value += tl.load(gx + at, inside).to(tl.float32) * (q * tl.load(v_xhat + channel, inside))
    tl.store(out + at, value.to(out.dtype.element_ty), inside)


def batch_norm(
    x: Tensor, d_gy: Tensor, gx: Tensor, mu: Tensor, r: Tensor, g: Tensor, v_xhat: Tensor, gy_xhat: Tensor, d_g: Tensor
) -> Tensor:
    """The second-order gradient of x of batch normalisation (see `batch_norm`) from those of gy and g; `(N, C, ...)`, laid out alike."""
    out, size, channels = torch.empty_like(x), x.numel(), x.shape[1]
    inner = x[0, 0].numel() if x.is_contiguous() else 1
    with _on(x):
        grid = (triton.cdiv(size, BLOCK),)
        _batch_norm[grid](x, d_gy, gx, out, mu, r, g, v_xhat, gy_xhat, d_g, size, channels, inner, size // channels, BLOCK=BLOCK)
    return out


@triton.jit
def _sigmoid(x):  # type: ignore[no-untyped-def]
    return 1 / (1 + tl.exp(-x))


@triton.jit  # type: ignore[untyped-decorator]
def _activation(v, gy, x, d_gy, d_x, count, KIND: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    a, b, z = tl.load(v + at, inside).to(tl.float32), tl.load(gy + at, inside).to(tl.float32), tl.load(x + at, inside).to(tl.float32)
    if KIND == "SILU":
        s = _sigmoid(z)
        slope = s * (1 + z * (1 - s))
        curvature = s * (1 - s) * (2 + z * (1 - 2 * s))
    elif KIND == "GELU":
        density = tl.exp(-0.5 * z * z) * 0.3989422804014327
        slope = 0.5 * (1 + tl.erf(z * 0.7071067811865476)) + z * density
        curvature = density * (2 - z * z)
    elif KIND == "TANH_GELU":  # see `activation`
        k: tl.constexpr = 0.7978845608028654
        c: tl.constexpr = 0.044715
        z = tl.where(z > 64, 64.0, tl.where(z < -64, -64.0, z))
        t = 2 * _sigmoid(2 * k * (z + c * z * z * z)) - 1
        first = k * (1 + 3 * c * z * z)
        inner = 1 - t * t
        slope = 0.5 * (1 + t) + 0.5 * z * inner * first
        curvature = inner * (first + 0.5 * z * (6 * k * c * z - 2 * t * first * first))
    else:
        tl.static_assert(KIND == "HARDSWISH")
        between = (z > -3) & (z < 3)
        slope = tl.where(between, z / 3 + 0.5, tl.where(z >= 3, 1.0, 0.0))
        curvature = tl.where(between, 1.0 / 3, 0.0)
    tl.store(d_gy + at, (a * slope).to(d_gy.dtype.element_ty), inside)
    tl.store(d_x + at, (a * b * curvature).to(d_x.dtype.element_ty), inside)


def activation(kind: str, v: Tensor, gy: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """v f'(x) and v gy f''(x) of one of `ACTIVATIONS`, of tensors laid out alike."""
    d_gy, d_x, count = torch.empty_like(v), torch.empty_like(x), x.numel()
    with _on(x):
        _activation[(triton.cdiv(count, BLOCK),)](v, gy, x, d_gy, d_x, count, KIND=kind, BLOCK=BLOCK)
    return d_gy, d_x


@triton.jit  # type: ignore[untyped-decorator]
def _layer_norm(v, gy, x, g, mu, r, d_gy, d_x, d_g, rows, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    column = tl.arange(0, BLOCK)
    inside = column < count
    scale = tl.load(g + column, inside, other=0.0)
    total = tl.zeros([BLOCK], tl.float32)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        at = row * count + column
        mean, deviation = tl.load(mu + row), tl.load(r + row)
        a, b = tl.load(v + at, inside, other=0.0), tl.load(gy + at, inside, other=0.0)
        xhat = tl.where(inside, (tl.load(x + at, inside, other=0.0) - mean) * deviation, 0.0)
        scaled = b * scale
        b_xhat, a_xhat = tl.sum(scaled * xhat) / count, tl.sum(a * xhat) / count
        gx = (scaled - tl.sum(scaled) / count - xhat * b_xhat) * deviation
        rpv = tl.where(inside, (a - tl.sum(a) / count - xhat * a_xhat) * deviation, 0.0)
        mean_phi = tl.sum(scaled * rpv) / count
        tl.store(d_gy + at, scale * rpv, inside)
        tl.store(d_x + at, -deviation * (b_xhat * rpv + a_xhat * gx + mean_phi * xhat), inside)
        total += b * rpv
    tl.store(d_g + tl.program_id(0) * count + column, total, inside)


def layer_norm(v: Tensor, gy: Tensor, x: Tensor, g: Tensor, mu: Tensor, r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The second-order gradients of gy, x and g of layer normalisation (see `norm`). Contiguous tensors, each row of g's shape."""
    count, g = g.numel(), g.contiguous()  # which the kernel reads in order
    lines = x.numel() // count
    programs = min(lines, MAX_PROGRAMS)
    d_gy, d_x, d_g = torch.empty_like(v), torch.empty_like(x), g.new_empty(programs, count)
    size = triton.next_power_of_2(count)
    with _on(x):
        _layer_norm[(programs,)](v, gy, x, g, mu, r, d_gy, d_x, d_g, lines, count, BLOCK=size, num_warps=8 if size > 2048 else 4)
    return d_gy, d_x, d_g.sum(0).view(g.shape)


def _on(x: Tensor) -> Any:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(x.device if x.is_cuda else -1)
