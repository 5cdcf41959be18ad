"""Run by test_kernels under Triton's interpreter: each kernel against PyTorch's own double backward in float64."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from attrreg.ops import kernels

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "SILU": F.silu,
    "GELU": F.gelu,
    "TANH_GELU": lambda x: F.gelu(x, approximate="tanh"),
    "HARDSWISH": lambda x: x * F.relu6(x + 3) / 6,
}


def second(function: Callable[..., Tensor], inputs: list[Tensor], gy: Tensor, v: Tensor) -> list[Tensor]:
    """The derivatives of sum(v gx), gx the gradient of the first input, with respect to gy and all inputs."""
    wide, gy = [tensor.double().requires_grad_() for tensor in inputs], gy.double().requires_grad_()
    (gx,) = torch.autograd.grad(function(*wide), wide[0], gy, create_graph=True)
    return list(torch.autograd.grad(gx, [gy, *wide], v.double(), allow_unused=True, materialize_grads=True))


def check(name: str, found: Tensor, want: Tensor) -> None:
    tolerance = 1e-5 if found.dtype == torch.float32 else 1e-2
    torch.testing.assert_close(found.double(), want, rtol=tolerance, atol=tolerance * float(want.abs().max()), msg=lambda m: f"{name}: {m}")


def first(u: Tensor, xhat: Tensor, r: Tensor) -> Tensor:
    """r P(u), see `attrreg.ops.norm`."""
    axes = (0, *range(2, u.dim()))
    return (u - u.mean(axes, keepdim=True) - xhat * (u * xhat).mean(axes, keepdim=True)) * r


def main() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for name, function in ACTIVATIONS.items():
            x, gy, v = (3 * torch.randn(7, 300) for _ in range(3))
            x, gy, v = (tensor.to(dtype) for tensor in (x, gy, v))
            for part, found, want in zip(("gy", "x"), kernels.activation(name, v, gy, x), second(function, [x], gy, v), strict=True):
                check(f"{name} {dtype} {part}", found, want)
        for memory in (torch.contiguous_format, torch.channels_last, torch.channels_last_3d):
            sides = (3, 7, 5) if memory == torch.channels_last_3d else (11, 13)
            axes, along = (0, *range(2, 2 + len(sides))), (5, *[1] * len(sides))
            x, gy, v = (torch.randn(3, 5, *sides).to(dtype).to(memory_format=memory) for _ in range(3))
            g, mu, r = torch.rand(5) + 0.5, x.float().mean(axes), (x.float().var(axes, correction=0) + 1e-5).rsqrt()
            wants = second(lambda x, g: F.batch_norm(x, None, None, g, None, True), [x, g], gy, v)
            xhat = (x - mu.view(along)) * r.view(along)
            gx, d_gy = (g.view(along) * first(u.float(), xhat, r.view(along)) for u in (gy, v))
            v_xhat, gy_xhat = (v * xhat).sum(axes), (gy * xhat).sum(axes)
            d_gy, gx = (tensor.to(dtype).contiguous(memory_format=memory) for tensor in (d_gy, gx))
            found = kernels.batch_norm(x, d_gy, gx, mu, r, g, v_xhat, gy_xhat, wants[2].float())
            assert found.stride() == x.stride() and found.dtype == dtype
            check(f"batch norm {dtype} {memory}", found, wants[1])
    for shape, rows in (((5,), 3), ((64,), 1100), ((3, 100), 4)):
        x, gy, v, g = torch.randn(rows, *shape), torch.randn(rows, *shape), torch.randn(rows, *shape), torch.rand(shape)
        _, mu, r = torch.native_layer_norm(x, shape, g, None, 1e-5)
        wants = second(lambda x, g: F.layer_norm(x, g.shape, g), [x, g], gy, v)
        for weight in (g, torch.stack([g, -g], -1)[..., 0]):  # dense, or with others in between
            for part, found, wanted in zip(("gy", "x", "g"), kernels.layer_norm(v, gy, x, weight, mu, r), wants, strict=True):
                check(f"layer norm {shape} {part} {weight.stride()}", found, wanted)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
