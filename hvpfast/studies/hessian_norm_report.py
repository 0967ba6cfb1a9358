"""Findings, figures and report of the Hessian-norm study: functions of its records alone."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

from hvpfast.studies import plots
from hvpfast.studies.findings import (
    LEVEL,
    by_seed,
    change,
    compare,
    count,
    facts,
    interval,
    number,
    percent,
    spread,
    summary,
    table,
    wrap,
)
from hvpfast.studies.folder import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

QUESTION = (
    "Does penalising the Hessian's Frobenius norm lower the test loss of a small MLP on MNIST-1D?"
)
ARMS = ("baseline", "penalised")
MEASURES = {
    "test_loss": "test loss (primary)",
    "test_accuracy": "test accuracy",
    "val_loss": "validation loss",
    "train_loss": "train loss",
    "gap": "test loss - train loss",
    "hessian_fro2": "‖H‖², train split",
    "hessian_trace": "Tr H, train split",
    "params_norm": "‖parameters‖",
}
"""The test loss was chosen beforehand to answer the question; the rest describes."""
RATIOS = ("hessian_fro2", "hessian_trace", "params_norm")
"""Positive quantities, compared as ratios."""
EDGE = 1.1
"""A chosen value within this factor of an end of its search is reported as lying at the edge."""


def findings(records: list[Row], timings: Mapping[str, float]) -> dict[str, Any]:
    """Return every number of the report, named."""
    finals = table(records, "final")
    return {
        "config": facts(table(records, "config")[0]),
        "data": facts(table(records, "data")[0]),
        "trivial": facts(table(records, "trivial")[0]),
        "level": LEVEL,
        "num_seeds": len({row["seed"] for row in finals}),
        "num_diverged": sum(row["diverged"] for row in finals),
        **{name: finals[0][name] for name in ("backend", "sizes", "num_params")},
        "arms": {arm: arm_findings(records, arm) for arm in ARMS},
        "comparison": {measure: compared(finals, measure) for measure in MEASURES},
        "cost": cost(records, timings),
    }


def compared(finals: list[dict[str, Any]], measure: str) -> dict[str, Any]:
    """Compare the two arms in one measure of the final runs, paired by seed."""
    arms = by_seed(finals, measure, ARMS)
    return compare(arms["baseline"], arms["penalised"], ratio=measure in RATIOS)


def arm_findings(records: list[Row], arm: str) -> dict[str, Any]:
    """Return what tuning chose for one arm, and mean and spread of its final runs."""
    config, finals = table(records, "config")[0], table(records, "final", arm=arm)
    rates = learning_rates(config)
    searched = {
        "learning_rate": (min(rates), max(rates)),
        "rho": (config["rho_min"], config["rho_max"]),
    }
    chosen = {name: finals[0][name] for name in searched}
    edges = [
        name.replace("_", " ")
        for name, (low, high) in searched.items()
        if chosen[name] > 0 and not low * EDGE < chosen[name] < high / EDGE
    ]
    trials, epochs = table(records, "trial", arm=arm), table(records, "epoch", arm=arm)
    last = [row for row in epochs if row["epoch"] == config["epochs"] and row["batch_penalty"]]
    shares = [chosen["rho"] * row["batch_penalty"] / row["batch_loss"] for row in last]
    return {
        **chosen,
        "at_edge": edges,
        "num_trials_diverged": len({row["trial"] for row in trials if row["val_loss"] is None}),
        "penalty_share": fmean(shares) if shares else None,
        **{measure: summary([row.get(measure) for row in finals]) for measure in MEASURES},
    }


def learning_rates(config: Mapping[str, Any]) -> list[float]:
    """Return the learning rates that both arms tried, from the configuration's row."""
    return [float(word) for word in config["learning_rates"].split()]


def cost(records: list[Row], timings: Mapping[str, float]) -> dict[str, float | None]:
    """Return the median seconds of a tuning training per arm; trainings do equal steps."""
    seconds: dict[str, float | None] = {}
    for arm in ARMS:
        cells = [row["cell"] for row in table(records, "trial", arm=arm)]
        known = [timings[cell] / cells.count(cell) for cell in cells if cell in timings]
        seconds[arm] = median(known) if known else None
    base, other = seconds["baseline"], seconds["penalised"]
    return {**seconds, "ratio": other / base if base and other else None}


def answer(found: Mapping[str, Any]) -> str:
    """Return the sentence that answers the question, from the primary comparison."""
    primary = found["comparison"]["test_loss"]
    if primary["low"] is None:
        pairs = count(primary["n"], "pair")
        return f"No evidence: {pairs} of final runs cannot give an interval."
    told = (
        f"The penalised arm's test loss differs by {change(primary['mean'], primary['kind'])} "
        f"(mean of {count(primary['n'], 'paired seed')}, {percent(found['level'])} interval "
        f"{interval(primary)})"
    )
    if not primary["evidence"]:
        return f"No evidence. {told}; the interval covers zero."
    return f"{'Yes' if primary['verdict'] == 'lower' else 'No, it is worse'}. {told}."


def headline(found: Mapping[str, Any]) -> str:
    """Return the answer, and what the penalty did to the curvature."""
    norm = found["comparison"]["hessian_fro2"]
    told = f"{change(norm['mean'], norm['kind'])} {interval(norm)}"
    return f"{answer(found)}\nSquared Hessian norm, penalised against baseline: {told}."


TEMPLATE = """# {question}

**{answer}**

| | baseline | penalised | penalised against baseline | {level} interval | p | verdict |
| --- | ---: | ---: | ---: | ---: | ---: | --- |
{rows}

Arms: mean ± standard deviation over {seeds_counted}. Comparison: paired by seed, mean differences,
or geometric mean ratios where there is a cross; p by flipping the signs of the pairs. The question
is answered by the test loss, as decided beforehand; the other rows describe, and their intervals
are not corrected for their number. Always predicting the class frequencies of the train split
scores a test loss of {trivial_loss} and an accuracy of {trivial_accuracy}.

{reading}

![Validation curves of the final runs](validation_curves.png)

![The final runs, paired by seed](comparison.png)

## Protocol

- **Data**: {dataset}, generated offline (against its published values: {check}). {num_train}
  samples to train, {num_val} to validate, carved out of the official train part, and {num_test} to
  test, used once, after the last step of each final run.
- **Network**: {sizes}, {activation}, {num_params} parameters, {dtype}. Adam, batches of
  {batch_size}, {epochs}.
- **Arms**: the baseline minimises the cross-entropy, the penalised arm cross-entropy + rho ‖Hv‖²:
  H is the Hessian of the mini-batch's cross-entropy, v one fresh Rademacher probe a step, and the
  mean of ‖Hv‖² over probes is ‖H‖² = Tr(HH), the squared Frobenius norm. Within a seed both arms
  start from the same weights and see the same batches.
- **Tuning**: {trials} an arm, each a mean over {tune_seeds}. Both arms first try the same learning
  rates ({learning_rates}); then Optuna's TPE, seeded, searches between them. For the penalised arm
  every trial also draws rho, from [{rho_min}, {rho_max}]. The lowest validation loss after the last
  epoch wins, the same quantity that is reported for the final runs.
- **Chosen**: {chosen}.{edges}
- **Final runs**: seeds {seeds}, from random streams that tuning did not use; {num_diverged} of
  them diverged.
- **Curvature**: after training, on the whole train split, from {curvature_probes} fresh probes, in
  both arms alike.
- **Weight of the penalty**: in the last epoch rho ‖Hv‖² is {penalty_share} of the cross-entropy.

![Tuning trials of both arms](tuning.png)

## Cost

A training during tuning took {baseline_seconds} s in the baseline and {penalised_seconds} s in the
penalised arm (medians; ratio {cost_ratio}; backend `{backend}`).

## What this does not show

One data set, one network, one optimiser, one length of training, one seed of the tuner. A smaller
‖H‖ can come from the scale of the logits and not from a flatter landscape. Validation data chose
the hyper-parameters, so the validation row flatters both arms. There is no placebo arm and no other
regulariser at equal cost.
"""


def report(found: Mapping[str, Any]) -> str:
    """Return report.md without its environment section."""
    config, arms, costs = found["config"], found["arms"], found["cost"]
    edges = [f"{name} ({arm})" for arm in ARMS for name in arms[arm]["at_edge"]]
    text = {
        "question": QUESTION,
        "answer": answer(found),
        "level": percent(found["level"]),
        "rows": "\n".join(result_line(found, measure) for measure in MEASURES),
        "seeds_counted": count(found["num_seeds"], "seed"),
        "reading": reading(found["comparison"]),
        "trivial_loss": number(found["trivial"]["test_loss"]),
        "trivial_accuracy": number(found["trivial"]["test_accuracy"], 3),
        **found["data"],
        **{k: found[k] for k in ("num_diverged", "backend", "sizes", "num_params")},
        **{k: config[k] for k in ("activation", "dtype", "batch_size", "curvature_probes")},
        "epochs": count(config["epochs"], "epoch"),
        "trials": count(config["trials"], "trial"),
        "tune_seeds": count(len(config["tune_seeds"].split()), "training seed"),
        "learning_rates": ", ".join(map(number, learning_rates(config))),
        "rho_min": number(config["rho_min"]),
        "rho_max": number(config["rho_max"]),
        "chosen": "; ".join(chosen_words(arm, arms[arm]) for arm in ARMS),
        "edges": f" At the edge of what was searched: {', '.join(edges)}." if edges else "",
        "seeds": ", ".join(config["seeds"].split()),
        "penalty_share": percent(arms["penalised"]["penalty_share"], 1),
        "baseline_seconds": number(costs["baseline"], 3),
        "penalised_seconds": number(costs["penalised"], 3),
        "cost_ratio": number(costs["ratio"], 3),
    }
    return wrap(TEMPLATE.format(**text))


def reading(comparison: Mapping[str, Any]) -> str:
    """Return what the train loss and the gap add to the answer."""
    test, train, gap = (comparison[name]["verdict"] for name in ("test_loss", "train_loss", "gap"))
    words = {"lower": "is lower", "higher": "is higher"}
    told = (
        f"The penalised arm's train loss {words.get(train, f'shows {train}')}; "
        f"its gap between test and train loss {words.get(gap, f'shows {gap}')}."
    )
    if test == train == "lower" and gap != "lower":
        told += (
            " So in this number of steps the penalised arm fits better; that it also generalises "
            "better for a given fit is not shown."
        )
    if test == gap == "lower":
        told += " So the gain is not only a better fit."
    return told


def chosen_words(arm: str, found: Mapping[str, Any]) -> str:
    """Return what tuning chose for one arm."""
    rho = f" and rho {number(found['rho'], 3)}" if found["rho"] else ""
    diverged = found["num_trials_diverged"]
    lost = f" ({count(diverged, 'trial')} diverged)" if diverged else ""
    return f"{arm}: learning rate {number(found['learning_rate'], 3)}{rho}{lost}"


def result_line(found: Mapping[str, Any], measure: str) -> str:
    """Return one line of the table of results."""
    pair = found["comparison"][measure]
    arms = [spread(found["arms"][arm][measure]) for arm in ARMS]
    told = [change(pair["mean"], pair["kind"]), interval(pair), number(pair["p"], 2)]
    return "| " + " | ".join([MEASURES[measure], *arms, *told, pair["verdict"]]) + " |"


def figures(records: list[Row]) -> dict[str, Figure]:
    """Return the figures by file name."""
    return {
        "validation_curves.png": validation_curves(records),
        "comparison.png": comparison(records),
        "tuning.png": tuning(records),
    }


def validation_curves(records: list[Row]) -> Figure:
    """Draw validation loss and accuracy per epoch, and the paired difference of the losses."""
    losses, accuracies = (seed_curves(records, f"val_{what}") for what in ("loss", "accuracy"))
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


def seed_curves(records: list[Row], measure: str) -> dict[str, list[list[float]]]:
    """Return a measure per epoch for every seed from which no arm diverged."""
    epochs, lost = table(records, "epoch"), table(records, "final", diverged=True)
    seeds = dict.fromkeys(row["seed"] for row in epochs)
    for row in lost:
        seeds.pop(row["seed"], None)
    return {
        arm: [[r[measure] for r in epochs if (r["arm"], r["seed"]) == (arm, s)] for s in seeds]
        for arm in ARMS
    }


def comparison(records: list[Row]) -> Figure:
    """Draw the final runs of both arms, paired by seed, with the interval of the comparison."""
    titles = {
        "test_loss": "Test loss",
        "test_accuracy": "Test accuracy",
        "hessian_fro2": "‖H‖² on the train split",
    }
    finals = table(records, "final")
    figure, axes = plots.new_figure(3, width=3.6)
    for ax, (measure, title) in zip(axes, titles.items(), strict=True):
        found, arms = compared(finals, measure), by_seed(finals, measure, ARMS)
        plots.paired_dots(ax, arms)
        if found["kind"] == "ratio":
            plots.log_axis(ax, "y", [value for values in arms.values() for value in values])
        plots.label(ax, f"{title}\n{change(found['mean'], found['kind'])}  {interval(found)}")
    plots.caption(
        figure,
        "Dots: one seed each, joined across the arms; bars: means. Above: the paired change and "
        f"its {percent(LEVEL)} interval.",
    )
    return figure


def tuning(records: list[Row]) -> Figure:
    """Draw every tuning trial: validation loss over the learning rate and over rho."""
    config = table(records, "config")[0]
    figure, (left, right) = plots.new_figure(2, width=5.2)
    for position, arm in enumerate(ARMS):
        trials = mean_trials(records, arm)
        losses = [trial["val_loss"] for trial in trials]
        plots.trials(left, [t["learning_rate"] for t in trials], losses, position, arm)
        if arm == "penalised":
            plots.trials(right, [t["rho"] for t in trials], losses, position, arm)
        elif losses:
            plots.level(right, min(losses), position, f"best {arm}")
    plots.log_axis(left, "x", learning_rates(config))
    plots.log_axis(right, "x", [config["rho_min"], config["rho_max"]])
    plots.legend(left)
    plots.legend(right)
    plots.label(left, "Both arms", "learning rate", "validation loss after the last epoch")
    plots.label(right, "The penalised arm", "rho")
    plots.caption(
        figure, "A mark: one trial, averaged over the tuning seeds. Ringed: the chosen trials."
    )
    return figure


def mean_trials(records: list[Row], arm: str) -> list[dict[str, Any]]:
    """Return a row per tuning trial that did not diverge, its loss averaged over the seeds."""
    trials: dict[int, list[dict[str, Any]]] = {}
    for row in table(records, "trial", arm=arm):
        trials.setdefault(row["trial"], []).append(row)
    return [
        {**rows[0], "val_loss": fmean(row["val_loss"] for row in rows)}
        for rows in trials.values()
        if all(row["val_loss"] is not None for row in rows)
    ]
