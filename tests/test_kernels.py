"""The kernels for CUDA, on the CPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from attrreg.ops import Phase, fused, twice_differentiable


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_kernels_equal_pytorchs_double_backward() -> None:
    # In a process of its own: Triton decides when it is imported whether it interprets.
    run = subprocess.run(
        [sys.executable, "-m", "tests.interpreted"], env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr


def test_the_cpu_goes_without() -> None:
    assert fused.kernels(torch.ones(3, device="cpu")) is None


class _OnCuda(TorchDispatchMode):
    """Refuses what CUDA's kernel fails on, and the CPU's does not."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.native_batch_norm_backward.default:
            weight, asked = args[2], args[-1]
            assert weight is not None or not (asked[0] and any(asked[1:])), "gradients of weights that there are none of"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("norm", [nn.LayerNorm((4, 6, 6)), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4), nn.BatchNorm2d(4)])
def test_second_derivatives_of_norms_ask_for_nothing_that_cudas_kernels_fail_on(norm: nn.Module) -> None:
    x = torch.randn(3, 4, 6, 6, requires_grad=True)
    with _OnCuda():
        with twice_differentiable(Phase()):
            y = norm(x)
        (gradient,) = torch.autograd.grad(y.sin().sum(), x, create_graph=True)
        gradient.square().sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("there", [False, True])
def test_cuda_goes_without_kernels_that_cannot_be_imported(there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if there else None)
    monkeypatch.setitem(sys.modules, "attrreg.ops.kernels", None)  # as if importing it failed
    fused._kernels.cache_clear()
    with pytest.warns(RuntimeWarning, match="Triton kernels do not run on cuda.*exact") if there else nullcontext():
        assert fused._kernels(torch.device("cuda"), torch.float32) is None
    fused._kernels.cache_clear()


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("type", ["fp32", "bf16"])
def test_kernels_compile_for_cuda(type: str) -> None:
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from attrreg.ops import kernels

    images, values, number = f"*{type}", "*fp32", "i32"
    tensors = dict.fromkeys(("v", "gy", "x", "d_gy", "d_x"), images)
    planes = dict.fromkeys(("x", "u", "gx", "out"), images) | dict.fromkeys(("mu", "r", "g", "v_xhat", "gy_xhat", "d_g"), values)
    rows = dict.fromkeys(("v", "gy", "x", "g", "mu", "r", "d_gy", "d_x", "d_g"), values)
    sources: list[Any] = [
        (kernels._activation, tensors, ("count",), {"KIND": kind, "BLOCK": kernels.BLOCK}) for kind in kernels.ACTIVATIONS
    ]
    sources.append((kernels._batch_norm, planes, ("size", "channels", "inner", "count"), {"BLOCK": kernels.BLOCK}))
    sources.append((kernels._layer_norm, rows, ("rows", "count"), {"BLOCK": 1024}))
    for function, pointers, numbers, constants in sources:
        signature = {**pointers, **dict.fromkeys(numbers, number), **dict.fromkeys(constants, "constexpr")}
        assert "cubin" in compile(ASTSource(function, signature, constants), GPUTarget("cuda", 90, 32)).asm
