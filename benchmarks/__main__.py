"""The microbenchmarks, and the pages that show them.

python -m benchmarks                       `attrreg bench`, docs/performance.md and README's summary; an hour and a half on two cores
python -m benchmarks --no-keep-memory      the same for the page's section on memory that is given back
python -m benchmarks --section cpu-zen4    the same for a section of any name, as of another processor
python -m benchmarks --quick --out x.json  any option of `attrreg bench`; with one of these two, the page stays as it is
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from statistics import median

import typer

from attrreg.bench import report
from attrreg.bench import strategies as ways
from attrreg.bench.command import bench
from attrreg.bench.measure import Cost
from attrreg.bench.run import Record, ratios
from attrreg.tables import markdown_table
from benchmarks import check
from benchmarks.page import ROOT, marks, write_section

PAGE = ROOT / "docs" / "performance.md"
README = ROOT / "README.md"
SUMMARIZED = "cpu"  # the section whose medians README shows
COMMAND = "python -m benchmarks"


def write_page(numbers: Path) -> None:
    """Put a run's tables between the page's marks, and its pictures beside the page."""
    section, record = numbers.stem, report.load(numbers)
    kinds = {"": "time and memory of each way"} | ({"-curves": "time and memory against batch, size and steps"} if record.curves else {})
    for kind in kinds:
        if (source := numbers.with_name(f"{section}{kind}.png")).exists():
            shutil.move(source, PAGE.with_name(f"performance-{section}{kind}.png"))
    pictures = [f"![{words}](performance-{section}{kind}.png)" for kind, words in kinds.items()]
    write_section(PAGE, section, COMMAND, report.markdown(record), check.missed(record), *pictures)
    if section == SUMMARIZED:
        write_section(README, "cost", COMMAND, *summary(record))
    numbers.with_suffix(".md").unlink(missing_ok=True)


def summary(record: Record) -> tuple[str, str, str]:
    """A row a penalty: what it costs here and in the ways of today."""
    columns = (ways.ATTACHED, ways.TODAY, ways.BY_HAND, ways.CAPTUM)
    rows = {f"{name}, `chunk=None`" if name == ways.INTEGRATED_GRADIENTS else name: (name, columns) for name in record.plan.penalties}
    rows["the same, `chunk=1`, the default"] = (ways.INTEGRATED_GRADIENTS, (ways.CHUNKED, "", "", ""))
    lines = []
    for label, (penalty, names) in rows.items():
        found = [[cost for _, cost in ratios(record, penalty, way)] for way in names]
        lines.append([label, *(_medians(costs, len(record.costs)) for costs in found)])
    intro = (
        "Time / peak memory above the parameters of a training step without the optimizer, as multiples of a plain one's: medians over "
        f"{len(record.costs)} models. Maps are of the target's logit under `SquaredOutside`. *All three* are the rows above it in one sum; "
        "*by hand* is what somebody writes who also shares the loop's forward."
    )
    return intro, markdown_table(["penalty", *columns], lines), report.conditions(record)


def _medians(costs: list[Cost], models: int) -> str:
    """Of time and memory, and over how many models where those are not all."""
    if not costs:
        return ""
    fewer = f" ({len(costs)} models)" if len(costs) < models else ""
    return f"{median(cost.ratio for cost in costs):.1f}x / {median(cost.memory for cost in costs):.1f}x{fewer}"


def main() -> None:
    """Run `attrreg bench` with its own options; without `--out` or `--quick`, for the page."""
    ours, theirs = (argparse.ArgumentParser(add_help=False, allow_abbrev=False) for _ in range(2))
    ours.add_argument("--section")
    named, arguments = ours.parse_known_args()  # all others are `attrreg bench`'s
    # Those of them that say whether the run is for the page, and for which section, are read here and passed on.
    for flag in ("--help", "--quick", "--resume", "--channels-last", "--no-keep-memory"):
        theirs.add_argument(flag, action="store_true")
    for option, usual in (("--out", None), ("--model", None), ("--penalty", None), ("--device", "cpu"), ("--autocast", "")):
        theirs.add_argument(option, default=usual)
    given = theirs.parse_known_args(arguments)[0]
    own = given.out is None and not (given.help or given.quick)
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(bench)
    kind = "returned" if given.no_keep_memory else ""
    layout = "channels-last" if given.channels_last else ""
    by_options = "-".join(filter(None, [given.device.split(":")[0], given.autocast, layout, kind]))
    numbers = check.results(named.section or by_options)
    only = "Models of your own would take the place of the nine" if given.model is not None else "Some penalties would stand for all"
    if own and (given.model, given.penalty) != (None, None) and not (named.section or kind or given.resume):
        sys.exit(f"{only} in docs/{PAGE.name}. Pass --out for a file of your own.")
    if own and marks(numbers.stem, COMMAND)[0] not in PAGE.read_text():  # rather than after an hour
        sys.exit(f"docs/{PAGE.name} has no section {numbers.stem}. Pass --out for a file of your own.")
    numbers.parent.mkdir(exist_ok=True)
    ended = app(args=[*arguments, *(["--out", str(numbers)] if own else [])], standalone_mode=not own, prog_name=COMMAND)
    if ended:  # interrupted, or it could not begin: what there is of it is no page
        sys.exit(ended)
    if own:
        write_page(numbers)


if __name__ == "__main__":
    main()
