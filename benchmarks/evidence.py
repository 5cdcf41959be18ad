"""The evidence of docs/evidence.md.

python -m benchmarks.evidence          `attrreg evidence` at its full size, then the page; a day or more, and it goes on where it was
python -m benchmarks.evidence --page   the page alone, from the results that there are

Other options are those of `attrreg evidence`, such as --packages; with --data, --method or --epochs the page shows what the results have of
the full plan.
"""

from __future__ import annotations

import shutil
import sys

import torch
import typer

from attrreg.evidence import plans, report
from attrreg.evidence.command import evidence
from attrreg.evidence.ledger import Ledger
from benchmarks.page import ROOT, write_section

RESULTS = ROOT / "benchmarks" / "results" / "evidence.jsonl"
PAGE = ROOT / "docs" / "evidence.md"
PICTURE = PAGE.with_suffix(".png")
CPU = torch.device("cpu")
COMMAND = "python -m benchmarks.evidence"


def write_page() -> None:
    """Put the tables between the page's marks."""
    plan, ledger = plans.plan(), Ledger(RESULTS, CPU)
    if not ledger.records:
        write_section(PAGE, "tuned", COMMAND, "Nothing was run yet.")
        return
    report.plot(plan, ledger, PICTURE)
    tables = report.markdown(plan, ledger).replace(str(RESULTS), str(RESULTS.relative_to(ROOT)))  # as it is called from a clone's root
    write_section(PAGE, "tuned", COMMAND, tables, f"![test accuracy of each method]({PICTURE.name})")


def main() -> None:
    """Run what is asked for, then write the page."""
    words = sys.argv[1:]
    if words[:1] != ["--page"]:
        app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        app.command()(evidence)
        app(args=[*words, "--out", str(RESULTS)], standalone_mode=False, prog_name=COMMAND)
        RESULTS.with_suffix(".md").unlink(missing_ok=True)
        if RESULTS.with_suffix(".png").exists():
            shutil.move(RESULTS.with_suffix(".png"), PICTURE)
    write_page()


if __name__ == "__main__":
    main()
