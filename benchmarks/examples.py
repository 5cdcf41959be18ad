"""Writes the example script and its pictures into `docs/integrations.md`.

python -m benchmarks.examples       # runs the script on the page's own toy data, under a minute
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.page import ROOT, write_section

PAGE = ROOT / "docs" / "integrations.md"
SCRIPT = ROOT / "docs" / "examples" / "train_folder.py"
PICTURES = {
    "attributions.png": "Validation images, their masks, and where the model looks before and after",
    "training.png": "The penalty and the share of the attribution inside the mask, by step",
}


def main() -> None:
    """Run, copy, write."""
    draw = re.search(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    assert draw is not None
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory() as folder:
        for command in (["-c", draw[1]], [str(SCRIPT)]):
            subprocess.run([sys.executable, *command], cwd=folder, env=environment, check=True)
        for name in PICTURES:
            shutil.copy(Path(folder) / name, SCRIPT.parent / name)
    pictures = (f"![{says}](examples/{name})" for name, says in PICTURES.items())
    write_section(PAGE, "train_folder", "python -m benchmarks.examples", f"```python\n{SCRIPT.read_text()}```", *pictures)


if __name__ == "__main__":
    main()
