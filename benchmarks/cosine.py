"""How well finite differences agree with double backward: writes a table into docs/paying_less.md.

python -m benchmarks.cosine
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from torch import Tensor

import attrreg
from attrreg.bench.cases import MODELS, Case, build
from attrreg.engines import DoubleBackward, Engine, FiniteDifference
from attrreg.environment import environment, sentence
from attrreg.tables import markdown_table
from benchmarks.page import ROOT, write_section

PAGE = ROOT / "docs" / "paying_less.md"
STEPS = (1e-1, 1e-2, 1e-3)
KINDS = {
    "resnet18": "ReLU, BatchNorm",
    "resnet50": "ReLU, BatchNorm",
    "convnext_atto": "GELU, LayerNorm",
    "efficientnet_b0": "SiLU, BatchNorm",
    "mobilenetv3_small_100": "ReLU and hardswish, BatchNorm",
    "vit_tiny_patch16_224": "GELU, LayerNorm",
    "swin_tiny_patch4_window7_224": "GELU, LayerNorm",
    "regnety_002": "ReLU, BatchNorm",
    "densenet121": "ReLU, BatchNorm",
}


def gradient(case: Case, engine: Engine) -> Tensor:
    """The penalty's gradient of all parameters, as one vector."""
    torch.manual_seed(0)
    value = attrreg.InputGradient(attrreg.scores.TargetLogit(), attrreg.objectives.SquaredOutside()).using(engine)(
        case.model, case.x, case.mask, case.y
    )
    parameters = list(case.model.parameters())
    found = torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True)
    return torch.cat([part.flatten() for part in found]).double()


def cosines(name: str, train: bool) -> list[float]:
    """One for each step."""
    case = build(name, batch=8, size=64, device=torch.device("cpu"))
    case.model.train(train)
    exact = gradient(case, DoubleBackward())
    return [cosine(exact, gradient(case, FiniteDifference(step))) for step in STEPS]


def cosine(a: Tensor, b: Tensor) -> float:
    """Of vectors of any length: PyTorch's takes those below 1e-8 for longer than they are."""
    return float(F.normalize(a, dim=0, eps=0.0) @ F.normalize(b, dim=0, eps=0.0))


def main() -> None:
    """Measure and write."""
    head = ["model", "", *(f"train, step {step:g}" for step in STEPS), *(f"eval, {step:g}" for step in STEPS)]
    rows = []
    for name in track(MODELS, "cosines", console=Console()):
        values = [f"{value:.3f}" for train in (True, False) for value in cosines(name, train)]
        rows.append([name, KINDS[name], *values])
    note = f"{sentence(environment())}; batches of 8, 64 px, on the CPU."
    write_section(PAGE, "cosine", "python -m benchmarks.cosine", markdown_table(head, rows), note)


if __name__ == "__main__":
    main()
