"""A run of the benchmark: which measurements, and their record."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import torch

from attrreg.bench import cases, strategies
from attrreg.bench.cases import Case
from attrreg.bench.measure import Cost, costs
from attrreg.environment import environment

Note = Callable[[str], None]  # called after each round, with what is being measured


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes:
        models: timm's names.
        penalties: of `strategies.PENALTIES`.
        batch, size: of the images.
        rounds, warmup: see `measure.costs`; the path method, ten times as slow, gets a third of the rounds.
        curves: whether to measure cost against batch, resolution, steps and number of terms too, on the first model.
        autocast: the type of torch.autocast, or None.
        keep_memory: whether `attrreg.keep_memory` was called, for all ways alike.
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
    keep_memory: bool = False

    def rounds_of(self, penalty: str) -> tuple[int, int]:
        """Rounds that count, and those before."""
        if penalty == strategies.INTEGRATED_GRADIENTS:
            return max(3, self.rounds // 3), 1
        return self.rounds, self.warmup

    def dtype(self) -> torch.dtype | None:
        """Of autocast."""
        return None if self.autocast is None else getattr(torch, self.autocast)

    def total(self) -> int:
        """All rounds together."""
        each = sum(sum(self.rounds_of(penalty)) for penalty in self.penalties)
        return len(self.models) * each + (len(CURVES) * 4 * (CURVE_ROUNDS + 1) if self.curves else 0)


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

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

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


PARTS = ("models", "penalties", "curves", "date", "load")  # what may differ between parts of a record
CURVE_ROUNDS = 5
CURVES: dict[str, tuple[int, ...]] = {"batch": (2, 4, 8, 16), "resolution": (32, 64, 96, 128), "steps": (1, 2, 4, 8), "terms": (1, 2, 3, 4)}


def measure(plan: Plan, note: Note, save: Callable[[Record], None] = lambda record: None, before: Record | None = None) -> Record:
    """Measure.

    Args:
        plan: what.
        note: called after each round.
        save: called after each part, so that an interrupted run leaves what it has.
        before: what there is already, and is not measured again.

    Raises:
        ValueError: what there is was measured in another way or elsewhere.
    """
    record = Record(plan, environment(plan.device)) if before is None else _resumed(before, plan)
    for model in plan.models:
        parts = record.costs.setdefault(model, {})
        missing = [penalty for penalty in plan.penalties if penalty not in parts]
        if missing:
            case = cases.build(model, plan.batch, plan.size, torch.device(plan.device), plan.dtype())
        for penalty in missing:
            parts[penalty] = _costs(case, penalty, plan, note)
            save(record)
    for varied in CURVES if plan.curves else ():
        if varied not in record.curves:
            record.curves[varied] = _curve(varied, plan, note)
            save(record)
    return record


def _resumed(before: Record, plan: Plan) -> Record:
    ways = [(setting.name, getattr(before.plan, setting.name), getattr(plan, setting.name)) for setting in fields(Plan)]
    places = [(name, before.environment.get(name), value) for name, value in environment(plan.device).items()]
    for name, old, new in ways + places:
        if name not in PARTS and old != new:
            raise ValueError(f"what there is was measured with {name} {old!r}, not {new!r}. Write to another file.")
    penalties = tuple(name for name in strategies.PENALTIES if name in {*before.plan.penalties, *plan.penalties})
    models = tuple(dict.fromkeys([*before.plan.models, *plan.models]))
    whole = replace(plan, models=models, penalties=penalties, curves=before.plan.curves or plan.curves)
    return Record(whole, before.environment, before.costs, before.curves)


def _costs(case: Case, penalty: str, plan: Plan, note: Note) -> dict[str, Cost]:
    chosen = strategies.strategies(penalty, case)
    rounds, warmup = plan.rounds_of(penalty)
    steps = {strategy.name: strategy.prepare(case) for strategy in chosen}
    return costs(steps, strategies.PLAIN, rounds, warmup, lambda: note(f"{case.name}: {penalty}"))


def _curve(varied: str, plan: Plan, note: Note) -> dict[str, list[tuple[int, Cost]]]:
    lines: dict[str, list[tuple[int, Cost]]] = {}
    for value in CURVES[varied]:
        batch, size = (value if varied == name else usual for name, usual in (("batch", plan.batch), ("resolution", plan.size)))
        case = cases.build(plan.models[0], batch, size, torch.device(plan.device), plan.dtype())
        chosen = strategies.of_curve(varied, value, case)
        steps = {strategy.name: strategy.prepare(case) for strategy in chosen}
        found = costs(steps, strategies.PLAIN, CURVE_ROUNDS, 1, lambda: note(f"{varied}: {value}"))  # noqa: B023
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
