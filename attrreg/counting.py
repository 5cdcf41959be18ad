"""Counts of the passes that attrreg runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field


@dataclass
class Passes:
    """Passes that attrreg itself ran. The loop's own forward, when it is reused, is not among them.

    Attributes:
        forward: forwards through the model.
        backward: inner backwards, those that make attributions.
        checks: passes that only show, now and then, that images or places of a path do not depend on each other, or that activations come
            from the images. Equal counts may differ in these.
    """

    forward: int = 0
    backward: int = 0
    checks: int = field(default=0, compare=False)


_counting: ContextVar[tuple[Passes, ...]] = ContextVar("attrreg_passes", default=())


@contextmanager
def passes() -> Iterator[Passes]:
    """Count the passes that attrreg runs inside a `with` block.

    A path method that recomputes (`chunk=`) runs passes in the loss's own backward too; those count for the block
    in which the penalty was computed.
    """
    counter = Passes()
    token = _counting.set((*_counting.get(), counter))
    try:
        yield counter
    finally:
        _counting.reset(token)


def counters() -> tuple[Passes, ...]:
    """The counters of the `passes` blocks around this call."""
    return _counting.get()
