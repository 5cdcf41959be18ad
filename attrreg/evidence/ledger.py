"""The records of trainings, in a file that a run goes on from, and the processes that train."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from attrreg.evidence import job as jobs
from attrreg.evidence import sources
from attrreg.evidence.job import Job, Record
from attrreg.evidence.packages import Missing
from attrreg.evidence.sources import Source

if TYPE_CHECKING:
    from attrreg.progress import Advance


def cores() -> int:
    """How many trainings this process can run at a time, on one CPU thread each."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def processes(count: int) -> Iterator[ProcessPoolExecutor]:
    """Processes to train in, which end with the one that started them, however that ends, and at once where the block raises."""
    count = min(count, 61) if sys.platform == "win32" else count  # Windows waits for no more at a time
    # Spawned: a forked child would share torch's threads and a CUDA context that it cannot use.
    pool = ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), _end_with_parent)
    try:
        yield pool
    except BaseException:
        for process in list(pool._processes.values()):  # nobody keeps what they do any more, nor what waits for them
            process.terminate()
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def load(path: Path, kinds: tuple[type[Source], ...] = sources.KINDS) -> dict[str, Record]:
    """The records of a file, by the names that their jobs had then. For how a file is read see `whole_lines`.

    Raises:
        ValueError: a line is no record.
    """
    found: dict[str, Record] = {}
    for number, line in enumerate(whole_lines(path), start=1):
        if not line:
            continue
        try:
            found[json.loads(line)["name"]] = Record.from_line(line, kinds)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number} is no record ({error}). Take it out, or give another file.") from error
    return found


def whole_lines(path: Path) -> list[str]:
    """The lines of a file of JSON lines, without a last one that a stopped run left half written; none if there is no file."""
    lines = path.read_text().split("\n") if path.exists() else [""]
    return lines if _is_json(lines[-1]) else lines[:-1]


def add_line(path: Path, line: str) -> None:
    """Add a line to a file of JSON lines, and end the one before it, or cut off what a stopped run left of that."""
    last = path.read_text().split("\n")[-1] if path.exists() else ""
    if last and not _is_json(last):
        os.truncate(path, path.stat().st_size - len(last.encode()))  # what is above it is never written again
    with path.open("a", encoding="utf-8") as file:
        file.write("\n" * _is_json(last) + line + "\n")


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


class Failed(RuntimeError):
    """Trainings failed. The others' records are kept.

    Attributes:
        missing: what `study.carry_out` would have returned.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.missing: dict[str, str] = {}


class Ledger:
    """Runs jobs, each once in a file's life.

    Args:
        path: the file, a line of JSON a record; it is gone on from.
        device: where to train.
        advance: told what is being done, and how many epochs of it are over.
        kinds: the data sets that records can be of.
        workers: how many jobs are run at a time, each in a process of its own where there are several. Those import the module of the data
            set anew: in a script, start them below `if __name__ == "__main__":`.
    """

    def __init__(
        self,
        path: Path,
        device: torch.device,
        advance: Advance = lambda doing, epochs: None,
        kinds: tuple[type[Source], ...] = sources.KINDS,
        workers: int = 1,
    ) -> None:
        self.path = path
        self.device = device
        self.advance = advance
        self.workers = workers
        self.records = load(path, kinds)

    def records_of(self, wanted: Iterable[Job]) -> list[Record]:
        """The records of those of the wanted jobs that have one."""
        found = (self.records.get(job.name) for job in wanted)
        return [record for record in found if record is not None]

    def run(self, wanted: Iterable[Job], tested: bool = True) -> None:
        """Train those jobs that the file has no record of. One that fails does not stop the others. For `tested` see `job.run`.

        Raises:
            packages.Missing: a package that the data comes from is not here.
            Failed: a job did; when the others are done.
        """
        unique = {job.name: job for job in wanted}
        todo = [job for name, job in unique.items() if name not in self.records]
        for name, job in unique.items():
            if name in self.records:
                self.advance(_doing(job), job.epochs)
        failed: list[tuple[Job, Exception]] = []
        with closing(self._results(todo, tested)) as results:  # which ends the processes where something is raised here
            for job, result in results:
                try:
                    record = result()
                except Missing:
                    raise
                except Exception as error:  # what it was is said at the end
                    failed.append((job, error))
                    continue
                add_line(self.path, record.line())  # on a full disk that fails, and of what comes next nothing could be kept
                self.records[record.job.name] = record
        if failed:
            raise Failed(
                f"{len(failed)} of {len(todo)} trainings failed, the first {failed[0][0]}. What is done is in {self.path}, and a new run "
                "goes on from it."
            ) from failed[0][1]

    def _results(self, todo: Sequence[Job], tested: bool) -> Generator[tuple[Job, Callable[[], Record]]]:
        """Each job as it is done, and what gives its record or raises its error."""
        if self.workers == 1 or len(todo) < 2:
            for job in todo:
                yield job, partial(jobs.run, job, self.device, partial(self.advance, _doing(job)), tested)
            return
        with processes(self.workers) as pool:
            waiting = {pool.submit(jobs.run, job, self.device, tested=tested): job for job in todo}
            for done in as_completed(waiting):
                yield waiting[done], done.result
                self.advance(_doing(waiting[done]), waiting[done].epochs)


def _doing(job: Job) -> str:
    return f"{job.source.kind}: {job.method}"
