"""Data: an image and its mask stay together, from the files to the penalty."""

from __future__ import annotations

import json
import pickle
from pathlib import Path, PurePosixPath
from typing import Any

import numpy
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import datasets, tv_tensors
from torchvision import transforms as v1
from torchvision.transforms import v2

import attrreg
from attrreg.data import BoxFile, MaskedImageFolder, MaskFolder, MaskSource, Sample
from tests import shapes
from tests.models import FAMILIES

FLOAT = v2.ToDtype(torch.float32, scale=True)

pytestmark = pytest.mark.cpu


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("shapes")
    shapes.write(made, each=4)
    return made


@pytest.fixture(scope="module")
def folder(root: Path) -> MaskedImageFolder:
    return MaskedImageFolder(root / "images", MaskFolder(root / "masks"))


# The data set


def test_images_and_labels_are_those_of_image_folder(root: Path, folder: MaskedImageFolder) -> None:
    theirs = datasets.ImageFolder(root / "images")
    assert folder.classes == theirs.classes and folder.targets == theirs.targets and len(folder) == len(theirs)
    for index, (image, label) in enumerate(theirs):
        ours = folder[index]
        assert (ours.image.numpy() == numpy.asarray(image).transpose(2, 0, 1)).all() and ours.label == label


def test_masks_are_the_files_and_missing_ones_are_said(root: Path, folder: MaskedImageFolder) -> None:
    assert folder.annotated.tolist() == 2 * [True, True, True, False]
    for index, name in enumerate(folder.names):
        sample = folder[index]
        path = (root / "masks" / name).with_suffix(".png")
        assert isinstance(sample.image, tv_tensors.Image) and isinstance(sample.mask, tv_tensors.Mask)
        assert sample.mask.dtype is torch.bool and sample.annotated == path.exists()
        expected = numpy.asarray(Image.open(path)) > 0 if path.exists() else numpy.ones((32, 32), dtype=bool)
        assert (sample.mask.numpy() == expected).all()


def test_images_that_would_share_a_mask_are_refused(tmp_path: Path) -> None:
    shapes.write(tmp_path, each=3)
    Image.new("RGB", (32, 32)).save(tmp_path / "images" / "disc" / "000.bmp")
    with pytest.raises(ValueError, match=r"000\.png would be the mask of several images.*Rename one"):
        MaskedImageFolder(tmp_path / "images", MaskFolder(tmp_path / "masks"))


def test_images_without_a_mask_share_none(tmp_path: Path) -> None:
    shapes.write(tmp_path, each=3)  # the last of each class has none
    Image.new("RGB", (32, 32)).save(tmp_path / "images" / "disc" / "002.bmp")
    assert len(MaskedImageFolder(tmp_path / "images", MaskFolder(tmp_path / "masks"))) == 7


def test_an_empty_mask_is_not_a_missing_one(tmp_path: Path) -> None:
    shapes.write(tmp_path, each=3)
    Image.fromarray(numpy.zeros((32, 32), dtype=numpy.uint8)).save(tmp_path / "masks" / "disc" / "000.png")
    sample = MaskedImageFolder(tmp_path / "images", MaskFolder(tmp_path / "masks"))[0]
    assert sample.annotated is True and not sample.mask.any()


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")  # how loaders start workers on Linux, from Python 3.12 on
@pytest.mark.parametrize("workers", [0, 1])
def test_batches_go_into_the_penalty(folder: MaskedImageFolder, workers: int) -> None:
    data = MaskedImageFolder(folder.root, folder.masks, v2.Compose([FLOAT, v2.Normalize([0.5] * 3, [0.2] * 3)]))
    x, mask, y, annotated = batch = next(iter(DataLoader(data, batch_size=5, num_workers=workers)))
    assert type(x) is type(mask) is type(y) is type(annotated) is Tensor
    assert x.shape == (5, 3, 32, 32) and mask.shape == (5, 32, 32) and mask.dtype is annotated.dtype is torch.bool
    assert y.tolist() == [0, 0, 0, 0, 1] and annotated.tolist() == [True, True, True, False, True]
    assert isinstance(batch, Sample)
    model, known = FAMILIES["resnet"].build().eval(), annotated
    value = attrreg.InputGradient()(model, x, mask, target=y, annotated=annotated)
    torch.testing.assert_close(value, attrreg.InputGradient()(model, x[known], mask[known], target=y[known]))


AUGMENTATIONS = [
    v2.RandomHorizontalFlip(1.0),
    v2.RandomResizedCrop(24, scale=(0.3, 0.6)),
    v2.RandomRotation((30, 31)),
    v2.RandomAffine((10, 11), translate=(0.2, 0.2), scale=(1.2, 1.3)),
    v2.RandomPerspective(0.4, p=1.0),
    v2.ElasticTransform(20.0),
    v2.Resize(45),
    v2.Pad(3),
]


class InTheImage(MaskSource):
    """The mask of an image whose bright pixels are relevant: so it can be told from the image after any transform."""

    def __init__(self, pattern: Tensor) -> None:
        self.pattern = pattern

    def __contains__(self, name: object) -> bool:
        return True

    def __call__(self, name: PurePosixPath, size: tuple[int, int]) -> Tensor:
        return self.pattern


@pytest.mark.parametrize("augmentation", AUGMENTATIONS, ids=lambda transform: type(transform).__name__)
def test_image_and_mask_move_together(root: Path, augmentation: Any) -> None:
    pattern = torch.zeros(32, 32, dtype=torch.bool)
    pattern[6:20, 12:28] = True
    data = MaskedImageFolder(root / "images", InTheImage(pattern), augmentation, loader=lambda path: 255 * pattern.to(torch.uint8)[None])
    for index in range(4):
        image, mask, *_ = data[index]
        assert mask.dtype is torch.bool and mask.shape == image.shape[-2:]
        # The mask takes the nearest pixel, the image a mean of neighbours: they must agree wherever all neighbours do.
        inside, outside = image[0] >= 254, image[0] <= 1
        assert bool(mask[inside].all()) and not bool(mask[outside].any())
        assert bool(inside.any()) and (inside | outside).float().mean() > 0.8


def test_masks_by_suffix_and_value(tmp_path: Path) -> None:
    shapes.write(tmp_path, each=1, without_mask=0)
    labels = numpy.zeros((32, 32), dtype=numpy.uint8)
    labels[:10], labels[20:] = 1, 2
    picture = Image.fromarray(labels).convert("P")
    picture.putpalette([0, 0, 0, 9, 9, 9, 0, 0, 0])  # an index is not the grey value that it stands for
    picture.save(tmp_path / "masks" / "disc" / "000_part.png")
    source = MaskFolder(tmp_path / "masks", "_part.png", relevant=lambda values: values == 2)
    data = MaskedImageFolder(tmp_path / "images", source)
    assert data.annotated.tolist() == [True, False]
    assert (data[0].mask.numpy() == (labels == 2)).all()


def share(values: Tensor) -> Tensor:
    return values / 255


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
@pytest.mark.parametrize("workers", [0, 1])
def test_soft_masks_of_which_some_are_missing(root: Path, workers: int) -> None:
    data = MaskedImageFolder(root / "images", MaskFolder(root / "masks", relevant=share), FLOAT)
    batch: Sample = next(iter(DataLoader(data, 3, sampler=[3, 0, 1], num_workers=workers)))
    mask, annotated = batch.mask, batch.annotated
    assert annotated.tolist() == [False, True, True]
    assert mask.dtype is torch.float32
    assert (mask[~annotated] == 1).all() and 0 < mask[annotated].mean() < 1
    data.annotated[:] = False  # where a user leaves them all out
    assert data[0].mask.all()


def test_masks_of_sixteen_bits(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    labels = numpy.zeros((4, 4), dtype=numpy.uint16)
    labels[1:] = 300
    Image.fromarray(labels).save(tmp_path / "cat" / "a.png")
    Image.frombytes("I;16B", (4, 4), labels.astype(">u2").tobytes()).save(tmp_path / "cat" / "a.tif")
    for suffix in (".png", ".tif"):
        for relevant in (lambda values: values > 255, lambda values: torch.isin(values, torch.tensor([300])), lambda values: values == 300):
            mask = MaskFolder(tmp_path, suffix, relevant)(PurePosixPath("cat/a.jpg"), (4, 4))
            assert (mask.numpy() == (labels == 300)).all()


def coco(root: Path, **changes: Any) -> Path:
    content = {
        "images": [{"id": 7, "file_name": "disc/000.jpg"}, {"id": 3, "file_name": "./plus/001.jpg"}, {"id": 9, "file_name": "else.jpg"}],
        "annotations": [{"image_id": 7, "bbox": [2, 3, 10, 5]}, {"image_id": 7, "bbox": [20.5, 20, 3, 4.5], "category_id": 1}],
    }
    path = root / "boxes.json"
    path.write_text(json.dumps(content | changes))
    return path


def test_boxes(root: Path, tmp_path: Path) -> None:
    data = MaskedImageFolder(root / "images", BoxFile(coco(tmp_path)))
    expected = torch.zeros(32, 32, dtype=torch.bool)
    expected[3:8, 2:12] = True
    expected[20:25, 20:24] = True  # a pixel that a box touches
    assert torch.equal(data[0].mask, expected)
    listed = {str(name) for name, known in zip(data.names, data.annotated, strict=True) if known}
    assert listed == {"disc/000.jpg", "plus/001.jpg"}
    without_box = data[data.names.index(PurePosixPath("plus/001.jpg"))]
    assert without_box.annotated and not without_box.mask.any()
    assert pickle.loads(pickle.dumps(data))[0].mask.equal(expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"annotations": [{"image_id": 7, "bbox": [2, 3, 0, 5]}]}, r"disc/000\.jpg has the box \[2\.0, 3\.0, 0\.0, 5\.0\].*above 0"),
        ({"annotations": [{"image_id": 7, "bbox": [2, 3, 5]}]}, "Give x, y, width and height"),
        ({"annotations": [{"image_id": 8, "bbox": [2, 3, 4, 5]}]}, "an annotation is of the image 8, which `images` does not list"),
        ({"images": [{"id": 1}]}, "KeyError 'file_name'.*Give `images`"),
        ({"images": [{"id": 7, "file_name": "a.jpg"}, {"id": 7, "file_name": "b.jpg"}]}, r"two images have one id\. Give `images`"),
        ({"annotations": [{"image_id": 7, "bbox": [40, 3, 4, 5]}]}, r"boxes\.json, disc/000\.jpg: .*outside an image of 32 x 32"),
    ],
)
def test_bad_boxes(root: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = coco(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        MaskedImageFolder(root / "images", BoxFile(path))[0]


def test_bad_files(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"no\.json cannot be read.*Give the path"):
        BoxFile(tmp_path / "no.json")
    with pytest.raises(ValueError, match=r"MaskFolder: there is no folder .*nowhere\. Give the path of one, or.*ImageFolder"):
        MaskFolder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"MaskedImageFolder: there is no folder"):
        MaskedImageFolder(tmp_path / "nowhere", MaskFolder(root / "masks"))
    with pytest.raises(ValueError, match=r"class folder.*Give a folder with a subfolder"):
        MaskedImageFolder(tmp_path, MaskFolder(root / "masks"))
    with pytest.raises(ValueError, match=r"None of the 8 images of .*disc/000_m\.png\)\. Check the paths and the suffix, or.*ImageFolder"):
        MaskedImageFolder(root / "images", MaskFolder(root / "masks", "_m.png"))
    with pytest.raises(ValueError, match=r"None of the 8 images .*an image is disc/000\.jpg, and in the file 000\.jpg\).*path below"):
        MaskedImageFolder(root / "images", BoxFile(coco(tmp_path, images=[{"id": 7, "file_name": "000.jpg"}])))
    with pytest.raises(ValueError, match=r"lie within the images.*Move them out"):
        MaskedImageFolder(root, MaskFolder(root / "masks"))
    monkeypatch.chdir(root)
    with pytest.raises(ValueError, match=r"lie within the images"):
        MaskedImageFolder(".", MaskFolder(root / "masks"))
    with pytest.raises(TypeError, match=r"masks must be a data\.MaskSource.*Write MaskFolder"):
        MaskedImageFolder(root / "images", root / "masks")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("shape", "message"), [((32, 32, 3), "3 channels.*greyscale"), ((31, 32), r"\(31, 32\), but its image is \(32, 32\)")]
)
def test_masks_that_do_not_fit(tmp_path: Path, shape: tuple[int, ...], message: str) -> None:
    shapes.write(tmp_path, each=1, without_mask=0)
    Image.fromarray(numpy.zeros(shape, dtype=numpy.uint8)).save(tmp_path / "masks" / "disc" / "000.png")
    with pytest.raises(ValueError, match=message):
        MaskedImageFolder(tmp_path / "images", MaskFolder(tmp_path / "masks"))[0]


def test_transforms_that_leave_the_mask_are_found(folder: MaskedImageFolder) -> None:
    data = MaskedImageFolder(folder.root, folder.masks, lambda image, mask: (v2.functional.resize(image, [16, 16]), mask))
    with pytest.raises(ValueError, match=r"transforms made disc/000\.jpg .*transforms\.v2"):
        data[0]
    with pytest.raises(TypeError, match=r"transforms returned a Image for disc/000\.jpg and its mask\. Return both"):
        MaskedImageFolder(folder.root, folder.masks, lambda image, mask: image)[0]
    with pytest.raises(TypeError, match=r"transforms returned a tuple for disc/000\.jpg and its mask\. Return both"):
        MaskedImageFolder(folder.root, folder.masks, lambda image, mask: (image, mask, 0))[0]  # type: ignore[arg-type, return-value]
    for shape, said in (((16, 16), r"\(16, 16\)"), ((1, 32, 32), r"\(1, 32, 32\)")):
        with pytest.raises(ValueError, match=rf"InTheImage gave disc/000\.jpg, \(32, 32\), a mask {said}\. Let it be of the image's size"):
            MaskedImageFolder(folder.root, InTheImage(torch.zeros(shape, dtype=torch.bool)))[0]


@pytest.mark.parametrize("transforms", [v1.Compose([v1.RandomCrop(16)]), v1.RandomHorizontalFlip(), create_transform(32)])
def test_transforms_without_masks_are_refused(folder: MaskedImageFolder, transforms: Any) -> None:
    with pytest.raises(TypeError, match=r"transforms is a \w+ of torchvision\.transforms,.*Use that of torchvision\.transforms\.v2"):
        MaskedImageFolder(folder.root, folder.masks, transforms)


# Files of other kinds


def one_image(root: Path) -> tuple[Path, Path]:
    """An image `disc/000` and its mask, to be replaced."""
    shapes.write(root, each=1, without_mask=0)
    return root / "images" / "disc" / "000.jpg", root / "masks" / "disc" / "000.png"


def read(root: Path, **settings: Any) -> Sample:
    return MaskedImageFolder(root / "images", MaskFolder(root / "masks", **settings))[0]


def test_images_are_turned_upright_as_their_masks_are(tmp_path: Path) -> None:
    path, mask = one_image(tmp_path)
    image = Image.new("RGB", (32, 32))
    image.paste((255, 255, 255), (0, 0, 8, 32))
    turn = image.getexif()
    turn[0x0112] = 6  # to be shown turned by 90 degrees to the right
    image.save(path, exif=turn, quality=95)
    upright = numpy.zeros((32, 32), dtype=numpy.uint8)
    upright[:8] = 255
    Image.fromarray(upright).save(mask)
    sample = read(tmp_path)
    assert (sample.image.float().mean(0)[sample.mask] > 200).all() and (sample.image.float().mean(0)[8:][~sample.mask[8:]] < 60).all()


def test_images_of_sixteen_bits_are_refused_and_not_cut_off(tmp_path: Path) -> None:
    path, _ = one_image(tmp_path)
    Image.fromarray(numpy.full((32, 32), 3000, dtype=numpy.uint16)).save(path.with_suffix(".png"))
    path.unlink()
    with pytest.raises(ValueError, match=r"000\.png has more than 8 bits a value.*Give a loader="):
        read(tmp_path)


@pytest.mark.parametrize("which", [0, 1])
def test_files_that_cannot_be_read_are_named(tmp_path: Path, which: int) -> None:
    path = one_image(tmp_path)[which]
    path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(ValueError, match=rf"{path.name} cannot be read: .*Replace it"):
        read(tmp_path)


def test_masks_of_jpeg_need_a_threshold(tmp_path: Path) -> None:
    _, path = one_image(tmp_path)
    drawn = numpy.asarray(Image.open(path)) > 0
    Image.open(path).save(path.with_suffix(".jpg"), quality=50)
    with pytest.raises(ValueError, match=r"000\.jpg is a JPEG.*Give relevant="):
        read(tmp_path, suffix=".jpg")
    assert (read(tmp_path, suffix=".jpg", relevant=lambda values: values > 127).mask.numpy() == drawn).mean() > 0.98


def test_an_extension_in_capitals_is_the_same(tmp_path: Path) -> None:
    _, path = one_image(tmp_path)
    want = read(tmp_path).mask
    path.rename(path.with_suffix(".PNG"))
    assert torch.equal(read(tmp_path).mask, want)


def test_what_transforms_may_not_do(folder: MaskedImageFolder) -> None:
    with pytest.raises(TypeError, match=r"transforms move no masks: Inputs of type Mask.*v2\.RandomAffine"):
        MaskedImageFolder(folder.root, folder.masks, v2.RandAugment())[0]
    with pytest.raises(TypeError, match=r"transforms returned Image and Mask for disc/000\.jpg.*v2\.ToImage"):
        MaskedImageFolder(folder.root, folder.masks, v2.ToPILImage())[0]

    def fails(image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        raise TypeError("its own")

    with pytest.raises(TypeError, match=r"^its own$"):
        MaskedImageFolder(folder.root, folder.masks, fails)[0]


def test_a_mask_is_turned_as_its_own_file_says(tmp_path: Path) -> None:
    _, path = one_image(tmp_path)
    drawn = Image.open(path)
    turn = Image.Exif()
    turn[0x0112] = 3  # upside down
    drawn.transpose(Image.Transpose.ROTATE_180).save(path, exif=turn)
    assert (read(tmp_path).mask.numpy() == (numpy.asarray(drawn) > 0)).all()
