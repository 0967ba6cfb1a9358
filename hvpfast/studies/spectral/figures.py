"""Figures of the spectral study: functions of its records alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from hvpfast.lab.report.plots import COLORS, INK, MUTED, label, legend, new_figure
from hvpfast.lab.report.records import table
from hvpfast.lab.report.words import number
from hvpfast.lab.runs.folder import Row
from hvpfast.studies.spectral.findings import by_index, gap, onset

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LAMBDA = r"$\lambda$"


def figures(records: list[Row]) -> dict[str, Figure]:
    main = by_index(table(records, "train", sweep=records[0]["sweep"]))
    eigen = by_index(table(records, "eigen"))
    made = {
        "spectrum.png": spectrum(main, eigen),
        "sweeps.png": sweeps(records),
        "subspaces.png": subspaces(main, eigen),
    }
    if table(records, "density"):
        made["density.png"] = densities(records)
    return made


def columns(eigen: dict[int, dict[str, Any]]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return lambdas (L,) and eigenvalues (L, k), descending."""
    rows = list(eigen.values())
    k = sum(name.startswith("value_") for name in rows[0])
    values = np.array([[row[f"value_{i + 1}"] for i in range(k)] for row in rows])
    return np.array([row["lambda"] for row in rows]), -np.sort(-values, axis=1)


def collapsed_span(ax: Axes, main: dict[int, dict[str, Any]]) -> None:
    """Shade the lambdas from the first one beyond which every network has collapsed."""
    first = onset(list(main.values()), "collapsed", True)
    last = max(row["lambda"] for row in main.values())
    if first is not None and first < last:
        ax.axvspan(first, last, facecolor="#f2efe8", zorder=0, lw=0, label="collapsed")


def spectrum(main: dict[int, dict[str, Any]], eigen: dict[int, dict[str, Any]]) -> Figure:
    """Draw eigenvalues against lambda, linear and logarithmic."""
    figure, axes = new_figure(2, width=5.6, height=4.2)
    lambdas, values = columns(eigen)
    groups = (("1 to 9", slice(0, 9), COLORS[0]), ("10", slice(9, 10), COLORS[1]),
              ("from 11", slice(10, None), COLORS[4]))  # fmt: skip
    for ax, shown in zip(axes, (values, np.maximum(np.abs(values), 1e-9)), strict=True):
        collapsed_span(ax, main)
        for name, part, color in groups:
            for j, line in enumerate(shown[:, part].T):
                ax.plot(lambdas, line, color=color, lw=0.9, label=name if j == 0 else None)
    axes[1].set_yscale("log")
    decay = np.array([row["decay"] for row in eigen.values()])
    axes[1].plot(lambdas, np.maximum(decay, 1e-9), color=INK, lw=1.1, ls="--")
    end = (lambdas[-1], max(decay[-1], 1e-9))
    style: dict[str, Any] = {"textcoords": "offset points", "ha": "right", "fontsize": 9}
    axes[1].annotate("shift of H + d I", end, (0, 5), color=INK, **style)
    positive = np.abs(values)[:, : min(20, values.shape[1])]
    floor = float(np.min(positive[[not row["collapsed"] for row in main.values()]], initial=1.0))
    axes[1].set_ylim(max(1e-6, 0.1 * floor), 2 * float(np.abs(values).max()))
    label(axes[0], "Leading eigenvalues of the cross-entropy's Hessian H", LAMBDA, "eigenvalue")
    label(axes[1], "Their magnitudes, logarithmic", LAMBDA, "|eigenvalue|")
    # where the background is white, so that the colour of the collapsed part shows
    axes[0].legend(
        frameon=False, fontsize=9, labelcolor=INK, loc="center", bbox_to_anchor=(0.4, 0.4)
    )
    return figure


def sweeps(records: list[Row]) -> Figure:
    """Draw accuracy, norm and stationarity of every sweep against lambda."""
    figure, axes = new_figure(4, width=4.8, height=3.6, columns=2)
    rows = table(records, "train")
    names = dict.fromkeys(str(row["sweep"]) for row in rows)
    trivial = table(records, "trivial")[0]
    for i, name in enumerate(names):
        own = list(by_index([row for row in rows if row["sweep"] == name]).values())
        x = [row["lambda"] for row in own]
        style: dict[str, Any] = {"color": COLORS[i], "lw": 1.6 if i == 0 else 1.1, "label": name}
        style |= {"marker": "o", "ms": 2.5} if i or len(own) < 30 else {}
        axes[0].plot(x, [100 * row["test_accuracy"] for row in own], **style)
        axes[1].plot(x, [row["train_loss"] for row in own], **style)
        axes[2].plot(x, [row["params_norm"] for row in own], **style)
        axes[3].plot(x, [max(row["grad_norm"], 1e-9) for row in own], **style)
    axes[0].axhline(
        100 * trivial["test_accuracy"], color=MUTED, ls="--", lw=1, label="most frequent class"
    )
    axes[2].set_yscale("log")
    axes[3].set_yscale("log")
    label(axes[0], "Test accuracy", LAMBDA, "%")
    label(axes[1], "Cross-entropy, train split", LAMBDA, "nats")
    label(axes[2], r"Norm of the parameters, $\|\theta\|$", LAMBDA)
    label(axes[3], "Gradient norm of the objective where training ended", LAMBDA)
    legend(axes[0])
    return figure


def subspaces(main: dict[int, dict[str, Any]], eigen: dict[int, dict[str, Any]]) -> Figure:
    """Draw outlier gaps, overlaps of neighbours, accuracy per class and products."""
    figure, axes = new_figure(4, width=4.8, height=3.6, columns=2)
    rows = list(eigen.values())
    alive = [row for i, row in eigen.items() if not main[i]["collapsed"] and "value_11" in row]
    for i, color in ((9, COLORS[0]), (10, COLORS[1])):
        x = [row["lambda"] for row in alive]
        name = rf"$\lambda_{{{i}}} / \lambda_{{{i + 1}}}$"
        axes[0].plot(x, [gap(row, i) for row in alive], color=color, lw=1.2, label=name)
    axes[0].axhline(1, color=INK, lw=0.8)
    label(axes[0], "Outlier gap, before the collapse", LAMBDA, "ratio")
    if alive:
        legend(axes[0])
    collapsed_span(axes[1], main)
    overlaps = [(row["lambda"], row["overlap"]) for row in rows if row["overlap"] is not None]
    axes[1].plot(*np.reshape(overlaps, (-1, 2)).T, color=COLORS[0], lw=1.0)
    axes[1].set_ylim(0, 1.03)
    label(axes[1], "Overlap of top-10 subspaces of neighbours", LAMBDA, r"$\|U'V\|_F^2 / 10$")
    for c in range(10):
        share = [(row["lambda"], row[f"class_{c}"]) for row in main.values()]
        share = [(x, 100 * y) for x, y in share if y is not None]
        axes[2].plot(*np.reshape(share, (-1, 2)).T, color=COLORS[c], lw=1.0, label=str(c))
    label(axes[2], "Test accuracy per class", LAMBDA, "%")
    axes[2].legend(frameon=False, fontsize=8, ncol=2, labelcolor=INK, handlelength=1.2)
    collapsed_span(axes[3], main)
    for name, color in (("warm", COLORS[0]), ("cold", COLORS[1])):
        own = [(row["lambda"], row["num_matvecs"]) for row in rows if row["start"] == name]
        if name == "cold":
            own += [(r["lambda"], r["cold_matvecs"]) for r in rows if r["cold_matvecs"] is not None]
        if own:
            x, y = np.reshape(own, (-1, 2)).T
            axes[3].scatter(x, y, s=9, color=color, lw=0, label=f"{name} start")
    axes[3].set_ylim(bottom=0)
    label(axes[3], "Products that the pairs took", LAMBDA, "products")
    legend(axes[3])
    return figure


def densities(records: list[Row]) -> Figure:
    """Draw the spectral density at chosen lambdas, a panel each."""
    rows = table(records, "density")
    figure, axes = new_figure(len(rows), width=4.4, height=3.4, columns=min(3, len(rows)))
    for ax, row in zip(axes, rows, strict=True):
        points = table(records, "curve", index=row["index"])
        names = ("u", "t", "low", "density", "high")
        u, t, *bands = (np.array([p[name] for p in points], dtype=float) for name in names)
        low, mean, high = np.maximum(bands, 1e-7)
        ax.fill_between(
            u, low, np.minimum(high, 10 * mean.max()), color=COLORS[0], alpha=0.25, lw=0
        )
        ax.plot(u, mean, color=COLORS[0], lw=1.2)
        ax.set(yscale="log", ylim=(1e-6, 3 * mean.max()), xlim=(u[0], u[-1]))
        marks = np.unique(np.linspace(0, len(u) - 1, 6).round().astype(int))
        ax.set_xticks(u[marks], [number(float(t[i]), 1) for i in marks])
        title = rf"$\lambda$ = {row['lambda']:.4f}"
        label(ax, title, "eigenvalue of H", "density per unit of the axis")
    return figure
