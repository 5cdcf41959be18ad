"""Data: image and mask files of other kinds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import numpy
import pytest
import torch
from PIL import Image, ImageOps
from torch import Tensor

from attrreg.data import BoxFile, MaskedImageFolder, MaskFolder
from attrreg.data.sources import ORIENTATION, opened, upright
from tests import shapes
from tests.test_data import share

pytestmark = pytest.mark.cpu


def test_the_first_image_may_be_the_one_without_a_mask(tmp_path: Path) -> None:
    shapes.write(tmp_path, each=2, without_mask=0)
    (tmp_path / "masks" / "disc" / "000.png").unlink()
    samples = MaskedImageFolder(tmp_path / "images", MaskFolder(tmp_path / "masks", relevant=share))
    assert not samples[0].annotated and samples[0].mask.dtype is samples[1].mask.dtype is torch.float32


@pytest.mark.parametrize("orientation", range(10))
def test_images_are_turned_as_pillow_turns_them(tmp_path: Path, orientation: int) -> None:
    image, exif = Image.fromarray(numpy.arange(6, dtype=numpy.uint8).reshape(2, 3)), Image.Exif()
    exif[ORIENTATION] = orientation
    image.save(tmp_path / "image.png", exif=exif)
    with opened(tmp_path / "image.png") as file:
        assert numpy.array_equal(numpy.array(upright(file)), numpy.array(ImageOps.exif_transpose(file)))


def test_images_too_large_to_read_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes.write(tmp_path, each=1, without_mask=0)
    data = MaskedImageFolder(tmp_path / "images", MaskFolder(tmp_path / "masks"))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with pytest.raises(ValueError, match=r"000\.jpg cannot be read: Image size \(1024 pixels\) exceeds limit"):
        data[0]


def test_images_of_floats_are_no_rgb(tmp_path: Path) -> None:
    shapes.write(tmp_path, each=1, without_mask=0)
    Image.fromarray(numpy.full((32, 32), 0.5, dtype=numpy.float32)).save(tmp_path / "images" / "disc" / "000.tif")
    (tmp_path / "images" / "disc" / "000.jpg").unlink()
    with pytest.raises(ValueError, match=r"000\.tif has more than 8 bits a value"):
        MaskedImageFolder(tmp_path / "images", MaskFolder(tmp_path / "masks"))[0]


def test_box_files_are_in_utf_8_and_of_mappings(tmp_path: Path) -> None:
    path, name = tmp_path / "boxes.json", "vögel/å.jpg"
    listed = {"images": [{"id": 1, "file_name": name}], "annotations": [{"image_id": 1, "bbox": [0, 0, 2, 2]}]}
    path.write_text(json.dumps(listed, ensure_ascii=False), encoding="utf-8")
    assert PurePosixPath(name) in BoxFile(path)
    path.write_text("[]", encoding="utf-8")
    with pytest.raises(ValueError, match=r"boxes\.json is not a COCO-style file"):
        BoxFile(path)


def test_box_files_may_start_with_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "boxes.json"
    path.write_text(json.dumps({"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": []}), encoding="utf-8-sig")
    assert PurePosixPath("a.jpg") in BoxFile(path)


def test_boxes_are_of_images_of_the_size_that_the_file_says(tmp_path: Path) -> None:
    path, name = tmp_path / "boxes.json", PurePosixPath("a.jpg")
    images = [{"id": 1, "file_name": "a.jpg", "width": 8, "height": 6}, {"id": 2, "file_name": "b.jpg", "width": 0, "height": None}]
    path.write_text(json.dumps({"images": images, "annotations": [{"image_id": 1, "bbox": [0, 0, 2, 2]}]}))
    boxes = BoxFile(path)
    assert boxes(name, (6, 8)).sum() == 4 and not boxes(PurePosixPath("b.jpg"), (4, 4)).any()
    with pytest.raises(ValueError, match=r"a\.jpg: its boxes are of an image of \(6, 8\), but the file is \(8, 6\).*Scale"):
        boxes(name, (8, 6))


@pytest.mark.parametrize("relevant", [lambda values: values > 127, lambda values: values == 255, lambda values: values / 255])
def test_masks_of_one_bit_have_the_values_of_others(tmp_path: Path, relevant: Callable[[Tensor], Tensor]) -> None:
    (tmp_path / "masks").mkdir()
    shape = numpy.eye(4, dtype=bool)
    Image.fromarray(shape).save(tmp_path / "masks" / "one.png")
    Image.fromarray(255 * shape.astype(numpy.uint8)).save(tmp_path / "masks" / "eight.png")
    source = MaskFolder(tmp_path / "masks", relevant=relevant)
    one, eight = (source(PurePosixPath(f"{name}.jpg"), (4, 4)) for name in ("one", "eight"))
    assert torch.equal(one, eight) and one.sum() == 4


@pytest.mark.parametrize("broken", [b"Exif\x00\x00not TIFF at all", b"Exif\x00\x00MM\x00*\x00\x00"])
def test_broken_exif_data_say_nothing(tmp_path: Path, broken: bytes) -> None:
    Image.fromarray(numpy.arange(6, dtype=numpy.uint8).reshape(2, 3)).save(tmp_path / "image.png", exif=broken)
    with opened(tmp_path / "image.png") as file:
        assert numpy.array(upright(file)).shape == (2, 3)


def test_all_may_be_left_out_whichever_has_a_mask(tmp_path: Path) -> None:
    shapes.write(tmp_path, each=2, without_mask=0)
    (tmp_path / "masks" / "disc" / "000.png").unlink()
    data = MaskedImageFolder(tmp_path / "images", MaskFolder(tmp_path / "masks"))
    data.annotated[:] = False
    assert data[0].mask.all() and not data[3].annotated
