import builtins
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("mlxtend")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("typer")

from rich.console import Console
from typer.testing import CliRunner

from attrreg import cli
from attrreg.demo import report, settings, train
from attrreg.demo.command import Data
from attrreg.evidence.data import Split, Task, dilate
from attrreg.evidence.models import small
from attrreg.evidence.shortcuts import SIZE, crosses, decoy_mnist

pytestmark = pytest.mark.cpu

CORNERS = torch.tensor([[0, 0], [0, 24], [24, 0], [24, 24]])


@pytest.fixture(scope="module")
def digits() -> Task:
    return decoy_mnist(train=200, valid=100, test=100, seed=3)


@pytest.fixture(scope="module")
def cross() -> Task:
    return crosses(seed=3)


def tiny(data: str) -> settings.Settings:
    fast = settings.settings(data, fast=True)
    return replace(fast, train=40, budget=replace(fast.budget, epochs=1, batch=20), rounds=1)


@pytest.fixture(scope="module")
def small_run() -> train.Run:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # this runs before the fixture of conftest.py
    result = train.run(tiny("crosses"))
    torch.set_num_threads(threads)
    return result


# Data


def test_shapes(digits: Task, cross: Task) -> None:
    for task, sizes in ((digits, (200, 100, 100, 100)), (cross, (500, 128, 128, 128))):
        for split, size in zip((task.train, task.valid, task.test, task.clean_test), sizes, strict=True):
            assert split.images.shape == (size, 1, SIZE, SIZE)
            assert split.images.dtype == torch.float32
            assert split.masks.shape == (size, SIZE, SIZE)
            assert split.masks.dtype == torch.bool
            assert split.labels.shape == (size,)
            assert split.images.min() >= 0 and split.images.max() <= 1
            counts = split.labels.bincount(minlength=task.classes)
            assert (counts == size // task.classes).all()


def patch_label(image: Tensor) -> int:
    """The label that an image's patch stands for."""
    for corner, (row, column) in enumerate(CORNERS.tolist()):
        patch = image[0, row : row + 4, column : column + 4]
        grey = round(255 * float(patch[0, 0]))
        if grey in (255, 155, 55) and (patch == patch[0, 0]).all():
            return corner + 4 * ((255 - grey) // 100)
    raise AssertionError("no patch")


def test_decoy_spells_the_label_in_training_only(digits: Task) -> None:
    def spelled(split: Split) -> Tensor:
        return torch.tensor([patch_label(image) for image in split.images])

    assert (spelled(digits.train) == digits.train.labels).all()
    for split in (digits.valid, digits.test):
        assert (spelled(split) == split.labels).float().mean() < 0.3


def test_decoy_masks(digits: Task) -> None:
    for split in (digits.train, digits.valid, digits.test, digits.clean_test):
        foreground = (split.images[:, 0] > 0).float()
        assert split.masks.any(dim=(1, 2)).all()
        if split is digits.clean_test:
            assert (split.masks == dilate(foreground > 0, 2)).all()
            continue
        outside = torch.where(split.masks, torch.zeros(()), foreground).sum(dim=(1, 2))
        assert (outside == 16).all()  # the patch, all of it, and nothing else


def test_clean_test_is_the_test_without_the_shortcut(digits: Task, cross: Task) -> None:
    for task, pixels in ((digits, 16), (cross, 6)):
        changed = (task.test.images != task.clean_test.images)[:, 0]
        assert (changed.sum(dim=(1, 2)) <= pixels).all()
        assert changed.any(dim=(1, 2)).all()
        assert not (changed & task.test.masks).any()
        assert (task.test.labels == task.clean_test.labels).all()


def test_decoy_splits_are_disjoint_and_the_same_for_every_seed_and_train_size(digits: Task) -> None:
    other = decoy_mnist(train=200, valid=100, test=100, seed=4)
    assert (other.clean_test.images == digits.clean_test.images).all()
    assert (other.test.images != digits.test.images).any()
    whole = decoy_mnist()
    centre = [split.images[:, 0, 4:24, 4:24].flatten(1) for split in (whole.train, whole.valid, whole.test)]
    assert len(torch.cat(centre).unique(dim=0)) == 4500
    assert (decoy_mnist(train=10).clean_test.images == whole.clean_test.images).all()


@pytest.mark.parametrize("sizes", [(0, 10, 10), (15, 10, 10), (4000, 500, 1000)])
def test_decoy_sizes(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="multiples of 10"):
        decoy_mnist(*sizes)


def test_crosses_follow_the_paper(cross: Task) -> None:
    for split, flipped in ((cross.train, False), (cross.valid, True), (cross.test, True)):
        images = split.images[:, 0]
        assert set(images.unique().tolist()) == {0.0, 1.0}
        left, right = images[:, 23:25, 3:6], images[:, 23:25, 22:25]
        assert ((right == 1).all(dim=(1, 2)) == (split.labels == int(not flipped))).all()
        assert ((left == 1).all(dim=(1, 2)) == (split.labels == int(flipped))).all()
        assert (images.sum(dim=(1, 2)) - split.masks.sum(dim=(1, 2)) == 6).all()
    assert 0.011 < cross.train.masks.float().mean() < 0.016


def test_crosses_are_crosses(cross: Task) -> None:
    scipy = pytest.importorskip("scipy.ndimage")
    for mask, label in zip(cross.train.masks[:100], cross.train.labels[:100], strict=True):
        marks, count = scipy.label(mask.numpy())
        assert count == 1 + label
        boxes = scipy.find_objects(marks)
        for rows, columns in boxes:
            arm = (rows.stop - rows.start) // 2
            assert arm in (1, 2)
            assert columns.stop - columns.start == rows.stop - rows.start == 2 * arm + 1
            drawn = mask[rows, columns]
            assert drawn[arm].all() and drawn[:, arm].all() and drawn.sum() == 4 * arm + 1
        if count == 2:
            gaps = [max(b.start - a.stop, a.start - b.stop) for a, b in zip(*boxes, strict=True)]
            assert max(gaps) >= 3


def test_crosses_sizes_and_seeds() -> None:
    task = crosses(train=7, valid=2, test=3, seed=11)
    assert (len(task.train), len(task.valid), len(task.test), len(task.clean_test)) == (7, 2, 3, 3)
    assert (crosses(7, 2, 3, seed=11).train.images == task.train.images).all()
    assert (crosses(7, 2, 3, seed=12).train.images != task.train.images).any()
    grown = crosses(7, 2, 3, seed=11, dilation=3)
    assert (grown.train.masks == dilate(task.train.masks, 3)).all()
    with pytest.raises(ValueError, match="at least 2"):
        crosses(train=1)


# Measures


def test_compared() -> None:
    assert train.compared(0.6, 0.4, 1000) == "better"
    assert train.compared(0.4, 0.6, 1000) == "worse"
    assert train.compared(0.42, 0.4, 1000) == "unclear"
    assert train.compared(0.6, 0.4, 20) == "unclear"
    assert train.compared(1.0, 1.0, 10) == "unclear"


class Corner(torch.nn.Module):
    """Every logit is the sum of the upper left quarter."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, :14, :14].sum(dim=(1, 2, 3))[:, None].repeat(1, 10)


def test_share_outside(digits: Task) -> None:
    quarter = torch.zeros(100, SIZE, SIZE, dtype=torch.bool)
    quarter[:, :14, :7] = True
    data = replace(digits.test, masks=quarter)
    assert train.share_outside(Corner(), data) == pytest.approx(0.5)


def test_every_method_starts_alike_and_trains(small_run: train.Run) -> None:
    assert len({result.outside_before for result in small_run.results}) == 1
    first = small(2, 0).state_dict()
    again = small(2, 0).state_dict()
    assert all((first[key] == again[key]).all() for key in first)
    for model in small_run.models:
        assert all(value.isfinite().all() for value in model.state_dict().values())
        assert any((value != first[key]).any() for key, value in model.state_dict().items())


def test_building_a_model_leaves_the_generator() -> None:
    before = torch.get_rng_state()
    small(2, 0)
    assert (torch.get_rng_state() == before).all()


def test_steps_are_all_reported() -> None:
    told: list[tuple[str, float]] = []
    chosen = replace(tiny("crosses"), methods=tiny("crosses").methods[:2])
    train.run(chosen, lambda doing, steps: told.append((doing, steps)))
    assert sum(steps for _, steps in told) == train.total_steps(chosen)
    assert told[0][0] == "training: plain"


# Report


def shown(run: train.Run) -> str:
    console = Console(width=80)
    with console.capture() as captured:
        console.print(report.table(run))
        console.print(report.notes(run))
    return captured.get()


def test_table_has_every_number(small_run: train.Run) -> None:
    text = shown(small_run)
    for result in small_run.results:
        line = next(line for line in text.splitlines() if line.strip().startswith(f"{result.method} "))
        assert f"{result.test:.3f}" in line and f"{result.clean:.3f}" in line and f"{result.cost:.2f}x" in line
        assert f"{result.outside_before:.0%}→{result.outside_after:.0%}" in line
        assert f"{result.test_auc:.3f}" in line and (result.verdict or "-") in line
    assert "AUC" in text
    assert [result.own_after is None for result in small_run.results] == [True, False, False, False, False]
    assert "…" not in text


def test_notes_follow_from_the_numbers(small_run: train.Run) -> None:
    plain, *others = small_run.results
    plain = replace(plain, test=0.3, clean=0.9, outside_after=0.6)
    changed = [replace(other, test=0.3, verdict="unclear", outside_after=0.6) for other in others]
    changed = [replace(other, clean=other.test) for other in changed]
    changed[0] = replace(changed[0], test=0.8, clean=0.8, verdict="better")
    changed[1] = replace(changed[1], test=0.1, clean=0.7, verdict="worse", outside_after=0.1)
    text = report.notes(replace(small_run, results=(plain, *changed)))
    assert "fooled by the shortcut: 0.300 on the test against 0.900" in text
    assert f"Clearly better on the test than plain training: {changed[0].method} (0.800)." in text
    assert f"Clearly worse on the test than plain training: {changed[1].method} (0.100)." in text
    assert f"Not clearly different from plain training on the test: {changed[2].method} (0.300), {changed[3].method} (0.300)." in text
    assert f"{changed[1].method} moved attribution inside the mask (60% to 10% outside)" in text
    assert f"clearly below their own accuracy on the clean test: {changed[1].method}.\n" in text
    unmoved = report.notes(replace(small_run, results=(replace(plain, test=0.9), *changed)))
    assert "not clearly fooled here" in unmoved


# Command


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    for data in Data:
        monkeypatch.setitem(settings._FAST, data.value, tiny(data.value))
    runner = CliRunner()
    yield lambda *words: runner.invoke(cli.build_app(), ["demo", *words])


def test_demo_writes_picture_and_numbers(command: Any, tmp_path: Path) -> None:
    out = tmp_path / "seen.png"
    done = command("--fast", "--seed", "1", "--out", str(out))
    assert done.exit_code == 0, done.output
    assert out.read_bytes().startswith(b"\x89PNG")
    numbers = json.loads(out.with_suffix(".json").read_text())
    assert [method["method"] for method in numbers["methods"]] == [method.name for method in settings.settings("decoy-mnist").methods]
    assert numbers["seed"] == 1
    assert numbers["methods"][0]["regularizer"] == "None"
    assert all(math.isfinite(method["cost"]) and method["cost"] > 0 for method in numbers["methods"])
    assert len(list(tmp_path.iterdir())) == 2
    assert "Plain training is" in done.output


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--data", "imagenet"), "crosses"),
        (("--out", "picture.jpg"), ".png"),
        (("--out", "/no/such/folder/picture.png"), "written"),
        (("--seed", "-1"), "0"),
        (("--device", "abacus"), "abacus"),
        (("--device", "meta:x"), "meta:x"),
    ],
)
def test_bad_options(command: Any, words: tuple[str, ...], says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "run", lambda *args: pytest.fail("it started to train"))
    done = command("--fast", *words)
    assert done.exit_code == 2
    assert words[0] in done.output and says in done.output


def test_without_the_extra(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attrreg.demo.command.NEEDED", ("no_such_package", "rich"))
    done = command()
    assert done.exit_code == 1
    assert done.output.strip() == "attrreg demo needs no_such_package. Install with: pip install 'attrreg[demo]'"


def test_without_typer(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without(name: str, *args: Any, **settings: Any) -> Any:
        if name == "typer":
            raise ModuleNotFoundError("No module named 'typer'", name="typer")
        return original(name, *args, **settings)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(SystemExit, match=r"pip install 'attrreg\[demo\]'"):
        cli.main()
