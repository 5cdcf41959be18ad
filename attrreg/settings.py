"""Checks of settings that several kinds share: numbers, counts, integers, truth values."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any, TypeGuard

import numpy


def brief(value: object) -> str:
    """Its repr for a message, cut off where it is long, as that of a tensor."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 100 else f"{text[:80]} ..."


def is_real(value: object) -> TypeGuard[float]:
    """Whether it is a real number by its type, NumPy's included; a bool is not."""
    return isinstance(value, Real) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether it is a finite number, and no text that looks like one."""
    try:
        return is_real(value) and math.isfinite(value)
    except OverflowError:  # an integer beyond all floats
        return False


def is_integer(value: object) -> bool:
    """Whether it is an integer by its type, NumPy's included: no truth value, and no float that happens to be whole."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def fits_64_bits(value: int) -> bool:
    """Whether it is in the range that PyTorch takes, for example as a seed."""
    return -(2**63) <= value < 2**64


def check_count(name: str, value: Any, least: int) -> None:
    """Check a setting that counts.

    Raises:
        ValueError: naming it.
    """
    if not is_integer(value):
        raise ValueError(f"{name} must be an integer of at least {least}, got {brief(value)}, a {type(value).__name__}. Pass an int.")
    if value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}. Give a larger one.")


def check_flag(name: str, value: object) -> None:
    """Check a truth value: another setting in its place would count as True.

    Raises:
        TypeError: naming it.
    """
    if not isinstance(value, bool | numpy.bool_):
        raise TypeError(f"{name} must be True or False, got {brief(value)}. Write one of these; other settings go by name.")


def keep_flag(spec: Any, name: str) -> None:
    """Check a truth value of a frozen dataclass, and keep it as Python's own.

    Raises:
        TypeError: naming it.
    """
    value = getattr(spec, name)
    check_flag(f"{type(spec).__name__}: {name}", value)
    object.__setattr__(spec, name, bool(value))


def keep_count(spec: Any, name: str, least: int) -> None:
    """Check a count of a frozen dataclass, and keep it as Python's own integer: small ones of NumPy's overflow.

    Raises:
        ValueError: naming it.
    """
    check_count(name, getattr(spec, name), least)
    object.__setattr__(spec, name, int(getattr(spec, name)))


def keep_integer(spec: Any, name: str, or_none: bool = False) -> None:
    """Check an integer of a frozen dataclass, and keep it as Python's own; `or_none`: None is allowed too.

    Raises:
        TypeError, ValueError: naming it.
    """
    value = getattr(spec, name)
    if value is None and or_none:
        return
    if not is_integer(value):
        wanted = "None or an integer" if or_none else "an integer"
        raise TypeError(f"{type(spec).__name__}: {name} must be {wanted}, got {brief(value)}, a {type(value).__name__}. Pass an int.")
    if not fits_64_bits(value):
        raise ValueError(f"{type(spec).__name__}: {name} must fit 64 bits, got {value!r}. Give a smaller one.")
    object.__setattr__(spec, name, int(value))
