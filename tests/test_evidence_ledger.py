"""Records: what cannot be kept is not trained, and what is judged in one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("matplotlib")
pytest.importorskip("scipy")

from attrreg import metrics
from attrreg.evidence import job
from attrreg.evidence.ledger import Ledger, processes
from tests.test_evidence import CPU, JOB, TINY

pytestmark = pytest.mark.cpu


def test_a_full_disk_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, line: str) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("attrreg.evidence.ledger.add_line", full)
    started: list[str] = []
    ledger = Ledger(tmp_path / "full.jsonl", CPU, lambda doing, count: started.append(doing))
    with pytest.raises(OSError, match="No space left"):
        ledger.run([replace(JOB, seed=seed) for seed in range(3)])
    assert len(started) == 1 and not ledger.records


def test_windows_waits_for_61_processes_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "win32")
    with processes(100) as pool:
        assert pool._max_workers == 61  # type: ignore[attr-defined]


def test_images_without_a_relevant_pixel_are_not_judged() -> None:
    task = TINY.task(0)
    model, some = TINY.model(task, 0).eval(), torch.arange(len(task.test)) % 2 == 0
    part = replace(task.test, masks=task.test.masks & some.view(-1, 1, 1))
    assert job._judgements(model, part) == job._judgements(model, task.test.take(some.nonzero()[:, 0]))


@pytest.mark.parametrize(("size", "window"), [((16, 64), 2), ((64, 28), 4), ((1, 64), 9)])
def test_occlusion_takes_windows_of_the_shorter_side(size: tuple[int, int], window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, ...]] = []
    occlusion = metrics.Occlusion

    def noted(*sizes: int) -> metrics.Occlusion:
        asked.append(sizes)
        return occlusion(min(2, min(size)), 1)

    monkeypatch.setattr(metrics, "Occlusion", noted)
    part = replace(TINY.task(0).test, images=torch.rand(8, 1, *size), masks=torch.ones(8, *size, dtype=torch.bool))
    job._judgements(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1, 2)), part)
    assert asked == [(window, window)]
