"""Figures of the Hessian-norm study's sound protocol: functions of its records alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hvpfast.lab.report import plots
from hvpfast.lab.report.comparison import LEVEL
from hvpfast.lab.report.records import grid_values, known, table
from hvpfast.lab.report.words import count, percent
from hvpfast.lab.runs.folder import Row
from hvpfast.studies.hessian_norm.findings import ARMS, COMPARED, compared

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOR = dict(zip(ARMS, plots.COLORS, strict=False))


def figures(records: list[Row]) -> dict[str, Figure]:
    return {
        "validation_curves.png": validation_curves(records),
        "arms.png": arms(records),
        "tuning.png": tuning(records),
    }


def validation_curves(records: list[Row]) -> Figure:
    """Draw validation loss and accuracy per epoch, and the paired difference of the losses."""
    names = ("baseline", "penalised")
    losses, accuracies = (
        plots.seed_curves(records, measure, names, complete=True)
        for measure in ("val_loss", "val_accuracy")
    )
    figure, (left, middle, right) = plots.new_figure(3)
    plots.curves(left, losses)
    plots.legend(left)
    plots.label(left, "Validation loss", "epoch", "cross-entropy")
    plots.curves(middle, accuracies)
    plots.label(middle, "Validation accuracy", "epoch")
    plots.differences(right, losses["baseline"], losses["penalised"])
    plots.label(right, "Validation loss, penalised minus baseline", "epoch")
    seeds = count(len(losses["baseline"]), "paired seed")
    plots.caption(
        figure, f"Thin: {seeds}; thick: mean. Right: the penalised arm is better below zero."
    )
    return figure


def arms(records: list[Row]) -> Figure:
    """Draw every seed of every arm: test loss, its paired difference, and the exact ||H||^2."""
    finals = table(records, "final")
    ended = [row for row in finals if not row["diverged"]]
    losses, norms = (
        {
            arm.title: [row[measure] for row in ended if row["arm"] == name]
            for name, arm in ARMS.items()
        }
        for measure in ("test_loss", "hessian_fro2")
    )
    pairs, found = {}, {}
    for name in COMPARED:
        base = ARMS[name].base
        title = f"{ARMS[name].title}\nagainst {ARMS[base].title}"
        pairs[title] = plots.paired_changes(finals, "test_loss", base, name)
        found[title] = compared(finals, name, "test_loss")
    figure, (left, middle, right) = plots.new_figure(3, width=5.0, height=4.8)
    plots.dots(left, losses)
    plots.label(left, "Test loss of the final runs", "cross-entropy")
    plots.forest(middle, pairs, found, colors=[COLOR[name] for name in COMPARED])
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
            trials = known_trials(records, stage, arm)
            column = "learning_rate" if stage == "rate" else "strength"
            x, y = [t[column] for t in trials], [t["val_loss"] for t in trials]
            plots.trials(ax, x, y, names.index(arm), ARMS[arm].title)
        for base in dict.fromkeys(ARMS[arm].base for arm in shown if stage == "strength"):
            lowest = min(t["val_loss"] for t in known_trials(records, "rate", base))
            name = f"best {ARMS[base].title}"
            ax.axhline(lowest, color=COLOR[base], linestyle="--", linewidth=1.2, label=name)
        plots.log_axis(ax, "x", grid_values(config[grid]))
        plots.legend(ax)
        plots.label(ax, label.capitalize() if stage == "rate" else f"Strength: {label}", label)
    axes[0].set_ylabel("validation loss after the last epoch", fontsize=9)
    plots.caption(
        figure, "A mark: one trial, averaged over the tuning seeds. Ringed: the chosen trials."
    )
    return figure


def known_trials(records: list[Row], stage: str, arm: str) -> list[dict[str, Any]]:
    """Return a row per tuning trial without a diverged training; its loss is the seeds' mean."""
    trials = plots.mean_trials(records, ["val_loss"], arm=arm, stage=stage)
    return [trial for trial in trials if known(trial, "val_loss")]
