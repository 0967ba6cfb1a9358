"""The words of the Hessian-norm study: progress and report; every number comes from its rows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import fmean
from typing import Any

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
from hvpfast.studies.hessian_norm.findings import (
    ARMS,
    COMPARED,
    MEASURES,
    QUESTION,
    answer,
    grid_values,
)

TEMPLATE = """# {question}

**{answer}**

{head}
{rows}

Arms: mean ± standard deviation over {seeds_counted}. Comparison: paired by seed, mean differences,
or geometric mean ratios where there is a cross; p by flipping the signs of the pairs. The question
is answered by the test loss and Student's interval, as decided beforehand; the other rows describe,
and their intervals are not corrected for their number. ‖H‖² = Tr(HH) is the squared Frobenius norm
of the Hessian, exact on the whole train split; G is its Gauss-Newton part. Always predicting the
class frequencies of the train split scores a test loss of {constant_loss} and an accuracy of
{constant_accuracy}; the best linear predictor {linear_loss} and {linear_accuracy}.

{reading}

![Validation curves of the final runs](validation_curves.png)

## All arms

{arms_head}
{arms}

{against_head}
{against}

Verdicts of this table are at {level}, corrected by Holm's rule for the {num_compared} comparisons.

![Every seed of every arm](arms.png)

- **Placebo**: the penalty is computed and its gradient stopped. In {placebo} of {seeds_counted} its
  curve and final numbers are the baseline's, bit for bit.
- **Exact norm**: the penalty is rho ‖H‖² itself and not one probe's estimate of it, at the
  penalised arm's learning rate and rho.
- **Own rate**: the penalised arm again, with the learning rate chosen once more at its rho.
- **Weight decay** (decoupled) and **SAM** (the gradient at the worst point of a ball) have as many
  trials for their strength as the penalised arm has for rho, and as many steps.
- **Smooth**: baseline and penalised arm with {smooth_activation} in the place of {activation},
  each tuned in the same way.

## Predictions registered beforehand

{predictions}
- *The published gap, {claimed}.* {claimed_told}

## Protocol

- **Data**: {dataset}, generated offline (against its published values: {check}). {num_train}
  samples to train, {num_val} to validate, carved out of the official train part, and {num_test} to
  test, used once, after the last step of each final run.
- **Network**: {sizes}, {activation}, {num_params} parameters, {dtype}. Adam, batches of
  {batch_size}, {epochs}.
- **Penalty**: cross-entropy + rho ‖Hv‖²; H is the Hessian of the mini-batch's cross-entropy, v one
  fresh Rademacher probe a step, and the mean of ‖Hv‖² over probes is ‖H‖² of the mini-batch. Within
  a seed all arms start from the same weights and see the same batches.
- **Tuning**: the baselines try the learning rates {learning_rates}; the other arms take their
  baseline's rate and try {rhos} for rho, {decays} for the weight decay, {radii} for the radius.
  Every trial is a mean over {tune_seeds}; the lowest validation loss after the last epoch wins, the
  same quantity that is reported for the final runs.{edges}{lost}
- **Final runs**: {seeds_counted} an arm, from random streams that tuning did not use;
  {num_diverged} of them diverged.
- **Weight of the penalty**: in the last epoch rho ‖Hv‖² is {penalty_share} of the cross-entropy.

![Tuning trials](tuning.png)

## Cost

One training by the library (`{backend}`) and by torch autograd alone, the same protocol on the same
core in the same run, one seed:

{costs_head}
{costs}
| exact ‖H‖² of one network | {measure} | | {torch_measure} | {measure_ratio} | | |

For all trainings and measured networks of the run, tuning included, torch autograd alone would take
{protocol_ratio} times as long. Of the exact norm's training it did one step, which is counted as
often as there are steps; without that arm the ratio is {without_exact}.

The last two columns: the epoch that is reached in the time of the whole baseline's training, and
how the validation loss there differs from the baseline's last one.

## What this does not show

One data set, one network, one optimiser, one length of training, one seed of the splits. A smaller
‖H‖ can come from the scale of the logits and not from a flatter landscape: their size and the
Gauss-Newton part are in the table. Validation data chose the strengths, so the validation row
flatters the arms that have one.
"""


def report(found: Mapping[str, Any]) -> str:
    """Return report.md without its environment section."""
    config, arms, costs = found["config"], found["arms"], found["cost"]
    trivial, level = found["trivial"], percent(found["level"])
    intervals = (f"Student's {level}", f"bootstrap {level}", "p")
    scores = ("test loss", "test accuracy", "train loss", "exact ‖H‖²", "s per training")
    text = {
        "question": QUESTION,
        "answer": answer(found),
        "level": level,
        "head": table_head(
            ["", "baseline", "penalised", "penalised against baseline", *intervals, "verdict"],
            words=["verdict"],
        ),
        "arms_head": table_head(["arm", "learning rate", "strength", *scores]),
        "against_head": table_head(
            ["arm", "against", "change of test loss", *intervals, "p, Holm", "verdict", "‖H‖²"],
            words=["against", "verdict"],
        ),
        "costs_head": table_head(
            [
                "arm",
                "s here",
                "against the baseline",
                "s by torch autograd",
                "torch / here",
                "epoch at equal time",
                "change of validation loss",
            ]
        ),
        "rows": "\n".join(result_line(found, measure) for measure in MEASURES),
        "arms": "\n".join(arm_line(found, arm) for arm in ARMS),
        "against": "\n".join(against_line(found, arm) for arm in COMPARED),
        "costs": "\n".join(cost_line(found, arm) for arm in ARMS),
        "seeds_counted": count(found["num_seeds"], "seed"),
        "num_compared": len(COMPARED),
        "placebo": found["placebo"]["num_same"],
        "reading": reading(found["comparison"]),
        "predictions": predictions(found),
        "claimed": change(found["claimed"], "difference"),
        "claimed_told": claimed(found),
        "constant_loss": number(trivial["class frequencies"]["test_loss"]),
        "constant_accuracy": number(trivial["class frequencies"]["test_accuracy"], 3),
        "linear_loss": number(trivial["linear"]["test_loss"]),
        "linear_accuracy": number(trivial["linear"]["test_accuracy"], 3),
        **found["data"],
        **{k: config[k] for k in ("activation", "smooth_activation", "dtype", "batch_size")},
        **{k: grid(config[k]) for k in ("learning_rates", "rhos", "decays", "radii")},
        "num_diverged": found["num_diverged"],
        "epochs": count(config["epochs"], "epoch"),
        "tune_seeds": count(len(grid_values(config["tune_seeds"])), "training seed"),
        "edges": edges(arms),
        "lost": lost(arms),
        "penalty_share": percent(arms["penalised"]["penalty_share"], 1),
        "measure": number(costs["measure"], 3),
        "torch_measure": number(costs["torch_measure"], 3),
        "measure_ratio": number(costs["measure_ratio"], 3),
        "protocol_ratio": number(costs["protocol_ratio"], 3),
        "without_exact": number(costs["without_exact"], 3),
    }
    return wrap(TEMPLATE.format(**text))


def grid(words: str) -> str:
    """Return the values of a grid as the report lists them."""
    return ", ".join(map(number, grid_values(words)))


def edges(arms: Mapping[str, Any]) -> str:
    """Return which chosen values lie at an end of their grid."""
    found = [f"{what} of {ARMS[arm].title}" for arm in ARMS for what in arms[arm]["at_edge"]]
    return f" At an end of its grid: {', '.join(found)}." if found else ""


def lost(arms: Mapping[str, Any]) -> str:
    """Return which arms had trials that diverged."""
    found = [
        f"{count(arms[arm]['num_trials_diverged'], 'trial')} of {ARMS[arm].title}"
        for arm in ARMS
        if arms[arm]["num_trials_diverged"]
    ]
    return f" Diverged: {', '.join(found)}." if found else ""


def result_line(found: Mapping[str, Any], measure: str) -> str:
    """Return one line of the table that answers the question."""
    pair = found["comparison"][measure]
    arms = [spread(found["arms"][arm][measure]) for arm in ("baseline", "penalised")]
    told = [change(pair["mean"], pair["kind"]), interval(pair), interval(pair, "boot_")]
    return table_line(MEASURES[measure], *arms, *told, p_value(pair), pair["verdict"])


def arm_line(found: Mapping[str, Any], arm: str) -> str:
    """Return one line of the table of all arms."""
    told = found["arms"][arm]
    measures = ("test_loss", "test_accuracy", "train_loss", "hessian_fro2")
    strength = number(told["strength"], 3) if told["strength"] else ""
    seconds = number(found["cost"]["train"][arm], 3)
    scores = [spread(told[measure]) for measure in measures]
    return table_line(ARMS[arm].title, number(told["learning_rate"], 3), strength, *scores, seconds)


def against_line(found: Mapping[str, Any], arm: str) -> str:
    """Return one line of the table of comparisons."""
    pair, norm = found["against"][arm], found["norms"][arm]
    told = [change(pair["mean"], pair["kind"]), interval(pair), interval(pair, "boot_")]
    ps = [p_value(pair), p_value(pair, "p_holm"), pair["verdict_holm"]]
    title, base = ARMS[arm].title, ARMS[ARMS[arm].base].title
    return table_line(title, base, *told, *ps, change(norm["mean"], norm["kind"]))


def cost_line(found: Mapping[str, Any], arm: str) -> str:
    """Return one line of the table of costs."""
    costs = found["cost"]
    names = ("train", "relative", "torch_train", "train_ratio")
    told = [number(costs[name][arm], 3) for name in names]
    equal = found["equal_time"].get(arm)
    told += [f"{change(equal['mean'], equal['kind'])} {interval(equal)}"] if equal else [""]
    told.insert(-1, str(equal["epoch"]) if equal else "")
    return table_line(ARMS[arm].title, *told)


def claimed(found: Mapping[str, Any]) -> str:
    """Return whether the published gap is compatible with what was found."""
    primary = found["comparison"]["test_loss"]
    if primary["low"] is None:
        return "No evidence: there are too few seeds."
    inside = primary["low"] <= found["claimed"] <= primary["high"]
    return f"It lies {'inside' if inside else 'outside'} the interval {interval(primary)}."


def predictions(found: Mapping[str, Any]) -> str:
    """Return the predictions that were registered beforehand, each with its answer."""
    primary, spread_of = found["comparison"]["test_loss"], found["arms"]["baseline"]["test_loss"]
    return "\n".join(
        f"- *{said}* {told}"
        for said, told in (
            (
                "The published gap shrinks to within one standard deviation once the learning rate "
                "is matched.",
                matched_gap(primary, spread_of),
            ),
            (
                "The placebo coincides with the baseline.",
                "Yes, in every number of every seed."
                if found["placebo"]["coincides"]
                else f"No: only in {found['placebo']['num_same']} of "
                f"{count(found['placebo']['num_seeds'], 'seed')}.",
            ),
            (
                "Whether the penalty helps depends on the activation: full-Hessian penalties may "
                "harm networks of rectified units.",
                f"With {found['arms']['penalised']['activation']}: "
                f"{told_change(found['against']['penalised'])}; with "
                f"{found['arms']['smooth']['activation']}: "
                f"{told_change(found['against']['smooth-penalised'])}.",
            ),
        )
    )


def matched_gap(primary: Mapping[str, Any], base: Mapping[str, Any]) -> str:
    """Return whether the gap lies within one standard deviation of the baseline's seeds."""
    if primary["mean"] is None or not base["sd"]:
        return "No evidence: there are too few seeds."
    size = abs(primary["mean"]) / base["sd"]
    told = (
        f"it is {change(primary['mean'], 'difference')}, {number(size, 3)} standard deviations of "
        "the baseline's test loss over seeds"
    )
    return f"{'Yes' if size <= 1 else 'No'}: {told}."


def told_change(found: Mapping[str, Any]) -> str:
    """Return a difference in test loss with its verdict after correction."""
    return f"test loss {change(found['mean'], found['kind'])}, {found['verdict_holm']}"


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


# progress


def mean_loss(rows: list[Row]) -> float:
    """Return the mean validation loss of a trial; infinite where a training diverged."""
    losses = [row["val_loss"] for row in rows]
    return fmean(loss if isinstance(loss, float) else math.inf for loss in losses)


def describe_data(rows: list[Row]) -> str:
    """Return the data's line of progress."""
    sizes = "{num_train} train, {num_val} validation, {num_test} test".format(**rows[0])
    return f"{rows[0]['dataset']}: {sizes}"


def describe_trial(rows: list[Row]) -> str:
    """Return a trial's line of progress."""
    row = rows[0]
    strength = f"strength {row['strength']:.0e}" if row["strength"] else ""
    point = f"lr {row['learning_rate']:.1e}  {strength:<14}"
    return f"tune   {row['arm']:<16}  {point}  val loss {mean_loss(rows):.4f}"


def describe_final(rows: list[Row]) -> str:
    """Return a final run's line of progress."""
    row = rows[-1]
    head = f"final  {row['arm']:<16}  seed {row['seed']:<2}"
    if row["diverged"]:
        return f"{head}  diverged"
    losses = f"val loss {row['val_loss']:.4f}  test loss {row['test_loss']:.4f}"
    return f"{head}  {losses}  |H|^2 {row['hessian_fro2']:.3g}"


def describe_torch(rows: list[Row]) -> str:
    """Return the line of progress of the trainings by torch autograd."""
    return f"torch  autograd alone    seed {rows[0]['seed']:<2}  {len(rows) - 1} arms"
