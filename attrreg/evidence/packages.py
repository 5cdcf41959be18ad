"""Data that comes by package name: found where it was installed, or said how to get it."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

FOLDER = "ATTRREG_PACKAGES"  # where `dpkg -x` put packages that are not installed


class Missing(RuntimeError):
    """A package with data is not here. The message says how to get it."""


def debian(package: str, path: str) -> Path:
    """A file or folder of a Debian package: as installed, or unpacked into the folder that the variable ATTRREG_PACKAGES names.

    Raises:
        Missing: it is in neither.
    """
    for root in (os.environ.get(FOLDER), "/"):
        if root and (found := Path(root) / path).exists():
            return found
    raise Missing(
        f"The Debian package {package} is not here. Install it with `apt-get install {package}`; or without root, in an empty folder, "
        f"`apt-get download {package} && dpkg -x {package}_*.deb .`, and pass `--packages` with that folder."
    )


def python(package: str, module: str, options: str = "") -> Any:
    """A module of a Python package with data. `options` are those that pip needs to install it.

    Raises:
        Missing: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or module.split(".")[0] != error.name.split(".")[0]:
            raise
        raise Missing(f"The package {package} is not here. Install it with `pip install {options}{package}`.") from None
