"""Attached forwards in loops of many kinds: checkpoints, lists of inputs, threads, interruptions."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Callable
from contextlib import nullcontext, suppress
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import attrreg
from attrreg.trace import passes
from tests import oracles
from tests.models import FAMILIES, WAYS, Batch, SmoothNet, accumulated, assert_close, batch, gradients, loss_by, smooth_batch
from tests.test_conditions import CAM, REG


class Checkpointed(nn.Module):
    """Checkpoints the part that is attached."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.top = SmoothNet(norm=True), nn.Linear(3, 3)
        self.net.act = nn.ReLU()  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.top(checkpoint(self.net, x, use_reentrant=False))
        return logits


@pytest.mark.parametrize(
    ("kind", "together"), [("plain", False), ("scheduled", False), ("auto", False), ("scheduled", True), ("auto", True)]
)
def test_a_checkpointed_part_is_the_models_own(kind: str, together: bool) -> None:
    """Each forward has its own backward, or several have one."""
    found = {}
    for attach in (False, True):
        torch.manual_seed(0)
        model, (x, mask, target) = Checkpointed().double(), smooth_batch()
        reg: Any = {"plain": REG, "scheduled": attrreg.Scheduled(REG, attrreg.schedules.Every(2)), "auto": CAM}[kind]
        total = torch.zeros((), dtype=torch.float64)
        with reg.attach(model.net) if attach else nullcontext():
            for images in (x, 2 * x, 3 * x):  # where scheduled: with a penalty, without, and with
                loss = F.cross_entropy(model(images), target) + reg(model.net, images, mask, target)
                if together:
                    total = total + loss
                else:
                    loss.backward()
            found[attach] = gradients(model, total) if together else accumulated(model)
    assert_close(found[True], found[False], 1e-10 if together else 1e-12)


@pytest.mark.parametrize("kind", ["a checkpoint of the model", "a checkpoint around a part", "saved elsewhere"])
def test_what_the_loop_checkpoints_or_offloads_is_not_recorded(kind: str) -> None:
    net, (x, mask, target) = SmoothNet().double(), smooth_batch()
    whole = nn.Sequential(net, nn.Linear(3, 3)).double()
    model = net if "part" in kind else whole
    want = REG(model, x, mask, target)
    with REG.attach(model), passes() as counted:
        if kind == "saved elsewhere":
            with torch.autograd.graph.save_on_cpu():
                whole(x)
        else:
            checkpoint(whole, x, use_reentrant=False)
        value = REG(model, x, mask, target)
    assert counted.forward == 1
    torch.testing.assert_close(value, want)
    assert_close(gradients(model, value), gradients(model, want), 1e-10)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("made", [False, True], ids=["a leaf", "made of a leaf"])
def test_images_and_their_hooks_get_the_losss_gradient_once_and_whole(made: bool, way: str) -> None:
    model, (x, mask, target) = SmoothNet().double(), smooth_batch()
    images = x.clone().requires_grad_()
    if made:
        images = images * 2
        images.retain_grad()
    seen: list[Tensor] = []
    images.register_hook(seen.append)
    loss = loss_by(way, REG, model, (images, mask, target))
    assert not seen and images.grad is None  # of the inner backward
    loss.backward()
    leaf = images.detach().requires_grad_()
    plain = F.cross_entropy(model(leaf), target) + oracles.squared_input_gradient(model, leaf, mask, target).mean()
    (want,) = torch.autograd.grad(plain, leaf)
    assert len(seen) == 1
    torch.testing.assert_close(seen[0], want, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(images.grad, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["kept", "changed", "the model's own"])
def test_hooks_on_the_output_are_for_the_losss_gradient(kind: str) -> None:
    found, ran = [], []
    for attach in (False, True):
        torch.manual_seed(0)
        model, (x, mask, target) = SmoothNet().double(), smooth_batch()
        seen: list[Tensor] = []
        if kind == "the model's own":  # as FSDP's, which has to see every backward
            model.register_forward_hook(lambda module, args, output: output.register_hook(seen.append) and None)
        with REG.attach(model) if attach else nullcontext(), passes() as counted:
            logits = model(x)
            if kind == "kept":
                logits.retain_grad()
            elif kind == "changed":
                logits.register_hook(lambda gradient, seen=seen: seen.append(gradient) or 3 * gradient)
            penalty = REG(model, x, mask, target)
            if kind == "kept":
                assert logits.grad is None  # of the inner backward
            elif kind == "changed":
                assert not seen
            (F.cross_entropy(logits, target) + penalty).backward()
        found.append([penalty, *accumulated(model), *([logits.grad] if kind == "kept" else [])])
        ran.append(counted.forward)
    assert_close(found[1], found[0], 1e-12)
    assert ran == [1, 0 if kind == "the model's own" else 1]


def test_hooks_on_the_output_do_not_see_how_the_last_map_is_found() -> None:
    (x, mask, target), model = batch(2, size=64), FAMILIES["vit"].build()
    regularizer, seen = attrreg.captum.LayerActivation(), list[Tensor]()
    with regularizer.attach(model):
        model(x).register_hook(seen.append)
        regularizer(model, x, mask, target)
    assert not seen


def test_hooks_on_the_output_do_not_matter_where_no_gradient_is_taken() -> None:
    model, (x, mask, _) = SmoothNet().double(), smooth_batch()
    regularizer = attrreg.ActivationDifference("body", fill=attrreg.baselines.Zero())
    with regularizer.attach(model), passes() as counted:
        model(x).retain_grad()
        regularizer(model, x, mask)
    assert counted.forward == 1  # of the fill


@pytest.mark.cpu
def test_threads_that_train_side_by_side_leave_the_process_as_it_was_and_each_other_alone() -> None:
    frame, flash = torch.utils.checkpoint._CheckpointFrame, torch.backends.cuda.flash_sdp_enabled()
    models, batches = [SmoothNet().double() for _ in range(4)], [smooth_batch() for _ in range(4)]
    twins = copy.deepcopy(models)

    def train(model: nn.Module, data: Batch) -> None:
        x, mask, target = data
        with REG.attach(model):
            for _ in range(10):
                (F.cross_entropy(model(x), target) + REG(model, x, mask, target)).backward()

    threads = [threading.Thread(target=train, args=each) for each in zip(models, batches, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.utils.checkpoint._CheckpointFrame is frame and torch.backends.cuda.flash_sdp_enabled() == flash
    for model, twin, data in zip(models, twins, batches, strict=True):
        train(twin, data)
        found, want = (accumulated(net) for net in (model, twin))
        assert_close(found, want, 1e-12)


def test_what_passes_of_the_whole_checkpoint_is_recomputed_as_it_ran() -> None:
    """The part that is attached does not take it for the loop's."""
    found, whole = {}, attrreg.ActivationDifference("top", attrreg.baselines.Zero())
    for attach in (False, True):
        torch.manual_seed(0)
        model, (x, mask, target) = Checkpointed().double(), smooth_batch()
        with REG.attach(model.net) if attach else nullcontext():
            found[attach] = gradients(model, F.cross_entropy(model(x), target) + REG(model.net, x, mask, target) + whole(model, x, mask))
    assert_close(found[True], found[False], 1e-10)


def test_hooks_that_somebody_cleared() -> None:
    model, (x, mask, target) = SmoothNet().double(), smooth_batch()
    want = REG(model, x, mask, target)
    with REG.attach(model):
        model._forward_hooks.clear()
        model(x)
        torch.testing.assert_close(REG(model, x, mask, target), want)
    assert not model._forward_pre_hooks


def test_nothing_is_held_after_a_forward_that_raised() -> None:
    model, (x, _, _) = SmoothNet().double(), smooth_batch()
    with REG.attach(model):
        images = x.clone()
        alive = weakref.ref(images)
        with pytest.raises(RuntimeError):
            model(images[:, :1])
        del images
        gc.collect()
        assert alive() is None


def test_a_model_that_stays_attached_to_a_forward_without_backward_can_go() -> None:
    model, (x, mask, target) = Checkpointed().double(), smooth_batch()
    REG.attach(model)
    loss = F.cross_entropy(model(x), target) + REG(model, x, mask, target)
    alive, weights = weakref.ref(model), list(model.parameters())
    del model
    loss.backward()  # the model itself is not needed for it
    assert all(weight.grad is not None for weight in weights[:-1])
    model = Checkpointed().double()
    REG.attach(model)
    model(x)
    alone = weakref.ref(model)
    del model, loss
    gc.collect()
    assert alive() is None and alone() is None


@pytest.mark.cpu
def test_removed_by_another_thread_than_the_one_that_was_interrupted() -> None:
    model, (x, _, _) = SmoothNet().double(), smooth_batch()

    def interrupt(module: nn.Module, args: Any) -> None:
        raise SystemExit

    stop = model.head.register_forward_pre_hook(interrupt)
    handle = REG.attach(model)

    def run() -> None:
        with suppress(SystemExit):
            model(x)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    stop.remove()
    handle.remove()
    assert not model._forward_pre_hooks and not model._forward_hooks


class Parts(nn.Module):
    """Takes a list or a dict, and returns what cannot be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.net = SmoothNet()

    def forward(self, x: Tensor, factors: Any) -> Uncopied:
        return Uncopied(self.net(x) * torch.stack(tree_leaves(factors)).sum())


class Uncopied:
    """Refuses."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits

    def __copy__(self) -> Uncopied:
        raise RuntimeError("not copied")


@pytest.mark.parametrize("hold", [list, lambda factors: dict(enumerate(factors))], ids=["lists", "dicts"])
def test_inputs_that_hold_tensors_are_compared_and_outputs_need_no_copy(hold: Callable[[Any], Any]) -> None:
    model, (x, mask, target) = Parts().double(), smooth_batch()
    a, b = torch.tensor(2.0).double(), torch.tensor(3.0).double()
    want = REG(model, x, mask, target, inputs=(x, hold([a, b])), output="logits")
    with REG.attach(model):
        for factors, own in (([a, b], 0), ([a], 1), ([b, b], 1), ([a, b, b], 1)):
            model(x, hold(factors))
            with passes() as counted:
                torch.testing.assert_close(REG(model, x, mask, target, inputs=(x, hold([a, b])), output="logits"), want)
            assert counted.forward == own


def test_an_unattached_call_draws_from_where_the_loops_forward_left_the_generator() -> None:
    model, (x, mask, target) = SmoothNet(dropout=0.5).double(), smooth_batch()
    model(x)
    state = torch.get_rng_state()
    value = REG(model, x, mask, target)
    assert torch.equal(torch.get_rng_state(), state)
    want = oracles.squared_input_gradient(model, x, mask, target).mean()  # draws the same
    torch.testing.assert_close(value, want)
    assert_close(gradients(model, value), gradients(model, want), 1e-10)


class Deep(SmoothNet):
    def forward(self, depth: Tensor, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x) + depth.mean()


def test_it_warns_of_images_that_no_forward_got() -> None:
    (x, mask, target), model, part = smooth_batch(), Deep().double(), SmoothNet().double()
    other = x + 1
    with REG.attach(model):  # a warning would be an error
        model(other, x)
        REG(model, x, mask, target, inputs=(other, x))
        model(other, x)
        model(other, other + 1)  # another view of them
        REG(model, x, mask, target, inputs=(other, x))
        part_of_x = x[:2]  # is no mistake
        REG(model, part_of_x, mask[:2], target[:2], inputs=(other, part_of_x))
    whole = nn.Sequential(part, nn.Linear(3, 3).double())
    with REG.attach(whole), REG.attach(part):
        whole(x)
        REG(part, x, mask, target)
    with REG.attach(part), pytest.warns(UserWarning, match="another tensor of images") as caught:
        for _ in range(2):
            part(x)
            REG(part, x / 255, mask, target)
    assert len(caught) == 1 and caught[0].filename == __file__


class Conditioned(SmoothNet):
    def forward(self, code: Tensor, marks: Tensor, x: Tensor, depth: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x + depth * code.mean() * marks.sum())


def test_the_first_images_of_a_forward_are_recorded() -> None:
    model, (x, mask, target) = Conditioned().double(), smooth_batch()
    inputs = (torch.ones(3, 5).double(), torch.ones(3, 1, 1, 1).long(), x, x + 1)
    want = REG(model, x, mask, target, inputs=inputs)
    with REG.attach(model), passes() as counted:
        model(*inputs)
        torch.testing.assert_close(REG(model, x, mask, target, inputs=inputs), want)
    assert counted.forward == 0


def test_a_models_own_hook_makes_its_arguments_of_what_the_loop_calls_it_with() -> None:
    model, (x, mask, target), depth = Deep().double(), smooth_batch(), torch.ones(()).double()
    model.register_forward_pre_hook(lambda module, args: (depth, (args[0] - 0.5) / 2))
    want = REG(model, x, mask, target)
    with REG.attach(model), passes() as counted:
        model(x)
        value = REG(model, x, mask, target)  # a warning of other images would be an error
    assert counted.forward == 0
    torch.testing.assert_close(value, want)


def test_a_recording_is_given_out_once() -> None:
    model, (x, mask, target) = SmoothNet().double(), smooth_batch()
    regularizer = attrreg.ActivationDifference("body", fill=attrreg.baselines.Zero())
    with regularizer.attach(model):
        model(x)
        regularizer(model, x, mask, target).backward()  # frees a part of the graph, and does not reach the output
        value = regularizer(model, x, mask, target)
    assert_close(gradients(model, value), gradients(model, regularizer(model, x, mask, target)), 1e-10)
