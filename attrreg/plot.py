"""Pictures: images with their masks and attributions, and the course of a training. Needs matplotlib.

Each function returns a new `matplotlib.figure.Figure`, to be saved or shown by the caller. Nothing is shown, registered with
pyplot or set globally. Colours can be told apart by the colour-blind: viridis, purple to green around zero, Okabe-Ito.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy
import torch
from torch import Tensor

from attrreg.masks import Annotation, check, resize
from attrreg.objectives import OutsideFraction

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curve = Mapping[int, float]

OUTLINE = (("black", 2.8), ("white", 1.3))  # seen on dark, bright and pale colours alike
LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#000000")
STYLES = [(color, dash) for dash in ("-", "--", "-.", ":") for color in LINES]
QUANTILE = 0.99


def attributions(
    images: Tensor,
    mask: Tensor,
    maps: Mapping[str, Tensor],
    *,
    annotated: Tensor | None = None,
    captions: Mapping[str, Sequence[str]] | None = None,
    signed: bool = False,
    title: str | None = None,
) -> Figure:
    """Draw images, their masks and attributions side by side: a row an image, a column a map.

    A before/after grid is two maps: `maps={"before": phi_before, "after": phi_after}`. The outline of the mask is drawn over each
    map. Each panel has a scale of its own, up to the 99th percentile of its values: panels tell where, not how much.

    Args:
        images: `(N, C, H, W)`, in [0, 1], or uint8 up to 255. Three channels are drawn in colour; otherwise the first is drawn in grey. An
            image with values outside [0, 1], such as a normalised one, is stretched to that range by itself.
        mask: `(N, H, W)`, `(N, 1, H, W)` or `(H, W)`, 1 = relevant.
        maps: title to map `(N, C, h, w)`, as `.attribute` returns it, of any size.
        annotated: boolean `(N,)`: the images that have a mask. None: all.
        captions: texts below the panels, by the title of the column ("image", "mask", or one of `maps`): one text for each image. By
            default, maps have the share of their absolute attribution that is inside the mask, and the other columns have none.
        signed: draw the sum over channels, around zero, instead of the sum of absolute values.
        title: above everything.

    Returns:
        The figure.

    Raises:
        TypeError, ValueError: naming the argument whose type, shape, range or titles do not fit.
        ImportError: matplotlib is missing.
    """
    figure = _figure()
    annotation = _checked(images, mask, maps, annotated, captions)
    relevant, known = annotation.relevant, annotation.annotated
    columns = ["image", "mask", *maps]
    figure.set_size_inches(1.9 * len(columns), 2.08 * len(images) + (0.8 if title else 0.4))
    axes = figure.subplots(len(images), len(columns), squeeze=False)
    for row, image in enumerate(images):
        _draw_image(axes[row, 0], image)
        _draw_mask(axes[row, 1], relevant[row, 0], bool(known[row]))
        size = (image.shape[-2], image.shape[-1])
        for column, map in enumerate(maps.values(), start=2):
            _draw_map(axes[row, column], map[row], signed, size)
            if known[row]:
                _outline(axes[row, column], relevant[row, 0], size)
    written = {name: _shares_inside(map, relevant, known) for name, map in maps.items()} | dict(captions or {})
    for column, name in enumerate(columns):
        axes[0, column].set_title(name, fontsize=10)
        for row, text in enumerate(written.get(name, ())):
            axes[row, column].set_xlabel(text, fontsize=9)
    if title:
        figure.suptitle(title, fontsize=12)
    return figure


def training(penalties: Mapping[str, Curve], shares_inside: Mapping[str, Curve], *, area: float | None = None) -> Figure:
    """Draw the course of a training: the penalties above, the shares of attribution inside the mask below.

    Args:
        penalties: name to values by step, for example those of `Penalty.terms`. On a logarithmic axis.
        shares_inside: name to shares in [0, 1] by step, measured as often as you like: `metrics.share_inside(map, mask)`, say.
            One that is NaN, as of a map that is zero everywhere, is a gap in the line.
        area: the share of the images that is relevant, drawn as a line: what a map that is the same everywhere has inside.

    Returns:
        The figure.

    Raises:
        ValueError: a curve is empty, or a share lies outside [0, 1].
        ImportError: matplotlib is missing.
    """
    _check_curves(penalties, shares_inside)
    figure = _figure()
    figure.set_size_inches(6.4, 5.2)
    above, below = figure.subplots(2, 1, sharex=True)
    for axes, curves in ((above, penalties), (below, shares_inside)):
        for (name, curve), (color, dash) in zip(curves.items(), cycle(STYLES), strict=False):
            marker = "o" if len(curve) < 30 else ""
            values = [torch.as_tensor(value).item() for value in curve.values()]  # on whatever device, with a graph or without
            axes.plot(list(curve), values, color=color, linestyle=dash, marker=marker, markersize=3.5, label=name)
        axes.grid(alpha=0.3)
    if any(value > 0 for curve in penalties.values() for value in curve.values()):
        above.set_yscale("log", nonpositive="mask")
    if area is not None:
        below.axhline(area, color="#777777", linestyle=":", linewidth=1.2, label="the same everywhere")
    above.set_ylabel("penalty")
    below.set(ylabel="share inside the mask", xlabel="step", ylim=(-0.02, 1.02))
    for axes in (above, below):
        axes.legend(fontsize=8)
    return figure


def _figure() -> Figure:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ImportError("attrreg.plot needs matplotlib. Install with: pip install 'attrreg[plot]'") from error
    return Figure(layout="constrained", dpi=120)


def _checked(
    images: Tensor,
    mask: Tensor,
    maps: Mapping[str, Tensor],
    annotated: Tensor | None,
    captions: Mapping[str, Sequence[str]] | None,
) -> Annotation:
    """The mask, on the CPU."""
    if not isinstance(maps, Mapping):
        raise TypeError(f'maps must be a mapping of titles to maps, got {type(maps).__name__}. Write {{"input gradient": phi}}.')
    for argument, value in (("images", images), ("mask", mask), *((f"maps[{name!r}]", map) for name, map in maps.items())):
        if not isinstance(value, Tensor):
            raise TypeError(f"{argument} must be a tensor, got {type(value).__name__}. Convert it, for example with torch.as_tensor.")
    if images.dim() != 4 or images.shape[0] == 0:
        raise ValueError(f"images must be (N, C, H, W), got {tuple(images.shape)}. Add or keep the missing axes.")
    count = images.shape[0]
    annotation = check(mask.float(), images.cpu().float(), annotated)  # 0 and 1 may be integers here
    if not maps:
        raise ValueError('maps is empty. Give at least one, for example {"input gradient": phi}.')
    for name, map in maps.items():
        if name in ("image", "mask") or map.dim() != 4 or map.shape[0] != count:
            raise ValueError(f"maps[{name!r}] is {tuple(map.shape)}. Give (N, C, h, w) for {count} images, not called 'image' or 'mask'.")
    if captions is not None and not isinstance(captions, Mapping):
        raise TypeError(f"captions must be a mapping of titles to texts, got {type(captions).__name__}. Write {{'image': [...]}}.")
    columns = ("image", "mask", *maps)
    for name, texts in (captions or {}).items():
        if name not in columns or len(texts) != count:
            cause = f"has {len(texts)} entries" if name in columns else "is of no column"
            raise ValueError(f"captions[{name!r}] {cause}. Give {count}, for 'image', 'mask' or a title of maps.")
    return annotation


def _check_curves(penalties: Mapping[str, Curve], shares_inside: Mapping[str, Curve]) -> None:
    for argument, curves in (("penalties", penalties), ("shares_inside", shares_inside)):
        if not isinstance(curves, Mapping) or not all(isinstance(curve, Mapping) for curve in curves.values()):
            raise TypeError(f"{argument} must map names to curves {{step: value}}. Write {{'InputGradient': {{0: 0.5, 10: 0.2}}}}, say.")
        if not curves or not all(curves.values()):
            raise ValueError(
                f"{argument} has nothing to draw. Give at least one curve, for example {{'InputGradient': {{0: 0.5, 10: 0.2}}}}."
            )
    for name, curve in shares_inside.items():
        if any(share < 0 or share > 1 for share in curve.values()):
            raise ValueError(f"shares_inside[{name!r}] leaves [0, 1]. Give shares, not percentages.")


def _bare(axes: Axes) -> None:
    axes.set_xticks([])
    axes.set_yticks([])


def _draw_image(axes: Axes, image: Tensor) -> None:
    values = image.detach().cpu().float() / (255 if image.dtype is torch.uint8 else 1)
    values = values if values.shape[0] == 3 else values[:1]
    low, high = float(values.min()), float(values.max())
    if low < 0 or high > 1:
        values = (values - low) / (high - low) if high > low else torch.full_like(values, 0.5)
    axes.imshow(values.permute(1, 2, 0).numpy(), cmap="gray", vmin=0, vmax=1)
    _bare(axes)


def _draw_mask(axes: Axes, relevant: Tensor, known: bool) -> None:
    if known:
        axes.imshow(relevant.numpy(), cmap="gray", vmin=0, vmax=1)
    else:
        axes.text(0.5, 0.5, "not\nannotated", ha="center", va="center", fontsize=9, transform=axes.transAxes)
        axes.set_box_aspect(relevant.shape[-2] / relevant.shape[-1])
    _bare(axes)


def _draw_map(axes: Axes, map: Tensor, signed: bool, size: tuple[int, int]) -> None:
    values = map.detach().cpu().double()
    values = values.sum(dim=0) if signed else values.abs().sum(dim=0)
    # The largest 1% would otherwise leave the rest of a gradient map dark.
    finite = values.abs()[values.isfinite()]
    top = max(float(numpy.quantile(finite.numpy(), QUANTILE)) if len(finite) else 0.0, 1e-30)  # torch's takes 16 million values at most
    # At the size of the image, so that the mask's outline lies where it does there, whatever the size of the map.
    extent = (-0.5, size[1] - 0.5, size[0] - 0.5, -0.5)
    settings: dict[str, Any] = {"cmap": "PRGn", "vmin": -top} if signed else {"cmap": "viridis", "vmin": 0}
    axes.imshow(values.numpy(), vmax=top, extent=extent, interpolation="nearest", **settings)
    _bare(axes)


def _outline(axes: Axes, relevant: Tensor, size: tuple[int, int]) -> None:
    if relevant.min() >= 0.5 or relevant.max() < 0.5 or min(relevant.shape) < 2:
        return  # there is no edge, or none that Matplotlib could draw
    height, width = relevant.shape
    # The centres of the mask's pixels, in pixels of the image.
    columns = (numpy.arange(width) + 0.5) * size[1] / width - 0.5
    rows = (numpy.arange(height) + 0.5) * size[0] / height - 0.5
    for color, width_of_line in OUTLINE:
        axes.contour(columns, rows, relevant.numpy(), levels=[0.5], colors=color, linewidths=width_of_line)


def _shares_inside(map: Tensor, relevant: Tensor, known: Tensor) -> list[str]:
    phi = map.detach().cpu().float()
    outside = OutsideFraction(eps=0.0)(phi, resize(relevant, (phi.shape[-2], phi.shape[-1])))
    return ["" if share.isnan() or not shown else f"{1 - float(share):.0%} inside" for share, shown in zip(outside, known, strict=True)]
