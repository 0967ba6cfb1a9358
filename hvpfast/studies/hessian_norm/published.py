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
from hvpfast.lab.report import plots
from hvpfast.lab.report.compare import (
    LEVEL,
    by_seed,
    compare,
    facts,
    summary,
    table,
)
from hvpfast.lab.report.words import (
    change,
    count,
    interval,
    number,
    p_value,
    percent,
    spread,
    table_head,
    table_line,
    wrap,
)
from hvpfast.lab.runs.folder import Row
from hvpfast.lab.runs.progress import Cell, Task
from hvpfast.studies.hessian_norm.findings import CLAIMED, QUESTION, answered
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
    """Return the key of every repetition's cell."""
    return [f"repetition-{number:03d}" for number in range(repetitions)]


def experiment(config: Any, shape: Shape, data: Data, cell: Cell) -> None:
    """Repeat the whole protocol."""
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
            values = {"learning_rate": setting.learning_rate, "strength": setting.strength}
            yield {"table": "trial", **head, "trial": trial, **values, "val_loss": loss}
            if loss < lowest:
                best, lowest = setting, loss
        row = {"table": "repetition", **head}
        if best is not None:
            row |= {"learning_rate": best.learning_rate, "strength": best.strength}
            finals = [train(shape, data, best, f"final-{number}", seed, arm) for seed in SEEDS]
            if not any(trained.diverged for trained in finals):
                row["val_loss"] = fmean(t.epochs[-1]["val_loss"] for t in finals)
                row["lowest"] = fmean(min(r["val_loss"] for r in t.epochs) for t in finals)
        yield row


def describe(rows: list[Row]) -> str:
    """Return a repetition's line of progress."""
    finals: list[dict[str, Any]] = table(rows, "repetition")
    told = [f"{row['arm']} {number(row.get('val_loss'))}" for row in finals]
    return f"repetition {rows[0]['repetition']:<3}  final loss: {', '.join(told)}"


def findings(records: list[Row], timings: Mapping[str, float]) -> dict[str, Any]:
    """Return every number of the report, named."""
    rows = table(records, "repetition")
    return {
        "protocol": "published",
        "config": facts(table(records, "config")[0]),
        "data": facts(table(records, "data")[0]),
        "trivial": facts(table(records, "trivial")[0]),
        "level": LEVEL,
        "repetitions": len({row["repetition"] for row in rows}),
        "arms": {
            arm: {
                measure: summary([row.get(measure) for row in rows if row["arm"] == arm])
                for measure in ("val_loss", "lowest")
            }
            | {
                "learning_rate": middle([r.get("learning_rate") for r in rows if r["arm"] == arm]),
            }
            for arm in METHODS
        },
        "comparison": {arm: against_baseline(rows, arm) for arm in ("penalised", "placebo")},
        "claimed": CLAIMED["penalised"] - CLAIMED["baseline"],
        "claimed_null": CLAIMED_NULL["penalised"] - CLAIMED_NULL["baseline"],
        "seconds": fmean(timings.values()) if timings else None,
    }


def middle(values: list[float | None]) -> float | None:
    """Return the median of the values that are not None."""
    there = [value for value in values if value is not None]
    return median(there) if there else None


def differences(rows: list[dict[str, Any]], arm: str) -> list[float]:
    """Return an arm's final loss minus the baseline's, repetition by repetition."""
    found = by_seed(rows, "val_loss", ("baseline", arm))
    return [b - a for a, b in zip(found["baseline"], found[arm], strict=True)]


def against_baseline(rows: list[dict[str, Any]], arm: str) -> dict[str, Any]:
    """Compare an arm with the baseline over repetitions, and one repetition with what was claimed.

    ``as_large``: the share of repetitions whose difference is at least as far below zero as the
    published one; ``wins``: the share below zero at all.
    """
    found = by_seed(rows, "val_loss", ("baseline", arm))
    changes = differences(rows, arm)
    gap = CLAIMED["penalised"] - CLAIMED["baseline"]
    return {
        **compare(found["baseline"], found[arm]),
        "sd": stdev(changes) if len(changes) > 1 else None,
        "wins": fmean(d < 0 for d in changes) if changes else None,
        "as_large": fmean(d <= gap for d in changes) if changes else None,
    }


def answer(found: Mapping[str, Any]) -> str:
    """Return the sentence that answers the question, from the repetitions."""
    pair = found["comparison"]["penalised"]
    if pair["low"] is None:
        return "No evidence: one repetition cannot give an interval."
    told = (
        f"Over {count(pair['n'], 'repetition')} of the published protocol the penalised arm's "
        f"final loss differs by {change(pair['mean'], pair['kind'])} "
        f"({percent(found['level'])} interval {interval(pair)})"
    )
    return answered(pair, told)


def headline(found: Mapping[str, Any]) -> str:
    """Return the answer, and what a placebo does in this design."""
    null = found["comparison"]["placebo"]
    return (
        f"{answer(found)}\nA placebo's difference has a standard deviation of "
        f"{number(null['sd'], 3)}; it wins {percent(null['wins'])} of the repetitions."
    )


TEMPLATE = """# {question}

**{answer}**

{head}
{rows}

Mean ± standard deviation over {repetitions}. Each is the whole published protocol with streams of
its own. The placebo computes the penalty and stops its gradient: it has no effect, and its line is
what the design makes of none.

- The published difference is {claimed}. A placebo's is at least as far below zero in {null_large}
  of the repetitions, the penalised arm's in {large}.
- When the penalty still had no gradient, {claimed_null} was reported as a gain: {null_sizes}
  standard deviations of the placebo's difference.

![Differences from the baseline, and what learning rates do](repetitions.png)

## Protocol

- **Data**: {dataset} ({check}): {num_train} samples to train; {num_test} test samples tune, select
  and report. Predicting the class frequencies scores a loss of {trivial_loss}.
- **Network**: {sizes}, {activation}, {num_params} parameters, {dtype}; Adam, batches of
  {batch_size}.
- **Tuning**: {trials} random trials an arm, {tune_epochs} epochs each, learning rate and rho
  log-uniform in [{low}, {high}], judged by the lowest loss after any epoch. (The tuner of the
  original draws its first {trials} trials at random, and there are no more.)
- **Final**: {epochs} epochs, seeds {seeds}; the mean of both last losses is reported.

## What this does not show

Tuning and reporting on one split makes every arm look better than it is. The sound protocol,
`--protocol sound`, shares the learning rate between the arms and has a split of its own to report.
"""


def report(found: Mapping[str, Any]) -> str:
    """Return report.md without its environment section."""
    config, null = found["config"], found["comparison"]["placebo"]
    text = {
        "question": QUESTION,
        "answer": answer(found),
        "level": percent(found["level"]),
        "head": table_head(
            [
                "",
                "final loss",
                "lowest loss",
                "median learning rate",
                "difference from baseline",
                f"Student's {percent(found['level'])}",
                "p",
                "sd of one repetition",
                "wins",
            ]
        ),
        "rows": "\n".join(line(found, arm) for arm in METHODS),
        "repetitions": count(found["repetitions"], "repetition"),
        "claimed": change(found["claimed"], "difference"),
        "claimed_null": change(found["claimed_null"], "difference"),
        "null_large": percent(null["as_large"]),
        "large": percent(found["comparison"]["penalised"]["as_large"]),
        "null_sizes": number(abs(found["claimed_null"]) / null["sd"] if null["sd"] else None, 2),
        "trivial_loss": number(found["trivial"]["test_loss"]),
        **found["data"],
        **{k: config[k] for k in ("activation", "dtype", "batch_size", "epochs")},
        "trials": NUM_TRIALS,
        "tune_epochs": min(TUNE_EPOCHS, config["epochs"]),
        "low": number(LOW),
        "high": number(HIGH),
        "seeds": " and ".join(map(str, SEEDS)),
    }
    return wrap(TEMPLATE.format(**text))


def line(found: Mapping[str, Any], arm: str) -> str:
    """Return one line of the table."""
    told = found["arms"][arm]
    cells = [
        arm,
        spread(told["val_loss"]),
        spread(told["lowest"]),
        number(told["learning_rate"], 3),
    ]
    pair = found["comparison"].get(arm)
    if pair is None:
        return table_line(*cells, *[""] * 5)
    cells += [change(pair["mean"], pair["kind"]), interval(pair), p_value(pair)]
    return table_line(*cells, number(pair["sd"], 3), percent(pair["wins"]))


def figures(records: list[Row]) -> dict[str, Figure]:
    """Return the figure: differences per repetition, and final losses over chosen rates."""
    rows = table(records, "repetition")
    pairs = {arm: differences(rows, arm) for arm in ("placebo", "penalised")}
    found = {arm: against_baseline(rows, arm) for arm in pairs}
    figure, (left, right) = plots.new_figure(2, width=5.4)
    own = dict(zip(METHODS, plots.COLORS, strict=False))
    plots.forest(left, pairs, found, colors=[own[arm] for arm in pairs])
    gap = CLAIMED["penalised"] - CLAIMED["baseline"]
    left.axvline(gap, color=plots.MUTED, linestyle="--", linewidth=1.2, label="as published")
    plots.legend(left)
    plots.label(left, "Final loss minus the baseline's", "lower is better")
    for i, arm in enumerate(METHODS):
        known = [row for row in rows if row["arm"] == arm and row.get("val_loss") is not None]
        x, y = [row["learning_rate"] for row in known], [row["val_loss"] for row in known]
        right.scatter(x, y, s=26, color=plots.COLORS[i], alpha=0.75, lw=0, label=arm)
    plots.log_axis(right, "x", [LOW, HIGH])
    plots.legend(right)
    plots.label(right, "What the chosen learning rate does", "learning rate", "final loss")
    plots.caption(
        figure, "A dot: one repetition of the whole protocol. Left: means with their interval."
    )
    return {"repetitions.png": figure}
