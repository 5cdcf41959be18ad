"""Chunked paths run again by the model of their first run, whatever it holds by then."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

import attrreg
from tests.models import DEVICE, Batch, SmoothNet, assert_close, batch, gradients, smooth_batch
from tests.test_recompute import net


class Scaled(nn.Module):
    scale, shift = 3.0, 0.0

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.way = 1.0, "straight"
        self.act: Any = None

    def forward(self, h: Tensor, factor: float = 1.0) -> Tensor:
        if self.act is not None:
            h = self.act[0] * h if isinstance(self.act, tuple) else self.act(h)
        return self.shift + self.scale * factor * (h if self.way == "straight" else h.sin())


# Hooks that take what they get through the layer, each in the way of its kind.
HOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "before": lambda layer: layer.register_forward_pre_hook(lambda module, args: (args[0].sin(),)),
    "before, with keywords": lambda layer: layer.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {"factor": 3.0}), with_kwargs=True
    ),
    "after": lambda layer: layer.register_forward_hook(lambda module, args, result: result.square()),
    "after, with keywords": lambda layer: layer.register_forward_hook(
        lambda module, args, kwargs, result: result.square(), with_kwargs=True
    ),
    "backward": lambda layer: layer.register_full_backward_hook(lambda module, inner, outer: (2 * inner[0],)),  # type: ignore[index]
    "before backward": lambda layer: layer.register_full_backward_pre_hook(lambda module, outer: (2 * outer[0],)),  # type: ignore[index]
}


CHANGES: dict[str, Callable[[nn.Sequential], Any]] = {
    "modes": lambda model: model.eval(),
    "a setting": lambda model: setattr(model[2], "scale", 2.0),
    "a setting in place of the class's": lambda model: setattr(model[2], "shift", 2.0),
    "a setting taken back": lambda model: delattr(model[2], "scale"),
    "a named setting": lambda model: setattr(model[2], "way", "bent"),
    "a hook": lambda model: model[2]._forward_hooks.clear(),
    "a new hook": lambda model: model[5].register_forward_hook(lambda module, args, result: 2 * result),
    "a parameter": lambda model: setattr(model[5], "weight", nn.Parameter(2 * model[5].weight.detach())),  # type: ignore[operator]
    "a layer": lambda model: model.__setitem__(1, nn.Identity()),
    "all hooks": lambda model: setattr(model[2], "_forward_hooks", OrderedDict()),
    "the layers' order": lambda model: model.__delitem__(3),
    "weight normalisation": lambda model: nn.utils.parametrizations.weight_norm(model[5]),
    "pruning": lambda model: prune.random_unstructured(model[5], "weight", 0.5),
    "all parameters": lambda model: model.load_state_dict({k: 2 * v for k, v in model.state_dict().items()}, assign=True),
}


def held(model: nn.Module) -> list[Any]:
    """Settings by value, and by identity what each registry of a module holds."""
    values = [value for module in model.modules() for value in vars(module).values()]
    return [[*map(id, value.values())] if isinstance(value, dict) else value for value in values]


def found(chunk: int | None, hook: Callable[[nn.Module], Any], change: Callable[[nn.Sequential, Any], Any]) -> list[Tensor]:
    """A penalty and its gradients, where the model changes between them."""
    torch.manual_seed(0)
    x, mask, target = batch(3, channels=2, size=8, classes=3)
    layers = nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), Scaled(), nn.SiLU(), nn.Flatten(), nn.Linear(8 * 36, 3)
    model = nn.Sequential(*layers).double()
    handle = hook(model[2])
    weights = list(model.parameters())
    value = attrreg.IntegratedGradients(steps=4, chunk=chunk)(model, x.double(), mask, target)
    change(model, handle)
    after = held(model)
    value.backward()
    assert held(model) == after
    return [value, *(torch.zeros(1) if weight.grad is None else weight.grad for weight in weights)]


@pytest.mark.parametrize("change", CHANGES)
def test_chunks_run_by_the_model_of_their_first_run(change: str) -> None:
    one, other = (found(chunk, HOOKS["after"], lambda model, handle: CHANGES[change](model)) for chunk in (2, None))
    assert_close(one, other, 1e-10)


@pytest.mark.parametrize("hook", HOOKS)
def test_chunks_run_by_the_hooks_of_their_first_run(hook: str) -> None:
    one, other = (found(chunk, HOOKS[hook], lambda model, handle: handle.remove()) for chunk in (2, None))
    assert_close(one, other, 1e-10)


@pytest.mark.parametrize("act", [None, F.silu, nn.SiLU().forward, (2.0, None)], ids=["none", "function", "method", "tuple"])
def test_chunks_run_by_settings_of_every_kind(act: Any) -> None:
    one, other = (
        found(chunk, lambda layer: setattr(layer, "act", act), lambda model, _: setattr(model[2], "act", torch.sin)) for chunk in (2, None)
    )
    assert_close(one, other, 1e-10)


class Table(nn.Module):
    """Keeps a table for the size that it saw last, as relative positions are kept."""

    size, table = 0, torch.zeros(0)

    def forward(self, h: Tensor) -> Tensor:
        if self.size != h.shape[-1]:
            self.size, self.table = h.shape[-1], torch.linspace(0, 1, h.shape[-1], dtype=h.dtype)
        return h * self.table


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning", "ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("kind", ["a table of another size", "a mode of TorchScript"])
def test_chunks_find_what_belongs_together(kind: str) -> None:
    x, mask, target = batch(3, channels=2, size=8, classes=3)
    values = []
    for chunk in (1, None):
        torch.manual_seed(0)
        model = net(Table() if kind.startswith("a table") else torch.jit.script(nn.BatchNorm2d(8)))
        value = attrreg.IntegratedGradients(steps=4, chunk=chunk)(model, x.double(), mask, target)
        if kind.startswith("a table"):
            model(x[..., :6].double())
        else:
            model.eval()
        value.backward()
        assert kind.startswith("a table") or not model[1].training
        values.append([value, *(torch.zeros(1) if weight.grad is None else weight.grad for weight in model.parameters())])
    assert_close(values[0], values[1], 1e-10)


def test_what_a_recomputation_writes_does_not_stay_in_a_layer_that_changed() -> None:
    model, (x, mask, target) = net(nn.Identity()), batch(3, channels=2, size=8, classes=3)
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(model[5])  # whose hook writes the weight as a plain attribute
    value = attrreg.IntegratedGradients(steps=4)(model, x.double(), mask, target)
    nn.utils.remove_weight_norm(model[5])
    value.backward()
    assert "weight" not in vars(model[5]) and isinstance(model[5].weight, nn.Parameter)


class Penalised(nn.Module):
    """A penalty of a path as a forward, so that `functional_call` may lend the model its weights."""

    def __init__(self, model: nn.Module, data: Batch, chunk: int | None) -> None:
        super().__init__()
        self.model, self.data, self.chunk = model, data, chunk

    def forward(self) -> Tensor:
        x, mask, target = self.data
        return attrreg.IntegratedGradients(steps=4, chunk=self.chunk)(self.model, x.double(), mask, target)


@pytest.mark.parametrize("derived", [False, True])
def test_chunks_train_lent_parameters(derived: bool) -> None:
    model, data, found = net(nn.Identity()), batch(3, channels=2, size=8, classes=3), []
    for chunk in (1, None):
        leaves = {name: (1.5 * value.detach()).requires_grad_() for name, value in Penalised(model, data, chunk).named_parameters()}
        lent = {name: value * value if derived else value for name, value in leaves.items()}
        torch.func.functional_call(Penalised(model, data, chunk), lent, ()).backward()
        found.append([torch.zeros(1) if leaf.grad is None else leaf.grad for leaf in leaves.values()])
        assert found[-1][0].any()
    assert_close(found[0], found[1], 1e-10)


def test_a_recomputation_that_fails_leaves_what_the_model_has_now(monkeypatch: pytest.MonkeyPatch) -> None:
    x, mask, target = batch(3, channels=2, size=8, classes=3)
    model = SmoothNet(dropout=0.5)
    value = attrreg.IntegratedGradients(steps=2, chunk=1)(model, x, mask, target)
    model.drop.p = 0.25
    monkeypatch.setattr(F, "silu", lambda h: h.unflatten(0, (0, 0)))
    with pytest.raises(RuntimeError, match="unflatten"):
        value.backward()
    assert model.drop.p == 0.25


@pytest.mark.parametrize("then", [torch.float32, torch.float16, torch.bfloat16])
def test_chunks_run_by_the_autocast_of_their_first_run(then: torch.dtype) -> None:
    x, mask, target = batch(3, channels=2, size=8, classes=3)
    model, seen = SmoothNet(), []
    model.body.register_forward_hook(lambda module, args, result: seen.append(result.dtype))
    with torch.autocast(DEVICE, then, enabled=then != torch.float32):
        value = attrreg.IntegratedGradients(steps=2, chunk=1)(model, x, mask, target)
    first = len(seen)
    for inside in (False, True):
        with torch.autocast(DEVICE, torch.bfloat16, enabled=inside):
            value.backward(retain_graph=True)
    assert len(seen) > first and {*seen} == {then}


def test_hooks_on_all_modules_are_those_of_the_penalty() -> None:
    found = []
    for chunk in (1, None):
        torch.manual_seed(0)
        model, (x, mask, target) = SmoothNet().double(), smooth_batch()
        handle = nn.modules.module.register_module_forward_hook(lambda layer, args, y: 2 * y if isinstance(layer, nn.Linear) else None)
        try:
            value = attrreg.IntegratedGradients(steps=4, chunk=chunk)(model, x, mask, target)
        finally:
            handle.remove()
        found.append(gradients(model, value))
        assert not nn.modules.module._global_forward_hooks
    assert_close(found[0], found[1], 1e-10)


def test_chunks_show_gradients_of_lent_weights_themselves() -> None:
    """As the second inner step of MAML takes them: of weights that a first step has moved."""
    model, data, found = net(nn.Identity()), batch(3, channels=2, size=8, classes=3), []
    for chunk in (1, None):
        moved = {name: 1.5 * value for name, value in Penalised(model, data, chunk).named_parameters()}
        loss = torch.func.functional_call(Penalised(model, data, chunk), moved, ())
        gradients = torch.autograd.grad(loss, list(moved.values()), allow_unused=True, materialize_grads=True)
        assert gradients[0].any()
        found.append(list(gradients))
    assert_close(found[0], found[1], 1e-10)


class Ramp(nn.Module):
    """Makes a tensor of the default type, as coordinates beside an image are."""

    def forward(self, h: Tensor) -> Tensor:
        return h + torch.linspace(0, 1, h.shape[-1]).to(h) + h.new_tensor(torch.get_default_dtype().itemsize)


def test_chunks_have_the_default_type_of_their_first_run() -> None:
    model, (x, mask, target) = net(Ramp()), batch(3, channels=2, size=8, classes=3)
    found = []
    for chunk in (1, None):
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            value = attrreg.IntegratedGradients(steps=4, chunk=chunk)(model, x.double(), mask, target)
        finally:
            torch.set_default_dtype(before)
        found.append(gradients(model, value))
        assert torch.get_default_dtype() == before
    assert_close(found[0], found[1], 1e-10)
