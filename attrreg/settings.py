"""Checks of settings that several kinds share: counts, places, seeds; and of a loss."""

from __future__ import annotations

from numbers import Integral
from typing import Any


def is_integer(value: object) -> bool:
    """Whether it is an integer by its type, NumPy's included: no truth value, and no float that happens to be whole."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_count(name: str, value: Any, least: int) -> None:
    """Check a setting that counts.

    Raises:
        ValueError: naming it.
    """
    if not is_integer(value):
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}, a {type(value).__name__}. Pass an int.")
    if value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}. Give a larger one.")


def keep_count(spec: Any, name: str, least: int) -> None:
    """Check a count of a frozen dataclass, and keep it as Python's own integer: small ones of NumPy's overflow.

    Raises:
        ValueError: naming it.
    """
    check_count(name, getattr(spec, name), least)
    object.__setattr__(spec, name, int(getattr(spec, name)))


def keep_integer(spec: Any, name: str, others: str = "") -> None:
    """The same of any integer; `others`: what else the setting may be.

    Raises:
        TypeError: naming it.
    """
    value = getattr(spec, name)
    if not is_integer(value):
        raise TypeError(f"{type(spec).__name__}: {name} must be {others}an integer, got {value!r}, a {type(value).__name__}. Pass an int.")
    object.__setattr__(spec, name, int(value))


def keep_optional(spec: Any, name: str) -> None:
    """The same of any integer, or None.

    Raises:
        TypeError: naming it.
    """
    if getattr(spec, name) is not None:
        keep_integer(spec, name, "None or ")


def check_loss(function: Any) -> None:
    """Check the loss of a `TaskLoss`.

    Raises:
        TypeError: naming it.
    """
    if isinstance(function, type):
        raise TypeError(
            f"TaskLoss: function must be a loss (logits, target) -> (N,), got the class {function.__name__}. Pass an instance of it, such "
            "as nn.CrossEntropyLoss(reduction='none')."
        )
    if function is not None and not callable(function):
        raise TypeError(f"TaskLoss: function must be a loss (logits, target) -> (N,), got {function!r}. Leave it out for cross-entropy.")
