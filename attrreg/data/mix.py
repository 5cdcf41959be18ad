"""Masks that follow a mix of images."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.data import default_collate

from attrreg.data.folder import Sample
from attrreg.masks import at_least_float32, checked_flags

Mix = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class WithMasks:
    """Let masks follow a mix of images: torchvision's `CutMix` and `MixUp`, timm's `Mixup`.

    Those change `x` and leave the mask as it was, which is then wrong without an error. Here each image's mask and whether it is
    annotated go through the mix as further channels of the image:

    - where a box was pasted, so were the mask's pixels;
    - where images were blended, a pixel is relevant if it is in any of them: only what is irrelevant in all is penalised;
    - the result is annotated if every image that it was made of is.

    Labels become soft, `(N, classes)`. Cross-entropy takes them, and so does `target=`: the default score is then the logits of both
    classes, weighted by their shares (`MultiLabelLogit`); with label smoothing, as timm's `Mixup` has it by default, a little of all
    classes.

        mix = WithMasks(v2.CutMix(num_classes=10))
        loader = DataLoader(data, batch_size=32, collate_fn=mix.collate)

    Args:
        mix: called with images and labels, returns both; must treat all channels alike.
    """

    def __init__(self, mix: Mix) -> None:
        if isinstance(mix, type) or not callable(mix):
            raise TypeError(f"mix must be called with images and labels, got {mix!r}. Write for example v2.CutMix(num_classes=10).")
        self.mix = mix

    def __call__(self, batch: Sample) -> Sample:
        """Mix a batch.

        Raises:
            TypeError, ValueError: images are integers, masks are soft or not of the images' size, or the mix changes their shape or type.
        """
        x, mask, label, annotated = batch
        if not x.is_floating_point():
            raise TypeError(f"image must be floating point to be mixed, got {x.dtype}. Add v2.ToDtype(torch.float32, scale=True).")
        if mask.dtype is not torch.bool:
            raise TypeError(f"mask must be boolean to be mixed, got {mask.dtype}. Threshold it, for example mask > 0.5.")
        if mask.shape != (x.shape[0], *x.shape[2:]):
            raise ValueError(
                f"mask must be {(x.shape[0], *x.shape[2:])}, as the images, to be mixed; got {tuple(mask.shape)}. Drop its axis of "
                "channels, or resize it."
            )
        mask = mask.to(x.device)
        known = checked_flags(annotated, x).view(-1, 1, 1).expand_as(mask)
        # In float32 at least: in half precision a blend with little of another image would be rounded to none.
        wide = at_least_float32(x)
        # An image whose share is no more than rounding leaves the others annotated: its mask, if it has none, must not count.
        stacked = torch.cat([wide, torch.stack([mask & known, known], dim=1).to(wide)], dim=1)
        mixed, labels = self.mix(stacked, label)
        if mixed.shape != stacked.shape or mixed.dtype != wide.dtype:  # timm's FastCollateMixup rounds to integers
            raise TypeError(
                f"{type(self.mix).__name__} made {mixed.dtype} {tuple(mixed.shape)} of {wide.dtype} {tuple(stacked.shape)}, in which masks "
                "are lost. Use CutMix or MixUp of torchvision.transforms.v2, or timm.data.Mixup."
            )
        images, relevant, share = mixed[:, :-2], mixed[:, -2] > 0, mixed[:, -1]
        whole = share.flatten(1).amin(dim=1) > 1 - 4 * torch.finfo(torch.float32).eps  # shares of a blend add up to 1 but for rounding
        return Sample(images.to(x.dtype).contiguous(), relevant | ~whole.view(-1, 1, 1), labels, whole)

    def collate(self, samples: list[Sample]) -> Sample:
        """Mix the batch that `default_collate` makes of samples: a loader's `collate_fn` that any worker process can be given."""
        return self(default_collate(samples))

    def __repr__(self) -> str:
        return f"attrreg.data.WithMasks({self.mix!r})"
