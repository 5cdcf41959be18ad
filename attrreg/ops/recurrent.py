"""LSTM layers whose double backward is a closed form.

PyTorch differentiates the gradient of a fused LSTM by every operation of every step, and that of cuDNN not at all. Of a step, with p what
the layer makes of its input, w its recurrent weight, and primes for the step before:

    (i, f, o) = sigmoid, g = tanh of p + h' w^T;  c = f c' + i g,  a = tanh(c),  h = o a

The first order, from the last step to the first, with s the slopes of the gates, and gradients gh, gc, gi ... of what is read of a step:

    dh = gh + h*,  dc = gc + c* + dh o (1 - a^2),  dp = s (dc g + gi, dc c' + gf, dc i + gg, dh a + go)
    for the step before: h* = dp w,  c* = dc f

For v, the gradient with respect to dp, and y, x those with respect to the h*, c* that a step hands to the one before, which are given for
the first step, and for the next are its d_h*, d_c*, from the first step to the last, with e = v + y w^T:

    d_c* = d_gc = s_i g e_i + s_f c' e_f + s_g i e_g + x f,  d_h* = d_gh = s_o a e_o + o (1 - a^2) d_c*
    d_i = dc (s_g e_g + g (1 - 2i) e_i),  d_f = dc (x + c' (1 - 2f) e_f),  d_g = dc (s_i e_i - 2 g i e_g)
    d_o = dh ((1 - a^2) d_c* + a (1 - 2o) e_o),  d_c = dh (1 - a^2) (s_o e_o - 2 a o d_c*),  d_c' = dc s_f e_f,  d_w = sum dp^T y

Gates and cells are results too, so these gradients join the first order of the loss in one pass back through the steps.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from attrreg.ops.linear import PLAIN, linear
from attrreg.ops.phase import Phase, once_differentiable, wanted
from attrreg.ops.precision import autocasts
from attrreg.state import full_precision

TYPES = (torch.float32, torch.float64)


class _Steps(NamedTuple):
    """What is known of all steps at once.

    Attributes:
        before: c'.
        a: tanh(c), and `steep` 1 - a^2.
        slopes: s, of the gates, `(steps, directions, N, 4, width)`.
        by_cell: s g, s c', s i of the first three, by which dc is multiplied.
        by_hidden: s a of the last, by which dh is.
        to_cell: o (1 - a^2).
    """

    before: Tensor
    a: Tensor
    steep: Tensor
    slopes: Tensor
    by_cell: Tensor
    by_hidden: Tensor
    to_cell: Tensor

    @staticmethod
    def of(c0: Tensor, cells: Tensor, gates: Tensor) -> _Steps:
        i, _, g, o = gates.unbind(-2)
        before, a, one = torch.cat((c0[None], cells[:-1])), cells.tanh(), gates.new_ones(())
        slopes, steep = torch.addcmul(gates, gates, gates, value=-1), torch.addcmul(one, a, a, value=-1)
        torch.addcmul(one, g, g, value=-1, out=slopes[..., 2, :])
        by_cell = torch.stack((g, before, i), -2).mul_(slopes[..., :3, :])
        return _Steps(before, a, steep, slopes, by_cell, a * slopes[..., 3, :], o * steep)


def _first_order(
    gh: Tensor, gc: Tensor | None, ggates: Tensor | None, w: Tensor, c0: Tensor, cells: Tensor, gates: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The first order: dp, dh and dc of all steps, and h* and c* of what was before the first."""
    steps = _Steps.of(c0, cells, gates)
    dp, dh, dc = torch.empty_like(gates), torch.empty_like(cells), torch.empty_like(cells)
    more = None if ggates is None else ggates * steps.slopes
    views = (dp, dp[..., :3, :], dp[..., 3, :], gh, dh, dc, steps.to_cell, steps.by_cell, steps.by_hidden, gates[..., 1, :])
    h = c = torch.zeros_like(c0)  # h* and c*
    for t, (all_four, three, last, g, of_h, of_c, to_cell, by_cell, by_hidden, f) in reversed([*enumerate(zip(*views, strict=True))]):
        torch.add(g, h, out=of_h)
        torch.addcmul(c if gc is None else c + gc[t], of_h, to_cell, out=of_c)
        torch.mul(of_c.unsqueeze(-2), by_cell, out=three)
        torch.mul(of_h, by_hidden, out=last)
        if more is not None:
            all_four.add_(more[t])
        h, c = torch.bmm(all_four.flatten(-2), w), of_c * f
    return dp, dh, dc, h, c


def _over_steps(dp: Tensor, h: Tensor) -> Tensor:
    """The sum over steps and images of dp^T h, for each direction."""
    left, right = (values.transpose(0, 1).flatten(1, 2) for values in (dp.flatten(-2), h))
    return torch.bmm(left.mT, right)


class _Recurrence(Function):
    """h, c and the gates of all steps, of p `(steps, directions, N, 4, width)`, w `(directions, 4 width, width)`, and h and c before."""

    @staticmethod
    def forward(ctx: Any, p: Tensor, w: Tensor, h0: Tensor, c0: Tensor, phase: Phase) -> tuple[Tensor, Tensor, Tensor]:
        gates = torch.empty_like(p)
        hidden, cells = (p.new_empty((len(p), *h0.shape)) for _ in range(2))
        h, c, across = h0, c0, w.mT
        for z, made, values, each_h, each_c in zip(gates.flatten(-2), p.flatten(-2), gates, hidden, cells, strict=True):
            torch.baddbmm(made, h, across, out=z)
            values[..., :2, :].sigmoid_()
            i, f, g, o = values.unbind(-2)
            c = torch.addcmul(i * g.tanh_(), f, c, out=each_c)
            h = torch.mul(o.sigmoid_(), c.tanh(), out=each_h)
        ctx.save_for_backward(w, h0, c0, hidden, cells, gates)
        ctx.phase = phase
        ctx.set_materialize_grads(False)
        return hidden, cells, gates

    @staticmethod
    def backward(ctx: Any, gh: Tensor | None, gc: Tensor | None, ggates: Tensor | None) -> tuple[Tensor | None, ...]:
        w, h0, c0, hidden, cells, gates = ctx.saved_tensors
        if gh is None:
            gh = torch.zeros_like(hidden)
        with full_precision(w.device):  # as `once_differentiable`
            dp, h, c = _RecurrenceGradient.apply(gh, gc, ggates, w, c0, cells, gates)
            for_p, for_w = wanted(ctx, 2)
            gw = _over_steps(dp, torch.cat((h0[None], hidden[:-1]))) if for_w else None
        return dp if for_p else None, gw, h, c, None


class _RecurrenceGradient(Function):
    """dp of all steps, and h* and c* of what was before the first."""

    @staticmethod
    def forward(
        ctx: Any, gh: Tensor, gc: Tensor | None, ggates: Tensor | None, w: Tensor, c0: Tensor, cells: Tensor, gates: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        dp, dh, dc, h, c = _first_order(gh, gc, ggates, w, c0, cells, gates)
        ctx.save_for_backward(w, c0, cells, gates, dp, dh, dc)
        return dp, h, c

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, v: Tensor, y0: Tensor, x0: Tensor) -> tuple[Tensor | None, ...]:
        w, c0, cells, gates, dp, dh, dc = ctx.saved_tensors
        steps, e = _Steps.of(c0, cells, gates), torch.empty_like(gates)
        y, x = (cells.new_empty((len(cells) + 1, *c0.shape)) for _ in range(2))
        y[0], x[0] = y0, x0
        across, outer = w.mT, (v.flatten(-2), y[:-1], x[:-1], y[1:], x[1:])
        views = (e.flatten(-2), e[..., :3, :], e[..., 3, :], steps.to_cell, steps.by_cell, steps.by_hidden, gates[..., 1, :])
        for u, of_h, of_c, next_h, next_c, z, three, last, to_cell, by_cell, by_hidden, f in zip(*outer, *views, strict=True):
            torch.baddbmm(u, of_h, across, out=z)
            torch.addcmul((three * by_cell).sum(-2), of_c, f, out=next_c)
            torch.addcmul(last * by_hidden, next_c, to_cell, out=next_h)
        (i, f, g, o), (e_i, e_f, e_g, e_o) = gates.unbind(-2), e.unbind(-2)
        # The results are written over e. addcmul and add: a + b c and 1 - 2 a, each in one pass over memory.
        se, one = steps.slopes.mul_(e), e.new_ones(())
        se_i, se_f, se_g, se_o = se.unbind(-2)
        d_cells = torch.addcmul(se_o, steps.a * o, x[1:], value=-2).mul_(steps.steep).mul_(dh)
        torch.addcmul(se_i, g * i, e_g, value=-2, out=e_g).mul_(dc)
        of_cells = (e_i, i, g, se_g, dc), (e_f, f, steps.before, x[:-1], dc)
        for e_k, gate, factor, rest, d in (*of_cells, (e_o, o, steps.a, steps.steep * x[1:], dh)):
            torch.addcmul(rest, torch.add(one, gate, alpha=-2).mul_(factor), e_k, out=e_k).mul_(d)
        d_before = se_f * dc
        d_cells[:-1] += d_before[1:]
        d_gc = x[1:].data if ctx.needs_input_grad[1] else None
        d_w = _over_steps(dp, y[:-1]) if ctx.needs_input_grad[3] else None
        return y[1:].data, d_gc, None, d_w, d_before[0], d_cells, e


def lstm(phase: Phase, *args: Any, **settings: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`torch.lstm`, as `nn.LSTM` calls it.

    PyTorch's own with packed sequences, projections, dropout between layers, half types and autocast, and where there is no graph.
    """
    if not (torch.is_grad_enabled() and _fits(*args, **settings)):
        return torch.lstm(*args, **settings)
    x, (h0, c0), weights, biased, layers, _, _, both, batch_first = args
    x = x.transpose(0, 1) if batch_first else x
    directions, count, last = 1 + both, 4 if biased else 2, []
    for layer in range(layers):
        own = slice(layer * directions, (layer + 1) * directions)
        parts = [weights[direction * count : (direction + 1) * count] for direction in range(own.start, own.stop)]
        bias = torch.cat([values[2] + values[3] for values in parts]) if biased else None
        made = linear(phase, x, torch.cat([values[0] for values in parts]), bias).unflatten(-1, (directions, 4, -1)).unbind(2)
        p = torch.stack([made[0], made[1].flip(0)], 1) if both else made[0].unsqueeze(1)
        w = torch.stack([values[1] for values in parts]) if both else parts[0][1].unsqueeze(0)
        hidden, cells, _ = _Recurrence.apply(p, w, h0[own], c0[own], phase)
        x = torch.cat((hidden[:, 0], hidden[:, 1].flip(0)), -1) if both else hidden[:, 0]
        last.append((hidden[-1], cells[-1]))
    h, c = (torch.cat(parts) for parts in zip(*last, strict=True))
    x = x if both else x.clone()  # a model may write into it
    return x.transpose(0, 1) if batch_first else x, h, c


def _fits(*args: Any, **settings: Any) -> bool:
    """Whether arguments are those of `nn.LSTM` for a batch of sequences, and its layers are plain ones."""
    if len(args) != 9 or isinstance(args[1], Tensor):
        return False
    x, states, weights, biased, layers, dropout, training, both, batch_first = args
    tensors = [x, *states, *weights]
    alike = all(type(tensor) in PLAIN and tensor.dtype == x.dtype and tensor.device == x.device for tensor in tensors)
    whole = len(states) == 2 and len(weights) == layers * (1 + both) * (4 if biased else 2) and not (dropout and training and layers > 1)
    if not (alike and whole and x.dtype in TYPES and x.dim() == 3 and x.numel() > 0) or autocasts(x):
        return False
    shape = layers * (1 + both), x.shape[0 if batch_first else 1], weights[1].shape[-1]
    return all(state.shape == shape for state in states)  # others would broadcast
