"""What masks cost and how good they are: some of the images, and masks that are too large, boxes, or beside the place."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Generator, Tensor

from attrreg.evidence.data import Split, dilate, first_of_each

QUALITIES = ("exact", "dilated", "boxes", "shifted")
OFFSET = 1_000_003


def annotate(split: Split, share: float, quality: str, seed: int) -> Split:
    """The split as if only a share of its images had been annotated, and in a certain way.

    Args:
        split: its images, of which those that have no mask stay without one.
        share: of the images that have one and keep it, drawn at random, each class alike and at least one of each if there are any.
        quality: "exact"; "dilated" by a tenth of the image's side; "boxes" around the mask; "shifted" sidewards by a tenth of the side.
        seed: of who is annotated. A larger share contains a smaller one.

    Raises:
        ValueError: naming the argument.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must be in [0, 1], got {share}. Write for example 0.05.")
    if quality not in QUALITIES:
        raise ValueError(f"quality {quality!r} is unknown. Use one of {', '.join(map(repr, QUALITIES))}.")
    annotated = split.annotated if share == 1 else _chosen(split, share, seed)
    return replace(split, masks=_drawn(split.masks, quality), annotated=annotated)


def _chosen(split: Split, share: float, seed: int) -> Tensor:
    labels = split.labels.cpu()
    known = torch.ones(len(split), dtype=torch.bool) if split.annotated is None else split.annotated.cpu()
    # Of a seed of its own: from that of the training, this would be the order of its first epoch.
    order = torch.randperm(len(labels), generator=Generator().manual_seed(seed + OFFSET))
    order = order[known[order]]
    first = first_of_each(labels[order], lambda count: max(1, round(share * count)) if share > 0 else 0)
    chosen = torch.zeros_like(known)
    chosen[order[first]] = True
    return chosen.to(split.labels.device)


def _drawn(masks: Tensor, quality: str) -> Tensor:
    tenth = max(1, round(masks.shape[-1] / 10))
    if quality == "dilated":
        return dilate(masks, tenth)
    if quality == "boxes":
        rows, columns = masks.any(dim=2), masks.any(dim=1)
        return _between(rows).unsqueeze(2) & _between(columns).unsqueeze(1)
    if quality == "shifted":
        moved = torch.zeros_like(masks)
        moved[..., tenth:] = masks[..., :-tenth]
        return moved
    return masks


def _between(some: Tensor) -> Tensor:
    """From the first True of each row to the last."""
    return some.cummax(dim=1).values & some.flip(1).cummax(dim=1).values.flip(1)
