"""Report of the learning-rate study's published protocol, repeated: words around its findings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hvpfast.lab.report.words import (
    count,
    number,
    spread,
    wrap,
)
from hvpfast.studies.lr_adaptation.findings import CLAIMS, DESCRIPTIVE, learning_rates
from hvpfast.studies.lr_adaptation.report import (
    START,
    TRIVIAL,
    claims,
    common_words,
    line,
    result_cells,
)

PUBLISHED = {
    "learning_rate": {"adam": 0.00524, "difference": 0.00271},
    "test_lowest": {"adam": 1.092, "difference": 1.088},
    "test_loss": {"adam": 1.211, "difference": 1.120},
}
"""What the study published: the learning rates in words, the losses read off its figure (± 0.005).
Its words say that the wrapper converges faster at first and Adam ends slightly lower; its figure
shows the opposite on both counts."""

TEMPLATE = (
    START
    + """| | Adam | wrapper | wrapper - Adam | {level} interval | p | p, Holm | wrapper lower |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
{rows}

{seeds_counted} of the whole published protocol, each with its own search: mean ± standard
deviation; paired by repeat, mean differences or geometric mean ratios; p by flipping signs, with
Holm's correction over the four measures; and the repeats in which the wrapper came out lower.
Steps to the target: until the loss is first at or below {target}.{never} """
    + TRIVIAL
    + """
![Curves and differences](curves.png)

![Every repeat](measures.png)

## Against what was published

| | Adam, published | Adam, here | wrapper, published | wrapper, here |
| --- | ---: | ---: | ---: | ---: |
{published_rows}

Losses published are read off the figure. What was claimed:

{claims}

## Protocol

- **Data**: {dataset}, generated offline (against its published values: {check}). {num_train}
  samples to train; the {num_test} test samples serve for tuning, for the curves and for the result,
  as they did: the losses here flatter both arms.
- **Network**: {sizes}, {activation}, {num_params} parameters, {dtype}; batches of {batch_size};
  backend `{backend}`.
- **Tuning**: {trials} an arm and repeat, of {tune_epochs}, by TPE with the default start of random
  trials, between {rate_low} and {rate_high}; the last loss of a trial counts. One initial state
  serves all trials and both final runs of a repeat.
- **Final runs**: {epochs}; {num_diverged} of them diverged.

![Tuning](tuning.png)
"""
)


def published_report(found: Mapping[str, Any]) -> str:
    """Return the report of the published protocol, repeated."""
    config, arms = found["config"], found["arms"]
    rates = learning_rates(config)
    text = {
        **common_words(found),
        "rows": "\n".join(repeat_line(found, m) for m in (*CLAIMS, *DESCRIPTIVE)),
        "seeds_counted": count(found["num_seeds"], "repeat"),
        "claims": claims(found),
        "published_rows": "\n".join(published_line(arms, name) for name in PUBLISHED),
        "trials": count(config["trials"], "trial"),
        "tune_epochs": count(config["tune_epochs"], "epoch"),
        "rate_low": number(min(rates)),
        "rate_high": number(max(rates)),
    }
    return wrap(TEMPLATE.format(**text))


def repeat_line(found: Mapping[str, Any], measure: str) -> str:
    """Return the line of one measure of the repeats."""
    arms = [spread(found["arms"][arm][measure]) for arm in ("adam", "difference")]
    if measure not in CLAIMS:
        return line([DESCRIPTIVE[measure], *arms, "", "", "", "", ""])
    result, won = found["study"][measure], found["wins"][measure]
    cells = [*arms, *result_cells(result, bootstrap=False), f"{won['lower']} of {won['n']}"]
    return line([CLAIMS[measure], *cells])


def published_line(arms: Mapping[str, Any], name: str) -> str:
    """Return a published pair of numbers beside what the repeats gave."""
    cells = []
    for arm in ("adam", "difference"):
        found = arms[arm]
        if name == "learning_rate":
            ends = f"{number(found['learning_rate_low'], 2)} to "
            here = f"{number(found[name], 3)} ({ends}{number(found['learning_rate_high'], 2)})"
        else:
            here = spread(found[name])
        cells += [number(PUBLISHED[name][arm]), here]
    label = "learning rate (median, range)" if name == "learning_rate" else CLAIMS[name]
    return line([label, *cells])
