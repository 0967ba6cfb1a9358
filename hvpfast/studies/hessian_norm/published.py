"""The Hessian-norm study as it was published, many times over: the noise of such a design.

One repetition: ten random trials per arm (learning rate and rho log-uniform in [1e-5, 1e-1]), ten
epochs each, judged by the lowest loss after any epoch; then twenty epochs from two seeds with the
chosen values, judged by the loss after the last one. The test split is used for all of it. In a
seed, arms share initial weights but neither batches nor learning rates. The placebo arm computes
the penalty and stops its gradient: its differences from the baseline show what the design makes of
no effect at all.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from statistics import fmean, median, stdev
from typing import TYPE_CHECKING, Any

import numpy as np

from hvpfast.lab.data.splits import Data, fold
from hvpfast.lab.report import plots, words
from hvpfast.lab.report.comparison import LEVEL, compare_arms, summary
from hvpfast.lab.report.records import first_facts, known, table
from hvpfast.lab.report.template import render
from hvpfast.lab.runs.folder import Row
from hvpfast.lab.runs.progress import Cell, Task
from hvpfast.studies.hessian_norm.findings import CLAIMED_GAP, QUESTION
from hvpfast.studies.hessian_norm.report import TEMPLATES
from hvpfast.studies.hessian_norm.train import Setting, Shape, train

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METHODS = {"baseline": "plain", "penalised": "penalised", "placebo": "placebo"}
NUM_TRIALS, TUNE_EPOCHS, SEEDS = 10, 10, (42, 43)
LOW, HIGH = 1e-5, 1e-1
"""Ends of both searches."""
CLAIMED_NULL = {"baseline": 1.1799, "penalised": 1.1622}
"""What was first reported, when the penalty had no gradient: a placebo by accident."""


def plan(repetitions: int) -> list[str]:
    return [f"repetition-{number:03d}" for number in range(repetitions)]


def experiment(config: Any, shape: Shape, data: Data, cell: Cell) -> None:
    tasks: list[Task] = [
        (key, partial(repetition_rows, shape, config.activation, data, i), describe)
        for i, key in enumerate(plan(config.repetitions))
    ]
    cell.together(tasks)


def repetition_rows(
    shape: Shape, activation: str, data: Data, number: int
) -> Iterator[dict[str, Any]]:
    """Tune every arm and train its two final networks; a row per trial and one per arm."""
    for arm, method in METHODS.items():
        head = {"repetition": number, "seed": number, "arm": arm}
        random = np.random.Generator(np.random.Philox(fold(shape.root_seed, "tuner", number, arm)))
        best, lowest = None, math.inf
        for trial in range(NUM_TRIALS):
            rate, rho = 10 ** random.uniform(math.log10(LOW), math.log10(HIGH), 2)
            setting = Setting(
                method, activation, float(rate), 0.0 if arm == "baseline" else float(rho)
            )
            short = replace(shape, epochs=min(TUNE_EPOCHS, shape.epochs))
            trained = train(short, data, setting, f"tune-{number}-{arm}", trial)
            losses = [row["val_loss"] for row in trained.epochs[1:]]
            loss = min(filter(math.isfinite, losses), default=math.inf)
            yield {"table": "trial", **head, "trial": trial, **setting.columns, "val_loss": loss}
            if loss < lowest:
                best, lowest = setting, loss
        row = {"table": "repetition", **head}
        if best is not None:
            row |= best.columns
            finals = [train(shape, data, best, f"final-{number}", seed, arm) for seed in SEEDS]
            if not any(trained.diverged for trained in finals):
                row["val_loss"] = fmean(t.epochs[-1]["val_loss"] for t in finals)
                row["lowest"] = fmean(min(r["val_loss"] for r in t.epochs) for t in finals)
        yield row


def describe(rows: list[Row]) -> str:
    finals: list[dict[str, Any]] = table(rows, "repetition")
    told = [f"{row['arm']} {words.number(row.get('val_loss'))}" for row in finals]
    return f"repetition {rows[0]['repetition']:<3}  final loss: {', '.join(told)}"


def findings(records: list[Row], timings: Mapping[str, float]) -> dict[str, Any]:
    rows = table(records, "repetition")
    return {
        "protocol": "published",
        "config": first_facts(records, "config"),
        "data": first_facts(records, "data"),
        "trivial": first_facts(records, "trivial"),
        "level": LEVEL,
        "repetitions": len({row["repetition"] for row in rows}),
        "arms": {arm: arm_findings(rows, arm) for arm in METHODS},
        "comparison": {arm: against_baseline(rows, arm) for arm in ("penalised", "placebo")},
        "claimed": CLAIMED_GAP,
        "claimed_null": CLAIMED_NULL["penalised"] - CLAIMED_NULL["baseline"],
        "seconds": fmean(timings.values()) if timings else None,
    }


def arm_findings(rows: list[dict[str, Any]], arm: str) -> dict[str, Any]:
    mine = [row for row in rows if row["arm"] == arm]
    losses = {name: summary([row.get(name) for row in mine]) for name in ("val_loss", "lowest")}
    rates = [row["learning_rate"] for row in mine if known(row, "learning_rate")]
    return {**losses, "learning_rate": median(rates) if rates else None}


def against_baseline(rows: list[dict[str, Any]], arm: str) -> dict[str, Any]:
    """Compare an arm with the baseline over repetitions, and one repetition with what was claimed.

    ``as_large``: the share of repetitions whose difference is at least as far below zero as the
    published one; ``wins``: the share below zero at all.
    """
    changes = plots.paired_changes(rows, "val_loss", "baseline", arm)
    return {
        **compare_arms(rows, "val_loss", "baseline", arm),
        "sd": stdev(changes) if len(changes) > 1 else None,
        "wins": fmean(d < 0 for d in changes) if changes else None,
        "as_large": fmean(d <= CLAIMED_GAP for d in changes) if changes else None,
    }


def report(found: Mapping[str, Any]) -> str:
    sd = found["comparison"]["placebo"]["sd"]
    return render(
        TEMPLATES / "published.md.jinja",
        **found,
        question=QUESTION,
        claimed_null_in_deviations=abs(found["claimed_null"]) / sd if sd else None,
        trials=NUM_TRIALS,
        tune_epochs=min(TUNE_EPOCHS, found["config"]["epochs"]),
        low=LOW,
        high=HIGH,
        seeds=SEEDS,
    )


def figures(records: list[Row]) -> dict[str, Figure]:
    """Return the figure: differences per repetition, and final losses over chosen rates."""
    rows = table(records, "repetition")
    pairs = {
        arm: plots.paired_changes(rows, "val_loss", "baseline", arm)
        for arm in ("placebo", "penalised")
    }
    found = {arm: against_baseline(rows, arm) for arm in pairs}
    figure, (left, right) = plots.new_figure(2, width=5.4)
    own = dict(zip(METHODS, plots.COLORS, strict=False))
    plots.forest(left, pairs, found, colors=[own[arm] for arm in pairs])
    left.axvline(
        CLAIMED_GAP, color=plots.MUTED, linestyle="--", linewidth=1.2, label="as published"
    )
    plots.legend(left)
    plots.label(left, "Final loss minus the baseline's", "lower is better")
    for i, arm in enumerate(METHODS):
        mine = [row for row in rows if row["arm"] == arm and known(row, "val_loss")]
        x, y = [row["learning_rate"] for row in mine], [row["val_loss"] for row in mine]
        right.scatter(x, y, s=26, color=plots.COLORS[i], alpha=0.75, lw=0, label=arm)
    plots.log_axis(right, "x", [LOW, HIGH])
    plots.legend(right)
    plots.label(right, "What the chosen learning rate does", "learning rate", "final loss")
    plots.caption(
        figure, "A dot: one repetition of the whole protocol. Left: means with their interval."
    )
    return {"repetitions.png": figure}
