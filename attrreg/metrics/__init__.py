"""How far a model looks where it may, and what it is worth where the shortcut misleads.

Plain functions; `attrreg.metrics.modules` has the same as `torchmetrics.Metric`s, which accumulate over batches and ranks.
"""

from attrreg.metrics.judge import Attribution, Occlusion, judged
from attrreg.metrics.maps import Measure, PointingGame, energy_pointing_game, iou_at_mask_size, pointing_game, share_inside
from attrreg.metrics.predictions import accuracy, auc, group_accuracies, worst_group_accuracy

__all__ = [
    "Attribution",
    "Measure",
    "Occlusion",
    "PointingGame",
    "accuracy",
    "auc",
    "energy_pointing_game",
    "group_accuracies",
    "iou_at_mask_size",
    "judged",
    "pointing_game",
    "share_inside",
    "worst_group_accuracy",
]
