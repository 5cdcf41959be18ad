"""A recorded forward serves a call only where the call would compute the same; else the call runs its own."""

from __future__ import annotations

import copy
import threading
from collections import UserDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import attrreg
from attrreg import objectives, scores
from attrreg.regularizer import AttributionRegularizer
from attrreg.trace import passes
from tests.models import DEVICE, SmoothNet, assert_close, gradients, smooth_batch

WRITTEN: dict[str, Any] = {"score": scores.TargetLogit(), "objective": objectives.SquaredOutside()}
REG = attrreg.InputGradient(**WRITTEN)
CAM = attrreg.GradCAM(**WRITTEN)


class Holder(nn.Module):
    """A model that returns its logits in a mapping, and takes a class of conditions beside the images."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.scale = SmoothNet(), nn.Embedding(2, 3)

    def forward(self, x: Tensor, condition: Tensor, factor: float = 1.0) -> dict[str, Tensor]:
        return {"logits": self.net(x) * self.scale(condition) * factor}


class Pair(nn.Module):
    """Two nets, one of which is attached; with `both`, the images reach the logits through either."""

    def __init__(self, both: bool = True) -> None:
        super().__init__()
        self.a, self.b, self.both = SmoothNet(), SmoothNet(), both

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.a(x) + self.b(x) if self.both else self.a(x)
        return logits


@pytest.mark.parametrize("both", [True, False])
@pytest.mark.parametrize("inner", [REG, CAM, attrreg.ActivationDifference()], ids=["InputGradient", "GradCAM", "ActivationDifference"])
def test_an_attachment_to_a_part_leaves_the_whole_models_penalty_alone(inner: AttributionRegularizer, both: bool) -> None:
    model, (x, mask, target) = Pair(both).double(), smooth_batch()
    want = REG(model, x, mask, target)
    expected = gradients(model, want)
    with inner.attach(model.a):
        for attach in (False, True):
            if attach:
                handle = REG.attach(model)
                model(x)
            found = REG(model, x, mask, target)
            torch.testing.assert_close(found, want)
            assert_close(gradients(model, found), expected, 1e-10)
        handle.remove()


def test_own_passes_of_the_whole_leave_the_recording_of_a_part() -> None:
    model, (x, mask, target) = Pair().double(), smooth_batch()
    with REG.attach(model.a):
        model(x)
        REG(model, x, mask, target)
        with passes() as counted:
            REG(model.a, x, mask, target)
    assert counted.forward == 0


class Force(nn.Module):
    """Takes a gradient of its own with respect to the images."""

    def __init__(self) -> None:
        super().__init__()
        self.energy, self.net = SmoothNet(), SmoothNet()

    def forward(self, x: Tensor) -> Tensor:
        x.requires_grad_()
        (force,) = torch.autograd.grad(torch.tanh(self.energy(x)).sum() + x.pow(3).sum(), x)
        logits: Tensor = self.net(x + force)
        return logits


def test_a_models_own_gradient_of_its_images_is_whole() -> None:
    model, (x, mask, target) = Force().double(), smooth_batch()
    leaf = x.clone().requires_grad_()
    logits = model(leaf.clone())
    (phi,) = torch.autograd.grad(logits.gather(1, target[:, None]).sum(), leaf, create_graph=True)
    want = ((1 - mask.double()[:, None]) * phi).square().sum((1, 2, 3)).mean()
    torch.testing.assert_close(REG(model, x, mask, target), want)
    with REG.attach(model):
        torch.testing.assert_close(model(x), logits)
        found = REG(model, x, mask, target)
    torch.testing.assert_close(found, want)
    assert_close(gradients(model, found), gradients(model, want), 1e-10)


def test_what_the_loop_does_to_the_output_is_not_the_models() -> None:
    model, (x, mask, target) = SmoothNet().double(), smooth_batch()
    want = REG(model, x, mask, target)
    with REG.attach(model):
        logits = model(x)
        logits /= 0.1
        torch.testing.assert_close(REG(model, x, mask, target), want)


@pytest.mark.parametrize("change", [lambda out: out.pop("logits"), lambda out: out.update(logits=out["logits"].log_softmax(1))])
def test_what_the_loop_does_to_a_mapping_is_not_the_models(change: Callable[[dict[str, Tensor]], Any]) -> None:
    model, (x, mask, target) = Holder().double(), smooth_batch()
    inputs = x, torch.zeros(3, dtype=torch.long)
    want = REG(model, x, mask, target, inputs=inputs, output="logits")
    with REG.attach(model), passes() as counted:
        change(model(*inputs))
        torch.testing.assert_close(REG(model, x, mask, target, inputs=inputs, output="logits"), want)
    assert counted.forward == 0  # the recording has a mapping of its own


def test_a_recording_with_other_inputs_does_not_serve() -> None:
    model, (x, mask, target) = Holder().double(), smooth_batch()
    zero, one = torch.zeros(3, dtype=torch.long), torch.ones(3, dtype=torch.long)

    def at(inputs: Any) -> Tensor:
        return REG(model, x, mask, target, inputs=inputs, output="logits")

    want = at((x, zero))
    with REG.attach(model):
        for recorded, asked, own in (
            ((x, one), (x, zero), 1),
            ((x, zero), (x, zero), 0),
            ((x, zero), {"x": x, "condition": zero}, 0),
            ((x, zero), UserDict(condition=zero, x=x), 0),
            ((x, zero, 2.0), (x, zero), 1),
            ((x, zero), (x, zero.clone()), 1),
        ):
            model(*recorded)
            with passes() as counted:
                torch.testing.assert_close(at(asked), want)
            assert counted.forward == own
        model(x, zero)
        zero.add_(1)
        torch.testing.assert_close(at((x, zero)), at((x, one)))


def replace_layer(model: SmoothNet) -> None:
    """Another convolution."""
    model.body = copy.deepcopy(nn.Conv2d(4, 5, 3, stride=2, padding=1)).double()


def replace_weight(model: SmoothNet) -> None:
    """Another parameter in the same layer."""
    model.head.weight = nn.Parameter(model.head.weight.detach() * 2)


def unfreeze(model: SmoothNet) -> None:
    """One that was frozen in the forward."""
    model.stem.weight.requires_grad_()


def heat(model: SmoothNet) -> None:
    """A buffer."""
    model.drop.temperature = torch.tensor(10.0, device=DEVICE)


def heat_in_place(model: SmoothNet) -> None:
    """Its values."""
    assert isinstance(model.drop.temperature, Tensor)
    model.drop.temperature.fill_(10)


class Temperature(nn.Module):
    """Divides by a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("temperature", torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(self.temperature, Tensor)
        return x / self.temperature.to(x.dtype)


@pytest.mark.parametrize("change", [replace_layer, replace_weight, unfreeze, heat, heat_in_place])
def test_a_model_that_changed_since_runs_again(change: Callable[[SmoothNet], None]) -> None:
    model, (x, mask, target) = SmoothNet().double(), smooth_batch()
    model.drop = Temperature()  # type: ignore[assignment]
    model.stem.weight.requires_grad_(False)
    with REG.attach(model):
        model(x)
        change(model)
        found = REG(model, x, mask, target)
    want = REG(model, x, mask, target)
    torch.testing.assert_close(found, want)
    assert_close(gradients(model, found), gradients(model, want), 1e-10)


def test_weights_that_one_forward_borrowed_are_not_the_models() -> None:
    model, (x, mask, target) = copy.deepcopy(SmoothNet().double()), smooth_batch()
    fast = {name: (2 * value).detach().requires_grad_() for name, value in model.named_parameters()}
    want = REG(model, x, mask, target)
    with REG.attach(model):
        functional_call(model, fast, (x,))
        torch.testing.assert_close(REG(model, x, mask, target), want)


def test_hooks_that_come_later_change_what_the_model_returns() -> None:
    model, (x, mask, target) = SmoothNet().double(), smooth_batch()
    with REG.attach(model):
        model.register_forward_hook(lambda module, args, output: output * 10)
        model(x)
        with passes() as counted:
            found = REG(model, x, mask, target)
    assert counted.forward == 0
    torch.testing.assert_close(found, REG(model, x, mask, target))


class Steps(nn.Module):
    """Two outputs, of which the second comes a layer later; on larger images there is one more."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.c = nn.Conv2d(2, 3, 3, padding=1), *(nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        a = self.a(self.stem(x).tanh()).tanh()
        b = self.b(a).tanh()
        b = self.c(b).tanh() if x.shape[-1] > 8 else b
        return {"a": self.first(a.mean((2, 3))), "b": self.second(b.mean((2, 3)))}


@pytest.mark.parametrize("order", ["abab", "baba", "aab"])
def test_the_automatic_layer_is_that_of_the_output_asked_for(order: str) -> None:
    model, (x, mask, target) = Steps().double(), smooth_batch()
    want = {key: CAM(model, x, mask, target, output=key) for key in "ab"}
    with CAM.attach(model):
        for key in order:
            model(x)
            torch.testing.assert_close(CAM(model, x, mask, target, output=key), want[key])


def test_the_automatic_layer_is_that_of_the_images_size() -> None:
    model, (x, mask, target) = Steps().double(), smooth_batch()
    large = F.interpolate(x, scale_factor=2)
    want = [CAM(model, images, mask, target, output="b") for images in (x, large)]
    with CAM.attach(model):
        for images, expected in zip((x, large, x, large), want * 2, strict=True):
            model(images)
            torch.testing.assert_close(CAM(model, images, mask, target, output="b"), expected)


def test_the_automatic_layer_stays_known_where_the_output_is_a_function_written_in_the_loop() -> None:
    model, (x, mask, target) = Steps().double(), smooth_batch()
    with CAM.attach(model) as handle:
        for _ in range(3):
            model(x)
            CAM(model, x, mask, target, output=lambda out: out["a"])
        assert handle.map == "a"


@dataclass
class Output:
    """What PyTorch's own trees do not look into."""

    logits: Tensor


class InClass(nn.Module):
    """Returns it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = SmoothNet()

    def forward(self, x: Tensor) -> Output:
        return Output(self.net(x))


def test_the_losss_backward_through_an_object_makes_the_call_run_its_own_forward() -> None:
    model, (x, mask, target) = InClass().double(), smooth_batch()
    want = REG(model, x, mask, target, output="logits")
    with REG.attach(model):
        F.cross_entropy(model(x).logits, target).backward()
        torch.testing.assert_close(REG(model, x, mask, target, output="logits"), want)


class Stored(SmoothNet):
    """Keeps what its stem computes."""

    def forward(self, x: Tensor) -> Tensor:
        self.kept = torch.tanh(self.stem(x))
        logits: Tensor = self.head(self.body(self.kept).tanh().mean(dim=(2, 3)))
        return logits


def test_a_backward_through_a_part_of_the_recording_is_named() -> None:
    model, (x, mask, target) = Stored().double(), smooth_batch()
    with REG.attach(model):
        model(x)
        model.kept.square().mean().backward()
        with pytest.raises(RuntimeError, match=r"freed a part of its graph\. Compute the penalty before that backward"):
            REG(model, x, mask, target)


class Checkpointed(nn.Module):
    """Checkpoints the part that is attached."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.top = SmoothNet(norm=True), nn.Linear(3, 3)
        self.net.act = nn.ReLU()  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.top(checkpoint(self.net, x, use_reentrant=False))
        return logits


@pytest.mark.parametrize("kind", ["plain", "scheduled", "auto"])
def test_a_checkpointed_part_is_recomputed_as_it_ran(kind: str) -> None:
    found = {}
    for attach in (False, True):
        torch.manual_seed(0)
        model, (x, mask, target) = Checkpointed().double(), smooth_batch()
        reg: Any = {"plain": REG, "scheduled": attrreg.Scheduled(REG, attrreg.schedules.Every(2)), "auto": CAM}[kind]
        handle = reg.attach(model.net) if attach else None
        for _ in range(3):
            loss = F.cross_entropy(model(x), target) + reg(model.net, x, mask, target)
            loss.backward()
        found[attach] = [parameter.grad for parameter in model.parameters()]
        if handle is not None:
            handle.remove()
    for one, other in zip(found[False], found[True], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_hooks_on_images_are_shown_the_losss_gradient_alone() -> None:
    model, (x, mask, target) = SmoothNet().double(), smooth_batch()
    images = (x * 1).requires_grad_()
    made = images * 2
    seen: list[Tensor] = []
    made.retain_grad()
    made.register_hook(seen.append)
    for attach in (False, True):
        with REG.attach(model) if attach else torch.enable_grad():
            if attach:
                model(made)
            REG(model, made, mask, target)
    assert not seen and made.grad is None


@pytest.mark.cpu
def test_threads_that_train_side_by_side_leave_the_process_as_it_was() -> None:
    frame, flash = torch.utils.checkpoint._CheckpointFrame, torch.backends.cuda.flash_sdp_enabled()
    models = [SmoothNet().double() for _ in range(4)]

    def train(model: nn.Module) -> None:
        x, mask, target = smooth_batch()
        with REG.attach(model):
            for _ in range(10):
                (F.cross_entropy(model(x), target) + REG(model, x, mask, target)).backward()

    threads = [threading.Thread(target=train, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.utils.checkpoint._CheckpointFrame is frame and torch.backends.cuda.flash_sdp_enabled() == flash
    assert all(parameter.grad is not None for model in models for parameter in model.parameters())
