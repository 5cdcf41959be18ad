"""How it is measured: time by interleaved rounds and paired ratios, memory and operations in a pass of their own.

Shared machines are slow by turns, so a time means little and the ratio of two times of the same round means much. A round lies between two
plain steps, and what is slow for a part of it shows in one of them.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import conv_flop_count, flop_registry

from attrreg.bench.cases import Case
from attrreg.bench.memory import LiveStorage
from attrreg.ops.linear import ONEDNN

aten = torch.ops.aten


@dataclass(frozen=True)
class Step:
    """What is timed.

    Attributes:
        run: does the step, `count` times over; what it returns is dropped.
        case: what it runs on, its own copy of the model included.
    """

    run: Callable[[], object]
    case: Case
    count: int = 1


@dataclass(frozen=True)
class Cost:
    """What a step costs as a multiple of the plain step.

    Attributes:
        ratio: the median over rounds of the time, over the mean of the plain steps at both ends; `low` and `high`: its quartiles.
        seconds: the median time, `fastest` the least.
        memory: peak bytes above the parameters, over those of the plain step; `bytes` themselves.
        operations: floating-point operations of convolutions, products and attention, over those of the plain step.
    """

    ratio: float
    low: float
    high: float
    seconds: float
    fastest: float
    memory: float
    bytes: int
    operations: float

    @property
    def noisy(self) -> bool:
        """Whether the quartiles are more than a tenth of the median apart."""
        return self.high - self.low > 0.1 * self.ratio


def costs(steps: Mapping[str, Step], rounds: int, warmup: int, note: Callable[[float], None], seconds: float = 0.0) -> dict[str, Cost]:
    """Measure all steps against the first, the plain one.

    Args:
        steps: by name, the plain one first.
        rounds: in each, every step runs once; so many at least.
        warmup: rounds before those, not counted.
        note: called after each round with how many of `warmup + rounds` it stands for, the fewer the more there are.
        seconds: where a plain step takes less, there are more rounds, until plain steps took `rounds * seconds`: short steps vary more.
    """
    plain = next(iter(steps))
    times: dict[str, list[float]] = {name: [] for name in steps}
    bases: list[float] = []
    for _ in range(warmup):
        _round(steps, plain)
        note(1.0)
    done = 0.0
    while done < 1:
        taken, base = _round(steps, plain)
        bases.append(base)
        for name, own in taken.items():
            times[name].append(own)
        before, done = done, min(1.0, len(bases) / rounds, sum(bases) / (rounds * seconds) if seconds else 1.0)
        note((done - before) * rounds)
    weighed = {name: _weighed(step) for name, step in steps.items()}
    result = {}
    for name in steps:
        ratios = [1.0 if name == plain else own / base for own, base in zip(times[name], bases, strict=True)]
        low, middle, high = numpy.quantile(ratios, (0.25, 0.5, 0.75)).tolist()
        result[name] = Cost(
            ratio=middle,
            low=low,
            high=high,
            seconds=statistics.median(times[name]),
            fastest=min(times[name]),
            memory=weighed[name][0] / weighed[plain][0],
            bytes=weighed[name][0],
            operations=weighed[name][1] / weighed[plain][1] if weighed[plain][1] else math.nan,
        )
    return result


def _round(steps: Mapping[str, Step], plain: str) -> tuple[dict[str, float], float]:
    """The time of each step, and of the plain ones at both ends on average."""
    gc.collect()  # here rather than in the middle of a step
    taken = {name: _timed(step) / step.count for name, step in steps.items()}
    again = _timed(steps[plain]) / steps[plain].count
    return taken, (taken[plain] + again) / 2


def _timed(step: Step) -> float:
    _wait(step.case.device)
    start = time.perf_counter()
    step.run()
    _wait(step.case.device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def peak(step: Step) -> int:
    """Peak bytes that a step holds above what is there before it."""
    case = step.case
    gc.collect()
    if case.device.type == "cuda":
        _wait(case.device)
        torch.cuda.reset_peak_memory_stats(case.device)
        before = torch.cuda.memory_allocated(case.device)
        step.run()
        _wait(case.device)
        return int(torch.cuda.max_memory_allocated(case.device) - before)
    with LiveStorage() as meter:
        meter.ignore(*case.model.parameters(), *case.model.buffers(), case.x, case.y, case.mask)
        step.run()
    return int(meter.peak)


def _weighed(step: Step) -> tuple[int, float]:
    """Peak bytes and operations of a step, in one pass."""
    with _Operations() as counter:
        held = peak(step)
    return held, float(counter.total / step.count)


def _of_gradients_of_convolution(gy: Any, x: Any, w: Any, *settings: Any, out_val: Any) -> int:
    """Each gradient that is asked for costs as much as the convolution. PyTorch's formula ignores the groups in that of the weights."""
    transposed, asked = settings[4], settings[-1]
    return int(sum(asked[:2]) * conv_flop_count(x.shape, w.shape, gy.shape, transposed))


def _of_a_product(a: Tensor, b: Tensor, *rest: Any, out_val: Tensor) -> int:
    return 2 * a.numel() * b.shape[0]


FORMULAS = {
    **flop_registry,
    aten.convolution_backward: _of_gradients_of_convolution,
    ONEDNN: _of_a_product,
    # The same formulas for operators that PyTorch's registry lacks.
    aten.addmm_: flop_registry[aten.addmm],
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[aten._scaled_dot_product_flash_attention],
    aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[aten._scaled_dot_product_flash_attention_backward],
}


class _Operations(TorchDispatchMode):
    """Counts by PyTorch's own formulas, whose FlopCounterMode also hooks into autograd, and fails there on a graph like ours."""

    total: float = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        count = FORMULAS.get(func._overloadpacket)
        if count is not None:
            self.total += count(*args, **(kwargs or {}), out_val=out)
        return out
