"""The benchmark of models of many kinds, in brief."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from attrreg.bench import cases, report
from benchmarks import check, survey
from benchmarks.page import marks
from tests.test_bench import record_with


@pytest.mark.parametrize(
    ("kind", "named"),
    [([], []), (["--channels-last"], []), (["--channels-last"], ["--section", "survey-other"]), (["--torchvision"], [])],
)
def test_a_survey_writes_a_row_a_model_and_what_it_misses(
    kind: list[str], named: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    numbers, page = tmp_path / "survey.json", tmp_path / "page.md"
    section = named[1] if named else "-".join(["survey", *(option.removeprefix("--") for option in kind)])
    page.write_text("\n".join(["before", *marks(section, " ".join([survey.COMMAND, *kind])), "after"]))
    listed = (cases, "MODELS") if "--channels-last" in kind else (survey, "TORCHVISION" if kind else "MODELS")
    monkeypatch.setattr(survey, "PAGE", page)
    monkeypatch.setattr(survey, "ROUNDS", 1)
    monkeypatch.setattr(survey, "keep_memory", lambda: False)  # for the whole process
    monkeypatch.setattr(check, "results", lambda name: numbers)
    runs: list[tuple[tuple[str, ...], list[str]]] = [(("test_resnet",), []), (("test_resnet", "test_vit"), ["--resume"])]
    for models, arguments in runs[:1] if kind else runs:
        monkeypatch.setattr(*listed, models)
        monkeypatch.setattr("sys.argv", ["survey", *arguments, *kind, *named])
        first = report.load(numbers).costs if numbers.exists() else {}
        survey.main()
    record = report.load(numbers)
    assert record.costs.keys() == set(models) and record.costs.items() >= first.items() and bool(first) != bool(kind)
    rows = [line.split("|")[1:-1] for line in page.read_text().splitlines() if line.startswith("| test_")]
    laid_out = "--channels-last" in kind
    assert record.plan.channels_last == laid_out and ("channels_last" in page.read_text()) == laid_out
    assert [row[0].strip() for row in rows] == list(models) and {len(row) for row in rows} == {1 + len(survey.COLUMNS)}


def test_a_survey_tells_each_model_by_itself() -> None:
    kept, slow = (record_with(ratio, 2.0) for ratio in (2.0, 2.9))
    both = replace(kept, costs={"resnet18": kept.costs["resnet18"], "resnet50": slow.costs["resnet18"]})
    assert not survey.alone(both, "resnet18") and {promise.where for promise in survey.alone(both, "resnet50")} == {"resnet50"}
    text = survey.missed(both)
    assert text.startswith("1 of 2 models keep") and "- resnet50: InputGradient: time 2.900, promised at most 2.7" in text
    assert survey.missed(kept) == "Every promise of `benchmarks.check` that is about attrreg and measured here is kept on each of 1 models."


def test_a_survey_for_a_section_that_is_not_there_is_refused_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["survey", "--section", "nowhere"])
    with pytest.raises(SystemExit):
        survey.main()
    assert "has no section nowhere" in capsys.readouterr().err
