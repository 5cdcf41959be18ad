"""The command `attrreg evidence`. What takes long to import, or comes with the extra, is imported when it runs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from attrreg.evidence.packages import FOLDER, Missing
from attrreg.options import check_device, check_out, check_packages

if TYPE_CHECKING:
    from rich.console import Console

    from attrreg.evidence.job import Record
    from attrreg.evidence.ledger import Ledger
    from attrreg.evidence.sources import Folder

NEEDED = ("matplotlib", "rich", "scipy")
OUT = Path("attrreg-evidence.jsonl")
SPLITS = "train,valid,test"


def evidence(
    data: Annotated[
        list[str] | None, typer.Option(help="Data sets, as decoy-mnist (a wrong name lists them); again for each. Default: all.")
    ] = None,
    folder: Annotated[Path | None, typer.Option(help="Your own arrays in place of these: see docs/evidence.md.")] = None,
    splits: Annotated[str, typer.Option(help="Of --folder: the names of the training, validation and test splits.")] = SPLITS,
    sizes: Annotated[str, typer.Option(help="Of --folder: how many images of each, as in 500,128,128. Default: all.")] = "",
    similar: Annotated[str, typer.Option(help="Of --folder: a split like training. Default: a fifth of training, or by --flip.")] = "",
    flip: Annotated[bool, typer.Option("--flip", help="Of --folder: mirror validation and test images, as the paper does.")] = False,
    dilation: Annotated[int, typer.Option(min=0, help="Of --folder: pixels by which masks are grown.")] = 0,
    method: Annotated[
        list[str] | None, typer.Option(help="Methods, as GradMask (a wrong name lists them); again for each. Default: all.")
    ] = None,
    trials: Annotated[int, typer.Option(min=1, help="Settings tried for each method; with --quick one.")] = 5,
    seeds: Annotated[int, typer.Option(min=1, max=1000, help="Trainings with the settings chosen; with --quick one.")] = 5,
    epochs: Annotated[int | None, typer.Option(min=1, help="Of each training. Default: the data set's own.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Everything once, small: minutes. Draw no conclusions from it.")] = False,
    out: Annotated[Path, typer.Option(help="The results (.jsonl), gone on from; tables (.md) and a picture (.png) go beside it.")] = OUT,
    rerun: Annotated[str | None, typer.Option(help="Train rows of the results again: DATA/METHOD, or a record's name.")] = None,
    packages: Annotated[
        Path | None, typer.Option(exists=True, file_okay=False, help="Where Debian packages with data are unpacked, if not installed.")
    ] = None,
    device: Annotated[str, typer.Option(help="For example cpu or cuda.")] = "cpu",
    jobs: Annotated[int | None, typer.Option(min=1, help="Trainings at a time, a CPU thread each. Default: one a core; GPU: one.")] = None,
) -> None:
    """Compare ways to train on tasks with a shortcut, published ones or your own, with the same number of trials for each."""
    check_packages("evidence", NEEDED)
    check_out(out, ".jsonl", ".md", ".png")
    target = check_device(device)
    of_folder = {"--splits": splits != SPLITS, "--sizes": sizes, "--similar": similar, "--flip": flip, "--dilation": dilation}
    given = [option for option, value in of_folder.items() if value]
    if folder is None and given:
        raise typer.BadParameter("it is of --folder, which is missing. Pass both, or neither.", param_hint=given[0])
    if folder is not None and data:
        raise typer.BadParameter("it takes the place of --data. Pass one of them.", param_hint="--folder")
    if packages is not None:
        os.environ[FOLDER] = str(packages)

    from rich.console import Console
    from rich.markdown import Markdown

    console = Console()
    with console.status("loading"):
        from attrreg.evidence import plans, report, study
        from attrreg.evidence.ledger import Failed, Ledger, cores
        from attrreg.evidence.training import Budget
        from attrreg.progress import bar

    try:
        own = None if folder is None else _folder(folder, splits, similar, sizes, flip, dilation)
        plan = plans.plan(data, method, own, trials, seeds, epochs, quick)
        ledger = Ledger(out, target, workers=jobs or (cores() if target.type == "cpu" else 1))  # a GPU has memory for few
        if own is not None:
            images = len(own.task(0).train)
            for training in plan.trainings:
                Budget(training.epochs, training.batch, rate=0.0).steps(images)
    except (ValueError, RuntimeError, OSError) as error:
        raise typer.BadParameter(str(error)) from None
    if rerun is not None:
        _again(rerun, ledger, console)
        return
    failed = None
    with bar(console, plan.epochs()) as advance:
        ledger.advance = advance
        try:
            missing = study.carry_out(plan, ledger)
        except Failed as error:  # raised when what is done is written
            failed, missing = error, error.missing
    for kind, how in missing.items():
        console.print(f"{kind} was left out. {how}", highlight=False, markup=False, style="yellow", soft_wrap=True)
    tables = report.markdown(plan, ledger)
    if not tables:
        console.print("There is nothing to show.")
        raise failed or typer.Exit(1)
    out.with_suffix(".md").write_text(tables + "\n", encoding="utf-8")
    report.plot(plan, ledger, out.with_suffix(".png"))
    console.print(f"Written: {out}, .md and .png beside it", highlight=False, markup=False, soft_wrap=True)
    widest = max((len(line) for line in tables.splitlines() if line.startswith("|")), default=0)
    if console.width < widest:  # a pipe, or a narrow terminal: rich would cut cells off
        console.print(tables, highlight=False, markup=False, soft_wrap=True)
    else:
        console.print(Markdown(tables))
    if failed is not None:
        raise failed


def _folder(root: Path, splits: str, similar: str, sizes: str, flip: bool, dilation: int) -> Folder:
    from attrreg.evidence import arrays
    from attrreg.evidence.sources import Folder

    names = splits.split(",")
    if len(names) != 3:
        raise ValueError(f"--splits must be three names, got {splits!r}. Write train,valid,test.")
    try:
        counts = tuple(int(count) for count in sizes.split(",")) if sizes else ()
    except ValueError:
        raise ValueError(f"--sizes must be three numbers of images, got {sizes!r}. Write 500,128,128.") from None
    where, contents = str(root.resolve()), arrays.digest(root)
    return Folder(where, names[0], names[1], names[2], similar or None, flip=flip, sizes=counts, dilation=dilation, contents=contents)


def _again(what: str, ledger: Ledger, console: Console) -> None:
    """Train records again and say whether the numbers are the same."""
    from attrreg.evidence import job, report

    rows = {name: each for name, each in ledger.records.items() if each.job.judged and what == f"{each.job.source.kind}/{each.job.method}"}
    found = {what: ledger.records[what]} if what in ledger.records else rows
    if not found:
        raise typer.BadParameter(
            f"{ledger.path} has no {what!r}. Write DATA/METHOD, for example crosses/ActDiff, or the name in a line of that file.",
            param_hint="--rerun",
        )
    different: list[Record] = []
    left_out: list[Record] = []
    for key, record in found.items():
        name = f"{key} seed {record.job.seed}"
        try:
            if record.job.name != key:
                console.print(f"{record.job.method} has changed since it was trained: it is another method now.", style="yellow")
            again = job.run(record.job, ledger.device)
        except (ValueError, OSError, Missing) as error:  # its data are others now, or not here, or there is no such method any more
            console.print(f"{name} was left out. {error}", style="yellow", highlight=False, markup=False, soft_wrap=True)
            left_out.append(record)
            continue
        said = "the same numbers"
        if not _same(again, record):
            different.append(record)
            repeats = _same(job.run(record.job, ledger.device), again)
            said = f"OTHER NUMBERS; trained twice here: {'the same both times' if repeats else 'NOT THE SAME both times'}"
        console.print(f"{name}: {said}", highlight=False, markup=False)
        console.print_json(data=again.outcomes["valid"])
    if different:
        where = sorted({report.where(record) for record in different})
        console.print(
            f"{len(different)} of {len(found)} differ from the record, measured on {'; '.join(where)}. Only there, and by the same "
            "state of attrreg, do all sums round the same way.",
            style="red",
        )
    if different or left_out:
        raise typer.Exit(1)


def _same(one: Record, other: Record) -> bool:
    """Whether the first record agrees with all numbers that the second has: one of tuning has none of the test."""
    return all({key: one.outcomes[split].get(key) for key in kept} == kept for split, kept in other.outcomes.items())
