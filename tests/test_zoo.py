"""The zoo's checks on small models of many kinds.

`-m zoo` for one of every architecture, as in docs/zoo.md; a portion of these by `-k`, as in `-k "timm/swin or torchvision"`.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import attrreg
from attrreg.tables import markdown_table
from attrreg.trace import Trace
from benchmarks import zoo, zoo_check, zoo_report
from benchmarks.zoo_check import REGULARIZERS, Result, alignment, check
from benchmarks.zoo_models import Entry, Subject, build, families, ranked, smallest
from tests.models import SmoothNet

pytestmark = pytest.mark.cpu

SMALL = ["timm/edgenext_xx_small", "timm/levit_128s", "timm/starnet_s050", "torchvision/shufflenet_v2_x0_5"]
MORE = ["timm/mobilenetv3_small_050", "timm/mobilevitv2_050", "timm/xcit_nano_12_p16_224"]  # of families that have a smaller one
TOYS = [f"timm/{name}" for name in timm.list_models("test_*")]
REFUSED = {"timm/gemma4_vit_167m_enc": "ActivationDifference refused: ValueError: Other weights than"}  # as docs/zoo.md says


def problems(entry: Entry) -> list[str]:
    results = list(check(build(entry)))
    assert [result.regularizer for result in results] == list(REGULARIZERS)
    return [f"{result.regularizer} {result.status}: {result.cause}" for result in results if result.status != "pass"]


@pytest.mark.filterwarnings("ignore")  # the models' own
@pytest.mark.parametrize("key", [*SMALL, *TOYS, *(pytest.param(key, marks=pytest.mark.zoo) for key in MORE)])
def test_small_models(key: str) -> None:
    library, name = key.split("/")
    assert problems(Entry(library, "", name)) == []


@pytest.mark.zoo
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", families(), ids="/".join)
def test_one_model_of_every_architecture(family: tuple[str, str]) -> None:
    entry = smallest(*family)
    unexpected = [problem for problem in problems(entry) if not problem.startswith(REFUSED.get(entry.key, ()))]
    assert not unexpected, (entry.key, *unexpected)


@dataclasses.dataclass(frozen=True, repr=False)
class Detached(attrreg.InputGradient):
    """Value right, gradient wrong: as if first-order terms alone counted."""

    def per_image(self, trace: Trace) -> Tensor:
        value = super().per_image(trace)
        return value.detach() + 0.5 * (value - value.detach())


@dataclasses.dataclass(frozen=True, repr=False)
class Forgetful(attrreg.InputGradient):
    """Leaves a hook behind."""

    def per_image(self, trace: Trace) -> Tensor:
        trace.call.model.register_forward_hook(lambda *_: None)
        return super().per_image(trace)


@dataclasses.dataclass(frozen=True, repr=False)
class Filling(attrreg.InputGradient):
    """Leaves gradients of parameters behind."""

    def per_image(self, trace: Trace) -> Tensor:
        for parameter in trace.call.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        return super().per_image(trace)


@dataclasses.dataclass(frozen=True, repr=False)
class Nothing(attrreg.InputGradient):
    """A penalty that is always zero."""

    def per_image(self, trace: Trace) -> Tensor:
        return 0 * super().per_image(trace)


class Net(SmoothNet):
    def __init__(self) -> None:
        super().__init__(norm=True, dropout=0.2, classes=5)
        self.stem = nn.Conv2d(3, 4, 3, padding=1)


def outcome(regularizer: attrreg.AttributionRegularizer, monkeypatch: pytest.MonkeyPatch) -> Result:
    monkeypatch.setitem(REGULARIZERS, "InputGradient", regularizer)
    (result,) = check(Subject(Net(), size=16, output=None, batch=2), ("InputGradient",))
    return result


@pytest.mark.parametrize(
    ("regularizer", "cause"),
    [
        (attrreg.InputGradient(), ""),
        (Detached(), "the derivative along a direction is"),
        (Forgetful(), "left behind: hooks"),
        (Filling(), "left behind: flags"),
        (Nothing(), "the penalty is zero"),
    ],
)
def test_what_is_wrong_is_found(regularizer: attrreg.AttributionRegularizer, cause: str, monkeypatch: pytest.MonkeyPatch) -> None:
    result = outcome(regularizer, monkeypatch)
    assert result.status == ("fail" if cause else "pass")
    assert result.cause.startswith(cause)
    assert cause or result.agreement < 1e-6


def test_an_error_of_attrreg_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    result = outcome(attrreg.GradCAM("head"), monkeypatch)
    assert result.status == "refused" and "not a spatial map" in result.cause


def test_an_error_that_attrreg_does_not_raise_itself_is_no_refusal() -> None:
    with pytest.raises(TypeError) as raised:
        markdown_table(["a number in place of a text"], [[1]])  # type: ignore[list-item]
    assert not zoo_check._is_ours(raised.value)


class Shuffled(nn.Module):
    """Moves positions about, as models do that keep tokens in window order."""

    def __init__(self, shift: int) -> None:
        super().__init__()
        self.shift = shift
        self.layer = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.roll(self.shift, dims=-1)).mean(dim=(2, 3))  # type: ignore[no-any-return]


@pytest.mark.parametrize(("shift", "right"), [(0, 4), (8, 0)])
def test_positions_out_of_place_are_found(shift: int, right: int) -> None:
    found, contrast = alignment(Shuffled(shift), torch.randn(2, 3, 16, 16), "layer")
    assert found == right and contrast > 1.2


def test_the_page() -> None:
    entry = Entry("timm", "resnet", "test_resnet", 1)
    results = [dataclasses.asdict(Result(name, agreement=1e-9)) for name in REGULARIZERS]
    good: dict[str, Any] = {"key": entry.key, **dataclasses.asdict(entry), "size": 64, "problem": "", "results": results}
    where = zoo_report.here()
    good["environment"] = {**where, "date": "1999-12-31", "versions": {**where["versions"], "torch": "1.0"}}
    broken = {**good, "key": "timm/other", "problem": "not finished in 90 s", "results": [], "environment": where}
    assert zoo_report.passed(good) and not zoo_report.passed(broken)
    page = zoo_report.page([good, broken], rank=1)
    assert f"measured 1999-12-31 to {where['date']}: attrreg {where['attrreg']}, torch 1.0 and {where['versions']['torch']},\n" in page
    assert "| GradCAM | 1 (50.0%) | 0 (0.0%) | 1 (50.0%) |" in page
    assert "`timm/other` InputGradient, IntegratedGradients, ActivationDifference, GradCAM fail: not finished in 90 s" in page


def test_a_last_line_without_its_end_is_read(tmp_path: Path) -> None:
    file, old = tmp_path / "results.jsonl", {"key": "old", "problem": "", "results": [], "environment": zoo_report.here()}
    file.write_text("\n".join(map(json.dumps, (old, {**old, "key": "new"}))))
    assert list(zoo._read(file, again=False)) == ["old", "new"]


def test_ranks() -> None:
    entries = [Entry("timm", "a", name, params) for name, params in (("test_a", 1), ("big", 9), ("small", 2), ("twin", 2))]
    assert [entry.name for entry in ranked(entries, 1) + ranked(entries, 2) + ranked(entries, 3)] == ["small", "big"]
