"""The progress bar of the commands."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Advance = Callable[[str, float], None]  # called with what is being done, and how many more steps of it are done


@contextmanager
def bar(console: Console, total: int) -> Iterator[Advance]:
    """Show a progress bar during a `with` block."""
    columns = (TextColumn("{task.description:<30}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("starting", total=total)

        def advance(doing: str, steps: float) -> None:
            progress.update(task, description=doing, advance=steps)

        yield advance
        progress.update(task, description="done", completed=total)  # parts of steps may not sum to whole ones
