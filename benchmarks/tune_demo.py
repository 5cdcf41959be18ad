"""How the demo's regularizers were chosen: four settings of each kind, the demo's own budget, judged on the valid split.

    python -m benchmarks.tune_demo decoy-mnist [seed]

The valid split misleads as the test split does. That is the protocol of the founding paper, and it presumes some labelled
images in which the shortcut does not hold. The four are what an earlier look at some fifteen settings of each kind, mostly
on the valid split, had left; that look also fixed the task (a patch that fools the plain model), budget and learning rate.

Accuracy on the valid split of seed 0, in the order of `CANDIDATES` (torch 2.15, one thread); plain has .190 on decoy-mnist
and .000 on crosses. The same digits in another order than `decoy_mnist` has them now, so a new run differs a little.
Objective and score are named where they were the library's defaults at that time:

| kind | decoy-mnist | crosses |
|---|---|---|
| activation difference | .930, **.968**, .974, .974 | .984, **.992**, .984, .992 |
| Grad-CAM | .216, .214, .220, **.332** | .000, .000, .000, **.008** |
| input gradient | .822, .956, **.972**, .930 | .000, .000, **.000**, .000 |
| integrated gradients | **.962**, .956, .796, .622 | .000, .070, **.125**, .078 |

Bold: what the demo uses; in place of the input gradient's, it has taken the library's default since. Activation difference at
1.0 is not told from 0.3 by 500 images; one weight serves both tasks.
"""

from __future__ import annotations

import sys
import time

from attrreg import ActivationDifference, GradCAM, InputGradient
from attrreg.demo.settings import path_term, settings
from attrreg.evidence.methods import Method
from attrreg.evidence.models import small
from attrreg.evidence.training import predict, train
from attrreg.metrics import accuracy, auc
from attrreg.objectives import AbsoluteOutside, OutsideFraction, SquaredOutside
from attrreg.scores import Contrast, RandomProjection, SumLogProb, TargetLogit

CANDIDATES = (
    Method("plain"),
    *(Method("activation difference", ActivationDifference(), w) for w in (0.1, 0.3, 1.0)),
    Method("activation difference", ActivationDifference("layer4"), 0.1),
    *(Method("Grad-CAM", GradCAM("layer4", score=TargetLogit(), objective=OutsideFraction()), w) for w in (1.0, 3.0)),
    *(Method("Grad-CAM", GradCAM("layer4", score=SumLogProb(), objective=AbsoluteOutside()), w) for w in (0.3, 1.0)),
    *(Method("input gradient", InputGradient(score=Contrast(), objective=SquaredOutside()), w) for w in (1.0, 3.0)),
    *(Method("input gradient", InputGradient(score=Contrast(), objective=AbsoluteOutside()), w) for w in (0.3, 1.0)),
    *(Method("integrated gradients", path_term(Contrast()), w) for w in (0.3, 1.0)),
    *(Method("integrated gradients", path_term(RandomProjection()), w) for w in (10.0, 30.0)),
)


def main(data: str, seed: int) -> None:
    """Print each candidate's accuracy on the valid split."""
    chosen = settings(data, seed=seed)
    task = chosen.task()
    for method in CANDIDATES:
        model = small(task.classes, seed)
        start = time.perf_counter()
        for _ in train(model, task.train, method, chosen.budget, seed):
            pass
        logits = predict(model.eval(), task.valid.images)
        area = auc(logits, task.valid.labels)
        ranking = "" if area is None else f" AUC {area:.3f}"
        took = time.perf_counter() - start
        print(f"{accuracy(logits, task.valid.labels):.3f}{ranking}  {took:4.0f} s  {method.term!r}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 0)
