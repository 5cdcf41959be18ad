"""A few processes that train together over gloo, kept for many tests."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT = 120.0


class Ranks:
    """Runs a function on every rank of a process group, and gathers what each returns.

    The processes live until a call fails or `close`; a call that fails kills them all, and the next one starts new ones.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._processes: list[BaseProcess] = []
        self._pipes: list[Connection] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Call `function(rank, *arguments)`, defined at the top of a module, on all ranks."""
        if not self._processes:
            self._start()
        try:
            for pipe in self._pipes:
                pipe.send((function, arguments))
            return self._answers()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join(TIMEOUT)
        for pipe in self._pipes:
            pipe.close()
        if self._folder is not None:
            self._folder.cleanup()
        self._processes, self._pipes, self._folder = [], [], None

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory(prefix="attrreg-ranks-")
        store = os.path.join(self._folder.name, "store")
        for rank in range(self.count):
            here, there = context.Pipe()
            process = context.Process(target=_work, args=(rank, self.count, store, there), daemon=True)
            process.start()
            there.close()
            self._processes.append(process)
            self._pipes.append(here)

    def _answers(self) -> list[Any]:
        answers: dict[int, Any] = {}
        deadline = time.monotonic() + TIMEOUT
        while len(answers) < self.count:
            waiting = [pipe for rank, pipe in enumerate(self._pipes) if rank not in answers]
            ready = wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError(f"ranks {sorted(set(range(self.count)) - answers.keys())} did not answer within {TIMEOUT:.0f} s")
            for rank, pipe in enumerate(self._pipes):
                if pipe not in ready:
                    continue
                try:
                    failed, answers[rank] = pipe.recv()
                except EOFError:
                    raise AssertionError(f"rank {rank} of {self.count} died") from None
                if failed:  # the others only wait for it
                    raise AssertionError(f"rank {rank} of {self.count}:\n{answers[rank]}")
        return [answers[rank] for rank in range(self.count)]


def _work(rank: int, count: int, store: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=count, timeout=timedelta(seconds=TIMEOUT))
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        try:
            torch.manual_seed(0)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                answer = (False, function(rank, *arguments))
        except BaseException:
            answer = (True, traceback.format_exc())
        pipe.send(answer)
