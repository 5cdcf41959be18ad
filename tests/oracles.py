"""Naive re-implementations, written from the formulas: one forward for every quantity, plain autograd, no sharing."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

ScoreFunction = Callable[[Tensor, Tensor], Tensor]


def score_sum_log_prob(logits: Tensor, target: Tensor) -> Tensor:
    return torch.stack([logits[:, k] - logits.exp().sum(1).log() for k in range(logits.shape[1])]).sum()


def score_target_logit(logits: Tensor, target: Tensor) -> Tensor:
    return torch.stack([logits[i, int(target[i])] for i in range(len(target))]).sum()


def score_target_log_prob(logits: Tensor, target: Tensor) -> Tensor:
    return torch.stack([logits[i, int(target[i])] - logits[i].exp().sum().log() for i in range(len(target))]).sum()


def score_predicted(logits: Tensor, target: Tensor) -> Tensor:
    return torch.stack([row[int(row.argmax())] for row in logits]).sum()


def score_contrast(logits: Tensor, target: Tensor) -> Tensor:
    total = logits.new_zeros(())
    for row, t in zip(logits, target.tolist(), strict=True):
        best = max((k for k in range(len(row)) if k != t), key=lambda k: float(row[k].detach()))
        total = total + (row[t] - row[best]).abs()
    return total


def score_task_loss(logits: Tensor, target: Tensor) -> Tensor:
    return -score_target_log_prob(logits, target)


def squared_outside(map: Tensor, mask: Tensor) -> Tensor:
    return torch.stack([(((1 - m) * p) ** 2).sum() for p, m in zip(map, mask, strict=True)])


def absolute_outside(map: Tensor, mask: Tensor) -> Tensor:
    return torch.stack([((1 - m) * p.abs()).sum() for p, m in zip(map, mask, strict=True)])


def log_outside(map: Tensor, mask: Tensor) -> Tensor:
    return (1 + absolute_outside(map, mask) ** 2).log()


def net_outside(map: Tensor, mask: Tensor) -> Tensor:
    return torch.stack([((1 - m) * p).sum().abs() for p, m in zip(map, mask, strict=True)])


def outside_fraction(map: Tensor, mask: Tensor) -> Tensor:
    return torch.stack([((1 - m) * p.abs()).sum() / p.abs().sum() for p, m in zip(map, mask, strict=True)])


def total_variation(map: Tensor, mask: Tensor) -> Tensor:
    below, right = map[:, :, 1:] - map[:, :, :-1], map[..., 1:] - map[..., :-1]
    return torch.stack([one.abs().sum() + other.abs().sum() for one, other in zip(below, right, strict=True)])


def energy(map: Tensor, mask: Tensor) -> Tensor:
    values = []
    for p, m in zip(map, mask, strict=True):
        positive = p.clamp(min=0) if bool((p > 0).any()) else p.abs()
        values.append(1 - (m * positive).sum() / positive.sum())
    return torch.stack(values)


def input_gradient(model: nn.Module, x: Tensor, target: Tensor, score: ScoreFunction) -> Tensor:
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(score(model(leaf), target), leaf, create_graph=True)
    return gradient


def squared_input_gradient(model: nn.Module, x: Tensor, mask: Tensor, target: Tensor) -> Tensor:
    """For each image, what `InputGradient(TargetLogit(), SquaredOutside())` penalises, `(N,)`; a mask for each image, of its size."""
    phi = input_gradient(model, x, target, score_target_logit)
    return squared_outside(phi, mask.unsqueeze(1).to(phi.dtype))


def input_x_gradient(model: nn.Module, x: Tensor, target: Tensor, score: ScoreFunction) -> Tensor:
    return x * input_gradient(model, x, target, score)


def integrated_gradients(
    model: nn.Module, x: Tensor, target: Tensor, score: ScoreFunction, steps: int = 4, baseline: Tensor | None = None
) -> Tensor:
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    weights = weights.astype(np.float32).astype(np.float64)  # as Captum has them
    start = torch.zeros_like(x) if baseline is None else baseline
    total = torch.zeros_like(x)
    for node, weight in zip(nodes, weights, strict=True):
        total = total + weight / 2 * input_gradient(model, start + (node + 1) / 2 * (x - start), target, score)
    return (x - start) * total


def grad_cam(model: nn.Module, x: Tensor, target: Tensor, score: ScoreFunction, layer: str, semi: bool = False) -> Tensor:
    kept: list[Tensor] = []

    def keep(module: nn.Module, args: object, output: Tensor) -> Tensor:
        kept.append(output)
        return output.clone()

    handle = model.get_submodule(layer).register_forward_hook(keep)
    logits = model(x.clone().requires_grad_())
    handle.remove()
    (gradient,) = torch.autograd.grad(score(logits, target), kept[0], create_graph=True)
    weights = gradient.mean(dim=(2, 3))
    if semi:
        weights = weights.detach()
    return torch.einsum("nc,nchw->nhw", weights, kept[0]).unsqueeze(1)


def activation_difference(model: nn.Module, x: Tensor, other: Tensor, layer: str) -> Tensor:
    kept: list[Tensor] = []
    handle = model.get_submodule(layer).register_forward_hook(lambda module, args, output: kept.append(output.clone()))
    model(x)
    model(other)
    handle.remove()
    return torch.stack([((a - b) ** 2).sum().sqrt() for a, b in zip(kept[0], kept[1], strict=True)])


def resize_by_area(mask: Tensor, size: int) -> Tensor:
    """Means over whole blocks; for sizes that divide."""
    factor = mask.shape[-1] // size
    assert factor * size == mask.shape[-1]
    return torch.stack([block.mean(-1) for block in mask.unfold(-2, factor, factor).unfold(-2, factor, factor).flatten(-2).unbind(1)], 1)


def central_difference(function: Callable[[], Tensor], parameter: Tensor, direction: Tensor, eps: float = 1e-5) -> float:
    """Numerical directional derivative with respect to a parameter, in place and put back."""
    with torch.no_grad():
        start = parameter.clone()
        parameter.copy_(start + eps * direction)
    high = float(function().detach())
    with torch.no_grad():
        parameter.copy_(start - eps * direction)
    low = float(function().detach())
    with torch.no_grad():
        parameter.copy_(start)
    assert math.isfinite(high) and math.isfinite(low)
    return (high - low) / (2 * eps)
