"""Sites: where in a model a value or a gradient is taken, and how a layer's output becomes a grid.

A site is the dotted name of a layer, or one of the names below. Layers are carried as names, never as modules, so that
a regularizer can be pickled, compared and used on a copy of the model.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from attrreg.settings import brief
from attrreg.walk import modules, path_to

INPUT = "<input>"
"""The images."""
OUTPUT = "<output>"
"""The logits: what the model returns, after `output=`."""
FEATURES = "<features>"
"""What enters the last linear or convolutional layer of the model that the logits come from: the pooled features."""
SPATIAL = "<last spatial layer>"
"""The last layer whose output is a map."""

GIVE_NCHW = (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d)
ALONG = (nn.Conv1d, nn.ConvTranspose1d, nn.BatchNorm1d)  # of (N, C, L)
SPECIAL = (INPUT, OUTPUT, FEATURES, SPATIAL)


def spatial(layer: str) -> str:
    """The site of a layer with a map; "auto": the last one."""
    return SPATIAL if layer == "auto" else layer


def feature_site(layer: str) -> str:
    """The site of a layer with features; "auto": those that enter the classifier."""
    return FEATURES if layer == "auto" else layer


def check_layer_name(name: object) -> None:
    """Check that a layer is given by name.

    Raises:
        TypeError: it is something else, such as the module itself.
    """
    if not isinstance(name, str) or not name:
        raise TypeError(f"layer must be the dotted name of a layer, got {brief(name)}. Find it with attrreg.layers(model, x).")


def check_layer(model: nn.Module, name: str) -> None:
    """Check that a site exists in a model.

    Raises:
        ValueError: suggesting the names nearest to an unknown one.
    """
    if name in SPECIAL:
        return
    try:
        layer = model.get_submodule(name)
    except AttributeError:
        layer = None
    if isinstance(layer, torch.jit.ScriptModule):
        raise ValueError(f"layer {name!r} is TorchScript, which takes no hooks. Name a layer around it, or leave it as it was written.")
    if layer is not None:
        return
    if name == "auto":
        raise ValueError("layer 'auto' is no layer's name. Ask for sites.SPATIAL, the last one with a map, or sites.FEATURES.")
    names = [known for known, _ in model.named_modules() if known]
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
    hint = f"Did you mean {' or '.join(map(repr, near))}?" if near else f"Its outermost layers are {[n for n in names if '.' not in n]}."
    raise ValueError(f"layer {name!r} is not in {type(model).__name__}. {hint}")


def check_by_image(value: Tensor, x: Tensor, site: str) -> None:
    """Check that a layer has features of each image, `(N, ...)`.

    Raises:
        ValueError: naming the layer.
    """
    if value.dim() < 2 or value.shape[0] != x.shape[0]:
        raise ValueError(
            f"layer {site!r} gives {tuple(value.shape)} for {x.shape[0]} images, of which each must have a row of its own. Name a layer "
            "whose output is (N, ...), such as the block around this one."
        )


# The attributes by which timm's models hold what cuts images into patches; the second is NaFlexViT's.
CUTS = ("patch_embed", "embeds")
# Modules with such an attribute, of MobileViT (timm, Hugging Face) and NesT (timm), keep positions by patch or block in these parts.
SHUFFLES = {"patch_area": ("transformer", "norm"), "patch_height": ("transformer", "layernorm"), "block_size": ("transformer_encoder",)}
Layout = Literal["NCHW", "NHWC", "NCL"] | int  # an int: tokens (N, L, C) behind so many prefix tokens


def layout(value: Tensor, model: nn.Module, x: Tensor, site: str) -> Layout | None:
    """How the output of the layer `site` lays out a map; None where it has none.

    Understands `(N, C, h, w)`, `(N, h, w, C)`, tokens `(N, L, C)` with or without prefix tokens, and `(N, C, L)` where images are one
    row or column. The layout is read off the shape: a grid has the images' aspect ratio. Only what has as many channels as a convolution
    may have another.
    """
    height, width = x.shape[-2:]
    if not value.is_floating_point() or value.dim() not in (3, 4) or value.shape[0] != x.shape[0]:
        return None
    if value.dim() == 3:
        if value.shape[0] == value.shape[1] and any(getattr(layer, "batch_first", True) is False for layer in modules(model)):
            return None  # which axis has the images cannot be told
        backbone = _nearest_with(model, site, *CUTS)
        if (
            value.shape[2] == 1
            or _unrolled(value.shape[1], backbone, _nearest_with(model, site, "unroll_schedule"))
            or _of_volumes(backbone)
        ):
            return None  # pooled to (N, C, 1), or in another order, or of more axes than the image has
        if _convolves_along(model, site, *value.shape[1:]):
            return "NCL" if min(height, width) == 1 else None
        if _flattened(model, backbone, *value.shape[1:]):
            return None
        return _prefix_tokens(value.shape[1], backbone, height, width)
    if _shuffled(model, site):
        return None
    _, a, b, c = value.shape
    if _convolves_to(model, site, channels=a):
        return "NCHW"  # even a single position, for small images; what pooling leaves is no map
    channels_first, channels_last = _same_aspect(b, c, height, width), _same_aspect(a, b, height, width)
    # A stride may differ between the axes, or borders were cut off; channels and rows may be as many by chance.
    given = not channels_first and (_convolves_to(model, "", channels=a) or (not channels_last and _enters(model, a, x)))
    if given and not _ends_in(model, channels=c):
        channels_first, channels_last = True, False
    if channels_last and (not channels_first or _output_is_nhwc(_nearest_with(model, site, "output_fmt"))) and a * b > 1:
        return "NHWC"
    return "NCHW" if channels_first and b * c > 1 else None


def is_map(value: Tensor, model: nn.Module, x: Tensor, site: str) -> bool:
    """Whether a layer's output is a map of more than one position."""
    found = layout(value, model, x, site)
    return found is not None and (found != "NCHW" or value.shape[-2] * value.shape[-1] > 1)


def to_grid(value: Tensor, model: nn.Module, x: Tensor, site: str) -> Tensor:
    """A layer's output, the images, or a gradient there, as a map `(N, C, h, w)`; prefix tokens are dropped.

    Raises:
        ValueError: the layer has no spatial map.
    """
    if site == INPUT:
        return value
    found = layout(value, model, x, site)
    if found == "NCHW":
        return value
    if found == "NHWC":
        return value.permute(0, 3, 1, 2)
    if found == "NCL":
        return value.unsqueeze(2 if x.shape[2] == 1 else 3)
    backbone = _nearest_with(model, site, *CUTS)
    if isinstance(found, int):
        tokens = value[:, found:]
        h, w = _grid(tokens.shape[1], backbone, x.shape[-2], x.shape[-1]) or (0, 0)
        return tokens.transpose(1, 2).reshape(value.shape[0], value.shape[2], h, w)
    if _shuffled(model, site):
        raise ValueError(
            f"layer {site!r} keeps positions in another order than the image, so a mask cannot be laid over them. Name the block around "
            "it, or leave the choice to layer='auto'."
        )
    if value.dim() == 3 and _unrolled(value.shape[1], backbone, _nearest_with(model, site, "unroll_schedule")):
        raise ValueError(
            f"layer {site!r} keeps its tokens in the order of {type(backbone).__name__}'s mask units, not of the image, so a mask cannot "
            "be laid over them. Name a block of the last stage, or leave the choice to layer='auto'."
        )
    if value.dim() == 3 and _before_drops(backbone, *x.shape[-2:]) is not None:
        raise ValueError(
            f"layer {site!r} has the patches that {type(backbone).__name__} kept at random, so a mask cannot be laid over them. Name a "
            "layer before its patch_drop, or leave the choice to layer='auto'."
        )
    if value.dim() == 3 and _of_volumes(backbone):
        raise ValueError(
            f"layer {site!r} has tokens of a volume or a clip, which an nn.Conv3d cut into patches, so a mask of the image cannot be laid "
            "over them. Use an attribution at the images, such as InputGradient."
        )
    raise ValueError(
        f"layer {site!r} gives {tuple(value.shape)} for images {tuple(x.shape)}, which is not a spatial map. Name a layer "
        "before pooling, whose output is (N, C, h, w), (N, h, w, C) or (N, tokens, C)."
    )


def _nearest_with(model: nn.Module, site: str, *names: str) -> nn.Module:
    """The innermost module around a layer with one of these attributes, which tells the layout: a backbone may be a part of the model."""
    around = [] if site in SPECIAL else path_to(model, site)
    return next((module for module in reversed(around) if any(hasattr(module, name) for name in names)), model)


def _layer(model: nn.Module, site: str) -> nn.Module:
    """The layer of a site; of features or logits the model."""
    return model if site in SPECIAL else model.get_submodule(site)


def _convolves_to(model: nn.Module, site: str, channels: int) -> bool:
    # A stride may differ between the axes, so that the shape alone would not tell.
    inside = modules(_layer(model, site))
    layers = (layer for layer in reversed(inside) if isinstance(layer, GIVE_NCHW))  # the last is the likeliest
    return any(getattr(layer, "out_channels", getattr(layer, "num_features", None)) == channels for layer in layers)


def _enters(model: nn.Module, channels: int, x: Tensor) -> bool:
    """Whether a layer takes so many channels: what branches give may be concatenated, so that no layer gives as many."""
    widths = (getattr(layer, name, None) for layer in modules(model) for name in ("in_channels", "in_features"))
    return channels != x.shape[1] and channels in widths


def _convolves_along(model: nn.Module, site: str, channels: int, length: int) -> bool:
    """Whether a layer gives `(N, C, L)`, as convolutions along one axis do, and not tokens, which these may mix."""
    for module in (_layer(model, site), model):
        along = [layer for layer in modules(module) if isinstance(layer, ALONG)]
        # Several may be concatenated, and are then what the next one takes.
        if any(getattr(layer, width, None) == channels for layer in along for width in ("out_channels", "in_channels", "num_features")):
            return not _ends_in(module, length)
    return False


def _flattened(model: nn.Module, backbone: nn.Module, channels: int, positions: int) -> bool:
    """Whether a layer gives what convolutions do with rows joined, `(N, C, h w)`, whose channels are no patches."""
    if any(hasattr(backbone, name) for name in CUTS) or not _convolves_to(model, "", channels):
        return False
    return not (_ends_in(model, positions) or _convolves_to(model, "", positions))


def _ends_in(model: nn.Module, channels: int) -> bool:
    """Whether any layer gives so many channels as the last axis."""
    for layer in modules(model):
        widths = getattr(layer, "normalized_shape", ())
        if isinstance(widths, (tuple, list)) and list(widths[-1:]) == [channels]:
            return True
        if isinstance(layer, nn.Linear) and layer.out_features == channels:
            return True
    return False


def _same_aspect(h: int, w: int, height: int, width: int) -> bool:
    # A side is its length over the stride, rounded by less than one cell either way.
    return abs(h * width - w * height) < max(height, width)


def _output_is_nhwc(model: nn.Module) -> bool:
    # timm names the layout of its feature maps; a str or a str-valued enum
    layout = getattr(model, "output_fmt", "NCHW")
    return str(getattr(layout, "value", layout)) == "NHWC"


def _grid(count: int, model: nn.Module, height: int, width: int) -> tuple[int, int] | None:
    grid = _patches(model, height, width)
    if grid is not None and grid[0] * grid[1] == count:
        return grid
    if count < 4:
        return None
    h = max(1, round(math.sqrt(count * height / width)))
    if count % h == 0 and _same_aspect(h, count // h, height, width):
        return h, count // h
    return None


def _unrolled(length: int, model: nn.Module, other: Any) -> bool:
    # Hiera lets the tokens of a mask unit lie one after the other until the last stage, where a unit is one token.
    unroll = getattr(model, "unroll", None)
    size: list[int] | None = getattr(unroll, "size", None)
    strides: list[tuple[int, ...]] | None = getattr(unroll, "schedule", None)
    if strides is None and hasattr(other, "unroll_schedule"):  # Hugging Face's
        strides, config = other.unroll_schedule, other.config
        size = [side // stride for side, stride in zip(config.image_size, config.patch_stride, strict=True)]
    if not size or strides is None:
        return False
    return length > math.prod(size) // math.prod(math.prod(stride) for stride in strides)


def _of_volumes(model: nn.Module) -> bool:
    """Whether a model cuts volumes or clips into patches: 4 x 4 x 4 of them would pass for 8 x 8 of the image."""
    return any(isinstance(layer, nn.Conv3d) and layer.stride == layer.kernel_size != (1, 1, 1) for layer in modules(model))


def _shuffled(model: nn.Module, site: str) -> bool:
    """Whether a layer keeps positions in another order than the image: see `SHUFFLES`."""
    around = [] if site in SPECIAL else zip(path_to(model, site), site.split("."), strict=False)  # each module with what it holds
    return any(part in SHUFFLES[told] for module, part in around for told in SHUFFLES if hasattr(module, told))


def _patches(model: nn.Module, height: int, width: int) -> tuple[int, int] | None:
    """How many rows and columns of patches timm's models say that they have."""
    embed = next((found for name in CUTS if isinstance(found := getattr(model, name, None), nn.Module)), None)
    grid, size = getattr(embed, "grid_size", None), getattr(embed, "dynamic_feat_size", None)
    if grid is None or not getattr(embed, "strict_img_size", True):  # else that is of the size it was made for
        grid = None if size is None else size((height, width))  # without, the aspect tells
    return (int(grid[0]), int(grid[1])) if isinstance(grid, Sequence) and len(grid) == 2 else None


def _before_drops(model: nn.Module, height: int, width: int) -> int | None:
    """Patches of the whole image, where the model now goes on with some at random, as timm's `PatchDropout` does; else None."""
    units = getattr(model, "mask_spatial_shape", None)  # Hiera's, which leaves them out from the start
    if isinstance(units, Sequence) and model.training and getattr(model, "patch_drop_rate", 0) > 0:
        return math.prod(units)
    drop, grid = getattr(model, "patch_drop", None), _patches(model, height, width)
    dropping = isinstance(drop, nn.Module) and drop.training and getattr(drop, "prob", 0) > 0
    return math.prod(grid) if dropping and grid is not None else None


def _prefix_tokens(length: int, model: nn.Module, height: int, width: int) -> int | None:
    """How many tokens before the patches leave a grid: class and register tokens. None: no number does.

    It is what the model declares, as timm's do; else the first that leaves a grid. Any number leaves a grid of one row: there it is the
    first that leaves patches of equal size.
    """
    declared, whole = getattr(model, "num_prefix_tokens", None), _before_drops(model, height, width)
    first = None
    for prefix in dict.fromkeys([declared if isinstance(declared, int) else 0, 0, 1, 2, 5]):
        if prefix >= length or whole not in (None, length - prefix) or (grid := _grid(length - prefix, model, height, width)) is None:
            continue
        if prefix == declared or min(grid) > 1 or (height % grid[0] == 0 and width % grid[1] == 0):
            return prefix
        first = prefix if first is None else first
    return first
