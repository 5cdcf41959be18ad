"""Images of a half type before float32 weights, as some loaders give them: autocast brings the two together in every pass."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import attrreg
from attrreg import baselines, scores
from attrreg.captum import LayerActivation
from attrreg.engines import FiniteDifference

pytestmark = pytest.mark.cpu


class Net(nn.Module):
    """Features, which may meet, and a head."""

    def __init__(self, centred: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head, self.centred = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 3), centred

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        features = self.conv(x).tanh().mean((2, 3))
        if self.centred:
            features = features - 0.1 * features.mean(0)
        logits: Tensor = self.head(features)
        return logits if shift is None else logits + shift


def images() -> tuple[Tensor, Tensor, Tensor]:
    x = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    mask = torch.zeros(4, 16, 16, dtype=torch.bool)
    mask[:, 4:12, 4:12] = True
    return x, mask, torch.tensor([0, 1, 2, 0])


def nearly_all(mask: Tensor) -> Tensor:
    mask = torch.ones_like(mask)
    mask[:, 0, 0] = False  # features hardly move: does the layer see the images at all?
    return mask


def one_whole(mask: Tensor) -> Tensor:
    return mask | (torch.arange(4) == 0)[:, None, None]  # what rounding leaves of an unchanged image: do images meet?


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("change", [nearly_all, one_whole])
@pytest.mark.parametrize("attached", [False, True])
def test_questions_that_passes_answer(change: Callable[[Tensor], Tensor], centred: bool, attached: bool) -> None:
    x, mask, _ = images()
    regularizer, mask, model = attrreg.ActivationDifference(fill=baselines.Zero()), change(mask), Net(centred)
    want = regularizer(model, x.float(), mask)
    with torch.autocast("cpu", torch.bfloat16):
        if attached:
            with regularizer.attach(model):
                model(x)
                value = regularizer(model, x, mask)
        else:
            value = regularizer(model, x, mask)
    torch.testing.assert_close(value, want, rtol=0.1, atol=1e-3)
    value.backward()


def test_a_layer_that_is_looked_for_while_a_term_is_computed() -> None:
    x, mask, _ = images()
    floats = x.float()
    want = LayerActivation()(Net(), floats, mask, inputs=(floats, torch.tensor(1.0)))
    with torch.autocast("cpu", torch.bfloat16):
        value = LayerActivation()(Net(), x, mask, inputs=(x, torch.tensor(1.0)))
    torch.testing.assert_close(value, want, rtol=0.05, atol=0)


def test_finite_differences() -> None:
    x, mask, target = images()
    regularizer = attrreg.InputGradient(scores.TargetLogit())
    found = []
    for engine in (attrreg.engines.DoubleBackward(), FiniteDifference(step=0.3)):
        with torch.autocast("cpu", torch.bfloat16):
            value = regularizer.using(engine)(model := Net(), x, mask, target)
        found.append(torch.cat([gradient.flatten() for gradient in torch.autograd.grad(value, list(model.conv.parameters()))]))
    assert nn.functional.cosine_similarity(found[0], found[1], dim=0) > 0.9


class Told(Net):
    """Takes further features."""

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        assert shift is not None
        return super().forward(x) + nn.functional.linear(shift, self.head.weight)


@pytest.mark.parametrize("half", ["weights", "another input"])
def test_finite_differences_where_only_autocast_lets_types_meet(half: str) -> None:
    x, mask, target = images()
    floats, term, model = x.float(), attrreg.InputGradient(scores.TargetLogit()), Net()
    inputs = None
    if half == "weights":
        model.conv.bfloat16().requires_grad_(False)
    else:
        model = Told()
        inputs = (floats, torch.rand(4, 8).bfloat16())
    found = []
    for engine in (attrreg.engines.DoubleBackward(), FiniteDifference(step=0.3)):
        with torch.autocast("cpu", torch.bfloat16):
            value = term.using(engine)(model, floats, mask, target, inputs=inputs)
        found.append(torch.autograd.grad(value, model.head.weight)[0].flatten())
    assert nn.functional.cosine_similarity(found[0], found[1], dim=0) > 0.9


def test_an_objectives_own_backward_is_outside_autocast_as_the_objective_is() -> None:
    x, mask, target = images()
    smooth = torch.rand(256, 256, generator=torch.Generator().manual_seed(1)) - 0.3

    def objective(phi: Tensor, mask: Tensor) -> Tensor:
        return ((phi * (1 - mask)).sum(1).flatten(1) @ smooth).square().mean(1)

    class Exact(Net):
        """Leaves autocast by itself."""

        def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
            with torch.autocast("cpu", enabled=False):
                return super().forward(x, shift)

    regularizer, found = attrreg.InputGradient(scores.TargetLogit(), objective).using(FiniteDifference()), []
    for inside in (False, True):
        model = Exact()
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            value = regularizer(model, x.float(), mask, target)
        found.append(torch.autograd.grad(value, list(model.conv.parameters())))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)
