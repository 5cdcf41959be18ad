"""Wrapped models: compiled, data parallel."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from attrreg.walk import modules


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside `torch.compile`, `DataParallel` and `DistributedDataParallel`: the one whose layers have the names.

    Raises:
        TypeError: it is TorchScript.
    """
    while True:
        model = undistributed(model)
        if isinstance(model, torch.jit.ScriptModule):
            raise TypeError(
                "The model is a TorchScript module, in which neither layers nor operators can be reached. Pass the module that it was "
                "made from."
            )
        inner = model._modules.get("_orig_mod")  # of torch._dynamo.OptimizedModule
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def data_parallel(model: nn.Module) -> DistributedDataParallel | None:
    """The `DistributedDataParallel` of a model: in what was passed, or the one inside whose forward the model is called."""
    for module in modules(model):  # the model itself, or what another wrapper holds
        if isinstance(module, DistributedDataParallel):
            return module
    active = DistributedDataParallel._get_active_ddp_module()
    return active if active is not None and any(module is model for module in modules(active)) else None


def undistributed(model: nn.Module) -> nn.Module:
    """The module inside data-parallel wrappers; it may be a compiled one."""
    while isinstance(model, (DataParallel, DistributedDataParallel)):
        model = model.module
    return model


def on_one_device(model: nn.Module) -> nn.Module:
    """The module inside `DataParallel` over several devices, whose replicas would each run the hooks, and none our operators."""
    while isinstance(model, DataParallel) and len(model.device_ids) > 1:
        model = model.module
    return model


def compiled(model: nn.Module) -> bool:
    """Whether any part of a model is compiled, by `torch.compile(module)` or `module.compile()`, or the forward of the whole."""
    forward = vars(undistributed(model)).get("forward")
    # `torch.compiler.disable` sets the first of these attributes too, and is told by the second.
    if hasattr(forward, "_torchdynamo_orig_callable") and not hasattr(forward, "_torchdynamo_disable"):
        return True
    return any("_orig_mod" in module._modules or module._compiled_call_impl is not None for module in modules(model))


def compiling() -> bool:
    """Whether this is called by code under `torch.compile`: while it is traced, or between two graphs."""
    return torch.compiler.is_compiling() or torch._C._dynamo.eval_frame.get_eval_frame_callback() not in (None, False)


# Kept out of the trace, so that it raises in plain Python. torch.compiler.disable does the same, but imports the compiler.
@torch._disable_dynamo  # type: ignore[attr-defined]
def refuse_compiling() -> None:
    """Refuse to be part of a compiled function."""
    raise RuntimeError(
        "attrreg is called inside a function under torch.compile, whose graphs PyTorch cannot differentiate twice (pytorch#91469). Compile "
        "the model, or a function of the forward and the task's loss alone, and call the penalty outside."
    )


def eager(model: nn.Module) -> AbstractContextManager[object]:
    """Run compiled parts as they are written: a compiled graph cannot be differentiated twice (pytorch#91469)."""
    return torch.compiler.set_stance("force_eager") if compiled(model) else nullcontext()  # type: ignore[no-untyped-call, unused-ignore]
