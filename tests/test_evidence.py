"""The comparison: its jobs, equal trials, going on from a file, tables."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy
import pytest
import torch
from torch import nn

pytest.importorskip("matplotlib")
pytest.importorskip("scipy")

from attrreg.evidence import job, packages, report, shortcuts, sources, study
from attrreg.evidence.data import Task
from attrreg.evidence.job import Job, Record
from attrreg.evidence.ledger import Failed, Ledger, load
from attrreg.evidence.methods import METHODS, method
from attrreg.evidence.sources import Crosses, Source
from attrreg.evidence.study import Plan, Training, Variants

pytestmark = pytest.mark.cpu

CPU = torch.device("cpu")
TINY = Crosses(train=24, valid=8, test=8, width=4)
JOB = Job(TINY, "plain", 0, 1e-3, 1.0, epochs=1, batch=8)


# Jobs


def test_the_same_job_gives_the_same_numbers() -> None:
    first, second = (job.run(replace(JOB, method="adversarial", judged=True), CPU) for _ in range(2))
    assert first.outcomes == second.outcomes
    torch.set_num_threads(2)
    assert job.run(replace(JOB, method="adversarial", judged=True), CPU).outcomes == first.outcomes
    assert torch.get_num_threads() == 2
    assert Record.from_line(first.line()) == first
    assert set(first.outcomes["valid"]["maps"]) == {"input gradient", "integrated gradients", "occlusion"}
    assert job.run(replace(JOB, method="adversarial", seed=1), CPU).outcomes["valid"]["loss"] != first.outcomes["valid"]["loss"]


@pytest.fixture(scope="module")
def plain() -> dict[str, dict[str, Any]]:
    """What comes of plain training."""
    return job.run(JOB, CPU).outcomes


@pytest.mark.parametrize("known", METHODS, ids=lambda known: known.name)
def test_every_method_trains(known: Any, plain: dict[str, dict[str, Any]]) -> None:
    epochs: list[int] = []
    record = job.run(replace(JOB, method=known.name, weight=known.weight), CPU, epochs.append)
    assert epochs == [1]
    for outcome in record.outcomes.values():
        assert 0 <= outcome["worst"] <= outcome["test"] <= 1 and 0 <= outcome["auc"] <= 1
        assert outcome["loss"] < float("inf")
    assert (record.outcomes["valid"]["loss"] == plain["valid"]["loss"]) == (known.name == "plain")


@pytest.mark.parametrize("name", ["ActDiff", "masked", "feature path"])
def test_without_masks_every_method_is_plain_training(name: str, plain: dict[str, dict[str, Any]]) -> None:
    found = job.run(replace(JOB, method=name, annotated=0.0), CPU).outcomes
    assert job.run(replace(JOB, method=name), CPU).outcomes["valid"]["loss"] != plain["valid"]["loss"]
    for selection in job.SELECTIONS:
        assert found[selection]["loss"] == pytest.approx(plain[selection]["loss"], rel=1e-5)


def test_a_model_that_diverged_has_no_maps_and_is_not_chosen() -> None:
    record = job.run(replace(JOB, method="RRR", rate=1e30, judged=True), CPU)
    assert record.outcomes["valid"]["loss"] == float("inf") and "maps" not in record.outcomes["valid"]
    assert Record.from_line(record.line()) == record and record.outcomes["valid"]["auc"] is None


def test_draws_that_nobody_else_seeds_are_of_the_jobs_seed_whether_the_data_were_made_or_kept() -> None:
    job._task.cache_clear()
    losses = []
    for _ in range(2):
        torch.rand(())  # moves the default generator on
        losses.append(job.run(replace(JOB, source=Draws()), CPU).outcomes["valid"]["loss"])
    assert losses[0] == losses[1]


def test_maps_are_judged_where_there_are_masks() -> None:
    task = TINY.task(0)
    model, known = TINY.model(task, 0).eval(), torch.arange(len(task.test)) % 2 == 0
    part = replace(task.test, annotated=known)
    assert job._judgements(model, part) == job._judgements(model, task.test.take(known.nonzero()[:, 0]))
    assert job._judgements(model, replace(part, annotated=torch.zeros_like(known))) is None


def test_names_tell_jobs_apart() -> None:
    changes: dict[str, Any] = {
        "source": replace(TINY, train=25),
        "method": "RRR",
        "seed": 1,
        "rate": 2e-3,
        "weight": 2.0,
        "epochs": 2,
        "batch": 4,
        "annotated": 0.5,
        "quality": "boxes",
        "judged": True,
    }
    assert set(changes) == {field.name for field in dataclasses.fields(Job)}
    assert JOB.name == replace(JOB).name
    assert len({JOB.name, *(replace(JOB, **{key: value}).name for key, value in changes.items())}) == 1 + len(changes)
    with pytest.raises(ValueError, match=r"24 training images are fewer than a batch of 99\. "):
        job.run(replace(JOB, batch=99), CPU)
    with pytest.raises(ValueError, match=r"24 training images in batches of 24 are one step.*Add epochs"):
        job.run(replace(JOB, batch=24, epochs=1), CPU)
    with pytest.raises(ValueError, match=r"no data set 'nowhere' among crosses, "):
        sources.from_dict({"kind": "nowhere"})


def test_a_method_that_changed_is_trained_again(monkeypatch: pytest.MonkeyPatch) -> None:
    for known in ("ActDiff", "masked", "adversarial"):
        todo = replace(JOB, method=known)
        before = todo.name
        for other in METHODS:
            if other.name != known:
                monkeypatch.setattr(job, "method", lambda name, other=other: replace(other, name=name))
                assert todo.name != before
        monkeypatch.undo()
        assert todo.name == before


# Studies


@dataclass(frozen=True)
class Mine(Source):
    """A user's own data and model."""

    kind: ClassVar[str] = "mine"
    count: int = 16

    def task(self, seed: int) -> Task:
        if self.count == 0:
            raise packages.Missing("The package mine is not here. Install it.")
        return shortcuts.crosses(self.count, 4, 4, seed)

    def model(self, task: Task, seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return nn.Sequential(nn.Conv2d(1, 2, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, task.classes))


@dataclass(frozen=True)
class Draws(Mine):
    """Another, whose data and model draw from the default generator."""

    kind: ClassVar[str] = "draws"

    def task(self, seed: int) -> Task:
        torch.rand(3)
        return super().task(seed)

    def model(self, task: Task, seed: int) -> nn.Module:
        return nn.Sequential(nn.Dropout(0.5), super().model(task, seed))


KINDS: tuple[type[Source], ...] = (*sources.KINDS, Mine)
VARIANTS = Variants(("ActDiff",), shares=(0.0, 1.0), sources=(Mine(24),))
MINE = Plan((Training(Mine(), 1, 8, VARIANTS),), ("plain", "ActDiff"), trials=2, seeds=(0, 1))


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("study") / "mine.jsonl"
    missing = study.carry_out(replace(MINE, trainings=(Training(Mine(0), 1, 8), *MINE.trainings)), Ledger(path, CPU, kinds=KINDS))
    assert missing == {"mine": "The package mine is not here. Install it."}
    return path


def test_a_run_goes_on_where_it_was(done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = done.read_text().splitlines()
    cut = tmp_path / "cut.jsonl"
    cut.write_text("\n".join([*lines[:-1], lines[-1][:50]]))
    ran: list[Job] = []
    original = job.run
    monkeypatch.setattr(job, "run", lambda todo, *rest: ran.append(todo) or original(todo, *rest))  # type: ignore[func-returns-value]
    epochs: list[float] = []
    study.carry_out(MINE, Ledger(cut, CPU, lambda doing, count: epochs.append(count), KINDS))
    assert [todo.name for todo in ran] == [json.loads(lines[-1])["name"]]
    assert sum(epochs) <= MINE.epochs()
    numbers = [{line["name"]: line["outcomes"] for line in map(json.loads, path.read_text().splitlines())} for path in (done, cut)]
    assert numbers[0] == numbers[1]
    cut.write_text("\n".join(lines))  # stopped before the end of its last line
    whole = Ledger(cut, CPU, kinds=KINDS)
    whole.run([replace(JOB, seed=5)])
    assert set(load(cut, KINDS)) == {*numbers[0], replace(JOB, seed=5).name}
    cut.write_text("nothing\n" + lines[0] + "\n")
    with pytest.raises(ValueError, match=r"line 1 is no record.*\. Take it out"):
        Ledger(cut, CPU, kinds=KINDS)


def test_several_jobs_at_a_time_give_the_same_numbers(tmp_path: Path) -> None:
    todo = [JOB, replace(JOB, method="ActDiff"), JOB]
    ledgers = []
    told: list[tuple[str, float]] = []
    for workers in (1, 2):
        ledgers.append(Ledger(tmp_path / f"{workers}.jsonl", CPU, lambda doing, count: told.append((doing, count)), workers=workers))
        for times in (1, 2):
            ledgers[-1].run(todo)
            assert sorted(told) == times * [("crosses: ActDiff", 1)] + times * [("crosses: plain", 1)]
        told.clear()
    one, two = ({name: record.outcomes for name, record in ledger.records.items()} for ledger in ledgers)
    assert one == two and len(one) == 2
    assert two == {name: record.outcomes for name, record in load(tmp_path / "2.jsonl").items()}
    with pytest.raises(packages.Missing, match="tuxpaint"):
        ledgers[1].run(Job(sources.StampBirds(8, 8, 8, size=32), "plain", seed, 1e-3, 1.0, 1, 8) for seed in range(3))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_job_that_fails_does_not_stop_the_others(tmp_path: Path, workers: int) -> None:
    ledger = Ledger(tmp_path / "some.jsonl", CPU, workers=workers)
    todo = [replace(JOB, batch=99), JOB, replace(JOB, seed=1)]
    with pytest.raises(Failed, match=r"1 of 3 trainings failed, the first Job\(.*batch=99.*\. What is done is in .*some\.jsonl") as error:
        ledger.run(todo)
    assert isinstance(error.value.__cause__, ValueError)
    assert set(load(ledger.path)) == {job.name for job in todo[1:]}


def test_tuning_is_equal_and_chooses_the_best(done: Path) -> None:
    training, ledger = MINE.trainings[0], Ledger(done, CPU, kinds=KINDS)
    plain, actdiff = (study.trials(method(name), training, 5) for name in MINE.methods)
    assert [todo.rate for todo in plain] == [todo.rate for todo in actdiff]
    assert {todo.seed for todo in plain + actdiff} == {study.TUNING_SEED}
    assert len({todo.weight for todo in actdiff}) == 5 and {todo.weight for todo in plain} == {1.0}
    default = study.trials(method("default"), training, 5)
    assert [todo.rate for todo in default] == [todo.rate for todo in plain] and {todo.weight for todo in default} == {1.0}
    assert all(set(ledger.records[todo.name].outcomes["valid"]) == {"epoch", "loss"} for todo in actdiff[:2])  # tuning sees no test
    low, high = study.RATES
    assert all(low <= todo.rate <= high for todo in plain)
    assert [todo.name for todo in study.trials(method("ActDiff"), training, 2)] == [todo.name for todo in actdiff[:2]]
    for selection in job.SELECTIONS:
        best = study.best_of(MINE, training, "ActDiff", selection, ledger)
        assert best is not None
        losses = {todo.name: ledger.records[todo.name].outcomes[selection]["loss"] for todo in actdiff[:2]}
        assert losses[best.name] == min(losses.values())
    assert study.best_of(replace(MINE, trials=3), training, "ActDiff", "valid", ledger) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trials": 0}, r"needs a trial and a seed.*\. "),
        ({"seeds": ()}, r"needs a trial and a seed.*\. "),
        ({"seeds": (0, 1, 0)}, r"seeds must differ, also from 1000, .*\. "),
        ({"seeds": (0, study.TUNING_SEED)}, r"seeds must differ, also from 1000, .*\. "),
        ({"methods": ("magic",)}, r"method 'magic' is unknown\. "),
        ({"trainings": (Training(TINY, 1, 8, Variants(("magic",))),)}, r"method 'magic' is unknown\. "),
    ],
)
def test_plans_that_make_no_sense(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(MINE, **changes)
    with pytest.raises(ValueError, match=r"'good' is none of 'exact'.*\. "):
        Variants(qualities=("good",))
    with pytest.raises(ValueError, match=r"two are alike\. Leave one out"):
        Variants(sources=(TINY, TINY))
    birds = sources.StampBirds(size=64), sources.StampBirds(size=128)  # of one label
    assert len(Variants(shares=(), qualities=(), sources=birds).changes()) == 2
    assert len(Variants(shares=(0.0, 0.002, 0.004, 1.0), qualities=()).changes()) == 3  # by other words each


# Tables


def test_intervals() -> None:
    scipy = pytest.importorskip("scipy.stats")
    values = [0.4, 0.5, 0.65, 0.7, 0.45]
    low, high = scipy.t.interval(0.95, 4, numpy.mean(values), scipy.sem(values))
    assert report.interval(values) == f"{low:.2f} to {high:.2f}"
    assert report.interval([0.5]) == report.interval([0.5, 0.5]) == "-" and report.spread([0.5]) == "0.500" and report.spread([None]) == "-"
    assert report.spread([0.5, None]) == "0.500 (1 of 2)"  # of models that diverged there is none
    assert report.spread(values) == f"{numpy.mean(values):.3f} ± {numpy.std(values, ddof=1):.3f}"
    assert report.interval([0.0, 0.1, 0.9]).startswith("0.00 to ") and report.interval([1.0, 0.9, 0.1]).endswith(" to 1.00")
    assert report.interval([-0.9, 0.0, -0.8], -1.0).startswith("-1.00 to ")  # of gains


def records(values: dict[int, float]) -> list[Record]:
    """Made up: by seed, a number."""
    return [Record(replace(JOB, seed=seed), {"valid": {"worst": value, "test": value}}, 1.0, {}) for seed, value in values.items()]


def test_gains_are_seed_by_seed() -> None:
    found, plain = records({0: 0.5, 1: 0.9, 2: 0.4, 7: 1.0}), records({2: 0.1, 1: 0.2, 0: 0.3})
    assert report.gain(found, plain, "valid") == f"+0.400 ({report.interval([0.2, 0.7, 0.3], -1.0)})"
    assert report.gain(plain[:1], found, "valid") == "-0.300 (-)" and report.gain(found[3:], plain, "valid") == "-"
    whole = records({0: 0.7, 1: 0.2, 2: 0.7})  # nothing to be kept with seed 1, nothing known with 7
    assert report.gain_kept(found, plain, whole) == pytest.approx([0.5, None, 0.5, None])


def test_tables_have_the_numbers(done: Path, tmp_path: Path) -> None:
    ledger, training = Ledger(done, CPU, kinds=KINDS), MINE.trainings[0]
    text = report.markdown(MINE, ledger)
    for selection in job.SELECTIONS:
        found = study.rows(MINE, training, "ActDiff", selection, ledger)
        assert [record.job.seed for record in found] == [0, 1]
        assert report.spread([record.outcomes[selection]["test"] for record in found]) in text
    assert "in-distribution validation" in text and "shifted validation" in text and "occlusion" in text
    for words in ("all masks", "0% of the masks", "masks: boxes", repr(Mine(24))):
        line = next(line for line in text.splitlines() if line.startswith(f"| ActDiff | {words} |"))
        assert line.endswith("| 2 |")
    plain, other = (study.rows(MINE, training, name, "valid", ledger) for name in MINE.methods)
    differences = [b.outcomes["valid"]["worst"] - a.outcomes["valid"]["worst"] for a, b in zip(plain, other, strict=True)]
    assert f"| {numpy.mean(differences):+.3f} ({report.interval(differences, -1.0)}) |" in text
    variants = report.varied(MINE, training, "ActDiff", ledger)
    kept = report.gain_kept(variants["masks: boxes"], variants["0% of the masks"], variants["all masks"])
    line = next(line for line in text.splitlines() if line.startswith("| ActDiff | masks: boxes |"))
    assert f"| {report.spread(kept)} | 2 |" in line
    import matplotlib

    backend = matplotlib.get_backend()
    matplotlib.use("svg")  # stands for a notebook's
    try:
        report.plot(MINE, ledger, tmp_path / "picture.png")
        assert matplotlib.get_backend() == "svg"
    finally:
        matplotlib.use(backend)
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    first = next(iter(ledger.records.values()))  # a trial, whose numbers no table has
    ledger.records[first.job.name] = replace(first, environment={**first.environment, "date": "1999-12-31"})
    assert report.markdown(MINE, ledger) == text
    assert report.begun(replace(MINE, trials=3), ledger) == []


def test_every_method_that_is_varied_is_drawn(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    names, axis = tuple(known.name for known in METHODS[:5]), Figure().subplots()
    training = Training(TINY, 1, 8, Variants(names))
    report._shares(axis, Plan((training,), names, trials=1, seeds=(0,)), training, Ledger(tmp_path / "none.jsonl", CPU))
    assert [line.get_label() for line in axis.get_lines()] == list(names)
