"""A run of the benchmark: which measurements, and their record."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from attrreg.bench import cases, strategies
from attrreg.bench.cases import Case
from attrreg.bench.measure import Cost, costs
from attrreg.environment import environment

if TYPE_CHECKING:
    from attrreg.progress import Advance

PARTS = ("models", "penalties", "curves", "date", "load")  # what may differ between parts of a record
PATH_IMAGES = 16


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes:
        models: names, as `cases.build` takes them.
        penalties: of `strategies.PENALTIES`.
        batch, size: of the images.
        rounds, warmup: see `measure.costs`; the path method, ten times as slow, gets a third of the rounds.
            It also gets no more than `PATH_IMAGES` images a batch: a graph of eight passes of more of them fits on few machines.
        curves: whether to measure cost against batch, resolution, steps and number of terms too, on the first model.
        autocast: the type of torch.autocast, or None.
        seconds: where a plain step takes less, there are more rounds: see `measure.costs`.
        keep_memory: whether `attrreg.keep_memory` was called, for all ways alike.
        channels_last: how models and images are laid out; else contiguous.
    """

    models: tuple[str, ...]
    penalties: tuple[str, ...]
    batch: int
    size: int
    rounds: int
    warmup: int
    curves: bool
    device: str
    autocast: str | None
    seconds: float = 0.0
    keep_memory: bool = False
    channels_last: bool = False

    def case(self, model: str, batch: int, size: int) -> Case:
        """A model with a batch of images of so many pixels a side."""
        autocast = None if self.autocast is None else getattr(torch, self.autocast)
        return cases.build(model, batch, size, torch.device(self.device), autocast, self.channels_last)

    def rounds_of(self, penalty: str) -> tuple[int, int]:
        """Rounds that count, and those before."""
        if penalty == strategies.INTEGRATED_GRADIENTS:
            return max(3, self.rounds // 3), 3  # a model's first, second, fourth ... path also shows that places may share a batch
        return self.rounds, self.warmup

    def batch_of(self, penalty: str) -> int:
        """Images a batch."""
        return min(self.batch, PATH_IMAGES) if penalty == strategies.INTEGRATED_GRADIENTS else self.batch


@dataclass
class Record:
    """What was measured.

    Attributes:
        costs: model -> penalty -> strategy -> its cost.
        curves: what is varied -> strategy -> (value, cost) pairs.
        environment: see `environment.environment`.
    """

    plan: Plan
    environment: dict[str, Any]
    costs: dict[str, dict[str, dict[str, Cost]]] = field(default_factory=dict)
    curves: dict[str, dict[str, list[tuple[int, Cost]]]] = field(default_factory=dict)

    @staticmethod
    def of(plan: Plan) -> Record:
        """One with nothing measured yet."""
        return Record(plan, environment(plan.device))

    def resumed(self, plan: Plan) -> Record:
        """The same measurements, to which those of a plan can be added.

        Raises:
            ValueError: they were made in another way, elsewhere, or by another state of attrreg.
        """
        here = environment(plan.device)
        then = asdict(self.plan) | self.environment
        for name, now in (asdict(plan) | here).items():
            if name not in PARTS and (old := then.get(name)) != now:
                raise ValueError(f"it was measured with {name} {old!r}, not {now!r}. Measure all anew, or write to another file.")
        penalties = tuple(name for name in strategies.PENALTIES if name in {*self.plan.penalties, *plan.penalties})
        models = tuple(dict.fromkeys([*self.plan.models, *plan.models]))
        whole = replace(plan, models=models, penalties=penalties, curves=self.plan.curves or plan.curves)
        where = self.environment
        if self.missing(plan) or self.missing_curves(plan):  # then it is measured on both days
            first, load = where["date"].split(" to ")[0], [known for known in (where["load"], here["load"]) if known is not None]
            date = first if first == here["date"] else f"{first} to {here['date']}"
            where = {**where, "date": date, "load": max(load, default=None)}
        return replace(self, plan=whole, environment=where)

    def missing(self, plan: Plan) -> list[tuple[str, str]]:
        """Which models and penalties of a plan are not measured yet."""
        return [(model, penalty) for model in plan.models for penalty in plan.penalties if penalty not in self.costs.get(model, {})]

    def missing_curves(self, plan: Plan) -> list[str]:
        """Which of a plan's curves are not."""
        return [varied for varied in CURVES if plan.curves and varied not in self.curves]

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Record:
        """Back from JSON."""
        settings: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in data["plan"].items()}
        measured = {
            model: {penalty: {name: Cost(**cost) for name, cost in found.items()} for penalty, found in by_penalty.items()}
            for model, by_penalty in data["costs"].items()
        }
        curves = {
            varied: {name: [(value, Cost(**cost)) for value, cost in points] for name, points in lines.items()}
            for varied, lines in data["curves"].items()
        }
        return Record(Plan(**settings), data["environment"], measured, curves)


CURVE_ROUNDS, CURVE_WARMUP = 5, 1
CURVES: dict[str, tuple[int, ...]] = {"batch": (2, 4, 8, 16), "resolution": (32, 64, 96, 128), "steps": (1, 2, 4, 8), "terms": (1, 2, 3, 4)}


def rounds(plan: Plan, record: Record) -> int:
    """All rounds of what is missing together."""
    parts = sum(sum(plan.rounds_of(penalty)) for _, penalty in record.missing(plan))
    return parts + sum(len(CURVES[varied]) for varied in record.missing_curves(plan)) * (CURVE_ROUNDS + CURVE_WARMUP)


def check(plan: Plan, record: Record) -> None:
    """Make each model that is to be measured at each size once, so that what cannot be is refused now and not after an hour.

    Raises:
        LookupError: a model does not exist; ValueError: it does not take images of a size that is measured.
    """
    for model in dict.fromkeys(model for model, _ in record.missing(plan)):
        plan.case(model, plan.batch, plan.size)
    if "resolution" in record.missing_curves(plan):
        for size in CURVES["resolution"]:
            try:
                plan.case(record.plan.models[0], plan.batch, size)
            except ValueError as error:
                raise ValueError(f"{error} That is a size of the curves: --no-curves leaves them out.") from error.__cause__


def measure(plan: Plan, record: Record, note: Advance, save: Callable[[Record], None] = lambda record: None) -> None:
    """Measure what a record lacks.

    Args:
        plan: what.
        record: is added to.
        note: called after each round.
        save: called after each part, so that an interrupted run leaves what it has.
    """
    case: Case | None = None
    for model, penalty in record.missing(plan):
        batch = plan.batch_of(penalty)
        if case is None or (case.name, len(case.x)) != (model, batch):
            case = plan.case(model, batch, plan.size)
        record.costs.setdefault(model, {})[penalty] = _costs(case, penalty, plan, note)
        save(record)
    for varied in record.missing_curves(plan):
        record.curves[varied] = _curve(varied, record.plan, note)  # on the model that their picture names
        save(record)


def _costs(case: Case, penalty: str, plan: Plan, note: Advance) -> dict[str, Cost]:
    chosen = strategies.strategies(penalty, case)
    rounds, warmup = plan.rounds_of(penalty)
    steps = {strategy.name: strategy.prepare(case) for strategy in chosen}
    return costs(steps, rounds, warmup, partial(note, f"{case.name}: {penalty}"), plan.seconds)


def _curve(varied: str, plan: Plan, note: Advance) -> dict[str, list[tuple[int, Cost]]]:
    lines: dict[str, list[tuple[int, Cost]]] = {}
    for value in CURVES[varied]:
        usual = plan.batch_of(strategies.INTEGRATED_GRADIENTS) if varied == "steps" else plan.batch
        batch = value if varied == "batch" else usual
        size = value if varied == "resolution" else plan.size
        case = plan.case(plan.models[0], batch, size)
        chosen = strategies.of_curve(varied, value, case)
        steps = {strategy.name: strategy.prepare(case) for strategy in chosen}
        found = costs(steps, CURVE_ROUNDS, CURVE_WARMUP, partial(note, f"{varied}: {value}"))
        for name, cost in found.items():
            lines.setdefault(name, []).append((value, cost))
    return lines


def ratios(record: Record, penalty: str, strategy: str) -> Iterator[tuple[str, Cost]]:
    """The costs of one way on all models."""
    for model, by_penalty in record.costs.items():
        if strategy in by_penalty.get(penalty, {}):
            yield model, by_penalty[penalty][strategy]


def names(record: Record, penalty: str) -> Sequence[str]:
    """The ways that were measured for a penalty, the plain step left out."""
    found = dict.fromkeys(name for by_penalty in record.costs.values() for name in by_penalty.get(penalty, {}))
    return [name for name in found if name != strategies.PLAIN]
