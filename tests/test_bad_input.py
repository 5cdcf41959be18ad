"""Bad input: a clear error that names what is wrong and the remedy, and nothing changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attrreg
from attrreg import baselines, masks, objectives, scores
from attrreg.needs import Grad
from attrreg.sites import INPUT
from attrreg.trace import passes
from tests.models import SmoothNet, smooth_batch
from tests.test_side_effects import assert_same, snapshot

x, mask, target = smooth_batch()
N = len(x)
TERM = attrreg.InputGradient()


class Wrapped(nn.Module):
    """A model whose output needs selecting."""

    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.inner = SmoothNet().double()
        self.wrap = wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.inner(x))


@dataclass
class Output:
    logits: Tensor


def nan_mask() -> Tensor:
    values = mask.double()
    values[0, 0, 0] = float("nan")
    return values


def empty_for(index: int) -> Tensor:
    values = mask.clone()
    values[index] = False
    return values


@dataclass(frozen=True, repr=False)
class Bare(attrreg.InputGradient):
    def needs(self) -> Any:
        return Grad(INPUT, self.score)


def call(**changes: Any) -> Callable[..., Tensor]:
    regularizer = changes.pop("reg", TERM)
    settings = {"x": x, "mask": mask, "target": target} | changes
    return lambda model, evaluate=False: regularizer.evaluate(model, **settings).total if evaluate else regularizer(model, **settings)


# name -> (what is done with a model, the exception, words of its message)
BEFORE_COMPUTE: dict[str, tuple[Callable[[nn.Module], Any], type[Exception], list[str]]] = {
    "mask batch": (call(mask=mask[:2]), ValueError, ["mask", "2 images", "3"]),
    "mask rank": (call(mask=mask[None, None]), ValueError, ["mask", "(N, H, W)"]),
    "mask channels": (call(mask=mask[:, None].repeat(1, 2, 1, 1)), ValueError, ["mask", "(N, 1, H, W)"]),
    "mask vector": (call(mask=mask[0, 0]), ValueError, ["mask"]),
    "mask integer": (call(mask=mask.long()), TypeError, ["mask", "int64", "mask > 0"]),
    "mask complex": (call(mask=mask.to(torch.complex64)), TypeError, ["mask", "complex64"]),
    "mask none": (call(mask=None), TypeError, ["mask", "NoneType", "annotated="]),
    "mask list": (call(mask=list(mask)), TypeError, ["mask", "list", "torch.stack"]),
    "mask nan": (call(mask=nan_mask()), ValueError, ["mask", "NaN"]),
    "mask above one": (call(mask=mask.double() * 255), ValueError, ["mask", "[0, 1]", "255"]),
    "mask below zero": (call(mask=mask.double() - 1), ValueError, ["mask", "[0, 1]"]),
    "mask without pixels": (call(mask=torch.ones(N, 0, 4)), ValueError, ["mask"]),
    "empty mask, fraction": (
        call(reg=attrreg.InputGradient(objective=objectives.OutsideFraction()), mask=empty_for(1)),
        ValueError,
        ["mask of image 1", "OutsideFraction", "annotated="],
    ),
    "empty mask, energy": (
        call(reg=TERM + attrreg.InputXGradient(objective=objectives.Energy()), mask=torch.zeros(8, 8)),
        ValueError,
        ["mask of image 0", "Energy", "LogOutside"],
    ),
    "annotated dtype": (call(annotated=torch.ones(N)), TypeError, ["annotated", "float32", "bool"]),
    "annotated list": (call(annotated=[True] * N), TypeError, ["annotated", "list"]),
    "annotated shape": (call(annotated=torch.ones(2, dtype=torch.bool)), ValueError, ["annotated", "(3,)"]),
    "target missing": (
        call(reg=attrreg.InputGradient(scores.TargetLogit()), target=None),
        ValueError,
        ["InputGradient", "TargetLogit", "target="],
    ),
    "target missing on a named term": (
        call(reg=TERM + attrreg.GradCAM("body", score=scores.Contrast()).named("heat"), target=None),
        ValueError,
        ["heat", "Contrast", "target="],
    ),
    "target negative": (call(target=torch.tensor([0, -1, 1])), ValueError, ["target", "-1", "target.clamp(min=0)"]),
    "target float": (call(target=target.double()), TypeError, ["target", "float64", "target.long()"]),
    "target one-hot": (
        call(reg=attrreg.InputGradient(scores.TargetLogit()), target=torch.eye(3).long()),
        ValueError,
        ["target", "(3,)", "(3, 3)"],
    ),
    "target list": (call(target=target.tolist()), TypeError, ["target", "list", "as_tensor"]),
    "target of one for all": (call(target=target[:1]), ValueError, ["target", "(3,)", "(1,)"]),
    "target scalar": (call(target=target[0]), ValueError, ["target", "(3,)", "()"]),
    "needs that are no tuple": (call(reg=Bare()), TypeError, ["Bare", "Grad", "(need,)"]),
    "attach needs that are no tuple": (lambda model: Bare().attach(model), TypeError, ["Bare", "Grad", "(need,)"]),
    "unknown layer": (call(reg=attrreg.GradCAM(layer="boddy")), ValueError, ["GradCAM", "'boddy'", "'body'"]),
    "unknown layer, far off": (call(reg=attrreg.GradCAM(layer="zzzz")), ValueError, ["'zzzz'", "stem"]),
    "unknown layer of a difference": (call(reg=attrreg.ActivationDifference("stm")), ValueError, ["ActivationDifference", "'stem'"]),
    "unknown layer of a score": (call(reg=attrreg.InputGradient(scores.RandomProjection("hed"))), ValueError, ["'hed'", "'head'"]),
    "integer x": (call(x=x.long()), TypeError, ["x", "int64", "255"]),
    "x without channels": (call(x=x[:, 0]), ValueError, ["x", "(N, C, H, W)"]),
    "x of volumes": (call(x=x[:, :, None]), ValueError, ["x", "(N, C, H, W)", "slices below each other"]),
    "x list": (call(x=[x]), TypeError, ["x", "list", "torch.stack(x)"]),
    "empty batch": (call(x=x[:0], mask=mask[:0], target=target[:0]), ValueError, ["x"]),
    "model": (
        lambda model: TERM(model.forward, x, mask, target),  # type: ignore[arg-type]
        TypeError,
        ["model", "Module"],
    ),
    "attach to a function": (
        lambda model: TERM.attach(model.forward),  # type: ignore[arg-type]
        TypeError,
        ["model"],
    ),
    "attach an unknown layer": (lambda model: attrreg.GradCAM("bod").attach(model), ValueError, ["'bod'", "'body'"]),
    "frozen": (lambda model: call()(model.requires_grad_(False)), RuntimeError, ["frozen", "requires_grad"]),
    "frozen, x asks for a gradient": (
        lambda model: call(x=x.clone().requires_grad_())(model.requires_grad_(False)),
        RuntimeError,
        ["frozen", "requires_grad"],
    ),
    "inputs without x": (call(inputs=(x.clone(),)), ValueError, ["inputs must hold x itself"]),
    "inputs with x twice": (call(inputs=(x, x)), ValueError, ["inputs must hold x itself, once"]),
    "inputs list": (call(inputs=[x]), TypeError, ["inputs must be a tuple"]),
    "baseline shape": (
        call(reg=attrreg.IntegratedGradients(baseline=torch.zeros(5, 5, dtype=torch.float64))),
        ValueError,
        ["baseline", "(5, 5)"],
    ),
}


@pytest.mark.parametrize("name", BEFORE_COMPUTE)
def test_before_compute(name: str) -> None:
    action, kind, words = BEFORE_COMPUTE[name]
    model = SmoothNet(norm=True).double()
    before = snapshot(model, x)
    with passes() as counted, pytest.raises(kind) as caught:
        action(model)
    assert counted.forward == 0 and counted.backward == 0
    check_message(caught.value, words)
    assert_same(before, snapshot(model, x), but=("parameters",) if name.startswith("frozen") else ())


def check_message(error: Exception, words: list[str]) -> None:
    text = str(error)
    for word in words:
        assert word in text
    assert text.endswith((".", "?")) and text.count(". ") >= 1, "one sentence of cause and one of remedy"


# The number of classes, and what layers and models return, are known only after the forward.
AFTER_FORWARD: dict[str, tuple[Callable[[nn.Module, bool], Any], type[Exception], list[str]]] = {
    "target too large": (call(target=torch.tensor([0, 3, 1])), ValueError, ["target", "class 3", "3 classes"]),
    "no spatial map": (call(reg=attrreg.GradCAM(layer="head")), ValueError, ["'head'", "spatial map"]),
    "layer behind the score": (call(reg=attrreg.GradCAM("body", score=scores.RandomProjection("stem"))), RuntimeError, ["'body'"]),
    "loss of each label": (
        call(reg=attrreg.InputGradient(scores.TaskLoss(nn.BCEWithLogitsLoss(reduction="none"))), target=torch.rand(N, 3).double()),
        ValueError,
        ["TaskLoss", "one number an image", ".sum(1)"],
    ),
    "loss that reduces": (
        call(reg=attrreg.InputGradient(scores.TaskLoss(nn.functional.cross_entropy))),
        ValueError,
        ["TaskLoss", "one number an image"],
    ),
    "objective that reduces": (
        call(reg=attrreg.InputGradient(objective=lambda map, mask: map.sum())),
        ValueError,
        ["InputGradient", "one an image"],
    ),
}


@pytest.mark.parametrize("name", AFTER_FORWARD)
@pytest.mark.parametrize("way", ["call", "evaluate"])
def test_after_the_forward(name: str, way: str) -> None:
    action, kind, words = AFTER_FORWARD[name]
    model = SmoothNet(norm=True, dropout=0.2).double()
    before = snapshot(model, x)
    with pytest.raises(kind) as caught:
        action(model, way == "evaluate")
    check_message(caught.value, words)
    assert_same(before, snapshot(model, x))


@pytest.mark.parametrize("score", [scores.Contrast(), scores.SumLogProb(), scores.TargetLogProb(), scores.TaskLoss()])
def test_fewer_than_two_classes(score: scores.Score) -> None:
    model = SmoothNet(classes=1).double()
    with pytest.raises(ValueError, match=type(score).__name__):
        attrreg.InputGradient(score)(model, x, mask, torch.zeros_like(target))


def test_logits_of_another_rank() -> None:
    model = nn.Conv2d(2, 3, 1).double()
    with pytest.raises(ValueError, match=r"Contrast needs logits \(N, C\).*output="):
        TERM(model, x, mask, target)


@pytest.mark.parametrize(
    ("wrap", "selectors"),
    [
        (lambda logits: (logits, None), [0, lambda out: out[0]]),
        (lambda logits: {"logits": logits, "aux": None}, ["logits", lambda out: out["logits"]]),
        (lambda logits: Output(logits), ["logits", lambda out: out.logits]),
    ],
    ids=["tuple", "dict", "dataclass"],
)
def test_wrapped_outputs_need_a_selector(wrap: Callable[[Tensor], Any], selectors: list[Any]) -> None:
    model = Wrapped(wrap)
    with pytest.raises(TypeError, match=r"output: the model returned a .*`output=`"):
        TERM(model, x, mask, target)
    want = TERM(model.inner, x, mask, target)
    for selector in selectors:
        torch.testing.assert_close(TERM(model, x, mask, target, output=selector), want)
        assert type(TERM.evaluate(model, x, mask, target, output=selector).output) is type(model(x))
        map = attrreg.InputGradient().attribute(model, x, target, output=selector)
        torch.testing.assert_close(map, TERM.attribute(model.inner, x, target))
        with TERM.attach(model):
            model(x)
            torch.testing.assert_close(TERM(model, x, mask, target, output=selector), want)


@pytest.mark.parametrize(
    ("wrap", "selector", "said"),
    [
        (lambda logits: {"logits": logits, "aux": None}, "aux", "in which output='aux' is a NoneType"),
        (lambda logits: {"logits": logits}, "nothing", "output='nothing' does not fit a dict"),
        (lambda logits: (logits, None), 2, "output=2 does not fit a tuple"),
        (Output, "nothing", "output='nothing' does not fit a Output"),
        (lambda logits: logits, 0, "output=0 does not fit a Tensor.*Leave output= out"),  # no image's row
    ],
)
def test_wrong_selector(wrap: Callable[[Tensor], Any], selector: Any, said: str) -> None:
    with pytest.raises(TypeError, match=said):
        TERM(Wrapped(wrap), x, mask, target, output=selector)


def test_without_gradients() -> None:
    model = SmoothNet().double()
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"no_grad.*\. "):
        TERM(model, x, mask, target)
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"inference_mode.*\. "):
        TERM(model, x, mask, target)
    with torch.inference_mode():
        made_there = x + 1
    with pytest.raises(RuntimeError, match="inference_mode"):
        TERM(model, made_there, mask, target)


def test_attach_twice() -> None:
    model = SmoothNet().double()
    with TERM.attach(model), pytest.raises(RuntimeError, match=r"already has an attachment.*Remove"):
        attrreg.GradCAM().attach(model)
    with TERM.attach(model):
        pass


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf"), -1])
def test_weights(weight: float) -> None:
    with pytest.raises(ValueError, match="weight"):
        weight * TERM
    with pytest.raises(ValueError, match="weight"):
        (TERM + attrreg.InputXGradient()) * weight


def test_things_that_are_no_weights_or_terms() -> None:
    for other in ("2", None, True, torch.ones(2)):
        with pytest.raises(TypeError):
            TERM * other  # type: ignore[operator]
    for addend in (1, 0.5, "term"):
        with pytest.raises(TypeError):
            TERM + addend


def test_names() -> None:
    with pytest.raises(ValueError, match=r"'InputGradient'.*named"):
        TERM + 0.5 * attrreg.InputGradient(scores.PredictedLogit())
    with pytest.raises(ValueError, match="no single name"):
        (TERM + attrreg.InputXGradient()).named("both")
    for name in ("", 5):
        with pytest.raises(ValueError, match="name must be a non-empty string"):
            TERM.named(name)  # type: ignore[arg-type]


SETTINGS: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: attrreg.IntegratedGradients(chunk=0), ValueError, "chunk"),
    (lambda: attrreg.IntegratedGradients(rule="simpson"), ValueError, "gausslegendre"),
    (lambda: attrreg.IntegratedGradients(baseline="zero"), TypeError, "baseline"),  # type: ignore[arg-type]
    (lambda: attrreg.ExpectedGradients(baseline=baselines.Masked(), objective=objectives.OutsideFraction()), ValueError, "a share of"),
    (lambda: attrreg.IntegratedGradients(baseline=baselines.Shuffle(), objective=objectives.Energy()), ValueError, "a share of"),
    (lambda: attrreg.IntegratedGradients(baseline=torch.tensor(float("nan"))), ValueError, "finite"),
    (lambda: attrreg.ExpectedGradients()(SmoothNet().double(), x[:1], mask[:1]), ValueError, "batch of one"),
    (lambda: attrreg.InputGradient("TargetLogit"), TypeError, "score must be"),  # type: ignore[arg-type]
    (lambda: attrreg.InputGradient(scores.TargetLogit), TypeError, "score must be"),  # type: ignore[arg-type]
    (lambda: attrreg.GradCAM(objective=objectives.Energy), TypeError, "objective must be"),  # type: ignore[arg-type]
    (lambda: attrreg.IntegratedGradients(objective=None), TypeError, "objective must be"),  # type: ignore[arg-type]
    (lambda: TERM(SmoothNet().double(), x, mask, generator=3), TypeError, "generator"),  # type: ignore[arg-type]
    (lambda: TERM(SmoothNet().double(), x, mask, output=True), TypeError, "output must be an index"),
    (lambda: TERM(SmoothNet().double(), x, mask, output=1.5), TypeError, "output must be an index"),  # type: ignore[arg-type]
    (lambda: 1e300 * (1e300 * TERM), ValueError, "weight of InputGradient"),
    (lambda: scores.RandomProjection(None), TypeError, "layer"),  # type: ignore[arg-type]
    (lambda: masks.from_boxes([[(0, 0, 4)]], (8, 8)), ValueError, r"boxes\[0\].*\(K, 4\)"),
    (lambda: masks.from_boxes([[(0, 0, 4, 4)]], 8), ValueError, "size"),  # type: ignore[arg-type]
    (lambda: attrreg.ExpectedGradients(samples=0), ValueError, "samples"),
    (lambda: attrreg.ExpectedGradients(chunk=-1), ValueError, "chunk"),
    (lambda: attrreg.GradCAM(layer=nn.Linear(1, 1)), TypeError, "layer"),  # type: ignore[arg-type]
    (lambda: attrreg.GradCAM(layer=""), TypeError, "layer"),
    (lambda: attrreg.ActivationDifference(()), TypeError, "layers"),
    (lambda: attrreg.ActivationDifference((nn.Linear(1, 1),)), TypeError, "layers"),  # type: ignore[arg-type]
    (lambda: attrreg.ActivationDifference(detach="both"), ValueError, "detach"),  # type: ignore[arg-type]
    (lambda: TERM.reduced("median"), ValueError, "reduction"),  # type: ignore[arg-type]
    (lambda: baselines.Blur(0), ValueError, "sigma"),
    (lambda: baselines.Noise(-1), ValueError, "Noise"),
    (lambda: masks.from_boxes([[(4, 0, 2, 3)]], (8, 8)), ValueError, r"boxes\[0\]"),
    (lambda: (TERM + attrreg.InputXGradient()).attribute(SmoothNet(), x), TypeError, "attribute"),
    (lambda: attrreg.ActivationDifference().attribute(SmoothNet(), x), TypeError, "no attribution map"),
    (
        lambda: attrreg.ExpectedGradients(baseline=baselines.Masked()).attribute(SmoothNet().double(), x),
        ValueError,
        "ExpectedGradients: .*mask=",
    ),
]


@pytest.mark.parametrize(("build", "kind", "word"), SETTINGS)
def test_settings(build: Callable[[], Any], kind: type[Exception], word: str) -> None:
    with pytest.raises(kind, match=word) as caught:
        build()
    check_message(caught.value, [])
