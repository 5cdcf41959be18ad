"""The Lightning callback does what the same line in `training_step` would do."""

from __future__ import annotations

import copy
import importlib
import sys
from collections.abc import Callable
from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

import attrreg
from attrreg import Scheduled, objectives, schedules
from attrreg.data import Sample
from attrreg.integrations.lightning import AttributionPenalty
from attrreg.trace import passes
from tests.models import assert_close

REGULARIZER = 2.0 * attrreg.InputGradient(objective=objectives.OutsideFraction())
pytestmark = [
    pytest.mark.cpu,
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*available but not used"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated"),  # by Lightning's own loops
]


def net() -> nn.Module:
    torch.manual_seed(3)
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.SiLU(), nn.Conv2d(8, 8, 3), nn.SiLU()
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(8, 3))


def samples() -> Any:  # a list serves as a data set
    generator = torch.Generator().manual_seed(5)
    mask = torch.zeros(12, 12, dtype=torch.bool)
    mask[2:7, 3:9] = True
    return [Sample(torch.rand(3, 12, 12, generator=generator), mask, index % 3, index % 4 != 1) for index in range(24)]


class Module(pl.LightningModule):
    """A user's module; `step` says what the end of its training step looks like."""

    def __init__(self, step: Callable[[Tensor], Any] = lambda loss: loss, normalize: bool = False) -> None:
        super().__init__()
        self.net, self.end, self.normalize = net(), step, normalize

    def forward(self, x: Tensor) -> Any:
        return self.net(x)

    def training_step(self, batch: Sample, batch_idx: int) -> Any:
        x = batch.image * 1.0 if self.normalize else batch.image
        return self.end(F.cross_entropy(self(x), batch.label))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(
    module: pl.LightningModule, callback: AttributionPenalty, data: Any = None, resume: Path | None = None, **settings: Any
) -> pl.Trainer:
    defaults: dict[str, Any] = {"max_epochs": 2, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(accelerator="cpu", devices=1, enable_model_summary=False, callbacks=[callback], **(defaults | settings))
    torch.manual_seed(7)
    trainer.fit(module, DataLoader(data or samples(), batch_size=6), ckpt_path=resume)
    return trainer


def by_hand(
    regularizer: Any = REGULARIZER, accumulate: int = 1, autocast: bool = False, attached: bool = True
) -> tuple[nn.Module, list[float]]:
    """The same training as a plain loop, with the penalty's values. Attached or not, dropout draws differently."""
    model, found = net(), []
    handle = regularizer.attach(model) if attached else nullcontext()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.manual_seed(7)
    loader: DataLoader[Sample] = DataLoader(samples(), batch_size=6)
    with handle:
        for number, (x, mask, y, annotated) in enumerate(chain(loader, loader)):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = F.cross_entropy(model(x), y)
                value = regularizer(model, x, mask, target=y, annotated=annotated)
            found.append(float(value.detach()))
            ((loss + value) / accumulate).backward()
            if number % accumulate == accumulate - 1:
                optimizer.step()
                optimizer.zero_grad()
    return model, found


def assert_same(module: Module, model: nn.Module, tolerance: float = 1e-5) -> None:
    """What the training did is the same; what it started from would hide a penalty that is left out."""
    ours, theirs, start = (each.state_dict() for each in (module.net, model, net()))
    assert ours["1.num_batches_tracked"] == theirs["1.num_batches_tracked"] == 8
    one, other = ([state[name] - start[name] for name in ours if name != "1.num_batches_tracked"] for state in (ours, theirs))
    assert_close(one, other, tolerance)


ENDS: dict[str, Callable[[Tensor], Any]] = {"loss": lambda loss: loss, "dictionary": lambda loss: {"loss": loss, "other": 1}}


@pytest.mark.parametrize(("end", "model"), [("loss", ""), ("dictionary", "net")])
def test_it_trains_as_the_line_in_the_loop_would(end: str, model: str) -> None:
    module = Module(ENDS[end])
    with passes() as counter:
        trainer = fit(module, AttributionPenalty(REGULARIZER, model=model))
    assert (counter.forward, counter.backward) == (0, 8)  # the step's own forward is reused
    expected, found = by_hand()
    assert_same(module, expected)
    assert found[-1] < found[0]
    assert float(trainer.callback_metrics["penalty/InputGradient"]) == pytest.approx(found[-1], rel=1e-4)


class Scaled(Module):
    """Takes more than the images."""

    def forward(self, x: Tensor, factor: float) -> Any:  # type: ignore[override]
        return self.net(factor * x)

    def training_step(self, batch: Sample, batch_idx: int) -> Any:
        return F.cross_entropy(self(batch.image, 0.5), batch.label)


def test_a_model_that_takes_more_than_the_images() -> None:
    with passes() as counter:
        fit(Scaled(), AttributionPenalty(REGULARIZER, batch=lambda batch: (*batch, (batch.image, 0.5))))
    assert (counter.forward, counter.backward) == (0, 8)


def test_other_images_than_the_step_used_cost_a_forward_of_their_own() -> None:
    module = Module(normalize=True)
    with passes() as counter, pytest.warns(UserWarning, match="another tensor of images"):
        fit(module, AttributionPenalty(REGULARIZER, model="net"))
    assert counter.forward == 8
    assert_same(module, by_hand(attached=False)[0])  # and move neither BatchNorm nor the generators


def test_a_compiled_network_costs_a_forward_of_its_own() -> None:
    module = Module()
    module.net.compile(backend="eager")
    with passes() as counter, pytest.warns(UserWarning, match="The model is compiled"):
        fit(module, AttributionPenalty(REGULARIZER, model="net"))
    assert counter.forward == 8
    assert_same(module, by_hand(attached=False)[0])


@pytest.mark.parametrize(
    ("settings", "loop"), [({"accumulate_grad_batches": 2}, {"accumulate": 2}), ({"precision": "bf16-mixed"}, {"autocast": True})]
)
def test_accumulation_and_precision(settings: dict[str, Any], loop: dict[str, Any]) -> None:
    module = Module()
    trainer = fit(module, AttributionPenalty(REGULARIZER), **settings)
    model, found = by_hand(**loop)
    assert_same(module, model, 1e-5 if "accumulate" in loop else 1e-2)
    assert float(trainer.callback_metrics["penalty/InputGradient"]) == pytest.approx(found[-1], rel=0.02)


def test_every_term_is_logged(tmp_path: Path) -> None:
    both = attrreg.InputGradient() + (0.5 * attrreg.GradCAM(layer="3")).named("coarse")
    fit(Module(), AttributionPenalty(both, model="net"), logger=CSVLogger(tmp_path), log_every_n_steps=1)
    lines = next(tmp_path.rglob("metrics.csv")).read_text().splitlines()
    columns = lines[0].split(",")
    assert {"penalty/InputGradient", "penalty/coarse"} <= set(columns) and len(lines) == 9
    assert all(float(line.split(",")[columns.index("penalty/coarse")]) > 0 for line in lines[1:])


def test_a_schedule_counts_and_goes_through_checkpoints(tmp_path: Path) -> None:
    scheduled = Scheduled(REGULARIZER, schedules.Linear(4) * schedules.Every(2))
    module = Module()
    trainer = fit(module, AttributionPenalty(scheduled))
    assert scheduled.step == 8
    assert_same(module, by_hand(Scheduled(REGULARIZER, schedules.Linear(4) * schedules.Every(2)))[0])
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = Scheduled(REGULARIZER, schedules.Every(2))
    fit(Module(), AttributionPenalty(again), resume=tmp_path / "last.ckpt", max_epochs=3)
    assert again.step == 12


def test_batches_of_other_forms_and_wrapped_outputs() -> None:
    class Wrapped(Module):
        def forward(self, x: Tensor) -> Any:
            return {"logits": self.net(x)}

        def training_step(self, batch: Any) -> Tensor:  # type: ignore[override]  # without the index, as Lightning allows
            loss: Tensor = F.cross_entropy(self(batch["x"])["logits"], batch["y"])
            return loss

    module = Wrapped()
    callback = AttributionPenalty(REGULARIZER, lambda batch: (batch["x"], batch["m"], batch["y"], batch["a"]), output="logits")
    fit(module, callback, [{"x": x, "m": mask, "y": y, "a": a} for x, mask, y, a in samples()])
    assert_same(module, by_hand()[0])


def test_skipped_steps_stay_skipped() -> None:
    module = Module(lambda loss: None)
    before = [parameter.clone() for parameter in module.net.parameters()]
    with pytest.warns(UserWarning, match="returned `None`"):
        fit(module, AttributionPenalty(REGULARIZER), max_epochs=1)
    assert all(torch.equal(*pair) for pair in zip(before, module.net.parameters(), strict=True))


def test_lightning_says_that_a_dictionary_has_no_loss() -> None:
    with pytest.raises(MisconfigurationException, match="'loss' key needs to be present"):
        fit(Module(lambda loss: {"other": loss}), AttributionPenalty(REGULARIZER))


def stop(loss: Tensor) -> Tensor:
    raise ZeroDivisionError


def test_a_step_that_raises_leaves_nothing_behind() -> None:
    module = Module(stop)
    with pytest.raises(ZeroDivisionError):
        fit(module, AttributionPenalty(REGULARIZER))
    assert "training_step" not in vars(module)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


class Checked(Module):
    """A module of two networks that is validated by its training step."""

    def __init__(self, at_end: Callable[[pl.LightningModule], None] = lambda module: None) -> None:
        super().__init__()
        self.aux, self.at_end = net(), at_end

    def forward(self, x: Tensor) -> Any:
        return self.net(x) + self.aux(x)

    def training_step(self, data: Sample, batch_idx: int) -> Any:
        return F.cross_entropy(self(data.image), data.label)

    def validation_step(self, batch: Sample, batch_idx: int) -> None:
        assert self.trainer.sanity_checking or "training_step" in vars(self)
        self.log("loss", self.training_step(batch, batch_idx))

    def on_train_epoch_end(self) -> None:
        self.at_end(self)


def fit_both(module: pl.LightningModule, callbacks: list[Any], **settings: Any) -> pl.Trainer:
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = pl.Trainer(accelerator="cpu", devices=1, max_epochs=1, callbacks=callbacks, **quiet)
    loader: DataLoader[Sample] = DataLoader(samples(), batch_size=6)
    trainer.fit(module, loader, loader, **settings)
    return trainer


def test_validation_by_the_training_step_has_no_penalty() -> None:
    module = Checked()
    with passes() as counter:
        trainer = fit_both(module, [AttributionPenalty(REGULARIZER, model="net")])
    assert counter.backward == 4
    with torch.no_grad():
        module.eval()
        values = [F.cross_entropy(module(x), y) for x, _, y, _ in DataLoader(samples(), batch_size=6)]
    torch.testing.assert_close(trainer.callback_metrics["loss"], torch.stack(values).mean())


def test_a_callback_for_each_of_two_networks(tmp_path: Path) -> None:
    scheduled = [Scheduled(REGULARIZER.named(name), schedules.Linear(8)) for name in ("first", "second")]
    callbacks = [AttributionPenalty(each, model=name) for each, name in zip(scheduled, ("net", "aux"), strict=True)]
    module = Checked()
    with passes() as counter:
        trainer = fit_both(module, callbacks)
    assert counter.backward == 6  # the first weights are 0
    assert {"penalty/first", "penalty/second"} <= trainer.callback_metrics.keys()
    assert "training_step" not in vars(module)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
    scheduled[1].step = 7
    trainer.save_checkpoint(tmp_path / "both.ckpt")
    again = [Scheduled(REGULARIZER.named(name), schedules.Linear(8)) for name in ("first", "second")]
    callbacks = [AttributionPenalty(each, model=name) for each, name in zip(again, ("net", "aux"), strict=True)]
    fit_both(Checked(), callbacks, ckpt_path=tmp_path / "both.ckpt", weights_only=False)
    assert [each.step for each in again] == [4, 7]


def test_a_module_can_be_saved_and_copied_while_it_trains(tmp_path: Path) -> None:
    copies, batch = list[Any](), next(iter(DataLoader(samples(), batch_size=6)))

    def take(module: pl.LightningModule) -> None:
        module.training_step(batch_idx=0, data=batch)
        vars(module).update(end=str, at_end=str)  # what the test itself holds need not be saved
        torch.save(module, tmp_path / "module.pt")
        copies.extend([torch.load(tmp_path / "module.pt", weights_only=False), copy.deepcopy(module)])

    two = [AttributionPenalty(REGULARIZER.named(name), model=name) for name in ("net", "aux")]
    module = Checked(take)
    fit_both(module, two)
    expected = module.eval().training_step(batch, 0)
    for made in copies:
        assert made.training_step.__self__ is made
        with passes() as counter:
            torch.testing.assert_close(made.eval().training_step(batch, 0), expected)
        assert (counter.forward, counter.backward) == (0, 0)


class Manual(Module):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


BARE = type("Bare", (Module,), {"forward": pl.LightningModule.forward})


def compiled() -> Any:
    return torch.compile(Module(), backend="eager")


@pytest.mark.parametrize(
    ("module", "name", "kind", "message"),
    [
        (Manual, "", RuntimeError, r"optimization is manual\. Add the penalty in training_step"),
        (compiled, "", RuntimeError, r"whole LightningModule is compiled.*Compile the network inside"),
        (BARE, "", ValueError, r"Bare \(''\) has no forward.* Name one of 'net'"),
        (Module, "backbone", ValueError, r"Module has no submodule 'backbone'\. Name one of 'net', or ''"),
    ],
)
def test_what_cannot_work_is_refused_at_the_start(module: Any, name: str, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        fit(module(), AttributionPenalty(REGULARIZER, model=name))


@pytest.mark.parametrize("mapping", [lambda b: None, lambda b: {"x": 1, "m": 2, "y": 3}, lambda b: b[:2], lambda b: (*b, b.label)])
def test_batches_that_need_a_function(mapping: Any) -> None:
    with pytest.raises(TypeError, match=r"batch must give \(x, mask, target\).* of a Sample\. Pass a function"):
        fit(Module(), AttributionPenalty(REGULARIZER, mapping))


def test_bad_regularizer() -> None:
    with pytest.raises(TypeError, match=r"regularizer must be a regularizer.*Write attrreg\.InputGradient\(\)"):
        AttributionPenalty(attrreg.InputGradient)  # type: ignore[arg-type]


def test_without_lightning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    monkeypatch.delitem(sys.modules, "attrreg.integrations.lightning")
    with pytest.raises(ImportError, match=r"needs lightning\. Install with: pip install 'attrreg\[integrations\]'"):
        importlib.import_module("attrreg.integrations.lightning")
