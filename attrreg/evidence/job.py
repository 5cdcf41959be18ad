"""One row of evidence: one model trained in one way, and everything that is measured of it."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attrreg import InputGradient, IntegratedGradients, metrics
from attrreg.environment import environment
from attrreg.evidence import sources
from attrreg.evidence.annotation import annotate
from attrreg.evidence.data import Split, Task
from attrreg.evidence.methods import Method, method
from attrreg.evidence.sources import Source
from attrreg.evidence.training import Budget, predict, train

SELECTIONS = ("similar", "valid")  # the splits on which an epoch can be chosen, and settings
IDLE = 4  # an epoch is chosen from the end of the first 1/IDLE of them on: a model that has learnt nothing is fooled by nothing
SAMPLE = 32  # test images whose maps are judged
JUDGES: dict[str, metrics.Attribution] = {
    "input gradient": InputGradient().attribute,
    "integrated gradients": IntegratedGradients(steps=8, chunk=None).attribute,
}


@dataclass(frozen=True)
class Job:
    """What to train. Equal jobs give equal numbers on the same CPU; accelerators need not add up in the same order twice.

    Attributes:
        source: the data set and the model.
        method: its name in `methods.METHODS`.
        seed: of data, initial weights, order of the images, draws.
        rate: peak of the one-cycle learning rate.
        weight: of what is added to the loss.
        epochs, batch: of the training.
        annotated: share of the training images that have a mask.
        quality: of the masks, one of `annotation.QUALITIES`.
        judged: whether maps are judged too, which takes time.
    """

    source: Source
    method: str
    seed: int
    rate: float
    weight: float
    epochs: int
    batch: int
    annotated: float = 1.0
    quality: str = "exact"
    judged: bool = False

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "source": sources.as_dict(self.source)}

    @staticmethod
    def from_dict(data: dict[str, Any], kinds: tuple[type[Source], ...] = sources.KINDS) -> Job:
        """Back from JSON."""
        return Job(**{**data, "source": sources.from_dict(data["source"], kinds)})

    @property
    def name(self) -> str:
        """A short name that no other job has.

        It changes when the method of this name does, except by a default of the library, which the repr of a term leaves out: after such
        a change take another file.
        """
        used = self.train_with()
        content = json.dumps([self.as_dict(), repr(used.term), repr(used.transform)], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:10]

    def train_with(self) -> Method:
        """The method with this job's weight."""
        return replace(method(self.method), weight=self.weight)


@dataclass(frozen=True)
class Record:
    """What came of a job.

    Attributes:
        job: what was trained.
        outcomes: by the split on which the epoch was chosen: the epoch, what it was chosen by, and, if tested, the numbers of the test.
        seconds: time that it took.
        environment: see `environment.environment`.
    """

    job: Job
    outcomes: dict[str, dict[str, Any]]
    seconds: float
    environment: dict[str, Any]

    def line(self) -> str:
        """As a line of JSON."""
        content = {"name": self.job.name, **asdict(self), "job": self.job.as_dict(), "regularizer": repr(self.job.train_with().term)}
        return json.dumps(content)

    @staticmethod
    def from_line(line: str, kinds: tuple[type[Source], ...] = sources.KINDS) -> Record:
        """Back from JSON."""
        data = json.loads(line)
        return Record(Job.from_dict(data["job"], kinds), data["outcomes"], data["seconds"], data["environment"])


Note = Callable[[int], None]  # told of each epoch that is over


def run(job: Job, device: torch.device, note: Note = lambda epochs: None, tested: bool = True) -> Record:
    """Train and measure; for tuning without the test, which it must not see.

    After each epoch from a quarter on the cross-entropy is taken on both validation splits, and the weights with the lowest on each
    are kept: so one training shows what a user with shifted validation data would have, and one without. On one CPU thread, since sums
    round differently on more: to use more cores, run more jobs at a time.

    Raises:
        packages.Missing: a package that the data comes from is not here.
    """
    with _one_thread(), torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
        return _run(job, device, note, tested)


@lru_cache(maxsize=2)
def _task(source: Source, seed: int) -> Task:
    """The data; kept, because the next job is often on the same."""
    torch.manual_seed(seed)  # for data of the user's that draw from the default generators
    return source.task(seed)


def _run(job: Job, device: torch.device, note: Note, tested: bool) -> Record:
    start = time.perf_counter()
    task = _task(job.source, job.seed).to(device)
    torch.manual_seed(job.seed)  # for such a model: the same whether the data were made or kept
    model = job.source.model(task, job.seed).to(device)
    best = _train(job, model, task, note)
    outcomes: dict[str, dict[str, Any]] = {}
    measured: dict[int, dict[str, Any]] = {}  # where both splits chose one epoch, it is measured once
    for name in SELECTIONS:
        loss, epoch, state = best[name]
        if tested and epoch not in measured:
            model.load_state_dict(state)
            measured[epoch] = _outcome(model, task)
        outcomes[name] = {**measured.get(epoch, {}), "epoch": epoch, "loss": loss}
    values = [value for value in model.state_dict().values() if isinstance(value, Tensor)]  # a module may keep other things there
    if tested and job.judged and all(bool(value.isfinite().all()) for value in values):
        outcomes["valid"]["maps"] = _judgements(model, task.test)  # the last of SELECTIONS, whose weights the model has
    return Record(job, outcomes, round(time.perf_counter() - start, 1), environment(device))


def _train(job: Job, model: nn.Module, task: Task, note: Note) -> dict[str, tuple[float, int, dict[str, Tensor]]]:
    """Train, and give what was best on each validation split: the loss, the epoch, the weights. The model is left in eval mode."""
    data = annotate(task.train, job.annotated, job.quality, job.seed)
    budget, each = Budget(job.epochs, job.batch, job.rate), len(data) // job.batch
    best: dict[str, tuple[float, int, dict[str, Tensor]]] = {}
    for count, _ in enumerate(train(model, data, job.train_with(), budget, job.seed), start=1):
        epoch, left = divmod(count, each)
        if left:
            continue
        if epoch >= job.epochs / IDLE:
            model.eval()
            for name in SELECTIONS:
                loss = _loss(model, getattr(task, name))
                if name not in best or loss < best[name][0]:
                    best[name] = loss, epoch, copy.deepcopy(model.state_dict())
            model.train()
        note(1)
    model.eval()
    return best


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _loss(model: nn.Module, split: Split) -> float:
    """Cross-entropy; infinite where it is not a number, so that a model that diverged is never chosen over one that did not."""
    loss = F.cross_entropy(predict(model, split.images), split.labels).item()
    return math.inf if math.isnan(loss) else loss


def _outcome(model: nn.Module, task: Task) -> dict[str, Any]:
    logits = predict(model, task.test.images)
    area = metrics.auc(logits, task.test.labels)
    return {
        "similar": _accuracy(model, task.similar),
        "valid": _accuracy(model, task.valid),
        "test": metrics.accuracy(logits, task.test.labels),
        "auc": None if area is None or math.isnan(area) else area,  # of a model that diverged there is none
        "worst": metrics.worst_group_accuracy(logits, task.test.labels, task.test.grouped),
        "clean": _accuracy(model, task.clean_test),
    }


def _accuracy(model: nn.Module, split: Split) -> float:
    return metrics.accuracy(predict(model, split.images), split.labels)


def _judgements(model: nn.Module, split: Split) -> dict[str, dict[str, float | None]] | None:
    """Share inside and IoU on a sample of the test, by three attributions of which at most one was trained; None: no mask
    has a relevant pixel.
    """
    known = split.masks.flatten(1).any(dim=1)  # of an empty mask the share inside is 0, whatever the model does
    known = known if split.annotated is None else known & split.annotated
    some = split.take(known.nonzero()[:, 0]).sample(SAMPLE)
    if not len(some):
        return None
    window = max(2, min((side for side in some.images.shape[-2:] if side > 1), default=2) // 7)  # of the shorter side; signals have one
    judges: dict[str, metrics.Attribution] = {**JUDGES, "occlusion": metrics.Occlusion(window, window)}
    found: dict[str, dict[str, float | None]] = {}
    for name, attribution in judges.items():
        map = attribution(model, some.images, some.labels)
        measures: dict[str, metrics.Measure] = {"inside": metrics.share_inside, "iou": metrics.iou_at_mask_size}
        found[name] = {what: _mean(measure(map, some.masks)) for what, measure in measures.items()}
    return found


def _mean(values: Tensor) -> float | None:
    mean = values.nanmean().item()
    return None if math.isnan(mean) else mean  # JSON has no NaN
