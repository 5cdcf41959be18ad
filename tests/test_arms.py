"""The other arms of the founding paper: masked and shuffled training, adversarial invariance, the sum."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attrreg
from attrreg import baselines, presets
from attrreg.trace import Passes, passes
from attrreg.transforms import ReplaceOutside
from tests.models import DEVICE, SmoothNet, assert_close, batch, gradients, smooth_batch

# Replacing


@pytest.mark.parametrize("fill", [baselines.Zero(), baselines.Shuffle()])
def test_replacing_changes_irrelevant_pixels_of_annotated_images_alone(fill: baselines.Baseline) -> None:
    x, mask = torch.rand(4, 3, 6, 6) + 1, torch.rand(4, 6, 6) < 0.5
    annotated = torch.tensor([True, False, True, True])
    before = x.clone()
    replaced = ReplaceOutside(fill)(x, mask, annotated=annotated)
    assert torch.equal(x, before)
    for image in range(4):
        inside, outside = mask[image], ~mask[image]
        assert torch.equal(replaced[image][:, inside], x[image][:, inside])
        if not annotated[image]:
            assert torch.equal(replaced[image], x[image])
        elif isinstance(fill, baselines.Zero):
            assert not replaced[image][:, outside].any()
        else:
            now, then = replaced[image][:, outside], x[image][:, outside]
            assert not torch.equal(now, then)
            assert torch.equal(now.T.sort(dim=0).values, then.T.sort(dim=0).values)  # whole pixels, in another order


def test_replacing_draws_from_the_generator_alone() -> None:
    x, mask = torch.rand(2, 1, 8, 8), torch.zeros(8, 8)
    state = torch.get_rng_state()
    first, second = (ReplaceOutside(baselines.Shuffle())(x, mask, generator=torch.Generator().manual_seed(5)) for _ in range(2))
    ReplaceOutside()(x, mask)
    assert torch.equal(first, second) and torch.equal(state, torch.get_rng_state())
    assert not torch.equal(ReplaceOutside(baselines.Shuffle())(x, mask), first)
    assert eval(repr(ReplaceOutside(baselines.Shuffle()))) == ReplaceOutside(baselines.Shuffle())
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match="OtherImage"):
        ReplaceOutside(baselines.OtherImage())(x[:1], mask)
    assert torch.equal(state, torch.get_rng_state())


# Adversarial invariance


def network(invariance: attrreg.AdversarialInvariance) -> nn.Module:
    """The discriminator's, once it has taken shape."""
    found = invariance._discriminator.network
    assert found is not None
    return found


def separable(model: nn.Module, invariance: attrreg.AdversarialInvariance, x: Tensor, mask: Tensor) -> float:
    """How often the discriminator is right."""
    features = []
    handle = model.head.register_forward_pre_hook(lambda module, args: features.append(args[0]))  # type: ignore[union-attr]
    with torch.no_grad():
        model(x)
        model(ReplaceOutside()(x, mask))
    handle.remove()
    whole, without = (invariance.discriminate(found) > 0 for found in features)
    return (whole.float().mean() + (~without).float().mean()).item() / 2


def test_the_discriminator_learns_and_the_features_then_fool_it() -> None:
    model = SmoothNet()
    x, mask = torch.randn(64, 2, 8, 8), torch.zeros(64, 8, 8)
    x[:, 0, :, :3] += 3  # which zeros in its place take away
    mask[:, 6:, 6:] = 1
    learner = attrreg.AdversarialInvariance(fill=baselines.Zero(), rate=1e-2, hidden=(32,))
    for _ in range(60):
        learner(model, x, mask)
    assert separable(model, learner, x, mask) > 0.95
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        learner(model, x, mask).backward()
        optimizer.step()
    assert separable(model, learner, x, mask) < 0.75


def test_value_and_gradients_with_a_constant_discriminator() -> None:
    model, (x, mask, _) = SmoothNet().double(), smooth_batch()
    invariance = attrreg.AdversarialInvariance(2.0, layer="body", fill=baselines.Zero(), every=2, hidden=(8,))
    invariance(model, x, mask)  # trains
    trained = copy.deepcopy(network(invariance))
    value = invariance(model, x, mask)  # does not
    assert all(map(torch.equal, trained.parameters(), network(invariance).parameters()))
    relevant = mask.unsqueeze(1).to(x.dtype)
    layers = nn.Sequential(model.stem, model.act, model.body)
    judge = copy.deepcopy(network(invariance))
    real, fake = judge(layers(x).flatten(1)), judge(layers(relevant * x).flatten(1))
    want = F.binary_cross_entropy_with_logits(real, torch.zeros_like(real)) + F.binary_cross_entropy_with_logits(
        fake, torch.ones_like(fake)
    )
    torch.testing.assert_close(value, want)
    assert_close(gradients(model, value), gradients(model, want), 1e-10)


@pytest.mark.parametrize("way", ["call", "attached", "evaluate"])
def test_nothing_is_left_in_the_loop(way: str) -> None:
    model, (x, mask, target) = SmoothNet(norm=True).double(), smooth_batch()
    invariance = attrreg.AdversarialInvariance(hidden=(8,))
    before = [parameter.clone() for parameter in model.parameters()]
    buffers = [buffer.clone() for buffer in model.buffers()]
    generator, state = torch.Generator().manual_seed(0), torch.get_rng_state()
    if way == "evaluate":
        penalty = invariance.evaluate(model, x, mask, generator=generator)
        assert list(penalty.terms) == ["AdversarialInvariance"] and penalty.output.shape == (3, 3)
    else:
        with passes() as counted:
            if way == "attached":
                with invariance.attach(model):
                    loss = F.cross_entropy(model(x), target) + invariance(model, x, mask, generator=generator)
            else:
                loss = invariance(model, x, mask, generator=generator)
                assert all(map(torch.equal, buffers, model.buffers()))
        assert counted == Passes(1 if way == "attached" else 2, 0)
        loss.backward()
    assert torch.equal(state, torch.get_rng_state())
    assert all(map(torch.equal, before, model.parameters()))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in network(invariance).parameters())


def test_half_precision_stays_out_of_the_discriminator() -> None:
    model, (x, mask, _) = SmoothNet(), smooth_batch()
    invariance = attrreg.AdversarialInvariance(hidden=(8,))
    with torch.autocast(DEVICE, torch.bfloat16):
        value = invariance(model, x.float(), mask)
    value.backward()
    assert {parameter.dtype for parameter in network(invariance).parameters()} == {torch.float32}
    assert value.dtype is torch.float32 and all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    exact = attrreg.AdversarialInvariance(hidden=(8,))(model, x.float(), mask, generator=torch.Generator().manual_seed(0))
    with torch.autocast(DEVICE, torch.bfloat16):
        found = attrreg.AdversarialInvariance(hidden=(8,))(model, x.float(), mask, generator=torch.Generator().manual_seed(0))
    assert float(found.detach()) == pytest.approx(float(exact.detach()), rel=0.02)


def test_a_checkpoint_goes_on_where_it_was() -> None:
    model, (x, mask, _) = SmoothNet().double(), smooth_batch()
    settings: dict[str, Any] = {"hidden": (8,), "every": 2}
    whole, first, second = (attrreg.AdversarialInvariance(**settings) for _ in range(3))
    values = [whole(model, x, mask, generator=torch.Generator().manual_seed(step)) for step in range(6)]
    for step in range(3):
        first(model, x, mask, generator=torch.Generator().manual_seed(step))
    fresh = second.state_dict()
    second.load_state_dict(whole.state_dict())
    second.load_state_dict(fresh)  # of before the first call
    assert second.step == 0 and second._discriminator.network is None
    second.load_state_dict(first.state_dict())
    assert second.step == 3 and not network(second).training
    for step in range(3, 6):
        torch.testing.assert_close(second(model, x, mask, generator=torch.Generator().manual_seed(step)), values[step])


@pytest.mark.parametrize("state", [{}, {"step": 3}, {"step": "3", "width": 0, "network": None, "optimizer": None}, None])
def test_a_state_of_something_else_is_refused(state: Any) -> None:
    invariance = attrreg.AdversarialInvariance()
    with pytest.raises(ValueError, match=r"state must have step, width, network, optimizer.*got .*Pass what was saved"):
        invariance.load_state_dict(state)
    assert invariance.step == 0


@pytest.mark.parametrize("broken", [{"network": {}}, {"network": {"x": 1}}, {"network": {"0.bias": torch.zeros(3)}, "width": 5}])
def test_a_state_that_does_not_fit_changes_nothing(broken: dict[str, Any]) -> None:
    model, (x, mask, _) = SmoothNet().double(), smooth_batch()
    invariance = attrreg.AdversarialInvariance()
    invariance(model, x, mask)
    state = invariance.state_dict()
    with pytest.raises(ValueError, match=r"state is of no discriminator with the layers"):
        invariance.load_state_dict({**state, **broken})
    assert invariance.state_dict().keys() == state.keys() and invariance.step == 1
    assert invariance.state_dict()["width"] == state["width"] > 0


def test_the_seed_alone_chooses_the_discriminators_first_weights() -> None:
    model, (x, mask, _) = SmoothNet().double(), smooth_batch()
    found = []
    for own, others in ((0, 1), (0, 2), (3, 2)):
        torch.manual_seed(others)
        invariance = attrreg.AdversarialInvariance(fill=baselines.Zero(), hidden=(8,), seed=own)
        found.append(float(invariance(model, x, mask).detach()))
    assert found[0] == found[1] != found[2]


def test_the_discriminators_layers_do_not_grow() -> None:
    model, (x, mask, _) = SmoothNet().double(), smooth_batch()
    invariance = attrreg.AdversarialInvariance(fill=baselines.Zero(), hidden=(8, 8), rate=0.1)
    for _ in range(30):
        invariance(model, x, mask)
    largest = [torch.linalg.matrix_norm(layer.weight, 2).item() for layer in network(invariance).modules() if isinstance(layer, nn.Linear)]
    assert largest == pytest.approx([1.0] * 3, rel=0.1)  # as spectral normalisation estimates them


def test_no_annotation_trains_nobody() -> None:
    model, (x, mask, _) = SmoothNet().double(), smooth_batch()
    invariance = attrreg.AdversarialInvariance(hidden=(8,))
    value = invariance(model, x, mask, annotated=torch.zeros(3, dtype=torch.bool))
    assert not network(invariance).training
    fresh = copy.deepcopy(invariance)._discriminator
    fresh.build(fresh.width, x.device, x.dtype)
    assert fresh.network is not None and all(map(torch.equal, network(invariance).parameters(), fresh.network.parameters()))
    value.backward()
    assert float(value.detach()) == 0


def test_a_batch_that_is_not_finite_does_not_train_the_discriminator() -> None:
    model, (x, mask, target) = SmoothNet().double(), smooth_batch()
    invariance, bad = attrreg.AdversarialInvariance(hidden=(8,)), x.clone()
    bad[0, 0, 0, 0] = float("inf")

    def weights(images: Tensor) -> list[Tensor]:
        invariance(model, images, mask, target)
        assert not network(invariance).training
        return [parameter.detach().clone() for parameter in network(invariance).parameters()]

    first = weights(x)
    assert all(map(torch.equal, first, weights(bad)))
    later = weights(x)
    assert all(parameter.isfinite().all() for parameter in later) and not all(map(torch.equal, first, later))


def test_the_discriminator_is_made_on_the_cpu_whatever_the_default_device_is() -> None:
    here, there = (copy.deepcopy(attrreg.AdversarialInvariance(hidden=(8,))._discriminator) for _ in range(2))
    here.build(5, torch.device("cpu"), torch.float32)
    with torch.device("meta"):
        there.build(5, torch.device("cpu"), torch.float32)
    assert here.network is not None and there.network is not None
    assert all(map(torch.equal, here.network.parameters(), there.network.parameters()))


# The sum


def test_the_sum_is_the_sum_and_shares_its_passes() -> None:
    model, (x, mask, target) = SmoothNet().double(), smooth_batch()
    draws = [torch.Generator().manual_seed(1) for _ in range(2)]
    with passes() as counted:
        value = presets.actdiff_gradmask_viviano2019(0.5, 0.1)(model, x, mask, target, generator=draws[0])
    assert counted == Passes(2, 1)
    want = presets.actdiff_viviano2019(0.5)(model, x, mask, generator=draws[1]) + presets.gradmask_viviano2019(0.1)(model, x, mask, target)
    torch.testing.assert_close(value, want)


# They train


def toy(count: int, honest: bool) -> tuple[Tensor, Tensor, Tensor]:
    """A faint bar, lying or standing, and a bright corner that tells which, or tells the other one."""
    y = torch.randint(2, (count,))
    bars = torch.zeros(2, 6, 6)
    bars[0, 2:4] = bars[1, :, 2:4] = 0.6
    x = torch.rand(count, 1, 16, 16)
    x[:, 0, 5:11, 5:11] += bars[y]
    x[:, 0, :3, :3] += (y if honest else 1 - y).view(-1, 1, 1)
    mask = torch.zeros(count, 16, 16, dtype=torch.bool)
    mask[:, 4:12, 4:12] = True
    return x, y, mask


def small() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(256, 2)),
    )


def penalised(regularizer: Any) -> Callable[..., Tensor]:
    return lambda model, x, y, mask: F.cross_entropy(model(x), y) + regularizer(model, x, mask, target=y)


ARMS: dict[str, Callable[[], Callable[..., Tensor]]] = {
    "plain": lambda: lambda model, x, y, mask: F.cross_entropy(model(x), y),
    "adversarial": lambda: penalised(attrreg.AdversarialInvariance(1.0, hidden=(64,))),
    "pgd_ex": lambda: penalised(attrreg.PGDEx(epsilon=1.0, steps=3)),
    "actdiff_gradmask": lambda: penalised(presets.actdiff_gradmask_viviano2019(0.1, 1e-4)),
}


@pytest.mark.parametrize("arm", ARMS)
def test_arms_see_through_a_shortcut_that_fools_plain_training(arm: str) -> None:
    (x, y, mask), (test_x, test_y, _) = toy(512, honest=True), toy(512, honest=False)
    model, loss = small(), ARMS[arm]()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(200):
        index = torch.randint(512, (32,))
        optimizer.zero_grad()
        loss(model, x[index], y[index], mask[index]).backward()
        optimizer.step()
    with torch.no_grad():
        accuracy = (model(test_x).argmax(1) == test_y).float().mean().item()
    assert accuracy < 0.2 if arm == "plain" else accuracy > 0.7


# Bad input


DATA = batch(3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ReplaceOutside()(DATA[0][0], DATA[1]), ValueError, r"x must be a batch.*\. "),
        (lambda: ReplaceOutside()(DATA[0], DATA[1][:2]), ValueError, r"mask is for 2 images.*\. "),
        (lambda: ReplaceOutside()(DATA[0], DATA[1], generator=3), TypeError, r"generator must be.*\. "),  # type: ignore[arg-type]
        (lambda: attrreg.AdversarialInvariance().discriminate(torch.zeros(1, 5)), RuntimeError, r"takes shape at the first call\. "),
    ],
)
def test_bad_input(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_features_of_another_width_are_refused() -> None:
    model, (x, mask, _) = SmoothNet().double(), smooth_batch()
    invariance = attrreg.AdversarialInvariance(layer="body", every=2, hidden=(8,))
    invariance(model, x, mask)
    with pytest.raises(ValueError, match=r"features are 20 wide, but were 80\. "):
        invariance(model, x[..., :4, :4], mask[:, :4, :4])
    assert invariance.step == 1
