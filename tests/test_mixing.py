"""Masks that follow mixed images."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy
import pytest
import torch
import torch.nn.functional as F
from timm.data import FastCollateMixup, Mixup
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.transforms import v2

import attrreg
from attrreg import scores
from attrreg.data import MaskedImageFolder, MaskFolder, Sample, WithMasks
from tests import shapes

FLOAT = v2.ToDtype(torch.float32, scale=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> MaskedImageFolder:
    root: Path = tmp_path_factory.mktemp("shapes")
    shapes.write(root, each=4)
    return MaskedImageFolder(root / "images", MaskFolder(root / "masks"))


def batch() -> Sample:
    torch.manual_seed(1)
    return Sample(torch.rand(4, 3, 16, 16), torch.rand(4, 16, 16) < 0.3, torch.tensor([0, 1, 2, 1]), torch.tensor([1, 1, 0, 1]).bool())


def made_from(images: Tensor, mixed: Tensor, pixelwise: bool) -> Tensor:
    """Which images a mixed one is made of, `(N, N, H, W)` bool, found from the pixels alone."""
    if pixelwise:
        return (mixed[:, None] == images[None]).all(dim=2)
    flat = images.flatten(1).double()
    shares: Tensor = torch.linalg.lstsq(flat.T, mixed.flatten(1).double().T).solution.T
    return (shares > 1e-6)[:, :, None, None].expand(-1, -1, *images.shape[2:])


MIXES = {
    "torchvision cutmix": (lambda: v2.CutMix(num_classes=3), True),
    "torchvision mixup": (lambda: v2.MixUp(num_classes=3), False),
    "timm cutmix": (lambda: Mixup(mixup_alpha=0.0, cutmix_alpha=1.0, num_classes=3, mode="elem"), True),
    "timm mixup": (lambda: Mixup(mixup_alpha=1.0, num_classes=3, mode="pair"), False),
}


@pytest.mark.parametrize("name", MIXES)
def test_masks_follow_the_mix(name: str) -> None:
    make, pixelwise = MIXES[name]
    given = batch()
    for seed in range(20):
        torch.manual_seed(seed)
        numpy.random.seed(seed)
        mixed = WithMasks(make())(given)
        torch.manual_seed(seed)
        numpy.random.seed(seed)
        alone, labels = make()(given.image.clone(), given.label)
        torch.testing.assert_close(mixed.image, alone)
        torch.testing.assert_close(mixed.label, labels)
        made_of = made_from(given.image, mixed.image, pixelwise)
        unknown = (made_of & ~given.annotated.view(1, -1, 1, 1)).flatten(1).any(dim=1)
        relevant = (made_of & given.mask[None]).any(dim=1)
        assert torch.equal(mixed.annotated, ~unknown)
        assert torch.equal(mixed.mask, relevant | unknown.view(-1, 1, 1))


@pytest.mark.cpu
def test_mixed_batches_train(folder: MaskedImageFolder) -> None:
    data = MaskedImageFolder(folder.root, folder.masks, FLOAT)
    mix = WithMasks(v2.RandomChoice([v2.CutMix(num_classes=2), v2.MixUp(num_classes=2)]))
    loader = DataLoader(data, batch_size=8, shuffle=True, collate_fn=mix.collate)
    x, mask, y, annotated = next(iter(loader))
    model = nn.Sequential(nn.Conv2d(3, 4, 5), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    value = attrreg.InputGradient()(model, x, mask, target=y, annotated=annotated)
    shared = attrreg.InputGradient(scores.MultiLabelLogit())(model, x, mask, target=y, annotated=annotated)
    torch.testing.assert_close(value, shared)
    (F.cross_entropy(model(x), y) + value).backward()
    assert annotated.any() and not annotated.all() and float(value.detach()) > 0


def test_a_mix_goes_to_spawned_workers(folder: MaskedImageFolder) -> None:
    # They are given the data set and the collate function as pickles.
    given = MaskedImageFolder(folder.root, folder.masks, FLOAT), WithMasks(Mixup(cutmix_alpha=1.0, num_classes=2)).collate
    data, collate = pickle.loads(pickle.dumps(given))
    mixed = collate([data[0], data[1]])
    assert mixed.label.shape == (2, 2) and mixed.mask.dtype == torch.bool


def test_a_little_of_an_unannotated_image_counts_in_half_precision_too() -> None:
    given, known = batch(), torch.tensor([True, False, False, False])
    mix = WithMasks(lambda images, labels: (0.9999 * images + 0.0001 * images.roll(1, 0), labels))
    mixed = mix(given._replace(image=given.image.bfloat16(), annotated=known))
    assert mixed.image.dtype == torch.bfloat16 and not mixed.annotated.any()
    assert mix(given._replace(image=given.image.bfloat16(), annotated=torch.ones(4, dtype=torch.bool))).annotated.all()


def test_a_share_that_is_no_more_than_rounding_brings_no_mask_along() -> None:
    given, known = batch(), torch.tensor([True, False, False, False])
    mixed = WithMasks(lambda images, labels: ((1 - 1e-8) * images + 1e-8 * images.roll(1, 0), labels))(given._replace(annotated=known))
    assert mixed.annotated.equal(known) and mixed.mask[0].equal(given.mask[0])


def test_shares_in_single_precision_add_up_in_double_precision_too() -> None:
    given, (share, rest) = batch(), torch.tensor([0.1, 0.9]).tolist()  # timm's are in float32: these two add up to 1 - 2e-8
    mix = WithMasks(lambda images, labels: (share * images + rest * images.flip(0), labels))
    given = given._replace(image=given.image.double(), annotated=torch.ones(4, dtype=torch.bool))
    assert mix(given).annotated.all()


def test_what_cannot_be_mixed() -> None:
    mix, given = WithMasks(v2.CutMix(num_classes=3)), batch()
    with pytest.raises(TypeError, match=r"annotated must be a boolean tensor, got list"):
        mix(given._replace(annotated=[True] * 4))
    with pytest.raises(TypeError, match=r"mask must be boolean.*mask > 0\.5"):
        mix(given._replace(mask=given.mask.float()))
    with pytest.raises(ValueError, match=r"mask must be \(4, 16, 16\).*resize"):
        mix(given._replace(mask=given.mask[:, ::2, ::2]))
    with pytest.raises(TypeError, match=r"image must be floating point.*ToDtype"):
        mix(given._replace(image=given.image.byte()))
    with pytest.raises(TypeError, match=r"FastCollateMixup made torch\.uint8 .* masks are lost\. Use CutMix"):
        WithMasks(FastCollateMixup(num_classes=3))(given)
    with pytest.raises(TypeError, match=r"made torch\.float32 \(4, 5, 8, 8\) of .* masks are lost"):
        WithMasks(lambda images, labels: (images[..., ::2, ::2], labels))(given)
    with pytest.raises(TypeError, match=r"made torch\.float16 \(4, 5, 16, 16\) of .* masks are lost"):
        WithMasks(lambda images, labels: (images.half(), labels))(given)
