"""Findings of the Hessian-norm study's sound protocol, from its records and timings alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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
    return compare_arms(finals, measure, ARMS[arm].base, arm, ratio=measure in RATIOS)


def arm_findings(records: list[Row], config: Mapping[str, Any], arm: str) -> dict[str, Any]:
    finals, trials = table(records, "final", arm=arm), table(records, "trial", arm=arm)
    chosen = {name: finals[0][name] for name in ("learning_rate", "strength", "activation")}
    own_rate = ARMS[arm].base == arm or arm == "own-rate"
    searched = {"learning_rate": "learning_rates" * own_rate, "strength": ARMS[arm].grid}
    grids = {name: grid_values(config[grid]) for name, grid in searched.items() if grid}
    shares = [
        chosen["strength"] * row["batch_penalty"] / row["batch_loss"]
        for row in table(records, "epoch", arm=arm, epoch=config["epochs"])
        if row["batch_penalty"] is not None
    ]
    return {
        **chosen,
        "at_edge": [
            name.replace("_", " ")
            for name, grid in grids.items()
            if chosen[name] in (min(grid), max(grid))
        ],
        "num_trials_diverged": len({row["trial"] for row in trials if row["val_loss"] is None}),
        "penalty_share": fmean(shares) if shares else None,
        **{measure: summary([row.get(measure) for row in finals]) for measure in MEASURES},
    }


def placebo(records: list[Row]) -> dict[str, Any]:
    """Return whether the placebo's curves and final runs are the baseline's, number by number."""

    def shared(arm: str, seed: int) -> list[dict[str, Any]]:
        of_run = {"arm": arm, "seed": seed}
        rows = table(records, "epoch", **of_run) + table(records, "final", **of_run)
        return [{k: v for k, v in row.items() if k not in NOT_SHARED} for row in rows]

    seeds = {row["seed"] for row in table(records, "final")}
    same = sum(shared("baseline", seed) == shared("placebo", seed) for seed in seeds)
    return {"num_same": same, "num_seeds": len(seeds), "coincides": same == len(seeds)}


def seconds(rows: Iterable[Row], timings: Mapping[str, float], what: str) -> Any:
    """Return the median seconds that the cells of the rows took for one part of their work."""
    parts = {f"{row['cell']}/{what}" for row in rows}
    known = [timings[part] for part in parts if part in timings]
    return median(known) if known else None


def cost(records: list[Row], timings: Mapping[str, float]) -> dict[str, Any]:
    """Return seconds per training and per measured Hessian, here and by torch autograd alone.

    ``protocol_ratio``: of all trainings of the run (tuning included) and all measured Hessians, at
    the cost of one seed of them; ``without_exact``: the same without the arm that torch autograd
    does not train to its end.
    """
    finals = {arm: table(records, "final", arm=arm) for arm in ARMS}
    by_torch = table(records, "torch")
    train = {arm: seconds(rows, timings, "train") for arm, rows in finals.items()}
    measure = seconds(finals["baseline"], timings, "measure")
    torch = {arm: seconds(by_torch, timings, f"train-{arm}") for arm in ARMS}
    torch_measure = seconds(by_torch, timings, "measure")
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
    nets = {arm: len(rows) for arm, rows in finals.items()}
    trainings = {arm: nets[arm] + len(table(records, "trial", arm=arm)) for arm in ARMS}
    for name, left_out in (("protocol_ratio", ""), ("without_exact", "exact")):
        arms = [arm for arm in ARMS if arm != left_out]
        ours = fsum(trainings[arm] * train[arm] + nets[arm] * measure for arm in arms)
        theirs = fsum(trainings[arm] * torch[arm] + nets[arm] * torch_measure for arm in arms)
        found[name] = theirs / ours
    return found


def ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None


def equal_time(records: list[Row], timings: Mapping[str, float]) -> dict[str, Any]:
    """Compare validation losses when the baseline's training ends, at the epoch reached by then."""
    num, found = table(records, "config")[0]["epochs"], dict[str, Any]()
    for arm in COMPARED:
        base = ARMS[arm].base
        finals = (table(records, "final", arm=name) for name in (base, arm))
        share = ratio(*(seconds(rows, timings, "train") for rows in finals))
        if share is not None:
            epoch = min(num, round(num * share))
            rows = table(records, "epoch", arm=base, epoch=num)
            rows += table(records, "epoch", arm=arm, epoch=epoch)
            found[arm] = {**compare_arms(rows, "val_loss", base, arm), "epoch": epoch}
    return found
