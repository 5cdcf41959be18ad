"""Showing a comparison: tables as Markdown, pictures."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrreg.evidence.job import SELECTIONS, Job, Record
from attrreg.evidence.study import Ledger, Plan, Training, best_of, rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Two-sided 95% quantiles of Student's t, from one degree of freedom on.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145)
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
    """Mean ± standard deviation; the mean alone of one value."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    mean = f"{statistics.mean(known):.3f}"
    return mean if len(known) == 1 else f"{mean} ± {statistics.stdev(known):.3f}"


def interval(values: Sequence[float]) -> str:
    """The 95% interval of the mean by Student's t."""
    if len(values) < 2:
        return "-"
    quantile = STUDENT[len(values) - 2] if len(values) - 2 < len(STUDENT) else 1.96
    half = quantile * statistics.stdev(values) / math.sqrt(len(values))
    mean = statistics.mean(values)
    return f"{max(0.0, mean - half):.2f} to {min(1.0, mean + half):.2f}"


def markdown(plan: Plan, ledger: Ledger) -> str:
    """All tables of a plan, with what there is."""
    parts = []
    for training in _begun(plan, ledger):
        parts += [f"### {training.source.kind}", _conditions(plan, training, ledger)]
        parts += [_results(plan, training, selection, ledger) for selection in SELECTIONS]
        parts += [_maps(plan, training, ledger), _annotation(plan, training, ledger)]
    return "\n\n".join(part for part in parts if part)


def _begun(plan: Plan, ledger: Ledger) -> list[Training]:
    """The data sets of which there is anything to show."""
    sources = [record.job.source for record in ledger.records.values()]
    return [training for training in plan.trainings if training.source in sources]


def _conditions(plan: Plan, training: Training, ledger: Ledger) -> str:
    found = [record for record in ledger.records.values() if record.job.source == training.source]
    where = " and ".join(sorted({_where(record) for record in found}))
    return (
        f"`{training.source!r}`, {training.epochs} epochs in batches of {training.batch}, {plan.trials} settings tried for each method. "
        f"Measured on {where}. Any row again: `attrreg evidence --rerun '{training.source.kind}/METHOD'` with the same file of results."
    )


def _where(record: Record) -> str:
    where = record.environment
    return f"{where['machine']} {where['device']}, torch {where['torch']}"


def _results(plan: Plan, training: Training, selection: str, ledger: Ledger) -> str:
    column, published = PUBLISHED.get(training.source.kind, ("", {}))
    head = ["method", "rate", "weight", "test", "AUC", "worst group", "95% interval", "clean test", "seeds"]
    head += [column] if published else []
    lines = []
    for name in plan.methods:
        found = rows(plan, training, name, selection, ledger)
        if not found:
            continue
        job = found[0].job
        tests, areas, worst, clean = (_values(found, selection, what) for what in ("test", "auc", "worst", "clean"))
        cells = [
            name,
            f"{job.rate:g}",
            f"{job.weight:g}" if job.train_with().weighted else "-",
            spread(tests),
            spread(areas),
            spread(worst),
        ]
        lines.append([*cells, interval(worst), spread(clean), str(len(found)), *([published.get(name, "-")] if published else [])])
    return f"Settings and epoch chosen on {WORDS[selection]}:\n\n{_table(head, lines)}" if lines else ""


def _maps(plan: Plan, training: Training, ledger: Ledger) -> str:
    judges = ("input gradient", "integrated gradients", "occlusion")
    lines = []
    for name in plan.methods:
        found = [record for record in rows(plan, training, name, "valid", ledger) if "maps" in record.outcomes["valid"]]
        if found:
            maps = [record.outcomes["valid"]["maps"] for record in found]
            cells = [f"{spread([m[judge]['inside'] for m in maps])} / {spread([m[judge]['iou'] for m in maps])}" for judge in judges]
            lines.append([name, *cells])
    words = "Share of attribution inside the mask / IoU at mask size on the test, chosen on shifted validation, by three attributions:"
    return f"{words}\n\n{_table(['method', *judges], lines)}" if lines else ""


def _annotation(plan: Plan, training: Training, ledger: Ledger) -> str:
    lines = []
    for name in plan.annotated:
        tests = annotated(plan, training, name, ledger)
        lines += [[name, what, spread(values), str(len(values))] for what, values in tests.items() if values]
    words = "Fewer masks, and worse ones (test accuracy, settings chosen with all and exact masks on shifted validation):"
    return f"{words}\n\n{_table(['method', 'masks', 'test', 'seeds'], lines)}" if lines else ""


def annotated(plan: Plan, training: Training, name: str, ledger: Ledger) -> dict[str, list[float]]:
    """Test accuracies with each share of masks and each quality, by words for it."""
    best = best_of(plan, training, name, "valid", ledger)
    if best is None:
        return {}
    made: dict[str, Callable[[int], Job]] = {}
    for share in plan.shares:
        judged = plan.judged and share == 1
        made[f"{share:.0%}"] = lambda seed, share=share, judged=judged: replace(best, seed=seed, annotated=share, judged=judged)  # type: ignore[misc]
    for quality in plan.qualities:
        judged = plan.judged and quality == "exact"
        made[quality] = lambda seed, quality=quality, judged=judged: replace(best, seed=seed, quality=quality, judged=judged)  # type: ignore[misc]
    found = {what: [ledger.records.get(job(seed).name) for seed in plan.seeds] for what, job in made.items()}
    return {what: [record.outcomes["valid"]["test"] for record in records if record is not None] for what, records in found.items()}


def _values(records: Iterable[Record], selection: str, what: str) -> list[Any]:
    return [record.outcomes[selection][what] for record in records]


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(["| " + " | ".join(head) + " |", "|---" * len(head) + "|", *("| " + " | ".join(line) + " |" for line in lines)])


def plot(plan: Plan, ledger: Ledger, path: Path) -> None:
    """Test accuracy: a row a method, a point a seed; and against the share of masks."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    begun = _begun(plan, ledger)
    count = len(begun)
    figure, axes = pyplot.subplots(2, count, figsize=(4.6 * count, 7.4), squeeze=False, layout="constrained", height_ratios=(2, 1))
    for column, training in enumerate(begun):
        _points(axes[0][column], plan, training, ledger)
        _shares(axes[1][column], plan, training, ledger)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=2, fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


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
    for name, dash in zip(plan.annotated, ("-", "--", ":", "-."), strict=False):
        found = annotated(plan, training, name, ledger)
        values = [(index, statistics.mean(found[f"{share:.0%}"])) for index, share in enumerate(plan.shares) if found.get(f"{share:.0%}")]
        axis.plot([index for index, _ in values], [value for _, value in values], dash, marker=".", label=name)
    axis.set_xticks(range(len(plan.shares)), [f"{share:.0%}" for share in plan.shares], fontsize=8)
    axis.set_xlabel("images with a mask", fontsize=8)
    axis.set_ylabel("test accuracy", fontsize=8)
    axis.set_ylim(-0.02, 1.02)
    if plan.annotated:
        axis.legend(fontsize=6)
