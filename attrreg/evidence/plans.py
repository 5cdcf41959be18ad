"""The plans of the command: the published tasks at their budgets, a quick one, and your own arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from attrreg.evidence.methods import METHODS, method
from attrreg.evidence.sources import Crosses, DecoyFashionMNIST, DecoyMNIST, Folder, StampBirds
from attrreg.evidence.study import Plan, Training

FULL = (
    Training(Crosses(), epochs=40, batch=16),
    Training(DecoyMNIST(), epochs=5, batch=32),
    Training(DecoyFashionMNIST(), epochs=5, batch=32),
    Training(StampBirds(), epochs=4, batch=32),
)
QUICK = (
    Training(Crosses(train=120, valid=40, test=40, width=8), epochs=4, batch=20),
    Training(DecoyMNIST(train=200, valid=100, test=100), epochs=2, batch=20),
    Training(DecoyFashionMNIST(train=200, valid=100, test=100), epochs=2, batch=20),
    Training(StampBirds(train=24, valid=8, test=16, size=64), epochs=1, batch=8),
)
ANNOTATED = ("ActDiff", "feature path")


def plan(
    data: Sequence[str] | None = None,
    methods: Sequence[str] | None = None,
    folder: Folder | None = None,
    trials: int = 5,
    seeds: int = 5,
    epochs: int | None = None,
    quick: bool = False,
) -> Plan:
    """The plan for a command's options.

    Raises:
        ValueError: a data set or a method is unknown.
    """
    trainings: tuple[Training, ...] = QUICK if quick else FULL
    if folder is not None:
        trainings = (Training(folder, *((2, 16) if quick else (40, 16))),)
    elif data:
        known = {training.source.kind: training for training in trainings}
        unknown = [kind for kind in data if kind not in known]
        if unknown:
            raise ValueError(f"data {unknown[0]!r} is unknown. Use one of {', '.join(known)}.")
        trainings = tuple(known[kind] for kind in data)
    if epochs is not None:
        trainings = tuple(replace(training, epochs=epochs) for training in trainings)
    names = tuple(method(name).name for name in methods) if methods else tuple(known.name for known in METHODS)
    annotated = tuple(name for name in ANNOTATED if name in names)
    if quick:
        return Plan(trainings, names, trials=1, seeds=(0,), annotated=annotated[:1])
    return Plan(trainings, names, trials, tuple(range(seeds)), annotated)
