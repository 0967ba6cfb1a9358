"""Panels that the figures of studies are made of, and what they show of the records.

The style is that of ``hvpfast.utils.plotting``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from io import BytesIO
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from hvpfast.lab.report.records import by_seed, table
from hvpfast.lab.runs.folder import Row
from hvpfast.utils import plotting

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED = plotting.INK, plotting.MUTED
caption, label = plotting.caption, plotting.label

Curves = Sequence[Sequence[float]]
"""One curve per seed, all of one length."""

COLORS = (*plotting.COLORS, "#c2417c", "#1f9e9e", "#a68a1c", "#7b4a2d", "#111111")
"""Colours of the arms, in their order; the first five suit colour-blind readers."""


def new_figure(
    num_panels: int, width: float = 4.2, height: float = 3.8, columns: int | None = None
) -> tuple[Figure, list[Axes]]:
    """Return a figure with panels side by side, or in rows of `columns`, plainly framed."""
    columns = columns or num_panels
    rows = math.ceil(num_panels / columns)
    figure = plotting.new_figure(width * columns, height * rows)
    axes = [figure.add_subplot(rows, columns, i + 1) for i in range(num_panels)]
    for ax in axes:
        plotting.frame(ax)
    return figure, axes


def png(figure: Figure) -> bytes:
    """Return a figure as a PNG file, the same bytes for the same figure."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    return buffer.getvalue()


def legend(ax: Axes) -> None:
    ax.legend(frameon=False, fontsize=9, labelcolor=INK, handlelength=1.4)


def seed_curves(
    records: list[Row], measure: str, arms: Iterable[str], *, complete: bool = False
) -> dict[str, list[list[float]]]:
    """Return a measure per epoch of the final runs that did not diverge, by arm and seed by seed.

    Args:
        records: with the tables "final" and "epoch".
        measure: a column of the latter.
        arms: to be returned, in their order.
        complete: leave out of all arms the seeds from which one of them diverged.
    """
    lost = {(row["arm"], row["seed"]) for row in table(records, "final", diverged=True)}
    found: dict[str, dict[int, list[float]]] = {arm: {} for arm in arms}
    for row in table(records, "epoch"):
        if row["arm"] in found and (row["arm"], row["seed"]) not in lost:
            found[row["arm"]].setdefault(row["seed"], []).append(row[measure])
    if complete:
        common = set[int].intersection(*map(set, found.values()))
        found = {arm: {s: runs[s] for s in runs if s in common} for arm, runs in found.items()}
    return {arm: list(runs.values()) for arm, runs in found.items()}


def mean_trials(records: list[Row], measures: Iterable[str], **equal: Any) -> list[dict[str, Any]]:
    """Return a row per tuning trial, its measures averaged over the tuning seeds.

    Args:
        records: with the table "trial".
        measures: its columns to average; None where a training of the trial has none.
        equal: columns and their values in the rows to choose.
    """
    found: dict[int, list[dict[str, Any]]] = {}
    for row in table(records, "trial", **equal):
        found.setdefault(row["trial"], []).append(row)
    means = []
    for rows in found.values():
        columns = {name: [row[name] for row in rows] for name in measures}
        averaged = {k: None if None in values else fmean(values) for k, values in columns.items()}
        means.append({**rows[0], **averaged})
    return means


def paired_changes(
    rows: Sequence[Mapping[str, Any]], measure: str, base: str, other: str, *, ratio: bool = False
) -> list[float]:
    """Return other - base or other / base of a measure of two arms, for every seed with both."""
    pair = by_seed(rows, measure, (base, other))
    both = zip(pair[base], pair[other], strict=True)
    return [b / a if ratio else b - a for a, b in both]


def curves(ax: Axes, arms: Mapping[str, Curves]) -> None:
    """Draw every seed's curve thin and the mean over seeds thick; x is the epoch."""
    for (arm, seeds), color in zip(arms.items(), arm_colors(arms), strict=True):
        draw_seeds(ax, seeds, color, arm)


def differences(ax: Axes, base: Curves, other: Curves) -> None:
    """Draw other - base, seed by seed and epoch by epoch, around a zero line."""
    ax.axhline(0, color=INK, linewidth=0.9)
    pairs = [[b - a for a, b in zip(*pair, strict=True)] for pair in zip(base, other, strict=False)]
    draw_seeds(ax, pairs, "#5a4a78", "mean")


def draw_seeds(ax: Axes, seeds: Curves, color: str, name: str) -> None:
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
    for x, (values, color) in enumerate(zip(columns, arm_colors(arms), strict=True)):
        ax.scatter([x] * len(values), values, s=34, color=color, edgecolor="white", zorder=3)
        if len(values):
            mean = float(np.mean(values))
            ax.plot([x - 0.17, x + 0.17], [mean, mean], color=color, linewidth=2.4, zorder=2)
    ax.set_xticks(range(len(columns)), list(arms))
    ax.set_xlim(-0.5, len(columns) - 0.5)


def dots(ax: Axes, arms: Mapping[str, Sequence[float]]) -> None:
    """Draw every seed as a dot, a row per arm from the top, and each arm's mean as a bar."""
    for y, (values, color) in enumerate(zip(arms.values(), arm_colors(arms), strict=True)):
        ax.scatter(values, spread_rows(y, values), s=20, color=color, alpha=0.7, lw=0, zorder=3)
        if len(values):
            mean = float(np.mean(values))
            ax.plot([mean, mean], [y - 0.32, y + 0.32], color=color, linewidth=2.4, zorder=4)
    name_rows(ax, list(arms))


def forest(
    ax: Axes,
    pairs: Mapping[str, Sequence[float]],
    found: Mapping[str, Mapping[str, Any]],
    zero: float = 0.0,
    colors: Sequence[str] | None = None,
) -> None:
    """Draw paired changes, a row per arm: seeds as dots, the mean with its interval over them.

    Args:
        ax: the panel.
        pairs: name to the change of each seed.
        found: name to its `compare` result, of the same kind (difference or ratio).
        zero: where nothing changes: 0, or 1 for ratios.
        colors: of the rows; by default those after the first arm's.
    """
    ax.axvline(zero, color=INK, linewidth=0.9, zorder=1)
    for y, (name, color) in enumerate(zip(pairs, colors or arm_colors(pairs, 1), strict=True)):
        values, result = pairs[name], found[name]
        ax.scatter(values, spread_rows(y, values), s=16, color=color, alpha=0.45, lw=0, zorder=2)
        if result["low"] is not None:
            ends, middle = [result["low"], result["high"]], result["mean"]
            ax.plot(ends, [y, y], color=INK, linewidth=2.2, zorder=4, solid_capstyle="butt")
            ax.scatter([middle], [y], s=42, color=color, edgecolor=INK, zorder=5)
    name_rows(ax, list(pairs))


def arm_colors(arms: Mapping[str, Any], first: int = 0) -> list[str]:
    """Return a colour per arm, from the given one on; they repeat where there are more arms."""
    return [COLORS[(first + i) % len(COLORS)] for i in range(len(arms))]


def spread_rows(y: float, values: Sequence[float]) -> list[float]:
    """Return heights around y that keep dots apart: the same for the same seed in every row."""
    return [y + 0.22 * math.sin(2.4 * i) for i in range(len(values))]


def name_rows(ax: Axes, names: Sequence[str]) -> None:
    """Name the rows of a panel, from the top."""
    ax.set_yticks(range(len(names)), list(names))
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.grid(axis="y", visible=False)
    ax.grid(axis="x", color="#ececec", linewidth=0.8)


def trials(ax: Axes, x: Sequence[float], y: Sequence[float], arm: int, name: str) -> None:
    """Draw tuning trials, and ring the chosen one: the first of the lowest."""
    color = COLORS[arm % len(COLORS)]
    ax.scatter(x, y, s=28, color=color, marker="osD^"[arm % 4], alpha=0.75, lw=0, label=name)
    if len(y):
        best = int(np.argmin(y))
        ax.scatter([x[best]], [y[best]], s=130, facecolor="none", edgecolor=color, linewidth=1.6)


def log_axis(ax: Axes, which: Literal["x", "y"], values: Sequence[float]) -> None:
    """Make an axis logarithmic, just wide enough for the values, with plain numbers as ticks."""
    low, high = min(values) / 1.3, max(values) * 1.3
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if high / low < 500 else (1,)
    ticks = [step * 10.0**k for k in decades for step in steps if low <= step * 10.0**k <= high]
    ax.set(**{f"{which}scale": "log", f"{which}lim": (low, high)})
    axis = ax.xaxis if which == "x" else ax.yaxis
    axis.set_ticks(ticks, [power(tick) for tick in ticks])
    axis.set_ticks([], minor=True)


def power(tick: float) -> str:
    """Return a tick of a logarithmic axis: a plain number, or a product with a power of ten."""
    if 1e-4 <= tick < 1e5:
        return f"{tick:g}"
    factor, exponent = f"{tick:.0e}".split("e")
    times = "" if factor == "1" else rf"{factor} \times "
    return rf"${times}10^{{{int(exponent)}}}$"
