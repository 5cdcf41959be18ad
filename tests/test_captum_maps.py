"""Maps in Captum's metrics and collections: of one image, of tokens, under no_grad; and ReLU layers that are more than that."""

from __future__ import annotations

from typing import Any

import captum.attr
import captum.metrics
import pytest
import timm
import torch
from torch import Tensor, nn

import attrreg
from attrreg import metrics
from tests.models import SmoothNet, smooth_batch

torchmetrics = pytest.importorskip("torchmetrics")
from attrreg.metrics import modules  # noqa: E402

pytestmark = pytest.mark.cpu


def sensitivity(explain: Any, x: Tensor, target: Any) -> Tensor:
    torch.manual_seed(1)
    found: Tensor = captum.metrics.sensitivity_max(explain, x, target=target)
    return found


@pytest.mark.parametrize("target", [torch.tensor([1]), torch.tensor(1), 1])
@pytest.mark.parametrize("images", [1, 2])
def test_one_class_for_all_images(target: Any, images: int) -> None:
    model, x = SmoothNet().double(), smooth_batch()[0][:images]

    def theirs(given: tuple[Tensor], target: Any) -> tuple[Tensor]:
        return (captum.attr.Saliency(model).attribute(given[0].clone().requires_grad_(), target, abs=False),)

    want = sensitivity(theirs, x, 1)
    torch.testing.assert_close(sensitivity(attrreg.captum.explanation_func(attrreg.InputGradient(), model), x, target), want)


@pytest.mark.parametrize("kind", [attrreg.captum.LayerGradientXActivation, attrreg.captum.LayerActivation])
def test_maps_of_tokens(kind: Any) -> None:
    model = timm.create_model("test_vit", num_classes=3, img_size=64).eval()
    x, target = torch.rand(2, 3, 64, 64), torch.tensor([0, 2])
    term = kind("blocks.0")
    assert not term.attribute(model, x, target).is_contiguous()
    explain = attrreg.captum.explanation_func(term, model)
    torch.testing.assert_close(explain(x, target), term.attribute(model, x, target))
    assert sensitivity(explain, x, target).shape == (2,)


def by_gradient(model: Any, x: Tensor, target: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(model(x).gather(1, target[:, None]).sum(), x)[0]


def test_an_attribution_of_ones_own_may_take_gradients() -> None:
    model, (x, mask, target) = SmoothNet().double(), smooth_batch()
    want, metric = metrics.judged(model, x, mask, target, by_gradient), modules.Judged(by_gradient)
    metric.update(model, x, mask, target)  # which torchmetrics runs under no_grad
    torch.testing.assert_close(metric.compute(), want.mean())
    with torch.no_grad():
        torch.testing.assert_close(metrics.judged(model, x, mask, target, by_gradient), want)
        assert not torch.is_grad_enabled()


def test_judges_by_other_large_images_are_other_metrics() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 5, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 14 * 14, 2)).eval()
    x, target, mask = torch.rand(4, 3, 32, 32), torch.tensor([0, 1, 0, 1]), torch.zeros(4, 32, 32, dtype=torch.bool)
    mask[:, 8:24, 8:24] = True
    judges = {
        str(place): attrreg.IntegratedGradients(steps=3, baseline=image).attribute
        for place, image in enumerate((torch.zeros(3, 32, 32), 3 * torch.rand(3, 32, 32)))
    }
    together = torchmetrics.MetricCollection({name: modules.Judged(judge) for name, judge in judges.items()})
    together.update(model, x, mask, target, torch.zeros(4, dtype=torch.bool))  # after which all have the same state
    together.update(model, x, mask, target)
    for name, value in together.compute().items():
        torch.testing.assert_close(value, metrics.judged(model, x, mask, target, judges[name]).double().mean())


def test_an_area_keeps_its_scores_in_a_module_that_is_cast() -> None:
    torch.manual_seed(0)
    logits = torch.stack([torch.zeros(200), 10 + 1e-3 * torch.randn(200)], dim=1)
    target, metric = (logits[:, 1] > 10).long(), modules.LogitDifferenceAUC()
    metric.update(logits, target)
    nn.ModuleList([metric]).to(torch.bfloat16)
    assert metric.compute().item() == metrics.auc(logits, target) == 1


def test_occlusion_of_signals() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, (1, 5)), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 16, 2)).double()
    x, target = torch.rand(3, 2, 1, 20, dtype=torch.float64), torch.tensor([0, 1, 1])
    phi = metrics.Occlusion(window=5, stride=5)(model, x, target)
    with torch.no_grad():
        for start in range(0, 20, 5):
            covered = x.clone()
            covered[..., start : start + 5] = 0
            fall = (model(x) - model(covered)).gather(1, target[:, None]).float()  # Captum's accumulates in float32
            torch.testing.assert_close(phi[:, 0, 0, start : start + 5], fall.expand(-1, 5))
    with pytest.raises(ValueError, match=r"window=21 is larger than images of \(1, 20\)"):
        metrics.Occlusion(window=21)(model, x, target)


def net(relu: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 6, 3), relu, nn.Conv2d(6, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(6 * 16, 3)).double().eval()


class Gained(nn.ReLU):
    """As networks without normalisation have it."""

    def forward(self, x: Tensor) -> Tensor:
        return 1.7 * super().forward(x)


@pytest.mark.filterwarnings("ignore:Setting backward hooks on ReLU:UserWarning")
@pytest.mark.parametrize("name", ["GuidedBackprop", "Deconvolution"])
def test_what_a_hook_makes_of_a_relus_output_stays(name: str) -> None:
    model, (x, mask, target) = net(relu := nn.ReLU()), smooth_batch()
    relu.register_forward_hook(lambda module, args, output: 1.7 * output)
    kind = getattr(captum.attr, name)
    want = kind(model).attribute(x.clone().requires_grad_(), target=target)
    factor = 1.7 if name == "Deconvolution" else 1.0  # which in Captum's lets no factor behind the layer through
    torch.testing.assert_close(attrreg.from_captum(kind).attribute(model, x, target), factor * want.detach())
    with pytest.raises(ValueError, match=r"Gained is a ReLU with a forward of its own.*Make it an nn\.ReLU layer"):
        attrreg.from_captum(kind)(net(Gained()), x, mask, target)
