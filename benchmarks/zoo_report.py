"""The zoo's table, docs/zoo.md."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import torchvision

from attrreg.environment import environment
from attrreg.tables import markdown_table
from benchmarks.zoo_check import CLEAR, REGULARIZERS, TOLERANCE

Record = dict[str, Any]
KINDS = tuple(REGULARIZERS)
STATED = ("attrreg", "torch", "timm", "torchvision", "python", "cores")  # of where records are from

INTRODUCTION = """# Any model: what was measured

One small model of every timm architecture module and torchvision classification family ({which} by number of parameters; timm's
toy `test_*` models left out) under four regularizers (maps of `TargetLogit` under `SquaredOutside`), with random weights,
batches of 2 (4 with BatchNorm, up to 128 px), and dropout and drop-path as they are; deepseek_vit and gemma4_vit, large
and without a small version, with 2 blocks. Written by
`python -m benchmarks.zoo{rank}`, measured {date}: attrreg {attrreg}, torch {torch},
timm {timm}, torchvision {torchvision}, Python {python}, {cores} cores, one thread a model.

A model passes when, in train mode, the penalty is finite and not zero; the parameter gradients are finite, and in float64 agree with a
central difference along a random direction to {tolerance:g}; an attached call gives the same value and gradient; nothing is left behind
(hooks, buffers, modes, flags, generators, `.grad`). For Grad-CAM with `layer="auto"` the map also varies over positions, and a
change in a quadrant of the image shows in the same quadrant of the map, where it can be told. *refused*: attrreg raised an error that
says why and what to do. **fails**: anything else.
"""
COLUMNS = """In the table, *agreement* is the worst of the four relative differences in float64 (`~`: kinks were too dense for any step, so
with smooth functions in place of ReLU and max-pooling); *layer* and *map* are what `GradCAM()` found; *place* is in
how many quadrants the map changed with the image (`?`: deep random nets see everything everywhere).
"""


def passed(record: Record) -> bool:
    """Whether every regularizer passed on a model."""
    return not record["problem"] and all(status(record, kind) == "pass" for kind in KINDS)


def status(record: Record, kind: str) -> str:
    """How a regularizer fared: pass, refused, fail, or unusable where the model itself does not run."""
    result = _result(record, kind)
    if result is not None:
        return str(result["status"])
    return "unusable" if record["size"] is None and record["problem"].startswith("the model") else "fail"


def here() -> Record:
    """When and where a model is checked."""
    where = environment()
    return {**where, "versions": {**where["versions"], "torchvision": torchvision.__version__}}


def page(records: list[Record], rank: int) -> str:
    """The page."""
    found = [record["environment"] | record["environment"]["versions"] for record in records]
    dates = sorted({where["date"] for where in found})
    introduction = INTRODUCTION.format(
        which="the smallest" if rank == 1 else f"number {rank} from below",
        rank="" if rank == 1 else f" --rank {rank}",
        date=" to ".join(dict.fromkeys((dates[0], dates[-1]))),
        **{name: " and ".join(sorted({str(where[name]) for where in found})) for name in STATED},
        tolerance=TOLERANCE,
    )
    if rank == 1:
        introduction += "\nThe second-smallest of each have [a page of their own](zoo_2.md).\n"
    head = ["model", "module", "M", "px", *KINDS, "agreement", "layer", "map", "place"]
    table = markdown_table(head, [_row(record) for record in records])
    parts = [introduction, summary(records), "## What did not pass", causes(records), "## All models", COLUMNS, table]
    return "\n".join(part + "\n" for part in parts)


def summary(records: list[Record]) -> str:
    """A line for each regularizer."""
    lines = []
    for kind in KINDS:
        counts = Counter(status(record, kind) for record in records)
        total = max(1, len(records) - counts["unusable"])
        lines.append([kind, *(f"{counts[name]} ({100 * counts[name] / total:.1f}%)" for name in ("pass", "refused", "fail"))])
    unusable = [record["key"] for record in records if status(record, KINDS[0]) == "unusable"]
    note = f"\n\nNot counted, because the model alone does not run: {', '.join(unusable)}." if unusable else ""
    return markdown_table(["", "pass", "refused", "fails"], lines) + note


def causes(records: list[Record]) -> str:
    """What did not pass, with its cause."""
    lines = []
    for record in records:
        kinds: dict[str, list[str]] = {}
        for kind in KINDS:
            result = _result(record, kind)
            if status(record, kind) != "pass":
                cause = result["cause"] if result is not None else record["problem"]
                kinds.setdefault(f"{status(record, kind)}: {cause}", []).append(kind)
        lines += [f"- `{record['key']}` {', '.join(which)} {cause}" for cause, which in kinds.items()]
    return "\n".join(lines) or "Nothing."


def _result(record: Record, kind: str) -> Record | None:
    return next((result for result in record["results"] if result["regularizer"] == kind), None)


def _row(record: Record) -> list[str]:
    words = {"pass": "ok", "refused": "*refused*", "fail": "**fails**", "unusable": "-"}
    results, cam = record["results"], _result(record, "GradCAM") or {"layer": "", "shape": (), "aligned": (-1, 1.0)}
    worst = max((result["agreement"] for result in results if not math.isnan(result["agreement"])), default=None)
    right, contrast = cam["aligned"]
    return [
        f"`{record['key'].removeprefix('timm/')}`",
        record["family"],
        f"{record['params'] / 1e6:.1f}",
        str(record["size"] or "-"),
        *(words[status(record, kind)] for kind in KINDS),
        "-" if worst is None else f"{worst:.0e}" + "~" * any(result["smoothed"] for result in results),
        f"`{cam['layer']}`" if cam["layer"] else "-",
        "x".join(map(str, cam["shape"][1:])) or "-",
        f"{right}/4" if right >= 0 and contrast > CLEAR else "?",
    ]
