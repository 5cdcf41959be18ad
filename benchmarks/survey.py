"""What a penalty costs on models of many kinds: writes a table into docs/performance.md.

python -m benchmarks.survey                    three quarters of an hour on two cores
python -m benchmarks.survey --channels-last    the nine models of `attrreg bench` in that layout; ten minutes
python -m benchmarks.survey --torchvision      models of torchvision in place of timm's; ten minutes
python -m benchmarks.survey --resume           go on with one that was interrupted
python -m benchmarks.survey --section survey-zen4    the same for a section of any name, as of another processor
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

from rich.console import Console
from rich.progress import track

from attrreg import keep_memory
from attrreg.bench import cases, report, run
from attrreg.bench import strategies as ways
from attrreg.bench.measure import Cost, costs
from attrreg.tables import markdown_table
from benchmarks import check
from benchmarks.__main__ import PAGE
from benchmarks.page import marks, write_section

COMMAND = "python -m benchmarks.survey"
PROMISE = "promise of `benchmarks.check` that is about attrreg and measured here"
ROUNDS = 7
MODELS: tuple[str, ...] = (
    # Convolutions
    *("resnet34", "resnetv2_50", "resnext50_32x4d", "seresnet50", "skresnet18", "dpn68", "hrnet_w18_small", "ese_vovnet19b_dw"),
    *("gernet_s", "repvgg_a0", "mobileone_s0", "regnetx_004"),
    # Mostly depthwise convolutions
    *("mobilenetv2_100", "mobilenetv4_conv_small", "mnasnet_100", "tf_efficientnetv2_b0", "efficientnet_lite0", "mixnet_s", "tinynet_e"),
    *("lcnet_050", "ghostnet_100", "rexnet_100", "repvit_m1", "starnet_s1", "convnextv2_atto", "inception_next_atto", "mambaout_femto"),
    # Attention, with or without convolutions
    *("deit_tiny_patch16_224", "eva02_tiny_patch14_224", "cait_xxs24_224", "xcit_nano_12_p16_224", "pit_ti_224", "pvt_v2_b0", "levit_128s"),
    *("mobilevit_s", "edgenext_xx_small", "fastvit_t8", "efficientvit_b0", "coat_lite_tiny", "maxvit_pico_rw_256", "visformer_tiny"),
    # Neither
    *("resmlp_12_224", "poolformer_s12", "sequencer2d_s"),
)
TORCHVISION = tuple(
    f"torchvision/{name}"
    for name in (
        *("alexnet", "squeezenet1_1", "shufflenet_v2_x0_5", "mobilenet_v3_small", "mnasnet0_5", "efficientnet_b0", "regnet_y_400mf"),
        *("convnext_tiny", "swin_t", "vit_b_32"),
    )
)
MEASURED = {
    ways.INPUT_GRADIENT: (ways.TODAY, ways.ATTACHED, ways.LAZY),
    ways.GRAD_CAM: (ways.ATTACHED,),
    ways.ACTIVATION_DIFFERENCE: (ways.ATTACHED,),
    ways.SUM: (ways.TODAY, ways.ATTACHED),
    ways.INTEGRATED_GRADIENTS: (ways.CAPTUM, ways.ATTACHED),
}
Found = dict[str, dict[str, Cost]]  # penalty -> way -> its cost


def _both(penalty: str, way: str) -> Callable[[Found], tuple[float, ...]]:
    return lambda found: (found[penalty][way].ratio, found[penalty][way].memory)


def _time(penalty: str, way: str) -> Callable[[Found], tuple[float, ...]]:
    return lambda found: (found[penalty][way].ratio,)


def _gain(penalty: str, way: str) -> Callable[[Found], tuple[float, ...]]:
    return lambda found: (found[penalty][way].ratio / found[penalty][ways.ATTACHED].ratio,)


COLUMNS: dict[str, Callable[[Found], tuple[float, ...]]] = {
    "InputGradient": _both(ways.INPUT_GRADIENT, ways.ATTACHED),
    ways.TODAY: _both(ways.INPUT_GRADIENT, ways.TODAY),
    "times as fast": _gain(ways.INPUT_GRADIENT, ways.TODAY),
    "every 4 steps": _time(ways.INPUT_GRADIENT, ways.LAZY),
    "GradCAM": _time(ways.GRAD_CAM, ways.ATTACHED),
    "ActivationDifference": _time(ways.ACTIVATION_DIFFERENCE, ways.ATTACHED),
    "all three": _both(ways.SUM, ways.ATTACHED),
    "written separately": _both(ways.SUM, ways.TODAY),
    ways.INTEGRATED_GRADIENTS: _both(ways.INTEGRATED_GRADIENTS, ways.ATTACHED),
    "times as fast as Captum's": _gain(ways.INTEGRATED_GRADIENTS, ways.CAPTUM),
}


def measure(name: str, penalties: tuple[str, ...], plan: run.Plan) -> Found:
    """Some penalties on one model, between the same plain steps."""
    case = plan.case(name, plan.batch, plan.size)
    steps = {}
    for penalty in penalties:
        found = {strategy.name: strategy for strategy in ways.strategies(penalty, case)}
        steps[ways.PLAIN] = found[ways.PLAIN].prepare(case)
        steps |= {f"{penalty}: {way}": found[way].prepare(case) for way in MEASURED[penalty]}
    rounds, warmup = plan.rounds_of(penalties[0])
    taken = costs(steps, rounds, warmup, lambda part: None)
    return {
        penalty: {ways.PLAIN: taken[ways.PLAIN]} | {way: taken[f"{penalty}: {way}"] for way in MEASURED[penalty]} for penalty in penalties
    }


def alone(record: run.Record, name: str) -> list[check.Promise]:
    """The promises that one model breaks. A median over models is not its own, and what today's ways cost is not up to us."""
    one = run.Record(record.plan, record.environment, {name: record.costs[name]})
    return [promise for promise in check.promises(one) if not promise.kept and promise.where == name and promise.text != check.SEPARATELY]


def table(record: run.Record) -> str:
    """A row a model, and their medians."""
    rows = {name: [column(found) for column in COLUMNS.values()] for name, found in record.costs.items()}
    middle = [tuple(statistics.median(part) for part in zip(*cells, strict=True)) for cells in zip(*rows.values(), strict=True)]
    lines = []
    for name, cells in (rows | {"**median**": middle}).items():
        lines.append([name, *(" / ".join(f"{value:.2f}" for value in cell) for cell in cells)])
    return markdown_table(["model", *COLUMNS], lines)


def missed(record: run.Record) -> str:
    """How many models keep all promises, and what the others break."""
    broken = {name: promises for name in record.costs if (promises := alone(record, name))}
    if not broken:
        return f"Every {PROMISE} is kept on each of {len(record.costs)} models."
    lines = [
        f"- {name}: {promise.text} {promise.value:.3f}, {promise.promised}" for name, promises in broken.items() for promise in promises
    ]
    kept = len(record.costs) - len(broken)
    return "\n".join([f"{kept} of {len(record.costs)} models keep every {PROMISE}; missed are:", "", *lines])


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--resume", action="store_true", help="keep what is measured already, by the same code and versions on the same machine"
    )
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--channels-last", action="store_true", help="lay out models and images in torch.channels_last")
    kinds.add_argument("--torchvision", action="store_true", help="measure torchvision's models")
    parser.add_argument("--section", help="of the page; else it follows from these")
    arguments = parser.parse_args()
    usual, command, models = "survey", COMMAND, MODELS
    if arguments.channels_last:
        usual, command, models = "survey-channels-last", f"{COMMAND} --channels-last", cases.MODELS
    elif arguments.torchvision:
        usual, command, models = "survey-torchvision", f"{COMMAND} --torchvision", TORCHVISION
    section = arguments.section or usual
    if marks(section, command)[0] not in PAGE.read_text():  # rather than after an hour
        parser.error(f"docs/{PAGE.name} has no section {section} of `{command}`. Write its marks there first.")
    numbers = check.results(section)
    plan = run.Plan(
        models=models,
        penalties=ways.PENALTIES,
        batch=16,
        size=64,
        rounds=ROUNDS,
        warmup=1,
        curves=False,
        device="cpu",
        autocast=None,
        keep_memory=keep_memory(),
        channels_last=arguments.channels_last,
    )
    try:
        record = report.load(numbers).resumed(plan) if arguments.resume and numbers.exists() else run.Record.of(plan)
    except ValueError as error:
        parser.error(f"{numbers} cannot be gone on with: {error}")
    absent = list(dict.fromkeys(model for model, _ in record.missing(plan)))
    path = (ways.INTEGRATED_GRADIENTS,)  # ten times as slow, and so by itself, in fewer rounds
    others = tuple(penalty for penalty in plan.penalties if penalty not in path)
    for name in track(absent, section, console=Console()):
        record.costs[name] = measure(name, others, plan) | measure(name, path, plan)
        # In the order of the list, also where a run went on with what another had measured.
        record.costs = {model: record.costs[model] for model in record.plan.models if model in record.costs}
        report.save(record, numbers)
    write_section(PAGE, section, command, f"{report.conditions(record)} {report.noise(record)}", table(record), missed(record))


if __name__ == "__main__":
    main()
