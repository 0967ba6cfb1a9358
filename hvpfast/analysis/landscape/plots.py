"""Figures of landscapes: several surfaces on one scale, with overflowing losses marked."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from hvpfast.analysis.landscape.surface import Surface
from hvpfast.utils import plotting
from hvpfast.utils.choice import check_choice

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Surfaces = Surface | Mapping[str, Surface]

_SCALES = ("auto", "linear", "log")
_WIDE = 20.0  # ratio of the largest to the least loss from which "auto" takes logarithms
_LEVELS = 24
_HATCH = "#b22222"
_MAP = "viridis"


def contour(
    surfaces: Surfaces,
    *,
    difference: tuple[str, str] | None = None,
    scale: str = "auto",
    limit: float | None = None,
) -> Figure:
    """Filled contours of one plane or of several, all on one scale of colours.

    Args:
        surfaces: a plane, or planes by name.
        difference: names (a, b): one more panel with a - b, blue where a is lower.
        scale: ``"linear"``, ``"log"``, or ``"auto"``, which is log where positive losses differ
            by a factor of 20.
        limit: losses above it get its colour; the figure says how many.

    Returns:
        The figure. Points whose loss is inf or NaN are hatched, and counted below.

    Raises:
        ValueError: a line, an incomplete surface, unknown names, or a log scale of losses <= 0.
    """
    named = _complete(surfaces, planes=True)
    norm, note = _norm(named, scale, limit)
    if difference is not None:
        _check_difference(named, difference)
    count = len(named) + (difference is not None)
    figure = plotting.new_figure(4.3 * count + 0.7, 4.4)
    axes: list[Axes] = [figure.add_subplot(1, count, i + 1) for i in range(count)]
    spaced = np.geomspace if type(norm).__name__ == "LogNorm" else np.linspace
    levels = spaced(norm.vmin, norm.vmax, _LEVELS + 1)
    for ax, (name, surface) in zip(axes, named.items(), strict=False):
        assert surface.y is not None
        x, y = surface.x.numpy(), surface.y.numpy()
        shown = _shown(surface.losses, norm.vmax)
        ax.contourf(x, y, shown, levels, norm=norm, cmap=_MAP)
        ax.contour(x, y, shown, levels[::3], colors="white", linewidths=0.5, alpha=0.6)
        _panel(ax, surface, f"{name}   (center {surface.center_loss:.4g})")
    _color_bar(figure, axes[: len(named)], norm, _MAP, "loss", "max" if note else "neither")
    if difference is not None:
        _draw_difference(figure, axes[-1], named, difference)
    _captions(figure, named, note)
    return figure


def surface3d(
    surfaces: Surfaces,
    *,
    scale: str = "auto",
    limit: float | None = None,
    elevation: float = 32.0,
    azimuth: float = -58.0,
) -> Figure:
    """Planes as surfaces in three dimensions, with one scale of heights and colours.

    Arguments as for :func:`contour`; ``elevation`` and ``azimuth`` of the eye in degrees. Points
    whose loss overflows are left out of the surface and marked on its floor.
    """
    named = _complete(surfaces, planes=True)
    norm, note = _norm(named, scale, limit)
    figure = plotting.new_figure(4.6 * len(named), 4.4)
    from matplotlib import colormaps

    log = type(norm).__name__ == "LogNorm"
    for index, (name, surface) in enumerate(named.items()):
        assert surface.y is not None
        ax: Any = figure.add_subplot(1, len(named), index + 1, projection="3d")
        x, y = np.meshgrid(surface.x.numpy(), surface.y.numpy())
        shown = _shown(surface.losses, norm.vmax)
        height = np.log10(shown) if log else shown
        colors = colormaps[_MAP](norm(np.ma.masked_invalid(shown)))  # transparent where NaN
        ax.plot_surface(x, y, height, facecolors=colors, rcount=200, ccount=200, linewidth=0,
                        antialiased=True, shade=False)  # fmt: skip
        low, high = (math.log10(v) if log else v for v in (norm.vmin, norm.vmax))
        bad = surface.overflow.T.numpy()
        if bad.any():
            ax.scatter(x[bad], y[bad], low, color=_HATCH, s=3, label="overflows")
            ax.legend(frameon=False, fontsize=8, loc="upper left")
        ax.set_zlim(low, high)
        ax.set_box_aspect((1, 1, 0.75), zoom=0.92)
        ax.locator_params(nbins=5)
        ax.view_init(elevation, azimuth)
        ax.tick_params(labelsize=7, labelcolor=plotting.INK)
        plotting.label(ax, f"{name}   (center {surface.center_loss:.4g})", "x", "y")
        ax.set_zlabel("log10 loss" if log else "loss", fontsize=9, color=plotting.INK)
    _captions(figure, named, note)
    return figure


def curves(lines: Surfaces, *, scale: str = "auto") -> Figure:
    """Losses along lines, together in one panel; points that overflow are crosses at its top.

    Raises:
        ValueError: a plane, an incomplete line, or a log scale of losses <= 0.
    """
    named = _complete(lines, planes=False)
    norm, _ = _norm(named, scale, None)
    figure = plotting.new_figure(6.0, 4.0)
    ax = figure.add_subplot()
    plotting.frame(ax)
    if type(norm).__name__ == "LogNorm":
        ax.set_yscale("log")
    for (name, surface), color in zip(named.items(), plotting.COLORS, strict=False):
        x, losses = surface.x.numpy(), surface.losses.numpy()
        ax.plot(x, np.where(np.isfinite(losses), losses, np.nan), color=color, lw=1.8, label=name)
        bad = surface.overflow.numpy()
        if bad.any():
            top = np.full(int(bad.sum()), 0.98)
            ax.scatter(x[bad], top, marker="x", color=color, s=22, clip_on=False,
                       transform=ax.get_xaxis_transform(), label=f"{name}: overflows")  # fmt: skip
    plotting.label(ax, "Loss along a line", "distance", "loss")
    ax.legend(frameon=False, fontsize=9, labelcolor=plotting.INK)
    _captions(figure, named, [])
    return figure


def _complete(surfaces: Surfaces, planes: bool) -> dict[str, Surface]:
    """The surfaces by name; raises unless all are complete, and planes or else lines."""
    named = {"loss": surfaces} if isinstance(surfaces, Surface) else dict(surfaces)
    if planes and not named:
        raise ValueError("no surface was given")
    for name, surface in named.items():
        if planes != (surface.y is not None):
            hint = "a line: use curves" if planes else "a plane: use contour or surface3d"
            raise ValueError(f"{name} is {hint}")
        if not surface.complete:
            raise ValueError(
                f"{name} has {int((~surface.done).sum())} points that were not evaluated: finish "
                "it by the call that made it"
            )
    return named


def _norm(named: Mapping[str, Surface], scale: str, limit: float | None) -> tuple[Any, list[str]]:
    """One scale of colours for all surfaces, and notes on it for the caption."""
    from matplotlib.colors import LogNorm, Normalize

    check_choice("scale", scale, _SCALES)
    everything = torch.cat([s.losses[torch.isfinite(s.losses)].reshape(-1) for s in named.values()])
    if everything.numel() == 0:
        raise ValueError("every loss overflows: choose a smaller span")
    low, high = float(everything.min()), float(everything.max())
    note = []
    if limit is not None and limit < high:
        if not limit > low:
            raise ValueError(f"limit must be above the least loss, {low:.4g}; got {limit:.4g}")
        note = [f"{int((everything > limit).sum())} losses above {limit:.4g} are cut there"]
        high = limit
    if high <= low:
        high = low + max(abs(low), 1.0) * 1e-6  # a constant loss
    if scale == "log" and low <= 0:
        raise ValueError(f"a log scale needs losses > 0; the least is {low:.4g}")
    if scale == "log" or (scale == "auto" and low > 0 and high / low > _WIDE):
        return LogNorm(low, high), note
    return Normalize(low, high), note


def _shown(losses: Tensor, high: float) -> Any:
    """Losses (Y, X) cut at the upper end of the scale, NaN where they overflow."""
    values = losses.T.numpy()
    return np.where(np.isfinite(values), np.minimum(values, high), np.nan)


def _panel(ax: Axes, surface: Surface, title: str) -> None:
    """Frame a plane, mark its center and hatch where the loss overflows."""
    assert surface.y is not None
    x, y = surface.x.numpy(), surface.y.numpy()
    if bool(surface.overflow.any()):  # what is not filled shows the hatched ground
        ax.patch.set(facecolor="#f7e9e9", hatch="xxx", edgecolor=_HATCH)
    ax.plot([0], [0], marker="+", color="white", markersize=9, markeredgewidth=1.6)
    ax.set_xlim(x[0], x[-1])
    ax.set_ylim(y[0], y[-1])
    ax.set_box_aspect(1)
    ax.locator_params(nbins=5)
    plotting.ticks(ax)
    plotting.label(ax, title, "x", "y")


def _color_bar(
    figure: Figure, axes: Sequence[Axes], norm: Any, name: str, text: str, extend: str
) -> None:
    from matplotlib.cm import ScalarMappable

    bar = figure.colorbar(
        ScalarMappable(norm, name), ax=list(axes), label=text, shrink=0.85, extend=extend
    )
    bar.ax.tick_params(labelsize=8, labelcolor=plotting.INK)


def _check_difference(named: Mapping[str, Surface], names: tuple[str, str]) -> None:
    for name in names:
        if name not in named:
            raise ValueError(f"difference must name two of {', '.join(named)}; got {name!r}")
    a, b = (named[name] for name in names)
    assert a.y is not None and b.y is not None
    if not torch.equal(a.x, b.x) or not torch.equal(a.y, b.y):
        raise ValueError(f"{names[0]} and {names[1]} have different grids and no difference")


def _draw_difference(
    figure: Figure, ax: Axes, named: Mapping[str, Surface], names: tuple[str, str]
) -> None:
    """The panel a - b: 0 is white, blue where a is lower."""
    from matplotlib.colors import Normalize

    a, b = (named[name] for name in names)
    assert a.y is not None
    change = (a.losses - b.losses).T.numpy()
    change = np.where(np.isfinite(change), change, np.nan)
    size = float(np.nanmax(np.abs(change))) or 1.0
    levels = np.linspace(-size, size, 2 * (_LEVELS // 2) + 1)
    norm = Normalize(-size, size)
    ax.contourf(a.x.numpy(), a.y.numpy(), change, levels, norm=norm, cmap="RdBu_r")
    _panel(ax, a, f"{names[0]} − {names[1]}")
    ax.lines[-1].set_color(plotting.INK)  # the center, on white
    text = f"difference (blue: {names[0]} is lower)"
    _color_bar(figure, [ax], norm, "RdBu_r", text, "neither")


def _captions(figure: Figure, named: Mapping[str, Surface], notes: Sequence[str]) -> None:
    lines = list(notes)
    units = {name: surface.unit for name, surface in named.items()}
    if len(set(units.values())) == 1:
        lines.append(next(iter(units.values())))
    else:
        lines += [f"{name}: {unit}" for name, unit in units.items()]
    for name, surface in named.items():
        if count := int(surface.overflow.sum()):
            lines.append(
                f"{name}: the loss overflows at {count} of {surface.losses.numel()} points (marked)"
            )
    letters = int(figure.get_figwidth() * 16)  # that fit into a line
    plotting.caption(figure, "\n".join(textwrap.fill(line, letters) for line in lines))
