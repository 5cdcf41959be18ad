"""Nothing is left behind, after success and after an exception."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack

import attrreg
from attrreg import scores
from attrreg.attach import attached, suspended
from attrreg.trace import passes
from tests.models import DEVICE, Raising, SmoothNet, assert_close, gradients, smooth_batch
from tests.test_sharing import FOUR, REGULARIZERS

CALLS: dict[str, Callable[..., Any]] = {
    "call": lambda r, *arguments: r(*arguments),
    "attribute": lambda r, model, x, mask, target: r.attribute(model, x, target=target, mask=mask),
    "backward": lambda r, *arguments: r(*arguments).backward(),
}


class Failing(nn.Module):
    """Raises in the given forward of its life."""

    def __init__(self) -> None:
        super().__init__()
        self.fail_at = -1
        self.calls = [0]  # a list: plain settings are put back where a path is recomputed

    def forward(self, x: Tensor) -> Tensor:
        self.calls[0] += 1
        if self.calls[0] == self.fail_at:
            raise ArithmeticError("from inside the model")
        return x


class Net(SmoothNet):
    def __init__(self) -> None:
        super().__init__(norm=True, dropout=0.3)
        self.failing = Failing()
        self.drop = nn.Sequential(self.drop, self.failing)  # type: ignore[assignment]
        self.body.eval()  # a mix of modes, in which the norm moves its statistics
        self.stem.bias.requires_grad_(False)  # type: ignore[union-attr]


def snapshot(model: nn.Module, x: Tensor) -> dict[str, Any]:
    flags = torch.backends.cuda
    return {
        "hooks": [
            [len(d) for d in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._forward_hooks_always_called)]
            for m in model.modules()
        ],
        "buffers": [(id(b), b.clone()) for b in model.buffers()],
        "parameters": [(id(p), p.clone(), p.requires_grad, p._version, p.grad) for p in model.parameters()],
        "modes": [m.training for m in model.modules()],
        "attributes": [sorted(vars(m)) for m in model.modules()],
        "rng": torch.get_rng_state(),
        "x": (x.clone(), x.requires_grad, x.grad, x._version),
        "kernels": (flags.flash_sdp_enabled(), flags.math_sdp_enabled(), flags.mem_efficient_sdp_enabled(), flags.cudnn_sdp_enabled()),
        "function_modes": len(_get_current_function_mode_stack()),
        "grad": torch.is_grad_enabled(),
        "tensor_hooks": [
            [len(t._backward_hooks or ()), len(getattr(t, "_post_accumulate_grad_hooks", None) or ())] for t in (*model.parameters(), x)
        ],
        "checkpoints": torch.utils.checkpoint._CheckpointFrame,
        "dispatch_modes": torch._C._len_torch_dispatch_stack(),
        "saved_tensors": torch._C._autograd._top_saved_tensors_default_hooks(False),
        "autocast": (torch.is_autocast_enabled(DEVICE), torch.get_autocast_dtype(DEVICE), torch.is_autocast_cache_enabled()),
    }


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(equal(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)


def assert_same(before: dict[str, Any], after: dict[str, Any], but: tuple[str, ...] = ()) -> None:
    for key in before.keys() - set(but):
        assert equal(before[key], after[key]), key


def has_map(name: str) -> bool:
    return name not in ("activation_difference", "pgd_ex", "four")


CASES = [(name, call) for name in REGULARIZERS for call in CALLS if call != "attribute" or has_map(name)]


def draws(name: str) -> bool:
    return name in ("integrated_gradients_noise", "expected_gradients", "activation_difference", "projection", "four", "noise_tunnel")


LEFT = [(name, call) for name, call in CASES if call != "call" or draws(name)]  # else a backward contains the call


@pytest.mark.parametrize(("name", "call"), LEFT)
def test_nothing_left_after_success(name: str, call: str) -> None:
    model, (x, mask, target) = Net().double(), smooth_batch()
    before = snapshot(model, x)
    CALLS[call](REGULARIZERS[name], model, x, mask, target)
    # A term's own draws, and nothing else, advance the generator; the backward is the caller's, and fills .grad.
    allowed = (("rng",) if draws(name) else ()) + (("parameters",) if call == "backward" else ())
    assert_same(before, snapshot(model, x), but=allowed)


@pytest.mark.parametrize("name", REGULARIZERS)
def test_own_draws_come_from_the_generator_alone(name: str) -> None:
    model, (x, mask, target) = Net().double(), smooth_batch()
    before = snapshot(model, x)
    generators = [torch.Generator().manual_seed(11) for _ in range(2)]
    values = []
    for generator in generators:
        torch.set_rng_state(before["rng"])
        values.append(REGULARIZERS[name](model, x, mask, target, generator=generator))
        assert_same(before, snapshot(model, x))
    torch.testing.assert_close(values[0], values[1])
    assert draws(name) == (not torch.equal(generators[0].get_state(), torch.Generator().manual_seed(11).get_state()))


@pytest.mark.parametrize(("name", "call"), LEFT)
def test_nothing_left_after_an_exception_inside_the_model(name: str, call: str) -> None:
    with passes() as counted:
        CALLS[call](REGULARIZERS[name], Net().double(), *smooth_batch())
    for fail_at in range(1, min(counted.forward, 3) + 1):
        model, (x, mask, target) = Net().double(), smooth_batch()
        model.failing.fail_at = fail_at
        before = snapshot(model, x)
        with pytest.raises(ArithmeticError, match="from inside the model"):
            CALLS[call](REGULARIZERS[name], model, x, mask, target)
        assert_same(before, snapshot(model, x), but=("rng",) if call == "backward" and draws(name) else ())


class FailsBackwards(Net):
    """Behind the images and before the logits, so that every gradient meets it."""

    def forward(self, x: Tensor) -> Tensor:
        error = ArithmeticError("from inside a backward")
        logits: Tensor = Raising.apply(super().forward(Raising.apply(x, error)), error)
        return logits


VALUES = ("activation_difference", "layer_activation", "feature_ablation", "shapley_values")  # these take no gradient


@pytest.mark.parametrize(("name", "call"), [(name, call) for name, call in CASES if call != "backward" and name not in VALUES])
def test_nothing_left_after_an_exception_inside_the_inner_backward(name: str, call: str) -> None:
    model, (x, mask, target) = FailsBackwards().double(), smooth_batch()
    before = snapshot(model, x)
    with pytest.raises(ArithmeticError, match="from inside a backward"):
        CALLS[call](REGULARIZERS[name], model, x, mask, target)
    assert_same(before, snapshot(model, x))
    with REGULARIZERS[name].attach(model):
        model(x)
        during = torch.get_rng_state()
        with pytest.raises(ArithmeticError, match="from inside a backward"):
            CALLS[call](REGULARIZERS[name], model, x, mask, target)
        assert torch.equal(torch.get_rng_state(), during)
    assert_same(before, snapshot(model, x), but=("rng", "buffers"))  # of the loop's own forward


@pytest.mark.parametrize("way", ["call", "evaluate"])
@pytest.mark.parametrize("name", [name for name in REGULARIZERS if draws(name)])
def test_draws_are_new_in_every_call_and_advance_the_default_generator(name: str, way: str) -> None:
    model, (x, mask, target) = SmoothNet().double(), smooth_batch()  # which draws nothing itself
    regularizer = REGULARIZERS[name]

    def value() -> Tensor:
        found = regularizer.evaluate(model, x, mask, target).total if way == "evaluate" else regularizer(model, x, mask, target)
        return found.detach()

    states, found = [torch.get_rng_state()], []
    for _ in range(3):
        found.append(value())
        states.append(torch.get_rng_state())
    assert len({float(each) for each in found}) == 3
    assert not any(torch.equal(one, other) for one, other in itertools.combinations(states, 2))
    torch.set_rng_state(states[1])
    torch.testing.assert_close(value(), found[1], rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", REGULARIZERS)
def test_evaluate_leaves_what_the_users_forward_would(name: str) -> None:
    model, (x, mask, target) = SmoothNet(norm=True, dropout=0.3).double(), smooth_batch()
    twin = copy.deepcopy(model)
    torch.manual_seed(3)
    logits = twin(x)
    want = torch.get_rng_state()
    torch.manual_seed(3)
    penalty = REGULARIZERS[name].evaluate(model, x, mask, target, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(penalty.output, logits)
    assert torch.equal(torch.get_rng_state(), want)
    assert not equal(list(model.buffers()), list(SmoothNet(norm=True).double().buffers()))
    assert equal(list(model.buffers()), list(twin.buffers()))


class Interrupted(SmoothNet):
    """From the second forward on."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls > 1:
            raise KeyboardInterrupt
        return super().forward(x)


def test_a_call_that_fails_winds_back_the_generator() -> None:
    x, mask, target = smooth_batch()
    generator = torch.Generator().manual_seed(1)
    before = generator.get_state()
    with pytest.raises(ValueError, match="one an image"):
        attrreg.ExpectedGradients(objective=lambda map, mask: map.sum())(SmoothNet().double(), x, mask, target, generator=generator)
    assert torch.equal(generator.get_state(), before)
    with pytest.raises(KeyboardInterrupt):
        attrreg.ActivationDifference("body")(Interrupted().double(), x, mask, generator=generator)
    assert torch.equal(generator.get_state(), before)


def test_a_projection_with_the_seed_zero_draws_nothing() -> None:
    model, (x, mask, _) = SmoothNet().double(), smooth_batch()
    before = snapshot(model, x)
    attrreg.InputGradient(scores.RandomProjection(seed=0))(model, x, mask)
    assert_same(before, snapshot(model, x))


def test_evaluate_that_fails_leaves_everything() -> None:
    model, (x, mask, target) = Net().double().train(), smooth_batch()
    model.failing.fail_at = 2
    before = snapshot(model, x)
    with pytest.raises(ArithmeticError):
        attrreg.ActivationDifference().evaluate(model, x, mask, target)
    assert_same(before, snapshot(model, x))


def test_attached_forward_is_the_users_own() -> None:
    model, (x, mask, target) = SmoothNet(norm=True, dropout=0.3).double(), smooth_batch()
    twin = copy.deepcopy(model)
    torch.manual_seed(3)
    want = twin(x)
    before = snapshot(model, x)
    torch.manual_seed(3)
    with FOUR.attach(model) as handle:
        got = model(x)
        assert torch.equal(got, want)
        assert equal(list(model.buffers()), list(twin.buffers()))
        FOUR(model, x, mask, target)
        assert equal(list(model.buffers()), list(twin.buffers()))
        handle.remove()
        handle.remove()
        assert attached(model) is None
    assert_same(before, snapshot(model, x), but=("buffers", "rng"))


def test_attached_forward_that_raises_leaves_nothing() -> None:
    model, (x, mask, target) = Net().double(), smooth_batch()
    before = snapshot(model, x)
    with FOUR.attach(model):
        during = snapshot(model, x)
        model.failing.fail_at = 1
        with pytest.raises(ArithmeticError):
            model(x)
        assert_same(during, snapshot(model, x), but=("rng", "buffers"))
        with passes() as counted:
            FOUR(model, x, mask, target)
        assert counted.forward == 2  # nothing was recorded, so nothing is reused
    assert_same(before, snapshot(model, x), but=("rng", "buffers"))  # of the loop's own forward


@pytest.mark.parametrize("by", ["the next forward", "remove"])
def test_an_interrupted_forward_is_cleaned_up(by: str) -> None:
    model, (x, _, _) = SmoothNet().double(), smooth_batch()
    before = snapshot(model, x)

    def interrupt(module: nn.Module, args: Any, output: Any) -> None:
        raise KeyboardInterrupt

    with FOUR.attach(model):
        during = snapshot(model, x)
        hook = model.head.register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(x)
        hook.remove()
        if by == "the next forward":
            model(x)
            assert_same(during, snapshot(model, x))
    assert_same(before, snapshot(model, x))


def test_copies_of_an_attached_model_are_free() -> None:
    model, (x, _, _) = SmoothNet().double(), smooth_batch()
    with FOUR.attach(model):
        model(x)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert attached(twin) is None
            torch.testing.assert_close(twin(x), model(x))
            with FOUR.attach(twin):
                twin(x)
        assert attached(model) is not None


def test_x_that_requires_grad_keeps_its_grad_to_itself() -> None:
    model, (x, mask, target) = SmoothNet().double(), smooth_batch()
    x.requires_grad_()
    value = attrreg.InputGradient()(model, x, mask, target)
    attrreg.InputGradient().attribute(model, x, target=target)
    assert x.grad is None
    plain = gradients(model, attrreg.InputGradient()(model, x.detach(), mask, target))
    assert_close(gradients(model, value), plain, 1e-12)


def test_listing_layers_leaves_everything_as_it_was() -> None:
    layers = [nn.ReLU(inplace=True), nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(144, 3)]
    model, (x, mask, target), others = nn.Sequential(*layers).double(), smooth_batch(), smooth_batch()[0]
    with attrreg.InputGradient().attach(model):
        model(x)
        before = snapshot(model, others)
        graphs: list[bool] = []
        handle = model[1].register_forward_hook(lambda *given: graphs.append(given[2].requires_grad))
        assert [layer.name for layer in attrreg.layers(model, others)] == ["0", "1", "2", "3"]
        handle.remove()
        assert graphs == [False]
        assert_same(before, snapshot(model, others))
        with passes() as counted:
            attrreg.InputGradient()(model, x, mask, target)
    assert counted.forward == 0  # the loop's forward is still the last one


def test_a_pass_inside_a_pass_lets_the_rest_of_that_be_no_forward_of_the_loops() -> None:
    model, (x, mask, target) = SmoothNet().double(), smooth_batch()
    with attrreg.InputGradient().attach(model), passes() as counted:
        model(x)
        with suspended(model):
            with suspended(model):
                pass
            model(x + 1)
        attrreg.InputGradient()(model, x, mask, target)
    assert counted.forward == 0
