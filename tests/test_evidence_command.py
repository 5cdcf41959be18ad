"""`attrreg evidence`, and the processes that it trains in."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("scipy")
pytest.importorskip("typer")
from typer.testing import CliRunner

from attrreg import cli
from attrreg.evidence import job, ledger, plans, sources
from attrreg.evidence.ledger import Failed, load
from attrreg.evidence.packages import Missing
from attrreg.evidence.sources import Folder
from attrreg.evidence.study import TUNING_SEED, Training, Variants
from tests.test_evidence import TINY
from tests.test_evidence_arrays import write_arrays

pytestmark = pytest.mark.cpu


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    monkeypatch.setattr(plans, "QUICK", (Training(TINY, 1, 8), Training(sources.StampBirds(8, 8, 8, size=32), 1, 8)))
    out = tmp_path / "results.jsonl"
    yield lambda *words: CliRunner().invoke(
        cli.build_app(), ["evidence", "--quick", "--jobs", "1", "--out", str(out), "--method", "plain", *words]
    )


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
    assert other.exit_code == 1 and "OTHER NUMBERS; trained twice here: the same both times" in other.output


def test_rows_whose_data_are_not_here_are_left_out(command: Any, tmp_path: Path) -> None:
    assert command("--data", "crosses").exit_code == 0
    record = next(record for record in load(tmp_path / "results.jsonl").values() if record.job.judged)
    elsewhere = replace(record, job=replace(record.job, source=sources.StampBirds(8, 8, 8, size=32)))
    (tmp_path / "results.jsonl").write_text(elsewhere.line() + "\n")
    again = command("--rerun", "stampbirds/plain", "--packages", str(tmp_path))
    assert again.exit_code == 1 and "was left out. The Debian package tuxpaint-stamps-default is not here." in again.output


def test_command_on_a_folder(command: Any, tmp_path: Path) -> None:
    for name, count in (("train", 20), ("valid", 4), ("test", 4)):
        write_arrays(tmp_path, name, count)
    few = command("--folder", str(tmp_path), "--epochs", "1")
    assert few.exit_code == 2 and "are one step, which trains nothing" in " ".join(few.output.replace("│", " ").split())
    done = command("--folder", str(tmp_path), "--epochs", "2")
    assert done.exit_code == 0, done.output
    assert "over plain (95%)" in done.output  # whole, though this is no terminal
    record = next(iter(load(tmp_path / "results.jsonl").values()))
    source = record.job.source
    assert isinstance(source, Folder) and source.contents
    assert replace(source, contents="") == Folder(str(tmp_path))
    done = command(
        "--folder", str(tmp_path), "--epochs", "2", "--flip", "--sizes", "16,4,4", "--splits", "train,test,valid", "--dilation", "1"
    )
    assert done.exit_code == 0, done.output
    done = command("--folder", str(tmp_path), "--epochs", "2", "--similar", "valid")
    assert done.exit_code == 0, done.output
    found = {record.job.source for record in load(tmp_path / "results.jsonl").values()}
    wanted = Folder(str(tmp_path), "train", "test", "valid", flip=True, sizes=(16, 4, 4), dilation=1)
    assert {replace(wanted, contents=source.contents), Folder(str(tmp_path), similar="valid", contents=source.contents)} <= found
    write_arrays(tmp_path, "train", 24)  # other data under the same names are trained on anew
    done = command("--folder", str(tmp_path), "--epochs", "2")
    assert done.exit_code == 0, done.output
    assert len({record.job.source for record in load(tmp_path / "results.jsonl").values()}) == len(found) + 1
    job._task.cache_clear()  # as in another process
    again = command("--rerun", "folder/plain")
    assert again.exit_code == 1 and "OTHER NUMBERS" not in again.output
    assert again.output.count("the same numbers") == 1
    assert again.output.count("are no longer those of this record. Without --rerun, those that are there are trained on.") == len(found)


@pytest.mark.parametrize("seed", [0, TUNING_SEED])
def test_command_writes_what_is_done_when_a_training_fails(
    command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    absent = Training(replace(TINY, train=9), 1, 8)
    monkeypatch.setattr(plans, "QUICK", (Training(TINY, 1, 8, Variants(("plain",), shares=(0.0,), qualities=())), absent))
    original = job.run

    def run(todo: job.Job, *rest: Any) -> job.Record:
        if todo.source == absent.source:
            raise Missing("Install it.")
        if todo.method == "ActDiff" and todo.seed == seed:
            raise ValueError("its loss is not a number")
        return original(todo, *rest)

    monkeypatch.setattr(job, "run", run)
    done = command("--method", "ActDiff")
    assert isinstance(done.exception, Failed) and f"method='ActDiff', seed={seed}" in str(done.exception)
    assert "plain" in (tmp_path / "results.md").read_text()
    rows = {record.job.method for record in load(tmp_path / "results.jsonl").values() if record.job.judged}
    assert rows == {"plain"}  # also where the other could not be tuned
    varied = {record.job.method for record in load(tmp_path / "results.jsonl").values() if record.job.annotated == 0}
    assert varied == {"plain"}  # the stage that comes after was run
    assert "was left out. Install it." in done.output


def test_a_row_of_a_method_that_is_no_more_is_left_out(command: Any, tmp_path: Path) -> None:
    assert command("--data", "crosses").exit_code == 0
    results = tmp_path / "results.jsonl"
    results.write_text(results.read_text().replace('"method": "plain"', '"method": "plane"'))
    again = command("--rerun", "crosses/plane")
    assert again.exit_code == 1 and "was left out. method 'plane' is unknown." in again.output


@pytest.mark.parametrize(("device", "options", "workers"), [("cpu", [], 3), ("cuda", [], 1), ("cuda", ["--jobs", "2"], 2)])
def test_trainings_at_a_time(device: str, options: list[str], workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def stops(path: Path, device: torch.device, workers: int) -> None:
        asked.append(workers)
        raise ValueError("enough")

    monkeypatch.setattr("attrreg.evidence.command.check_device", torch.device)
    monkeypatch.setattr(ledger, "cores", lambda: 3)
    monkeypatch.setattr(ledger, "Ledger", stops)
    done = CliRunner().invoke(cli.build_app(), ["evidence", "--out", str(tmp_path / "x.jsonl"), "--device", device, *options])
    assert done.exit_code == 2 and asked == [workers]


def test_command_without_any_data(command: Any, tmp_path: Path) -> None:
    done = command("--data", "stampbirds", "--packages", str(tmp_path))
    assert done.exit_code == 1 and "stampbirds was left out" in done.output and "nothing to show" in done.output


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--data", "imagenet"), "imagenet"),
        (("--method", "magic"), "magic"),
        (("--out", "x.json"), ".jsonl"),
        (("--rerun", "crosses/magic"), "crosses/magic"),
        (("--device", "abacus"), "abacus"),
        (("--folder", "/no/such/folder"), "train_labels.csv"),
        (("--folder", "/no/such/folder", "--splits", "a,b"), "--splits must be three names"),
        (("--folder", "/no/such/folder", "--sizes", "5"), "sizes must be three numbers"),
        (("--folder", "/no/such/folder", "--sizes", "a,b,c"), "--sizes must be three numbers"),
        (("--folder", "/no/such/folder", "--sizes=-4,8,8"), "sizes must be three numbers above 0"),
        (("--sizes", "5,5,5"), "it is of --folder"),
        (("--flip",), "it is of --folder"),
        (("--folder", "/no/such/folder", "--data", "crosses"), "takes the place of --data"),
    ],
)
def test_bad_options(command: Any, words: tuple[str, ...], says: str) -> None:
    done = command(*words)
    assert done.exit_code == 2 and says in done.output


def test_without_the_extra(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attrreg.evidence.command.NEEDED", ("no_such_package",))
    done = command()
    assert done.exit_code == 1 and "pip install 'attrreg[evidence]'" in done.output


STARTS = """
import os, time
from attrreg.evidence.ledger import processes
if __name__ == "__main__":
    with processes(1) as pool:
        print(pool.submit(os.getpid).result(), flush=True)
        pool.submit(time.sleep, 600).result()
"""


@pytest.mark.skipif(not Path("/proc").exists(), reason="asks Linux who lives")
def test_processes_end_with_the_one_that_started_them(tmp_path: Path) -> None:
    script = tmp_path / "starts.py"
    script.write_text(STARTS)
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        parent.kill()
    for _ in range(600):
        if not Path(f"/proc/{worker}").exists() or "zombie" in Path(f"/proc/{worker}/status").read_text():
            return
        time.sleep(0.1)
    raise AssertionError("it lives on")


STOPS = """
import sys, time
from attrreg.evidence.ledger import processes

def work(number):
    with open(sys.argv[1], "a") as file:
        file.write(f"{number}\\n")
    time.sleep(0.2)

if __name__ == "__main__":
    with processes(1) as pool:
        waiting = [pool.submit(work, number) for number in range(100)]
        waiting[0].result()
        raise KeyboardInterrupt
"""


def test_what_waits_is_not_begun_after_an_interrupt(tmp_path: Path) -> None:
    script, begun = tmp_path / "stops.py", tmp_path / "begun"
    script.write_text(STOPS)
    subprocess.run([sys.executable, str(script), str(begun)], stderr=subprocess.DEVNULL, timeout=300)
    assert 1 <= len(begun.read_text().splitlines()) < 10


def test_what_is_named_twice_is_done_once() -> None:
    assert plans.plan(["crosses", "crosses"], ["plain", "plain"]) == plans.plan(["crosses"], ["plain"])
