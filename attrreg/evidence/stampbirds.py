"""StampBirds: real cut-outs of birds and mammals on real photographs of water and of plants, composed at run time.

In training, birds are on water and mammals among plants, as often as the correlation says. The masks are the cut-outs' own.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Generator, Tensor
from torchvision.transforms.functional import normalize, to_tensor

from attrreg.evidence import packages
from attrreg.evidence.data import Split, Task, dilate, first_of_each

if TYPE_CHECKING:
    from PIL.Image import Image

STAMPS = "tuxpaint-stamps-default"
MATE = "mate-backgrounds"
PLASMA = "plasma-workspace-wallpapers"
# Behind each folder its files; those joined by + show nearly the same, and are dealt to one split.
BIRDS = """birds/ adelaide-rosella peacock+albino_peahen blackbird chicken_profile+hen+rooster crow crowned_crane cuckoo drake+duck gander
    guineafowl+helmeted_guineafowl heron_greatblue+heron_greatblue_flying lark little-penguin magellanic_penguin magpie nandou ostrich owl
    pelican penguin pigeon pink_flamingo quetzal rainbow-lorikeet seagull+silver-gull tucan turkey vulture"""
MAMMALS = """mammals/ badger elephant ferret giraffe hippopotamus pig+pig_golden+pig_golden2 rabbit_little rhino_black wildboar
    mammals/apes/ chimp gorilla tamarin_emperor mammals/aquatic/ otter sea_lion mammals/bears/ bear+european-bear
    mammals/bovines/ bison bull cow+cow_white gnu-baby-stand+gnu-baby+gnu-sitting+gnu-stand goat indian_blackbuck mountaingoat ram
    sheep+sheep_lamb yak zebu mammals/camel/ camel dromedary mammals/cats/ lion-2+lion tiger+tiger_sumatran
    mammals/deer/ caribou deer doe wapiti mammals/dogs/ dingo dog fox mammals/equines/ donkey+donkey_eating horse zebra
    mammals/rodents/ beaver capybara marmot mouse rabbit-2+rabbit rat squirrel marsupials/ kangaroo koala wombat"""
WATER = ((MATE, "Aqua Storm"), (PLASMA, "BytheWater ColdRipple DarkestHour EveningGlow Kite summer_1am"))
PLANTS = (
    (MATE, "Blinds FreshFlower Garden GreenMeadow LadyBird RainDrops TwoWings YellowFlower"),
    (PLASMA, "FallenLeaf OneStandsOut Path"),
)
LARGE = 384  # pixels of the shorter side that sources are reduced to


def stampbirds(
    train: int = 400, valid: int = 160, test: int = 400, correlation: float = 0.95, size: int = 128, seed: int = 0, dilation: int = 2
) -> Task:
    """Compose the task.

    Objects are split in three, backgrounds in two (of training and validation, of the test), both by the seed, so that no object and no
    background of the test was seen before, nor an object that looks nearly the same. Validation "as in training" has the correlation,
    the shifted one and the test have none: their four groups, 2 * bird + water, are of one size. The clean test is the test on grey.

    Args:
        train, valid, test: number of images, the last two multiples of 4.
        correlation: the share of training images on the background that goes with their class: 0.5 is none.
        size: pixels a side.
        seed: of the splits and of everything drawn.
        dilation: pixels by which the mask reaches beyond the object.

    Raises:
        ValueError: naming the argument.
        packages.Missing: a Debian package is not here.

    Source:
        Ours, after Waterbirds (Sagawa et al. 2020, arXiv 1911.08731). Small: 35 birds, 62 mammals, 19 photographs.
    """
    if min(train, valid, test) < 4 or valid % 4 or test % 4:
        raise ValueError(f"The split sizes {(train, valid, test)} are impossible; use at least 4, and multiples of 4 for the last two.")
    if not 0.5 <= correlation <= 1:
        raise ValueError(f"correlation must be in [0.5, 1], got {correlation}. Write for example 0.95.")
    generator = Generator().manual_seed(seed)
    objects = [_parts(_files(names), (0.6, 0.15), generator) for names in (MAMMALS, BIRDS)]
    places = [_parts([[path] for path in _photographs(names)], (0.6, 0.0), generator) for names in (PLANTS, WATER)]

    def compose(count: int, part: int, where: int, correlation: float, plain: bool = False) -> Split:
        kinds, backgrounds = [kind[part] for kind in objects], [kind[where] for kind in places]
        return _compose(kinds, backgrounds, count, correlation, size, dilation, plain, generator)

    first = compose(train, 0, 0, correlation)
    similar, valid_split = compose(valid, 1, 0, correlation), compose(valid, 1, 0, 0.5)
    state = generator.get_state()
    shifted = compose(test, 2, 2, 0.5)
    generator.set_state(state)  # the same images, on grey
    return Task("stampbirds", 2, first, similar, valid_split, shifted, compose(test, 2, 2, 0.5, plain=True))


def _compose(
    objects: Sequence[Sequence[Path]],
    places: Sequence[Sequence[Path]],
    count: int,
    correlation: float,
    size: int,
    dilation: int,
    plain: bool,
    generator: Generator,
) -> Split:
    """Images with their groups: classes alike, and backgrounds in each class as the correlation says."""
    labels = torch.arange(count) % 2
    fitting = first_of_each(labels, lambda count: round(correlation * count))
    water = torch.where(fitting, labels, 1 - labels)
    images, masks = [], []
    for label, place in zip(labels.tolist(), water.tolist(), strict=True):
        background = _crop(_any(places[place], generator), size, generator)
        cut, alpha, left, top = _stamp(_any(objects[label], generator), size, generator)
        image = torch.full_like(background, 0.5) if plain else background
        height, width = alpha.shape
        region = image[:, top : top + height, left : left + width]
        region.copy_(alpha * cut + (1 - alpha) * region)
        mask = torch.zeros(size, size, dtype=torch.bool)
        mask[top : top + height, left : left + width] = alpha > 0.5
        images.append(normalize(image, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
        masks.append(mask)
    return Split(torch.stack(images), labels, dilate(torch.stack(masks), dilation), groups=2 * labels + water)


def _any(files: Sequence[Path], generator: Generator) -> Path:
    return files[int(torch.randint(len(files), (), generator=generator))]


def _parts(families: list[list[Path]], shares: tuple[float, float], generator: Generator) -> list[list[Path]]:
    """Files dealt out at random in three parts, of these shares and the rest, families together."""
    order = [families[index] for index in torch.randperm(len(families), generator=generator).tolist()]
    one, two = round(shares[0] * len(order)), round((shares[0] + shares[1]) * len(order))
    return [[path for family in part for path in family] for part in (order[:one], order[one:two], order[two:])]


def _uniform(low: float, high: float, generator: Generator) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator))


def _crop(path: Path, size: int, generator: Generator) -> Tensor:
    """A random square of a photograph, `(3, size, size)` in [0, 1]."""
    photograph = _reduced(path).convert("RGB")
    side = int(_uniform(0.5, 1, generator) * min(photograph.size))
    left, top = (int(_uniform(0, whole - side, generator)) for whole in photograph.size)
    cropped: Tensor = to_tensor(photograph.crop((left, top, left + side, top + side)).resize((size, size)))
    return cropped


def _stamp(path: Path, size: int, generator: Generator) -> tuple[Tensor, Tensor, int, int]:
    """A cut-out at a random size and place, mirrored or not: colours `(3, h, w)`, opacity `(h, w)`, left, top."""
    stamp = _reduced(path).convert("RGBA")
    stamp = stamp.crop(stamp.getchannel("A").getbbox())
    scale = _uniform(0.45, 0.8, generator) * size / max(stamp.size)
    stamp = stamp.resize((max(1, int(scale * stamp.width)), max(1, int(scale * stamp.height))))
    pixels: Tensor = to_tensor(stamp)
    if _uniform(0, 1, generator) < 0.5:
        pixels = pixels.flip(-1)
    height, width = pixels.shape[1:]
    return pixels[:3], pixels[3], int(_uniform(0, size - width, generator)), int(_uniform(0, size - height, generator))


@cache
def _reduced(path: Path) -> Image:
    from PIL import Image

    with Image.open(path) as opened:
        opened.load()
        scale = LARGE / min(opened.size)
        size = (max(1, round(scale * opened.width)), max(1, round(scale * opened.height)))
        kept = opened.convert("RGBA" if path.suffix == ".png" and "stamps" in path.parts else "RGB")
        return kept.resize(size) if scale < 1 else kept


def _files(names: str) -> list[list[Path]]:
    """Files of the stamps, by families."""
    root = packages.debian(STAMPS, "usr/share/tuxpaint/stamps/animals")
    folder, found = "", []
    for name in names.split():
        if name.endswith("/"):
            folder = name
        else:
            found.append(_existing([root / folder / f"{part}.png" for part in name.split("+")], STAMPS))
    return found


def _photographs(names: Sequence[tuple[str, str]]) -> list[Path]:
    found: list[Path] = []
    for package, listed in names:
        if package == MATE:
            root = packages.debian(MATE, "usr/share/backgrounds/mate/nature")
            found += _existing([root / f"{name}.jpg" for name in listed.split()], MATE)
            continue
        for name in listed.split():
            images = packages.debian(PLASMA, f"usr/share/wallpapers/{name}/contents/images")
            sizes = {int(size[1]): path for path in sorted(images.iterdir()) if (size := re.match(r"(\d+)x\d+", path.name))}
            found += _existing([sizes[min((width for width in sizes if width >= 1024), default=max(sizes))]], PLASMA)
    return found


def _existing(paths: list[Path], package: str) -> list[Path]:
    absent = [path for path in paths if not path.is_file()]
    if absent:
        raise packages.Missing(f"This version of the Debian package {package} has no {absent[0]}. Install that of Debian 12.")
    return paths
