"""Writes the demo's picture and table into the README.

python -m benchmarks.readme                     # runs `attrreg demo` first, about three minutes
python -m benchmarks.readme run.json            # from a run of `attrreg demo --out run.png`
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from attrreg.environment import sentence
from attrreg.tables import markdown_table
from benchmarks.page import ROOT, write_section


def table(run: dict[str, Any]) -> str:
    """The methods as a Markdown table."""
    rows = []
    for row in run["methods"]:
        share = f"{row['outside_before']:.0%} → {row['outside_after']:.0%}"
        rows.append([row["method"], f"{row['test']:.3f}", f"{row['clean']:.3f}", share, f"{row['cost']:.1f}x"])
    return markdown_table(["trained with", "test", "test without decoy", "attribution outside the mask", "step cost"], rows)


def section(run: dict[str, Any]) -> list[str]:
    """What stands between the two marks."""
    intro = (
        f"Decoy-MNIST: {run['train_images']:,} real digits with a grey patch in a corner that spells the label in training and is random "
        f"in the test; the mask says where the digit is. Every model has the same start and {run['steps']} steps. Accuracy on "
        f"{run['test_images']:,} test images; the share of attribution outside the mask is that of the target logit's input gradient, "
        "before and after training; the step cost is a multiple of a plain step. The input gradient is `InputGradient()` at a weight of 1, "
        "as in the usage below. Score, objective and weight of the other rows are those of `attrreg/demo/settings.py`, which "
        "`python -m benchmarks.tune_demo` chose on other digits whose patch misleads as it does in the test: a help that plain training "
        "does not get. (In an earlier, wider look test accuracies were seen as well.) The images are not normalised."
    )
    note = f"Seed {run['seed']}, {sentence(run['environment'])}; by `attrreg demo`."
    return [intro, table(run), note]


def main(numbers: Path | None) -> None:
    """Write the section and copy the picture."""
    with tempfile.TemporaryDirectory() as folder:
        if numbers is None:
            numbers = Path(folder) / "run.json"
            subprocess.run([sys.executable, "-m", "attrreg", "demo", "--out", str(numbers.with_suffix(".png"))], check=True)
        run = json.loads(numbers.read_text())
        shutil.copy(numbers.with_suffix(".png"), ROOT / "docs" / "demo.png")
    write_section(ROOT / "README.md", "demo", "python -m benchmarks.readme", *section(run))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
