"""Figures of the learning-rate study: functions of its records alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hvpfast.lab.report import plots, words
from hvpfast.lab.report.comparison import LEVEL
from hvpfast.lab.report.records import by_seed, grid_values, known, table
from hvpfast.lab.runs.folder import Row
from hvpfast.studies.lr_adaptation import findings
from hvpfast.studies.lr_adaptation.findings import ARMS, CLAIMS, STUDIED
from hvpfast.studies.lr_adaptation.measure import ADAMS, PROXIES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOR = dict(zip(ARMS, plots.COLORS, strict=True))
PANELS = {
    "Adam's memory, and the wrapper": ("adam", "adam-0.99", "adam-0.9", "difference"),
    "Curvatures, all on Adam": ("adam", "difference", "secant", "hutchinson", "exact"),
    "Other bases": ("adam", "adahessian", "sgd", "difference-sgd"),
}
SHORT = {p: ARMS[p] if p in ADAMS else ARMS[p].split(",")[0] for p in PROXIES}
SCATTERED = ("difference", "secant", "hutchinson", "exact", "adam")
TITLES = {
    "steps_tuned": "Steps, rate for speed",
    "steps_counted": "Steps to the target",
    "test_lowest": "Loss, lowest validation",
    "test_loss": "Loss, last epoch",
    "drift": "Drift",
}


def figures(records: list[Row]) -> dict[str, Figure]:
    if table(records, "config")[0]["protocol"] == "published":
        return {
            "curves.png": repeated_curves(records),
            "measures.png": repeated_measures(records),
            "tuning.png": searches(records),
        }
    return {
        "curves.png": curves(records),
        "measures.png": measures(records),
        "differences.png": differences(records),
        "proxies.png": proxies(records),
        "similarity.png": similarity(records),
        "tuning.png": tuning(records),
    }


def curves(records: list[Row]) -> Figure:
    """Draw the validation loss per epoch, mean and quartiles over seeds, in three panels."""
    config = table(records, "config")[0]
    figure, axes = plots.new_figure(3, width=4.4)
    found = {a: np.asarray(v) for a, v in plots.seed_curves(records, "val_loss", ARMS).items()}
    known = [runs.mean(axis=0) for runs in found.values() if len(runs)]
    low = min([*(mean.min() for mean in known), config["target_loss"]])
    high = max(np.median([mean[min(1, len(mean) - 1)] for mean in known]), low + 0.1)
    for ax, (title, arms) in zip(axes, PANELS.items(), strict=True):
        ax.axhline(config["target_loss"], color=plots.MUTED, linestyle=":", linewidth=1.2)
        for arm in arms:
            band(ax, found[arm], arm)
        ax.set_ylim(low - 0.04 * (high - low), high + 0.1 * (high - low))
        plots.legend(ax)
        plots.label(ax, title, "epoch", "validation loss" if ax is axes[0] else "")
    seeds = words.count(len(found["adam"]), "seed")
    plots.caption(
        figure,
        f"Mean over {seeds}, bands: middle half of the seeds; dotted: the target. The start, "
        "outside the frame, is the same for all arms.",
    )
    return figure


def band(ax: Axes, runs: Any, arm: str) -> None:
    """Draw the mean of curves (seeds, epochs) with the band of their quartiles."""
    if not len(runs):
        return
    x, color = range(runs.shape[1]), COLOR[arm]
    ax.fill_between(x, *np.quantile(runs, (0.25, 0.75), axis=0), color=color, alpha=0.15, lw=0)
    ax.plot(x, runs.mean(axis=0), color=color, linewidth=1.8, label=ARMS[arm])
    ax.set_xlim(0, runs.shape[1] - 1)
    ax.set_xticks(np.unique(np.linspace(0, runs.shape[1] - 1, 5).round()))


def measures(records: list[Row]) -> Figure:
    """Draw every final run's measures, a row per arm."""
    finals = table(records, "final")
    figure, panels = claim_panels(records)
    for claim, ax in panels.items():
        plots.dots(ax, {ARMS[a]: by_seed(finals, claim, (a,))[a] for a in ARMS})
        plots.label(ax, TITLES[claim])
    plots.caption(
        figure,
        "Dots: one seed each; bars: means. Losses: test split. Lower is better in every panel.",
    )
    return figure


def differences(records: list[Row]) -> Figure:
    """Draw every arm's paired differences from Adam in every measure."""
    finals = table(records, "final")
    arms = [arm for arm in ARMS if arm != "adam"]
    figure, panels = claim_panels(records)
    for claim, ax in panels.items():
        found = {ARMS[arm]: findings.compared(finals, claim, "adam", arm) for arm in arms}
        ratio = any(result["kind"] == "ratio" for result in found.values())
        pairs = {
            ARMS[arm]: plots.paired_changes(finals, claim, "adam", arm, ratio=ratio) for arm in arms
        }
        plots.forest(ax, pairs, found, zero=1.0 if ratio else 0.0)
        if ratio:
            plots.log_axis(ax, "x", [v for values in pairs.values() for v in values])
        plots.label(ax, TITLES[claim] + " (ratio)" * ratio)
    plots.caption(
        figure,
        "Differences from Adam (β₂ = 0.999), or ratios, paired by seed. Dots: one seed each; bars: "
        f"mean and {words.percent(LEVEL)} interval, not corrected. Left of the line is better.",
    )
    return figure


def claim_panels(records: list[Row]) -> tuple[Figure, dict[str, Axes]]:
    """Return a figure with a narrow panel per measure; the first alone names the rows."""
    claims = findings.measures_of(table(records, "config")[0])
    figure, axes = plots.new_figure(len(claims), width=3.3, height=4.2)
    for ax in axes:
        ax.locator_params(axis="x", nbins=4)  # the numbers of more would touch
        ax.tick_params(axis="y", labelleft=ax is axes[0])
    return figure, dict(zip(claims, axes, strict=True))


def tuning(records: list[Row]) -> Figure:
    """Draw every learning rate that was tried: last validation loss, and steps to the target."""
    config = table(records, "config")[0]
    chosen = {row["arm"]: row["learning_rate"] for row in table(records, "final")}
    figure, (left, right) = plots.new_figure(2, width=6.0, height=4.4)
    reached = table(records, "trivial")[0]["test_loss"]
    for arm in ARMS:
        points = plots.mean_trials(records, ["val_loss", "steps_to_target"], arm=arm)
        finite = [point for point in points if known(point, "val_loss")]
        rates, losses = ([p[k] for p in finite] for k in ("learning_rate", "val_loss"))
        left.plot(rates, losses, "o-", color=COLOR[arm], markersize=4, lw=1.3, label=ARMS[arm])
        if chosen[arm] in rates:
            best = losses[rates.index(chosen[arm])]
            left.plot([chosen[arm]], [best], "o", color=COLOR[arm], markersize=11, mfc="none")
        reaching = [point for point in points if known(point, "steps_to_target")]
        if reaching:
            x, y = ([p[k] for p in reaching] for k in ("learning_rate", "steps_to_target"))
            right.plot(x, y, "o-", color=COLOR[arm], markersize=4, lw=1.3)
    lowest = min([float(np.min(line.get_ydata())) for line in left.lines], default=0.0)
    left.set_ylim(lowest - 0.05 * (reached - lowest), reached * 1.05)
    for ax in (left, right):
        plots.log_axis(ax, "x", grid_values(config["learning_rates"]))
    handles, labels = left.get_legend_handles_labels()
    right.legend(handles, labels, frameon=False, fontsize=9, labelcolor=plots.INK,
                 loc="center left", bbox_to_anchor=(1.0, 0.5))  # fmt: skip
    plots.label(left, "Validation loss after the last epoch", "learning rate", "cross-entropy")
    plots.label(right, "Steps to the target, where every tuning seed gets there", "learning rate")
    plots.caption(
        figure,
        "A mark: mean over the tuning seeds. Ringed: chosen for the loss. Losses above the frame "
        "and divergence are not drawn.",
    )
    return figure


def proxies(records: list[Row]) -> Figure:
    """Scatter every proxy against the exact diagonal (top) and the noise (bottom), one training."""
    points = table(records, "scatter", trajectory="adam")
    figure, axes = plots.new_figure(2 * len(SCATTERED), 2.9, 2.7, columns=len(SCATTERED))
    for column, name in enumerate(SCATTERED):
        there = [row for row in points if row["proxy"] == name]
        values = [row["value"] for row in there]
        for row, what in enumerate(("curvature", "noise")):
            ax = axes[row * len(SCATTERED) + column]
            x = [point[what] for point in there]
            ax.scatter(x, values, s=5, color=COLOR[name], alpha=0.5, lw=0)
            if there:
                guide(ax, x, values, what, name)
            decades(ax, x, values)
            left = "root of the second moment" if column == 0 else ""
            xlabel = "exact diagonal" if what == "curvature" else "noise σ"
            plots.label(ax, SHORT[name] if row == 0 else "", xlabel, left)
    epoch = max((row["epoch"] for row in table(records, "proxy")), default=0)
    plots.caption(
        figure,
        f"Dots: coordinates of one network, after epoch {epoch} of a training with Adam. Lines: "
        "slope 1 through the medians (top, dashed also slope ½); bottom: √2 σ for "
        "differences, σ for Adam.",
    )
    return figure


def decades(ax: Axes, x: Sequence[float], y: Sequence[float]) -> None:
    """Make both axes logarithmic, around the values, with powers of ten as ticks."""
    from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

    ax.set(xscale="log", yscale="log")
    if len(x):
        ax.set(xlim=(min(x) / 1.5, max(x) * 1.5), ylim=(min(y) / 2, max(y) * 2))
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(LogLocator(numticks=5))
        axis.set_minor_locator(NullLocator())
        axis.set_minor_formatter(NullFormatter())


def guide(ax: Axes, x: Sequence[float], y: Sequence[float], what: str, name: str) -> None:
    """Draw lines of known slope through the medians of a cloud, or where noise would lie."""
    ends = np.asarray([min(x), max(x)])
    middle = float(np.exp(np.median(np.log(y)) - np.median(np.log(x))))
    if what == "curvature":
        ax.plot(ends, middle * ends, color=plots.INK, linewidth=1)
        half = float(np.exp(np.median(np.log(y)) - 0.5 * np.median(np.log(x))))
        ax.plot(ends, half * ends**0.5, color=plots.INK, linewidth=1, linestyle="--")
    elif name in (*ADAMS, "difference"):  # the others have not the units of a gradient
        factor = 2**0.5 if name == "difference" else 1.0
        ax.plot(ends, factor * ends, color=plots.INK, linewidth=1, linestyle="--")


def similarity(records: list[Row]) -> Figure:
    """Draw the proxies' rank correlations, and cosines of updates per epoch."""
    rows = table(records, "proxy", trajectory="adam")
    last = max((row["epoch"] for row in rows), default=0)
    figure, axes = plots.new_figure(3, width=4.4, height=4.0)
    for ax, what, title in zip(
        axes,
        ("curvature_rank", "noise_rank"),
        ("Rank correlation with the exact diagonal", "Rank correlation with gradient noise"),
        strict=False,
    ):
        found = {
            title: [r[what] for r in rows if (r["proxy"], r["epoch"]) == (proxy, last)]
            for proxy, title in SHORT.items()
        }
        plots.dots(ax, found)
        plots.label(ax, title)
    cosines = table(records, "similarity", trajectory="difference")
    for control in ADAMS:
        there = [row for row in cosines if row["control"] == control]
        seeds = dict.fromkeys(row["seed"] for row in there)
        runs = [[r["cosine"] for r in there if r["seed"] == seed] for seed in seeds]
        for values in runs:
            axes[2].plot(range(1, len(values) + 1), values, color=COLOR[control], lw=0.7, alpha=0.4)
        if runs:
            mean = np.asarray(runs).mean(axis=0)
            axes[2].plot(range(1, len(mean) + 1), mean, color=COLOR[control], lw=2,
                         label=ARMS[control])  # fmt: skip
            plots.legend(axes[2])
    plots.label(axes[2], "Cosine of the wrapper's update with Adam's", "epoch")
    plots.caption(
        figure,
        f"Left and middle: after epoch {last} of trainings with Adam; dots: one seed each, bars: "
        "means. Right: same gradients, along the wrapper's trainings.",
    )
    return figure


def repeated_curves(records: list[Row]) -> Figure:
    """Draw the curves of both arms' final runs over all repeats, and the paired differences."""
    adam, wrapper = plots.seed_curves(records, "val_loss", STUDIED).values()
    figure, (left, right) = plots.new_figure(2, width=5.0)
    plots.curves(left, {"Adam": adam, "wrapper": wrapper})
    plots.legend(left)
    plots.label(left, "Loss on the test split", "epoch", "cross-entropy")
    plots.differences(right, adam, wrapper)
    plots.label(right, "Wrapper minus Adam", "epoch")
    repeats = words.count(min(len(adam), len(wrapper)), "repeat")
    plots.caption(figure, f"Thin: {repeats} of the whole protocol; thick: mean. Right: the wrapper "
                          "is better below zero.")  # fmt: skip
    return figure


def repeated_measures(records: list[Row]) -> Figure:
    """Draw the four measures of both arms, paired by repeat."""
    finals = table(records, "final")
    figure, axes = plots.new_figure(len(CLAIMS), width=3.3)
    for ax, claim in zip(axes, CLAIMS, strict=True):
        found = findings.compared(finals, claim, *STUDIED)
        values = by_seed(finals, claim, STUDIED)
        plots.paired_dots(ax, {"Adam": values["adam"], "wrapper": values["difference"]})
        told = f"{words.change(found['mean'], found['kind'])}  {words.interval(found)}"
        plots.label(ax, f"{TITLES[claim]}\n{told}")
    plots.caption(figure, "Dots: one repeat each, joined across the arms; bars: means. Above: the "
                          f"paired change and its {words.percent(LEVEL)} interval.")  # fmt: skip
    return figure


def searches(records: list[Row]) -> Figure:
    """Draw every trial of every repeat's search, and the learning rates that were chosen."""
    grid = grid_values(table(records, "config")[0]["learning_rates"])
    figure, axes = plots.new_figure(2, width=5.0)
    for ax, arm in zip(axes, STUDIED, strict=True):
        rows = [row for row in table(records, "trial", arm=arm) if row["val_loss"] is not None]
        x, y = [row["learning_rate"] for row in rows], [row["val_loss"] for row in rows]
        ax.scatter(x, y, s=9, color=COLOR[arm], alpha=0.4, lw=0)
        for row in table(records, "final", arm=arm):
            ax.axvline(row["learning_rate"], color=COLOR[arm], linewidth=0.7, alpha=0.5)
        plots.log_axis(ax, "x", grid)
        if y:
            ax.set_ylim(min(y) - 0.05, float(np.quantile(y, 0.9)) + 0.2)
        plots.label(ax, "Adam" if arm == "adam" else "The wrapper", "learning rate",
                    "test loss after a trial")  # fmt: skip
    plots.caption(figure, "A mark: one trial; lines: the learning rate each repeat chose.")
    return figure
