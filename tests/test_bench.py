"""The benchmark compares like with like, and says what it measured."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

import attrreg
from attrreg.baselines import Zero
from attrreg.bench import measure, report, run, strategies, today
from attrreg.bench.cases import Case, build
from attrreg.bench.measure import Cost, Step
from attrreg.cli import build_app
from attrreg.environment import environment, sentence
from attrreg.progress import Advance
from benchmarks import check
from tests.models import assert_close

pytestmark = pytest.mark.cpu

CPU = torch.device("cpu")
MAPS = (strategies.INPUT_GRADIENT, strategies.GRAD_CAM)
MODELS = ["test_resnet", "test_vit", "test_efficientnet", "mobilenetv3_small_050", "torchvision/shufflenet_v2_x0_5"]


def gradients_by_way(case: Case, penalty: str) -> dict[str, list[torch.Tensor]]:
    """The gradients of the whole loss, as each way leaves them."""
    found = {}
    for strategy in strategies.strategies(penalty, case):
        torch.manual_seed(0)
        model: nn.Module = case.model
        handle = strategy.attach.attach(model) if strategy.attach is not None else None
        strategy.loss(case).backward()
        if handle is not None:
            handle.remove()
        parameters = list(model.parameters())
        found[strategy.name] = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]
        model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("name", ["resnet18", "torchvision/squeezenet1_1", "torchvision/vit_b_32"])
def test_todays_activation_difference_is_of_the_features_that_ours_takes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = build(name, batch=2, size=64, device=CPU)
    case.model.eval()  # no draws
    monkeypatch.setattr(today, "Shuffle", Zero)
    ours = attrreg.ActivationDifference(fill=Zero())(case.model, case.x, case.mask, case.y)
    torch.testing.assert_close(today.activation_difference(case), ours)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("penalty", [strategies.INPUT_GRADIENT, strategies.GRAD_CAM, strategies.ACTIVATION_DIFFERENCE, strategies.SUM])
def test_todays_ways_and_ours_train_with_the_same_gradients(name: str, penalty: str) -> None:
    case = build(name, batch=2, size=160 if name == "test_vit" else 64, device=CPU)
    case.model.eval()  # no draws
    case = Case(case.name, case.model.double(), case.x.double(), case.y, case.mask)
    found = gradients_by_way(case, penalty)
    ours = {strategies.UNATTACHED, strategies.ATTACHED} if penalty in MAPS else set()  # the others shuffle, each by its own draws
    for way in found.keys() & {strategies.CAPTUM, strategies.BY_HAND, *ours}:
        assert_close(found[way], found[strategies.TODAY], 1e-6)
    captum = penalty == strategies.INPUT_GRADIENT or (penalty == strategies.GRAD_CAM and name != "test_vit")  # it reads tokens as channels
    assert (strategies.CAPTUM in found) == captum
    assert found.keys() >= {strategies.PLAIN, strategies.TODAY, strategies.BY_HAND, strategies.UNATTACHED, strategies.ATTACHED}


@pytest.mark.parametrize("penalty", strategies.PENALTIES)
def test_every_way_runs(penalty: str) -> None:
    case = build("test_resnet", batch=2, size=64, device=CPU)
    steps = {strategy.name: strategy.prepare(case) for strategy in strategies.strategies(penalty, case)}
    notes: list[float] = []
    found = measure.costs(steps, 3, 1, notes.append)  # so many that a path looks no more at whether its places are apart
    assert notes == [1, 1, 1, 1] and found[strategies.PLAIN].ratio == found[strategies.PLAIN].memory == 1
    ours, today = (found[way].operations for way in (strategies.ATTACHED, strategies.TODAY))
    assert ours <= found[strategies.UNATTACHED].operations <= 1.3 * today


@pytest.mark.parametrize(("seconds", "rounds"), [(0.0, 2), (0.5, 2), (1.0, 2), (5.0, 10)])
def test_fast_steps_get_more_rounds(seconds: float, rounds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = build("test_resnet", batch=2, size=64, device=CPU)
    runs: list[int] = []
    notes: list[float] = []

    def run() -> None:
        runs.append(1)
        torch.zeros(1)

    def timed(step: Step) -> float:
        step.run()
        return 1.0

    monkeypatch.setattr(measure, "_timed", timed)
    measure.costs({"plain": Step(run, case)}, 2, 1, notes.append, seconds)
    assert notes[0] == 1 and sum(notes) == pytest.approx(3)
    assert len(notes) == 1 + rounds and len(runs) == 2 * len(notes) + 1  # at both ends of a round, and once for memory


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_operations_of_convolutions_are_those_of_their_groups(transposed: bool, groups: int) -> None:
    x, w = torch.randn(2, 6, 7, 9, requires_grad=True), torch.randn(6, 6 // groups, 3, 3, requires_grad=True)
    convolve = F.conv_transpose2d if transposed else F.conv2d

    def of_pytorch(x: torch.Tensor, w: torch.Tensor) -> int:
        with FlopCounterMode(display=False) as counter:
            convolve(x, w).sum().backward()
        return int(counter.get_total_flops())

    with measure._Operations() as counter:
        convolve(x, w, groups=groups).sum().backward()
    assert counter.total == sum(of_pytorch(*each) for each in zip(x.chunk(groups, 1), w.chunk(groups, 0), strict=True))


def test_operations_of_attention_count_whichever_kernel_runs() -> None:
    case = build("test_resnet", batch=2, size=64, device=CPU)
    q, k, v = (torch.randn(2, 3, tokens, 8) for tokens in (4, 5, 5))

    def attend() -> None:
        F.scaled_dot_product_attention(q, k, v)

    counts = []
    for kernel in (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION):
        with sdpa_kernel(kernel):
            counts.append(measure._weighed(Step(attend, case))[1])
    assert counts[0] == counts[1] == 2 * 2 * (2 * 3) * 4 * 5 * 8


def test_memory_is_that_of_what_is_alive() -> None:
    case = build("test_resnet", batch=2, size=64, device=CPU)

    def keep_two() -> None:
        one = torch.zeros(1000)
        other = one + 1
        del one, other
        torch.zeros(500)

    assert measure.peak(Step(keep_two, case)) == 8000


def test_a_model_may_be_named_with_its_weights() -> None:
    assert build("test_resnet.r160_in1k", batch=1, size=64, device=CPU).name == "test_resnet.r160_in1k"


def test_the_command(tmp_path: Path) -> None:
    out = tmp_path / "x.json"
    options = {"--model": "test_resnet", "--penalty": "InputGradient", "--rounds": "1", "--seconds": "0", "--batch": "2", "--out": str(out)}
    arguments = [part for option in options.items() for part in option]
    result = CliRunner().invoke(build_app(), ["bench", "--no-curves", *arguments])
    assert result.exit_code == 0, result.output
    record = report.load(out)
    assert list(record.costs) == ["test_resnet"] and record.environment["versions"]["torch"]
    assert json.loads(json.dumps(asdict(record))) == json.loads(out.read_text())
    assert "attrreg, attached" in out.with_suffix(".md").read_text() and out.with_suffix(".png").stat().st_size > 10_000
    arguments = ["bench", "--no-curves", *arguments, "--penalty", "GradCAM", "--resume"]
    result = CliRunner().invoke(build_app(), arguments)
    assert result.exit_code == 0, result.output
    resumed = report.load(out)
    assert resumed.costs["test_resnet"]["InputGradient"] == record.costs["test_resnet"]["InputGradient"]
    assert resumed.plan.penalties == tuple(resumed.costs["test_resnet"]) == ("InputGradient", "GradCAM")
    result = CliRunner().invoke(build_app(), [*arguments, "--batch", "3"])
    assert result.exit_code == 2 and "batch 2, not 3" in " ".join(result.output.replace("│", "").split())


@pytest.mark.parametrize(
    "arguments",
    [
        ["--model", "no_such"],
        ["--penalty", "NoSuch"],
        ["--out", "x.txt"],
        ["--device", "tpux"],
        ["--device", "meta"],
        ["--autocast", "float33"],
        ["--autocast", "int8"],
        ["--out", "folder.json"],
        ["--out", "beside.json"],
        ["--out", "part.json"],
        ["--out", "no/such.json"],
        ["--out", "/proc/attrreg.json"],
        ["--seconds", "inf"],
        ["--seconds", "nan"],
        ["--out", "broken.json", "--resume"],
        ["--out", "other.json", "--resume"],
        ["--batch", "0"],
    ],
)
def test_bad_options(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder.json").mkdir()
    Path("beside.md").mkdir()
    Path("part.json.part").mkdir()
    Path("broken.json").write_text("{")
    Path("folder").mkdir()
    Path("other.json").write_text('{"plan": {"models": [], "colour": 1}}')
    before = ["bench", "--rounds", "1", *([] if "--out" in arguments else ["--out", str(tmp_path / "x.json")])]
    result = CliRunner().invoke(build_app(), [*before, *arguments])
    assert result.exit_code == 2 and arguments[-1 if "--resume" in arguments else 0] in result.output.replace("│", "")


def test_a_record_goes_on_only_on_a_processor_alike() -> None:
    record = record_with(2.0, 2.0)
    record.resumed(record.plan)
    elsewhere = replace(record, environment={**record.environment, "family": "family 0, model 0"})
    assert "CPU (family 0, model 0, " in sentence(elsewhere.environment)
    with pytest.raises(ValueError, match="family 'family 0, model 0'"):
        elsewhere.resumed(record.plan)
    other_code = replace(record, environment={**record.environment, "code": "0123456789ab"})
    with pytest.raises(ValueError, match="code '0123456789ab', not "):
        other_code.resumed(record.plan)


def test_what_was_measured_on_two_days_says_both() -> None:
    record = record_with(2.0, 2.0)
    before = replace(record, environment={**record.environment, "date": "1999-12-31", "load": 99.5})
    assert before.resumed(record.plan).environment == before.environment  # nothing is missing, so nothing is measured today
    more = before.resumed(replace(record.plan, models=("resnet50",)))
    today = record.environment["date"]
    assert f"Measured 1999-12-31 to {today} on " in report.conditions(more) and "load 99.5" in report.conditions(more)
    again = more.resumed(replace(record.plan, models=("resnet34",)))
    assert again.environment["date"] == f"1999-12-31 to {today}"


def test_curves_are_of_the_model_that_their_picture_names(monkeypatch: pytest.MonkeyPatch) -> None:
    record = record_with(2.0, 2.0)
    measured: list[str] = []

    def curve(varied: str, plan: run.Plan, note: Advance) -> dict[str, list[tuple[int, Cost]]]:
        measured.append(plan.models[0])
        return {}

    monkeypatch.setattr(run, "_curve", curve)
    monkeypatch.setattr(run, "_costs", lambda *rest: {})
    plan = replace(record.plan, models=("test_resnet",), curves=True)
    record = record.resumed(plan)
    run.measure(plan, record, lambda doing, part: None)
    assert measured == len(run.CURVES) * [record.plan.models[0]] == len(run.CURVES) * ["resnet18"]


def record_with(ratio: float, memory: float) -> run.Record:
    plan = run.Plan(("resnet18",), (strategies.INPUT_GRADIENT,), 2, 64, 1, 0, False, "cpu", None)
    ways = {strategies.TODAY: Cost(4.0, 4, 4, 1, 1, 4.0, 1, 3), strategies.LAZY: Cost(1.3, 1, 1, 1, 1, 1, 1, 1)}
    ours = Cost(ratio, ratio, ratio, 1, 1, memory, 1, 2)
    return run.Record(plan, environment("cpu"), {"resnet18": {strategies.INPUT_GRADIENT: {**ways, strategies.ATTACHED: ours}}})


def test_promises_are_kept_or_missed(tmp_path: Path) -> None:
    assert all(promise.kept for promise in check.promises(record_with(2.1, 2.0)))
    slow = {promise.text for promise in check.promises(record_with(2.9, 2.0)) if not promise.kept}
    assert "InputGradient: time" in slow and "InputGradient: memory" not in slow
    report.save(record_with(2.1, 3.9), tmp_path / "large.json")
    assert check.main(tmp_path / "large.json") == 1
    report.save(record_with(2.1, 2.0), tmp_path / "kept.json")
    assert check.main(tmp_path / "kept.json") == 0
    assert check.main(tmp_path / "absent.json") == 2
    for text in ("[]", "{", "\xff", json.dumps(asdict(replace(record_with(2.1, 2.0), costs={})))):
        (tmp_path / "broken.json").write_text(text, encoding="latin-1")
        assert check.main(tmp_path / "broken.json") == 2
    report.save(record_with(math.nan, 2.0), tmp_path / "nan.json")
    assert check.main(tmp_path / "nan.json") == 1
    several = {"resnet18": 2.0, "resnet50": math.nan, "resnet34": 2.1}
    assert not check._worst("", several, 3.0).kept and not check._least("", several, 1.0).kept


def test_what_was_not_measured_has_no_promise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = record_with(2.1, 2.0)
    interrupted = replace(record, plan=replace(record.plan, penalties=strategies.PENALTIES))
    report.save(interrupted, tmp_path / "interrupted.json")
    assert check.main(tmp_path / "interrupted.json") == 2
    assert "Not measured: resnet18 (GradCAM" in capsys.readouterr().out.replace("\n", " ")


def test_a_gpu_has_promises_of_its_own() -> None:
    record = record_with(2.9, 2.0)
    assert not all(promise.kept for promise in check.promises(record))
    on_cuda = run.Record(replace(record.plan, device="cuda:1"), record.environment, record.costs)
    assert all(promise.kept for promise in check.promises(on_cuda))


@pytest.mark.parametrize(
    ("name", "has"),
    [("mobilenetv2_100", True), ("regnety_002", False), ("torchvision/mnasnet0_5", True), ("torchvision/regnet_y_400mf", False)],
)
def test_which_models_have_depthwise_convolutions(name: str, has: bool) -> None:
    assert check._has_depthwise(name) == has


def test_what_an_interrupted_run_lacks_is_named() -> None:
    record = record_with(2.1, 2.0)
    assert "Not measured" not in report.markdown(record)
    plan = replace(record.plan, models=("resnet18", "resnet50"), penalties=("InputGradient", "GradCAM"))
    text = report.markdown(run.Record(plan, record.environment, {"resnet18": record.costs["resnet18"]}))
    assert "Not measured: resnet18 (GradCAM), resnet50." in text


def test_a_path_of_many_images_is_measured_on_fewer() -> None:
    record = record_with(2.1, 2.0)
    plan = replace(record.plan, batch=64, penalties=("InputGradient", "IntegratedGradients(8)"))
    assert [plan.batch_of(penalty) for penalty in plan.penalties] == [64, 16]
    assert "batches of 64 images" in (text := report.markdown(replace(record, plan=plan))) and "of batches of 16" in text


@pytest.mark.filterwarnings("ignore:The default weight initialization of GoogleNet")
@pytest.mark.parametrize(
    ("models", "size", "curves", "cause"),
    [
        (("test_resnet", "no_such_model"), 64, True, r"There is no model 'no_such_model'\. Choose one of timm\.list_models\(\), or after "),
        (("test_resnet", "torchvision/no_such_model"), 64, True, "There is no model 'torchvision/no_such_model'"),
        (("test_resnet", "vit_b_16"), 64, True, r"timm has no model 'vit_b_16', but torchvision has\. Write torchvision/vit_b_16\.$"),
        (("test_resnet", "torchvision/googlenet"), 64, True, "torchvision/googlenet returns a GoogLeNetOutputs and not logits alone"),
        (("test_resnet", "test_vit"), 8, False, "test_vit does not run on 2 images of 8 pixels"),
        (("inception_v4",), 96, True, r"inception_v4 .* 2 images of 32 pixels: .*Try another --size or --batch\. .* --no-curves leaves"),
    ],
)
def test_models_that_do_not_run_are_refused(models: tuple[str, ...], size: int, curves: bool, cause: str) -> None:
    plan = run.Plan(models, (strategies.GRAD_CAM,), 2, size, 1, 0, curves, "cpu", None)
    unknown = any("no_such_model" in name or name == "vit_b_16" for name in models)
    with pytest.raises(LookupError if unknown else ValueError, match=cause):
        run.check(plan, run.Record.of(plan))


def test_the_report_names_what_is_faster_than_attrreg() -> None:
    assert "slower (4.50 to 4.00) than *own forward" in report.markdown(record_with(4.5, 2.0))
    assert "Nowhere in this run" in report.markdown(record_with(2.0, 2.0))
    record = record_with(2.0, 2.0)
    of = next(iter(record.costs.values()))[strategies.INPUT_GRADIENT]
    of[strategies.MOVED] = replace(of[strategies.ATTACHED], ratio=4.5)
    assert f"{strategies.INPUT_GRADIENT}, finite difference, " in report.markdown(record)
