"""Showing a comparison: tables as Markdown, pictures."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import chain, cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrreg.environment import machine
from attrreg.evidence import sources
from attrreg.evidence.job import SAMPLE, SELECTIONS, Record
from attrreg.evidence.ledger import Ledger
from attrreg.evidence.methods import PLAIN, method
from attrreg.evidence.study import Plan, Training, best_of, masks, rows
from attrreg.tables import markdown_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WORDS = {"similar": "in-distribution validation", "valid": "shifted validation"}
# What papers report: the head of a column, and the cell of each method that they have.
PUBLISHED: dict[str, tuple[str, dict[str, str]]] = {
    # The authors' own tables, arXiv 1910.00199: ten seeds, width 64, 100 epochs, epoch chosen on shifted validation.
    "crosses": (
        "paper's AUC",
        {
            "plain": ".00 ± .00",
            "ActDiff": "1.00 ± .00",
            "masked": ".99 ± .02",
            "shuffled": "1.00 ± .00",
            "adversarial": ".92 ± .12",
            "GradMask": ".76 ± .04",
            "RRR": ".49 ± .08",
        },
    ),
    # The code of R4: fully connected network, grey level as the only shortcut.
    "decoy-mnist": ("average / worst group elsewhere", {"plain": ".637 / .224", "RRR": ".923 / .854"}),
}


def spread(values: Sequence[float | None]) -> str:
    """Mean ± standard deviation; of one value the mean alone. Where some are None (as of a model that diverged), also of how many."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    more = f" ± {statistics.stdev(known):.3f}" if len(known) > 1 else ""
    fewer = f" ({len(known)} of {len(values)})" if len(known) < len(values) else ""
    return f"{statistics.mean(known):.3f}{more}{fewer}"


def interval(values: Sequence[float], low: float = 0.0) -> str:
    """The 95% interval of the mean by Student's t, cut to [low, 1]; a dash for one value, or where all are equal."""
    if len(values) < 2 or statistics.stdev(values) == 0:
        return "-"
    from scipy import stats

    start, end = stats.t.interval(0.95, len(values) - 1, statistics.mean(values), stats.sem(values))
    return f"{max(low, start):.2f} to {min(1.0, end):.2f}"


def gain(found: Sequence[Record], reference: Sequence[Record], selection: str) -> str:
    """By how much a row's worst-group accuracy exceeds another's, seed by seed: the mean, and its 95% interval."""
    others = _by_seed(reference, selection, "worst")
    values = [value - others[seed] for seed, value in _by_seed(found, selection, "worst").items() if seed in others]
    return f"{statistics.mean(values):+.3f} ({interval(values, -1.0)})" if values else "-"


def markdown(plan: Plan, ledger: Ledger) -> str:
    """All tables of a plan, with what there is."""
    parts = []
    for training in begun(plan, ledger):
        parts += [f"### {training.source.kind}", _conditions(plan, training, ledger)]
        parts += [_results(plan, training, selection, ledger) for selection in SELECTIONS]
        parts += [_maps(plan, training, ledger), _variants(plan, training, ledger)]
    if parts:
        methods = markdown_table(
            ["method", "what is added to the loss, or made of the batch"], [[name, f"`{method(name)}`"] for name in plan.methods]
        )
        parts += ["### What each method is, before its weight is tuned", methods]
    return "\n\n".join(part for part in parts if part)


def begun(plan: Plan, ledger: Ledger) -> list[Training]:
    """The data sets of which there is anything to show."""
    return [training for training in plan.trainings if _shown(plan, training, ledger)]


def _shown(plan: Plan, training: Training, ledger: Ledger) -> list[Record]:
    """The records of the rows of its tables."""
    chosen = [record for name in plan.methods for selection in SELECTIONS for record in rows(plan, training, name, selection, ledger)]
    variants = (varied(plan, training, name, ledger).values() for name in plan.varied(training))
    return [*chosen, *chain.from_iterable(chain.from_iterable(variants))]


def _conditions(plan: Plan, training: Training, ledger: Ledger) -> str:
    records = _shown(plan, training, ledger)
    machines = " and ".join(sorted({where(record) for record in records}))
    dates = sorted({record.environment["date"] for record in records})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    again = f"`attrreg evidence --rerun '{training.source.kind}/METHOD' --out {shlex.quote(str(ledger.path))}`"
    again += "; those of fewer or worse masks by the name of a record"
    if type(training.source) not in sources.KINDS:  # which the command does not know
        again = "`evidence.job.run(ledger.records[NAME].job, device)` in Python, NAME as in its line"
    return (
        f"`{training.source!r}`, {training.epochs} epochs in batches of {training.batch}, {plan.trials} settings tried for each method. "
        f"Measured {when} on {machines}. Any row again: {again}."
    )


def where(record: Record) -> str:
    """On what it was measured."""
    return f"{machine(record.environment)}, torch {record.environment['versions']['torch']}"


def _results(plan: Plan, training: Training, selection: str, ledger: Ledger) -> str:
    column, published = PUBLISHED.get(training.source.kind, ("", {}))
    head = ["method", "rate", "weight", "test", "AUC", "worst group", "95% interval", "over plain (95%)", "in-distribution", "clean test"]
    head += ["epoch", "seeds"] + ([column] if published else [])
    plain = rows(plan, training, PLAIN.name, selection, ledger) if PLAIN.name in plan.methods else []
    lines = []
    for name in plan.methods:
        found = rows(plan, training, name, selection, ledger)
        if not found:
            continue
        job = found[0].job
        tests, areas, worst, similar, clean, epochs = (
            _values(found, selection, what) for what in ("test", "auc", "worst", "similar", "clean", "epoch")
        )
        lines.append(
            [
                name,
                f"{job.rate:g}",
                f"{job.weight:g}" if job.train_with().weighted else "-",
                spread(tests),
                spread(areas),
                spread(worst),
                interval(worst),
                gain(found, plain, selection) if name != PLAIN.name else "-",
                spread(similar),
                spread(clean),
                f"{statistics.mean(epochs):.0f}",
                str(len(found)),
                *([published.get(name, "-")] if published else []),
            ]
        )
    return f"Settings and epoch chosen on {WORDS[selection]}:\n\n{markdown_table(head, lines)}" if lines else ""


def _maps(plan: Plan, training: Training, ledger: Ledger) -> str:
    judges = ("input gradient", "integrated gradients", "occlusion")
    lines = []
    for name in plan.methods:
        maps = [record.outcomes["valid"].get("maps") for record in rows(plan, training, name, "valid", ledger)]
        if any(maps):
            cells = [" / ".join(spread([each and each[judge][what] for each in maps]) for what in ("inside", "iou")) for judge in judges]
            lines.append([name, *cells])
    words = (
        f"Share of attribution inside the mask / IoU at mask size by three attributions, on at most {SAMPLE} test images, at the settings "
        "and the epoch chosen on shifted validation:"
    )
    return f"{words}\n\n{markdown_table(['method', *judges], lines)}" if lines else ""


def _variants(plan: Plan, training: Training, ledger: Ledger) -> str:
    lines = []
    for name in plan.varied(training):
        found = varied(plan, training, name, ledger)
        for words, records in found.items():
            if records:
                tests, worst = (_values(records, "valid", what) for what in ("test", "worst"))
                same = records[0].job.source == training.source  # on other data nothing was trained without masks
                kept = gain_kept(records, found.get(masks(0), []), found[masks(1)]) if same else []
                lines.append([name, words, spread(tests), spread(worst), interval(worst), spread(kept), str(len(records))])
    words = (
        "Fewer masks, worse ones, other data, at the settings that shifted validation chose for the row above. *Gain kept*: of the test "
        "accuracy that all masks bring over none, seed by seed."
    )
    head = ["method", "trained on", "test", "worst group", "95% interval", "gain kept", "seeds"]
    return f"{words}\n\n{markdown_table(head, lines)}" if lines else ""


def gain_kept(records: Sequence[Record], without: Sequence[Record], whole: Sequence[Record]) -> list[float | None]:
    """Of the test accuracy that all masks bring over none, the share that records have, a number a seed; None where they bring nothing."""
    some, none, all_ = (_by_seed(each, "valid", "test") for each in (records, without, whole))
    gains = {seed: all_[seed] - none[seed] for seed in some if seed in none and seed in all_}
    return [(some[seed] - none[seed]) / gains[seed] if gains.get(seed) else None for seed in some]


def varied(plan: Plan, training: Training, name: str, ledger: Ledger) -> dict[str, list[Record]]:
    """A method's row and the variants of it, by words for what is other in them."""
    best = best_of(plan, training, name, "valid", ledger)
    others = {} if best is None else training.variants.of(best)
    found = {words: ledger.records_of(replace(job, seed=seed) for seed in plan.seeds) for words, job in others.items()}
    return {masks(1): rows(plan, training, name, "valid", ledger), **found}


def _by_seed(records: Iterable[Record], selection: str, what: str) -> dict[int, float]:
    return {record.job.seed: record.outcomes[selection][what] for record in records}


def _values(records: Iterable[Record], selection: str, what: str) -> list[Any]:
    return [record.outcomes[selection][what] for record in records]


def plot(plan: Plan, ledger: Ledger, path: Path) -> None:
    """Test accuracy: a row a method, a point a seed; and against the share of masks."""
    from matplotlib.figure import Figure  # not pyplot, which belongs to the user

    trainings = begun(plan, ledger)
    count = len(trainings)
    figure = Figure(figsize=(4.6 * count, 7.4), layout="constrained")
    axes = figure.subplots(2, count, squeeze=False, height_ratios=(2, 1))
    for column, training in enumerate(trainings):
        _points(axes[0][column], plan, training, ledger)
        _shares(axes[1][column], plan, training, ledger)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=2, fontsize=8)
    figure.savefig(path, dpi=110)


def _points(axis: Axes, plan: Plan, training: Training, ledger: Ledger) -> None:
    for place, name in enumerate(plan.methods):
        for selection, color, shift, marker in (("similar", "#D55E00", -0.15, "o"), ("valid", "#0072B2", 0.15, "s")):
            values = _values(rows(plan, training, name, selection, ledger), selection, "test")
            label = f"chosen on {WORDS[selection]}" if place == 0 else None
            axis.plot(values, [place + shift] * len(values), marker, color=color, markersize=4, alpha=0.7, label=label)
    axis.set_yticks(range(len(plan.methods)), plan.methods, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(-0.02, 1.02)
    axis.set_xlabel("test accuracy", fontsize=8)
    axis.set_title(training.source.kind, fontsize=10)


def _shares(axis: Axes, plan: Plan, training: Training, ledger: Ledger) -> None:
    shares = training.variants.shares
    for name, dash in zip(plan.varied(training), cycle(("-", "--", ":", "-.")), strict=False):
        found = varied(plan, training, name, ledger)
        values = {
            index: statistics.mean(_values(records, "valid", "test"))
            for index, share in enumerate(shares)
            if (records := found.get(masks(share)))
        }
        axis.plot(list(values), list(values.values()), dash, marker=".", label=name)
    if not shares or not plan.varied(training):
        axis.set_axis_off()
        return
    axis.set_xticks(range(len(shares)), [f"{100 * share:g}%" for share in shares], fontsize=8)
    axis.set_xlabel("images with a mask", fontsize=8)
    axis.set_ylabel("test accuracy", fontsize=8)
    axis.set_ylim(-0.02, 1.02)
    axis.legend(fontsize=6)
