"""The command `attrreg bench`. What takes long to import, or comes with the extra, is imported when it runs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import torch
import typer

import attrreg
from attrreg.options import check_device, check_out, check_packages

NEEDED = ("matplotlib", "rich")


def bench(
    model: Annotated[list[str] | None, typer.Option(help="timm's, or torchvision/NAME; again for each. Default: nine.")] = None,
    penalty: Annotated[
        list[str] | None, typer.Option(help="Penalties, as GradCAM (a wrong name lists them); again for each. Default: all.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images a batch.")] = 16,
    size: Annotated[int, typer.Option(min=16, help="Pixels a side.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds that count.")] = 15,
    warmup: Annotated[int, typer.Option(min=0, help="Rounds before those.")] = 3,
    seconds: Annotated[
        float, typer.Option(min=0, help="Where a plain step takes less, more rounds: until plain steps took rounds x this.")
    ] = 0.2,
    device: Annotated[str, typer.Option(help="For example cpu or cuda.")] = "cpu",
    autocast: Annotated[str | None, typer.Option(help="Compute under autocast, for example in bfloat16.")] = None,
    channels_last: Annotated[bool, typer.Option("--channels-last", help="Lay out models and images in torch.channels_last.")] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: PyTorch's own choice.")] = None,
    keep_memory: Annotated[
        bool, typer.Option(help="Measure with attrreg.keep_memory() for all ways alike, where the C library has it, or as Python starts.")
    ] = True,
    curves: Annotated[bool, typer.Option(help="Also cost against batch, resolution, steps and terms, on the first model.")] = True,
    quick: Annotated[bool, typer.Option("--quick", help="Under two minutes: three small models, two penalties, few rounds.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Keep what --out has by the same code, and measure what is missing.")] = False,
    out: Annotated[Path, typer.Option(help="The numbers to write (.json); tables (.md) and pictures (.png) go beside it.")] = Path(
        "attrreg-bench.json"
    ),
) -> None:
    """Measure what each way to train with an attribution penalty costs here, as multiples of a plain training step."""
    check_packages("bench", NEEDED)
    check_out(out, ".json", ".json.part", ".md", ".png", "-curves.png")
    check_device(device)
    if not math.isfinite(seconds):
        raise typer.BadParameter(f"{seconds} seconds never end. Give a finite number.", param_hint="--seconds")
    if autocast not in (None, "bfloat16", "float16"):
        raise typer.BadParameter(f"there is no autocast in {autocast!r}. Choose bfloat16 or float16.", param_hint="--autocast")

    from rich.console import Console

    console = Console()
    with console.status("loading"):
        from attrreg.bench import cases, report, run, strategies
        from attrreg.progress import bar

    if threads is not None:
        torch.set_num_threads(threads)
    unknown = set(penalty or ()) - set(strategies.PENALTIES)
    if unknown:
        raise typer.BadParameter(f"{sorted(unknown)} unknown. Choose from {list(strategies.PENALTIES)}.", param_hint="--penalty")
    plan = run.Plan(
        models=tuple(dict.fromkeys(model or (cases.SMALL if quick else cases.MODELS))),
        penalties=tuple(dict.fromkeys(penalty or (strategies.PENALTIES[:2] if quick else strategies.PENALTIES))),
        batch=batch,
        size=size,
        rounds=min(rounds, 4) if quick else rounds,
        warmup=min(warmup, 1) if quick else warmup,
        seconds=0.0 if quick else seconds,
        curves=curves and not quick,
        device=device,
        autocast=autocast,
        keep_memory=keep_memory and torch.device(device).type == "cpu" and attrreg.keep_memory(),
        channels_last=channels_last,
    )
    record = run.Record.of(plan)
    if resume and out.exists():
        try:
            record = report.load(out).resumed(plan)
        except ValueError as error:  # measured in another way, or no such file
            raise typer.BadParameter(f"{out} cannot be gone on with: {error}", param_hint="--resume") from None
    try:
        run.check(plan, record)
    except (LookupError, ValueError) as error:  # a model that there is not, or that does not take such images
        raise typer.BadParameter(str(error), param_hint="--model") from None
    with bar(console, run.rounds(plan, record)) as advance:
        run.measure(plan, record, advance, lambda record: report.save(record, out))
    out.with_suffix(".md").write_text(report.markdown(record) + "\n", encoding="utf-8")
    report.plot(record, out.with_suffix(".png"))
    if record.curves:
        report.plot_curves(record, out.with_name(out.stem + "-curves.png"))
    console.print(report.conditions(record), highlight=False)
    console.print(report.summary(record))
    console.print(f"Written: {out}, .md and .png beside it", highlight=False, markup=False, soft_wrap=True)
