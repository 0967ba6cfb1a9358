"""Figures of landscapes: one scale for all, what overflows is marked."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from dense import classes, perceptron
from planes import small_plane
from torch import nn

from hvpfast.analysis import landscape
from hvpfast.analysis.landscape import sweep

matplotlib = pytest.importorskip("matplotlib")
pytestmark = pytest.mark.usefixtures("single_threaded")

LOSS = nn.CrossEntropyLoss()


def overflowing() -> landscape.Surface:
    model, (x, _) = perceptron(dtype=torch.float32), classes(8, 4, dtype=torch.float32)
    with torch.no_grad():
        for p in model.parameters():
            p *= 3e18
    y = torch.zeros(8, 3)
    return landscape.plane(model, nn.MSELoss(), None, (x, y), seed=1, num_points=15, span=4.0)


def test_losses_that_overflow_are_kept_and_marked(tmp_path: Path) -> None:
    found = overflowing()
    count = int(found.overflow.sum())
    assert 0 < count < 225
    assert bool(found.losses[found.overflow].isinf().any())
    for figure in (landscape.contour(found), landscape.surface3d({"net": found})):
        figure.savefig(tmp_path / "figure.png")
        assert f"overflows at {count} of 225 points (marked)" in figure._supxlabel.get_text()
    found.save(tmp_path / "surface.npz")
    assert torch.equal(landscape.load(tmp_path / "surface.npz").overflow, found.overflow)


def test_figures_share_one_scale(tmp_path: Path) -> None:
    settings, backend = dict(matplotlib.rcParams), matplotlib.get_backend()
    a, b = small_plane(None, span=2.0), small_plane(None, span=2.0, seed=6)
    figure = landscape.contour(
        {"baseline": a, "regularised": b}, difference=("regularised", "baseline")
    )
    figure.savefig(tmp_path / "contour.png")
    panels = [ax for ax in figure.axes if ax.get_title(loc="left")]
    titles = [ax.get_title(loc="left") for ax in panels]
    assert titles[0].startswith("baseline   (center")
    assert titles[2] == "regularised − baseline"
    scales = [ax.collections[0].norm for ax in panels]
    both = torch.stack((a.losses, b.losses))
    assert scales[0].vmin == scales[1].vmin == float(both.min())
    assert scales[0].vmax == scales[1].vmax == float(both.max())
    assert figure._supxlabel.get_text().startswith("distance 1 is a step of the norm of each")
    other = landscape.contour({"baseline": a, "regularised": small_plane(None, normalize=None)})
    small_print = other._supxlabel.get_text()
    assert "baseline: distance 1 is a step of the norm" in small_print
    assert "regularised: distance 1 is a step of length 1" in small_print
    solid = landscape.surface3d({"baseline": a, "regularised": b})
    solid.savefig(tmp_path / "surface.png")
    limits = [ax.get_zlim() for ax in solid.axes]
    assert limits[0] == limits[1]
    cut = landscape.contour(a, limit=float(a.losses.median()))
    assert "losses above" in cut._supxlabel.get_text()
    assert dict(matplotlib.rcParams) == settings
    assert matplotlib.get_backend() == backend
    with pytest.raises(ValueError, match="limit must be above"):
        landscape.contour(a, limit=0.0)
    with pytest.raises(ValueError, match="must name two of baseline"):
        landscape.contour({"baseline": a}, difference=("baseline", "other"))
    with pytest.raises(ValueError, match="different grids"):
        landscape.contour({"a": a, "b": small_plane(None)}, difference=("a", "b"))
    with pytest.raises(ValueError, match="is a plane"):
        landscape.curves(a)
    with pytest.raises(ValueError, match="no surface"):
        landscape.contour({})


def test_curves(tmp_path: Path) -> None:
    lines = {
        name: landscape.line(perceptron(seed), LOSS, None, classes(8, 4), seed=1, num_points=9)
        for name, seed in (("one", 0), ("two", 1))
    }
    figure = landscape.curves(lines, scale="log")
    figure.savefig(tmp_path / "curves.png")
    assert [line.get_label() for line in figure.axes[0].lines] == ["one", "two"]
    with pytest.raises(ValueError, match="is a line"):
        landscape.contour(lines)
    assert sweep.line is landscape.line
