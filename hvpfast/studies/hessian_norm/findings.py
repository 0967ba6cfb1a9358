"""Findings of the Hessian-norm study's sound protocol, from its records and timings alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import fsum
from statistics import fmean, median
from typing import Any

from hvpfast.lab.report.comparison import LEVEL, compare_arms, holm_correct, summary
from hvpfast.lab.report.records import facts, first_facts, grid_values, table
from hvpfast.lab.runs.folder import Row

QUESTION = (
    "Does penalising the Hessian's Frobenius norm lower the test loss of a small MLP on MNIST-1D?"
)


@dataclass(frozen=True)
class Arm:
    """One way of training, and what it is compared with."""

    title: str
    method: str
    base: str
    """The arm it is compared with and whose learning rate it has; its own name for a baseline."""
    grid: str = ""
    """Field of the configuration with the strengths to choose from, if it chooses one."""
    smooth: bool = False


ARMS = {
    "baseline": Arm("baseline", "plain", "baseline"),
    "penalised": Arm("penalised", "penalised", "baseline", "rhos"),
    "placebo": Arm("placebo: gradient stopped", "placebo", "baseline"),
    "exact": Arm("penalised, exact norm", "exact", "baseline"),
    "own-rate": Arm("penalised, own rate", "penalised", "baseline"),
    "weight-decay": Arm("weight decay", "plain", "baseline", "decays"),
    "sam": Arm("SAM", "sam", "baseline", "radii"),
    "smooth": Arm("smooth baseline", "plain", "smooth", smooth=True),
    "smooth-penalised": Arm("smooth, penalised", "penalised", "smooth", "rhos", smooth=True),
}
COMPARED = [name for name, arm in ARMS.items() if name not in (arm.base, "placebo")]
"""Arms whose difference from their baseline is not zero by construction."""
MEASURES = {
    "test_loss": "test loss (primary)",
    "test_accuracy": "test accuracy",
    "val_loss": "validation loss",
    "train_loss": "train loss",
    "gap": "test loss - train loss",
    "hessian_fro2": "‖H‖², train split, exact",
    "ggn_fro2": "‖G‖², train split, exact",
    "hessian_trace": "Tr H, train split, exact",
    "logit_size": "size of the logits",
    "params_norm": "‖parameters‖",
}
"""The test loss was chosen beforehand to answer the question; the rest describes."""
RATIOS = ("hessian_fro2", "ggn_fro2", "hessian_trace", "logit_size", "params_norm")
"""Positive quantities, compared as ratios."""
NOT_SHARED = ("arm", "cell", "strength", "batch_penalty", "ggn_fro2", "ggn_trace")
"""Columns that placebo and baseline do not have in common."""
CLAIMED = {"baseline": 1.2143, "penalised": 1.0462}
"""Final losses of the published claim, on the split that it was tuned on."""
CLAIMED_GAP = CLAIMED["penalised"] - CLAIMED["baseline"]


def findings(records: list[Row], timings: Mapping[str, float]) -> dict[str, Any]:
    """Return every number of the report, named."""
    finals, config = table(records, "final"), first_facts(records, "config")
    against = {arm: compared(finals, arm, "test_loss") for arm in COMPARED}
    return {
        "protocol": "sound",
        "config": config,
        "data": first_facts(records, "data"),
        "trivial": {row["predictor"]: facts(row) for row in table(records, "trivial")},
        "level": LEVEL,
        "num_seeds": len({row["seed"] for row in finals}),
        "num_diverged": sum(row["diverged"] for row in finals),
        "arms": {arm: arm_findings(records, config, arm) for arm in ARMS},
        "comparison": {m: compared(finals, "penalised", m) for m in MEASURES},
        "against": holm_correct(against),
        "norms": {arm: compared(finals, arm, "hessian_fro2") for arm in COMPARED},
        "placebo": placebo(records),
        "cost": cost(records, timings),
        "equal_time": equal_time(records, timings),
        "claimed": CLAIMED_GAP,
    }


def compared(finals: list[dict[str, Any]], arm: str, measure: str) -> dict[str, Any]:
    """Compare an arm with its baseline in one measure of the final runs, paired by seed."""
    return compare_arms(finals, measure, ARMS[arm].base, arm, ratio=measure in RATIOS)


def arm_findings(records: list[Row], config: Mapping[str, Any], arm: str) -> dict[str, Any]:
    """Return what tuning chose for one arm, and mean and spread of its final runs."""
    finals, trials = table(records, "final", arm=arm), table(records, "trial", arm=arm)
    chosen = {name: finals[0][name] for name in ("learning_rate", "strength", "activation")}
    own_rate = ARMS[arm].base == arm or arm == "own-rate"
    searched = {"learning_rate": "learning_rates" * own_rate, "strength": ARMS[arm].grid}
    edges = [
        name.replace("_", " ")
        for name, grid in searched.items()
        if grid and chosen[name] in ends(config[grid])
    ]
    last = [
        row
        for row in table(records, "epoch", arm=arm, epoch=config["epochs"])
        if row["batch_penalty"] is not None
    ]
    shares = [chosen["strength"] * row["batch_penalty"] / row["batch_loss"] for row in last]
    return {
        **chosen,
        "at_edge": edges,
        "num_trials_diverged": len({row["trial"] for row in trials if row["val_loss"] is None}),
        "penalty_share": fmean(shares) if shares else None,
        **{measure: summary([row.get(measure) for row in finals]) for measure in MEASURES},
    }


def ends(column: str | float | int) -> tuple[float, float]:
    """Return both ends of a grid."""
    values = grid_values(column)
    return min(values), max(values)


def placebo(records: list[Row]) -> dict[str, Any]:
    """Return whether the placebo's curves and final runs are the baseline's, number by number."""
    same = 0
    seeds = {row["seed"] for row in table(records, "final")}
    for seed in seeds:
        runs = []
        for arm in ("baseline", "placebo"):
            rows = table(records, "epoch", arm=arm, seed=seed)
            rows += table(records, "final", arm=arm, seed=seed)
            runs.append([{k: v for k, v in row.items() if k not in NOT_SHARED} for row in rows])
        same += runs[0] == runs[1]
    return {"num_same": same, "num_seeds": len(seeds), "coincides": same == len(seeds)}


def seconds_of(records: list[Row], timings: Mapping[str, float], arm: str, what: str) -> Any:
    """Return the median seconds of an arm's final runs for one part of the work."""
    cells = [f"{row['cell']}/{what}" for row in table(records, "final", arm=arm)]
    known = [timings[cell] for cell in cells if cell in timings]
    return median(known) if known else None


def cost(records: list[Row], timings: Mapping[str, float]) -> dict[str, Any]:
    """Return seconds per training and per measured Hessian, here and by torch autograd alone.

    ``protocol_ratio``: of all trainings of the run (tuning included) and all measured Hessians, at
    the cost of one seed of them; ``without_exact``: the same without the arm that torch autograd
    does not train to its end.
    """
    train = {arm: seconds_of(records, timings, arm, "train") for arm in ARMS}
    measure = seconds_of(records, timings, "baseline", "measure")
    cells = {row["cell"] for row in table(records, "torch")}

    def by_torch(what: str) -> Any:
        known = [timings[f"{cell}/{what}"] for cell in cells if f"{cell}/{what}" in timings]
        return median(known) if known else None

    torch = {arm: by_torch(f"train-{arm}") for arm in ARMS}
    torch_measure = by_torch("measure")
    found: dict[str, Any] = {
        "train": train,
        "relative": {arm: ratio(s, train["baseline"]) for arm, s in train.items()},
        "measure": measure,
        "torch_train": torch,
        "torch_measure": torch_measure,
        "train_ratio": {arm: ratio(torch[arm], train[arm]) for arm in ARMS},
        "measure_ratio": ratio(torch_measure, measure),
        "protocol_ratio": None,
        "without_exact": None,
    }
    if torch_measure is None or None in (*torch.values(), measure, *train.values()):
        return found
    nets = {arm: len(table(records, "final", arm=arm)) for arm in ARMS}
    trainings = {arm: nets[arm] + len(table(records, "trial", arm=arm)) for arm in ARMS}
    for name, arms in (
        ("protocol_ratio", list(ARMS)),
        ("without_exact", [arm for arm in ARMS if arm != "exact"]),
    ):
        ours = fsum(trainings[arm] * train[arm] + nets[arm] * measure for arm in arms)
        theirs = fsum(trainings[arm] * torch[arm] + nets[arm] * torch_measure for arm in arms)
        found[name] = theirs / ours
    return found


def ratio(a: float | None, b: float | None) -> float | None:
    """Return a / b, or None where there is none."""
    return a / b if a is not None and b else None


def equal_time(records: list[Row], timings: Mapping[str, float]) -> dict[str, Any]:
    """Compare validation losses when the baseline's training ends, at the epoch reached by then."""
    num, found = table(records, "config")[0]["epochs"], dict[str, Any]()
    for arm in COMPARED:
        base = ARMS[arm].base
        share = ratio(*(seconds_of(records, timings, name, "train") for name in (base, arm)))
        if share is None:
            continue
        epochs = {base: num, arm: min(num, round(num * share))}
        rows = [
            row
            for row in table(records, "epoch")
            if row["arm"] in epochs and row["epoch"] == epochs[row["arm"]]
        ]
        found[arm] = {**compare_arms(rows, "val_loss", base, arm), "epoch": epochs[arm]}
    return found
