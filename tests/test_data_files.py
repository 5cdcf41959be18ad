"""Data: image and mask files of other kinds."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath

import numpy
import pytest
import torch
from PIL import Image, ImageOps

from attrreg.data import BoxFile, MaskedImageFolder, MaskFolder
from attrreg.data.sources import ORIENTATION, opened, upright
from tests import shapes
from tests.test_data import share


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
