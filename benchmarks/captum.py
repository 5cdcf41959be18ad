"""Every attribution of Captum's, accepted and checked or refused with its reason: writes the table of docs/captum.md.

python -m benchmarks.captum                under a minute on one core; fails if one that is accepted is wrong
"""

from __future__ import annotations

import sys

from rich.console import Console
from rich.progress import track

from attrreg.captum.refusals import REFUSED
from attrreg.environment import environment, sentence
from attrreg.tables import markdown_table
from benchmarks.captum_check import STEP, TOLERANCE, Result, cases, check, ours
from benchmarks.page import ROOT, write_section

PAGE = ROOT / "docs" / "captum.md"
COMMAND = "python -m benchmarks.captum"


def wrong(result: Result) -> bool:
    """Whether an accepted one misses Captum's map or its derivative."""
    return any(error is not None and not error < TOLERANCE for error in (result.value, result.gradient))


def accepted(results: list[Result]) -> str:
    """The table of what can be trained with."""
    lines = []
    for result in results:
        value = "own draws" if result.value is None else f"{result.value:.0e}" if result.value else "equal"
        assert result.gradient is not None
        becomes = type(ours(result.case)).__name__
        lines.append([f"`{result.case.name}`", f"`{becomes}`", value, f"{result.gradient:.0e}", *_graphs(result)])
    return markdown_table(["`captum.attr`", "becomes", "map", "gradient", "Captum's own graph", "with `create_graph`"], lines)


def refused(results: list[Result]) -> str:
    """The table of what cannot, and why."""
    lines = []
    reasons = list(dict.fromkeys(reason for reason, _ in REFUSED.values()))
    last = ""
    for result in sorted(results, key=lambda result: reasons.index(REFUSED[result.case.name][0])):
        reason, way_out = REFUSED[result.case.name]
        why, last = "as above" if reason == last else reason, reason
        lines.append([f"`{result.case.name}`", why, way_out.removeprefix("Use "), *_graphs(result)])
    return markdown_table(["`captum.attr`", "why not", "instead", "Captum's own graph", "with `create_graph`"], lines)


def _graphs(result: Result) -> list[str]:
    return [_graph(result.captums), _graph(result.mended)] if result.case.runs else ["-", "-"]


def _graph(error: float | str | None) -> str:
    if error is None:
        return "none"
    if isinstance(error, str):
        return "raises"
    return f"right ({error:.0e})" if error < TOLERANCE else f"**wrong by {100 * error:.{0 if error > 0.1 else 1}f}%**"


def main() -> None:
    """Measure all, write the page, and say if something is wrong."""
    console = Console()
    results = [check(case) for case in track(cases(), "attributions", console=console)]
    taken = [result for result in results if result.case.accepted]
    words = (
        "*equal*: to the last bit; *none*: a tensor without a graph; *raises*: its backward does; *wrong by*: the error of the parameter "
        "gradient, 100% where it is zero; *right*: as the column *gradient*."
    )
    note = (
        f"{sentence(environment())}; float64, central differences of step {STEP:g} along one direction for each parameter tensor, errors "
        "relative to the largest derivative."
    )
    left = [result for result in results if not result.case.accepted]
    counts = f"{len(taken)} of {len(results)} accepted."
    write_section(PAGE, "table", COMMAND, counts, accepted(taken), "### Refused", refused(left), words, note)
    bad = [result.case.name for result in taken if wrong(result)]
    console.print(f"{counts} Wrong: {', '.join(bad) or 'none'}.")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
