"""Figures of the Hessian-norm study's sound protocol: functions of its records alone."""

from __future__ import annotations

from statistics import fmean
from typing import TYPE_CHECKING, Any

from hvpfast.lab.report import plots
from hvpfast.lab.report.compare import LEVEL, by_seed, table
from hvpfast.lab.report.words import count, percent
from hvpfast.lab.runs.folder import Row
from hvpfast.studies.hessian_norm.findings import ARMS, COMPARED, compared, grid_values

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def figures(records: list[Row]) -> dict[str, Figure]:
    """Return the figures by file name."""
    return {
        "validation_curves.png": validation_curves(records),
        "arms.png": arms(records),
        "tuning.png": tuning(records),
    }


def validation_curves(records: list[Row]) -> Figure:
    """Draw validation loss and accuracy per epoch, and the paired difference of the losses."""
    names = ("baseline", "penalised")
    losses, accuracies = (
        seed_curves(records, names, f"val_{what}") for what in ("loss", "accuracy")
    )
    figure, (left, middle, right) = plots.new_figure(3)
    plots.curves(left, losses)
    plots.legend(left)
    plots.label(left, "Validation loss", "epoch", "cross-entropy")
    plots.curves(middle, accuracies)
    plots.label(middle, "Validation accuracy", "epoch")
    pairs = zip(losses["baseline"], losses["penalised"], strict=True)
    changes = [[b - a for a, b in zip(base, other, strict=True)] for base, other in pairs]
    plots.differences(right, changes)
    plots.label(right, "Validation loss, penalised minus baseline", "epoch")
    seeds = count(len(changes), "paired seed")
    plots.caption(
        figure, f"Thin: {seeds}; thick: mean. Right: the penalised arm is better below zero."
    )
    return figure


def seed_curves(
    records: list[Row], names: tuple[str, ...], measure: str
) -> dict[str, list[list[float]]]:
    """Return a measure per epoch for every seed from which none of the arms diverged."""
    epochs, lost = table(records, "epoch"), table(records, "final", diverged=True)
    seeds = dict.fromkeys(row["seed"] for row in epochs)
    for row in lost:
        if row["arm"] in names:
            seeds.pop(row["seed"], None)
    return {
        arm: [[r[measure] for r in epochs if (r["arm"], r["seed"]) == (arm, s)] for s in seeds]
        for arm in names
    }


def arms(records: list[Row]) -> Figure:
    """Draw every seed of every arm: test loss, its paired difference, and the exact ||H||^2."""
    finals = table(records, "final")
    titles = {name: ARMS[name].title for name in ARMS}
    losses, norms = (
        {
            title: [row[measure] for row in finals if row["arm"] == name and not row["diverged"]]
            for name, title in titles.items()
        }
        for measure in ("test_loss", "hessian_fro2")
    )
    pairs, found = {}, {}
    for name in COMPARED:
        base = ARMS[name].base
        seeds = by_seed(finals, "test_loss", (base, name))
        title = f"{titles[name]}\nagainst {titles[base]}"
        pairs[title] = [b - a for a, b in zip(seeds[base], seeds[name], strict=True)]
        found[title] = compared(finals, name, "test_loss")
    figure, (left, middle, right) = plots.new_figure(3, width=5.0, height=4.8)
    plots.dots(left, losses)
    plots.label(left, "Test loss of the final runs", "cross-entropy")
    own = dict(zip(ARMS, plots.arm_colors(ARMS), strict=True))
    plots.forest(middle, pairs, found, colors=[own[name] for name in COMPARED])
    plots.label(middle, "Change of the test loss, paired by seed", "lower is better")
    plots.dots(right, norms)
    plots.log_axis(right, "x", [value for values in norms.values() for value in values])
    plots.label(right, "Exact ‖H‖² on the train split")
    plots.caption(
        figure,
        "A dot: one seed. Coloured bars: means. Middle: mean with its "
        f"{percent(LEVEL)} interval (Student's) over every seed's difference.",
    )
    return figure


def tuning(records: list[Row]) -> Figure:
    """Draw every tuning trial: validation loss over the learning rate and over each strength."""
    config = table(records, "config")[0]
    panels = {
        "learning rate": ("rate", ["baseline", "smooth", "own-rate"], "learning_rates"),
        "rho": ("strength", ["penalised", "smooth-penalised"], "rhos"),
        "weight decay": ("strength", ["weight-decay"], "decays"),
        "radius of SAM": ("strength", ["sam"], "radii"),
    }
    figure, axes = plots.new_figure(4, width=4.0)
    names = list(ARMS)
    for ax, (label, (stage, shown, grid)) in zip(axes, panels.items(), strict=True):
        for arm in shown:
            trials = mean_trials(records, stage, arm)
            column = "learning_rate" if stage == "rate" else "strength"
            x, y = [t[column] for t in trials], [t["val_loss"] for t in trials]
            plots.trials(ax, x, y, names.index(arm), ARMS[arm].title)
        for base in dict.fromkeys(ARMS[arm].base for arm in shown if stage == "strength"):
            lowest = min(t["val_loss"] for t in mean_trials(records, "rate", base))
            plots.level(ax, lowest, names.index(base), f"best {ARMS[base].title}")
        plots.log_axis(ax, "x", grid_values(config[grid]))
        plots.legend(ax)
        plots.label(ax, label.capitalize() if stage == "rate" else f"Strength: {label}", label)
    axes[0].set_ylabel("validation loss after the last epoch", fontsize=9)
    plots.caption(
        figure, "A mark: one trial, averaged over the tuning seeds. Ringed: the chosen trials."
    )
    return figure


def mean_trials(records: list[Row], stage: str, arm: str) -> list[dict[str, Any]]:
    """Return a row per tuning trial that did not diverge, its loss averaged over the seeds."""
    trials: dict[int, list[dict[str, Any]]] = {}
    for row in table(records, "trial", arm=arm, stage=stage):
        trials.setdefault(row["trial"], []).append(row)
    return [
        {**rows[0], "val_loss": fmean(row["val_loss"] for row in rows)}
        for rows in trials.values()
        if all(row["val_loss"] is not None for row in rows)
    ]
