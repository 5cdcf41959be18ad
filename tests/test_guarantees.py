"""What docs/guarantees.md and docs/concepts.md promise: masks at their ends, hooks, draws, wrappers, regions with one derivative."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import attrreg
from attrreg import objectives, scores
from attrreg.regularizer import AttributionRegularizer
from attrreg.trace import passes
from tests import oracles
from tests.models import WAYS, SmoothNet, assert_close, gradients, loss_by, smooth_batch
from tests.test_gradients import OBJECTIVES
from tests.test_promises import NOTED, SETTINGS, Noting
from tests.test_sharing import FOUR, REGULARIZERS
from tests.test_side_effects import assert_same, snapshot

TERM = attrreg.InputGradient()


@pytest.mark.parametrize("name", [name for name in REGULARIZERS if name != "pgd_ex"])
def test_a_mask_that_is_all_relevant_asks_for_nothing(name: str) -> None:
    model, (x, mask, target) = SmoothNet().double(), smooth_batch()
    value = REGULARIZERS[name](model, x, torch.ones_like(mask), target)
    assert float(value.detach()) == 0 and not any(gradient.any() for gradient in gradients(model, value))  # nor is one NaN


TOTAL = attrreg.InputGradient(objective=objectives.TotalVariation())


@pytest.mark.parametrize("regularizer", [TOTAL, attrreg.PGDEx(), attrreg.AdversarialInvariance(hidden=(8,))])
def test_total_variation_pgd_ex_and_invariance_ask_for_something_all_the_same(regularizer: Any) -> None:
    model, (x, mask, target) = SmoothNet().double(), smooth_batch()
    value = regularizer(model, x, torch.ones_like(mask), target)
    assert value > 0 and gradients(model, value)[0].any()


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name not in ("fraction", "energy")])
def test_a_penalty_on_whole_images_takes_an_empty_mask(name: str) -> None:
    model, (x, _, target) = SmoothNet().double(), smooth_batch()
    objective, oracle = OBJECTIVES[name]
    value = attrreg.InputGradient(scores.TaskLoss(), objective)(model, x, torch.zeros(8, 8, dtype=torch.bool), target)
    phi = oracles.input_gradient(model, x, target, oracles.score_task_loss)
    want = oracle(phi, torch.zeros_like(phi[:, :1])).mean()
    torch.testing.assert_close(value, want)
    assert_close(gradients(model, value), gradients(model, want), 1e-10)


class Selective(SmoothNet):
    """Keeps the convolution of its stem, and computes the rest of that again."""

    selective = True

    def forward(self, x: Tensor) -> Tensor:
        keep = partial(create_selective_checkpoint_contexts, [torch.ops.aten.convolution.default])
        settings: dict[str, Any] = {"context_fn": keep} if self.selective else {}
        h: Any = checkpoint(lambda x: self.act(self.stem(x)), x, use_reentrant=False, **settings)
        logits: Tensor = self.head(F.silu(self.body(h)).mean((2, 3)))
        return logits


@pytest.mark.parametrize("way", WAYS)
def test_behind_a_region_that_is_checkpointed_selectively_all_is_right(way: str) -> None:
    model, data, found = Selective().double(), smooth_batch(), []
    for model.selective in (False, True):
        found.append(gradients(model, loss_by(way, attrreg.GradCAM("body"), model, data)))
    assert_close(found[1], found[0], 1e-12)


def test_through_a_region_that_is_checkpointed_selectively_pytorch_goes_once() -> None:
    model, (x, mask, target) = Selective().double(), smooth_batch()
    with pytest.raises(RuntimeError, match="only allowed to backward once"):  # PyTorch's own words, and no wrong gradient
        TERM(model, x, mask, target).backward()


def test_adversarial_invariance_passes_on_all_that_the_call_has() -> None:
    invariance, (x, mask, target) = attrreg.AdversarialInvariance(), smooth_batch()
    invariance._sum = Noting()  # type: ignore[assignment]
    given = SmoothNet(), x, mask, target
    NOTED.clear()
    invariance(*given, fraction=0.5, **SETTINGS)
    invariance.evaluate(*given, **SETTINGS)
    for arguments, settings in NOTED:
        assert all(one is other for one, other in zip(arguments, given, strict=True))
        assert all(settings[name] is value for name, value in SETTINGS.items())
    (_, called), (_, evaluated) = NOTED
    assert called.keys() - SETTINGS.keys() == {"fraction"} and called["fraction"] == 0.5 and evaluated.keys() == SETTINGS.keys()


def test_one_regularizer_serves_two_models_at_once() -> None:
    models, (x, mask, target), reg = [SmoothNet().double() for _ in range(2)], smooth_batch(), TERM + attrreg.GradCAM()
    wants = [reg(model, x, mask, target) for model in models]
    with reg.attach(models[0]), reg.attach(models[1]), passes() as counted:
        for model in models:
            model(x)
        found = [reg(model, x, mask, target) for model in models]
    assert counted.forward == 0
    for model, value, want in zip(models, found, wants, strict=True):
        torch.testing.assert_close(value, want)
        assert_close(gradients(model, value), gradients(model, want), 1e-10)


@pytest.mark.parametrize("way", WAYS)
def test_hooks_on_parameters_see_the_losss_gradient_once_and_whole(way: str) -> None:
    model, data = SmoothNet(norm=True).double(), smooth_batch()
    seen: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        parameter.register_hook(seen.setdefault(name, []).append)
    loss = loss_by(way, FOUR, model, data)
    assert not any(seen.values())  # of the inner backward
    loss.backward()
    for name, parameter in model.named_parameters():
        (gradient,) = seen[name]
        torch.testing.assert_close(gradient, parameter.grad)


def test_a_penalty_under_torch_func_is_refused_and_leaves_nothing() -> None:
    model, (x, mask, target) = SmoothNet().double(), smooth_batch()

    class Penalised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self) -> Tensor:
            return TERM(self.model, x, mask, target)

    whole, before = Penalised(), snapshot(model, x)
    parameters = {name: parameter.detach() for name, parameter in whole.named_parameters()}
    with pytest.raises(RuntimeError, match=r"functorch|torch\.func"):
        torch.func.grad(lambda given: torch.func.functional_call(whole, given, ()))(parameters)
    assert_same(before, snapshot(model, x))


@pytest.mark.cpu
def test_a_fraction_is_drawn_from_the_default_generator_where_none_is_given() -> None:
    model, (x, mask, target), found = SmoothNet().double(), smooth_batch(8), []
    for _ in range(2):
        state = torch.manual_seed(3).get_state()
        found.append([float(TERM(model, x, mask, target, fraction=0.3).detach()) for _ in range(4)])
        assert not torch.equal(torch.get_rng_state(), state)
    assert found[0] == found[1] and len(set(found[0])) > 1


def test_an_objective_gets_the_masks_own_values() -> None:
    model, (x, _, target), seen = SmoothNet().double(), smooth_batch(), list[Tensor]()
    levels = torch.tensor([0.0, 0.5, 1.0, 0.5]).repeat(3, 8, 2)

    def objective(map: Tensor, mask: Tensor) -> Tensor:
        seen.append(mask.clone())
        return map.square().sum((1, 2, 3))

    for mask in (levels, levels[:, None], levels[0]):
        attrreg.InputGradient(objective=objective)(model, x, mask, target)
    assert len(seen) == 3 and all(torch.equal(mask, levels[:, None].double()) for mask in seen)


X = smooth_batch()[0]


@pytest.mark.parametrize(
    "term",
    [
        attrreg.IntegratedGradients(3, X),
        attrreg.IntegratedGradients(3, X, chunk=None, objective=objectives.OutsideFraction()),
        attrreg.IntegratedGradients(3, X, objective=objectives.Energy()),
        attrreg.ActivationDifference("body", X),
        attrreg.ActivationDifference(fill=X) + TERM * 0.0,
    ],
)
def test_an_image_that_is_compared_with_itself_is_not_penalised(term: AttributionRegularizer) -> None:
    model, (_, mask, target) = SmoothNet().double(), smooth_batch()
    value = term(model, X, mask, target)
    assert float(value.detach()) == 0 and not any(gradient.any() for gradient in gradients(model, value))  # nor is one NaN


def test_layers_are_named_as_inside_the_wrapper() -> None:
    model, (x, mask, target) = SmoothNet().double(), smooth_batch()
    wrapped, term = nn.DataParallel(model), attrreg.GradCAM("module.body")
    with pytest.raises(ValueError, match=r"layer 'module\.body' is not in SmoothNet\. Did you mean 'body'"):
        term(wrapped, x, mask, target)
    with pytest.raises(ValueError, match="Did you mean 'body'"):
        term.attach(wrapped)


def test_a_handle_says_whether_it_is_live() -> None:
    handle = TERM.attach(SmoothNet())
    assert handle.live
    handle.remove()
    assert not handle.live


class Views(SmoothNet):
    """Two views of an object, stacked along the height."""

    def forward(self, x: Tensor) -> Tensor:
        views = x.unflatten(2, (2, -1)).movedim(2, 1).flatten(0, 1)
        logits: Tensor = super().forward(views)
        return logits.unflatten(0, (-1, 2)).mean(1)  # type: ignore[no-any-return]


def test_views_may_be_stacked_along_the_height() -> None:
    model, (x, mask, target) = Views().double(), smooth_batch(4)
    x, mask, some = torch.cat([x, x.flip(3)], 2), torch.cat([mask, mask.flip(2)], 1), torch.tensor([True, False, True, True])
    term = attrreg.InputGradient(scores.TargetLogit(), objectives.SquaredOutside())
    for _ in range(2):
        want = oracles.squared_input_gradient(model, x, mask, target)[some].mean()
        value = term(model, x, mask, target, annotated=some)
        torch.testing.assert_close(value, want)
        assert_close(gradients(model, value), gradients(model, want), 1e-10)


class Encoded(nn.Module):
    """A class token is pooled behind a frozen encoder, which PyTorch may run on nested tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.before, self.head = nn.Conv2d(2, 8, 2, 2), nn.Linear(8, 8), nn.Linear(8, 3)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), 2).requires_grad_(False).eval()

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.stem(x).flatten(2).mT
        tokens = self.before(torch.cat([tokens.mean(1, keepdim=True), tokens], 1))
        logits: Tensor = self.head(self.encoder(tokens)[:, 0])
        return logits


def test_the_automatic_layer_is_none_inside_a_frozen_encoder() -> None:
    model, (x, mask, target), term = Encoded().double(), smooth_batch(), attrreg.GradCAM()
    with term.attach(model) as handle:
        model(x)
        assert term(model, x, mask, target) > 0
    assert handle.map == "before"


def test_a_fraction_under_batch_norm_is_never_a_single_image() -> None:
    model, (x, mask, target) = nn.Sequential(SmoothNet(), nn.BatchNorm1d(3)).double(), smooth_batch(6)
    seen: list[int] = []
    model[1].register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    for count in (1, 2, 4):
        annotated = torch.arange(6) < count
        attrreg.InputGradient()(model, x, mask, target, annotated=annotated, fraction=0.2).backward()
    assert seen == [6, 2, 2]


@pytest.mark.parametrize("mends", [False, True])
def test_features_that_a_hook_made_a_leaf_train_nothing(mends: bool) -> None:
    """As `enable_input_require_grads` of Hugging Face's models does, of a frozen backbone."""
    body = [nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)]
    model, (x, mask, _) = nn.Sequential(*body).double(), smooth_batch()
    model[:2].requires_grad_(False)
    model[0].register_forward_hook(lambda module, args, output: output.requires_grad_())
    if mends:
        model[1].requires_grad_(True)
        attrreg.ActivationDifference("1")(model, x, mask).backward()
        return
    with pytest.raises(RuntimeError, match="no path to any trainable parameter"):
        attrreg.ActivationDifference("1")(model, x, mask)


class OwnPenalty(nn.Module):
    """Makes its images differentiable, for a gradient penalty of the loop's own."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.images = model, torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        self.images = x.requires_grad_()
        logits: Tensor = self.model(self.images.flip(3))
        return logits


def test_a_loop_may_take_gradients_at_images_that_its_model_made_differentiable() -> None:
    model, (x, _, target) = OwnPenalty(SmoothNet()).double(), smooth_batch()
    found = []
    for way in ("unattached", "attached"):
        reg = TERM if way == "attached" else attrreg.GradCAM("model.body")
        with reg.attach(model):
            loss = F.cross_entropy(model(x.clone()), target)
            (gradient,) = torch.autograd.grad(loss, model.images, create_graph=True)
            found.append([gradient, *gradients(model, loss + gradient.square().sum())])
    assert_close(found[1], found[0], 1e-10)
