"""Attribution maps equal Captum's."""

from __future__ import annotations

import captum.attr
import pytest
import torch
from captum.attr._utils.approximation_methods import approximation_parameters
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import attrreg
from attrreg import baselines, points
from tests.models import FAMILIES, SmoothNet, batch, smooth_batch, stir

PRECISION = [(torch.float32, 1e-5), (torch.float64, 1e-10)]


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=PRECISION, ids=["float32", "float64"])
def case(request: pytest.FixtureRequest, family: str) -> tuple[nn.Module, Tensor, Tensor, str, float]:
    """A model in eval mode, images, targets, a layer, a tolerance."""
    dtype, tolerance = request.param
    known = FAMILIES[family]
    model = known.build().eval().to(dtype)
    stir(model, 0.01)
    x, _, target = batch(2, size=known.size, classes=4, dtype=dtype)
    return model, x, target, known.layer, tolerance


def same(got: Tensor, want: Tensor, tolerance: float) -> None:
    assert got.shape == want.shape
    assert not got.requires_grad
    want = want.detach()  # Captum's product carries a graph (and a wrong one)
    assert float(want.abs().max()) > 0
    assert float((got - want).norm() / want.norm()) <= tolerance


def test_gradients_equal_captum(case: tuple[nn.Module, Tensor, Tensor, str, float]) -> None:
    model, x, target, layer, tolerance = case
    with sdpa_kernel(SDPBackend.MATH):  # the same kernel on both sides: fused attention rounds differently
        saliency = captum.attr.Saliency(model).attribute(x.clone().requires_grad_(), target=target, abs=False)
        product = captum.attr.InputXGradient(model).attribute(x.clone().requires_grad_(), target=target)
        cam = captum.attr.LayerGradCam(model, model.get_submodule(layer)).attribute(x, target=target).detach()
    same(attrreg.InputGradient().attribute(model, x, target=target), saliency, tolerance)
    same(attrreg.InputXGradient().attribute(model, x, target=target), product, tolerance)
    same(attrreg.GradCAM(layer=layer).attribute(model, x, target=target), cam, tolerance)
    clipped = attrreg.GradCAM(layer=layer, relu=True).attribute(model, x, target=target)
    torch.testing.assert_close(clipped, cam.relu(), rtol=0, atol=tolerance * float(cam.norm()))


def test_integrated_gradients_equal_captum(case: tuple[nn.Module, Tensor, Tensor, str, float]) -> None:
    model, x, target, _, tolerance = case
    start = 0.3 * torch.randn_like(x[:1])
    with sdpa_kernel(SDPBackend.MATH):
        want = captum.attr.IntegratedGradients(model).attribute(x, baselines=start, target=target, n_steps=3)
    got = attrreg.IntegratedGradients(steps=3, baseline=start).attribute(model, x, target=target)
    same(got, want, tolerance)


@pytest.mark.cpu
@pytest.mark.parametrize("rule", points.RULES)
def test_places_are_captums_whatever_the_default_type(rule: str, half_by_default: None) -> None:
    points.places.cache_clear()
    found = points.places(rule, 50)
    torch.set_default_dtype(torch.float32)
    sizes, alphas = approximation_parameters(rule)
    assert [alpha for alpha, _ in found] == list(alphas(50))
    assert [weight for _, weight in found] == torch.tensor(sizes(50), dtype=torch.float32).tolist()


@pytest.mark.parametrize("rule", points.RULES)
def test_quadrature_rules_equal_captum(rule: str) -> None:
    model = FAMILIES["resnet"].build().eval().double()
    x, _, target = batch(2, size=64, classes=4, dtype=torch.float64)
    want = captum.attr.IntegratedGradients(model).attribute(x, target=target, n_steps=5, method=rule)
    same(attrreg.IntegratedGradients(steps=5, rule=rule).attribute(model, x, target=target), want, 1e-10)


def test_baselines_equal_captum_given_their_images() -> None:
    model = FAMILIES["resnet"].build().eval()
    x, mask, target = batch(2, size=64, classes=4)
    relevant = mask.unsqueeze(1).float()
    generator = torch.Generator()
    for baseline in (baselines.Zero(), baselines.Mean(), baselines.Blur(2.0), baselines.Masked(baselines.Zero())):
        image = baseline(x, relevant, generator)
        want = captum.attr.IntegratedGradients(model).attribute(x, baselines=image, target=target, n_steps=3)
        got = attrreg.IntegratedGradients(steps=3, baseline=baseline).attribute(model, x, target=target, mask=mask)
        same(got, want, 1e-5)


def test_integrated_gradients_are_complete() -> None:
    """They sum to the difference of the scores: a property Captum is not needed for."""
    model, (x, _, target) = SmoothNet().double(), smooth_batch()
    phi = attrreg.IntegratedGradients(steps=64).attribute(model, x, target=target)
    with torch.no_grad():
        change = (model(x) - model(torch.zeros_like(x))).gather(1, target[:, None])[:, 0]
    torch.testing.assert_close(phi.sum(dim=(1, 2, 3)), change, rtol=1e-6, atol=1e-7)


def test_attribute_works_without_gradients_and_on_frozen_models() -> None:
    model = FAMILIES["resnet"].build().eval()
    x, _, target = batch(2, size=64, classes=4)
    for term in (attrreg.InputGradient(), attrreg.GradCAM("layer4"), attrreg.GradCAM(), attrreg.IntegratedGradients(steps=2)):
        want = term.attribute(model, x, target=target)
        model.requires_grad_(False)
        with torch.no_grad():
            torch.testing.assert_close(term.attribute(model, x, target=target), want)
        with torch.inference_mode():  # in which a loader makes all that it gives
            torch.testing.assert_close(term.attribute(model, x.clone(), target=target.clone()).clone(), want)
        model.requires_grad_(True)


def test_a_map_of_integer_images_is_refused() -> None:
    x, _, target = smooth_batch()
    with pytest.raises(TypeError, match=r"x must be a floating-point tensor, got torch\.int64"):
        attrreg.InputGradient().attribute(SmoothNet(), x.long(), target)


def test_attribute_takes_all_that_was_made_under_inference_mode() -> None:
    class Conditioned(SmoothNet):
        def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
            return super().forward(x) * (1.0 if condition is None else condition)

    model, (x, mask, target) = Conditioned().double(), smooth_batch()
    term = attrreg.IntegratedGradients(steps=2, baseline=attrreg.baselines.Masked(attrreg.baselines.Blur()))
    condition, soft = torch.ones(len(x), 1, dtype=x.dtype), mask.to(x.dtype) / 2
    want = term.attribute(model, x, target=target, mask=soft, inputs=(x, condition))
    with torch.inference_mode():
        x, soft, condition = x.clone(), soft.clone(), condition.clone()
        for inputs in ((x, condition), {"x": x, "condition": condition}):
            torch.testing.assert_close(term.attribute(model, x, target=target, mask=soft, inputs=inputs).clone(), want)


def test_tokens_are_read_as_a_grid() -> None:
    """Captum takes tokens for channels; on a layer turned into (N, C, h, w) it gives what is given here."""
    model = FAMILIES["vit"].build().eval().double()
    x, _, target = batch(2, size=64, classes=4, dtype=torch.float64)
    got = attrreg.GradCAM(layer="blocks.2.norm1").attribute(model, x, target=target)
    kept: list[Tensor] = []
    hook = model.get_submodule("blocks.2.norm1").register_forward_hook(lambda module, args, output: kept.append(output))
    with sdpa_kernel(SDPBackend.MATH):
        score = model(x).gather(1, target[:, None]).sum()
    hook.remove()
    (gradient,) = torch.autograd.grad(score, kept[0])
    side = got.shape[-1]
    patches, slopes = kept[0][:, -side * side :], gradient[:, -side * side :]
    want = (patches * slopes.mean(dim=1, keepdim=True)).sum(dim=2).reshape(2, 1, side, side).detach()
    same(got, want, 1e-10)


def test_random_places_are_an_images_own_each_from_a_baseline_of_its_own() -> None:
    x, path = torch.rand(3, 2, 4, 4, dtype=torch.float64), points.RandomPlaces(baselines.Noise(), 4, None)
    stops = path.stops(x, None, torch.Generator().manual_seed(0))
    places = torch.stack([torch.as_tensor(stop.alpha) for stop in stops])
    assert places.shape == (4, 3, 1, 1, 1) and places.dtype == x.dtype and places.unique().numel() == 12
    assert ((places >= 0) & (places < 1)).all() and [stop.weight for stop in stops] == [0.25] * 4
    assert len({stop.baseline.sum().item() for stop in stops}) == 4
