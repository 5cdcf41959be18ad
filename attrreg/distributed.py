"""Data-parallel training: over which ranks means run, and what DDP and FSDP2 need of a penalty's backward.

DDP and FSDP2 average gradients over ranks. So that the average of the penalties' gradients is the gradient of one process on all
images, each rank returns

    ranks * (sum over its own annotated images) / (number of annotated images on all ranks).

The average of what the ranks return is the penalty of one process. Where all ranks have as many annotated images, each returns its own
mean, as the task's loss does.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, Union

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Variable
from torch.nn.parallel import DistributedDataParallel

from attrreg.graph import executes, trainable_leaves
from attrreg.masks import AllRanks, Annotation
from attrreg.walk import modules
from attrreg.wrappers import data_parallel

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Groups = tuple["ProcessGroup", ...]
Group = Union["ProcessGroup", Literal[False], None]


def several() -> bool:
    """Whether this process is one of several."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def ranks_of(entry: nn.Module, group: Group) -> Groups:
    """The process groups over which means run, one after the other; none where this process is alone.

    Args:
        entry: the model, as the user passed it.
        group: the user's word on it.

    Raises:
        TypeError, RuntimeError: naming `group` or `model`.
    """
    if not (group is None or group is False or (dist.is_available() and isinstance(group, dist.ProcessGroup))):
        raise TypeError(f"group must be a process group, False or None, got {group!r}. Leave it out for models in DDP or fully_shard.")
    _refuse_flattened(entry)
    if group is False or not several():
        return ()
    wrapper = data_parallel(entry)
    if wrapper is not None and wrapper._join_config.enable:
        raise RuntimeError(
            "A penalty counts the annotated images of all ranks, which `join()` cannot do for ranks that have run out. Give all "
            "ranks as many batches, or pass group=False for each rank's own mean."
        )
    if group is not None:
        return (group,)
    if wrapper is not None:
        return (wrapper.process_group,)
    for module in sharded(entry):
        for parameters in _parameter_groups(module):
            found = parameters.mesh_info
            dimensions = (found.shard_mesh_dim, found.replicate_mesh_dim)
            return tuple(found.mesh.get_group(dimension) for dimension in dimensions if dimension is not None)
    raise RuntimeError(
        f"{dist.get_world_size()} processes are running, and whether they train this model together cannot be seen, because it is neither "
        "in DistributedDataParallel nor under fully_shard. Pass the wrapped model; or say group=torch.distributed.group.WORLD for "
        "means over all processes, group=False for this process alone."
    )


def everywhere(annotation: Annotation, groups: Groups) -> Annotation:
    """The annotation with the counts of all ranks. Every rank must call this, whatever its own count is."""
    if not groups:
        return annotation
    totals = torch.tensor([annotation.count, annotation.batch], device=annotation.annotated.device)
    for group in groups:
        dist.all_reduce(totals, group=group)
    return replace(annotation, all=AllRanks(totals[0], totals[1], math.prod(group.size() for group in groups)))


def synchronises(model: nn.Module) -> bool:
    """Whether a forward waits for those of other ranks: it has `SyncBatchNorm` in train mode, in a group of several."""
    coupled = (module for module in modules(model) if isinstance(module, nn.SyncBatchNorm) and module.training)
    return several() and any(dist.get_world_size(module.process_group) > 1 for module in coupled)


def in_step(model: nn.Module) -> bool:
    """Whether a forward waits for those of other ranks: under FSDP2, with `SyncBatchNorm`, or through a DDP, which hands buffers round."""
    inside = several() and any(isinstance(module, DistributedDataParallel) for module in modules(model))
    return inside or bool(sharded(model)) or synchronises(model)


def check_coupling(model: nn.Module) -> None:
    """Refuse layers whose gradients of gradients would have to cross ranks.

    Raises:
        RuntimeError: `SyncBatchNorm` in train mode, on several ranks.
    """
    if synchronises(model):
        raise RuntimeError(
            "The model has SyncBatchNorm in train mode, whose backward exchanges sums between ranks that PyTorch cannot differentiate. Use "
            "BatchNorm, or put these layers into eval mode while the penalty trains."
        )


def check_whole(model: nn.Module) -> None:
    """Refuse layers that are split over ranks: what PyTorch redistributes in their backward it does below the graph.

    Raises:
        RuntimeError: parameters are DTensors, other than FSDP2's shards of whole ones.
    """
    kind = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    if kind is None or not several():
        return
    # DDP on a mesh puts the parts of DTensors in their place, with what they are parts of.
    parameters = (each for module in modules(model) for each in module._parameters.values())
    split = [each for each in parameters if isinstance(each, kind) or hasattr(each, "_st_info")]
    if split:
        groups = [group for module in sharded(model) for group in _parameter_groups(module)]
        whole = [each for group in groups for each in group.fsdp_params if not each.is_dtensor]
        shards = {id(shard) for each in whole for shard in (each.sharded_param, getattr(each, "_sharded_post_forward_param", None))}
        if any(id(parameter) not in shards for parameter in split):
            raise RuntimeError(
                "The model has tensor-parallel layers, whose gradients ranks exchange where PyTorch's graph does not follow, so that a "
                "penalty's own gradient would be wrong. Use reg.using(attrreg.engines.FiniteDifference()), or terms that take no gradient."
            )


def synchronise_buffers(entry: nn.Module) -> None:
    """Let DDP make the buffers of all ranks alike, as its forward does, before passes that start from them."""
    for module in modules(entry):
        if isinstance(module, DistributedDataParallel) and module._check_sync_bufs_pre_fwd():
            module._sync_buffers()


def prepare_backward(entry: nn.Module, total: Tensor, held: bool) -> None:
    """See to it that the backward through a penalty finds the weights, and reaches all ranks.

    Args:
        entry: the model, as the user passed it.
        total: the penalty.
        held: its backward needs all weights at once: it differentiates gradients, or starts at a layer.
    """
    shards = sharded(entry) if held else []
    if shards:
        total.register_hook(lambda gradient: _hold(shards))
    wrapper = data_parallel(entry) if several() else None
    if wrapper is None or wrapper._use_python_reducer or not wrapper.require_backward_grad_sync:  # that one reduces in any backward
        return
    own, delayed = {id(parameter) for parameter in wrapper.parameters()}, _delayed(wrapper)
    leaf = next((leaf for leaf in trainable_leaves(total) if id(leaf) in own), None)
    if leaf is not None:
        node = torch.autograd.graph.get_gradient_edge(leaf).node
        total.register_hook(lambda gradient: _watch(wrapper, node, delayed))


def _when_over(call: Callable[[], None]) -> None:
    """Call something when the running backward ends. Queued twice, to come after a wrapper's own callbacks, which reduce gradients."""
    engine = Variable._execution_engine
    engine.queue_callback(lambda: engine.queue_callback(call))


# FSDP2


def sharded(model: nn.Module) -> list[nn.Module]:
    """The modules of a model under FSDP2's `fully_shard`."""
    return _of_fsdp(model, "FSDPModule")


def _of_fsdp(model: nn.Module, kind: str) -> list[nn.Module]:
    """The modules of a class of `torch.distributed.fsdp`. Where nobody imported that, none; the import would take a third of a second."""
    there = dist.is_available() and dist.is_initialized()  # which both need
    found = getattr(sys.modules.get("torch.distributed.fsdp"), kind, None) if there else None
    return [] if found is None else [module for module in modules(model) if isinstance(module, found)]


def _refuse_flattened(model: nn.Module) -> None:
    if _of_fsdp(model, "FullyShardedDataParallel"):
        raise TypeError(
            "The model is in FullyShardedDataParallel (FSDP1), which flattens parameters, so that gradients of gradients do not reach "
            "them. Use torch.distributed.fsdp.fully_shard (FSDP2) or DistributedDataParallel."
        )


def _parameter_groups(module: Any) -> list[Any]:
    state = module._get_fsdp_state()  # one group a module in older versions of PyTorch, a list in newer ones
    groups = getattr(state, "_fsdp_param_groups", None)
    return [group for group in (groups if groups is not None else [state._fsdp_param_group]) if group is not None]


def gather(shards: Iterable[nn.Module]) -> None:
    """Gather the weights that a backward reads. FSDP2 does so where it starts at what a sharded module returned, but not inside one."""
    for module in shards:
        module.unshard()  # type: ignore[operator]


def reshard(shards: Iterable[nn.Module]) -> None:
    """Free gathered weights at the end of such a backward, unless the user keeps them."""
    for module in shards:
        if all(group.reshard_after_backward for group in _parameter_groups(module)):
            module.reshard()  # type: ignore[operator]


def _hold(shards: list[nn.Module]) -> None:
    """Gather all weights, and keep them until the running backward ends; then reduce the gradients that FSDP2 has not.

    Gradients of gradients read weights in another order than FSDP2's hooks know, which would have freed them by then. And they may come to
    a weight when FSDP2 has done with it, after what a newer forward brought: those would be left for the next step.
    """
    groups: list[tuple[Any, Any]] = [(module, group) for module in shards for group in _parameter_groups(module)]
    # Of the others, the user keeps the weights, or another penalty of the same backward does.
    held = [group for _, group in groups if group.reshard_after_backward]
    for group in held:
        group.reshard_after_backward = False
    gather(shards)

    def release() -> None:
        for module, group in groups:
            if any(hasattr(p, "_unsharded_param") and p._unsharded_param.grad is not None for p in group.fsdp_params):
                _reduce(module, group)
        for group in held:
            group.reshard_after_backward = True
        reshard(shards)

    _when_over(release)


def _reduce(module: Any, group: Any) -> None:
    """Reduce gradients that came late, over all ranks: what replicas have accumulated for themselves (HSDP) is of other parameters."""
    before = group._training_state, group._partial_reduce_output, group.all_reduce_grads
    group._partial_reduce_output, group.all_reduce_grads = None, True
    group.post_backward()
    group._training_state, group._partial_reduce_output, group.all_reduce_grads = before
    if module._get_fsdp_state()._state_ctx.is_last_backward:
        group.finalize_backward()


# DDP


def _delayed(wrapper: DistributedDataParallel) -> bool:
    """Whether the first step under static_graph, which reduces all gradients at its end, has begun."""
    return bool(getattr(wrapper, "_static_graph_delay_allreduce_enqueued", False))


def _watch(wrapper: DistributedDataParallel, node: Any, delayed: bool) -> None:
    """Refuse a backward in which DDP reduces nothing.

    DDP takes part in one backward after each of its forwards. Any other leaves each rank with its own gradients, without a word.
    """
    if not executes(node, leaf=False):  # `torch.autograd.grad` writes no parameter's `.grad`, and DDP has no part in it
        return
    before = wrapper.reducer.get_backward_stats()  # when each gradient was ready: changes where DDP takes part

    def check() -> None:
        first = not delayed and _delayed(wrapper)
        if not first and wrapper.reducer.get_backward_stats() == before:
            raise RuntimeError(
                "DistributedDataParallel took no part in this backward, so each rank now has gradients of its own. Call the wrapped model, "
                "add the penalty to the loss of its output, and call backward once, on the sum. Under no_sync(), the penalty belongs there "
                "too."
            )

    _when_over(check)
