"""Training loops: accumulation, averaged weights, compiled steps, and runs that are killed and go on."""

from __future__ import annotations

import copy
import multiprocessing
import os
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import attrreg
from attrreg import schedules, scores
from attrreg.trace import passes
from tests.models import SmoothNet, accumulated, assert_close, batch, gradients, smooth_batch
from tests.test_sharing import FOUR

TERMS = attrreg.InputGradient() + attrreg.GradCAM("body")
STEPS, STOP = 7, 4


def test_a_copy_made_while_attached_keeps_no_hook_that_is_run() -> None:
    model, (x, _, _) = SmoothNet(), smooth_batch()
    with attrreg.InputGradient().attach(model):
        average = copy.deepcopy(model)
        average(x.float())
        assert not average._forward_hooks and not average._forward_pre_hooks and model._forward_hooks
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that TorchScript is old
        scripted = torch.jit.script(average)
    torch.testing.assert_close(scripted(x.float()), average(x.float()))


# Accumulation


def test_accumulated_gradients_are_the_mean_over_parts() -> None:
    model, (x, mask, target) = SmoothNet().double(), smooth_batch(6)
    with TERMS.attach(model):
        for part in (slice(0, 2), slice(2, 4), slice(4, 6)):
            images = x[part]
            loss = F.cross_entropy(model(images), target[part]) + TERMS(model, images, mask[part], target[part])
            (loss / 3).backward()
    want = gradients(model, F.cross_entropy(model(x), target) + TERMS(model, x, mask, target))
    assert_close(accumulated(model), want, 1e-10)


def test_a_backward_of_the_last_part_leaves_the_recording_of_the_next() -> None:
    model, (x, mask, target), others = SmoothNet().double(), smooth_batch(), smooth_batch()[0]
    with TERMS.attach(model), passes() as counted:
        loss = F.cross_entropy(model(others), target)
        model(x)
        loss.backward()
        TERMS(model, x, mask, target)
    assert counted.forward == 0


def test_parts_with_unequal_counts_weigh_images_alike_under_batchmean() -> None:
    model, (x, mask, target) = SmoothNet().double(), smooth_batch(6)
    regularizer, annotated = TERMS.reduced("batchmean"), torch.tensor([True, True, False, True, False, False])
    total = torch.zeros(())
    for part in (slice(0, 2), slice(2, 4), slice(4, 6)):
        total = total + regularizer(model, x[part], mask[part], target[part], annotated=annotated[part]) / 3
    want = regularizer(model, x, mask, target, annotated=annotated)
    torch.testing.assert_close(total, want)
    assert_close(gradients(model, total), gradients(model, want), 1e-10)


def test_gradient_accumulation_and_several_steps() -> None:
    model, (x, mask, target) = SmoothNet(norm=True).double(), smooth_batch()
    twin = copy.deepcopy(model)
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.1) for net in (model, twin)]
    with FOUR.attach(model):
        for step in range(3):
            for half in (x[:2], x[1:]):
                for net in (model, twin):
                    loss = F.cross_entropy(net(half), target[:2])
                    penalty = FOUR(net, half, mask[:2], target[:2], generator=torch.Generator().manual_seed(step))
                    (loss + penalty).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    assert_close([p.detach() for p in model.parameters()], [p.detach() for p in twin.parameters()], 1e-10)


# Averaged weights


def averaged(model: nn.Module) -> nn.Module:
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))


def averaged_by_timm(model: nn.Module) -> nn.Module:
    result: nn.Module = timm.utils.ModelEmaV3(model, decay=0.9)
    return result


def follow(average: nn.Module, model: nn.Module) -> None:
    if isinstance(average, AveragedModel):
        average.update_parameters(model)
    else:
        average.update(model)  # type: ignore[operator]


@pytest.mark.parametrize("build", [averaged, averaged_by_timm])
@pytest.mark.parametrize("early", [True, False])
def test_averaged_weights(build: Any, early: bool) -> None:
    """Made before or while the model has an attachment, the average follows its weights, and records nothing."""
    found = []
    for attached in (True, False):
        torch.manual_seed(0)
        model, (x, mask, target) = SmoothNet(norm=True).double(), smooth_batch()
        average = build(model) if early else None
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        with TERMS.attach(model) if attached else nullcontext():
            average = average or build(model)
            for _ in range(3):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x), target)
                with torch.no_grad():
                    average(x)  # a validation between the forward and the penalty
                with passes() as counter:
                    penalty = TERMS(model, x, mask, target)
                assert counter.forward == (0 if attached else 1)
                (loss + penalty).backward()
                optimizer.step()
                follow(average, model)
        found.append([*average.state_dict().values()])
        inner: Any = average.module
        value = TERMS(inner, x, mask, target)  # the average is a model like any other
        assert value.isfinite() and not any(parameter.grad is not None for parameter in average.parameters())
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


# Compiled steps


def step(model: nn.Module, x: Tensor, mask: Tensor, target: Tensor, attached: bool) -> Tensor:
    if attached:
        with TERMS.attach(model):
            loss = F.cross_entropy(model(x), target) + TERMS(model, x, mask, target)
    else:
        loss = F.cross_entropy(model(x), target) + TERMS(model, x, mask, target)
    loss.backward()
    return loss


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_a_compiled_step_is_refused(attached: bool, whole: bool) -> None:
    torch._dynamo.reset()
    model, (x, mask, target) = SmoothNet().double(), smooth_batch()
    # With fullgraph=True PyTorch itself says so, naming the function that would have.
    message = "refuse_compiling" if whole else "inside a function under torch.compile.*Compile the model.*call the penalty outside"
    with pytest.raises(RuntimeError, match=message):
        torch.compile(step, backend="aot_eager", fullgraph=whole)(model, x, mask, target, attached)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("attached", [False, True])
def test_a_compiled_task_loss_beside_a_penalty(attached: bool) -> None:
    torch._dynamo.reset()
    model, (x, mask, target) = SmoothNet().double(), smooth_batch()
    want = gradients(model, F.cross_entropy(model(x), target) + TERMS(model, x, mask, target))
    task = torch.compile(lambda images, labels: F.cross_entropy(model(images), labels), backend="aot_eager")
    with TERMS.attach(model) if attached else nullcontext():
        for _ in range(2):
            model.zero_grad()
            (task(x, target) + TERMS(model, x, mask, target)).backward()
            assert_close(accumulated(model), want, 1e-10)


# Runs that are killed


class Run:
    """All the state of a training run: what a user would put into a checkpoint."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = SmoothNet(norm=True, dropout=0.3)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-2)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=2)
        self.generator = torch.Generator().manual_seed(1)
        projection = attrreg.InputGradient(score=scores.RandomProjection()).named("projection")
        terms = attrreg.InputGradient() + attrreg.GradCAM() + attrreg.ActivationDifference() + projection
        self.regularizer = attrreg.Scheduled(terms, schedules.Every(3))
        self.losses: list[float] = []

    def state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "generator": self.generator.get_state(),
            "regularizer": self.regularizer.state_dict(),
            "rng": torch.get_rng_state(),
            "losses": self.losses,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.generator.set_state(state["generator"])
        self.regularizer.load_state_dict(state["regularizer"])
        torch.set_rng_state(state["rng"])
        self.losses = state["losses"]

    def train(self, checkpoint: Path | None, stop: int | None, attached: bool) -> None:
        with self.regularizer.attach(self.model) if attached else nullcontext():
            while len(self.losses) < STEPS:
                x, mask, target = batch(4, channels=2, size=8, classes=3)  # drawn from the default generator
                self.optimizer.zero_grad()
                with torch.autocast("cpu", torch.bfloat16):
                    loss = F.cross_entropy(self.model(x), target)
                    settings: dict[str, Any] = {} if attached else {"fraction": 0.5}
                    loss = loss + self.regularizer(self.model, x, mask, target, generator=self.generator, **settings)
                self.scaler.scale(loss).backward()
                if len(self.losses) == stop:
                    os._exit(9)  # in the middle of a step, as a scheduler kills a job: nothing is cleaned up
                self.scaler.step(self.optimizer)
                self.scaler.update()
                self.losses.append(float(loss.detach()))
                if checkpoint is not None:
                    torch.save(self.state(), checkpoint)


def work(checkpoint: Path, stop: int, attached: bool) -> None:
    torch.set_num_threads(1)
    Run().train(checkpoint, stop, attached)


def in_a_process(*arguments: Any) -> int | None:
    process = multiprocessing.get_context("spawn").Process(target=work, args=arguments, daemon=True)
    process.start()
    process.join(120)
    if process.is_alive():
        process.kill()
        process.join()
        raise TimeoutError("the training process did not end within 120 s")
    return process.exitcode


@pytest.mark.cpu  # where the process that is killed trains
@pytest.mark.parametrize("attached", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_killed_run_goes_on_as_if_it_had_not_been(tmp_path: Path, attached: bool) -> None:
    checkpoint = tmp_path / "checkpoint.pt"
    assert in_a_process(checkpoint, STOP, attached) == 9
    assert len(torch.load(checkpoint, weights_only=True)["losses"]) == STOP
    resumed = Run()
    resumed.restore(torch.load(checkpoint, weights_only=True))
    resumed.train(None, None, attached)
    whole = Run()
    whole.train(None, None, attached)
    assert resumed.losses == whole.losses and len(set(whole.losses)) == STEPS
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
