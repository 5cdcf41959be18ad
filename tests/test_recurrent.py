"""LSTM layers: PyTorch's values, and derivatives of both orders."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from attrreg import InputGradient
from attrreg.graph import nodes
from attrreg.objectives import SquaredOutside
from attrreg.ops import Phase, twice_differentiable
from attrreg.scores import TargetLogit
from tests import oracles
from tests.models import DEVICE, WAYS, assert_close, gradients, logits_and_penalty, smooth_batch


@pytest.fixture(autouse=True)
def without_cudnn() -> Iterator[None]:
    """Its LSTM has no second derivative; ours does without it."""
    enabled = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = False
    yield
    torch.backends.cudnn.enabled = enabled


KINDS = [
    {},
    {"bidirectional": True, "batch_first": True},
    {"num_layers": 2, "bidirectional": True, "bias": False},
    {"num_layers": 3, "batch_first": True, "dropout": 0.5},  # which does nothing in eval mode
]
PARTS = [(0, 1, 2), (0,), (1,), (2,)]  # output, last hidden state, last cells: what is read


def results(layer: nn.LSTM, x: Tensor, states: tuple[Tensor, Tensor], parts: tuple[int, ...]) -> Tensor:
    y, last = layer(x, states)
    return torch.stack([(y, *last)[part].sin().sum() for part in parts]).sum()


def derivatives(layer: nn.LSTM, inputs: list[Tensor], parts: tuple[int, ...], ours: bool) -> list[Tensor]:
    """The value, its gradients with respect to the inputs, and the gradients of both together with respect to all leaves."""
    phase = Phase()
    forward: AbstractContextManager[Any] = twice_differentiable(phase) if ours else nullcontext()
    with forward:
        total = results(layer, inputs[0], (inputs[1], inputs[2]), parts)
    with phase.attributing():
        slopes = torch.autograd.grad(total, inputs, create_graph=True)
    found = "_RecurrenceGradientBackward" in {node.name() for node in nodes(*slopes)}
    assert found == ours
    penalty = torch.stack([(slope - 0.1).square().sum() for slope in slopes]).sum()
    return [total, *slopes, *torch.autograd.grad(penalty + 0.3 * total, [*inputs, *layer.parameters()])]


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("kind", KINDS)
def test_derivatives_are_pytorchs(kind: dict[str, Any], parts: tuple[int, ...]) -> None:
    layer = nn.LSTM(3, 4, **kind).double().eval()
    directions = layer.num_layers * (1 + layer.bidirectional)
    states = [torch.randn(directions, 5 if layer.batch_first else 6, 4, dtype=torch.float64) for _ in range(2)]
    inputs = [tensor.requires_grad_() for tensor in (torch.randn(5, 6, 3, dtype=torch.float64), *states)]
    got, expected = (derivatives(layer, inputs, parts, ours) for ours in (True, False))
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def test_gradients_by_differences() -> None:
    layer = nn.LSTM(2, 2, bidirectional=True).double()
    inputs = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 2, 2), (2, 2, 2), (2, 2, 2))]

    def outputs(x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        with twice_differentiable(Phase()):
            y, last = layer(x, (h, c))
        return y, *last

    assert torch.autograd.gradcheck(outputs, inputs)
    assert torch.autograd.gradgradcheck(outputs, inputs)


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("case", ["packed", "projection", "dropout", "half", "autocast"])
def test_packed_projected_dropped_out_and_half_layers_are_pytorchs(case: str) -> None:
    kinds: dict[str, dict[str, Any]] = {"projection": {"proj_size": 2}, "dropout": {"dropout": 0.5, "num_layers": 2}}
    dtype = torch.bfloat16 if case == "half" else torch.float32
    layer = nn.LSTM(3, 4, **kinds.get(case, {})).to(dtype)
    x = torch.randn(5, 2, 3).to(dtype)
    given: Any = pack_padded_sequence(x, torch.tensor([5, 3], device="cpu")) if case == "packed" else x
    values = []
    for context in (twice_differentiable(Phase()), nullcontext()):
        torch.manual_seed(1)
        with context, torch.autocast(DEVICE, torch.bfloat16, enabled=case == "autocast"):
            values.append(layer(given))
    torch.testing.assert_close(*values, rtol=0, atol=0)


def test_states_of_another_batch_are_refused_in_pytorchs_words() -> None:
    layer, x, state = nn.LSTM(3, 4).double(), *(torch.randn(*shape, dtype=torch.float64) for shape in ((5, 2, 3), (1, 1, 4)))
    arguments: Any = x, (state, state), layer._flat_weights, True, 1, 0.0, True, False, False
    messages = []
    for context in (twice_differentiable(Phase()), nullcontext()):
        with context, pytest.raises(RuntimeError) as error:
            torch.lstm(*arguments)
        messages.append(str(error.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("both", [True, False])
def test_a_model_may_write_into_the_output(both: bool) -> None:
    layer, x = nn.LSTM(3, 4, bidirectional=both).double(), torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    found = []
    for context in (twice_differentiable(Phase()), nullcontext()):
        with context:
            y = layer(x)[0]
            y[0] = 0.5
            total = y.sin_().sum()
        (slope,) = torch.autograd.grad(total, x, create_graph=True)
        found.append([slope, *torch.autograd.grad(slope.square().sum(), list(layer.parameters()), allow_unused=True)])
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_are_as_pytorchs(kind: dict[str, Any]) -> None:
    layer, x = nn.LSTM(3, 4, **kind).double().eval(), torch.randn(5, 2, 3, dtype=torch.float64)
    found = []
    for context in (twice_differentiable(Phase()), nullcontext()):
        with context:
            y, last = layer(x)
            with torch.no_grad():
                alone = layer(x)[0]
        found.append([(part.shape, part.stride(), part.dtype, part.requires_grad) for part in (y, *last, alone)])
    assert found[0] == found[1]


def test_weights_made_of_the_images_and_frozen_ones() -> None:
    layer, x = nn.LSTM(3, 4).double(), torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    layer.bias_hh_l0.requires_grad_(False)
    made = torch.randn(16, 4, 2, dtype=torch.float64, requires_grad=True)
    state = torch.randn(1, 1, 4, dtype=torch.float64, requires_grad=True)
    found = []
    for context in (twice_differentiable(phase := Phase()), nullcontext()):
        with context:
            weights = {"weight_hh_l0": made @ x.mean((0, 2))}
            y, last = torch.func.functional_call(layer, weights, (x, (state.expand(-1, 2, -1), state.detach().expand(-1, 2, -1))))
        with phase.attributing():
            (slope,) = torch.autograd.grad(y.sin().sum() + last[1].sum(), x, create_graph=True)
        found.append([slope, *torch.autograd.grad(slope.square().sum(), [made, state, *list(layer.parameters())[::2]])])
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)


def test_a_backward_under_autocast_does_not_round() -> None:
    layer, x = nn.LSTM(3, 4), torch.randn(5, 2, 3)
    found = []
    for context in (torch.autocast(DEVICE, torch.bfloat16), nullcontext()):
        with twice_differentiable(Phase()):
            total = layer(x)[0].sin().sum()
        with context:
            found.append(torch.autograd.grad(total, list(layer.parameters())[1]))
    torch.testing.assert_close(*found, rtol=0, atol=0)


class Rows(nn.Module):
    """Reads the rows of an image one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(16, 6, batch_first=True, bidirectional=True), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.lstm(x.transpose(1, 2).flatten(2))[0].mean(1))
        return logits


@pytest.mark.parametrize("way", WAYS)
def test_a_penalty_on_a_model_with_an_lstm(way: str) -> None:
    model, (x, mask, target) = Rows().double(), smooth_batch()
    regularizer = InputGradient(score=TargetLogit(), objective=SquaredOutside())
    map = oracles.input_gradient(model, x, target, oracles.score_target_logit)
    expected = oracles.squared_outside(map, mask.unsqueeze(1).double()).mean()
    want = gradients(model, F.cross_entropy(model(x), target) + expected)
    logits, penalty = logits_and_penalty(way, regularizer, model, (x, mask, target))
    torch.testing.assert_close(penalty, expected)
    assert_close(gradients(model, F.cross_entropy(logits, target) + penalty), want, 1e-10)


def test_third_derivatives_are_refused() -> None:
    layer, x = nn.LSTM(3, 4).double(), torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    with twice_differentiable(Phase()):
        total = layer(x)[0].sin().sum()
    (slope,) = torch.autograd.grad(total, x, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="third derivative"):
        torch.autograd.grad(curvature.square().sum(), x)
