"""The options before a command, and what the commands check before they work: packages, `--out`, `--device`."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import torch
import typer

from attrreg import __version__


def show_version(wanted: bool) -> None:
    """Print it, and stop there."""
    if wanted:
        typer.echo(f"attrreg {__version__}")
        raise typer.Exit


def common(
    version: Annotated[bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version and exit.")] = False,
) -> None:
    """Attribution regularization for PyTorch."""


def check_packages(extra: str, needed: Iterable[str]) -> None:
    """Exit, and say how to install it, where a package is missing. The command and the extra that brings the package have one name."""
    absent = [name for name in needed if importlib.util.find_spec(name) is None]
    if absent:
        typer.echo(f"attrreg {extra} needs {', '.join(absent)}. Install with: pip install 'attrreg[{extra}]'", err=True)
        raise typer.Exit(1)


def check_out(out: Path, suffix: str, *beside: str) -> None:
    """Check where a command's results go.

    Args:
        out: what `--out` says.
        suffix: what it has to end in.
        beside: endings that take the place of that suffix in the names of the files that are written beside it.

    Raises:
        typer.BadParameter: it ends in something else, or one of the files cannot be written.
    """
    if out.suffix.lower() != suffix:
        raise typer.BadParameter(f"{out} does not end in {suffix}. Name such a file.", param_hint="--out")
    for path in (out, *(out.with_name(out.stem + end) for end in beside)):
        if not _writable(path):
            raise typer.BadParameter(f"{path} cannot be written. Name one that can, in a folder that exists.", param_hint="--out")


def check_device(name: str) -> torch.device:
    """The device that `--device` names.

    Raises:
        typer.BadParameter: there is no such device, or it cannot be used here.
    """
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError) as error:
        said = str(error).splitlines()[0]
        raise typer.BadParameter(f"{name!r} cannot be used here ({said}). Name another, such as cpu.", param_hint="--device") from None
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
