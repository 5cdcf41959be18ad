"""The evidence of docs/evidence.md.

python -m benchmarks.evidence              `attrreg evidence` at its full size, then the page; a day or more, and it goes on where it was
python -m benchmarks.evidence --fixed 45   the crosses at fixed settings without tuning, for at most so many minutes, then the page
python -m benchmarks.evidence --page       the page alone, from the results that there are

Other options are those of `attrreg evidence`, such as --packages; with --data, --method or --epochs the page shows what the results have of
the full plan.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator

import torch
import typer

from attrreg.evidence import plans, report
from attrreg.evidence.command import evidence
from attrreg.evidence.job import Job
from attrreg.evidence.sources import Crosses
from attrreg.evidence.study import Ledger
from benchmarks.page import ROOT, write_section

RESULTS = ROOT / "benchmarks" / "results" / "evidence.jsonl"
FIXED = RESULTS.with_name("evidence-fixed.jsonl")
PAGE = ROOT / "docs" / "evidence.md"
PICTURE = PAGE.with_suffix(".png")
CPU = torch.device("cpu")
COMMAND = "python -m benchmarks.evidence"


def fixed() -> Iterator[Job]:
    """The paper's learning rate for what it has; for the path method the settings of the exploration that found it. Seed by seed."""
    for seed in range(5):
        yield Job(Crosses(), "feature path", seed, 1e-3, 1.0, epochs=60, batch=16, judged=True)
        for name in ("plain", "ActDiff", "shuffled", "masked"):
            yield Job(Crosses(), name, seed, 3.11e-4, 1.0, epochs=30, batch=16, judged=True)


def run_fixed(minutes: float) -> None:
    """Train, until the time is over at the end of a training."""
    end, ledger = time.monotonic() + 60 * minutes, Ledger(FIXED, CPU)
    for job in fixed():
        if time.monotonic() > end:
            break
        ledger.run([job])
        record = ledger.records[job.name]
        found = {name: (outcome["epoch"], outcome["test"], outcome["auc"]) for name, outcome in record.outcomes.items()}
        print(f"{job.method}, seed {job.seed}, {record.seconds:.0f} s: (epoch, test, AUC) {found}", flush=True)


def write_page() -> None:
    """Put the tables between the page's marks."""
    records = Ledger(FIXED, CPU).records.values()
    write_section(PAGE, "fixed", COMMAND, report.fixed(records) if records else "Nothing was run yet.")
    plan, ledger = plans.plan(), Ledger(RESULTS, CPU)
    if not ledger.records:
        write_section(PAGE, "tuned", COMMAND, "Nothing was run yet.")
        return
    report.plot(plan, ledger, PICTURE)
    write_section(PAGE, "tuned", COMMAND, report.markdown(plan, ledger), f"![test accuracy of each method]({PICTURE.name})")


def main() -> None:
    """Run what is asked for, then write the page."""
    words = sys.argv[1:]
    if words[:1] == ["--fixed"]:
        run_fixed(float(words[1]))
    elif words[:1] != ["--page"]:
        app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        app.command()(evidence)
        app(args=[*words, "--out", str(RESULTS)], standalone_mode=False, prog_name=COMMAND)
        RESULTS.with_suffix(".md").unlink(missing_ok=True)
        if RESULTS.with_suffix(".png").exists():
            shutil.move(RESULTS.with_suffix(".png"), PICTURE)
    write_page()


if __name__ == "__main__":
    main()
