"""Models and loops that are not textbook: in-place work, checkpointing, frozen parts, parameters elsewhere."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import attrreg
from attrreg.regularizer import AttributionRegularizer
from attrreg.trace import passes
from tests import oracles
from tests.models import SmoothNet, assert_close, batch, gradients, loss_by, smooth_batch, stir

TERMS: dict[str, AttributionRegularizer] = {
    "input_gradient": attrreg.InputGradient(),
    "input_x_gradient": attrreg.InputXGradient(),
    "integrated_gradients": attrreg.IntegratedGradients(steps=3),
    "integrated_gradients_unchunked": attrreg.IntegratedGradients(steps=3, chunk=None),
    "grad_cam": attrreg.GradCAM("body"),
    "grad_cam_auto": attrreg.GradCAM(),
    "activation_difference": attrreg.ActivationDifference(fill=attrreg.baselines.Zero()),
}


def of_a_part(name: str) -> AttributionRegularizer:
    """The term for a model whose part `net` has the layer."""
    return attrreg.GradCAM("net.body") if name == "grad_cam" else TERMS[name]


class WorksOnItsInput(nn.Module):
    """Scales its input, in place or not."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.net = SmoothNet()
        self.inplace = inplace

    def forward(self, x: Tensor) -> Any:
        return self.net(x.mul_(2) if self.inplace else x * 2)


@pytest.mark.parametrize("kind", ["plain", "non-leaf"])
@pytest.mark.parametrize("name", TERMS)
def test_a_model_that_works_on_its_input_in_place(name: str, kind: str) -> None:
    regularizer, (x, mask, target) = of_a_part(name), smooth_batch()
    inplace, plain = WorksOnItsInput(True).double(), WorksOnItsInput(False).double()
    plain.load_state_dict(inplace.state_dict())
    found = []
    for model in (inplace, plain):
        gain = torch.ones((), dtype=torch.float64, requires_grad=True)
        images = x * gain if kind == "non-leaf" else x
        before = images.detach().clone()
        value = regularizer(model, images, mask, target)
        slopes = torch.autograd.grad(value, [*model.parameters(), gain], allow_unused=True, materialize_grads=True)
        found.append([value.detach(), *slopes])
        assert torch.equal(images.detach(), before), "the caller's images"
    assert_close(found[0], found[1], 1e-12)


class Checkpointed(nn.Module):
    def __init__(self, net: SmoothNet) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Any:
        stem = checkpoint(lambda x: self.net.act(self.net.stem(x)), x, use_reentrant=False)
        return self.net.head(F.silu(checkpoint(self.net.body, stem, use_reentrant=False)).mean(dim=(2, 3)))


@pytest.mark.parametrize("name", TERMS)
def test_checkpointing_changes_nothing(name: str) -> None:
    plain, (x, mask, target) = SmoothNet().double(), smooth_batch()
    model = Checkpointed(plain)
    regularizer = of_a_part(name)
    want = gradients(plain, TERMS[name](plain, x, mask, target))
    assert_close(gradients(plain, regularizer(model, x, mask, target)), want, 1e-12)
    value = loss_by("attached", regularizer, model, (x, mask, target))
    task = gradients(plain, F.cross_entropy(plain(x), target))
    assert_close(gradients(plain, value), [a + b for a, b in zip(task, want, strict=True)], 1e-12)


class Learner(nn.Module):
    """Takes a gradient in its forward, maybe in a checkpointed block: of a weight, as fast weights do, or of what comes in."""

    def __init__(self, of: str, checkpointed: bool) -> None:
        super().__init__()
        self.of, self.checkpointed = of, checkpointed
        self.stem, self.fast, self.head = nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1), nn.Linear(2, 3)

    def block(self, h: Tensor) -> Tensor:
        w = self.fast.weight
        energy = F.conv2d(h, w, padding=1).square().mean()
        (step,) = torch.autograd.grad(energy, w if self.of == "weight" else h, create_graph=True)
        h, w = (h, w - 0.5 * step) if self.of == "weight" else (h - 20 * step, w)
        return F.conv2d(h, w, padding=1).tanh()

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x).tanh() if self.of == "weight" else x
        h = checkpoint(self.block, h, use_reentrant=False) if self.checkpointed else self.block(h)
        logits: Tensor = self.head((h if self.of == "weight" else self.stem(h).tanh()).mean((2, 3)))
        return logits


@pytest.mark.parametrize("of", ["weight", "images"])
def test_a_block_that_takes_a_gradient_itself(of: str) -> None:
    x, mask, target = smooth_batch()
    found = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = Learner(of, checkpointed).double()
        found.append(gradients(model, attrreg.InputGradient()(model, x, mask, target)))
    assert_close(found[1], found[0], 1e-10)
    images = x.clone().requires_grad_()
    plain = Learner(of, checkpointed=False).double()
    plain.load_state_dict(model.state_dict())
    term = attrreg.InputGradient(attrreg.scores.TargetLogit(), attrreg.objectives.SquaredOutside())
    (phi,) = torch.autograd.grad(plain(images * 1).gather(1, target[:, None]).sum(), images, create_graph=True)
    want = (~mask[:, None] * phi).square().sum((1, 2, 3)).mean()
    assert_close(gradients(model, term(model, x, mask, target)), gradients(plain, want), 1e-10)


@pytest.mark.parametrize("family", ["test_vit", "test_resnet", "mobilenetv3_small_050"])
def test_timms_checkpointing_changes_nothing(family: str) -> None:
    settings = {"img_size": 64} if "vit" in family else {}
    model = timm.create_model(family, num_classes=4, **settings).eval()
    stir(model, 0.01)
    x, mask, target = batch(2, size=64, classes=4)
    regularizer = (
        attrreg.InputGradient() + attrreg.IntegratedGradients(steps=2) + attrreg.ActivationDifference(fill=attrreg.baselines.Zero())
    )
    results = []
    for enabled in (False, True):
        model.set_grad_checkpointing(enabled)
        results.append(gradients(model, loss_by("attached", regularizer, model, (x, mask, target))))
    assert_close(results[1], results[0], 1e-4)


class CheckpointedFeatures(nn.Module):
    """Early layers may be frozen, and all features are checkpointed."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Conv2d(2, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3), nn.Tanh(), nn.Conv2d(4, 5, 3), nn.Tanh()]
        self.features, self.head, self.checkpoints = nn.Sequential(*layers), nn.Linear(5, 3), True

    def forward(self, x: Tensor) -> Tensor:
        found = checkpoint(self.features, x, use_reentrant=False) if self.checkpoints else self.features(x)
        assert isinstance(found, Tensor)
        logits: Tensor = self.head(found.mean((2, 3)))
        return logits


@pytest.mark.parametrize(
    "regularizer", [attrreg.GradCAM(), attrreg.GradCAM("features.0"), attrreg.GradCAM("features.2") + attrreg.ActivationDifference()]
)
@pytest.mark.parametrize("attach", [False, True])
def test_checkpointed_blocks_with_frozen_layers(regularizer: AttributionRegularizer, attach: bool) -> None:
    model, (x, mask, target) = CheckpointedFeatures().double(), smooth_batch()
    model.features[:4].requires_grad_(False)

    def found() -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        if not attach:
            return gradients(model, F.cross_entropy(model(x), target) + regularizer(model, x, mask, target, generator=generator))
        with regularizer.attach(model):
            gradients(model, F.cross_entropy(model(x), target))  # of a step without a penalty
            return gradients(model, F.cross_entropy(model(x), target) + regularizer(model, x, mask, target, generator=generator))

    checkpointed = found()
    model.checkpoints = False
    assert_close(checkpointed, found(), 1e-10)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("name", ["input_gradient", "integrated_gradients", "integrated_gradients_unchunked"])
def test_parameters_outside_the_model_are_trained(name: str) -> None:
    (x, mask, target), head = smooth_batch(), nn.Linear(3, 4).double()
    model = SmoothNet().double().requires_grad_(False)
    value = TERMS[name](model, x, mask, target, output=head)
    value.backward()
    assert head.weight.grad is not None and head.weight.grad.any()


@pytest.mark.parametrize("name", ["input_gradient", "integrated_gradients", "integrated_gradients_unchunked"])
def test_a_parameter_that_the_map_does_not_depend_on_is_no_path(name: str) -> None:
    model, (x, mask, target) = SmoothNet().double().requires_grad_(False), smooth_batch()
    model.head.bias.requires_grad_(True)  # the gradient of a logit knows nothing of the bias
    for images in (x, x.clone().requires_grad_()):
        with pytest.raises(RuntimeError, match="no path to any trainable parameter"):
            TERMS[name](model, images, mask, target)


def test_another_regularizer_than_the_one_attached() -> None:
    model, (x, mask, target) = SmoothNet().double(), smooth_batch()
    model.stem.requires_grad_(False)
    for attached, other in (
        (attrreg.ActivationDifference(), attrreg.InputGradient()),
        (attrreg.GradCAM("body"), attrreg.InputXGradient()),
        (attrreg.ActivationDifference("stem"), attrreg.GradCAM("stem")),
        (attrreg.GradCAM("stem"), attrreg.GradCAM()),
        (attrreg.InputGradient(), attrreg.IntegratedGradients(2)),
    ):
        want = other(model, x, mask, target)
        with attached.attach(model):
            model(x)
            torch.testing.assert_close(other(model, x, mask, target), want)


def test_a_recording_outlived_by_its_model_or_graph() -> None:
    model, (x, mask, target) = SmoothNet(norm=True).double(), smooth_batch()
    regularizer = attrreg.InputGradient()
    with regularizer.attach(model):
        model(x)
        model.eval()
        want = regularizer(copy.deepcopy(model), x, mask, target)
        torch.testing.assert_close(regularizer(model, x, mask, target), want)
        F.cross_entropy(model(x), target).backward()
        torch.testing.assert_close(regularizer(model, x, mask, target), want)


def test_dropout_is_replayed_alike_by_every_term() -> None:
    model, (x, mask, target) = SmoothNet(dropout=0.5).double(), smooth_batch()
    for regularizer in (attrreg.IntegratedGradients(2), attrreg.IntegratedGradients(2) + attrreg.InputGradient()):
        values = []
        for way in ("attached", "evaluate"):
            torch.manual_seed(5)
            if way == "evaluate":
                values.append(regularizer.evaluate(model, x, mask, target).terms["IntegratedGradients"])
            else:
                with regularizer.attach(model):
                    model(x)
                    values.append(regularizer.evaluate(model, x, mask, target).terms["IntegratedGradients"])
        torch.testing.assert_close(values[0], values[1])
    torch.manual_seed(5)
    with passes() as counted, attrreg.IntegratedGradients(2).attach(model):
        model(x)
        torch.testing.assert_close(attrreg.IntegratedGradients(2)(model, x, mask, target).detach(), values[0])
    assert counted.forward == 2


class Rearranges(SmoothNet):
    """Assigns a buffer, fills an empty one, drops one and makes another."""

    average: Tensor
    cache: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", torch.zeros(2, dtype=torch.float64))
        self.register_buffer("cache", None)
        self.register_buffer("old", torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        self.cache = x.detach().mean((0, 2, 3))
        self.average = 0.9 * self.average + 0.1 * self.cache
        self._buffers.pop("old", None)
        self._buffers["new"] = 2 * self.cache
        return super().forward(x)


def test_buffers_that_a_forward_assigns_makes_or_drops() -> None:
    model, (x, mask, target) = Rearranges().double(), smooth_batch()
    before = dict(model._buffers)
    attrreg.InputGradient()(model, x, mask, target)
    attrreg.InputGradient().attribute(model, x, target)
    assert list(model._buffers) == list(before) and all(model._buffers[name] is buffer for name, buffer in before.items())
    assert not model.average.any()
    twin = copy.deepcopy(model)
    twin(x)
    attrreg.InputGradient().evaluate(model, x, mask, target)
    for name in ("average", "cache", "new"):
        torch.testing.assert_close(model._buffers[name], twin._buffers[name])


class Sized(SmoothNet):
    """Gives a buffer its size at the first forward, as observers for quantisation do."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.empty(0, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.get_buffer("seen").resize_(5).copy_(x.sum() + torch.arange(5))
        return super().forward(x)


def test_evaluate_commits_a_buffer_that_the_forward_resized() -> None:
    model, (x, mask, target) = Sized().double(), smooth_batch()
    twin, buffer = copy.deepcopy(model), model.get_buffer("seen")
    for _ in range(2):
        twin(x)
        attrreg.InputGradient().evaluate(model, x, mask, target).total.backward()
        assert model.get_buffer("seen") is buffer
        torch.testing.assert_close(buffer, twin.get_buffer("seen"))


def test_a_layer_under_its_other_name() -> None:
    model, (x, mask, target) = SmoothNet().double(), smooth_batch()
    model.alias = model.body
    torch.testing.assert_close(attrreg.GradCAM("alias")(model, x, mask, target), attrreg.GradCAM("body")(model, x, mask, target))


@pytest.mark.cpu
def test_models_that_use_torch_func_inside() -> None:
    class Ensemble(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.heads = nn.Conv2d(3, 8, 3), nn.Parameter(torch.randn(4, 10, 8))

        def forward(self, x: Tensor) -> Tensor:
            features = torch.func.vmap(lambda image: F.conv2d(image[None], self.stem.weight)[0])(x).relu().mean((2, 3))
            return torch.func.vmap(lambda head: F.linear(features, head))(self.heads).mean(0)

    model, x, target = Ensemble(), torch.randn(4, 3, 8, 8), torch.arange(4)
    mask = torch.zeros(4, 1, 8, 8)
    mask[..., :4] = 1
    reg = attrreg.InputGradient(score=attrreg.scores.TargetLogit(), objective=attrreg.objectives.SquaredOutside())
    value = reg(model, x, mask, target=target)
    phi = oracles.input_gradient(model, x, target, oracles.score_target_logit)
    want = oracles.squared_outside(phi, mask).mean()
    torch.testing.assert_close(value, want, rtol=1e-5, atol=0)
    assert_close(gradients(model, value), gradients(model, want), 1e-5)


class Tagged(Tensor):
    """A subclass with PyTorch's own handling of calls, as MONAI's and fastai's images."""


@pytest.mark.parametrize("attached", [False, True])
def test_images_may_be_of_a_subclass_of_tensors(attached: bool) -> None:
    x, mask, target = smooth_batch()
    layers = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    model, found = nn.Sequential(*layers, nn.Linear(4, 3)).double(), []
    for images in (x, x.as_subclass(Tagged)):
        reg = attrreg.InputGradient() + attrreg.GradCAM("3") + attrreg.ActivationDifference(fill=attrreg.baselines.Zero())
        with reg.attach(model) if attached else nullcontext():
            model(images)
            found.append(gradients(model, reg(model, images, mask, target % 3)))
    assert_close([gradient.as_subclass(Tensor) for gradient in found[1]], found[0], 1e-12)
