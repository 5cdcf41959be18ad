"""Showing a record: on the screen, as Markdown, as pictures."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.table import Table

from attrreg.bench.measure import Cost
from attrreg.bench.run import CURVE_ROUNDS, CURVE_WARMUP, Plan, Record, names, ratios
from attrreg.bench.strategies import ATTACHED, CHUNKED, DETACHED, FLOORS, INTEGRATED_GRADIENTS, MOVED, PLAIN
from attrreg.environment import sentence
from attrreg.tables import markdown_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

AXES = {"batch": "images a batch", "resolution": "pixels a side", "steps": "steps of the path", "terms": "number of terms"}


def save(record: Record, path: Path) -> None:
    """As JSON; the file is whole at every time, whatever stops the run."""
    path = path.resolve()  # a link stays
    part = path.with_suffix(".json.part")
    part.write_text(json.dumps(asdict(record), indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def load(path: Path) -> Record:
    """From JSON.

    Raises:
        ValueError: it is something else.
    """
    try:
        return Record.from_dict(json.loads(path.read_text()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"it is no record of `attrreg bench`, or one of another version ({type(error).__name__}: {error}). Measure all anew, or name "
            "another file."
        ) from error


def summary(record: Record) -> Table:
    """Medians over models, for the screen."""
    made = Table(title="times and peak memory as multiples of a plain training step's, median over models", box=SIMPLE_HEAD, padding=0)
    for name in ("penalty", "way", "time", "memory", "operations", "noisy"):
        made.add_column(name, justify="left" if name in ("penalty", "way") else "right")
    for penalty in record.plan.penalties:
        for index, name in enumerate(names(record, penalty)):
            found = [cost for _, cost in ratios(record, penalty, name)]
            columns = zip(*((cost.ratio, cost.memory, cost.operations) for cost in found), strict=True)
            cells = [f"{statistics.median(values):.2f}x" for values in columns]
            noisy = sum(cost.noisy for cost in found)
            label = {0: penalty, 1: f"  exact: {FLOORS[penalty]:g}x operations"}.get(index, "")
            made.add_row(label, name, *cells, f"{noisy}/{len(found)}" if noisy else "")
    return made


def markdown(record: Record) -> str:
    """Every figure, a table a penalty, and where attrreg does not win."""
    return "\n\n".join([conditions(record), *(_table(record, penalty) for penalty in record.plan.penalties), _losses(record)])


def conditions(record: Record) -> str:
    """How it was measured, in a paragraph."""
    plan = record.plan
    memory = " Memory is kept from step to step (`attrreg.keep_memory`)." if plan.keep_memory else ""
    absent: dict[str, list[str]] = {}
    for model, penalty in record.missing(plan):
        absent.setdefault(model, []).append(penalty)
    parts = [model if left == list(plan.penalties) else f"{model} ({', '.join(left)})" for model, left in absent.items()]
    missing = f" Not measured: {', '.join(parts)}." if parts else ""
    more = f", more where a plain step takes less than {plan.seconds:g} s" if plan.seconds else ""
    layout = " in `torch.channels_last`" if plan.channels_last else ""
    path = _path(plan) if INTEGRATED_GRADIENTS in plan.penalties else ""
    curves = f" The curves: {CURVE_ROUNDS} rounds after {CURVE_WARMUP}." if record.curves else ""
    return (
        f"Measured {sentence(record.environment)}; batches of {plan.batch} images of {plan.size} px, {plan.autocast or 'float32'}{layout}, "
        f"{plan.rounds} rounds after {plan.warmup} of warm-up{path}{more}.{curves}{memory}{missing}"
    )


def noise(record: Record) -> str:
    """How many figures of a record are to be read with care, for tables without quartiles."""
    found = [cost for by in record.costs.values() for each in by.values() for way, cost in each.items() if way != PLAIN]
    return f"Of {len(found)} times, {sum(cost.noisy for cost in found)} have quartiles more than a tenth of the median apart."


def _path(plan: Plan) -> str:
    batch = plan.batch_of(INTEGRATED_GRADIENTS)
    fewer = f" of batches of {batch}" if batch < plan.batch else ""
    rounds, warmup = plan.rounds_of(INTEGRATED_GRADIENTS)
    return f" (the path method: {rounds} after {warmup}{fewer})"


def _table(record: Record, penalty: str) -> str:
    ways, floor = names(record, penalty), FLOORS[penalty]
    rows = [
        [model, *(_cell(by_penalty[penalty].get(way)) for way in ways)]
        for model, by_penalty in record.costs.items()
        if penalty in by_penalty
    ]
    columns = [[cost for _, cost in ratios(record, penalty, way)] for way in ways]
    medians = [
        f"**{statistics.median(c.ratio for c in column):.2f}** / {statistics.median(c.memory for c in column):.2f}" for column in columns
    ]
    words = f"By operation count an exact penalty costs {floor:g} plain step{'s' * (floor != 1)} when attached."
    return "\n\n".join([f"### {penalty}", words, markdown_table(["model", *ways], [*rows, ["median", *medians]])])


def _cell(cost: Cost | None) -> str:
    if cost is None:
        return "-"
    return f"{cost.ratio:.2f}{'?' * cost.noisy} ({cost.low:.2f} to {cost.high:.2f}) / {cost.memory:.2f}"


def _worse(ours: Cost, theirs: Cost) -> str:
    pairs = (("slower", ours.ratio, theirs.ratio), ("larger", ours.memory, theirs.memory))
    return " and ".join(f"{word} ({a:.2f} to {b:.2f})" for word, a, b in pairs if a >= b)


def _losses(record: Record) -> str:
    lines = []
    for penalty in record.plan.penalties:
        for way in names(record, penalty):
            if way.startswith("attrreg") or way == DETACHED:  # which is not a penalty that trains anything
                continue
            for model, theirs in ratios(record, penalty, way):
                for own in (ATTACHED, CHUNKED, MOVED):
                    ours = record.costs[model][penalty].get(own)
                    if ours is not None and (worse := _worse(ours, theirs)):
                        lines.append(f"- {penalty}{own.removeprefix(ATTACHED)}, {model}: {worse} than *{way}*")
    return "\n".join(["### Where attrreg, attached, does not win", "", *(lines or ["Nowhere in this run."])])


def plot(record: Record, path: Path) -> None:
    """Cost of each way, a panel a penalty, time above and memory below; a point a model."""
    from matplotlib.figure import Figure  # not pyplot, which belongs to the user

    penalties = record.plan.penalties
    figure = Figure(figsize=(3.4 * len(penalties), 6.4), layout="constrained")
    axes = figure.subplots(2, len(penalties), squeeze=False)
    for column, penalty in enumerate(penalties):
        for row, what in enumerate(("time", "memory")):
            _bars(axes[row][column], record, penalty, what)
    figure.suptitle("Multiples of a plain training step: medians over models, a point a model")
    figure.savefig(path, dpi=110)


def _bars(axis: Axes, record: Record, penalty: str, what: str) -> None:
    ways = names(record, penalty)
    for place, way in enumerate(ways):
        values = [cost.ratio if what == "time" else cost.memory for _, cost in ratios(record, penalty, way)]
        axis.bar(place, statistics.median(values), color="#0072B2" if way.startswith("attrreg") else "#999999")
        axis.plot([place] * len(values), values, ".", color="black", markersize=4, alpha=0.5)
    if what == "time":
        axis.axhline(FLOORS[penalty], color="#D55E00", linestyle="--", linewidth=1)
        axis.set_title(penalty, fontsize=10)
    axis.set_xticks(range(len(ways)), ways if what == "memory" else [""] * len(ways), rotation=60, ha="right", fontsize=8)
    axis.set_ylabel(f"{what}, x plain", fontsize=8)


def plot_curves(record: Record, path: Path) -> None:
    """Cost against batch, resolution, steps and number of terms."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(record.curves), 5.4), layout="constrained")
    axes = figure.subplots(2, len(record.curves), squeeze=False)
    for column, (varied, lines) in enumerate(record.curves.items()):
        for row, what in enumerate(("time", "memory")):
            axis = axes[row][column]
            for index, (way, points) in enumerate(lines.items()):
                values = [cost.ratio if what == "time" else cost.memory for _, cost in points]
                color, dash = ("#000000", "#D55E00", "#0072B2", "#56B4E9")[index], (":", "--", "-", "-.")[index]
                axis.plot([value for value, _ in points], values, color=color, linestyle=dash, marker=".", label=way)
            axis.set_ylabel(f"{what}, x plain", fontsize=8)
            axis.set_xlabel(AXES[varied], fontsize=8)
            if row == 0:
                axis.legend(fontsize=6)
    figure.suptitle(f"{record.plan.models[0]}: multiples of a plain training step")
    figure.savefig(path, dpi=110)
