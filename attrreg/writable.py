"""Whether results can be written, asked before the work whose they are."""

from __future__ import annotations

from pathlib import Path

import typer


def check_out(out: Path, suffix: str, *beside: str) -> None:
    """Check where a command's results go.

    Args:
        out: what `--out` says.
        suffix: what it has to end in.
        beside: the ends of the files that go beside it, behind its name without that suffix.

    Raises:
        typer.BadParameter: it ends otherwise, or one of them cannot be written.
    """
    if out.suffix.lower() != suffix:
        raise typer.BadParameter(f"{out} does not end in {suffix}. Name such a file.", param_hint="--out")
    for path in (out, *(out.with_name(out.stem + end) for end in beside)):
        if not _writable(path):
            raise typer.BadParameter(f"{path} cannot be written. Name one that can, in a folder that exists.", param_hint="--out")


def _writable(path: Path) -> bool:
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
