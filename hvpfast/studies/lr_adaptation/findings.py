"""Findings of the learning-rate study: functions of its records alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, median
from typing import Any

from hvpfast.lab.report.comparison import LEVEL, compare, compare_arms, holm_correct, summary
from hvpfast.lab.report.records import by_seed, first_facts, grid_values, table
from hvpfast.lab.runs.folder import Row
from hvpfast.studies.lr_adaptation.measure import ADAMS, PROXIES

QUESTION = (
    "Does scaling gradients by their running differences, as a stand-in for curvature, help Adam "
    "on MNIST-1D?"
)
ARMS = {
    "adam": "Adam (β₂ = 0.999)",
    "adam-0.99": "Adam, β₂ = 0.99",
    "adam-0.9": "Adam, β₂ = 0.9",
    "difference": "differences, on Adam",
    "secant": "secant, on Adam",
    "hutchinson": "Hutchinson, on Adam",
    "exact": "exact diagonal, on Adam",
    "adahessian": "AdaHessian",
    "sgd": "SGD, momentum 0.9",
    "difference-sgd": "differences, on SGD",
}
"""The studied wrapper is "difference"; every other arm is a control or another curvature."""
STUDIED = ("adam", "difference")
"""The two arms that were published."""
CONTROL = "adam-0.9"
"""The arm that the wrapper was predicted to be indistinguishable from."""
CLAIMS = {
    "steps_counted": "steps to the target",
    "test_lowest": "test loss at the lowest validation loss",
    "test_loss": "test loss after the last epoch",
    "drift": "drift (last minus lowest)",
}
"""The four claims, chosen beforehand; corrected for their number where they are tested together."""
SPEED = {"steps_tuned": "steps to the target, rate chosen for it"}
"""Measured by the sound protocol beside the claims, with a tuning rule of its own; not one of those
that were chosen beforehand."""
DESCRIPTIVE = {
    "train_loss": "train loss",
    "val_loss": "validation loss",
    "test_accuracy": "test accuracy",
}
RATIOS = ("steps_counted", "steps_tuned")
EDGE = 1.1
"""A learning rate within this factor of an end of the grid is reported as lying at the edge."""
CORRELATIONS = (
    "curvature_rank", "curvature_slope", "noise_rank", "noise_slope", "noise_ratio"
)  # fmt: skip


def findings(records: list[Row], timings: Mapping[str, float]) -> dict[str, Any]:
    finals, config = table(records, "final"), first_facts(records, "config")
    arms = [arm for arm in ARMS if any(row["arm"] == arm for row in finals)]
    claims = measures_of(config)
    found: dict[str, Any] = {
        "config": config,
        **{name: first_facts(records, name) for name in ("data", "trivial", "linear")},
        "level": LEVEL,
        "protocol": config["protocol"],
        "claims": claims,
        "num_seeds": len({row["seed"] for row in finals}),
        "num_diverged": sum(row["diverged"] for row in finals),
        **{name: finals[0][name] for name in ("backend", "sizes", "num_params")},
        "arms": {arm: arm_findings(records, timings, arm) for arm in arms},
        "against_adam": {
            claim: holm_correct(
                {arm: compared(finals, claim, "adam", arm) for arm in arms if arm != "adam"}
            )
            for claim in claims
        },
        "study": holm_correct(
            {claim: compared(finals, claim, "adam", "difference") for claim in claims}
        ),
    }
    if config["protocol"] == "published":
        return {**found, "wins": {claim: wins(finals, claim) for claim in CLAIMS}}
    against = {claim: compared(finals, claim, CONTROL, "difference") for claim in claims}
    return {
        **found,
        "against_control": holm_correct(against),
        "proxies": proxies(records),
        "ranks": proxy_ranks(records),
        "similarity": similarity(records),
        "nearest": nearest(records),
    }


def measures_of(config: Mapping[str, Any]) -> dict[str, str]:
    """Return what the protocol measures of a final run, with labels; lower is better in all."""
    return CLAIMS if config["protocol"] == "published" else {**SPEED, **CLAIMS}


def compared(
    finals: Sequence[Mapping[str, Any]], claim: str, base: str, arm: str
) -> dict[str, Any]:
    return compare_arms(finals, claim, base, arm, ratio=claim in RATIOS)


def wins(finals: Sequence[Mapping[str, Any]], claim: str) -> dict[str, int]:
    """Count the repeats in which the wrapper came out lower than Adam."""
    values = by_seed(finals, claim, STUDIED)
    pairs = list(zip(*values.values(), strict=True))
    return {"lower": sum(b < a for a, b in pairs), "n": len(pairs)}


def arm_findings(records: list[Row], timings: Mapping[str, float], arm: str) -> dict[str, Any]:
    config, finals = table(records, "config")[0], table(records, "final", arm=arm)
    grid = grid_values(config["learning_rates"])
    rates = [row["learning_rate"] for row in finals]
    trials = table(records, "trial", arm=arm)
    there = [row for row in finals if not row["diverged"]]
    return {
        "label": ARMS[arm],
        "learning_rate": median(rates),
        "learning_rate_low": min(rates),
        "learning_rate_high": max(rates),
        "at_edge": not min(grid) * EDGE < median(rates) < max(grid) / EDGE,
        "num_trials_diverged": sum(row["val_loss"] is None for row in trials),
        "num_trainings_tuned": len(trials),
        "num_reached": sum(row["steps_to_target"] is not None for row in there),
        "num_finals": len(finals),
        "speed_rate": there[0].get("speed_rate") if there else None,
        "num_speed_reached": sum(bool(row.get("speed_reached")) for row in finals),
        "seconds_per_step": timings.get(f"cost/{arm}"),
        **{m: summary([row.get(m) for row in finals]) for m in (*SPEED, *CLAIMS, *DESCRIPTIVE)},
    }


def proxies(records: list[Row]) -> dict[str, Any]:
    """Return mean and spread over seeds of every correlation: [trajectory][epoch][proxy]."""
    found: dict[str, Any] = {}
    for trajectory in STUDIED:
        along = table(records, "proxy", trajectory=trajectory)
        for epoch in sorted({row["epoch"] for row in along}):
            at_epoch = found.setdefault(trajectory, {}).setdefault(str(epoch), {})
            for name in PROXIES:
                there = [r for r in along if (r["epoch"], r["proxy"]) == (epoch, name)]
                at_epoch[name] = {k: summary([row[k] for row in there]) for k in CORRELATIONS}
    return found


def proxy_ranks(records: list[Row]) -> dict[str, Any]:
    """Compare two rank correlations of the differences, with noise and with curvature, by seed."""
    rows = table(records, "proxy", proxy="difference", trajectory="difference")
    last = [row for row in rows if row["epoch"] == max((r["epoch"] for r in rows), default=None)]
    curvature, noise = ([r[what] for r in last] for what in ("curvature_rank", "noise_rank"))
    return compare(curvature, noise)


def similarity(records: list[Row]) -> dict[str, Any]:
    """Return mean and spread over seeds of the mean cosine of updates: [trajectory][control]."""
    return {
        trajectory: {arm: summary(mean_cosines(records, trajectory, arm)) for arm in ADAMS}
        for trajectory in STUDIED
    }


def mean_cosines(records: list[Row], trajectory: str, control: str) -> list[float]:
    """Return the cosine of the wrapper's update with that of an Adam, a mean per seed."""
    rows = table(records, "similarity", trajectory=trajectory, control=control)
    seeds = sorted({row["seed"] for row in rows})
    return [fmean(row["cosine"] for row in rows if row["seed"] == seed) for seed in seeds]


def nearest(records: list[Row]) -> dict[str, Any]:
    """Compare, by seed, the cosine of the predicted relative with those of the other Adams."""
    here = mean_cosines(records, "difference", CONTROL)
    others = [arm for arm in ADAMS if arm != CONTROL]
    against = {arm: compare(mean_cosines(records, "difference", arm), here) for arm in others}
    return holm_correct(against)
