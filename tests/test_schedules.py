"""Schedules: what is skipped costs nothing and leaves nothing."""

from __future__ import annotations

import math
import pickle
from collections import UserDict
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import attrreg
from attrreg import Scheduled, schedules
from attrreg.graph import nodes
from attrreg.trace import passes
from tests.models import SmoothNet, batch, smooth_batch
from tests.test_bad_input import check_message


@pytest.mark.parametrize(
    ("schedule", "weights"),
    [
        (schedules.Every(4), [4, 0, 0, 0, 4, 0]),
        (schedules.Linear(4), [0, 0.25, 0.5, 0.75, 1, 1, 1]),
        (schedules.Linear(2, first=3, last=1), [3, 2, 1, 1]),
        (schedules.Linear(1), [0, 1, 1]),
        (schedules.Cosine(4), [1, (2 + 2**0.5) / 4, 0.5, (2 - 2**0.5) / 4, 0, 0, 0]),
        (schedules.Cosine(2, first=0, last=5), [0, 2.5, 5, 5]),
        (schedules.Linear(4) * schedules.Every(2), [0, 0, 1, 0, 2, 0, 2]),
        (schedules.Every(2) * (schedules.Linear(2) * schedules.Cosine(4)), [0, 0, 1, 0, 0]),
    ],
)
def test_weights_and_repr(schedule: schedules.Schedule, weights: list[float]) -> None:
    assert [schedule(step) for step in range(len(weights))] == pytest.approx(weights, abs=1e-15)
    assert eval(repr(schedule)) == schedule and hash(eval(repr(schedule))) == hash(schedule)
    assert pickle.loads(pickle.dumps(schedule)) == schedule


def test_learning_rate_schedulers_agree() -> None:
    def rates(make: Any) -> list[float]:
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        scheduler, found = make(optimizer), []
        for _ in range(8):
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        return found

    lr = torch.optim.lr_scheduler
    warm, cosine = schedules.Linear(5, first=0.2), schedules.Cosine(7, last=0.1)
    assert rates(lambda o: lr.LinearLR(o, 0.2, 1.0, 5)) == pytest.approx([warm(step) for step in range(8)])
    assert rates(lambda o: lr.CosineAnnealingLR(o, 7, eta_min=0.1)) == pytest.approx([cosine(step) for step in range(8)])


WEIGHTS = st.floats(0, 1e6)


@pytest.mark.parametrize("kind", [schedules.Linear, schedules.Cosine])
@given(steps=st.integers(1, 10_000), first=WEIGHTS, last=WEIGHTS, step=st.integers(0, 20_000))
def test_ramps_stay_between_their_ends(kind: Any, steps: int, first: float, last: float, step: int) -> None:
    ramp = kind(steps, first=first, last=last)
    slack = 1e-9 * max(first, last)
    assert min(first, last) - slack <= ramp(step) <= max(first, last) + slack
    assert ramp(0) == first and ramp(steps + step) == last
    assert (ramp(step + 1) - ramp(step)) * (last - first) >= -slack * max(first, last)
    assert ramp(step) + ramp(max(steps - step, 0)) == pytest.approx(first + last, abs=2 * slack)
    assert (ramp * schedules.Every(3))(step) == pytest.approx(ramp(step) * (3 if step % 3 == 0 else 0))


def test_products_are_flat_and_print_themselves() -> None:
    product = schedules.Linear(10) * schedules.Every(2) * schedules.Cosine(20)
    assert product.factors == (schedules.Linear(10), schedules.Every(2), schedules.Cosine(20))
    assert repr(product) == "attrreg.schedules.Linear(steps=10) * attrreg.schedules.Every(steps=2) * attrreg.schedules.Cosine(steps=20)"
    with pytest.raises(TypeError):
        schedules.Linear(10) * 2


def test_a_warm_up_scales_the_penalty() -> None:
    model, x, mask, target = case()
    term = attrreg.InputGradient()
    regularizer, plain = Scheduled(term, schedules.Linear(4)), float(term(model, x, mask, target).detach())
    found = [float(regularizer(model, x, mask, target).detach()) for _ in range(6)]
    assert found == pytest.approx([weight * plain for weight in (0, 0.25, 0.5, 0.75, 1, 1)], rel=1e-5)


def case() -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    return SmoothNet(norm=True), *batch(channels=2, size=8, classes=3)


@pytest.mark.parametrize("attached", [False, True])
def test_skipped_steps_run_nothing(attached: bool) -> None:
    model, x, mask, target = case()
    term = attrreg.InputGradient()
    regularizer, plain = Scheduled(term, schedules.Every(3)), float(term(model, x, mask, target).detach())
    handle = regularizer.attach(model) if attached else None
    found, counts = [], []
    for _ in range(4):
        output = model(x)
        with passes() as counter:
            value = regularizer(model, x, mask, target)
        (F.cross_entropy(output, target) + value).backward()
        found.append(float(value.detach()))
        counts.append((counter.forward, counter.backward))
    own = 0 if attached else 1
    assert counts == [(own, 1), (0, 0), (0, 0), (own, 1)]
    assert found[1:3] == [0, 0]
    assert found[0] == pytest.approx(3 * plain, rel=1e-5)
    if handle is not None:
        handle.remove()


@pytest.mark.parametrize("attached", [False, True])
def test_each_skipped_evaluate_runs_the_model(attached: bool) -> None:
    model, (x, mask, target) = SmoothNet(norm=True, dropout=0.5), smooth_batch()
    model, scheduled = model.double(), Scheduled(attrreg.InputGradient(), schedules.Every(3))
    scheduled.step = 1
    with scheduled.attach(model) if attached else nullcontext():
        outputs = [scheduled.evaluate(model, x, mask, target).output for _ in range(2)]  # as R-Drop: two draws of the same images
        assert not torch.equal(*outputs) and int(model.norm.num_batches_tracked) == 2  # type: ignore[arg-type]
        for output in outputs:
            output.sum().backward()


def test_skipped_attached_forwards_are_left_alone() -> None:
    model, x, mask, target = case()
    regularizer = Scheduled(attrreg.InputGradient(), schedules.Every(2))
    with regularizer.attach(model):
        names = []
        for _ in range(2):
            logits = model(x)
            names.append({node.name() for node in nodes(logits)})
            regularizer(model, x, mask, target)
    assert "_ConvolveBackward" in names[0]
    assert "_ConvolveBackward" not in names[1]


def test_evaluate_on_a_skipped_step_is_the_plain_forward() -> None:
    model, x, mask, target = case()
    regularizer = Scheduled(1.0 * attrreg.InputGradient() + attrreg.ActivationDifference(), schedules.Every(2))
    first = regularizer.evaluate(model, x, mask, target, generator=torch.Generator().manual_seed(0))
    once = regularizer.regularizer(model, x, mask, target, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(first.total, 2 * once)
    assert float(first.total.detach()) == pytest.approx(float(sum(first.terms.values())), rel=1e-5)
    second = regularizer.evaluate(model, x, mask, target)
    assert regularizer.step == 2
    assert second.terms.keys() == first.terms.keys()
    assert not any(value.any() or value.requires_grad for value in second.terms.values())
    (F.cross_entropy(second.output, target) + second.total).backward()


class Shifted(nn.Module):
    """Takes another input."""

    def __init__(self) -> None:
        super().__init__()
        self.net = SmoothNet()

    def forward(self, x: Tensor, shift: Tensor) -> Any:
        return self.net(x) + shift


@pytest.mark.parametrize("mapping", [None, dict, UserDict])
def test_evaluate_takes_other_inputs_at_any_step(mapping: Any) -> None:
    model, (x, mask, target), shift = Shifted().double(), smooth_batch(), torch.tensor(2.0).double()
    inputs = (x, shift) if mapping is None else mapping(shift=shift, x=x)
    regularizer = Scheduled(attrreg.InputGradient(), schedules.Every(2))
    for skipped in (False, True):
        penalty = regularizer.evaluate(model, x, mask, target, inputs=inputs)
        torch.testing.assert_close(penalty.output, model(x, shift))
        assert bool(penalty.total == 0) == skipped


def test_attached_evaluate_runs_no_forward_at_any_step() -> None:
    model, x, mask, target = case()
    forwards = []
    model.register_forward_hook(lambda *_: forwards.append(1))
    regularizer = Scheduled(attrreg.InputGradient(), schedules.Every(2))
    with regularizer.attach(model):
        for _ in range(4):
            output = model(x)
            penalty = regularizer.evaluate(model, x, mask, target)
            assert penalty.output is output
            (F.cross_entropy(output, target) + penalty.total).backward()
        regularizer.step = 1
        output = model(x)
        attrreg.InputGradient()(model, x, mask, target).backward()  # a skipped step's forward serves no other call
        F.cross_entropy(output, target).backward()
    assert len(forwards) == 6


def test_the_zero_of_a_skipped_step_is_in_full_precision_and_passes_by_what_is_frozen() -> None:
    model, (x, mask, target) = SmoothNet().bfloat16(), smooth_batch()
    model.stem.requires_grad_(False)
    value = Scheduled(attrreg.InputGradient(), schedules.Linear(4))(model, x.bfloat16(), mask, target)
    assert value == 0 and value.dtype == torch.float32
    value.backward()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_zero_of_a_skipped_step_shows_hooks_nothing() -> None:
    model, x, mask, target = case()
    seen: list[Any] = []
    next(model.parameters()).register_hook(seen.append)
    value = Scheduled(attrreg.InputGradient(), schedules.Linear(4))(model, x, mask, target)
    value += 1.0  # as a loop may add what else it has
    value.backward()
    assert not seen


@pytest.mark.parametrize("weight", [None, -2.0])
def test_no_product_hides_a_factor_that_is_no_weight(weight: Any) -> None:
    regularizer = Scheduled(attrreg.InputGradient(), Own(weight) * Own(weight))
    with pytest.raises(ValueError, match=r"Product gives nan at step 0, .* must be finite and at least 0"):
        regularizer(*case())


def test_state_goes_through_a_checkpoint() -> None:
    regularizer = Scheduled(attrreg.InputGradient(), schedules.Every(3))
    regularizer.step = 5
    other = Scheduled(attrreg.InputGradient(), schedules.Every(3))
    other.load_state_dict(pickle.loads(pickle.dumps(regularizer.state_dict())))
    assert other.step == 5
    assert repr(eval(repr(regularizer))) == repr(regularizer)
    assert pickle.loads(pickle.dumps(regularizer)).step == 5


@pytest.mark.parametrize("state", [None, {}, {"step": "3"}, {"step": -1}, {"step": True}, {"step": 3, "param_groups": []}])
def test_a_state_of_something_else_is_refused(state: Any) -> None:
    regularizer = Scheduled(attrreg.InputGradient(), schedules.Every(3))
    with pytest.raises(ValueError, match=r"state must be .*got .*Pass what was saved"):
        regularizer.load_state_dict(state)
    assert regularizer.step == 0


@dataclass(frozen=True, repr=False)
class Own(schedules.Schedule):
    """A schedule of the user's."""

    weight: Any

    def __call__(self, step: int) -> Any:
        return self.weight


class NoDataclass(schedules.Schedule):
    """Such as has no repr either."""

    def __call__(self, step: int) -> float:
        return 1 - step


@pytest.mark.parametrize(
    "weight", [-0.5, math.nan, math.inf, None, "1", torch.tensor(-1.0), torch.ones(2), numpy.float32("nan"), 1j, 2**2000]
)
def test_a_schedule_that_gives_no_weight_is_refused(weight: Any) -> None:
    model, x, mask, target = case()
    regularizer = Scheduled(attrreg.InputGradient(), Own(weight))
    for call in (regularizer, regularizer.evaluate):
        with passes() as counted, pytest.raises(ValueError, match=r"Own gives .* at step 0, but a weight must be finite.*reward\."):
            call(model, x, mask, target)
        assert counted.forward == 0
    assert regularizer.step == 0


def test_a_schedule_that_gives_no_weight_later_is_refused_then() -> None:
    falling, data = Scheduled(attrreg.InputGradient(), NoDataclass()), case()
    for _ in range(2):
        falling(*data)
    with pytest.raises(ValueError, match="NoDataclass gives -1 at step 2"):
        falling(*data)


@pytest.mark.parametrize("weight", [0.5, torch.tensor(0.5), torch.tensor(0.5, requires_grad=True), numpy.float32(0.5), numpy.float64(0.5)])
def test_a_schedule_may_give_any_kind_of_number(weight: Any) -> None:
    data, regularizer = case(), Scheduled(attrreg.InputGradient(), Own(weight))
    want = 0.5 * attrreg.InputGradient()(*data)
    torch.testing.assert_close(regularizer(*data), want)
    found = regularizer.evaluate(*data)
    torch.testing.assert_close(found.total, want)
    assert not found.terms["InputGradient"].requires_grad


def test_a_step_that_raises_does_not_count() -> None:
    model, x, mask, target = case()
    regularizer = Scheduled(attrreg.InputGradient(), schedules.Every(3))
    with pytest.raises(ValueError, match="mask"):
        regularizer(model, x, mask[:1], target)
    assert regularizer.step == 0


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: schedules.Every(0), ValueError, "steps"),
        (lambda: schedules.Every(True), ValueError, "steps"),
        (lambda: schedules.Linear(0), ValueError, r"steps must be .*got 0\. Give a larger one"),
        (lambda: schedules.Linear(3, last=-1), ValueError, "last .* reward"),
        (lambda: schedules.Cosine(2.5), ValueError, "steps"),  # type: ignore[arg-type]
        (lambda: schedules.Cosine(3, first=float("inf")), ValueError, "first"),
        (lambda: schedules.Cosine(3, first=float("nan")), ValueError, "first"),
        (lambda: Scheduled(attrreg.InputGradient, schedules.Every(2)), TypeError, "regularizer"),  # type: ignore[arg-type]
        (lambda: Scheduled(attrreg.InputGradient(), 4), TypeError, "schedule"),  # type: ignore[arg-type]
    ],
)
def test_bad_settings(make: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message) as caught:
        make()
    check_message(caught.value, [])


def test_a_skipped_step_returns_the_models_output() -> None:
    model, (x, mask, target) = SmoothNet().double(), smooth_batch()
    scheduled = attrreg.Scheduled(attrreg.InputGradient(), attrreg.schedules.Every(2))
    with scheduled.attach(model):
        scheduled.evaluate(model, x, mask, target)
        logits = model(x)
        logits /= 0.1
        assert torch.equal(scheduled.evaluate(model, x, mask, target).output, model(x))
