"""The modules of a model, fast: a penalty asks for them several times a step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn


def modules(model: nn.Module) -> list[nn.Module]:
    """What `model.modules()` gives, each once and the model first, but in another order and without its nested generators."""
    found, seen = [model], {model}
    for module in found:  # which grows meanwhile
        if children := module._modules:  # most have none
            for child in children.values():
                if child is not None and child not in seen:
                    seen.add(child)
                    found.append(child)
    return found


def path_to(model: nn.Module, name: str) -> list[nn.Module]:
    """The modules that a layer is in, the model first and the layer itself last."""
    path = [model]
    for part in name.split("."):
        path.append(path[-1].get_submodule(part))
    return path


def runs_whole(module: nn.Module) -> bool:
    """Whether it is an encoder that PyTorch may run on nested tensors: then it must have no hooks inside, and meet no function mode."""
    nests = isinstance(module, nn.TransformerEncoder) and not module.training and getattr(module, "use_nested_tensor", False)
    return nests and not any(parameter.requires_grad for parameter in module.parameters())


def within_whole(model: nn.Module) -> set[nn.Module]:
    """The modules inside those encoders."""
    return {layer for module in modules(model) if runs_whole(module) for layer in modules(module)[1:]}


def attributes(model: nn.Module) -> Iterator[Any]:
    """The values of all attributes of all modules, and those in the lists, tuples and dicts among them."""
    for module in modules(model):
        for value in vars(module).values():
            held = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else (value,)
            yield from held
