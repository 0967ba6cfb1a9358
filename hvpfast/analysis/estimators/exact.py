"""Values without probes: by per-sample cores where the operator has them, or by identity columns.

diag(A)_i = (A e_i)_i,     ||A_i||^2 = ||A e_i||^2 for A = A',     i = 1..P
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import torch

from hvpfast.analysis.estimators.hutchinson import POSITIVE, SCALARS, norms_sq
from hvpfast.analysis.estimators.result import Estimate
from hvpfast.analysis.estimators.sampling import Settings, rows_at_once
from hvpfast.operators.matvecs import Products, at_least_single

MOST_COLUMNS = 20_000  # identity columns that are multiplied where max_matvecs is not given
_OF_CORES = ("trace", "diagonal", "frobenius_sq")


def estimate(
    products: Products, settings: Settings, wanted: Sequence[str]
) -> dict[str, Estimate[Any]]:
    """Return the exact values of the wanted quantities by name.

    Raises:
        ValueError: P products are not allowed, and there are no cores or they cost more than that.
    """
    cores, cost, reason = _cores(products, wanted)
    if cores is not None and cost <= products.size:
        values = {name: getattr(cores, name)() for name in wanted}
        return _results(values, products, "exact: per-sample cores")
    size = products.size
    allowed = MOST_COLUMNS if settings.max_matvecs is None else settings.max_matvecs
    if size > allowed:
        start = time.perf_counter()
        products.rows(torch.zeros(1, size, dtype=products.dtype, device=products.device))
        seconds = time.perf_counter() - start
        raise ValueError(
            f"exact values take P = {size:,} products, {seconds * size:,.0f} s at the "
            f"{seconds:.2g} s of one product, and at most {allowed:,} are allowed ({reason}): "
            f"give max_matvecs={size} to allow them, or take an estimate"
        )
    values = _columns(products, settings)
    return _results({name: values[name] for name in wanted}, products, "exact: identity columns")


def is_cheaper(products: Products, settings: Settings, wanted: Sequence[str]) -> bool:
    """Whether exact values cost no more than ``num_matvecs`` products or quadratic forms."""
    halves = list(wanted) == ["trace"] and hasattr(products.operator, "quadratic_form")
    budget = settings.num_matvecs / 2 if halves else settings.num_matvecs
    return min(products.size, _cores(products, wanted)[1]) <= budget


def _cores(products: Products, wanted: Sequence[str]) -> tuple[Any, float, str]:
    """The operator's per-sample cores and their cost in products; or None, inf and the reason."""
    if not set(wanted) <= set(_OF_CORES):
        return None, math.inf, "per-sample cores do not give the norms of rows"
    make = getattr(products.operator, "cores", None)
    if make is None:
        return None, math.inf, f"{type(products.operator).__name__} has no per-sample cores"
    try:
        cores = make()
    except NotImplementedError as error:
        return None, math.inf, str(error)
    cost = cores.cost()
    total = sum(cost.frobenius_sq if name == "frobenius_sq" else cost.trace for name in wanted)
    return cores, total / cost.matvec, "per-sample cores take more than that"


def _columns(products: Products, settings: Settings) -> dict[str, Any]:
    """All quantities from the products with the P identity columns."""
    products.check_symmetric()
    size, dtype, device = products.size, products.dtype, products.device
    at_once = min(size, rows_at_once(products))
    products.check_room(at_once, 4, "identity columns")
    rows = torch.zeros(at_once, size, dtype=dtype, device=device)
    diagonal = torch.empty(size, dtype=at_least_single(dtype), device=device)
    norms = torch.empty(size, dtype=torch.float64, device=device)
    with settings.bar(size) as bar:
        for start in range(0, size, at_once):
            stop = min(start + at_once, size)
            ones = rows[: stop - start].diagonal(start)
            ones.fill_(1.0)
            out = products.rows(rows[: stop - start]).to(diagonal.dtype)
            diagonal[start:stop] = out.diagonal(start)
            norms[start:stop] = norms_sq(out)
            ones.zero_()  # after the use of products, which may be the rows themselves
            bar.update(stop - start)
    return {
        "trace": float(diagonal.double().sum()),
        "frobenius_sq": float(norms.sum()),
        "diagonal": diagonal,
        "row_norms_sq": norms,
    }


def _results(
    values: dict[str, Any], products: Products, stop_reason: str
) -> dict[str, Estimate[Any]]:
    results: dict[str, Estimate[Any]] = {}
    for name, value in values.items():
        scalar = name in SCALARS
        results[name] = Estimate[Any](
            estimate=float(value) if scalar else value.to(products.dtype),
            stderr=0.0 if scalar else torch.zeros_like(value, dtype=products.dtype),
            samples=None,
            num_matvecs=products.num_matvecs,
            stop_reason=stop_reason,
            seed=None,
            method="exact",
            dof=0,
            positive=name in POSITIVE,
        )
    return results
