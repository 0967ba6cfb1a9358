"""Report of the learning-rate study: words around its findings."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from hvpfast.lab.report.words import (
    change,
    count,
    interval,
    number,
    p_value,
    percent,
    spread,
    wrap,
)
from hvpfast.studies.lr_adaptation.findings import (
    ARMS,
    CONTROL,
    QUESTION,
    RATIOS,
    answer,
    learning_rates,
)

NEAR = 0.1
"""How far from one the factor of the prediction about noise may be."""
START = """# {question}

**{answer}**

"""

TRIVIAL = """Always predicting the class frequencies of the train split scores a test loss of
{trivial_loss} and an accuracy of {trivial_accuracy}; the best linear model {linear_loss} and
{linear_accuracy}.
"""

SOUND = (
    START
    + """| arm | learning rate | {heads} | test accuracy | time of a step |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
{rows}

Mean ± standard deviation over {seeds_counted}; losses, steps and drift are better where they are
lower. Learning rates: for the loss after the last epoch, and in brackets for speed to the target.
Steps to the target: until the validation loss is first at or below {target}, evaluated
{evaluations} an epoch; a run that never gets there counts with all its {num_steps} steps.{never}
The time of a step, gradient included, is relative to Adam's, {adam_seconds} s. """
    + TRIVIAL
    + """
![Validation loss of the final runs](curves.png)

![Every final run](measures.png)

## What was claimed

{claims}

## What was predicted

{predictions}

## Every arm against Adam

Paired by seed: mean differences, or geometric mean ratios where there is a cross; Student's
interval, the bootstrap's, p by flipping the signs of the pairs, and Holm's correction over the arms
of a table.

{tables}

![Paired differences from Adam](differences.png)

## What the proxies measure

Along the trainings of {proxy_trajectory} all second moments were kept side by side, fed with the
same gradients. After epoch {proxy_epoch}, over the coordinates of the network, each is compared
with the exact diagonal of the Hessian on the train split (curvature) and with the standard
deviation of a mini-batch gradient (noise): rank correlations, slopes of the logarithms, and the
median ratio to the noise. Mean over {proxy_seeds}.

| proxy | rank, curvature | slope, curvature | rank, noise | slope, noise | ratio to noise |
| --- | ---: | ---: | ---: | ---: | ---: |
{proxy_rows}

A measure of curvature has slope one on curvature; a measure of noise has slope one on noise, and
then about one half on curvature, because for cross-entropy the squared noise goes with the
Gauss-Newton diagonal. The probe's square has the row's norm as its mean, not the diagonal alone.

![Proxies against the exact diagonal and against gradient noise](proxies.png)

![Correlations by epoch, and how alike the updates are](similarity.png)

## Protocol

- **Data**: {dataset}, generated offline (against its published values: {check}). {num_train}
  samples to train, {num_val} to validate, carved out of the official train part, and {num_test} to
  test, used for each final run after its last step and at the epoch of its lowest validation loss.
- **Network**: {sizes}, {activation}, {num_params} parameters, {dtype}; batches of {batch_size},
  {epochs}; backend `{backend}`.
- **Arms**: within a seed all start from the same weights and see the same batches. The wrapper
  divides each gradient by the root of a running mean of squares before the base optimizer steps:
  of differences of consecutive gradients (the study's), of the secant on one batch, of one
  Hutchinson probe, or of the exact diagonal of the mini-batch's Hessian.
- **Tuning**: every arm tries the same learning rates ({learning_rates}), each averaged over
  {tune_seeds}. The lowest validation loss after the last epoch wins, as it is reported; for the
  speed on its own, the fewest steps to the target.{edges}
- **Chosen beforehand**: the four measures, the target, the rule of tuning and the first of the
  predictions; the other two follow from what the wrapper computes. The speed at a rate of its own
  was added after a pilot with some of these seeds, because the rate for the last loss turned out
  to be far from the fastest one.
- **Final runs**: seeds {seeds}, from random streams that tuning did not use; {num_diverged} of them
  diverged.

![Tuning](tuning.png)

## What this does not show

One data set, one network, one batch size, one length of training. Momentum, eps and the wrapper's
memory were not tuned in any arm. Arms are compared at equal steps; the secant, the probe and the
exact diagonal pay for more than one gradient a step, as the time of a step says.
"""
)


def headline(found: Mapping[str, Any]) -> str:
    """Return the answer, and that to the registered prediction."""
    if found["protocol"] == "published":
        return answer(found)
    return f"{answer(found)}\n{control_prediction(found)}"


def common_words(found: Mapping[str, Any]) -> dict[str, str]:
    """Return what both reports say."""
    config, data = found["config"], found["data"]
    arms = found["arms"].values()
    missed = missed_words(arms, "num_reached", "Never there")
    if found["protocol"] == "sound":
        missed += missed_words(arms, "num_speed_reached", "With the rate chosen for speed")
    return {
        "question": QUESTION,
        "answer": answer(found),
        "level": percent(found["level"]),
        "trivial_loss": number(found["trivial"]["test_loss"]),
        "trivial_accuracy": number(found["trivial"]["test_accuracy"], 3),
        "linear_loss": number(found["linear"]["test_loss"]),
        "linear_accuracy": number(found["linear"]["test_accuracy"], 3),
        "target": number(config["target_loss"]),
        "never": missed,
        **{k: str(v) for k, v in data.items()},
        **{k: str(found[k]) for k in ("num_diverged", "backend", "sizes", "num_params")},
        **{k: str(config[k]) for k in ("activation", "dtype", "batch_size")},
        "epochs": count(config["epochs"], "epoch"),
    }


def missed_words(arms: Iterable[Mapping[str, Any]], name: str, head: str) -> str:
    """Return which arms did not get to the target in all their final runs, in a sentence."""
    told = [
        f"{a['label']} ({a['num_finals'] - a[name]} of {a['num_finals']})"
        for a in arms
        if a[name] < a["num_finals"]
    ]
    return f" {head}: {', '.join(told)}." if told else ""


def sound_report(found: Mapping[str, Any]) -> str:
    """Return the report of the sound protocol."""
    config, arms = found["config"], found["arms"]
    trajectory = "adam"
    epoch = max(found["proxies"][trajectory], key=int, default="0")
    proxies = found["proxies"][trajectory][epoch]
    edges = [arm["label"] for arm in arms.values() if arm["at_edge"]]
    lost = sum(arm["num_trials_diverged"] for arm in arms.values())
    per_epoch = math.ceil(found["data"]["num_train"] / config["batch_size"])
    text = {
        **common_words(found),
        "heads": " | ".join(found["claims"].values()),
        "rows": "\n".join(arm_line(found, arm) for arm in arms),
        "seeds_counted": count(found["num_seeds"], "seed"),
        "evaluations": count(config["evaluations"], "time"),
        "num_steps": str(config["epochs"] * per_epoch),
        "adam_seconds": number(arms["adam"]["seconds_per_step"], 2),
        "claims": claims(found),
        "predictions": predictions(found),
        "tables": "\n\n".join(against_adam(found, claim) for claim in found["claims"]),
        "proxy_trajectory": ARMS[trajectory],
        "proxy_epoch": epoch,
        "proxy_seeds": count(len(config["proxy_seeds"].split()), "seed"),
        "proxy_rows": "\n".join(proxy_line(name, proxies[name]) for name in proxies),
        "learning_rates": ", ".join(map(number, learning_rates(config))),
        "tune_seeds": count(len(config["tune_seeds"].split()), "training seed"),
        "edges": (f" At the edge of the grid: {', '.join(edges)}." if edges else "")
        + (f" {count(lost, 'training')} diverged." if lost else ""),
        "seeds": ", ".join(config["seeds"].split()),
    }
    return wrap(SOUND.format(**text))


def arm_line(found: Mapping[str, Any], name: str) -> str:
    """Return the line of one arm in the first table."""
    arm, adam = found["arms"][name], found["arms"]["adam"]
    time, base = arm["seconds_per_step"], adam["seconds_per_step"]
    cells = [
        arm["label"],
        f"{number(arm['learning_rate'], 3)} ({number(arm['speed_rate'], 3)})",
        *(spread(arm[claim]) for claim in found["claims"]),
        spread(arm["test_accuracy"]),
        change(time / base if time and base else None, "ratio"),
    ]
    return line(cells)


def line(cells: list[str]) -> str:
    """Return a line of a table."""
    return "| " + " | ".join(cells) + " |"


def against_adam(found: Mapping[str, Any], claim: str) -> str:
    """Return the table of all arms against Adam in one measure."""
    head = line(
        [found["claims"][claim], "change", "interval", "bootstrap", "p", "p, Holm", "verdict"]
    )
    rows = [
        line([ARMS[arm], *result_cells(result), result["verdict_holm"]])
        for arm, result in found["against_adam"][claim].items()
    ]
    return "\n".join([head, "| --- | ---: | ---: | ---: | ---: | ---: | --- |", *rows])


def result_cells(result: Mapping[str, Any], bootstrap: bool = True) -> list[str]:
    """Return a comparison as cells: change, intervals, p values."""
    cells = [change(result["mean"], result["kind"]), interval(result)]
    if bootstrap:
        cells.append(interval(result, "boot_"))
    return [*cells, p_value(result), p_value(result, "p_holm")]


def proxy_line(name: str, told: Mapping[str, Any]) -> str:
    """Return the line of one proxy."""
    label = ARMS[name] if name.startswith("adam") else ARMS[name].split(",")[0]
    names = ("curvature_rank", "curvature_slope", "noise_rank", "noise_slope", "noise_ratio")
    return line([label, *(spread(told[what]) for what in names)])


def result_words(result: Mapping[str, Any], verdict: str = "verdict_holm") -> str:
    """Return a comparison in words: its verdict and its numbers."""
    told = f"{change(result['mean'], result['kind'])}, interval {interval(result)}"
    corrected = f"; p {p_value(result, 'p_holm')}" if "p_holm" in result else ""
    return f"{result[verdict]} ({told}{corrected})"


def claims(found: Mapping[str, Any]) -> str:
    """Return the published claims, each with what is found here."""
    study = found["study"]
    lines = []
    for claim, label in found["claims"].items():
        if claim in RATIOS:
            text, held, refuted = "The wrapper converges faster at first", "lower", "higher"
        elif claim == "test_loss":
            text, held, refuted = "Adam ends at a slightly lower loss", "higher", "lower"
        else:
            continue
        words = {held: "held", refuted: "refuted, the opposite"}
        told = words.get(study[claim]["verdict_holm"], "not shown")
        result = result_words(study[claim])
        lines.append(f"- {text}: {told}. {label.capitalize()}, wrapper against Adam: {result}.")
    return "\n".join(lines)


def control_prediction(found: Mapping[str, Any]) -> str:
    """Return the answer to the registered prediction."""
    results = found["against_control"]
    apart = [c for c, r in results.items() if r["verdict_holm"] in ("lower", "higher")]
    if results["test_loss"]["low"] is None:
        return f"Indistinguishable from {ARMS[CONTROL]}: undecided, too few runs."
    if not apart:
        return (
            f"Indistinguishable from {ARMS[CONTROL]}: not refuted; no evidence of a difference in "
            "any measure."
        )
    told = "; ".join(f"{found['claims'][c]} {results[c]['verdict_holm']}" for c in apart)
    return f"Indistinguishable from {ARMS[CONTROL]}: refuted; {told}."


def predictions(found: Mapping[str, Any]) -> str:
    """Return the registered predictions, answered one by one."""
    head = line(["against it", "change", "interval", "bootstrap", "p", "p, Holm", "verdict"])
    rows = [
        line([found["claims"][claim], *result_cells(result), result["verdict_holm"]])
        for claim, result in found["against_control"].items()
    ]
    table = "\n".join([head, "| --- | ---: | ---: | ---: | ---: | ---: | --- |", *rows])
    parts = [f"**{control_prediction(found)}** Holm's correction is over the rows.", table]
    return "\n\n".join([*parts, *nearest_prediction(found), *noise_prediction(found)])


def nearest_prediction(found: Mapping[str, Any]) -> list[str]:
    """Return whether the predicted relative of the wrapper is the nearest."""
    cosines, nearest = found["similarity"]["difference"], found["nearest"]
    verdicts = {result["verdict_holm"] for result in nearest.values()}
    if cosines[CONTROL]["mean"] is None:
        return []
    word = "undecided"
    if verdicts == {"higher"}:
        word = "held"
    elif "lower" in verdicts:
        word = "refuted"
    told = "; ".join(f"{ARMS[arm]}: {spread(cosine)}" for arm, cosine in cosines.items())
    changes = "; ".join(f"{ARMS[arm]}: {result_words(r)}" for arm, r in nearest.items())
    return [
        f"**The wrapper's nearest relative is {ARMS[CONTROL]}: {word}.** Mean cosine of its update "
        f"with that of an Adam fed with the same gradients, along the wrapper's own trainings: "
        f"{told}. {ARMS[CONTROL]} against the others, by seed: {changes}."
    ]


def noise_prediction(found: Mapping[str, Any]) -> list[str]:
    """Return whether the running differences measure noise."""
    along = found["proxies"].get("difference", {})
    if not along:
        return []
    epoch = max(along, key=int)
    told, ranks = along[epoch]["difference"], found["ranks"]
    ratio = told["noise_ratio"]["mean"] / math.sqrt(2)
    word = "undecided"
    if ranks["evidence"]:
        held = ranks["verdict"] == "higher" and abs(ratio - 1) < NEAR
        word = "held" if held else "refuted"
    return [
        f"**Its running differences measure the noise of the gradient, not curvature: "
        f"{word}.** After epoch {epoch} of its own trainings their root "
        f"mean square is {number(ratio, 3)} times what two independent mini-batches give; rank "
        f"correlation with noise {spread(told['noise_rank'])}, with the exact diagonal "
        f"{spread(told['curvature_rank'])} (by seed: {result_words(ranks, 'verdict')}); slopes "
        f"{spread(told['noise_slope'])} and {spread(told['curvature_slope'])}. Held means a factor "
        f"within {percent(NEAR)} of one and a higher rank correlation with noise."
    ]
