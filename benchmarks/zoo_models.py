"""The models of the zoo: one small one of every timm module and torchvision family."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import timm
import torch
import torchvision
from torch import Tensor, nn

from attrreg.evidence.ledger import add_line, whole_lines

CLASSES = 5
SIZES = (64, 96, 126, 128)  # 126: patches of 14, in threes
# Models with hundreds of millions of parameters and nothing smaller in their module: fewer blocks, all of them alike.
SHORTENED: dict[str, dict[str, object]] = {"deepseek_vit": {"depth": 2}, "gemma4_vit": {"depth": 2}}


@dataclass(frozen=True)
class Entry:
    """A model of a library, and the family that it stands for: a timm module, a torchvision family."""

    library: str
    family: str
    name: str
    params: int = 0

    @property
    def key(self) -> str:
        """How a model is named on the command line."""
        return f"{self.library}/{self.name}"


@dataclass(frozen=True)
class Subject:
    """A model ready to be checked.

    Attributes:
        size: of the images.
        output: where the logits are in what the model returns; None where it returns them.
        batch: number of images.
    """

    model: nn.Module
    size: int
    output: int | Callable[[Tensor], Tensor] | None
    batch: int


def catalog(cache: Path, note: Callable[[str], None] = lambda text: None) -> list[Entry]:
    """All models of both libraries with their parameter counts, which take some minutes the first time.

    Args:
        cache: a file of one JSON line a model.
        note: told what is being counted.
    """
    entries = [Entry(**json.loads(line)) for line in whole_lines(cache)]
    known = {(entry.library, entry.name): entry for entry in entries}
    found = []
    for library, family, name in _names():
        if (library, name) not in known:
            note(name)
            known[library, name] = entry = Entry(library, family, name, _count(library, name))
            add_line(cache, json.dumps(asdict(entry)))
        found.append(known[library, name])
    return found


def ranked(entries: list[Entry], rank: int) -> list[Entry]:
    """The rank-th smallest model of each family, which need not have one. timm's `test_*` models are toys, and left out."""
    families: dict[tuple[str, str], list[Entry]] = {}
    for entry in entries:
        if not entry.name.startswith("test_"):
            families.setdefault((entry.library, entry.family), []).append(entry)
    chosen = []
    for family in families.values():
        sizes: dict[int, Entry] = {}  # models of one size differ in their training alone, as a rule
        for entry in family:
            sizes.setdefault(entry.params, entry)
        smallest = sorted(sizes.values(), key=lambda entry: entry.params)
        chosen += smallest[rank - 1 : rank]
    return chosen


def families() -> list[tuple[str, str]]:
    """All families with their libraries; makes no model."""
    return list(dict.fromkeys((library, family) for library, family, _ in _names()))


def smallest(library: str, family: str) -> Entry:
    """The smallest model of a family; counts the parameters of that family's models alone."""
    members = [Entry(*names, _count(library, names[-1])) for names in _names() if names[:2] == (library, family)]
    return ranked(members, rank=1)[0]


def create(library: str, name: str, **settings: object) -> nn.Module:
    """Build a model with random weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if library == "timm":
            model = timm.create_model(name, pretrained=False, num_classes=CLASSES, **settings)
        else:
            model = torchvision.models.get_model(name, weights=None, num_classes=CLASSES, **settings)
    assert isinstance(model, nn.Module)
    return model


def build(entry: Entry) -> Subject:
    """Build a model for the smallest images that it takes, in train mode, its zero-initialised parameters moved off zero.

    Raises:
        RuntimeError: it runs at no size that was tried.
    """
    size, settings, output = _fitting(entry)
    torch.manual_seed(0)
    model = create(entry.library, entry.name, **settings).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    # Normalised over two images, small maps are plus and minus one almost whatever the images are: ill-conditioned.
    normalised = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    batch = 4 if normalised and size <= max(SIZES) else 2
    return Subject(model, size, _logits_in(output), batch)


def _fitting(entry: Entry) -> tuple[int, dict[str, object], object]:
    """The smallest size at which a model runs and has a map, else at which it runs; settings for it; what the model returns."""
    problem: Exception | None = None
    fitting = None
    for size, settings in _attempts(entry):
        torch.manual_seed(0)
        try:
            model = create(entry.library, entry.name, **settings).train()
            with torch.no_grad():
                found = size, settings, model(torch.randn(2, 3, size, size))
                if _has_positions(model, size):
                    return found
            fitting = fitting or found
        except Exception as error:  # a size that does not fit fails in as many ways as there are models
            problem = error
    if fitting is None:
        raise RuntimeError(f"{entry.name} ran at no image size: {problem}") from problem
    return fitting


def pooled(tokens: Tensor) -> Tensor:
    """Logits of an encoder without a classifier."""
    return tokens.mean(dim=1)


def _logits_in(output: object) -> int | Callable[[Tensor], Tensor] | None:
    if not isinstance(output, Tensor):
        return 0  # the first of a main and auxiliary heads
    return pooled if output.dim() == 3 else None


def _has_positions(model: nn.Module, size: int) -> bool:
    """Whether the last features have more than one position along each axis, as far as the model says what they are."""
    extract = getattr(model, "forward_features", getattr(model, "features", None))  # timm's name, torchvision's
    features = extract(torch.randn(2, 3, size, size)) if extract is not None else None
    return not isinstance(features, Tensor) or min(features.shape[1:]) > (3 if features.dim() == 3 else 1)


def _attempts(entry: Entry) -> Iterator[tuple[int, dict[str, object]]]:
    """Image sizes to try, with the settings to build for them."""
    if entry.library == "torchvision":
        yield from ((size, {}) for size in (*SIZES, 224, 299))
        return
    settings = SHORTENED.get(entry.family, {})
    try:
        with torch.device("meta"):
            create("timm", entry.name, img_size=SIZES[0], **settings)
        sized = True
    except Exception:  # no such setting, or not this size
        sized = False
    for size in SIZES:
        if sized:
            yield size, {"img_size": size, **settings}
        yield size, settings
    configuration = timm.get_pretrained_cfg(entry.name)
    yield (configuration.input_size[-1] if configuration else 224), settings


def _names() -> Iterator[tuple[str, str, str]]:
    for module in timm.list_modules():
        for name in timm.list_models(module=module):
            yield "timm", module, name
    for name in torchvision.models.list_models(module=torchvision.models):
        # As torchvision names them: resnet, resnext, wide_resnet, regnet_x, swin_v2, ...
        family = re.match(r"wide_resnet|[a-z]+(_v\d|_[xy](?=_))?", name)
        assert family is not None
        yield "torchvision", family.group(), name


def _count(library: str, name: str) -> int:
    """Parameters of a model."""
    if library == "torchvision":
        return int(next(iter(torchvision.models.get_model_weights(name))).meta["num_params"])
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in create(library, name).parameters())
