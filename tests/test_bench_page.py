"""What `python -m benchmarks` and its like write into pages, and when they do not."""

from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import typer

import benchmarks.__main__ as tool
from attrreg.bench import report
from benchmarks import check, evidence
from benchmarks.__main__ import PAGE, main
from benchmarks.page import marks
from tests.test_bench import record_with

pytestmark = pytest.mark.cpu


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (["--device", "mps"], r"no section mps\. Pass --out"),
        (["--channels-last"], r"no section cpu-channels-last\. Pass --out"),
        (["--device=cuda", "--section=cuda-h200"], r"no section cuda-h200\. Pass --out"),
        (["--model", "resnet18"], r"take the place of the nine in docs/performance\.md\. Pass --out"),
        (["--device=cuda", "--model=resnet18"], "take the place of the nine"),
        (["--penalty", "GradCAM"], r"Some penalties would stand for all in docs/performance\.md\. Pass --out"),
    ],
)
def test_what_the_page_has_no_place_for_is_refused_before_it_is_measured(
    arguments: list[str], cause: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["benchmarks", *arguments])
    with pytest.raises(SystemExit, match=cause):
        main()


@pytest.mark.parametrize("option", ["--quick", "--out=x.json", "--help"])
def test_other_runs_leave_the_page_alone(option: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "sys.argv", ["benchmarks", "--no-curves", "--model", "test_resnet", "--penalty", "GradCAM", "--rounds", "1", option]
    )
    before = PAGE.read_text()
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code in (None, 0) and PAGE.read_text() == before
    assert (tmp_path / "attrreg-bench.json").exists() == (option == "--quick")


@pytest.mark.parametrize(
    ("arguments", "section"),
    [
        ([], "cpu"),
        (["--no-keep-memory"], "cpu-returned"),
        (["--device=cuda", "--autocast", "bfloat16"], "cuda-bfloat16"),
        (["--section", "cpu-zen4", "--no-keep-memory"], "cpu-zen4"),
    ],
)
def test_each_run_for_the_page_fills_its_section(arguments: list[str], section: str, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[Path] = []
    written: list[Path] = []

    def bench(out: Path = PAGE, device: str = "cpu", autocast: str = "", keep_memory: bool = True) -> None:
        measured.append(out)

    monkeypatch.setattr("sys.argv", ["benchmarks", *arguments])
    monkeypatch.setattr("benchmarks.__main__.bench", bench)
    monkeypatch.setattr("benchmarks.__main__.write_page", written.append)
    main()
    assert measured == written == [check.results(section)]


@pytest.mark.parametrize("arguments", [["--help"], ["--quick"], ["--out=x.jsonl"], ["--out", "x.jsonl", "--data", "crosses"]], ids=" ".join)
def test_other_comparisons_leave_page_and_records_alone(arguments: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    outs: list[str] = []
    written: list[Any] = []

    def compare(quick: bool = False, out: str = "own", data: str = "") -> None:
        outs.append(out)

    for name, value in (("evidence", compare), ("write_page", lambda: written.append(None)), ("RESULTS", tmp_path / "evidence.jsonl")):
        monkeypatch.setattr(evidence, name, value)
    monkeypatch.setattr("sys.argv", ["benchmarks", *arguments])
    with pytest.raises(SystemExit) as ended:
        evidence.main()
    assert ended.value.code in (None, 0) and not written
    assert outs == {"--help": [], "--quick": ["own"]}.get(arguments[0], ["x.jsonl"])


def test_a_run_without_curves_shows_none_of_an_older_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    page, numbers = tmp_path / "performance.md", tmp_path / "mine.json"
    page.write_text("\n".join(marks("mine", tool.COMMAND)))
    report.save(record_with(2.0, 2.0), numbers)
    numbers.with_suffix(".png").write_bytes(b"new")
    for name in ("performance-mine.png", "performance-mine-curves.png"):
        (tmp_path / name).write_bytes(b"old")
    monkeypatch.setattr(tool, "PAGE", page)
    tool.write_page(numbers)
    assert "(performance-mine.png)" in page.read_text() and "-curves.png" not in page.read_text()
    assert (tmp_path / "performance-mine.png").read_bytes() == b"new" and not numbers.with_suffix(".png").exists()


def test_an_empty_option_is_no_run_for_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    def bench(out: str = "") -> None:
        sys.exit(out or "nowhere")

    monkeypatch.setattr("benchmarks.__main__.bench", bench)
    for argument, error in (("--out=", "nowhere"), ("--model=", "Models of your own")):
        monkeypatch.setattr("sys.argv", ["benchmarks", argument])
        with pytest.raises(SystemExit, match=error):
            main()


@pytest.mark.parametrize("ends", [KeyboardInterrupt, lambda: typer.Exit(1)])
def test_a_run_that_did_not_come_to_its_end_is_no_page(ends: Callable[[], BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    def stops(out: Path = PAGE) -> None:
        raise ends()

    written: list[Any] = []
    for module, run, name in ((tool, tool.main, "bench"), (evidence, evidence.main, "evidence")):
        monkeypatch.setattr(module, name, stops)
        monkeypatch.setattr(module, "write_page", lambda *numbers: written.append(numbers))
        monkeypatch.setattr("sys.argv", ["benchmarks"])
        with pytest.raises((SystemExit, typer.Abort)) as ended:  # typer's older versions abort
            run()
        assert getattr(ended.value, "code", 1) and not written


def test_a_training_that_fails_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("mlxtend")
    from benchmarks import default

    rows = [default.Row(default.SETTINGS[0], None, 0.0, seed) for seed in range(3)]

    def run(row: default.Row) -> dict[str, Any]:
        if row.seed == 0:
            raise ValueError("its loss is not a number")
        return {"row": row.name, "test": 0.5}

    results = tmp_path / "default.jsonl"
    results.write_text('{"row": "whole"}\n{"row": "cut o')
    for name, value in (("RESULTS", results), ("rows", lambda: rows), ("run", run), ("processes", lambda count: ThreadPoolExecutor(1))):
        monkeypatch.setattr(default, name, value)
    with pytest.raises(RuntimeError, match=r"1 of 3 trainings failed\. The others are in .*default\.jsonl") as failed:
        default.measure()
    assert isinstance(failed.value.__cause__, ValueError)
    assert {*default.load()} == {"whole", rows[1].name, rows[2].name}  # as_completed has no order
