"""When and where something was measured: for records, and in words."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Mapping
from datetime import date
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import attrreg
from attrreg import processor

PACKAGES = ("torch", "timm", "captum")


def environment(device: str | torch.device = "cpu") -> dict[str, Any]:
    """When and where this runs, as values that JSON can hold."""
    cuda, cpu = torch.device(device).type == "cuda", processor.fields()
    # Not the older `allow_tf32`, which raises where these were set.
    tf32 = {"convolutions": torch.backends.cudnn.conv, "products": torch.backends.cuda.matmul}  # type: ignore[attr-defined]
    return {
        "date": date.today().isoformat(),
        "attrreg": attrreg.__version__,
        "code": _code(),
        "versions": {name: version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "machine": platform.machine(),
        "processor": cpu.get("model name"),  # how fast the libraries' products are depends on who made it
        # And on its design, which x86 CPUs tell by two numbers: on cloud machines, the names of several are the same.
        "family": None if cuda or not {"cpu family", "model"} <= cpu.keys() else f"family {cpu['cpu family']}, model {cpu['model']}",
        "capability": torch.backends.cpu.get_cpu_capability(),  # CPUs of another kind round in another way
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name(device) if cuda else None,
        "tf32": [name for name, where in tf32.items() if where.fp32_precision == "tf32"] if cuda else None,
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
    }


def machine(where: Mapping[str, Any]) -> str:
    """The accelerator of an environment, or its CPU."""
    known = [where[key] for key in ("family", "capability") if where.get(key)]  # which the first records do not have
    more = f" ({', '.join(known)})" if known else ""
    return where["accelerator"] or f"{where.get('processor') or where['machine']} CPU{more}"


@cache
def _code() -> str:
    """A hash of the library's code, which changes more often than its version: results and speed belong to one state of the code."""
    root, found = Path(attrreg.__file__).parent, hashlib.sha256()
    for path in sorted(path for path in root.rglob("*.py") if path.is_file()):  # an editor's lock is a link to nothing
        found.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return found.hexdigest()[:12]


def sentence(where: Mapping[str, Any]) -> str:
    """An environment in words: a sentence without its full stop."""
    packages = ", ".join(f"{name} {number}" for name, number in where["versions"].items())
    load = "" if where["load"] is None else f", load {where['load']}"
    tf32 = f", float32 {' and '.join(where['tf32'])} in TF32" if where.get("tf32") else ""
    host = f", host {where.get('processor') or where['machine']}" if where["accelerator"] else ""
    used = f"{tf32}{host}, {where['cores']} cores, {where['threads']} thread(s){load}"
    return f"{where['date']} on {machine(where)}{used}; attrreg {where['attrreg']}, {packages}, Python {where['python']}"
