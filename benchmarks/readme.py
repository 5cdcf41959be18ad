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
from benchmarks.page import ROOT, write_section


def table(run: dict[str, Any]) -> list[str]:
    """The methods as a Markdown table."""
    lines = ["| trained with | test | test without decoy | attribution outside the mask | step cost |", "|---|---|---|---|---|"]
    for row in run["methods"]:
        share = f"{row['outside_before']:.0%} → {row['outside_after']:.0%}"
        lines.append(f"| {row['method']} | {row['test']:.3f} | {row['clean']:.3f} | {share} | {row['cost']:.1f}x |")
    return lines


def section(run: dict[str, Any]) -> list[str]:
    """What stands between the two marks."""
    intro = (
        f"Decoy-MNIST: {run['train_images']:,} real digits with a grey patch in a corner that spells the label in training and is random "
        f"in the test; the mask says where the digit is. Every model has the same start and {run['steps']} steps. Accuracy on "
        f"{run['test_images']:,} test images; the share of attribution outside the mask is that of the target logit's input gradient, "
        "before and after training; the step cost is a multiple of a plain step. Score, objective and weight of each row are not the "
        "library's defaults but those of `attrreg/demo/settings.py`, which `python -m benchmarks.tune_demo` chose on other digits whose "
        "patch misleads as it does in the test: a help that plain training does not get. The images are not normalised."
    )
    note = f"Seed {run['seed']}, {sentence(run['environment'])}; by `attrreg demo`."
    return [intro, "\n".join(table(run)), note]


def main(numbers: Path | None) -> None:
    """Write the section and copy the picture."""
    with tempfile.TemporaryDirectory() as folder:
        if numbers is None:
            numbers = Path(folder) / "run.json"
            subprocess.run([sys.executable, "-m", "attrreg.cli", "demo", "--out", str(numbers.with_suffix(".png"))], check=True)
        run = json.loads(numbers.read_text())
        shutil.copy(numbers.with_suffix(".png"), ROOT / "docs" / "demo.png")
    write_section(ROOT / "README.md", "demo", "python -m benchmarks.readme", *section(run))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
