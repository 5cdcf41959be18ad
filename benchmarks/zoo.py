"""Every architecture of timm and torchvision under every regularizer.

    python -m benchmarks.zoo                                  the table, docs/zoo.md; continues where it stopped
    python -m benchmarks.zoo --only levit_128s                one model, or a few, printed
    python -m benchmarks.zoo --rank 2                         the second-smallest of each, docs/zoo_2.md

Each model runs in a process of its own, with a time and a memory limit. Results are kept by model, with when and where they were
measured: after a change of attrreg, check those anew that did not pass (`--again`), or all (another `--out`).
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from attrreg.evidence.ledger import add_line, whole_lines
from attrreg.progress import bar
from benchmarks import zoo_report
from benchmarks.zoo_models import Entry, catalog, ranked
from benchmarks.zoo_report import Record

FORKS = multiprocessing.get_context("forkserver")  # imports torch, timm and torchvision once for all


def main(
    out: Annotated[Path, typer.Option(help="Folder of what was measured: a line a model; a rerun skips models found there.")] = Path(
        "build/zoo"
    ),
    report: Annotated[Path | None, typer.Option(help="The table to write; by default docs/zoo.md, or zoo_2.md for --rank 2.")] = None,
    rank: Annotated[int, typer.Option(min=1, help="Which model of each family: 1 is the smallest.")] = 1,
    only: Annotated[list[str] | None, typer.Option(help="Models by name; checked anew and printed, no table.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="float32 alone: no directional differences, no table.")] = False,
    again: Annotated[bool, typer.Option("--again", help="Check those anew that did not pass.")] = False,
    limit: Annotated[float, typer.Option(help="Seconds a model.")] = 900.0,
    memory: Annotated[float, typer.Option(help="GiB a model.")] = 12.0,
    jobs: Annotated[int, typer.Option(min=1, help="Models at a time.")] = 1,
) -> None:
    """Check one small model of every timm module and torchvision family under every regularizer."""
    console = Console()
    FORKS.set_forkserver_preload(["benchmarks.zoo_check"])
    out.mkdir(parents=True, exist_ok=True)
    with console.status("counting parameters") as status:
        entries = catalog(out / "catalog.jsonl", lambda name: status.update(f"counting parameters: {name}"))
    run = partial(_run, jobs=jobs, limit=limit, memory=memory, quick=quick)
    if only:
        for record in run(_named(entries, only)):
            console.print_json(json.dumps(record))
        return
    chosen = ranked(entries, rank)
    records = _measure(chosen, out / f"results-{rank}{'-quick' if quick else ''}.jsonl", again, run, console)
    found = [records[entry.key] for entry in chosen]
    if quick:
        console.print(zoo_report.causes(found), markup=False, highlight=False, soft_wrap=True)
    else:
        report = report or Path("docs") / ("zoo.md" if rank == 1 else f"zoo_{rank}.md")
        report.write_text(zoo_report.page(found, rank))
        console.print(f"Table: {report}, measured: {out}", highlight=False, soft_wrap=True)


def _measure(
    chosen: list[Entry], file: Path, again: bool, run: Callable[[list[Entry]], Iterator[Record]], console: Console
) -> dict[str, Record]:
    """Check the models that the file does not have yet; returns all records by key."""
    records = _read(file, again)
    todo = sorted((entry for entry in chosen if entry.key not in records), key=lambda entry: entry.params)
    with bar(console, len(chosen)) as advance:
        advance("models", len(chosen) - len(todo))
        for record in run(todo):
            add_line(file, json.dumps(record))
            records[record["key"]] = record
            advance(record["key"], 1)
    return records


def _named(entries: list[Entry], names: list[str]) -> list[Entry]:
    chosen = [entry for entry in entries if entry.name in names or entry.key in names]
    if len(chosen) < len(names):
        raise typer.BadParameter(f"found only {[entry.key for entry in chosen]}. Write timm/NAME or torchvision/NAME.", param_hint="--only")
    return chosen


def _read(file: Path, again: bool) -> dict[str, Record]:
    """What was measured already; the last line of a model counts."""
    records = {record["key"]: record for record in map(json.loads, whole_lines(file))}
    return {key: record for key, record in records.items() if not again or zoo_report.passed(record)}


def _run(entries: list[Entry], jobs: int, limit: float, memory: float, quick: bool) -> Iterator[Record]:
    """Check models, each in its own process, and yield what was found as they finish."""
    pool = ThreadPoolExecutor(jobs)
    try:
        for done in as_completed([pool.submit(_run_one, entry, limit, memory, quick) for entry in entries]):
            yield done.result()
    finally:  # also when interrupted: what is running is finished, what waits is dropped
        pool.shutdown(cancel_futures=True)


def _run_one(entry: Entry, limit: float, memory: float, quick: bool) -> Record:
    record: Record = {"key": entry.key, **asdict(entry), "size": None, "problem": "", "results": [], "environment": zoo_report.here()}
    receiver, sender = FORKS.Pipe(duplex=False)
    process = FORKS.Process(target=_child, args=(sender, entry, memory, quick))
    start = time.perf_counter()
    process.start()
    sender.close()
    try:
        while receiver.poll(max(0.0, start + limit - time.perf_counter())):
            message = receiver.recv()
            record["results"] += message.pop("results", [])
            record |= message
        record["problem"] = f"not finished in {limit:.0f} s"
    except EOFError:
        process.join()
        if process.exitcode:
            record["problem"] = f"the process ended with code {process.exitcode}"
    process.kill()
    process.join()
    record["seconds"] = round(time.perf_counter() - start, 1)
    return record


def _child(sender: Connection, entry: Entry, memory: float, quick: bool) -> None:
    import torch

    from benchmarks.zoo_check import check
    from benchmarks.zoo_models import build

    torch.set_num_threads(1)
    os.nice(5)
    resource.setrlimit(resource.RLIMIT_DATA, (int(memory * 2**30),) * 2)
    try:
        subject = build(entry)
    except Exception as error:  # the model, not attrreg
        sender.send({"problem": f"the model cannot be used: {error}"})
        return
    sender.send({"size": subject.size})
    for result in check(subject, float64=not quick):
        sender.send({"results": [asdict(result)]})


if __name__ == "__main__":
    typer.run(main)
