"""Pictures: what is drawn is what was given, and nothing outside the figure changes."""

from __future__ import annotations

import subprocess
import sys
from io import BytesIO
from typing import Any

import numpy
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from attrreg import plot
from tests import oracles

pytestmark = pytest.mark.cpu


def case(size: int = 24) -> tuple[Tensor, Tensor, Tensor]:
    x, phi = torch.rand(3, 3, size, size), torch.randn(3, 3, size, size)
    mask = torch.zeros(3, size, size, dtype=torch.bool)
    mask[:, 4:12, 6:20] = True
    return x, mask, phi


def grid(figure: Figure, columns: int) -> list[list[Axes]]:
    return [figure.axes[start : start + columns] for start in range(0, len(figure.axes), columns)]


def drawn(axes: Axes) -> Any:
    return numpy.asarray(axes.get_images()[0].get_array())


def rendered(figure: Figure) -> bytes:
    out = BytesIO()
    figure.savefig(out, format="png", dpi=40)
    return out.getvalue()


def test_panels_hold_the_values() -> None:
    x, mask, phi = case()
    figure = plot.attributions(x, mask, {"before": phi, "after": 2 * phi})
    rows = grid(figure, 4)
    assert len(rows) == 3 and [axes.get_title() for axes in rows[0]] == ["image", "mask", "before", "after"]
    for index, (image, region, before, after) in enumerate(rows):
        numpy.testing.assert_allclose(drawn(image), x[index].permute(1, 2, 0))
        numpy.testing.assert_array_equal(drawn(region), mask[index])
        numpy.testing.assert_allclose(drawn(before), phi[index].abs().sum(0), rtol=1e-6)
        numpy.testing.assert_allclose(drawn(after), 2 * drawn(before))
        low, high = before.get_images()[0].get_clim()
        assert low == 0 and high == pytest.approx(numpy.quantile(drawn(before), 0.99), rel=1e-5)
    assert rendered(figure).startswith(b"\x89PNG")


def test_signed_maps_are_symmetric_around_zero() -> None:
    x, mask, phi = case()
    picture = grid(plot.attributions(x, mask, {"phi": phi + 3}, signed=True), 3)[0][2].get_images()[0]
    low, high = picture.get_clim()
    assert low == -high < 0
    assert picture.get_cmap().name == "PRGn"
    numpy.testing.assert_allclose(numpy.asarray(picture.get_array()), (phi[0] + 3).sum(0), rtol=1e-5)


@pytest.mark.parametrize("size", [1, 6, 24])
def test_shares_inside_are_written(size: int) -> None:
    x, mask, _ = case()
    phi = torch.randn(3, 2, size, size)
    shares = 1 - oracles.outside_fraction(phi, oracles.resize_by_area(mask.float(), size).unsqueeze(1))
    texts = [row[2].get_xlabel() for row in grid(plot.attributions(x, mask, {"phi": phi}), 3)]
    assert texts == [f"{float(share):.0%} inside" for share in shares]


def test_an_even_map_has_the_area_inside() -> None:
    x, mask, _ = case()
    texts = [row[2].get_xlabel() for row in grid(plot.attributions(x, mask, {"even": torch.ones(3, 1, 24, 24)}), 3)]
    assert texts == 3 * [f"{8 * 14 / 24**2:.0%} inside"]


def test_images_without_annotation_show_no_mask() -> None:
    x, mask, phi = case()
    figure = plot.attributions(x, mask, {"phi": phi}, annotated=torch.tensor([True, False, True]))
    for index, (_, region, map) in enumerate(grid(figure, 3)):
        known = index != 1
        assert bool(region.get_images()) == known and bool(region.texts) == (not known)
        assert bool(map.collections) == known and bool(map.get_xlabel()) == known


@pytest.mark.parametrize(
    "mask", [torch.ones(24, 24, dtype=torch.long).triu(), (torch.rand(3, 1, 24, 24) > 0.5).float(), torch.rand(3, 11, 13)]
)
def test_masks_of_any_shape(mask: Tensor) -> None:
    x, _, phi = case()
    figure = plot.attributions(x, mask, {"phi": phi, "coarse": phi[:, :1, :4, :4]})
    rendered(figure)
    for row, region in zip(grid(figure, 4), mask.float().view(-1, *mask.shape[-2:]).expand(3, -1, -1), strict=True):
        numpy.testing.assert_array_equal(drawn(row[1]), region)


def test_outlines_lie_on_the_mask_whatever_the_maps_size() -> None:
    x, mask, phi = case()
    figure = plot.attributions(x, mask, {"coarse": phi[..., :4, :4]})
    box = grid(figure, 3)[0][2].collections[-1].get_datalim(grid(figure, 3)[0][2].transData)
    assert (box.x0, box.x1, box.y0, box.y1) == (5.5, 19.5, 3.5, 11.5)  # the edges of pixels 6 to 19 and 4 to 11
    axes = grid(plot.attributions(x[:, :, :16], mask[:, :16], {"coarse": phi[..., :4, :6]}), 3)[0][2]  # wider than high
    assert axes.collections[-1].get_datalim(axes.transData).bounds == (5.5, 3.5, 14, 8)
    assert tuple(axes.get_images()[0].get_extent()) == (-0.5, 23.5, 15.5, -0.5)


@pytest.mark.parametrize("scale", [(0.0, 1.0), (-3.0, 5.0), (0.0, 4.0)])
def test_images_are_stretched_only_if_they_must_be(scale: tuple[float, float]) -> None:
    x, mask, phi = case()
    low, high = scale
    image = low + (high - low) * x
    found = drawn(grid(plot.attributions(image, mask, {"phi": phi}), 3)[0][0])
    expected = x[0] if scale == (0.0, 1.0) else (x[0] - x[0].min()) / (x[0].max() - x[0].min())
    numpy.testing.assert_allclose(found, expected.permute(1, 2, 0), atol=1e-6)
    eight_bit = drawn(grid(plot.attributions((255 * x).byte(), mask, {"phi": phi}), 3)[0][0])
    numpy.testing.assert_allclose(eight_bit, (255 * x).byte()[0].permute(1, 2, 0) / 255)


def test_an_image_of_one_value_is_drawn() -> None:
    _, mask, phi = case()
    found = drawn(grid(plot.attributions(torch.full((3, 3, 32, 32), -2.0), mask, {"phi": phi}), 3)[0][0])
    assert (found == 0.5).all()


def test_shares_of_small_gradients_are_shares() -> None:
    x, mask, _ = case()
    phi = torch.zeros(len(x), 1, *x.shape[2:])
    phi[..., -1] = 1e-15  # outside
    axes = grid(plot.attributions(x, mask, {"phi": phi}), 3)[0][2]
    assert axes.get_xlabel() == "0% inside"


def test_captions() -> None:
    x, mask, phi = case()
    figure = plot.attributions(x[:, :1], mask, {"phi": phi}, captions={"image": ["a", "b", "c"], "phi": ["d", "e", "f"]}, title="all")
    assert [[axes.get_xlabel() for axes in row] for row in grid(figure, 3)] == [["a", "", "d"], ["b", "", "e"], ["c", "", "f"]]
    assert figure.get_suptitle() == "all"


def test_training_draws_every_curve() -> None:
    penalties = {"InputGradient": {0: 2.0, 1: 0.5, 2: 0.0}, "GradCAM": {0: 1.0, 2: 0.25}}
    figure = plot.training(penalties, {"test": {0: 0.1, 2: 0.9}}, area=0.3)
    above, below = figure.axes
    found = {line.get_label(): dict(zip(line.get_xdata(), line.get_ydata(), strict=True)) for line in above.get_lines()}  # type: ignore[arg-type]
    assert found == penalties and above.get_yscale() == "log"
    assert [line.get_label() for line in below.get_lines()] == ["test", "the same everywhere"]
    assert len({(line.get_color(), line.get_linestyle()) for line in above.get_lines()}) == 2
    rendered(figure)


def test_many_curves_differ() -> None:
    figure = plot.training({str(index): {0: 1.0, 1: 2.0} for index in range(20)}, {"share": {0: 0.5}})
    assert len({(line.get_color(), line.get_linestyle()) for line in figure.axes[0].get_lines()}) == 20


def test_zero_penalties_need_no_logarithm() -> None:
    figure = plot.training({"skipped": {0: 0.0, 1: 0.0}}, {"test": {0: 0.5}})
    assert figure.axes[0].get_yscale() == "linear"
    rendered(figure)


def test_a_share_that_is_not_defined_is_a_gap() -> None:
    nan = float("nan")
    figure = plot.training({"a": {0: 1.0, 1: 0.5}}, {"test": {0: nan, 1: 0.5}, "nowhere": {0: nan}}, area=nan)
    numpy.testing.assert_array_equal(figure.axes[1].get_lines()[0].get_ydata(), [nan, 0.5])
    rendered(figure)


def test_nothing_global_changes() -> None:
    code = (
        "import torch, matplotlib; from matplotlib import pyplot; before = dict(matplotlib.rcParams); from attrreg import plot\n"
        "plot.attributions(torch.rand(1, 3, 8, 8), torch.ones(8, 8), {'phi': torch.rand(1, 1, 8, 8)}).savefig('/dev/null', format='png')\n"
        "plot.training({'a': {0: 1.0}}, {'b': {0: 0.5}})\n"
        "print(dict(matplotlib.rcParams) == before, pyplot.get_fignums())"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["True", "[]"]


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'attrreg\[plot\]'"):
        plot.training({"a": {0: 1.0}}, {"b": {0: 0.5}})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.rand(3, 24, 24)}, r"images must be \(N, C, H, W\)"),
        ({"mask": torch.ones(2, 24, 24)}, r"mask is for 2 images, but the batch has 3 \(mask \(2, 24, 24\)\)"),
        ({"annotated": torch.ones(2, dtype=torch.bool)}, r"annotated must be \(3,\), one flag an image, got \(2,\)"),
        ({"mask": torch.full((3, 24, 24), 255)}, r"mask has values that are .*outside \[0, 1\]\. Scale it"),
        ({"maps": {}}, "maps is empty.*at least one"),
        ({"maps": {"phi": torch.rand(2, 3, 24, 24)}}, r"maps\['phi'\] is \(2, 3, 24, 24\).*for 3 images"),
        ({"maps": {"phi": torch.rand(3, 24, 24)}}, r"maps\['phi'\] is \(3, 24, 24\).*Give \(N, C, h, w\)"),
        ({"images": torch.rand(0, 3, 24, 24)}, r"images must be \(N, C, H, W\), got \(0, 3, 24, 24\)"),
        ({"maps": {"mask": torch.rand(3, 3, 24, 24)}}, "not called 'image' or 'mask'"),
        ({"captions": {"phi": ["one"]}}, r"captions\['phi'\] has 1 entries\. Give 3"),
        ({"captions": {"psi": ["a", "b", "c"]}}, "a title of maps"),
    ],
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    x, mask, phi = case()
    with pytest.raises(ValueError, match=message):
        arguments: dict[str, Any] = {"images": x, "mask": mask, "maps": {"phi": phi}} | change
        plot.attributions(**arguments)


@pytest.mark.parametrize("change", ["images", "mask", "phi"])
def test_arrays_are_no_tensors(change: str) -> None:
    x, mask, phi = case()
    arguments: dict[str, Any] = {"images": x, "mask": mask, "phi": phi}
    arguments[change] = arguments[change].numpy()
    name = r"maps\['phi'\]" if change == "phi" else change
    with pytest.raises(TypeError, match=f"^{name} must be a tensor, got ndarray"):
        plot.attributions(arguments["images"], arguments["mask"], {"phi": arguments["phi"]})


def test_maps_have_titles() -> None:
    x, mask, phi = case()
    with pytest.raises(TypeError, match=r'maps must be a mapping of titles to maps, got Tensor\. Write \{"input gradient": phi\}'):
        plot.attributions(x, mask, phi)  # type: ignore[arg-type]


def test_the_default_type_is_that_of_no_picture(half_by_default: None) -> None:
    x, mask, phi = (value.float() for value in case())
    assert rendered(plot.attributions(x, mask, {"phi": phi})).startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("penalties", "shares", "message"),
    [
        ({}, {"a": {0: 0.5}}, "penalties has nothing to draw"),
        ({"a": {0: 0.5}}, {"a": {}}, "shares_inside has nothing to draw"),
        ({"a": {0: 0.5}}, {"a": {0: 50.0}}, "Give shares, not percentages"),
        ({"a": {0: 0.5}}, {"a": {0: -0.1}}, "leaves \\[0, 1\\]"),
    ],
)
def test_bad_curves(penalties: Any, shares: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plot.training(penalties, shares)


def test_a_value_that_is_not_finite_leaves_the_others_visible() -> None:
    x, mask, map = torch.rand(1, 3, 8, 8), torch.zeros(1, 8, 8).bool(), torch.rand(1, 1, 8, 8)
    map[0, 0, 0, 0] = float("nan")
    (image,) = plot.attributions(x, mask, {"map": map}).axes[-1].get_images()
    assert 0.5 < image.get_clim()[1] <= 1


def test_a_mask_of_one_column_has_no_outline() -> None:
    figure = plot.attributions(torch.rand(1, 3, 8, 8), torch.tensor([[[1.0], [0.0]]]), {"map": torch.rand(1, 1, 8, 8)})
    assert not figure.axes[-1].collections


def test_masks_without_an_edge_and_maps_without_values_are_drawn() -> None:
    x, mask = torch.rand(3, 2, 8, 8), torch.zeros(3, 8, 8)  # two channels, of which the first is drawn
    mask[1] = 1
    rows = grid(plot.attributions(x, mask, {"zero": torch.zeros(3, 1, 8, 8), "nan": torch.full((3, 1, 8, 8), float("nan"))}), 4)
    numpy.testing.assert_allclose(drawn(rows[0][0]), x[0, 0])
    for _, _, zero, nan in rows:
        assert not zero.collections and zero.get_xlabel() == nan.get_xlabel() == ""
