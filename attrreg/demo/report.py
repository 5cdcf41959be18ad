"""Showing a run: table, sentences that follow from the numbers, picture, and the numbers as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor

from attrreg import plot
from attrreg.demo import train
from attrreg.environment import environment
from attrreg.evidence.training import predict

ROWS = 4
TASKS = {
    "decoy-mnist": "digits with a grey patch, whose corner and level spell the label in training and are random in the test",
    "crosses": "one cross or two, with a block whose side tells the label in training and the other label in the test",
}
SENTENCES = {
    "better": "Clearly better on the test than plain training",
    "worse": "Clearly worse on the test than plain training",
    "unclear": "Not clearly different from plain training on the test",
}


def table(run: train.Run) -> Table:
    """The measured numbers, in 80 columns."""
    binary = run.results[0].test_auc is not None
    made = Table(title=f"{run.settings.data}: {TASKS[run.settings.data]}", title_justify="left", box=SIMPLE_HEAD, padding=0)
    made.add_column("method")
    numbers = [
        "test",
        *(["test\nAUC"] if binary else []),
        "clean\ntest",
        "outside mask\nbefore/after",
        "own penalty\nto plain's",
        "step\ncost",
    ]
    for name in numbers:
        made.add_column(name, justify="right")
    made.add_column("against\nplain")
    for result in run.results:
        accuracies = [result.test, *([result.test_auc] if result.test_auc is not None else []), result.clean]
        outside = f"{result.outside_before:.0%} to {result.outside_after:.0%}"
        own = f"{result.own_after / result.own_plain:.0%}" if result.own_plain and result.own_after is not None else "-"
        cells = [*(f"{value:.3f}" for value in accuracies), outside, own, f"{result.cost:.2f}x", result.verdict or "-"]
        made.add_row(result.method, *cells)
    return made


def notes(run: train.Run) -> str:
    """What the numbers mean and what they say, in sentences."""
    plain, *others = run.results
    count, setting = len(run.task.test), run.settings
    lines = [
        f"Test: accuracy on {count} images where the shortcut misleads; clean test: on the same images without it.",
        "Outside mask: share of |d target logit / d image| outside the mask on the test, with the initial weights and after training. Own "
        "penalty: what the method penalises, in its own model as a share of the same in the plain model.",
        f"Step cost: median over {setting.rounds} interleaved rounds of the time of a training step, in plain steps.",
        f"Every method has the same initial weights and {setting.steps} steps of {setting.budget.batch} images. One seed ({setting.seed}); "
        "better and worse mean a difference of more than three standard errors of the test.",
        f"Plain training is {_fooled(plain.test, plain.clean, count)}.",
    ]
    for verdict, says in SENTENCES.items():
        found = [f"{other.method} ({other.test:.3f})" for other in others if other.verdict == verdict]
        if found:
            lines.append(f"{says}: {', '.join(found)}.")
    fooled = [other.method for other in others if train.compared(other.test, other.clean, count) == "worse"]
    if fooled:
        lines.append(f"Still fooled, clearly below their own accuracy on the clean test: {', '.join(fooled)}.")
    return "\n".join([*lines, *_red_herrings(plain, others)])


def save_json(run: train.Run, path: Path) -> None:
    """Write the settings and the numbers, when and where they were measured."""
    methods = [
        {"regularizer": repr(method.term), **asdict(result)} for method, result in zip(run.settings.methods, run.results, strict=True)
    ]
    setting = run.settings
    content = {
        "data": setting.data,
        "seed": setting.seed,
        "train_images": setting.train,
        "test_images": len(run.task.test),
        "steps": setting.steps,
        "batch": setting.budget.batch,
        "device": str(setting.device),
        "environment": environment(setting.device),
        "methods": methods,
    }
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def save_picture(run: train.Run, path: Path) -> None:
    """Draw test images with their masks, and where each model looks: a row an image, a column a method."""
    data = run.task.test.take(_chosen(run.task.test.labels))
    maps, captions = {}, {"image": [f"label {int(label)}" for label in data.labels]}
    for model, result in zip(run.models, run.results, strict=True):
        title = f"{result.method}\ntest accuracy {result.test:.0%}\noutside mask {result.outside_after:.0%}"
        says = predict(model, data.images).argmax(dim=1)
        maps[title] = train.attribution(model, data)
        captions[title] = [
            f"says {int(said)}: {'right' if said == label else 'WRONG'}" for said, label in zip(says, data.labels, strict=True)
        ]
    title = f"{run.settings.data}: where each model looks on the test (|d target logit / d image|; bright = much)"
    figure = plot.attributions(data.images, data.masks, maps, captions=captions, title=title)
    figure.savefig(path)


def _chosen(labels: Tensor) -> Tensor:
    """Indices of test images of different classes, chosen by label and place alone: never by what a model says of them."""
    by_label = labels.argsort(stable=True)
    return by_label[torch.linspace(0, len(labels) - 1, 2 * ROWS + 1, device=labels.device).long()[1::2]]


def _fooled(test: float, clean: float, count: int) -> str:
    if train.compared(test, clean, count) == "worse":
        return f"fooled by the shortcut: {test:.3f} on the test against {clean:.3f} without the shortcut"
    return f"not clearly fooled here: {test:.3f} on the test, {clean:.3f} without the shortcut"


def _red_herrings(plain: train.Result, others: list[train.Result]) -> Iterator[str]:
    """The founding paper's finding, where this run shows it: looking elsewhere is not the same as being right."""
    for other in others:
        if other.outside_after < 0.75 * plain.outside_after and other.verdict != "better":
            yield (
                f"{other.method} moved attribution inside the mask ({plain.outside_after:.0%} to {other.outside_after:.0%} outside) "
                "without being better on the test: control over attribution alone does not guarantee generalization."
            )
