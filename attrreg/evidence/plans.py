"""The plans of the command: the published tasks at their budgets, a quick one, and your own arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from attrreg.evidence.methods import METHODS
from attrreg.evidence.sources import Crosses, DecoyFashionMNIST, DecoyMNIST, Folder, StampBirds
from attrreg.evidence.study import Plan, Training, Variants

MASKS = Variants(("ActDiff", "feature path"))
CORRELATIONS = tuple(StampBirds(correlation=correlation) for correlation in (0.5, 0.8, 1.0))
FULL = (
    Training(Crosses(), 40, 16, MASKS),
    Training(DecoyMNIST(), 5, 32, Variants(("ActDiff", "default"), qualities=())),
    Training(DecoyFashionMNIST(), 5, 32),
    Training(StampBirds(), 4, 32, Variants(("plain", "shuffled", "ActDiff"), shares=(), qualities=(), sources=CORRELATIONS)),
)
_FEW_BIRDS = StampBirds(train=24, valid=8, test=16, size=64)
QUICK = (
    Training(Crosses(train=120, valid=40, test=40, width=8), 4, 20, Variants(("ActDiff",))),
    Training(DecoyMNIST(train=200, valid=100, test=100), 2, 20),
    Training(DecoyFashionMNIST(train=200, valid=100, test=100), 2, 20),
    Training(_FEW_BIRDS, 1, 8, Variants(("plain",), shares=(), qualities=(), sources=(replace(_FEW_BIRDS, correlation=0.5),))),
)


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
        trainings = (Training(folder, 2 if quick else 40, 16, MASKS),)
    elif data:
        known = {training.source.kind: training for training in trainings}
        unknown = [kind for kind in data if kind not in known]
        if unknown:
            raise ValueError(f"data {unknown[0]!r} is unknown. Use one of {', '.join(known)}.")
        trainings = tuple(known[kind] for kind in dict.fromkeys(data))
    if epochs is not None:
        trainings = tuple(replace(training, epochs=epochs) for training in trainings)
    names = tuple(dict.fromkeys(methods or (known.name for known in METHODS)))
    return Plan(trainings, names, 1, (0,)) if quick else Plan(trainings, names, trials, tuple(range(seeds)))
