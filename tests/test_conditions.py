"""A recorded forward serves a call only where the call would compute the same; else the call runs its own."""

from __future__ import annotations

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

import attrreg
from attrreg import objectives, scores
from attrreg.regularizer import AttributionRegularizer
from attrreg.trace import Passes, passes
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
    model.body = nn.Conv2d(4, 5, 3, stride=2, padding=1).double()


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
    model, (x, mask, target) = SmoothNet().double(), smooth_batch()
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


@dataclass
class Output:
    """What PyTorch's own trees do not look into; it can be called, as Pyro's distributions can."""

    logits: Tensor

    def __call__(self) -> Tensor:
        return self.logits.softmax(1)


class OwnDict(dict[str, Tensor]):
    """Nor into a subclass."""


class Slots:
    """Nor into this."""

    __slots__ = ("logits",)

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


class Slot:
    """A single one, written as Python allows."""

    __slots__ = "logits"

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


class Returns(nn.Module):
    """Returns its logits, and a loss, in something."""

    def __init__(self, make: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.net, self.make = SmoothNet(), make

    def forward(self, x: Tensor, scale: float = 1.0) -> Any:
        return self.make(self.net(x) * scale)


def logits_of(output: Any) -> Tensor:
    """Wherever they are."""
    found: Tensor = output["logits"] if isinstance(output, dict) else output.logits
    return found


@pytest.mark.parametrize(
    "make", [lambda y: OwnDict(logits=y), lambda y: {"logits": y}, Output, Slots, Slot], ids=["own", "dict", "data", "slots", "slot"]
)
@pytest.mark.parametrize("change", ["backward", "in place", "another"])
def test_objects_of_all_kinds_are_looked_into(make: Callable[[Tensor], Any], change: str) -> None:
    model, (x, mask, target) = Returns(make).double(), smooth_batch()
    want = REG(model, x, mask, target, output=logits_of)
    with REG.attach(model):
        output = model(x)
        if change == "backward":
            F.cross_entropy(logits_of(output), target).backward()
        elif change == "in place":
            logits_of(output).div_(0.1)
        elif isinstance(output, dict):
            output["logits"] = output["logits"] * 10
        else:
            output.logits = output.logits * 10
        torch.testing.assert_close(REG(model, x, mask, target, output=logits_of), want)


def test_arithmetic_in_place_on_a_loss_that_the_model_returned_costs_nothing() -> None:
    model, (x, mask, target) = Returns(lambda y: {"loss": y.square().mean(), "logits": y}).double(), smooth_batch()
    want = REG(model, x, mask, target, output="logits")
    with REG.attach(model), passes() as counted:
        loss = model(x)["loss"]
        loss /= 2
        loss += REG(model, x, mask, target, output="logits")
    assert counted.forward == 0
    torch.testing.assert_close(loss, model(x)["loss"] / 2 + want)


def test_inputs_are_compared_by_what_they_mean() -> None:
    model, (x, mask, target) = Returns(lambda y: y).double(), smooth_batch()
    want = {scale: REG(model, x, mask, target, inputs=(x, scale)) for scale in (1.0, 3.0)}
    with REG.attach(model):
        for called, asked, scale, own in (
            ({"scale": 1.0}, (x,), 1.0, 0),
            ({}, {"scale": 1.0, "x": x}, 1.0, 0),
            ({}, None, 1.0, 0),
            ({"scale": 3.0}, None, 1.0, 1),
            ({"scale": 3.0}, (x, 3.0), 3.0, 0),
        ):
            model(x=x, **called)  # the images by keyword, too
            with passes() as counted:
                torch.testing.assert_close(REG(model, x, mask, target, inputs=asked), want[scale])
            assert counted.forward == own


def reused(model: nn.Module, x: Tensor, mask: Tensor, target: Tensor) -> bool:
    with passes() as counted:
        attrreg.InputGradient()(model, x, mask, target)
    return counted == Passes(forward=0, backward=1)


def test_a_recorded_pass_is_used_only_where_it_is_right() -> None:
    model, (x, mask, target) = SmoothNet().double(), smooth_batch()
    with attrreg.InputGradient().attach(model):
        model(x)
        with pytest.warns(UserWarning, match="another tensor of images"):
            assert not reused(model, x.clone(), mask, target)
        assert reused(model, x, mask, target)
        assert not reused(model, x, mask, target), "given out already"
        model(x)
        x.add_(1)
        assert not reused(model, x, mask, target), "changed since"
        model(x)
        with torch.no_grad():
            model.head.weight.add_(1)
        assert not reused(model, x, mask, target), "an optimizer stepped"
        model(x)
        with torch.no_grad():
            model(x)
        assert not reused(model, x, mask, target), "the last forward had no graph"
        model(x)
        model(x + 1)
        assert not reused(model, x, mask, target), "the last forward was on another batch"
        model(x)
        attrreg.ActivationDifference()(model, x + 1, mask)
        assert reused(model, x, mask, target), "the library's own passes are not the loop's"
        model(x)
        with passes() as counted:
            attrreg.GradCAM(layer="body")(model, x, mask, target)
        assert counted.forward == 1, "the layer was not recorded"
