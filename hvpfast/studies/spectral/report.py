"""The report of the spectral study: words and tables around its findings, no number by hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hvpfast.lab.report.words import (
    NONE,
    count,
    number,
    percent,
    table_head,
    table_line,
    wrap,
)
from hvpfast.studies.spectral.findings import QUESTION, headline

SHOWN = 24
"""Lambdas in the report's table, at most."""
FIRST_ORDER = 5.0
"""Times the change of the steps before, from which the last step counts as a jump."""


def report(found: Mapping[str, Any]) -> str:
    """Return the report in Markdown."""
    parts = [
        f"# {QUESTION}",
        headline(found).replace("\n", " "),
        protocol(found),
        predictions(found),
        "## Spectrum\n\n![Eigenvalues against lambda](spectrum.png)",
        spectrum_table(found),
        oracle_text(found),
        "## Sweeps\n\n![Accuracy, loss, norm and gradient against lambda](sweeps.png)",
        sweep_table(found),
        stationarity_text(found),
        "## Subspaces, gaps and classes\n\n![Gaps, overlaps, classes, products](subspaces.png)",
        subspace_text(found),
        density_text(found),
        solver_text(found),
        time_text(found),
    ]
    return wrap("\n\n".join(part for part in parts if part))


def protocol(found: Mapping[str, Any]) -> str:
    """Return what was done."""
    c, d = found["config"], found["data"]
    penalty = (
        "lambda ||theta||^2 in the loss, biases included: H_eff = H + 2 lambda I"
        if c["penalty"] == "explicit"
        else "Adam's weight_decay = lambda, so (lambda/2) ||theta||^2: H_eff = H + lambda I"
    )
    stop = (
        "of the objective on the whole train split after each epoch; the best state is copied and "
        "restored"
        if c["stopping"] == "effective"
        else "of an epoch's running cross-entropy; the last state is kept, as published"
    )
    rank = (
        ""
        if d["rank"] is None
        else f" The train inputs have rank {d['rank']}, so that {d['num_reduced']:,} of "
        f"{d['num_params']:,} parameters have curvature: eigenproblems and the polish work on "
        "those, which is exact."
    )
    polish = (
        f"then at most {c['polish']} full-batch L-BFGS steps where lambda > 0 (at 0 there is no "
        "minimum at finite distance)"
        if c["polish"]
        else "no polish"
    )
    return (
        "## Protocol\n\n"
        f"Data {d['dataset']} ({d['num_train']:,} train, {d['num_test']:,} test; {d['check']}), "
        f"network {d['sizes']}, sigmoid, {d['num_params']:,} parameters.{rank} "
        f"{count(len(found['points']), 'lambda')}, {c['sweep']} sweep, in one unbroken chain; "
        f"penalty: {penalty}. Adam {number(c['learning_rate'])}, batch {c['batch_size']}, at most "
        f"{c['epochs']} epochs, patience {c['patience']} {stop}; {polish}. H is the Hessian of the "
        "train split's cross-entropy alone; eigenvalues of H and of H_eff are separate files. "
        f"Files: {d['writes']}. No choice was made on test scores; the design has one seed, so "
        "that nothing here has an interval over seeds."
    )


def predictions(found: Mapping[str, Any]) -> str:
    """Return the registered predictions with their answers."""
    lines = [
        "## Predictions registered beforehand",
        "",
        f"- **A collapse of first order.** {order_text(found)}",
        f"- **Hysteresis.** {hysteresis_text(found)}",
        f"- **A largest eigenvalue that is not monotone in lambda.** {hump_text(found)}",
    ]
    return "\n".join(lines)


def order_text(found: Mapping[str, Any]) -> str:
    """Answer the prediction about the order of the transition."""
    state = found["collapse"][found["config"]["sweep"]]
    if state["first"] is None:
        return "No evidence: no collapse on this grid."
    if state["jump"] is None or state["jump_before"] is None:
        return "No evidence: too few lambdas before the collapse."
    times = state["jump"] / state["jump_before"] if state["jump_before"] else float("inf")
    verdict = "Yes" if times > FIRST_ORDER else "No evidence"
    return (
        f"{verdict}: at lambda {number(state['first'])} the spread of the logits falls by "
        f"{number(state['jump'], 3)} in one step of the grid, {number(times, 3)} times the median "
        f"of the steps before it; the last network before has test accuracy "
        f"{percent(state['last_accuracy'], 1)} and ||theta|| = {number(state['last_norm'], 3)}."
    )


def hysteresis_text(found: Mapping[str, Any]) -> str:
    """Answer the prediction about hysteresis."""
    if not found["hysteresis"]:
        return "No evidence: only one sweep was trained."
    main, texts, any_alive = found["config"]["sweep"], [], False
    for name, h in found["hysteresis"].items():
        for who, alive, span in (
            (main, h["alive_only_main"], h["range_main"]),
            (name, h["alive_only_other"], h["range_other"]),
        ):
            if alive:
                any_alive = True
                other = name if who == main else main
                texts.append(
                    f"at {alive} of {h['num']} common lambdas, {number(span[0])} to "
                    f"{number(span[1])}, the {who} sweep has learned and the {other} one has not"
                )
    if not any_alive:
        return "No evidence: the sweeps have collapsed at the same of their common lambdas."
    return "Yes: " + "; ".join(texts) + "."


def hump_text(found: Mapping[str, Any]) -> str:
    """Answer the prediction about the largest eigenvalue."""
    top = found["largest"]
    text = (
        f"{number(top['at_first'])} at lambda {number(top['first_lambda'])}, at most "
        f"{number(top['top'])} at {number(top['top_lambda'])}, {number(top['at_last'])} at the end"
    )
    if top["last_alive"] is not None and top["collapsed"] is not None:
        text += (
            f"; {number(top['last_alive'])} before the collapse and {number(top['collapsed'])} "
            "(median) after it"
        )
    return f"{'Yes' if top['hump'] else 'No'}: {text}. More L2 is not flatter by itself."


def spectrum_table(found: Mapping[str, Any]) -> str:
    """Return scores and eigenvalues of some lambdas, evenly spread over the grid."""
    points = found["points"]
    step = max(1, -(-len(points) // SHOWN))
    shown = points[::step] + ([points[-1]] if (len(points) - 1) % step else [])
    names = (
        "lambda",
        "CE train",
        "accuracy test",
        "norm",
        "gradient",
        "1st",
        "9th",
        "10th",
        "11th",
    )
    lines = [table_head(names)]
    for p in shown:
        values = [number(p[f"value_{i}"]) for i in (1, 9, 10, 11)]
        lines.append(
            table_line(
                f"{p['lambda']:.4f}",
                number(p["train_loss"]),
                percent(p["test_accuracy"], 1),
                number(p["params_norm"], 3),
                number(p["grad_norm"], 2),
                *values,
            )
        )
    return "\n".join(lines)


def oracle_text(found: Mapping[str, Any]) -> str:
    """Return the comparison with analysis."""
    o = found["oracle"]
    if o is None:
        return "No network has collapsed, so that there is nothing to compare with analysis."
    width = int(str(found["config"]["hidden"]).split()[-1])
    values = ", ".join(number(v) for v in o["last_values"])
    return (
        "**Collapse oracle.** Where the weights are 0, H has nine eigenvalues "
        "(1 + |h|^2) eig(diag p - pp') and no others; for uniform p they are "
        f"{number((1 + width / 4) / 10)}, nine-fold. Over {count(o['num'], 'collapsed network')} "
        f"the nine largest agree with it to {number(o['worst'], 2)} relative, p and h being the "
        f"network's own; the tenth is at most {number(o['tenth'], 2)}. At lambda "
        f"{number(o['last_lambda'])} they are {values}."
    )


def sweep_table(found: Mapping[str, Any]) -> str:
    """Return where every sweep collapses."""
    lines = [
        table_head(("sweep", "lambdas", "collapsed", "from lambda", "last learned", "accuracy"))
    ]
    for name, s in found["collapse"].items():
        lines.append(
            table_line(
                name,
                str(s["num"]),
                str(s["num_collapsed"]),
                number(s["first"]),
                number(s["last_alive"]),
                percent(s["last_accuracy"], 1),
            )
        )
    majority = percent(found["trivial"]["test_accuracy"], 1)
    return "\n".join(lines) + f"\n\nThe most frequent class alone scores {majority}."


def stationarity_text(found: Mapping[str, Any]) -> str:
    """Return how near to stationary points the networks are."""
    s = found["stationarity"]
    text = (
        f"**Stationarity.** ||grad L_eff|| is {number(s['median'], 2)} in the median and "
        f"{number(s['worst'], 2)} at worst (lambda {number(s['worst_lambda'])}), after "
        f"{number(s['epochs'], 3)} epochs in the mean; {s['polished']} of {s['num']} lambdas were "
        f"polished, patience ended {s['patience']}."
    )
    if s["relative_median"] is not None:
        text += (
            f" Relative to the penalty's own gradient: {number(s['relative_median'], 2)} in the "
            f"median, {number(s['relative_worst'], 2)} at worst. Eigenvalues are those of the "
            "networks as they are, near to and not at stationary points."
        )
    return text


def subspace_text(found: Mapping[str, Any]) -> str:
    """Return gaps, overlaps and the order in which classes are lost."""
    o, v = found["outliers"], found["overlap"]
    parts = []
    if o is not None:
        after = ", ".join(f"{k} at {n}" for k, n in list(o["after"].items())[:4])
        parts.append(
            f"Over {count(o['num'], 'lambda')} before the collapse, lambda_9 / lambda_10 is "
            f"{number(o['gap_9'], 3)} in the median and lambda_10 / lambda_11 "
            f"{number(o['gap_10'], 3)} (at most {number(o['gap_10_most'], 3)}). The largest ratio "
            f"of neighbours after the first lies after number {after} lambdas. "
            f"{o['negative']} of the pairs of largest magnitude are negative there."
        )
    if v["median"] is not None:
        parts.append(
            f"Neighbouring lambdas share {number(v['median'], 3)} of their top-10 subspaces in the "
            f"median, least {number(v['least'], 3)} at lambda {number(v['least_lambda'])}; a "
            "random subspace would share almost nothing. A collapsed network has "
            "nine eigenvalues apart from the rest, and its tenth direction is one of many alike."
        )
    lost = [
        f"{f['class']} ({NONE if f['lost'] is None else number(f['lost'])})"
        for f in found["classes"]
    ]
    parts.append("Classes by the lambda from which on no test sample of theirs is right: "
                 + ", ".join(lost) + ".")  # fmt: skip
    return "\n\n".join(parts)


def density_text(found: Mapping[str, Any]) -> str:
    """Return the densities and the smallest eigenvalues."""
    if not found["density"]:
        return ""
    lines = [
        "## Spectral density\n\n![Spectral density at chosen lambdas](density.png)\n",
        table_head(("lambda", "trace of H", "smallest of H", "smallest of H_eff", "products")),
    ]
    for row in found["density"]:
        lines.append(
            table_line(
                f"{row['lambda']:.4f}",
                f"{number(row['trace'])} ± {number(row['trace_stderr'], 2)}",
                number(row["lowest"]),
                number(row["lowest"] + row["decay"]),
                str(row["num_matvecs"]),
            )
        )
    return "\n".join(lines) + (
        "\n\nDensities are by stochastic Lanczos quadrature, with 95 % bands over probes. A "
        "positive smallest eigenvalue of H_eff says that the point is a minimum and no saddle."
    )


def solver_text(found: Mapping[str, Any]) -> str:
    """Return residuals and products."""
    r, p = found["residuals"], found["products"]
    text = (
        f"## Solver\n\nOf {r['num']:,} pairs {r['within']:,} have residuals of at most "
        f"{number(r['tol'])} relative, {number(r['worst_within'], 2)} at worst. "
    )
    if r["rounding"] or r["unexplained"]:
        text += (
            f"{r['rounding']:,} have not, and their residuals are within 100 roundings of H's own "
            f"norm: eigenvalues of at most {number(r['largest_beyond'], 2)}, zero to rounding, "
            f"whose relative residual this precision does not allow; {r['unexplained']:,} others. "
        )
    text += (
        "Blocks have as many vectors as pairs are wanted, as hidden units that became alike make "
        "eigenvalues equal, and smaller blocks may miss some. Collapsed networks, whose "
        "eigenvalues from the tenth on are a thousandth of the others, were solved in float64. "
        f"A lambda took {number(p['mean'], 4)} products in the mean."
    )
    if p["num_pairs"]:
        text += (
            f" At {count(p['num_pairs'], 'lambda')} solved both ways: {number(p['warm'], 4)} from "
            f"the neighbour's vectors, {number(p['cold'], 4)} from a random start; warm takes "
            f"fewer at {p['fewer']} of them. Their eigenvalues differ by at most "
            f"{number(p['difference'], 2)} relative."
        )
    return text


def time_text(found: Mapping[str, Any]) -> str:
    """Return seconds per lambda, and what the whole grid takes."""
    t = found["time"]
    lines = [
        "## Time",
        "",
        table_head(("work on one core", "lambdas", "mean s", "sd", "least", "most")),
    ]
    for name, title in (("fit", "training with its scores"), ("pairs", "eigenpairs")):
        s = t[name]
        values = [number(s[k], 3) for k in ("mean", "sd", "least", "most")]
        lines.append(table_line(title, str(s["n"]), *values))
    spread = "" if t["total_half"] is None else f" ± {number(t['total_half'] / 3600, 2)}"
    tail = (
        f"The main sweep over 451 such lambdas takes {number(t['total'] / 3600, 3)}{spread} hours "
        "of one core (twice the standard error of the sum, from the spread between these lambdas); "
        f"this run's cells took {number(t['whole'] / 60, 3)} core-minutes in all."
    )
    return "\n".join(lines) + "\n\n" + tail
