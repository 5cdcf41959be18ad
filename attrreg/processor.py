"""Which CPU this is, as far as Linux tells."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path


@lru_cache
def fields() -> dict[str, str]:
    """What is known of the first core, by the names that Linux gives; empty elsewhere."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    named = (line.partition(":") for line in text.partition("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in named}
