"""What a recorded forward depended on: hooks, settings, buffers, containers, and who runs it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, vmap
from torch.utils.checkpoint import checkpoint
from torchmetrics.classification import MulticlassAccuracy

import attrreg
from attrreg import baselines
from attrreg.trace import passes
from tests.models import SmoothNet, assert_close, gradients, nearly_all, smooth_batch
from tests.test_conditions import CAM, REG


def halved(model: SmoothNet) -> Any:
    return model.body.register_forward_pre_hook(lambda module, args: (args[0] / 2,))


def mixed(model: SmoothNet) -> Any:
    return model.act.register_forward_hook(lambda module, args, output: 0.6 * output + 0.4 * output.flip(0))


@pytest.mark.parametrize("hook", [halved, mixed])
@pytest.mark.parametrize("added", ["during the forward alone", "after it"])
def test_hooks_of_one_forward_are_no_others(hook: Callable[[SmoothNet], Any], added: str) -> None:
    model, (x, mask, target) = SmoothNet().double(), smooth_batch()
    with REG.attach(model):
        if added == "after it":
            model(x)
            hook(model)
        else:
            handle = hook(model)
            model(x)
            handle.remove()
        value = REG(model, x, mask, target)
    want = REG(model, x, mask, target)
    torch.testing.assert_close(value, want, rtol=1e-12, atol=0)
    assert_close(gradients(model, value), gradients(model, want), 1e-10)


class Switched(SmoothNet):
    """Computes as a number, a text and a truth value say."""

    def __init__(self) -> None:
        super().__init__(dropout=0.5)
        self.scale, self.kind, self.squares = 2, "plain", False

    def forward(self, x: Tensor) -> Tensor:
        logits = self.scale * super().forward(x) / (2 if hasattr(self.head, "halves") else 1)
        logits = logits.sigmoid() if self.kind == "soft" else logits
        return logits.square() if self.squares else logits


@pytest.mark.parametrize(
    ("name", "value"), [("scale", 3), ("scale", 2.0), ("kind", "soft"), ("squares", True), ("drop.p", 0.0), ("head.halves", True)]
)
def test_a_setting_that_changed_since_runs_again(name: str, value: Any) -> None:
    model, (x, mask, target) = Switched().double(), smooth_batch()
    layer, _, setting = name.rpartition(".")
    with REG.attach(model):
        model(x)
        setattr(model.get_submodule(layer), setting, value)
        with passes() as counted:
            found = REG(model, x, mask, target)
    assert counted.forward == 1
    torch.testing.assert_close(found, REG(model, x, mask, target), rtol=1e-12, atol=0)


class Scaled(SmoothNet):
    """Scales its logits by a list of numbers."""

    def forward(self, x: Tensor, scales: list[float] | None = None) -> Tensor:
        return super().forward(x) * (scales or [1.0])[0]


def test_a_list_that_was_changed_since_is_another() -> None:
    model, (x, mask, target), scales = Scaled().double(), smooth_batch(), [2.0]
    with REG.attach(model), passes() as counted:
        model(x, scales)
        REG(model, x, mask, target, inputs=(x, scales))
        assert counted.forward == 0
        model(x, scales)
        scales[0] = 3.0
        value = REG(model, x, mask, target, inputs=(x, scales))
    torch.testing.assert_close(value, REG(model, x, mask, target, inputs=(x, [3.0])), rtol=1e-12, atol=0)


class Lazy:
    """Computes the logits when somebody asks for them."""

    def __init__(self, probabilities: Tensor) -> None:
        self.probabilities = probabilities

    @cached_property
    def logits(self) -> Tensor:
        return self.probabilities.log()


class IsLazy(SmoothNet):
    def forward(self, x: Tensor) -> Any:
        return Lazy(super().forward(x).softmax(1))


@pytest.mark.parametrize("change", ["metric", "cached", "same again", "lazy output"])
def test_what_changes_no_logits_costs_no_forward(change: str) -> None:
    model, (x, mask, target) = (IsLazy() if change == "lazy output" else SmoothNet()).double(), smooth_batch()
    model.accuracy, model.act.slope = MulticlassAccuracy(num_classes=3), float("0.5")  # type: ignore[assignment]
    for regularizer in (REG, attrreg.ActivationDifference()):
        with regularizer.attach(model):
            output = model(x)
            if change == "metric":
                model.accuracy.update(output, target)
            elif change == "cached":
                model.features = output
            elif change == "same again":
                model.act.slope = float("0.5")  # type: ignore[assignment]
            with passes() as counted:
                regularizer(model, x, mask, target, output="logits" if change == "lazy output" else None)
        assert counted.forward == (0 if regularizer is REG else 1)


def odd(kind: str) -> Tensor:
    if kind == "nested":
        return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    return {
        "inference": torch.inference_mode()(torch.ones)(3),
        "meta": torch.empty(3, device="meta"),
        "NaN": torch.full((3,), math.nan),
        "sparse": torch.eye(3).to_sparse(),
    }[kind]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("kind", ["inference", "meta", "NaN", "sparse", "nested"])
def test_buffers_that_cannot_be_compared_cost_no_forward(kind: str) -> None:
    model, (x, mask, target) = SmoothNet().double(), smooth_batch()
    model.register_buffer("odd", odd(kind))
    for regularizer, own in ((REG, 0), (attrreg.ActivationDifference(), 1)):
        with regularizer.attach(model):
            model(x)
            with passes() as counted:
                regularizer(model, x, mask, target)
        assert counted.forward == own


class Block(nn.Module):
    """Computes the images of a part that is attached."""

    def __init__(self) -> None:
        super().__init__()
        self.pre, self.net = nn.Conv2d(2, 2, 1), nn.Sequential(nn.Conv2d(2, 4, 3), nn.GELU(), nn.LayerNorm(6))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.net(self.pre(x))
        return result


def test_a_part_is_recomputed_on_images_of_the_block() -> None:
    model, (x, _, _) = Block().double(), smooth_batch()
    with REG.attach(model.net):
        value: Any = checkpoint(model, x, use_reentrant=False)
        found = gradients(model, value.square().sum())
    assert_close(found, gradients(model, model(x).square().sum()), 1e-10)


def test_images_that_ask_for_a_gradient_since() -> None:
    model, (x, mask, target) = SmoothNet().double(), smooth_batch()
    x = x.detach()
    with REG.attach(model):
        model(x)
        REG(model, x.requires_grad_(), mask, target).backward()
    assert x.grad is not None and x.grad.any()


class Codes(nn.Module):
    """A buffer that the forward reads and then moves without PyTorch's noticing, as vector quantisers do."""

    centre: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("centre", torch.ones(4, 1, 1))

    def forward(self, h: Tensor) -> Tensor:
        result = h * self.centre.clone()
        self.centre.data.lerp_(h.detach().abs().mean((0, 2, 3))[:, None, None], 0.5)
        return result


class Renorm(nn.BatchNorm2d):
    """Reads in train mode the statistics that it moves."""

    def forward(self, input: Tensor) -> Tensor:
        assert self.running_mean is not None
        result = input - self.running_mean.clone()[:, None, None]
        self.running_mean.lerp_(input.detach().mean((0, 2, 3)), 0.5)
        return result


class Moving(nn.Module):
    """Reads a buffer, and then writes into it, puts another in its place (whose values nobody compares) or beside it, or lengthens it."""

    kept: Tensor

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.register_buffer("kept", torch.ones(2, dtype=torch.float64 if how == "grows" else torch.complex64))

    def forward(self, h: Tensor) -> Tensor:
        result = h * self.kept.abs().mean() * (2 if hasattr(self, "more") else 1)
        if self.how == "writes":
            self.kept.mul_(2)
        elif self.how == "assigns":
            self.kept = 2 * self.kept
        elif self.how == "adds":
            self.register_buffer("more", torch.ones(2))
        else:  # without PyTorch's noticing
            self.kept.data = torch.cat([self.kept, 2 * self.kept[-1:]])
        return result


@pytest.mark.parametrize("build", [Codes, lambda: Renorm(4), *(partial(Moving, how) for how in ("writes", "assigns", "adds", "grows"))])
def test_a_forward_that_moves_what_it_reads(build: Callable[[], nn.Module]) -> None:
    model, (x, _, _) = SmoothNet(), smooth_batch()
    model.norm = build()  # type: ignore[assignment]
    model.double()
    same = attrreg.ActivationDifference(fill=baselines.Zero())
    with same.attach(model):
        model(x)
        assert same(model, x, nearly_all(x)) < 1e-6


@dataclass
class Heads:
    heads: dict[str, Tensor]


class InHeads(SmoothNet):
    def forward(self, x: Tensor) -> Any:
        logits = super().forward(x)
        return Heads({"main": logits, "other": logits.flip(1)})


@pytest.mark.parametrize("change", ["replaced", "exchanged"])
def test_what_the_loop_puts_deep_into_the_output_is_not_the_models(change: str) -> None:
    model, (x, mask, target), main = InHeads().double(), smooth_batch(), lambda output: output.heads["main"]
    with REG.attach(model):
        heads = model(x).heads
        heads["main"], heads["other"] = heads["other"] if change == "exchanged" else heads["main"] / 0.1, heads["main"]
        value = REG(model, x, mask, target, output=main)
    torch.testing.assert_close(value, REG(model, x, mask, target, output=main), rtol=1e-12, atol=0)


def test_a_checkpoint_around_the_model_counts_no_batch_more() -> None:
    model, (x, mask, target) = SmoothNet(norm=True).double(), smooth_batch()
    counted = model.norm.num_batches_tracked
    assert isinstance(counted, Tensor)
    with REG.attach(model):
        logits: Any = checkpoint(model, x, use_reentrant=False)
        REG(model, x, mask, target)
        assert int(counted) == 1
        logits.sum().backward()
    assert int(counted) == 2  # as PyTorch's own recomputation does


def test_transforms_of_an_attached_model() -> None:
    model, (x, _, target) = SmoothNet().double(), smooth_batch()
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        logits: Tensor = functional_call(model, parameters, (image[None],))
        return nn.functional.cross_entropy(logits, label[None])

    def found() -> list[Any]:
        each = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, x.detach(), target)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of PyTorch, about its own TorchScript
            with forward_ad.dual_level():
                tangent = forward_ad.unpack_dual(model(forward_ad.make_dual(x.detach(), torch.ones_like(x)))).tangent
            traced = torch.jit.trace(model, x.detach())
        return [*each.values(), tangent, traced(x.detach())]

    want = found()
    with (REG + CAM).attach(model):
        torch.testing.assert_close(found(), want)


def test_a_layer_removed_while_attached_is_named_by_the_penalty_and_not_by_the_forward() -> None:
    model, (x, mask, target) = SmoothNet().double(), smooth_batch()
    wrapped = nn.Sequential(nn.Sequential(model.stem, model.act, model.body), nn.AdaptiveAvgPool2d(1), nn.Flatten(), model.head)
    named = attrreg.GradCAM(layer="0.2")
    with named.attach(wrapped):
        wrapped(x)
        wrapped[0] = nn.Conv2d(2, 5, 3).double()
        assert wrapped(x).shape == (len(x), 3)
        with pytest.raises(ValueError, match=r"layer '0\.2' is not in Sequential"):
            named(wrapped, x, mask, target)


def test_a_forward_that_could_not_be_returned_is_used_up() -> None:
    class Normalised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.utils.spectral_norm(nn.Conv2d(2, 4, 3)), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            maps = self.stem(x).tanh()
            return {"logits": self.head(maps.mean((2, 3))), "maps": 1 * maps}

    found = []
    for attach in (False, True):
        torch.manual_seed(0)
        model, (x, mask, target) = Normalised().double(), smooth_batch()
        with REG.attach(model) if attach else nullcontext():
            model(x)["maps"].add_(1)
            whole = REG.evaluate(model, x, mask, target, output="logits")  # by a forward of its own, which moves buffers
            found.append(torch.stack([whole.total, REG(model, x, mask, target, output="logits")]))
    torch.testing.assert_close(*found)


def test_a_forward_of_evaluate_is_another_forward_of_the_model() -> None:
    found = []
    for attach in (False, True):
        torch.manual_seed(0)
        model, (x, mask, target) = SmoothNet().double(), smooth_batch()
        nn.utils.spectral_norm(model.stem)
        with REG.attach(model) if attach else nullcontext():
            model(x)
            REG.evaluate(model, 2 * x, mask, target)  # moves buffers, as model(2 * x) would
            found.append(REG(model, x, mask, target))
    torch.testing.assert_close(*found)
