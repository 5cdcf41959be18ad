"""Attention: the math path's values, and derivatives of both orders."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import wraps
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends, sdpa_kernel
from torch.overrides import BaseTorchFunctionMode, TorchFunctionMode, _get_current_function_mode_stack
from torch.utils.checkpoint import checkpoint

from attrreg import GradCAM
from attrreg.objectives import SquaredOutside
from attrreg.ops import Phase, attention, twice_differentiable
from attrreg.ops.process import BY_MATH, attention_by, attention_kernels
from attrreg.scores import TargetLogit
from tests import oracles
from tests.models import assert_close, gradients
from tests.test_as_pytorch import check_in_place
from tests.test_ops import check


class Nested(nn.Module):
    """Grad-CAM's layer runs inside a mode and a choice of kernels that the model itself enters and leaves."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.third = nn.MultiheadAttention(4, 1, batch_first=True)
        self.head = nn.Linear(4, 2)
        self.stacks: list[list[TorchFunctionMode]] = []

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).tanh()
        with BaseTorchFunctionMode() as own, sdpa_kernel([SDPBackend.MATH, SDPBackend.FLASH_ATTENTION]):
            self.stacks.append(_get_current_function_mode_stack())
            x = self.second(x)
            self.stacks.append(_get_current_function_mode_stack())
            assert self.stacks[-1][-1] is own
        self.stacks.append(_get_current_function_mode_stack())
        tokens = x.tanh().flatten(2).mT
        tokens = self.third(tokens, tokens, tokens, need_weights=False)[0].unsqueeze(1)
        logits: Tensor = self.head(F.scaled_dot_product_attention(tokens, tokens, tokens).mean((1, 2)))
        return logits


def test_attention_that_is_left_to_pytorch_goes_by_its_math_path() -> None:
    """Also in a block that is recomputed when all is over, and inside multi-head attention, whatever the model has chosen."""
    x, seen = torch.randn(2, 5, 4, requires_grad=True), []
    layer, values = nn.MultiheadAttention(4, 2, 0.1, batch_first=True), attention.multi_head

    def inside(x: Tensor) -> Tensor:
        seen.append(_cur_sdpa_kernel_backends())
        return x.sin()

    def multi_head(*args: Any, **settings: Any) -> Any:
        seen.append(_cur_sdpa_kernel_backends())
        return values(*args, **settings)

    with patch.object(attention, "multi_head", multi_head), twice_differentiable(Phase()):
        y: Tensor = checkpoint(inside, x, use_reentrant=False)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            y = layer(y, y, y)[0]
    y.sum().backward()
    assert seen == [[SDPBackend.MATH]] * 3


def test_operators_start_beneath_what_the_model_entered_itself() -> None:
    model, x, mask = Nested().double(), torch.randn(2, 3, 4, 4, dtype=torch.float64), torch.zeros(2, 1, 4, 4)
    mask[..., :2] = 1
    reg, target = GradCAM("second", score=TargetLogit(), objective=SquaredOutside()), torch.tensor([0, 1])
    before, beneath = _cur_sdpa_kernel_backends(), _get_current_function_mode_stack()  # the latter: --device sets a default one
    with BaseTorchFunctionMode() as outer:
        with reg.attach(model):
            model(x)
            value = reg(model, x, mask, target)
        assert _get_current_function_mode_stack() == [*beneath, outer]
    assert _cur_sdpa_kernel_backends() == before
    stacks = [stack[len(beneath) :] for stack in model.stacks]
    assert [len(stack) for stack in stacks] == [2, 3, 2]  # ours comes with the layer, and stays until the end
    assert stacks[1][0] is outer and stacks[1][1] is stacks[2][1]
    with sdpa_kernel(SDPBackend.MATH):
        maps = oracles.grad_cam(model, x, target, oracles.score_target_logit, "second")
    expected = reg.objective(maps, mask.double()).mean()
    torch.testing.assert_close(value, expected)
    assert_close(gradients(model, value), gradients(model, expected), 1e-7)


def _from_one_projection(joint: Tensor) -> Tensor:
    q, k, v = joint.transpose(1, 2).contiguous().transpose(1, 2).chunk(3, -1)
    return F.scaled_dot_product_attention(q, k, v)


ATTENTION: dict[str, Callable[..., Tensor]] = {
    "plain": lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v) + m.sum(),
    "scaled": lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, scale=0.3) + m.sum(),
    "with a bias": lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m),
    "with a constant bias": lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m.detach()) + m.sum(),
    "with a bias of each head": lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m[0] + q[0, :, :1, :1]),
    "with a bias of all": lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m[0, 0]),
    "with a bias of each token": lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m[:, :, :1]),
    "with a constant bias of each token": lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m[:, :, :1].detach()) + m.sum(),
    "with a constant bias of each query": lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m[0, 0, :, :1].detach()) + m.sum(),
    "with a bias that hides some": lambda q, k, v, m: F.scaled_dot_product_attention(
        q, k, v, m.masked_fill(torch.eye(4, 5) > 0, -torch.inf)
    ),
    "with a bias that hides all from one": lambda q, k, v, m: F.scaled_dot_product_attention(
        q, k, v, m.masked_fill(torch.arange(4)[:, None] == 1, -torch.inf)
    ),
    "with a constant bias that hides all from one by a finite number": lambda q, k, v, m: (
        F.scaled_dot_product_attention(q, k, v, m.detach().masked_fill(torch.arange(4)[:, None] == 1, torch.finfo(m.dtype).min)) + m.sum()
    ),
    "with a constant bias that hides all from one by a number of no great size": lambda q, k, v, m: (
        F.scaled_dot_product_attention(q, k, v, m.detach().masked_fill(torch.arange(4)[:, None] == 1, -1e4)) + m.sum()
    ),
    "masked": lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, (m > -0.5)[:1]) + m.sum(),
    "causal": lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, is_causal=True) + m.sum(),
    "of one head": lambda q, k, v, m: F.scaled_dot_product_attention(q[:, 0], k[:, 0], v[:, 0]) + m.sum(),
    "of one head of one image": lambda q, k, v, m: F.scaled_dot_product_attention(q[0, 0], k[0, 0], v[0, 0]) + m.sum(),
    "values of another width": lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v[..., :2]) + m.sum(),
    "shapes that broadcast": lambda q, k, v, m: F.scaled_dot_product_attention(q, k[:1], v[:1]) + m.sum(),
    "of no queries": lambda q, k, v, m: torch.cat([F.scaled_dot_product_attention(q[:, :, :0], k, v), q], 2) + m.sum(),
    "of no keys": lambda q, k, v, m: F.scaled_dot_product_attention(q, k[:, :, :0], v[:, :, :0]) + q + m.sum(),
    "of values of no width": lambda q, k, v, m: torch.cat([F.scaled_dot_product_attention(q, k, v[..., :0]), q], -1) + m.sum(),
    "in views of one projection": lambda q, k, v, m: _from_one_projection(torch.cat([k, v, k], -1)) + q.sum() + m.sum(),
}


SHAPES = [(2, 3, 4, 6), (2, 3, 5, 6), (2, 3, 5, 6), (2, 1, 4, 5)]


@pytest.fixture(params=[0, 4], ids=["weights recomputed", "weights kept"])
def kept(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to how many times as large as the queries the CPU keeps weights."""
    monkeypatch.setattr(attention, "MAX_KEPT", request.param)


@pytest.mark.usefixtures("kept")
@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.bfloat16, 8e-3)])
def test_attention_equals_the_math_path(name: str, dtype: torch.dtype, tolerance: float) -> None:
    inputs = [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in SHAPES]
    check(ATTENTION[name], inputs, tolerance, sdpa_kernel(SDPBackend.MATH))


@pytest.mark.usefixtures("kept")
@pytest.mark.parametrize("name", ATTENTION)
def test_attributions_through_attention(name: str) -> None:
    inputs = [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in SHAPES]
    found, phase = [], Phase()
    for context, attributing in ((sdpa_kernel(SDPBackend.MATH), nullcontext()), (twice_differentiable(phase), phase.attributing())):
        with context:
            y = ATTENTION[name](*inputs)
            with attributing:  # which needs no gradient of the mask
                (first,) = torch.autograd.grad(torch.tanh(y).square().sum(), inputs[:1], create_graph=True)
            found.append([first, *torch.autograd.grad(first.square().sum() + y.sum(), inputs)])
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)


@contextmanager
def kept_sizes() -> Iterator[list[int]]:
    """How many numbers each tensor has that is saved for a backward."""
    sizes: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield sizes


@pytest.mark.cpu
@pytest.mark.parametrize("tokens", [5, 24, 25, 60])
def test_what_attention_saves_grows_with_tokens_only(tokens: int) -> None:
    q = torch.randn(2, 3, tokens, 6, requires_grad=True)
    with kept_sizes() as saved, twice_differentiable(Phase()):
        torch.autograd.grad(F.scaled_dot_product_attention(q, q, q).sum(), q, create_graph=True)
    most = 1 if tokens > 4 * 6 else max(1, tokens / 6)
    assert max(saved) == most * q.numel()


MULTI_HEAD: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "without weights": ({}, {"need_weights": False}),
    "tokens first": ({"batch_first": False}, {"need_weights": False}),
    "without biases": ({"bias": False}, {"need_weights": False}),
    "a learnt key": ({"add_bias_kv": True}, {"need_weights": False}),
    "a key of zeros": ({"add_zero_attn": True}, {"need_weights": False}),
    "padded keys": ({}, {"need_weights": False, "key_padding_mask": torch.arange(5).expand(5, 5) > 2}),
    "causal": ({}, {"need_weights": False, "is_causal": True, "attn_mask": torch.ones(5, 5).triu(1) > 0}),
}


@pytest.mark.usefixtures("kept")
@pytest.mark.parametrize("itself", [False, True], ids=["of others", "of itself"])
@pytest.mark.parametrize("name", MULTI_HEAD)
def test_multi_head_attention_equals_the_math_path(name: str, itself: bool) -> None:
    made, settings = MULTI_HEAD[name]
    layer = nn.MultiheadAttention(6, 2, dtype=torch.float64, **{"batch_first": True, **made})
    inputs = [torch.randn(5, 5, 6, dtype=torch.float64, requires_grad=True) for _ in range(1 if itself else 3)]

    def function(*_: Tensor) -> Tensor:
        o, weights = layer(*(inputs * 3 if itself else inputs), **settings)
        result: Tensor = o if weights is None else o.sum(-1, keepdim=True) + weights  # (N, L, 1) and (N, L, S)
        return result

    check(function, [*inputs, *layer.parameters()], 1e-10, sdpa_kernel(SDPBackend.MATH))


@pytest.mark.cpu
def test_what_multi_head_attention_saves_grows_with_tokens_only() -> None:
    layer, x = nn.MultiheadAttention(6, 3), torch.randn(60, 2, 6, requires_grad=True)
    with kept_sizes() as saved, twice_differentiable(Phase()):
        torch.autograd.grad(layer(x, x, x, need_weights=False)[0].sum(), x, create_graph=True)
    assert max(saved) == 3 * x.numel()


@pytest.mark.cpu
def test_a_multi_head_attention_that_is_not_pytorchs_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    @wraps(F.multi_head_attention_forward)
    def of_a_program(*args: Any, **settings: Any) -> Any:
        return F.multi_head_attention_forward(*args, **settings)

    opened: Any = attention._without_override_check
    assert opened(F.multi_head_attention_forward) is not None and opened(of_a_program) is opened(print) is None
    monkeypatch.setattr(attention, "MULTI_HEAD", of_a_program)
    layer, x = nn.MultiheadAttention(6, 3), torch.randn(5, 2, 6)
    want = layer(x, x, x)
    with twice_differentiable(Phase()):
        torch.testing.assert_close(layer(x, x, x), want)


@pytest.mark.cpu
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_an_attention_that_a_program_puts_in_its_place_later_is_called(monkeypatch: pytest.MonkeyPatch, dropout: float) -> None:
    layer, x, pytorchs = nn.MultiheadAttention(6, 3, dropout), torch.randn(5, 2, 6), F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *args, **settings: 2 * pytorchs(*args, **settings))
    torch.manual_seed(0)
    want = layer(x, x, x, need_weights=False)[0]
    torch.manual_seed(0)
    with twice_differentiable(Phase()):
        torch.testing.assert_close(layer(x, x, x, need_weights=False)[0], want)


class Own(Tensor):
    """A type of tensors that has a multi-head attention of its own."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.multi_head_attention_forward:
            return "its own", None
        return super().__torch_function__(func, types, args, kwargs)


@pytest.mark.cpu
def test_a_type_with_a_multi_head_attention_of_its_own_keeps_it() -> None:
    layer, x = nn.MultiheadAttention(6, 3), torch.randn(5, 2, 6).as_subclass(Own)
    with twice_differentiable(Phase()):
        assert layer(x, x, x)[0] == "its own"


@pytest.mark.cpu
@pytest.mark.parametrize("tokens", [0, 4])
def test_attention_to_nothing(tokens: int) -> None:
    q, k = torch.randn(2, 3, tokens, 6), torch.randn(2, 3, 4 - tokens, 6)
    with twice_differentiable(Phase()):
        torch.testing.assert_close(F.scaled_dot_product_attention(q, k, k), torch.zeros(2, 3, tokens, 6))


@pytest.mark.cpu
@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_computed_where_its_inputs_are(causal: bool) -> None:
    q = torch.randn(2, 3, 4, 6)
    with torch.device("meta"), twice_differentiable(Phase()):  # as of `torch.set_default_device`
        found = F.scaled_dot_product_attention(q, q, q, is_causal=causal)
    torch.testing.assert_close(found, F.scaled_dot_product_attention(q, q, q, is_causal=causal))


@pytest.mark.cpu
def test_attention_of_tensors_without_values() -> None:
    with FakeTensorMode(), twice_differentiable(Phase()):
        q, mask = torch.empty(2, 3, 4, 6, requires_grad=True), torch.empty(4, 4)
        assert F.scaled_dot_product_attention(q, q, q, mask).shape == q.shape


def test_attention_with_dropout_draws_as_pytorchs() -> None:
    q, found = torch.randn(1, 2, 5, 4), []
    for context in (sdpa_kernel(SDPBackend.MATH), twice_differentiable(Phase())):
        torch.manual_seed(0)
        with context:
            found.append(F.scaled_dot_product_attention(q, q, q, dropout_p=0.5))
    torch.testing.assert_close(*found)


@pytest.mark.usefixtures("kept")
@pytest.mark.parametrize(
    "function",
    [
        pytest.param(lambda h: F.scaled_dot_product_attention(h.mT, h.mT, h.mT), id="not dense"),
        pytest.param(lambda h: F.scaled_dot_product_attention(h, h, h, h[:, :1]), id="a trainable mask"),
    ],
)
def test_what_follows_may_work_in_place_where_pytorch_takes_its_math_path(function: Callable[[Tensor], Tensor]) -> None:
    check_in_place(function)


def test_kernels_are_chosen_until_the_last_thread_is_done() -> None:
    before, first, second = _cur_sdpa_kernel_backends(), attention_by(BY_MATH), attention_by(BY_MATH)
    first.__enter__()
    thread = threading.Thread(target=second.__enter__)
    thread.start()
    thread.join()
    first.__exit__(None, None, None)
    assert _cur_sdpa_kernel_backends() == BY_MATH
    second.__exit__(None, None, None)
    assert _cur_sdpa_kernel_backends() == before != BY_MATH


def test_choices_of_kernels_within_each_other_and_those_of_a_model_that_stay() -> None:
    with sdpa_kernel(_cur_sdpa_kernel_backends()):
        with attention_by(BY_MATH):
            with attention_by([SDPBackend.FLASH_ATTENTION]), attention_by([SDPBackend.EFFICIENT_ATTENTION]):
                pass
            assert _cur_sdpa_kernel_backends() == BY_MATH
        with attention_kernels(), attention_kernels():
            torch.backends.cuda.enable_flash_sdp(False)
        assert not torch.backends.cuda.flash_sdp_enabled()
