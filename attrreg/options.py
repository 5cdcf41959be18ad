"""What the commands check before they work: packages, `--out`, `--device`."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from pathlib import Path

import torch
import typer


def check_packages(extra: str, needed: Iterable[str]) -> None:
    """End where a package of the extra that a command is named like is not installed, and say how to get it."""
    absent = [name for name in needed if importlib.util.find_spec(name) is None]
    if absent:
        typer.echo(f"attrreg {extra} needs {', '.join(absent)}. Install with: pip install 'attrreg[{extra}]'", err=True)
        raise typer.Exit(1)


def part_file(out: Path) -> Path:
    """Where a file is written first, to take the place of the old one when it is whole."""
    out = out.resolve()  # a link stays
    return out.with_name(f".{out.name}.part")


def check_out(out: Path, suffix: str, *beside: str, by_part: bool = False) -> None:
    """Check where a command's results go.

    Args:
        out: what `--out` says.
        suffix: what it has to end in.
        beside: the ends of the files that go beside it, behind its name without that suffix.
        by_part: it is written by way of its `part_file`.

    Raises:
        typer.BadParameter: it ends otherwise, or one of them cannot be written.
    """
    if out.suffix.lower() != suffix:
        raise typer.BadParameter(f"{out} does not end in {suffix}. Name such a file.", param_hint="--out")
    for path in (out, *(out.with_name(out.stem + end) for end in beside), *([part_file(out)] if by_part else [])):
        if not _writable(path):
            raise typer.BadParameter(f"{path} cannot be written. Name one that can, in a folder that exists.", param_hint="--out")


def usable(name: str) -> torch.device:
    """The device that `--device` names.

    Raises:
        typer.BadParameter: there is none, or none here.
    """
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise typer.BadParameter(f"{name!r} cannot be used here ({str(error).splitlines()[0]}).", param_hint="--device") from None
    return device


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
