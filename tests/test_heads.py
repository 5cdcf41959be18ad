"""A head given as `output=` is a part of what a pass runs: recomputed as it was, and not counted twice."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import attrreg
from tests.models import smooth_batch


class Head(nn.Module):
    """Its buffer moves with each forward, as those of power iterations and observers do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.factor = nn.Linear(8, 3), 2.0
        self.register_buffer("scale", torch.ones(()))

    def forward(self, h: Tensor) -> Tensor:
        scale = self.get_buffer("scale")
        logits: Tensor = self.linear(h) * scale.clone() * self.factor
        scale.mul_(1.5)
        return logits


def backbone() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 8, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).double()


def left_by(chunk: int | None, change: str) -> list[Tensor | None]:
    """The gradients of a penalty whose head changes before its backward."""
    torch.manual_seed(0)
    model, head, (x, mask, target) = backbone(), Head().double(), smooth_batch()
    reg = attrreg.IntegratedGradients(steps=4, chunk=chunk)
    if change == "lent":

        class Both(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.model, self.head = model, head

            def forward(self) -> Tensor:
                return reg(self.model, x, mask, target, output=self.head)

        lent = {name: (1.5 * parameter.detach()).requires_grad_() for name, parameter in Both().named_parameters()}
        torch.func.functional_call(Both(), lent, ()).backward()
        return [leaf.grad for leaf in lent.values()]
    value = reg(model, x, mask, target, output=head)
    if change == "setting":
        head.factor = 1.0
    else:
        head(model(x))  # the loop's own
    value.backward()
    return [parameter.grad for part in (model, head) for parameter in part.parameters()]


@pytest.mark.parametrize("change", ["buffer", "setting", "lent"])
def test_a_path_is_recomputed_with_the_head_as_it_was(change: str) -> None:
    for got, want in zip(left_by(1, change), left_by(None, change), strict=True):
        assert (got is None) == (want is None)
        if got is not None:
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-14)


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block, self.fc = nn.Sequential(nn.BatchNorm1d(8), nn.Tanh()), nn.Linear(8, 3)

    def forward(self, h: Tensor) -> Tensor:
        logits: Tensor = self.fc(checkpoint(self.block, h, use_reentrant=False))
        return logits


class Whole(nn.Module):
    """Gives features, and holds the head that a function makes logits by."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.top = backbone(), Checkpointed()

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.body(x)
        return features


@pytest.mark.parametrize("by", ["module", "function"])
def test_a_checkpointed_head_counts_no_batches_of_ours(by: str) -> None:
    model, (x, mask, target) = Whole().double(), smooth_batch()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    output = model.top if by == "module" else lambda h: model.top(h)
    attrreg.InputGradient()(model, x, mask, target, output=output).backward()
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


class Loop:
    """No module, but what holds one."""

    def __init__(self, head: nn.Module) -> None:
        self.head = head

    def logits(self, h: Tensor) -> Tensor:
        return torch.cat([self.head(part) for part in h.split(len(h))])


@pytest.mark.parametrize("by", ["closure", "method", "partial", "list", "loop's method"])
def test_a_head_that_a_function_holds_counts_no_batches_of_ours(by: str) -> None:
    model, head, (x, mask, target) = backbone(), Checkpointed().double(), smooth_batch()
    heads, before = [head], {name: buffer.clone() for name, buffer in head.named_buffers()}
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "closure": lambda h: head(h),
        "method": head.forward,
        "partial": partial(lambda part, h: part(h), head),
        "list": lambda h: heads[0](h),
        "loop's method": Loop(head).logits,
    }
    for reg in (attrreg.InputGradient(), attrreg.IntegratedGradients(steps=3)):
        reg(model, x, mask, target, output=functions[by]).backward()
    assert all(torch.equal(buffer, before[name]) for name, buffer in head.named_buffers())
