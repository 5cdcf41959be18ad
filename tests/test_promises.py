"""What the pages promise, and no other test asks for: fractions, draws, failing backwards, gradients that a model keeps of its own."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attrreg
from tests.models import SmoothNet, assert_close, gradients, smooth_batch
from tests.test_conditions import REG
from tests.test_sharing import REGULARIZERS
from tests.test_side_effects import CALLS, CASES, Net, assert_same, draws, snapshot

TERM = attrreg.InputGradient()


def test_a_fraction_of_several_images_keeps_each_with_its_mask_and_its_target() -> None:
    model, (x, mask, _) = SmoothNet().double(), smooth_batch(4)
    target = torch.tensor([0, 1, 2, 1])
    each = [float(TERM(model, x[[i]], mask[[i]], target[[i]]).detach()) for i in range(4)]
    generator = torch.Generator().manual_seed(0)
    drawn = {round(float(TERM(model, x, mask, target, fraction=0.5, generator=generator).detach()), 9) for _ in range(80)}
    assert drawn == {round((a + b) / 2, 9) for a, b in itertools.combinations(each, 2)}  # all six pairs, and nothing else


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


class _Raises(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        raise ArithmeticError("from inside a backward")


class FailsBackwards(Net):
    """Behind the images and before the logits, so that every gradient meets it."""

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = _Raises.apply(super().forward(_Raises.apply(x)))
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


class Kept(nn.Module):
    """Takes a gradient of its own with respect to the images, and keeps its graph."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.energy = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), act, nn.Conv2d(4, 1, 3))
        self.net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = x if x.requires_grad else x.requires_grad_()
        (force,) = torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)
        logits: Tensor = self.net(x + force)
        return logits


@pytest.mark.parametrize("act", [nn.Tanh(), nn.SiLU(), nn.GELU()])
def test_a_model_that_keeps_the_graph_of_its_own_gradient_is_right_or_refused(act: nn.Module) -> None:
    model, (x, mask, target) = Kept(act).double(), smooth_batch()
    leaf = x.clone().requires_grad_()
    (phi,) = torch.autograd.grad(model(leaf.clone()).gather(1, target[:, None]).sum(), leaf, create_graph=True)
    want = ((1 - mask.double()[:, None]) * phi).square().sum((1, 2, 3)).mean()
    try:
        value = REG(model, x, mask, target)
        found = gradients(model, value)
    except RuntimeError as error:
        assert "third derivative" in str(error) and not isinstance(act, nn.Tanh)
    else:
        torch.testing.assert_close(value, want)
        assert_close(found, gradients(model, want), 1e-8)
