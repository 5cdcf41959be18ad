"""The evidence of docs/evidence.md.

python -m benchmarks.evidence          `attrreg evidence` at its full size, then the page; a day or more, and it goes on where it was
python -m benchmarks.evidence --page   the page alone, from the results that there are

Other options are those of `attrreg evidence`, such as --packages; with --data, --method or --epochs the page shows what the results have of
the full plan. With --help, --quick or --out, page and records stay as they are.
"""

from __future__ import annotations

import sys

import torch
import typer

from attrreg.evidence import plans, report
from attrreg.evidence.command import evidence
from attrreg.evidence.ledger import Ledger
from benchmarks.page import ROOT, write_section

RESULTS = ROOT / "benchmarks" / "results" / "evidence.jsonl"
PAGE = ROOT / "docs" / "evidence.md"
COMMAND = "python -m benchmarks.evidence"
OTHERS = {"--help", "--quick", "--out"}  # with one of these, page and records stay as they are


def write_page() -> None:
    """Put the tables between the page's marks, and the picture beside the page."""
    plan, ledger, picture = plans.plan(), Ledger(RESULTS, torch.device("cpu")), PAGE.with_suffix(".png")
    if not report.begun(plan, ledger):
        sys.exit(f"{RESULTS} has nothing to show. Run the comparison first: {COMMAND}.")
    report.plot(plan, ledger, picture)
    tables = report.markdown(plan, ledger).replace(str(RESULTS), str(RESULTS.relative_to(ROOT)))  # as it is called from a clone's root
    write_section(PAGE, "tuned", COMMAND, tables, f"![test accuracy of each method]({picture.name})")


def main() -> None:
    """Run what is asked for, then write the page."""
    words = sys.argv[1:]
    if words[:1] != ["--page"]:
        app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        app.command()(evidence)
        if OTHERS & {word.split("=")[0] for word in words}:
            app(args=words, prog_name=COMMAND)  # and ends
        if ended := app(args=[*words, "--out", str(RESULTS)], standalone_mode=False, prog_name=COMMAND):
            sys.exit(ended)  # interrupted, or --rerun found other numbers
        for suffix in (".md", ".png"):  # which the page has
            RESULTS.with_suffix(suffix).unlink(missing_ok=True)
    write_page()


if __name__ == "__main__":
    main()
