"""Compiled, scripted and data-parallel models, and models with several inputs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import attrreg
from attrreg import engines
from attrreg.regularizer import AttributionRegularizer
from attrreg.trace import passes
from tests.models import DEVICE, WAYS, SmoothNet, accumulated, assert_close, gradients, loss_by, smooth_batch

TERMS = attrreg.InputGradient() + attrreg.GradCAM("body") + attrreg.ActivationDifference(fill=attrreg.baselines.Zero())


class OnADevice(nn.Module):
    """Makes what it makes on the device of the images."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = SmoothNet()

    def forward(self, x: Tensor) -> Tensor:
        with torch.device(x.device):
            logits: Tensor = self.inside(x) * torch.ones(3)
        return logits


@pytest.mark.parametrize("around", [nullcontext(), torch.device("cpu")])
@pytest.mark.parametrize("way", WAYS)
def test_a_model_that_chooses_a_device_inside(way: str, around: Any) -> None:
    model, (x, mask, target) = OnADevice().double(), smooth_batch()
    before = torch.overrides._get_current_function_mode_stack()
    for name in ("body", "act"):  # from where our operators start while the model is inside
        term = attrreg.GradCAM(f"inside.{name}")
        want = attrreg.GradCAM(name)(model.inside, x, mask, target)
        with around:
            loss = loss_by(way, term, model, (x, mask, target))
        torch.testing.assert_close(loss - F.cross_entropy(model(x), target), want)
    assert torch.overrides._get_current_function_mode_stack() == before


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        yield
        dist.destroy_process_group()


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="aot_eager")
    return model


def compiled_forward(model: nn.Module) -> nn.Module:
    model.forward = torch.compile(model.forward, backend="aot_eager")
    return model


def compiled_part(model: nn.Module) -> nn.Module:
    model.body.compile(backend="aot_eager")  # type: ignore[union-attr]
    return model


COMPILED: dict[str, Any] = {
    "compiled": lambda model: torch.compile(model, backend="aot_eager"),
    "compiled in place": compiled_in_place,
    "its forward compiled": compiled_forward,
    "a part compiled": compiled_part,
}


@pytest.mark.parametrize("kind", COMPILED)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:The .grad attribute")
def test_compiled_models_are_run_uncompiled(kind: str) -> None:
    plain, (x, mask, target) = SmoothNet().double(), smooth_batch()
    value = TERMS(plain, x, mask, target)
    want = gradients(plain, value)
    model = COMPILED[kind](plain)
    logits = model(x)
    got = TERMS(model, x, mask, target)
    torch.testing.assert_close(got, value)
    assert_close(gradients(plain, got), want, 1e-10)
    penalty = TERMS.evaluate(model, x, mask, target)
    torch.testing.assert_close(penalty.output, logits)
    torch.testing.assert_close(attrreg.InputGradient().attribute(model, x, target), attrreg.InputGradient().attribute(plain, x, target))
    with pytest.warns(UserWarning, match="compiled.*its own: uncompiled"):
        handle = TERMS.attach(model)
    with handle, passes() as counted:
        loss = F.cross_entropy(model(x), target) + TERMS(model, x, mask, target)
        loss.backward()
    assert counted.forward == 2
    task = gradients(plain, F.cross_entropy(SmoothNet.forward(plain, x) if kind == "compiled" else model(x), target))
    assert_close(accumulated(plain), [a + b for a, b in zip(task, want, strict=True)], 1e-10)


@pytest.mark.parametrize(
    "make",
    [
        lambda: attrreg.InputGradient(),
        lambda: attrreg.InputGradient() + attrreg.GradCAM("body"),
        lambda: attrreg.Scheduled(attrreg.InputGradient(), attrreg.schedules.Every(2)),
        lambda: attrreg.AdversarialInvariance(),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_the_warning_of_a_compiled_model_names_the_line_that_attaches(make: Callable[[], Any]) -> None:
    model = torch.compile(SmoothNet(), backend="eager")
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        make().attach(model).remove()
    assert [warning.filename for warning in found if "compiled" in str(warning.message)] == [__file__]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:The .grad attribute")
@pytest.mark.parametrize(
    ("regularizer", "compiled"), [(attrreg.InputGradient(), True), (attrreg.IntegratedGradients(2), True), (attrreg.GradCAM("body"), False)]
)
def test_finite_differences_run_compiled_where_no_layer_is_named(regularizer: AttributionRegularizer, compiled: bool) -> None:
    torch._dynamo.reset()
    ran: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        def run(*args: Any) -> Any:
            ran.append(1)
            return graph(*args)

        return run

    plain, (x, mask, target) = SmoothNet().double(), smooth_batch()
    regularizer = regularizer.using(engines.FiniteDifference(step=1e-4))
    want = regularizer(plain, x, mask, target)
    model: Any = torch.compile(plain, backend=backend)
    value = regularizer(model, x, mask, target)
    assert bool(ran) == compiled
    torch.testing.assert_close(value, want)
    assert_close(gradients(plain, value), gradients(plain, want), 1e-8)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:The .grad attribute")
def test_a_compiled_function_of_an_attached_model_is_one_graph() -> None:
    model, (x, mask, target) = SmoothNet().double(), smooth_batch()
    want = TERMS(model, x, mask, target)
    loss = torch.compile(lambda x, target: F.cross_entropy(model(x), target), backend="aot_eager", fullgraph=True)
    with TERMS.attach(model):
        total = loss(x, target) + TERMS(model, x, mask, target)
    torch.testing.assert_close(total, F.cross_entropy(model(x), target) + want)
    assert_close(gradients(model, total), gradients(model, F.cross_entropy(model(x), target) + want), 1e-10)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:The .grad attribute")
@pytest.mark.parametrize(
    "term",
    [attrreg.InputGradient(), attrreg.InputXGradient(), attrreg.PGDEx(steps=2), attrreg.IntegratedGradients(2)],
    ids=lambda term: type(term).__name__,
)
def test_finite_differences_of_a_compiled_model_whose_batches_vary(term: AttributionRegularizer) -> None:
    torch._dynamo.reset()
    plain, (x, mask, target) = SmoothNet().double(), smooth_batch(4)
    term = term.using(engines.FiniteDifference(step=1e-4))
    model: Any = torch.compile(plain, backend="aot_eager")
    for images in (4, 3):  # from the second size on PyTorch compiles backwards that cannot keep their graph
        loss = F.cross_entropy(model(x[:images]), target[:images]) + term(model, x[:images], mask[:images], target[:images])
        want = F.cross_entropy(plain(x[:images]), target[:images]) + term(plain, x[:images], mask[:images], target[:images])
        assert_close(gradients(plain, loss), gradients(plain, want), 1e-8)
    with pytest.raises(RuntimeError, match="donated_buffer = False"):
        attrreg.InputGradient().using(engines.FiniteDifference()).evaluate(model, x[:2], mask[:2], target[:2])


def test_distributed_and_data_parallel_wrappers(process_group: None) -> None:
    plain, (x, mask, target) = SmoothNet().double(), smooth_batch()
    want = gradients(plain, F.cross_entropy(plain(x), target) + TERMS(plain, x, mask, target))
    for wrapper in (nn.parallel.DistributedDataParallel, nn.DataParallel):
        model = wrapper(plain)
        for way in WAYS:
            plain.zero_grad()
            with passes() as counted:
                loss_by(way, TERMS, model, (x, mask, target)).backward()
            if DEVICE == "cpu":  # elsewhere DataParallel gives the model a copy of the images
                assert counted.forward == (1 if way == "attached" else 2)
            assert_close(accumulated(plain), want, 1e-10)


def test_a_replica_on_another_device_is_not_the_loops_forward() -> None:
    model, (x, mask, target) = SmoothNet().double(), smooth_batch()
    want = TERMS(model, x, mask, target)
    with TERMS.attach(model) as attachment:
        model(x)
        kept = attachment._recording
        replica = cast(nn.Module, model._replicate_for_data_parallel())  # it shares the hooks, as those that threads of DataParallel run
        replica(x)
        assert attachment._recording is kept is not None
        with passes() as counted:
            value = TERMS(model, x, mask, target)
        assert counted.forward == 1  # of the masked images
    torch.testing.assert_close(value, want)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = SmoothNet()
        self.embed = nn.Embedding(4, 2)

    def forward(self, index: Tensor, image: Tensor, scale: float = 1.0) -> Any:
        return self.net(image * scale + self.embed(index)[:, :, None, None])


@pytest.mark.parametrize("keywords", [False, True])
def test_several_inputs(keywords: bool) -> None:
    model, (x, mask, target) = TwoInputs().double(), smooth_batch()
    index = torch.tensor([0, 3, 1])
    inputs: Any = {"index": index, "image": x, "scale": 2.0} if keywords else (index, x, 2.0)
    regularizer = attrreg.InputXGradient() + attrreg.IntegratedGradients(2) + attrreg.ActivationDifference(fill=attrreg.baselines.Zero())

    class Bound(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return model(index, x, 2.0)

        net = model.net

    bound = Bound()
    bound.model = model
    want = regularizer(bound, x, mask, target)
    got = regularizer(model, x, mask, target, inputs=inputs)
    torch.testing.assert_close(got, want)
    assert_close(gradients(model, got), gradients(model, want), 1e-10)
    with regularizer.attach(model), passes() as counted:
        model(**inputs) if keywords else model(*inputs)
        torch.testing.assert_close(regularizer(model, x, mask, target, inputs=inputs), want)
    assert counted.forward == 3  # the masked image and two steps: the clean pass was recorded
    map = attrreg.InputGradient().attribute(model, x, target, inputs=inputs)
    torch.testing.assert_close(map, attrreg.InputGradient().attribute(bound, x, target))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("attached", [False, True])
def test_torchscript_is_refused(attached: bool) -> None:
    x, mask, target = smooth_batch()
    model = torch.jit.trace(SmoothNet().double(), x)
    with pytest.raises(TypeError, match=r"TorchScript module.*Pass the module that it was made from"):
        TERMS.attach(model) if attached else TERMS(model, x, mask, target)


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning", "ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("attach", [False, True])
def test_a_torchscript_part(attach: bool) -> None:
    block = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.SiLU())
    ends = nn.Conv2d(3, 8, 3), [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)]
    plain = nn.Sequential(ends[0], block, *ends[1]).double()
    scripted = nn.Sequential(ends[0], torch.jit.script(block), *ends[1])
    x, target, mask = torch.randn(2, 3, 12, 12).double(), torch.tensor([0, 1]), torch.zeros(2, 12, 12)
    for reg in (attrreg.InputGradient(), attrreg.GradCAM("0"), attrreg.ActivationDifference()):
        found = []
        for model in (plain, scripted):
            before = [buffer.clone() for buffer in model.buffers()]
            with reg.attach(model) if attach else nullcontext():
                logits = model(x) if attach else torch.zeros(())
                after = [buffer.clone() for buffer in model.buffers()]
                value = reg(model, x, mask, target, generator=torch.Generator().manual_seed(0))
            assert all(map(torch.equal, after, model.buffers()))
            assert attach or all(map(torch.equal, before, after))
            found.append(value + logits.sum())
        torch.testing.assert_close(found[1], found[0])
    reachable = attrreg.GradCAM("0")(scripted, x, mask, target)
    torch.testing.assert_close(attrreg.GradCAM()(scripted, x, mask, target), reachable)
    for asking in (attrreg.IntegratedGradients(steps=2), attrreg.InputGradient()):  # the layers whether images meet
        assert asking(scripted, x, mask, target, annotated=torch.tensor([True, False])) > 0
    with pytest.raises(ValueError, match=r"layer '1\.0' is TorchScript, which takes no hooks"):
        attrreg.GradCAM("1.0")(scripted, x, mask, target)
    assert next(info.name for info in attrreg.layers(scripted, x)) == "0"


def test_a_handle_is_found_in_wrappers() -> None:
    model = nn.DataParallel(SmoothNet())
    attrreg.InputGradient().attach(model)
    found = attrreg.attach.attached(model)
    assert found is not None
    found.remove()
    assert attrreg.attach.attached(model) is None is attrreg.attach.attached(model.module)


class Copied(nn.DataParallel[nn.Module]):
    """Hands a copy of the images on, as it does to one GPU; on the CPU PyTorch's goes around that."""

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.module(x.clone())
        return logits


def test_data_parallel_copies_images_without_a_warning() -> None:
    model, (x, mask, target) = Copied(SmoothNet().double()), smooth_batch()
    with attrreg.InputGradient().attach(model):
        model(x)
        assert attrreg.InputGradient()(model, x, mask, target) > 0


def test_evaluate_runs_replicas_on_one_device() -> None:
    model, (x, mask, target) = Copied(SmoothNet().double()), smooth_batch()
    model.device_ids = [0, 1]
    model.forward = None  # type: ignore[assignment, method-assign]  # would fail
    found = attrreg.GradCAM("body").evaluate(model, x, mask, target)
    torch.testing.assert_close(found.total, attrreg.GradCAM("body")(model.module, x, mask, target))
