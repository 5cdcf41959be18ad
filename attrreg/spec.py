"""What every declared object of the library shares: a repr that rebuilds it, but for images."""

from __future__ import annotations

import dataclasses
import math
from numbers import Integral
from types import ModuleType, NoneType
from typing import Any, Self

from attrreg.settings import is_real


def public_path(kind: Any) -> str:
    """Dotted path under which a class or function is reached after `import attrreg`."""
    module = kind.__module__
    if module.startswith("attrreg.attributions"):  # re-exported at the top; where the file lies is not the user's business
        module = "attrreg"
    elif module.startswith("attrreg.captum"):
        module = "attrreg.captum"
    return f"{module}.{kind.__qualname__}"


def source(value: Any) -> str:
    """Python source of a setting: `repr`, but with functions written as the path that imports them."""
    # A method of an object has a path that does not tell of which.
    bound = not isinstance(getattr(value, "__self__", None), type | ModuleType | NoneType)
    if not isinstance(value, Spec) and callable(value) and hasattr(value, "__qualname__") and not bound:
        return public_path(value)
    if isinstance(value, str):  # NumPy's repr is np.str_('a'), which would need numpy
        return str.__repr__(value)
    if is_real(value):  # the same
        number = int(value) if isinstance(value, Integral) else float(value)
        return repr(number) if math.isfinite(number) else f"float('{number}')"
    if isinstance(value, tuple):
        return "(" + "".join(f"{source(item)}, " for item in value).rstrip() + ")"
    return repr(value)


def is_own(part: object) -> bool:
    """Whether its class is the user's own, defined outside the library."""
    return not type(part).__module__.startswith("attrreg.")


class Spec:
    """Base of the frozen dataclasses a user writes: regularizers, scores, objectives, baselines, points, engines, schedules.

    Equality, hash and pickling are the dataclass's own. The repr names only the settings that differ from their defaults, by paths that
    work after `import attrreg, torch`, so `eval(repr(spec)) == spec`. A class that is no dataclass has Python's.
    """

    def __repr__(self) -> str:
        if not dataclasses.is_dataclass(self):
            return object.__repr__(self)
        settings = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value != field.default:
                settings.append(f"{field.name}={source(value)}")
        return f"{public_path(type(self))}({', '.join(settings)})"


class Key(Spec):
    """Base of scores, baselines and points: passes are looked up by them, so that terms with equal ones share a pass.

    Raises:
        TypeError: the class has no hash, as a dataclass that is not frozen.
    """

    def __new__(cls, *args: Any, **settings: Any) -> Self:
        """Refuse a class without a hash. Not in `__init_subclass__`, because `@dataclass` takes the hash away only afterwards."""
        if cls.__hash__ is None:
            raise TypeError(
                f"{cls.__name__} has no hash, by which equal scores and baselines find the passes that they share. Make it a frozen "
                "dataclass: @dataclass(frozen=True, repr=False)."
            )
        return super().__new__(cls)
