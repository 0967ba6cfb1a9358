"""Panels that figures are made of. matplotlib is imported late, and pyplot never."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curves = Sequence[Sequence[float]]
"""One curve per seed, all of one length."""

COLORS = ("#2f6db3", "#d2691e", "#3f8f5f", "#8a5aa8", "#7a7a7a")
"""Colours of the arms, in their order; colour-blind readers can tell them apart."""
INK = "#333333"
MUTED = "#757575"


def new_figure(
    num_panels: int, width: float = 4.2, height: float = 3.8
) -> tuple[Figure, list[Axes]]:
    """Return a figure with panels side by side, plainly framed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * num_panels, height), layout="constrained")
    axes = [figure.add_subplot(1, num_panels, i + 1) for i in range(num_panels)]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_color(MUTED)
        ax.tick_params(which="both", color=MUTED, labelcolor=INK, labelsize=9)
        ax.grid(axis="y", color="#ececec", linewidth=0.8)
        ax.set_axisbelow(True)
    return figure, axes


def label(ax: Axes, title: str, x: str = "", y: str = "") -> None:
    """Title a panel at its left and name its axes."""
    ax.set_title(title, loc="left", fontsize=10, color=INK)
    ax.set_xlabel(x, fontsize=9, color=INK)
    ax.set_ylabel(y, fontsize=9, color=INK)


def legend(ax: Axes) -> None:
    """Name what is drawn, in its colours."""
    ax.legend(frameon=False, fontsize=9, labelcolor=INK, handlelength=1.4)


def caption(figure: Figure, text: str) -> None:
    """Write a line of small print under the panels."""
    figure.supxlabel(text, fontsize=8.5, color=MUTED, x=0.01, ha="left")


def curves(ax: Axes, arms: Mapping[str, Curves]) -> None:
    """Draw every seed's curve thin and the mean over seeds thick; x is the epoch."""
    for (arm, seeds), color in zip(arms.items(), COLORS, strict=False):
        draw_seeds(ax, seeds, color, arm)


def differences(ax: Axes, pairs: Curves) -> None:
    """Draw paired differences around a zero line."""
    ax.axhline(0, color=INK, linewidth=0.9)
    draw_seeds(ax, pairs, "#5a4a78", "mean")


def draw_seeds(ax: Axes, seeds: Curves, color: str, name: str) -> None:
    """Draw curves and their mean."""
    for values in seeds:
        ax.plot(range(len(values)), values, color=color, linewidth=0.8, alpha=0.35)
    if len(seeds):
        mean = np.mean(np.asarray(seeds), axis=0)
        ax.plot(range(len(mean)), mean, color=color, linewidth=2.2, label=name)
        ax.set_xlim(0, len(mean) - 1)
        ax.set_xticks(np.unique(np.linspace(0, len(mean) - 1, 5).round()))


def paired_dots(ax: Axes, arms: Mapping[str, Sequence[float]]) -> None:
    """Draw seeds as dots joined by lines, a column per arm, and each arm's mean as a bar."""
    columns = list(arms.values())
    for pair in zip(*columns, strict=True):
        ax.plot(range(len(pair)), pair, color="#c9c9c9", linewidth=0.9, zorder=1)
    for x, (values, color) in enumerate(zip(columns, COLORS, strict=False)):
        ax.scatter([x] * len(values), values, s=34, color=color, edgecolor="white", zorder=3)
        if len(values):
            mean = float(np.mean(values))
            ax.plot([x - 0.17, x + 0.17], [mean, mean], color=color, linewidth=2.4, zorder=2)
    ax.set_xticks(range(len(columns)), list(arms))
    ax.set_xlim(-0.5, len(columns) - 0.5)


def trials(ax: Axes, x: Sequence[float], y: Sequence[float], arm: int, name: str) -> None:
    """Draw tuning trials, and ring the chosen one: the first of the lowest."""
    color = COLORS[arm]
    ax.scatter(x, y, s=28, color=color, marker="osD^"[arm % 4], alpha=0.75, lw=0, label=name)
    if len(y):
        best = int(np.argmin(y))
        ax.scatter([x[best]], [y[best]], s=130, facecolor="none", edgecolor=color, linewidth=1.6)


def level(ax: Axes, value: float, arm: int, name: str) -> None:
    """Draw a horizontal line to compare with."""
    ax.axhline(value, color=COLORS[arm], linestyle="--", linewidth=1.2, label=name)


def log_axis(ax: Axes, which: Literal["x", "y"], values: Sequence[float]) -> None:
    """Make an axis logarithmic, just wide enough for the values, with plain numbers as ticks."""
    low, high = min(values) / 1.3, max(values) * 1.3
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if high / low < 500 else (1,)
    ticks = [step * 10.0**k for k in decades for step in steps if low <= step * 10.0**k <= high]
    ax.set(**{f"{which}scale": "log", f"{which}lim": (low, high)})
    axis = ax.xaxis if which == "x" else ax.yaxis
    axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set_ticks([], minor=True)
