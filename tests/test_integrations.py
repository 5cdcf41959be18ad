"""The recipes of `docs/integrations.md` train: each against the same training written by hand, or to a lower penalty."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

import attrreg
from attrreg import objectives
from attrreg.data import Sample
from tests import shapes
from tests.models import assert_close

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "docs" / "examples"
REGULARIZER = 2.0 * attrreg.InputGradient(objective=objectives.OutsideFraction())


# The scripts


def test_the_script_is_short_and_the_page_has_it() -> None:
    text = (EXAMPLES / "train_folder.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 60
    assert f"```python\n{text}```" in (ROOT / "docs" / "integrations.md").read_text(encoding="utf-8"), "run python -m benchmarks.examples"


def test_from_a_folder_to_a_checked_and_plotted_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shapes.write(tmp_path / "data" / "train", each=16, seed=0, without_mask=4)
    shapes.write(tmp_path / "data" / "valid", each=16, seed=1, without_mask=2, corner_tells=False)
    for path in (tmp_path / "data" / "valid" / "masks" / "disc").iterdir():  # so that a whole batch has none
        path.unlink()
    monkeypatch.chdir(tmp_path)
    found = runpy.run_path(str(EXAMPLES / "train_folder.py"))
    shares, penalties = list(found["shares"].values()), list(found["penalties"]["ActivationDifference"].values())
    assert len(shares) == 9 and shares[-1] > 1.3 * shares[0]
    assert penalties[0] == 0 and sum(penalties[-4:]) < 0.7 * sum(penalties[2:6])  # the first step of the warm-up, then lower and lower
    assert capsys.readouterr().out.count("inside the mask") == 8
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in ("attributions.png", "training.png"))


@pytest.mark.parametrize("mixing", [[], ["--mixup", "0.2", "--cutmix", "1.0"]], ids=["plain", "mixed"])
def test_timms_loop(tmp_path: Path, mixing: list[str]) -> None:
    shapes.write(tmp_path, each=16, without_mask=4)
    epochs = 1 if mixing else 5
    words = f"{tmp_path} --model test_convnext --size 32 --batch-size 8 --workers 0 --lr 0.003 --warmup-epochs 0 --epochs {epochs}"
    command = [sys.executable, "-W", "error", str(EXAMPLES / "train_timm.py"), *words.split(), *mixing, "--out", str(tmp_path / "model.pt")]
    run = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, check=False)
    assert run.returncode == 0, run.stderr
    penalties = [float(value) for value in re.findall(r"penalty ([\d.]+) of weight 1\.00", run.stdout + run.stderr)]
    saved = torch.load(tmp_path / "model.pt")
    assert len(penalties) == epochs and saved["reg"] == {"step": 4 * epochs}
    assert penalties[-1] < penalties[0] or mixing


# Frameworks


def samples() -> list[Sample]:
    generator = torch.Generator().manual_seed(5)
    mask = torch.zeros(16, 16, dtype=torch.bool)
    mask[3:9, 4:12] = True
    return [Sample(torch.rand(3, 16, 16, generator=generator), mask, index % 3, index % 4 != 1) for index in range(16)]


def batches(size: int) -> Any:
    return DataLoader(samples(), batch_size=size)  # type: ignore[arg-type]  # a list serves as a data set


def network() -> nn.Module:
    torch.manual_seed(3)
    layers = nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 8, 3), nn.SiLU(), nn.AdaptiveAvgPool2d(1)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, 3))


def vit() -> nn.Module:
    torch.manual_seed(3)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    model: nn.Module = ViTForImageClassification(ViTConfig(image_size=16, patch_size=4, num_labels=3, **sizes))
    return model


def by_hand(model: nn.Module, accumulate: int, epochs: int, rate: float, output: str | None = None) -> list[float]:
    """Train, and return the penalties."""
    optimizer, found = torch.optim.SGD(model.parameters(), lr=rate), []
    for _ in range(epochs):
        for number, (x, mask, y, annotated) in enumerate(batches(4)):
            logits = model(x) if output is None else getattr(model(x), output)
            value = REGULARIZER(model, x, mask, target=y, annotated=annotated, output=output)
            found.append(float(value.detach()))
            ((F.cross_entropy(logits, y) + value) / accumulate).backward()
            if number % accumulate == accumulate - 1:
                optimizer.step()
                optimizer.zero_grad()
    return found


def parameters(model: nn.Module) -> list[Tensor]:
    return list(model.parameters())


@pytest.fixture
def fresh_accelerate() -> Any:
    """Accelerate keeps its state in singletons."""
    yield
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("attached", [True, False])
def test_accelerate(fresh_accelerate: Any, accumulate: int, attached: bool) -> None:
    accelerator, model = Accelerator(cpu=True, gradient_accumulation_steps=accumulate), network()
    model, optimizer, loader = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.2), batches(4))
    with REGULARIZER.attach(model) if attached else nullcontext():
        for x, mask, y, annotated in (item for _ in range(5) for item in loader):
            with accelerator.accumulate(model):
                loss = F.cross_entropy(model(x), y)
                loss = loss + REGULARIZER(model, x, mask, target=y, annotated=annotated)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
    expected = network()
    found = by_hand(expected, accumulate, epochs=5, rate=0.2)
    assert_close(parameters(model), parameters(expected), 1e-5)
    assert found[-4] < found[0]  # on the same batch


class RightReasons(Trainer):  # type: ignore[misc, unused-ignore]
    """As in the docs, and it keeps the penalties."""

    loss_is_scaled_for_ga = False

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        x, y = inputs["pixel_values"], inputs["labels"]
        if torch.is_grad_enabled():
            penalty = REGULARIZER.evaluate(model, x, inputs["mask"], target=y, annotated=inputs["annotated"], output="logits")
            outputs, extra = penalty.output, penalty.total
            self.seen.append(float(extra.detach()))
        else:
            outputs, extra = model(pixel_values=x), torch.zeros(())
        loss = F.cross_entropy(outputs.logits, y) + extra
        return (loss, outputs) if return_outputs else loss

    seen: list[float]

    def _get_train_sampler(self, *args: Any) -> Any:
        return torch.utils.data.SequentialSampler(samples())


def collate(listed: list[Sample]) -> dict[str, Tensor]:
    x, mask, y, annotated = torch.utils.data.default_collate(listed)
    return {"pixel_values": x, "mask": mask, "labels": y, "annotated": annotated}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_hugging_face_trainer(fresh_accelerate: Any, tmp_path: Path, accumulate: int) -> None:
    model, expected = vit(), vit()
    arguments = TrainingArguments(
        str(tmp_path),
        num_train_epochs=3,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=accumulate,
        optim="sgd",
        learning_rate=0.3,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        remove_unused_columns=False,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = RightReasons(model, arguments, train_dataset=samples(), eval_dataset=samples(), data_collator=collate)
    trainer.seen = []
    trainer.train()
    found = by_hand(expected, accumulate, epochs=3, rate=0.3, output="logits")
    assert_close(parameters(model), parameters(expected), 1e-4)
    assert trainer.seen == pytest.approx(found, rel=1e-3) and found[-4] < found[0]
    assert trainer.evaluate()["eval_loss"] > 0  # without gradients there is no penalty


# Fabric


def test_under_fabric_the_model_inside_is_penalised() -> None:
    net: Any = nn.Sequential(nn.Conv2d(2, 4, 3), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    x, mask, target = torch.rand(3, 2, 8, 8), torch.zeros(8, 8).index_fill(0, torch.arange(4), 1), torch.tensor([0, 1, 2])
    want = REGULARIZER(net, x, mask, target)
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    model: Any = fabric.setup(net, torch.optim.SGD(net.parameters(), 0.1))[0]
    with pytest.raises(RuntimeError, match=r"^Fabric refuses gradients .*: reg\(model\.module, x, mask\), with several .*WORLD\.$"):
        REGULARIZER(model, x, mask, target)
    with fabric.autocast():
        penalty = REGULARIZER(model.module, x, mask, target)
        loss = F.cross_entropy(model(x), target) + penalty
    fabric.backward(loss)
    assert float(penalty.detach()) == pytest.approx(float(want.detach()), rel=0.05)
    assert net[0].weight.grad.any()
