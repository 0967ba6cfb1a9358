"""The named numbers of the flatness study's report, from its records and timings alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from statistics import fmean, pvariance
from typing import Any

import numpy as np
from scipy import special

from hvpfast.lab.report.comparison import LEVEL, compare, holm_correct, summary
from hvpfast.lab.report.records import by_seed, facts, first_facts, known, table
from hvpfast.lab.runs.folder import Row
from hvpfast.studies.flatness.measure import rights
from hvpfast.studies.flatness.timing import METHODS

BASELINE = "0"
FLATNESS = {
    "hessian_fro2": "Tr(H²), exact",
    "hessian_fro2_probes": "Tr(H²), fresh probes",
    "held_out_fro2": "Tr(H²), exact, held-out samples",
    "part_fro2": "Tr(H²), exact, as many train samples",
    "part_ggn_fro2": "Tr(G²), Gauss-Newton, the same samples",
    "hessian_trace": "Tr H, exact",
    "filter_curvature": "mean d'Hd, filter-normalised d",
    "flatness_same": "Tr(H²)/B, last epoch, the step's own probes",
    "flatness_fresh": "Tr(H²)/B, last epoch, fresh probes",
    "flatness_unseen": "Tr(H²)/B, held-out batches",
    "params_norm": "‖parameters‖",
    "first_norm": "‖first weight‖",
}
"""Measures in the table of flatness, before the user's own."""
MEASURES = {
    "test_accuracy": "test accuracy (primary)",
    "test_loss": "test loss",
    "val_accuracy": "held-out accuracy",
    "train_accuracy": "train accuracy",
    "train_loss": "train loss",
    "gap": "test loss - train loss",
    **FLATNESS,
    "best_accuracy": "best held-out accuracy",
    "late_accuracy": "held-out accuracy, late epochs",
    "late_accuracy_variance": "variance of the held-out accuracy, late epochs",
    "late_loss_variance": "variance of the held-out loss, late epochs",
    "late_train_variance": "variance of the training loss, late epochs",
    "epochs_to_target": "epochs to the target",
}
"""Column of the final rows -> name in the report.

The test accuracy was chosen beforehand to answer the question; the rest describes.
"""
VARIANCES = ["late_loss_variance", "late_accuracy_variance", "late_train_variance"]
"""Measures of stability."""
RATIOS = {*FLATNESS, *VARIANCES}
"""Positive quantities, compared as ratios."""
LATE = 10
"""Epochs at the end of a training over which stability is measured."""
TARGET = 0.9
"""Share of the baseline's best held-out accuracy, seed by seed, that convergence is timed to."""
SMALL = 0.01
"""The largest lambda that the registered predictions call small."""

Rows = Sequence[Mapping[str, Any]]
Pairs = Mapping[str, Mapping[str, Any]]
"""By lambda, its corrected comparison with the baseline in one measure."""
Answer = tuple[str, str]
"""Outcome of a prediction, and why."""


def findings(records: list[Row], timings: Mapping[str, float]) -> dict[str, Any]:
    finals = with_curves(records)
    arms = list(dict.fromkeys(row["arm"] for row in finals))
    own = list(dict.fromkeys(k for row in finals for k in row if k.startswith("metric_")))
    measures = [*MEASURES, *own]
    found: dict[str, Any] = {
        **{name: first_facts(records, name) for name in ("config", "data", "constant", "linear")},
        "level": LEVEL,
        "arms": arms,
        "num_params": finals[0]["num_params"],
        "num_seeds": len({row["seed"] for row in finals}),
        "by_arm": {arm: arm_findings(finals, arm, measures) for arm in arms},
        "comparison": {measure: compared(finals, arms, measure) for measure in measures},
        "flat": flat_measure(finals),
        "own_metrics": own,
        "mcnemar": mcnemar(records, finals, arms),
        "agreement": [facts(row) for row in table(records, "agreement")],
        "cost": cost(records, timings),
        "landscape": [facts(row) for row in table(records, "landscape", kind="centre")],
    }
    found["chosen"] = chosen(found)
    return found | {"predictions": predictions(found)}


def flat_measure(finals: Rows) -> str:
    """Return the column that says how flat a network is: exact where it exists."""
    exact = any(known(row, "hessian_fro2") for row in finals)
    return "hessian_fro2" if exact else "hessian_fro2_probes"


def with_curves(records: list[Row]) -> list[dict[str, Any]]:
    """Return the final rows with what their curves say: best, late and how soon.

    Trainings that diverged get no such columns. ``epochs_to_target`` is None for a training that
    misses the target, and absent where the baseline of the same seed diverged.
    """
    finals = [dict(row) for row in table(records, "final")]
    curves = {
        (row["arm"], row["seed"]): table(records, "epoch", arm=row["arm"], seed=row["seed"])
        for row in finals
        if not row["diverged"]
    }
    for row in finals:
        curve = curves.get((row["arm"], row["seed"]))
        if curve is None:
            continue
        after, late = curve[1:], curve[1:][-LATE:]
        row["best_accuracy"] = max(point["accuracy"] for point in after)
        row["late_accuracy"] = fmean(point["accuracy"] for point in late)
        for name, column in (("accuracy", "accuracy"), ("loss", "loss"), ("train", "train_ce")):
            row[f"late_{name}_variance"] = pvariance([point[column] for point in late])
        row["undone"] = after[-1]["train_ce"] > curve[0]["train_ce"]
        row["last_ce"], row["last_penalty"] = after[-1]["train_ce"], after[-1]["train_penalty"]
        base = curves.get((BASELINE, row["seed"]))
        if base is not None:
            target = TARGET * max(point["accuracy"] for point in base[1:])
            reached = [point["epoch"] for point in after if point["accuracy"] >= target]
            row["epochs_to_target"] = reached[0] if reached else None
    return finals


def compared(finals: Rows, arms: Sequence[str], measure: str) -> dict[str, dict[str, Any]]:
    """Compare every lambda with the baseline, paired by seed, with Holm's correction over them."""
    found = {}
    for arm in arms:
        if arm != BASELINE:
            pair = by_seed(finals, measure, (BASELINE, arm))
            found[arm] = compare(pair[BASELINE], pair[arm], ratio=measure in RATIOS)
    return holm_correct(found)


def arm_findings(finals: Rows, arm: str, measures: Sequence[str]) -> dict[str, Any]:
    """Return mean and spread over the seeds of one lambda's measures."""
    rows = [row for row in finals if row["arm"] == arm]
    shares = [
        row["lambda"] * row["last_penalty"] / row["last_ce"]
        for row in rows
        if row.get("last_penalty") is not None
    ]
    return {
        "lambda": rows[0]["lambda"],
        "num_diverged": sum(row["diverged"] for row in rows),
        "num_undone": sum(row.get("undone", False) for row in rows),
        "num_reached": sum(known(row, "epochs_to_target") for row in rows),
        "penalty_share": fmean(shares) if shares else None,
        **{name: summary([row.get(name) for row in rows]) for name in ("last_ce", *measures)},
    }


def chosen(found: Mapping[str, Any]) -> str | None:
    """Return the lambda with the best mean held-out accuracy, the smallest of equals."""
    means = {arm: found["by_arm"][arm]["val_accuracy"]["mean"] for arm in found["arms"]}
    there = [arm for arm, mean in means.items() if mean is not None]
    return max(there, key=means.__getitem__, default=None)


def mcnemar(records: list[Row], finals: Rows, arms: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return, for the first seed, on how many test samples a lambda and the baseline disagree.

    ``p`` is McNemar's, exact: the probability that samples which only one of the two gets right
    are split at least as unevenly by chance, ``min(1, 2 P(X <= min(won, lost)))`` with X binomial.
    """
    num = table(records, "data")[0]["num_test"]
    first = [row for row in finals if row["seed"] == finals[0]["seed"]]
    right = {row["arm"]: rights(row, num) for row in first if not row["diverged"]}
    found = {}
    for arm in arms:
        if arm != BASELINE and BASELINE in right and arm in right:
            won = int(np.sum(right[arm] & ~right[BASELINE]))
            lost = int(np.sum(right[BASELINE] & ~right[arm]))
            p = min(1.0, 2 * float(special.bdtr(min(won, lost), won + lost, 0.5)))
            found[arm] = {"won": won, "lost": lost, "p": p if won + lost else 1.0}
    return found


def cost(records: list[Row], timings: Mapping[str, float]) -> dict[str, Any]:
    """Return median seconds per step by method, and their ratios; None where not timed."""
    seconds = {method: timings.get(f"steps/{method}") for method in METHODS}
    config, data = table(records, "config")[0], table(records, "data")[0]

    def ratio(over: str, under: str) -> float | None:
        a, b = seconds[over], seconds[under]
        return a / b if a and b else None

    return {
        "seconds": seconds,
        "steps_per_epoch": data["num_train"] // config["batch_size"],
        "rounds": config["timing_rounds"],
        "penalised_over_plain": ratio("penalised", "plain"),
        "torch_over_penalised": ratio("torch-penalised", "penalised"),
        "penalised_over_torch_plain": ratio("penalised", "torch-plain"),
    }


def grids(records: list[Row], plane: int) -> dict[str, dict[str, Any]]:
    """Return one plane's grids by lambda: coordinates x (X,) and losses (X, X)."""
    found = {}
    lines = table(records, "landscape", kind="line", plane=plane)
    for arm in dict.fromkeys(row["arm"] for row in lines):
        own = [row for row in lines if row["arm"] == arm]
        losses = [[float(word) for word in row["losses"].split()] for row in own]
        found[arm] = {"x": np.asarray([row["x"] for row in own]), "losses": np.asarray(losses)}
    return found


# predictions, registered before the first run


def predictions(found: Mapping[str, Any]) -> list[dict[str, str]]:
    """Answer the registered predictions: claim, outcome (held, contradicted, no evidence), why."""
    by_arm, changes = found["by_arm"], found["comparison"]
    accuracy = changes["test_accuracy"]
    small = [arm for arm in accuracy if by_arm[arm]["lambda"] <= SMALL]
    largest = max(accuracy, key=lambda arm: by_arm[arm]["lambda"], default=None)
    at_largest = {} if largest is None else {largest: accuracy[largest]}
    told = ", ".join(small) or "none here"
    answers = {
        "Tr(H²) of the train split is lower for every λ > 0": lower(changes[found["flat"]]),
        "and so is that of held-out samples": lower(changes["held_out_fro2"]),
        f"no accuracy gain at small λ ({told})": no_gain(accuracy, small),
        f"lower accuracy at the largest λ ({largest})": lower(at_largest),
    }
    if found["data"]["dataset"] == "rbf":
        answers |= as_published(found)
    names = ("claim", "outcome", "why")
    return [dict(zip(names, (claim, *answer), strict=True)) for claim, answer in answers.items()]


def verdicts(pairs: Pairs) -> dict[str, list[str]]:
    """Return the lambdas by what corrected evidence says of them: lower, higher, or open."""
    told: dict[str, list[str]] = {"lower": [], "higher": [], "open": []}
    for arm, pair in pairs.items():
        told[pair["verdict_holm"] if pair["verdict_holm"] in told else "open"].append(arm)
    return told


def lower(pairs: Pairs) -> Answer:
    """Answer the prediction that a measure is lower for every lambda of the pairs."""
    told = {way: ", ".join(arms) for way, arms in verdicts(pairs).items()}
    if told["higher"]:
        return "contradicted", f"higher for λ = {told['higher']}"
    if told["open"]:
        return "no evidence", f"no evidence of a difference for λ = {told['open']}"
    if not pairs:
        return "no evidence", "there is no such λ"
    return "held", f"lower for λ = {told['lower']}, corrected"


def decidable(pairs: Pairs) -> bool:
    """Return whether there are enough seeds for Holm's correction to let any difference pass."""
    least = [pair["p_resolution"] for pair in pairs.values() if pair["p_resolution"] is not None]
    return bool(least) and min(least) * len(pairs) < 1 - LEVEL


def no_gain(pairs: Pairs, arms: Sequence[str]) -> Answer:
    """Answer the prediction that a measure is higher for none of the lambdas.

    The answer names the largest gain that the intervals leave room for.
    """
    gains = [arm for arm in arms if pairs[arm]["verdict_holm"] == "higher"]
    if gains:
        return "contradicted", f"higher for λ = {', '.join(gains)}"
    ends = [pairs[arm]["high"] for arm in arms if pairs[arm]["high"] is not None]
    if not ends or not decidable(pairs):
        return "no evidence", "too few seeds to show a gain"
    room = max(0.0, 100 * max(ends))
    return "held", f"no gain is shown; the intervals leave room for {room:.2g} points"


def as_published(found: Mapping[str, Any]) -> dict[str, Answer]:
    """Answer what the published run on this kind of data leads one to expect, by means alone."""
    by_arm = found["by_arm"]
    penalised = [arm for arm in found["arms"] if arm != BASELINE]
    seen = [by_arm[arm]["flatness_same"]["mean"] for arm in penalised]
    fits = [by_arm[arm]["last_ce"]["mean"] for arm in found["arms"]]
    majority = found["constant"]["test_accuracy"]
    room = 2 * math.sqrt(majority * (1 - majority) / found["data"]["num_test"])
    tops = [by_arm[arm]["test_accuracy"]["mean"] for arm in found["arms"]]
    told = f"highest mean {max(filter(None, tops), default=math.nan):.3f}, majority {majority:.3f}"
    outcome = "held" if all(t <= majority + room for t in tops if t) else "contradicted"
    return {
        "Tr(H²)/B in the last epoch falls as λ grows": ordered(seen, falling=True),
        "training cross-entropy rises with λ": ordered(fits, falling=False),
        "no λ beats the majority class by more than two standard errors": (outcome, told),
    }


def ordered(values: Sequence[float | None], *, falling: bool) -> Answer:
    """Answer the prediction that means by rising lambda fall, or rise, without exception."""
    there = [v for v in values if v is not None]
    pairs = itertools.pairwise(there)
    right = len(there) == len(values) and all(a > b if falling else a < b for a, b in pairs)
    told = ", ".join(f"{v:.4g}" for v in there)
    return "held" if right else "contradicted", f"means: {told}"
