"""The demo: what it measures, its table and notes, its command."""

from __future__ import annotations

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

import attrreg
from attrreg import cli
from attrreg.demo import report, settings, train
from attrreg.demo.command import Data
from attrreg.evidence.models import small
from attrreg.evidence.shortcuts import SIZE, crosses

pytestmark = pytest.mark.cpu


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


def test_share_outside() -> None:
    quarter = torch.zeros(100, SIZE, SIZE, dtype=torch.bool)
    quarter[:, :14, :7] = True
    data = replace(crosses(2, 2, 100).test, masks=quarter)
    assert train.share_outside(Corner(), data) == pytest.approx(0.5)


def test_every_method_starts_alike_and_trains(small_run: train.Run) -> None:
    assert len({result.outside_before for result in small_run.results}) == 1
    first = small(2, 0).state_dict()
    again = small(2, 0).state_dict()
    assert all((first[key] == again[key]).all() for key in first)
    for model in small_run.models:
        assert all(value.isfinite().all() for value in model.state_dict().values())
        assert any((value != first[key]).any() for key, value in model.state_dict().items())


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
        assert f"{result.outside_before:.0%} to {result.outside_after:.0%}" in line
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


def test_the_command_says_its_version() -> None:
    said = CliRunner().invoke(cli.build_app(), ["--version"])
    assert (said.exit_code, said.output) == (0, f"attrreg {attrreg.__version__}\n")


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
