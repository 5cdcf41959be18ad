"""The measures as torchmetrics: over batches, in collections, merged and saved."""

from __future__ import annotations

import math
import warnings
from typing import Any

import captum.attr  # noqa: F401  (here, because ranks take its warnings for errors)
import numpy
import pytest
import torch
from matplotlib import pyplot
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import attrreg
from attrreg import metrics
from tests.models import DEVICE, SmoothNet, smooth_batch
from tests.ranks import Ranks

torchmetrics = pytest.importorskip("torchmetrics")
from attrreg.metrics import modules  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:The ``compute`` method of metric .* was called before")  # torchmetrics' own


def update(metric: Any, generator: torch.Generator, batches: int = 3) -> list[tuple[Tensor, Tensor, Tensor]]:
    seen = []
    for _ in range(batches):
        map, mask = torch.randn(4, 2, 6, 6, generator=generator), torch.rand(4, 6, 6, generator=generator)
        annotated = torch.rand(4, generator=generator) < 0.7
        map[0] = 0  # undefined
        metric.update(map, mask, annotated)
        seen.append((map, mask, annotated))
    return seen


@pytest.mark.parametrize(
    ("metric", "function"),
    [
        (modules.ShareInside(), metrics.share_inside),
        (modules.EnergyPointingGame(), metrics.energy_pointing_game),
        (modules.PointingGame(1, signed=True), metrics.PointingGame(1, signed=True)),
        (modules.IoUAtMaskSize(), metrics.iou_at_mask_size),
        (modules.IoUAtMaskSize(signed=True), lambda map, mask: metrics.iou_at_mask_size(map, mask, signed=True)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_modules_average_over_batches(metric: Any, function: metrics.Measure) -> None:
    values = []
    for map, mask, annotated in update(metric, torch.Generator(DEVICE).manual_seed(3)):
        values += [value for value, flag in zip(function(map, mask).tolist(), annotated.tolist(), strict=True) if flag]
    kept = [value for value in values if not math.isnan(value)]
    assert len(kept) < len(values)
    assert metric.compute().item() == pytest.approx(sum(kept) / len(kept))
    assert int(metric.undefined) == len(values) - len(kept)
    metric.reset()
    assert metric.images == 0


def test_modules_of_logits() -> None:
    generator = torch.Generator(DEVICE).manual_seed(1)
    logits = 100 * torch.randn(60, 2, generator=generator)  # where a sigmoid would tie
    target = torch.randint(2, (60,), generator=generator)
    groups = 2 * target + torch.randint(2, (60,), generator=generator)
    worst, area = modules.WorstGroupAccuracy(numpy.int64(4)), modules.LogitDifferenceAUC()  # type: ignore[arg-type]
    assert worst.compute().isnan() and area.compute().isnan()
    for index in torch.arange(60).split(16):
        worst.update(logits[index], target[index], groups[index])
        area.update(logits[index], target[index])
    assert worst.compute().item() == pytest.approx(metrics.worst_group_accuracy(logits, target, groups))
    assert area.compute().item() == pytest.approx(metrics.auc(logits, target))


def test_counts_stay_exact_where_a_module_is_brought_to_half_precision() -> None:
    metric = modules.ShareInside()
    module = nn.ModuleList([metric, nn.Linear(2, 2)])
    map, mask = torch.rand(257, 1, 2, 2), torch.ones(2, 2).triu()  # 257 is 256 in bfloat16
    for _ in range(2):
        module.to(torch.bfloat16)  # as Lightning's "bf16-true" does
        metric.update(map, mask)
        assert metric.images == 257
        assert metric.compute().item() == pytest.approx(metrics.share_inside(map, mask).double().mean().item())
        metric.reset()  # to what the cast has made of the first values
    module.to("meta").to_empty(device="cpu")
    assert metric.total.dtype == torch.float64
    metric.set_dtype(torch.float32)  # asked of the metric itself
    assert metric.total.dtype == torch.float32


def test_values_are_exact_whatever_the_default_type(half_by_default: None) -> None:
    logits = torch.tensor([[2.0, 0.0], [0.0, 3.0], [0.0, 4.0], [3.0, 0.0]])
    target = torch.tensor([0, 1, 1, 1])
    worst, area = modules.WorstGroupAccuracy(2), modules.LogitDifferenceAUC()
    worst.update(logits, target, target)
    area.update(logits, target)
    assert [worst.compute().item(), area.compute().item()] == pytest.approx([2 / 3, 2 / 3])
    map, mask = torch.tensor([[[[1.0, 1.0, 1.0, 0.0]]]], dtype=torch.float32), torch.tensor([[[True, False, False, False]]])
    assert metrics.iou_at_mask_size(map, mask).item() == pytest.approx(0.2)  # a third of one pixel


def test_the_nan_of_no_images_has_the_type_of_other_values(half_by_default: None) -> None:
    made: list[tuple[Any, torch.dtype]] = [(modules.WorstGroupAccuracy(2), torch.float32), (modules.LogitDifferenceAUC(), torch.float64)]
    for metric, dtype in made:
        assert metric.compute().dtype == dtype and metric.compute().isnan()


def test_judged_module() -> None:
    model, (x, mask, target) = SmoothNet().double(), smooth_batch(4)
    attribution = attrreg.InputXGradient().attribute
    metric = modules.Judged(attribution)
    metric.update(model, x[:2], mask[:2], target[:2])
    metric.update(model, x[2:], mask[2:], target[2:])
    expected = metrics.judged(model, x, mask, target, attribution)
    assert metric.compute().item() == pytest.approx(expected.mean().item())
    metric.reset()
    holes = mask.clone()
    holes[1:] = math.nan  # nobody drew these
    for annotated in ([True, False, False, False], [False] * 4):
        metric.update(model, x, holes, target, torch.tensor(annotated))
    assert metric.compute().item() == pytest.approx(expected[0].item())


def by_occlusion(rank: int) -> float:
    """A wrapped model with buffers, judged where only the first rank has something to judge."""
    model, (x, mask, target) = SmoothNet(norm=True).double().eval(), smooth_batch(4)
    metric = modules.Judged(metrics.Occlusion(window=4, stride=4))
    metric.update(DistributedDataParallel(model), x, mask, target, torch.full((4,), rank == 0))
    return float(metric.compute())


@pytest.mark.cpu
def test_ranks_with_nothing_to_judge_are_not_waited_for(two: Ranks) -> None:
    torch.manual_seed(0)  # as the ranks do
    model, (x, mask, target) = SmoothNet(norm=True).double().eval(), smooth_batch(4)
    expected = metrics.judged(model, x, mask, target, metrics.Occlusion(window=4, stride=4)).mean()
    assert two(by_occlusion) == pytest.approx(2 * [float(expected)])


def test_modules_do_not_look_at_masks_that_nobody_drew() -> None:
    map, mask, annotated = torch.rand(3, 1, 6, 6), torch.rand(3, 6, 6), torch.tensor([True, False, True])
    mask[1] = math.nan
    metric = modules.ShareInside()
    metric.update(map, mask, annotated)
    metric.update(map, mask, torch.zeros(3, dtype=torch.bool))
    metric.update(map, mask[0], annotated)  # one mask for all
    expected = [*metrics.share_inside(map[annotated], mask[annotated]), *metrics.share_inside(map[annotated], mask[0])]
    assert metric.compute().item() == pytest.approx(torch.stack(expected).mean().item())


def test_metrics_that_agree_on_a_batch_stay_apart_in_a_collection() -> None:
    mask = torch.zeros(2, 8, 8, dtype=torch.bool)
    mask[:, 2:6, 2:6] = True
    inside, beside, both = torch.zeros(3, 2, 1, 8, 8)
    inside[:, :, 3, 3] = beside[:, :, 1, 3] = both[:, :, 1, 3] = 1
    both[:, :, 3, 3] = -1
    made = {"exact": modules.PointingGame(0), "near": modules.PointingGame(2), "share": modules.ShareInside()}
    made |= {"energy": modules.EnergyPointingGame(), "iou": modules.IoUAtMaskSize()}
    together = torchmetrics.MetricCollection({name: metric.clone() for name, metric in made.items()})
    for map in (inside, beside, both):
        together.update(map, mask)
        for metric in made.values():
            metric.update(map, mask)
    for name, value in together.compute().items():
        assert value == made[name].compute(), name


def test_metrics_alike_can_be_merged_and_saved() -> None:
    map, mask = torch.randn(4, 1, 6, 6), torch.rand(4, 6, 6)
    one, other, whole, saved = (modules.PointingGame(1) for _ in range(4))
    one.update(map[:1], mask[:1])
    other.update(map[1:], mask[1:])
    whole.update(map, mask)
    for metric in (one, saved):
        metric.persistent(True)
    saved.load_state_dict(one.state_dict())
    saved.update(map[1:], mask[1:])
    one.merge_state(other)
    assert one.compute() == saved.compute() == whole.compute()


def test_multi_hot_targets_of_annotated_images_are_judged() -> None:
    x, mask = torch.rand(4, 2, 8, 8), torch.rand(4, 8, 8)
    hot, annotated = torch.eye(3)[[0, 1, 2, 0]], torch.tensor([True, False, True, False])
    metric, model = modules.Judged(attrreg.InputGradient().attribute), SmoothNet().eval()
    metric.update(model, x, mask, hot, annotated)
    assert metric.images == 2
    expected = metrics.share_inside(attrreg.InputGradient().attribute(model, x[annotated], hot[annotated]), mask[annotated])
    assert metric.compute().item() == pytest.approx(expected.mean().item())


def test_boolean_groups() -> None:
    logits, target = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]), torch.tensor([0, 1, 1])
    metric = modules.WorstGroupAccuracy(2)
    metric.update(logits, target, target.bool())
    assert metric.compute() == 0.5 == metrics.worst_group_accuracy(logits, target, target.bool())


def test_judges_by_different_attributions_stay_apart_in_a_collection() -> None:
    kinds = {"gradient": attrreg.InputGradient(), "times image": attrreg.InputXGradient()}
    together = torchmetrics.MetricCollection({name: modules.Judged(reg.attribute) for name, reg in kinds.items()})
    linear = nn.Sequential(nn.Flatten(), nn.Linear(8, 2, bias=False))
    whole, part, mask = torch.ones(1, 1, 2, 4), torch.ones(1, 1, 2, 4), torch.zeros(1, 2, 4)
    mask[..., :2], part[..., 2:] = 1, 0
    for x in (whole, part):  # on the first both say the same
        together.update(linear, x, mask, torch.tensor([0]))
    found = together.compute()
    for name, reg in kinds.items():
        alone = torch.stack([metrics.judged(linear, x, mask, torch.tensor([0]), reg.attribute) for x in (whole, part)])
        torch.testing.assert_close(found[name], alone.double().mean())
    assert found["gradient"] != found["times image"]


def test_the_area_of_a_diverged_model_is_nan() -> None:
    metric = modules.LogitDifferenceAUC()
    metric.update(torch.full((2, 2), math.nan), torch.tensor([0, 1]))
    metric.update(torch.randn(2, 2), torch.tensor([0, 1]))
    assert metric.compute().isnan()


def test_empty_batches_count_nothing() -> None:
    logits, target = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 1.0]]), torch.tensor([0, 1, 0])
    worst, area, nobody = modules.WorstGroupAccuracy(2), modules.LogitDifferenceAUC(), torch.zeros(0, dtype=torch.long)
    for batch in (nobody, torch.arange(3), nobody):
        worst.update(logits[batch], target[batch], target[batch])
        area.update(logits[batch], target[batch])
        if not len(batch) and not worst.images.any():
            assert worst.compute().isnan() and area.compute().isnan()
    assert worst.compute() == 0.5 and area.compute() == 1


@pytest.mark.parametrize("target", [torch.tensor([0, 1, 0]), torch.tensor([[0], [1]]), torch.zeros(0)])
def test_targets_of_another_shape_are_refused_at_once(target: Tensor) -> None:
    with pytest.raises(ValueError, match=r"logits must be \(N, classes\) and target \(N,\), got \(2, 2\) and .*\. Pass one class an image"):
        modules.LogitDifferenceAUC().update(torch.randn(2, 2), target)


def test_targets_of_a_third_class_are_refused_at_once() -> None:
    metric = modules.LogitDifferenceAUC()
    with pytest.raises(ValueError, match="target must be 0 or 1"):
        metric.update(torch.randn(2, 2), torch.tensor([1, 2]))
    assert not metric.scores


MAP = torch.rand(2, 1, 4, 4)


def groups_of(target: Tensor = torch.zeros(2).long(), groups: Tensor = torch.zeros(2).long()) -> None:  # noqa: B008
    """Counted."""
    modules.WorstGroupAccuracy(1).update(torch.rand(2, 2), target, groups)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: modules.WorstGroupAccuracy(0), ValueError, r"groups must be an integer of at least 1.*\. "),
        (lambda: groups_of(groups=torch.ones(2).long()), ValueError, r"groups has numbers outside \[0, 1\)\. "),
        (lambda: groups_of(target=torch.zeros(1).long()), ValueError, r"logits must be \(N, classes\).*\. "),
        (lambda: groups_of(groups=torch.zeros(1).long()), ValueError, r"groups must be \(2,\), one group an image.*\. "),
        (lambda: modules.ShareInside().update(MAP, MAP[:, 0], torch.tensor([1, 0])), TypeError, r"annotated must be a boolean.*\. "),
        (lambda: modules.ShareInside().update(MAP, MAP[:1, 0], torch.tensor([True, False])), ValueError, r"mask is for 1 images.*\. "),
        (lambda: modules.ShareInside().update(MAP, [], torch.tensor([True, False])), TypeError, r"mask must be a tensor, got list\. "),  # type: ignore[arg-type]
        (lambda: modules.LogitDifferenceAUC().update(torch.rand(2, 3), torch.zeros(2)), ValueError, r"logits must be \(N, 2\).*\. "),
    ],
)
def test_bad_input(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_judges_by_functions_without_a_name_can_be_saved() -> None:
    model, (x, mask, target) = SmoothNet().double(), smooth_batch(4)
    saved, other = (modules.Judged(lambda model, x, target: x * target.view(-1, 1, 1, 1)) for _ in range(2))
    for metric in (saved, other):
        metric.persistent(True)
    saved.update(model, x, mask, target)
    state = saved.state_dict()
    assert list(state) == ["total", "images", "undefined"]  # no name of one process
    other.load_state_dict(state)
    assert saved.compute() == other.compute() > 0


def everything() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    logits, target = torch.randn(20, 2, generator=generator), torch.arange(20) % 2
    map, mask = torch.randn(20, 1, 6, 6, generator=generator), torch.rand(20, 6, 6, generator=generator)
    return logits, target, 2 * target + torch.arange(20) // 2 % 2, map, mask


def accumulated(rank: int) -> list[float]:
    logits, target, groups, map, mask = everything()
    mine = [slice(0, 6), slice(1, None, 2)][rank]  # of unequal sizes
    made: list[Any] = [modules.ShareInside(), modules.WorstGroupAccuracy(4), modules.LogitDifferenceAUC()]
    made[0].update(map[mine], mask[mine])
    made[1].update(logits[mine], target[mine], groups[mine])
    made[2].update(logits[mine], target[mine])
    return [float(metric.compute()) for metric in made]


@pytest.mark.cpu
def test_modules_accumulate_over_ranks(two: Ranks) -> None:
    logits, target, groups, map, mask = everything()
    index = torch.tensor([*range(6), *range(1, 20, 2)])
    want = [
        metrics.share_inside(map[index], mask[index]).mean().item(),
        metrics.worst_group_accuracy(logits[index], target[index], groups[index]),
        metrics.auc(logits[index], target[index]),
    ]
    for found in two(accumulated):
        assert found == pytest.approx(want)


def of_the_first(rank: int) -> float:
    """An area to which one rank has nothing to add, not even an empty batch."""
    logits, target, *_ = everything()
    metric = modules.LogitDifferenceAUC()
    if rank == 0:
        metric.update(logits, target)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there was no update
        return float(metric.compute())


@pytest.mark.cpu
def test_ranks_without_any_batch_add_nothing_to_the_area(two: Ranks) -> None:
    logits, target, *_ = everything()
    assert two(of_the_first) == pytest.approx(2 * [metrics.auc(logits, target)])


def test_measures_have_a_plot() -> None:
    figure, axes = modules.WorstGroupAccuracy(2).plot([torch.tensor(0.2)])
    pyplot.close(figure)
    assert axes.get_ylim() == pytest.approx((-0.1, 1.1))


@pytest.mark.parametrize("kind", [modules.PointingGame, modules.IoUAtMaskSize])
def test_signed_is_a_truth_value(kind: Any) -> None:
    with pytest.raises(TypeError, match="signed must be True or False"):
        kind(signed=2)


@pytest.mark.cpu  # whose generator draws
def test_the_area_does_not_change_with_batches_that_a_loop_overwrites() -> None:
    logits, target = (part.double() for part in everything()[:2])
    metric, want = modules.LogitDifferenceAUC(), metrics.auc(logits, target)
    metric.update(logits, target)
    for buffer in (logits, target):  # which a loop may use again
        buffer.zero_()
    assert metric.compute().item() == pytest.approx(want)
