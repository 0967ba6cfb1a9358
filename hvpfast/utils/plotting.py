"""What the library's figures share. matplotlib is imported late, pyplot and its settings never."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#2f6db3", "#d2691e", "#3f8f5f", "#8a5aa8", "#7a7a7a")
"""Colours of curves, in their order; colour-blind readers can tell them apart."""
INK = "#333333"
MUTED = "#757575"


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, which needs no display; ``figure.savefig(path)`` writes it.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            f"figures need matplotlib, which cannot be imported ({error}). "
            "Install it with: pip install matplotlib"
        ) from error
    return Figure(figsize=(width, height), layout="constrained")


def frame(ax: Axes) -> None:
    """Frame a panel plainly."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(MUTED)
    ticks(ax)
    ax.grid(axis="y", color="#ececec", linewidth=0.8)
    ax.set_axisbelow(True)


def ticks(ax: Axes) -> None:
    """Make ticks small and their labels dark."""
    ax.tick_params(which="both", color=MUTED, labelcolor=INK, labelsize=9)


def label(ax: Axes, title: str, x: str = "", y: str = "") -> None:
    """Title a panel at its left and name its axes."""
    ax.set_title(title, loc="left", fontsize=10, color=INK)
    ax.set_xlabel(x, fontsize=9, color=INK)
    ax.set_ylabel(y, fontsize=9, color=INK)


def caption(figure: Figure, text: str) -> None:
    """Write small print under the panels."""
    figure.supxlabel(text, fontsize=8.5, color=MUTED, x=0.01, ha="left")
