"""Figures of the flatness study: functions of its records."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from hvpfast.analysis import landscape
from hvpfast.lab.report import plots
from hvpfast.lab.report.comparison import LEVEL
from hvpfast.lab.report.records import by_seed, known, table
from hvpfast.lab.report.words import count, percent
from hvpfast.lab.runs.folder import Row
from hvpfast.studies.flatness.findings import BASELINE, compared, flat_measure, grids, with_curves

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def figures(records: list[Row]) -> dict[str, Figure]:
    finals = with_curves(records)
    found = {
        "training_comparison.png": training_comparison(records, finals),
        "comparison.png": comparison(finals),
        "flatness.png": flatness(finals),
    }
    return found | landscapes(records)


def lam(arm: str) -> str:
    return f"λ = {arm}"


def training_comparison(records: list[Row], finals: list[dict[str, Any]]) -> Figure:
    """Draw accuracy, loss and flatness per epoch, and the final test accuracy."""
    figure, axes = plots.new_figure(4, width=4.9, columns=2)
    arms = dict.fromkeys(row["arm"] for row in finals)
    held_out = "Test" if table(records, "data")[0]["held_out_is_test"] else "Validation"
    panels = [
        ("accuracy", f"{held_out} accuracy", ""),
        ("train_ce", "Training loss", "cross-entropy, mean of the epoch's batches"),
        ("flatness", "Flatness: Tr(H²)/B of train batches, fresh probes", ""),
    ]
    for ax, (column, title, unit) in zip(axes, panels, strict=False):
        curves = plots.seed_curves(records, column, arms)
        plots.curves(ax, {lam(arm): seeds for arm, seeds in curves.items()})
        values = [v for seeds in curves.values() for curve in seeds for v in curve if v > 0]
        if column != "accuracy":
            wide_axis(ax, values)
        plots.label(ax, title, "epoch", unit)
    legend(axes[1])
    final_panel(axes[3], records, finals)
    seeds = len({row["seed"] for row in finals})
    plots.caption(
        figure,
        f"Thin: {count(seeds, 'seed')}; thick: mean. Last panel: a dot per seed, bars are means.",
    )
    return figure


def final_panel(ax: Axes, records: list[Row], finals: list[dict[str, Any]]) -> None:
    """Draw the final test accuracy of every seed by lambda, between the simple predictors."""
    arms = list(dict.fromkeys(row["arm"] for row in finals))
    plots.paired_dots(ax, {lam(a): v for a, v in by_seed(finals, "test_accuracy", arms).items()})
    for name, words, style in (
        ("constant", "commonest class", ":"),
        ("linear", "linear model", "--"),
    ):
        value = table(records, name)[0]["test_accuracy"]
        ax.axhline(value, color=plots.INK, linestyle=style, linewidth=1.2, label=words)
    low, high = ax.get_ylim()
    ax.set_ylim(low, high + 0.16 * (high - low))  # room for the legend
    ax.legend(frameon=False, fontsize=9, labelcolor=plots.INK, loc="upper left", ncols=2)
    plots.label(ax, "Test accuracy after training")


def comparison(finals: list[dict[str, Any]]) -> Figure:
    """Draw the paired changes of test accuracy and of Tr(H^2), with their intervals."""
    arms = list(dict.fromkeys(row["arm"] for row in finals))
    num_rows = max(2, len({*arms} - {BASELINE}))
    figure, (left, right) = plots.new_figure(2, width=5.2, height=1.4 + 0.6 * num_rows)
    for ax, measure, title in (
        (left, "test_accuracy", "Test accuracy, minus that of λ = 0"),
        (right, flat_measure(finals), "Tr(H²) on the train split, over that of λ = 0"),
    ):
        found = compared(finals, arms, measure)
        ratios = {arm: result["kind"] == "ratio" for arm, result in found.items()}
        changes = {
            lam(arm): plots.paired_changes(finals, measure, BASELINE, arm, ratio=ratios[arm])
            for arm in ratios
        }
        ratio = any(ratios.values())
        plots.forest(ax, changes, {lam(a): r for a, r in found.items()}, 1.0 if ratio else 0.0)
        if ratio:
            plots.log_axis(ax, "x", [1.0, *(v for values in changes.values() for v in values)])
        plots.label(ax, title)
    plots.caption(
        figure,
        f"Dots: paired seeds; rings and bars: mean, {percent(LEVEL)} interval (Student's).",
    )
    return figure


FLATNESS = {
    "Tr(H²) after training": {
        "hessian_fro2": "train,\nexact",
        "hessian_fro2_probes": "train,\nprobes",
        "held_out_fro2": "held\nout",
        "part_fro2": "as many\ntrain",
        "part_ggn_fro2": "Gauss-\nNewton",
    },
    "Tr(H²)/B, batches of the last epoch": {
        "flatness_same": "the step's\nown probes",
        "flatness_fresh": "fresh\nprobes",
        "flatness_unseen": "held-out\nbatches",
    },
    "Mean d'Hd, filter-normalised d": {"filter_curvature": ""},
}
"""Title of a panel -> its columns, and their names there."""


def flatness(finals: list[dict[str, Any]]) -> Figure:
    """Draw Tr(H^2) by every way of measuring it, and the curvature that no rescaling changes."""
    figure, axes = plots.new_figure(3, width=4.4)
    arms = list(dict.fromkeys(row["arm"] for row in finals))
    for ax, (title, names) in zip(axes, FLATNESS.items(), strict=True):
        shown: list[float] = []
        columns = {c: name for c, name in names.items() if any(known(r, c) for r in finals)}
        for i, arm in enumerate(arms):
            for x, column in enumerate(columns):
                values = [r[column] for r in finals if r["arm"] == arm and known(r, column)]
                at = x + (i - (len(arms) - 1) / 2) * 0.8 / len(arms)
                color = plots.COLORS[i % len(plots.COLORS)]
                name = lam(arm) if x == 0 else None
                ax.scatter(
                    [at] * len(values), values, s=18, color=color, alpha=0.7, lw=0, label=name
                )
                shown += [v for v in values if v > 0]
        ax.set_xticks(range(len(columns)), list(columns.values()))
        ax.set_xlim(-0.5, max(1, len(columns)) - 0.5)
        wide_axis(ax, shown)
        if not columns:
            ax.set_yticks([])
            ax.text(0.5, 0.5, "not measured", ha="center", transform=ax.transAxes)
        plots.label(ax, title)
    legend(axes[2] if axes[2].collections else axes[0])
    plots.caption(figure, "A dot: one seed. H: the Hessian of the mean cross-entropy.")
    return figure


def legend(ax: Axes) -> None:
    if ax.get_legend_handles_labels()[0]:
        plots.legend(ax)


WIDE = 3.0
"""Ratio of values from which an axis is logarithmic."""


def wide_axis(ax: Axes, values: Sequence[float]) -> None:
    if values and min(values) > 0 and max(values) / min(values) > WIDE:
        plots.log_axis(ax, "y", values)


def landscapes(records: list[Row]) -> dict[str, Figure]:
    """Draw every plane: the baseline, the penalised network, their difference.

    Losses are drawn above that of their own centre, so that the difference is one of flatness.
    """
    centres = table(records, "landscape", kind="centre")
    found = {}
    for plane in dict.fromkeys(row["plane"] for row in centres):
        surfaces = {}
        for arm, grid in grids(records, plane).items():
            (centre,) = (r for r in centres if r["plane"] == plane and r["arm"] == arm)
            loss = math.nan if centre["loss"] is None else centre["loss"]
            losses, x = torch.from_numpy(grid["losses"]) - loss, torch.from_numpy(grid["x"])
            surfaces[lam(arm)] = landscape.Surface(
                losses=losses,
                done=torch.ones_like(losses, dtype=torch.bool),
                x=x,
                y=x,
                directions=torch.empty(0, 2),
                center_loss=loss,
                settings={"unit": centre["unit"]},
            )
        names = list(surfaces)
        pair = (names[1], names[0]) if len(names) > 1 else None
        figure = landscape.contour(surfaces, difference=pair, scale="linear")
        for ax in figure.axes:
            if ax.get_ylabel() == "loss":
                ax.set_ylabel("loss above that of the center")
        found[f"loss_landscapes_{plane + 1}.png"] = figure
    return found
