"""A comparison: which jobs, with the same number of trials for every method."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Any

import numpy

from attrreg.evidence.annotation import QUALITIES
from attrreg.evidence.job import SELECTIONS, Job, Record
from attrreg.evidence.ledger import Failed, Ledger
from attrreg.evidence.methods import Method, method
from attrreg.evidence.packages import Missing
from attrreg.evidence.sources import Source

SHARES = (0.0, 0.01, 0.05, 0.2, 1.0)
RATES = (1e-4, 1e-2)  # between which peaks of the learning rate are tried
RATE = 3e-3  # the one that is tried first, with a method's own weight
SPREAD = 30.0  # how far above and below that weight weights are tried
TUNING_SEED = 1000  # which no row of a table may have


def masks(share: float) -> str:
    """Words for a share of the training images that have a mask."""
    return "all masks" if share == 1 else f"{100 * share:g}% of the masks"


@dataclass(frozen=True)
class Variants:
    """What some methods are trained on besides, at the settings that shifted validation chose: fewer masks, worse ones, other data.

    Attributes:
        methods: these.
        shares: of the training images that have a mask.
        qualities: of the masks, of `annotation.QUALITIES`.
        sources: the other data sets.

    Raises:
        ValueError: a quality that there is not.
    """

    methods: tuple[str, ...] = ()
    shares: tuple[float, ...] = SHARES
    qualities: tuple[str, ...] = QUALITIES
    sources: tuple[Source, ...] = ()

    def __post_init__(self) -> None:
        if unknown := [name for name in self.qualities if name not in QUALITIES]:
            raise ValueError(f"{unknown[0]!r} is none of {', '.join(map(repr, QUALITIES))}. Write one of them, or leave it out.")
        if len(set(self.sources)) < len(self.sources):
            raise ValueError(f"sources are {self.sources}, of which two are alike. Leave one out.")

    def changes(self) -> dict[str, dict[str, Any]]:
        """What differs from the method's own row in each variant, by the words that tables use for it."""
        shares = {masks(share): {"annotated": share} for share in self.shares if share != 1}
        qualities = {f"masks: {quality}": {"quality": quality} for quality in self.qualities if quality != "exact"}
        labels = [source.label for source in self.sources]  # which need not tell all from each other
        words = [label if labels.count(label) == 1 else repr(source) for label, source in zip(labels, self.sources, strict=True)]
        return shares | qualities | {word: {"source": source} for word, source in zip(words, self.sources, strict=True)}

    def of(self, best: Job) -> dict[str, Job]:
        """The jobs of the variants, by the same words; `best` is the job whose settings were chosen."""
        return {words: replace(best, judged=False, **change) for words, change in self.changes().items()}


@dataclass(frozen=True)
class Training:
    """A data set, and how long to train on it.

    Attributes:
        source: the data set.
        epochs, batch: see `training.Budget`.
        variants: what is trained besides.
    """

    source: Source
    epochs: int
    batch: int
    variants: Variants = Variants()


@dataclass(frozen=True)
class Plan:
    """What to compare.

    Attributes:
        trainings: the data sets.
        methods: names in `methods.METHODS`.
        trials: settings that are tried for each method: as many for each, on the same splits.
        seeds: trainings of each method with the settings chosen.

    Raises:
        ValueError: nothing to try or to train, a seed that settings are tried with or that is named twice, or a method that there is not.
    """

    trainings: tuple[Training, ...]
    methods: tuple[str, ...]
    trials: int
    seeds: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.trials < 1 or not self.seeds:
            raise ValueError(
                f"A plan needs a trial and a seed, got trials={self.trials} and seeds={self.seeds}. Give at least one of each."
            )
        if TUNING_SEED in self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds must differ, also from {TUNING_SEED}, with which settings are tried. Write (0, 1, 2).")
        for name in (*self.methods, *(name for training in self.trainings for name in training.variants.methods)):
            method(name)

    def varied(self, training: Training) -> list[str]:
        """The methods of which variants are trained."""
        return [name for name in training.variants.methods if name in self.methods]

    def epochs(self) -> int:
        """An upper bound on the epochs of all jobs together, for a progress bar."""
        each = len(self.methods) * (self.trials + len(SELECTIONS) * len(self.seeds))
        total = 0
        for training in self.trainings:
            variants = len(self.varied(training)) * len(training.variants.changes())
            total += (each + variants * len(self.seeds)) * training.epochs
        return total


def carry_out(plan: Plan, ledger: Ledger) -> dict[str, str]:
    """Run a plan: tune, train with what was chosen, then the variants.

    Returns:
        For each data set that could not be had, by kind, how to get it. The others are run all the same.

    Raises:
        ledger.Failed: trainings failed; when everything else is done. Of several stages, the first.
    """
    missing: dict[Training, str] = {}
    failed: list[Failed] = []
    for stages in ((_tune, _compare), (_vary,)):  # what is less often asked for comes last, should a run be stopped
        for training, stage in product(plan.trainings, stages):
            if training not in missing:
                try:
                    stage(plan, training, ledger)
                except Missing as error:
                    missing[training] = str(error)
                except Failed as error:
                    failed.append(error)
    left_out = {training.source.kind: how for training, how in missing.items()}
    if failed:
        failed[0].missing = left_out
        raise failed[0]
    return left_out


def _tune(plan: Plan, training: Training, ledger: Ledger) -> None:
    ledger.run((job for name in plan.methods for job in trials(method(name), training, plan.trials)), tested=False)


def _compare(plan: Plan, training: Training, ledger: Ledger) -> None:
    ledger.run(
        replace(best, seed=seed, judged=True)
        for seed in plan.seeds
        for name in plan.methods
        for selection in SELECTIONS
        if (best := best_of(plan, training, name, selection, ledger))
    )


def _vary(plan: Plan, training: Training, ledger: Ledger) -> None:
    found = [best_of(plan, training, name, "valid", ledger) for name in plan.varied(training)]
    ledger.run(
        replace(job, seed=seed) for seed in plan.seeds for best in found if best is not None for job in training.variants.of(best).values()
    )


def trials(method: Method, training: Training, count: int) -> list[Job]:
    """The settings to try: first the method's own weight at a usual rate, then rates and factors of that weight that are spread evenly.

    Rates and factors are the same for each method. A weight that is fixed is not multiplied.

    One set of settings serves both selections, so the sampler must not look at results: it is a low-discrepancy one, Sobol's. A handful
    of purely random settings can leave a half of the weights untried.
    """
    made = []
    for rate, factor in _settings(count):
        weight = (method.weight if method.fixed else method.weight * factor) if method.weighted else 1.0
        made.append(Job(training.source, method.name, TUNING_SEED, _rounded(rate), _rounded(weight), training.epochs, training.batch))
    return made


@cache
def _settings(count: int) -> list[tuple[float, float]]:
    """Rates, and factors of a weight."""
    from scipy.stats import qmc

    low, high = numpy.log((RATES[0], 1 / SPREAD)), numpy.log((RATES[1], SPREAD))
    sequence = qmc.Sobol(2, seed=TUNING_SEED)  # `rng=`, SciPy's newer name, starts another sequence than the records are of
    others = [numpy.exp(low + (high - low) * sequence.random()[0]).tolist() for _ in range(count - 1)]
    return [(RATE, 1.0), *((rate, factor) for rate, factor in others)]


def best_of(plan: Plan, training: Training, name: str, selection: str, ledger: Ledger) -> Job | None:
    """The settings with the lowest loss on one selection, from what the ledger has; None while trials are missing."""
    tried = ledger.records_of(trials(method(name), training, plan.trials))
    if len(tried) < plan.trials:
        return None
    return min(tried, key=lambda record: float(record.outcomes[selection]["loss"])).job


def rows(plan: Plan, training: Training, name: str, selection: str, ledger: Ledger) -> list[Record]:
    """The records of a row of a table: a method's trainings with the settings chosen by one selection, those that there are."""
    best = best_of(plan, training, name, selection, ledger)
    return [] if best is None else ledger.records_of(replace(best, seed=seed, judged=True) for seed in plan.seeds)


def _rounded(value: float) -> float:
    """To three digits, so that a table shows what was used."""
    return float(f"{value:.3g}")
