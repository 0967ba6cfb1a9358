"""The report of the flatness study: words and tables around its findings, no number by hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hvpfast.lab.report.words import (
    change,
    count,
    interval,
    number,
    p_value,
    percent,
    wrap,
)
from hvpfast.studies.flatness.findings import BASELINE, LATE, MEASURES, TARGET, decidable
from hvpfast.studies.flatness.report_parts import (
    convergence_line,
    cost_words,
    flatness_lines,
    landscape_line,
    landscape_pictures,
    mcnemar_words,
    performance_line,
    primary_line,
    probes_words,
    published_section,
    shares,
    stability_line,
)

QUESTION = "Does penalising Tr(H²) make networks generalise better?"
TEMPLATE = """# {question}

**{answer}**

{flatter}

| λ | test accuracy | against λ = {baseline} | {level} interval | bootstrap | p, Holm | verdict |
| --- | ---: | ---: | ---: | ---: | ---: | --- |
{performance}

Mean ± standard deviation over {seeds_counted}; changes are paired by seed, p by flipping the signs
of the pairs, corrected by Holm's rule for the number of λ. The test accuracy was chosen beforehand
to answer the question; everything else describes.

{beaten}

![Training of every λ: accuracy, loss, flatness, final accuracy](training_comparison.png)

![Paired changes by λ](comparison.png)

## Predictions, registered beforehand

| prediction | outcome | why |
| --- | --- | --- |
{predictions}

## The study's four questions

- **Does it generalise better?** {answer}
- **Does it find flatter minima?** {flatter} {scale}
- **What is the best strength?** {best}
- **Is training stable?** {stable}

## Performance

| λ | {held_out} accuracy | best | late epochs | test loss | train accuracy | Tr(H²) | seconds |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
{performance_table}

The {held_out} accuracy is that of the last epoch, of the best, and the mean of the last {late}.
Tr(H²) is exact, on the train split. Seconds: the steps of a training at the median time of a step
(see Cost).

## Stability

| λ | variance of {held_out} loss | of {held_out} accuracy | of training loss | undone | diverged |
| --- | ---: | ---: | ---: | ---: | ---: |
{stability_table}

Over the last {late} of a training; means over seeds. Undone: trainings whose loss ended above that
of the untrained network; diverged: those that met a number that is not finite. Paired ratios to λ =
{baseline}, with Holm's correction: {stability_words}.

## Convergence

| λ | epochs to the target | seeds that reach it | seconds to the target |
| --- | ---: | ---: | ---: |
{convergence_table}

The target is {target} of the best {held_out} accuracy of λ = {baseline}, seed by seed; means over
the seeds that reach it.

## Flatness

| | {arm_heads} |
| --- | {arm_rules} |
{flatness_table}

Means over seeds; below, the ratio to λ = {baseline} where Holm-corrected evidence shows one. Exact
values come from per-sample Hessian cores and fresh probes ({curvature_probes}, Rademacher) from the
same {curvature_samples} train samples, after training, for every λ alike. Tr(H²) of a mean loss
falls with the number of samples, so held-out samples are to be compared with as many train samples
({num_part}). Tr(H²)/B is the mean over
the last epoch's steps, each measured after it: with the probes that the step itself used, with
fresh ones, and on held-out batches. Filter-normalised curvature is the mean of d'Hd over directions
d with the norms of the network's own filters; it does not change when layers of a ReLU network are
rescaled.

{probes_words}

![Flatness by every measure](flatness.png)

## Loss landscapes

| plane | λ | loss at the centre | d'Hd along x, y | second differences along x, y | mean rise |
| --- | --- | ---: | ---: | ---: | ---: |
{landscape_table}

Train samples, filter-normalised orthogonal random directions with the biases at rest, one seed; the
panels share one scale of colours, the loss above that of the centre. The last panel is the
penalised network less the baseline: blue means that the penalised network's loss rises less there,
red that it rises more. Second differences over one grid spacing also see the kinks of ReLU, d'Hd
does not.

{landscapes}

## One network against one network

{mcnemar}

## Protocol

- **Data**: {dataset} ({check}): {num_train} samples to train, {num_val} held out, {num_test} to
  test{test_words}. {inputs} inputs, {num_classes} classes.
- **Network**: {num_params} parameters{network_words}, {dtype}; Adam at {learning_rate}, batches of
  {batch_size}, {epochs}; what an epoch leaves beyond whole batches is not used.
- **Objective**: cross-entropy + λ Tr(H²)/B, H the {penalised} of the mini-batch's mean
  cross-entropy, by {num_hutchinson_samples} fresh normal probes a step: the mean of ‖Hv‖² is
  Tr(H²). B divides what is a mean already, so λ is bound to this batch size.
- **Pairs**: within a seed every λ starts from the same weights and sees the same batches and
  probes. Seeds {seeds}.
- **Weight of the penalty** in the last epoch, as a share of the cross-entropy: {shares}.
- **Simple predictors** (test accuracy): the commonest class {constant_accuracy}, a linear model
  {linear_accuracy}; the entropy of the class frequencies is {constant_loss}.

## Cost

{cost}

## What this does not show

One data set, one network, one optimiser and learning rate, chosen for no λ in particular; one
split of the data. A smaller Tr(H²) can come from the scale of the logits and not from a flatter
landscape.
{warning}
"""


def report(found: Mapping[str, Any]) -> str:
    """Return report.md without its environment section."""
    config, data, arms = found["config"], found["data"], found["arms"]
    sharing = data["held_out_is_test"]
    text = {
        "question": QUESTION,
        "answer": answer(found),
        "flatter": flatter(found),
        "baseline": BASELINE,
        "level": percent(found["level"]),
        "performance": "\n".join(primary_line(found, arm) for arm in arms),
        "seeds_counted": count(found["num_seeds"], "seed"),
        "beaten": beaten(found),
        "predictions": "\n".join(
            "| {claim} | **{outcome}** | {why} |".format(**p) for p in found["predictions"]
        ),
        "scale": scale(found),
        "best": best(found),
        "stable": stable(found),
        "held_out": "test" if sharing else "validation",
        "performance_table": "\n".join(performance_line(found, arm) for arm in arms),
        "stability_table": "\n".join(stability_line(found, arm) for arm in arms),
        "stability_words": "; ".join(stability_words(found)),
        "late": count(min(LATE, config["num_epochs"]), "epoch"),
        "convergence_table": "\n".join(convergence_line(found, arm) for arm in arms),
        "target": percent(TARGET),
        "arm_heads": " | ".join(f"λ = {arm}" for arm in arms),
        "arm_rules": " | ".join("---:" for _ in arms),
        "flatness_table": "\n".join(flatness_lines(found)),
        "curvature_probes": count(config["curvature_probes"], "probe"),
        "curvature_samples": config["curvature_samples"] or data["num_train"],
        "num_part": min(data["num_val"], data["num_train"]),
        "probes_words": probes_words(found),
        "landscape_table": "\n".join(map(landscape_line, found["landscape"])),
        "landscapes": "\n\n".join(landscape_pictures(found)),
        "mcnemar": mcnemar_words(found),
        **{k: data[k] for k in ("dataset", "check", "num_train", "num_val", "num_test", "inputs",
                                "num_classes")},
        "test_words": " (the held-out samples, as published)" if sharing else ", once, at the end",
        "num_params": found["num_params"],
        "network_words": network_words(found),
        **{k: config[k] for k in ("dtype", "batch_size", "num_hutchinson_samples")},
        "learning_rate": number(config["learning_rate"]),
        "penalised": {"hessian": "Hessian", "ggn": "Gauss-Newton matrix"}[config["penalised"]],
        "epochs": count(config["num_epochs"], "epoch"),
        "seeds": ", ".join(config["seeds"].split()),
        "shares": shares(found),
        "constant_accuracy": number(found["constant"]["test_accuracy"], 3),
        "linear_accuracy": number(found["linear"]["test_accuracy"], 3),
        "constant_loss": number(found["constant"]["test_loss"]),
        "cost": cost_words(found),
        "warning": warning(found),
    }  # fmt: skip
    return wrap(TEMPLATE.format(**text)) + published_section(found)


def joined(arms: list[str]) -> str:
    """Return lambdas in words."""
    return "λ = " + ", ".join(arms)


def verdicts(found: Mapping[str, Any], measure: str) -> dict[str, list[str]]:
    """Return the lambdas by what Holm-corrected evidence says about a measure."""
    told: dict[str, list[str]] = {"lower": [], "higher": [], "open": []}
    for arm, pair in found["comparison"][measure].items():
        told[pair["verdict_holm"] if pair["verdict_holm"] in told else "open"].append(arm)
    return told


def answer(found: Mapping[str, Any]) -> str:
    """Return the sentence that answers the question, from the primary comparison."""
    pairs, told = found["comparison"]["test_accuracy"], verdicts(found, "test_accuracy")
    if not decidable(pairs):
        least = count(found["num_seeds"], "seed")
        return f"No evidence: {least} cannot show a difference after correction, whatever it is."
    named = {way: ", ".join(gain(pairs, arm) for arm in told[way]) for way in told}
    if told["higher"]:
        worse = f" Lower for {named['lower']}." if told["lower"] else ""
        return f"Yes: the test accuracy is higher for {named['higher']}.{worse}"
    if told["lower"]:
        rest = f" No evidence of a difference for {joined(told['open'])}." if told["open"] else ""
        return f"No, and worse for {named['lower']}.{rest}"
    return (
        f"No evidence. The test accuracy differs from that of λ = {BASELINE} for no λ beyond "
        f"chance, corrected for {count(len(pairs), 'comparison')}: {named['open']}."
    )


def gain(pairs: Mapping[str, Any], arm: str) -> str:
    """Return a lambda with its change."""
    pair = pairs[arm]
    between = f" {interval(pair)}" if pair["low"] is not None else ""
    return f"λ = {arm} ({change(pair['mean'], pair['kind'])}{between})"


def flatter(found: Mapping[str, Any]) -> str:
    """Return what the penalty did to Tr(H^2), on train and on held-out samples."""
    told = f"{MEASURES[found['flat']]}, of the train split after training: "
    told += f"{directions(found, found['flat'])}."
    if found["by_arm"][BASELINE]["held_out_fro2"]["n"]:
        told += f" Of held-out samples: {directions(found, 'held_out_fro2')}."
    return told


def directions(found: Mapping[str, Any], measure: str) -> str:
    """Return for which lambdas a measure is lower, higher or open, with its changes."""
    pairs, told = found["comparison"][measure], verdicts(found, measure)
    words = {"lower": "lower", "higher": "higher", "open": "no evidence of a difference"}
    return "; ".join(
        f"{words[way]} for {', '.join(gain(pairs, arm) for arm in arms)}"
        for way, arms in told.items()
        if arms
    )


def headline(found: Mapping[str, Any]) -> str:
    """Return the answer, and what the penalty did to the curvature."""
    return f"{answer(found)}\n{flatter(found)}"


def scale(found: Mapping[str, Any]) -> str:
    """Return whether the flatness survives when the scale of the weights does not count."""
    told = verdicts(found, "filter_curvature")
    known = found["by_arm"][BASELINE]["filter_curvature"]["n"]
    if not known:
        return "A measure that ignores the scale of the weights exists for perceptrons only."
    parts = [f"{way} for {joined(told[way])}" for way in ("lower", "higher") if told[way]]
    if told["open"]:
        parts.append(f"no evidence of a difference for {joined(told['open'])}")
    return f"Filter-normalised, which ignores the scale of the weights: {'; '.join(parts)}."


def best(found: Mapping[str, Any]) -> str:
    """Return the lambda that held-out data choose, and what it gains on test data."""
    arm = found["chosen"]
    if arm is None:
        return "Every training diverged."
    where = "the held-out data"
    if arm == BASELINE:
        return f"The best mean accuracy on {where} is that of λ = {BASELINE}: no penalty."
    pair = found["comparison"]["test_accuracy"][arm]
    return (
        f"The best mean accuracy on {where} is that of λ = {arm}; its test accuracy changes by "
        f"{change(pair['mean'], pair['kind'])}, interval {interval(pair)} (p, Holm: "
        f"{p_value(pair, 'p_holm')}): {pair['verdict_holm']}."
    )


def stable(found: Mapping[str, Any]) -> str:
    """Return how many trainings diverged and what the variances of late epochs say."""
    lost = sum(arm["num_diverged"] for arm in found["by_arm"].values())
    total = found["num_seeds"] * len(found["arms"])
    undone = {arm: by["num_undone"] for arm, by in found["by_arm"].items() if by["num_undone"]}
    told = ", ".join(f"{num} for λ = {arm}" for arm, num in undone.items()) or "none"
    return (
        f"{lost} of {count(total, 'training')} diverged; with a training loss above that of the "
        f"untrained network ended: {told}. {'; '.join(stability_words(found))}."
    )


def stability_words(found: Mapping[str, Any]) -> list[str]:
    """Return what is lower, higher or open among the variances of late epochs."""
    lines = []
    for measure in ("late_loss_variance", "late_accuracy_variance", "late_train_variance"):
        told = verdicts(found, measure)
        parts = [f"{way} for {joined(told[way])}" for way in ("lower", "higher") if told[way]]
        if told["open"]:
            parts.append(f"no evidence for {joined(told['open'])}")
        lines.append(f"{MEASURES[measure]}: {', '.join(parts)}")
    return lines


def beaten(found: Mapping[str, Any]) -> str:
    """Return which simple predictors the networks do not beat."""
    words = []
    for name, what in (("constant", "always predicting the commonest class"),
                       ("linear", "a linear model")):  # fmt: skip
        level = found[name]["test_accuracy"]
        means = {arm: found["by_arm"][arm]["test_accuracy"]["mean"] for arm in found["arms"]}
        below = [arm for arm, mean in means.items() if mean is not None and mean <= level]
        told = (
            f"not beaten by the mean of {joined(below)}"
            if below
            else "beaten by the mean of every λ"
        )
        words.append(f"{what} scores {number(level, 3)}, {told}")
    return f"On the same test samples {'; '.join(words)}."


def network_words(found: Mapping[str, Any]) -> str:
    """Return the layers of the study's own network."""
    config, data = found["config"], found["data"]
    if data["own_network"]:
        return " (the user's own)"
    outputs = config["outputs"] or data["num_classes"]
    widths = "-".join([str(data["inputs"]), *config["hidden"].split(), str(outputs)])
    return f" ({widths}, {config['activation']}, He-normal weights, zero biases)"


def warning(found: Mapping[str, Any]) -> str:
    """Return what limits the run at hand."""
    if found["num_seeds"] == 1:
        return "One seed: differences between λ are single draws."
    return "Seeds vary the weights, the batches and the probes, not the data."
