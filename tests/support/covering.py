"""Few of the conformance cases that meet every pair of values of two axes."""

from __future__ import annotations

import itertools

from cases import CASES, Case


def axes(case: Case) -> dict[str, object]:
    s = case.spec
    return {
        "activation": s.activation,
        "loss": s.loss,
        "reduction": s.reduction,
        "bias": s.bias,
        "depth": s.num_layers,
        "dtype": case.dtype,
    }


def pairs(case: Case) -> set[tuple[object, ...]]:
    return {(*a, *b) for a, b in itertools.combinations(axes(case).items(), 2)}


def covering_cases() -> list[Case]:
    """Few small cases with every pair of values of two axes, the options, and several tiles."""
    # a linear model does not use its activation
    small = [c for c in CASES if c.N * max(c.K, 1) * sum(c.spec.sizes) <= 900 and c.K <= 3]
    missing = set().union(*(pairs(c) for c in small if c.spec.num_layers > 1))
    chosen: list[Case] = []
    while missing:
        best = max(small, key=lambda c: (len(pairs(c) & missing), c.N))
        chosen.append(best)
        missing -= pairs(best)
    options = [c for c in CASES if c.spec.class_weights and c.spec.label_smoothing and c.N <= 13]
    weighted = {(c.dtype, c.spec.ignore_index): c for c in options}
    linear = {c.dtype: c for c in small if c.spec.num_layers == 1}
    none = {c.dtype: c for c in CASES if c.K == 0 and c.N == 9}
    tiles = [c for c in CASES if c.N == 33 and c.K == 1]
    cases = [*chosen, *weighted.values(), *linear.values(), *none.values(), *tiles]
    return list(dict.fromkeys(cases))
