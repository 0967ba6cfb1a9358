"""Parts of the flatness study's report: findings to lines of tables and to sentences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hvpfast.lab.report.words import (
    NONE,
    change,
    count,
    interval,
    number,
    p_value,
    percent,
    spread,
    wrap,
)
from hvpfast.studies.flatness.findings import BASELINE, MEASURES

PUBLISHED = {
    "0": (0.2633, 0.2800, 0.2600, None, 1.376),
    "0.001": (0.2633, 0.2833, 0.2612, 18.79, 1.378),
    "0.01": (0.2700, 0.2783, 0.2625, 4.88, 1.393),
    "0.1": (0.2667, 0.2967, 0.2580, 1.30, 1.464),
    "1": (0.2583, 0.2983, 0.2797, 0.595, 1.670),
}
"""By lambda, from the published results: final, best and late test accuracy, Tr(H^2)/B of the last
epoch, and its cross-entropy (objective less penalty)."""


def line(*cells: Any) -> str:
    """Return a line of a table."""
    return "| " + " | ".join(map(str, cells)) + " |"


def primary_line(found: Mapping[str, Any], arm: str) -> str:
    """Return one line of the main table."""
    accuracy = spread(found["by_arm"][arm]["test_accuracy"])
    if arm == BASELINE:
        return line(arm, accuracy, *[NONE] * 5)
    pair = found["comparison"]["test_accuracy"][arm]
    told = [change(pair["mean"], pair["kind"]), interval(pair), interval(pair, "boot_")]
    return line(arm, accuracy, *told, p_value(pair, "p_holm"), pair["verdict_holm"])


def performance_line(found: Mapping[str, Any], arm: str) -> str:
    """Return one line of the performance table."""
    by = found["by_arm"][arm]
    names = ("val_accuracy", "best_accuracy", "late_accuracy", "test_loss", "train_accuracy")
    cells = [spread(by[name]) for name in (*names, "hessian_fro2")]
    return line(arm, *cells, number(seconds(found, arm, found["config"]["num_epochs"]), 3))


def seconds(found: Mapping[str, Any], arm: str, epochs: float | None) -> float | None:
    """Return the seconds that the steps of so many epochs take."""
    method = "plain" if arm == BASELINE else "penalised"
    per_step = found["cost"]["seconds"][method]
    if per_step is None or epochs is None:
        return None
    return float(per_step * epochs * found["cost"]["steps_per_epoch"])


def stability_line(found: Mapping[str, Any], arm: str) -> str:
    """Return one line of the stability table."""
    by = found["by_arm"][arm]
    names = ("late_loss_variance", "late_accuracy_variance", "late_train_variance")
    return line(
        arm, *(number(by[name]["mean"], 3) for name in names), by["num_undone"], by["num_diverged"]
    )


def convergence_line(found: Mapping[str, Any], arm: str) -> str:
    """Return one line of the convergence table."""
    by = found["by_arm"][arm]
    epochs = by["epochs_to_target"]
    reached = f"{by['num_reached']} of {found['num_seeds']}"
    return line(arm, spread(epochs), reached, number(seconds(found, arm, epochs["mean"]), 3))


def flatness_lines(found: Mapping[str, Any]) -> list[str]:
    """Return the table of flatness: a line of means and one of ratios per measure."""
    names = ["hessian_fro2", "hessian_fro2_probes", "held_out_fro2", "part_fro2",
             "part_ggn_fro2", "hessian_trace",
             "filter_curvature", "flatness_same", "flatness_fresh", "flatness_unseen",
             "params_norm", "first_norm", *found["own_metrics"]]  # fmt: skip
    lines = []
    for name in names:
        means = [number(found["by_arm"][arm][name]["mean"], 3) for arm in found["arms"]]
        lines.append(line(MEASURES.get(name, name.removeprefix("metric_")), *means))
        pairs = found["comparison"][name]
        told = [
            change(pairs[arm]["mean"], pairs[arm]["kind"])
            if arm in pairs and pairs[arm]["verdict_holm"] in ("lower", "higher")
            else ""
            for arm in found["arms"]
        ]
        if any(told):
            lines.append(line("", *told))
    return lines


def landscape_line(row: Mapping[str, Any]) -> str:
    """Return one line of the table of landscapes."""
    curvatures, differences = (
        ", ".join(number(row[f"{what}_{axis}"], 3) for axis in "xy")
        for what in ("curvature", "difference")
    )
    head = (row["plane"] + 1, row["arm"], number(row["loss"]))
    return line(*head, curvatures, differences, number(row["mean_rise"], 3))


def probes_words(found: Mapping[str, Any]) -> str:
    """Return whether the penalty's own probes see a flatter network than fresh ones do."""
    ratios = []
    for arm in found["arms"]:
        by = found["by_arm"][arm]
        same, fresh = by["flatness_same"]["mean"], by["flatness_fresh"]["mean"]
        unseen = by["flatness_unseen"]["mean"]
        if same and fresh and unseen is not None:
            ratios.append(f"λ = {arm}: {number(same / fresh, 3)} and {number(unseen / fresh, 3)}")
    told = "; ".join(ratios) or NONE
    return (
        "Against fresh probes on the same batches, the step's own probes see, and held-out batches "
        f"have, so many times the Tr(H²): {told}."
    )


def landscape_pictures(found: Mapping[str, Any]) -> list[str]:
    """Return the pictures of the planes."""
    planes = dict.fromkeys(row["plane"] + 1 for row in found["landscape"])
    return [f"![Loss landscapes, plane {plane}](loss_landscapes_{plane}.png)" for plane in planes]


def mcnemar_words(found: Mapping[str, Any]) -> str:
    """Return the comparison of single networks on the same test samples."""
    if not found["mcnemar"]:
        return "The first seed has no pair of networks to compare."
    told = "; ".join(
        f"λ = {arm}: {pair['won']} gained, {pair['lost']} lost (p {number(pair['p'], 2)})"
        for arm, pair in found["mcnemar"].items()
    )
    return (
        "The first seed's networks on the same test samples, against that of "
        f"λ = {BASELINE}, with McNemar's exact p, not corrected: {told}. This is about two "
        "networks, not about the penalty."
    )


def shares(found: Mapping[str, Any]) -> str:
    """Return the penalty's share of the loss by lambda."""
    return ", ".join(
        f"{percent(found['by_arm'][arm]['penalty_share'], 1)} (λ = {arm})"
        for arm in found["arms"]
        if arm != BASELINE
    )


def cost_words(found: Mapping[str, Any]) -> str:
    """Return what a step costs, ours and torch's."""
    cost, agreement = found["cost"], found["agreement"]
    if not agreement or cost["seconds"]["plain"] is None:
        return "Steps were not timed in this run."
    per = {name: number(1e3 * value, 3) for name, value in cost["seconds"].items() if value}
    return (
        f"Milliseconds per step, optimiser included, one thread each, medians of "
        f"{count(cost['rounds'], 'alternating round')}: {per['plain']} without the penalty and "
        f"{per['penalised']} with it (×{number(cost['penalised_over_plain'], 3)}). torch: "
        f"{per['torch-plain']} without (the penalised step here is "
        f"×{number(cost['penalised_over_torch_plain'], 3)} of that) and {per['torch-penalised']} "
        f"with it, by triple backward, ×{number(cost['torch_over_penalised'], 3)}. For the same "
        "probes the two penalised gradients agree to "
        f"{number(agreement[0]['gradient_error'], 2)} (relative)."
    )


def published_section(found: Mapping[str, Any]) -> str:
    """Return the published table beside this run's, where it follows that protocol."""
    if found["data"]["dataset"] != "rbf" or not found["data"]["held_out_is_test"]:
        return ""
    names = ("val_accuracy", "best_accuracy", "late_accuracy", "flatness_same", "last_ce")
    head = ["λ", "final accuracy", "best", "late", "Tr(H²)/B, last epoch", "cross-entropy"]
    lines = [line(*head), line(*["---", *["---:"] * 5])]
    for arm in found["arms"]:
        if arm in PUBLISHED:
            ours = [number(found["by_arm"][arm][name]["mean"]) for name in names]
            theirs = [number(value) for value in PUBLISHED[arm]]
            cells = [f"{a} ({b})" for a, b in zip(ours, theirs, strict=True)]
            lines.append(line(arm, *cells))
    if len(lines) == 2:
        return ""
    note = (
        "This run, and in brackets the published numbers: one run for each λ, called CIFAR-100 "
        "there, really a stream of radial basis functions of the kind that was used here."
    )
    return "\n".join(
        ["", "## Beside the published numbers", "", wrap(note).rstrip(), "", *lines, ""]
    )
