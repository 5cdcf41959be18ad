"""Which objective works at weight 1: the experiment behind the default.

python -m benchmarks.default              train what benchmarks/results/default.jsonl lacks, then write the section of docs/objectives.md
python -m benchmarks.default --page       the section alone

`InputGradient` under each objective, at weights around 1, in many settings that change the scale of the gradient or its noise: networks,
batch sizes, resolutions, data sets. An objective is a good default if, in every setting, weight 1 is near the best of its weights, and
that best is near the best of all objectives.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import as_completed
from dataclasses import asdict, dataclass, replace
from typing import Any

import timm
import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor, nn

from attrreg import InputGradient, metrics, objectives
from attrreg.environment import environment, sentence
from attrreg.evidence.data import Split, Task
from attrreg.evidence.ledger import add_line, cores, processes, whole_lines
from attrreg.evidence.methods import Method
from attrreg.evidence.shortcuts import decoy_fashion_mnist, decoy_mnist
from attrreg.evidence.training import Budget, predict, train
from attrreg.scores import SumLogProb, TargetLogit
from attrreg.tables import markdown_table
from benchmarks.page import ROOT, write_section

RESULTS = ROOT / "benchmarks" / "results" / "default.jsonl"
PAGE = ROOT / "docs" / "objectives.md"
COMMAND = "python -m benchmarks.default"
WEIGHTS = (0.1, 1.0, 10.0)
NETWORKS: dict[str, dict[str, int]] = {
    "test_resnet": {"output_stride": 8},
    "test_efficientnet": {},
    "test_convnext": {"patch_size": 2, "output_stride": 8},
}
RATES = {"test_resnet": 1e-2, "test_efficientnet": 1e-2, "test_convnext": 3e-3}
DATA: dict[str, Callable[[int], Task]] = {
    "decoy-mnist": lambda seed: decoy_mnist(3000, 500, 500, seed),
    "decoy-fashion-mnist": lambda seed: decoy_fashion_mnist(3000, 500, 500, seed),
}


def _surprise(map: Tensor, mask: Tensor) -> Tensor:
    """Minus the logarithm of the share inside, as if it were the probability of the right class."""
    return -(1 - objectives.OutsideFraction()(map, mask)).clamp_min(1e-12).log()


CANDIDATES: dict[str, InputGradient] = {
    "default": InputGradient(),
    "without target=": InputGradient(SumLogProb()),
    "TargetLogit": InputGradient(TargetLogit()),
    "SquaredOutside": InputGradient(objective=objectives.SquaredOutside()),
    "AbsoluteOutside": InputGradient(objective=objectives.AbsoluteOutside()),
    "OutsideFraction": InputGradient(objective=objectives.OutsideFraction()),
    "-log share inside": InputGradient(objective=_surprise),
}


@dataclass(frozen=True)
class Setting:
    """The conditions of a training.

    Attributes:
        data, network: names in `DATA`, `NETWORKS`.
        batch: images a step.
        size: pixels a side, to which images are enlarged.
        epochs: passes over the training images.
    """

    data: str = "decoy-mnist"
    network: str = "test_resnet"
    batch: int = 32
    size: int = 28
    epochs: int = 3

    def __str__(self) -> str:
        return f"{self.data}, {self.network.removeprefix('test_')}, batch {self.batch}, {self.size} px"


SETTINGS = (
    Setting(),
    Setting(network="test_efficientnet"),
    Setting(network="test_convnext"),
    Setting(size=56, epochs=2),
    Setting(batch=128, epochs=6),
    Setting(data="decoy-fashion-mnist"),
)


@dataclass(frozen=True)
class Row:
    """One training. `candidate` is None for plain training."""

    setting: Setting
    candidate: str | None
    weight: float
    seed: int = 0  # the only one; a part of the names in the file of results

    @property
    def name(self) -> str:
        """For the file of results. It changes when the candidate of this name does; if a default of the library did, empty that file."""
        regularizer = None if self.candidate is None else repr(CANDIDATES[self.candidate])
        return json.dumps({**asdict(self), "regularizer": regularizer})


def rows() -> Iterator[Row]:
    """All trainings; those at weight 1 first."""
    for weight in (0.0, *sorted(WEIGHTS, key=lambda weight: weight != 1)):
        for setting in SETTINGS:
            for candidate in CANDIDATES if weight else (None,):
                yield Row(setting, candidate, weight)


def run(row: Row) -> dict[str, Any]:
    """Train, and give the accuracy on test images in which the shortcut misleads, as a line of the results."""
    torch.set_num_threads(1)
    setting = row.setting
    task = DATA[setting.data](row.seed)
    torch.manual_seed(row.seed)
    model: nn.Module = timm.create_model(setting.network, in_chans=1, num_classes=task.classes, **NETWORKS[setting.network])
    regularizer = None if row.candidate is None else CANDIDATES[row.candidate]
    budget = Budget(setting.epochs, setting.batch, RATES[setting.network])
    for _ in train(model, _prepared(task.train, task, setting.size), Method("one", regularizer, row.weight), budget, row.seed):
        pass
    test = _prepared(task.test, task, setting.size)
    accuracy = metrics.accuracy(predict(model.eval(), test.images), test.labels)
    return {"row": row.name, "test": accuracy, "environment": environment()}


def _prepared(split: Split, task: Task, size: int) -> Split:
    """Normalised, as usual, and enlarged."""
    std, mean = torch.std_mean(task.train.images)
    images, masks = (split.images - mean) / std, split.masks
    if images.shape[-1] != size:
        images = F.interpolate(images, (size, size))
        masks = F.interpolate(masks[:, None].float(), (size, size))[:, 0] > 0
    return replace(split, images=images, masks=masks)


def load() -> dict[str, dict[str, Any]]:
    """Lines of the results, by rows' names."""
    return {line["row"]: line for line in map(json.loads, whole_lines(RESULTS))}


def measure() -> None:
    """Train what is missing, one training a core at a time. One that fails does not stop the others."""
    done = load()
    todo = [row for row in rows() if row.name not in done]
    failed: list[Exception] = []
    with processes(cores()) as pool:
        waiting = [pool.submit(run, row) for row in todo]
        for future in track(as_completed(waiting), total=len(todo), description="training"):
            try:
                add_line(RESULTS, json.dumps(future.result()))
            except Exception as error:  # what it was is said at the end
                failed.append(error)
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(todo)} trainings failed. The others are in {RESULTS}; a new run goes on.") from failed[0]


def table(found: dict[str, dict[str, Any]]) -> str:
    """Accuracies at weight 1, in brackets those at the best weight where others were tried, and what is lost to the best one at 1."""

    def accuracy(setting: Setting, candidate: str | None, weight: float) -> float | None:
        line = found.get(Row(setting, candidate, weight).name)
        return None if line is None else line["test"]

    lines = []
    lost: dict[str, list[float]] = {candidate: [] for candidate in CANDIDATES}
    for setting in SETTINGS:
        plain = accuracy(setting, None, 0.0)
        each = {
            candidate: {weight: value for weight in WEIGHTS if (value := accuracy(setting, candidate, weight)) is not None}
            for candidate in CANDIDATES
        }
        if plain is None or any(1.0 not in values for values in each.values()):
            continue
        best = max(values[1.0] for values in each.values())
        cells = []
        for candidate, values in each.items():
            lost[candidate].append(best - values[1.0])
            top = max(values, key=lambda weight: values[weight])
            cells.append(f"{values[1.0]:.3f}" + (f" ({values[top]:.3f} at {top:g})" if len(values) == len(WEIGHTS) else ""))
        lines.append([str(setting), f"{plain:.3f}", *cells])
    if all(lost.values()):
        for words, statistic in (("mean", statistics.mean), ("worst", max)):
            lines.append([f"*{words} loss to the best at 1*", "", *(f"{statistic(values):.3f}" for values in lost.values())])
    return markdown_table(["setting", "plain", *CANDIDATES], lines)


def main() -> None:
    """Measure, then write."""
    if sys.argv[1:] != ["--page"]:
        measure()
    found = load()
    dates = [line["environment"]["date"] for line in found.values()]
    last = max(found.values(), key=lambda line: line["environment"]["date"])
    write_section(PAGE, "default", COMMAND, table(found), f"Measured since {min(dates)}, the last {sentence(last['environment'])}.")


if __name__ == "__main__":
    from benchmarks import default  # so that what it names, in results too, is named alike however it was started

    default.main()
