"""Whether a file can be written, asked before the work whose results go there."""

from __future__ import annotations

from pathlib import Path


def writable(path: Path) -> bool:
    """Whether a file can be written: by trying, since permissions do not say it all. What it holds stays."""
    path = path.resolve()  # a link stays
    new = not path.exists()
    try:
        with path.open("ab"):
            pass
        if new:
            path.unlink()
    except OSError:
        return False
    return True
