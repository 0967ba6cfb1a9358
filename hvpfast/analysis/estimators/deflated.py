"""Estimators that treat a dominant subspace exactly and sample the rest.

For an orthonormal basis Q (P, k) let R = I - QQ', and let the probes g be independent of Q. Given Q
all samples are independent and unbiased, so that their spread gives the standard error.

    Hutch++      tr A      = tr Q'AQ + E g'RARg
    NA-Hutch++   tr A      = tr B    + E g'(A - B)g          B = Z (S'Z)^+ W',  Z = A T,  W = A S
    deflated     ||A||_F^2 = 2 ||AQ||_F^2 - ||Q'AQ||_F^2 + E ||RARg||^2               for A = A'

Q = orth(A T) for random probes T. In NA-Hutch++ no product depends on another.

References: Meyer, Musco, Musco, Woodruff (2021), doi:10.1137/1.9781611976496.16.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hvpfast.analysis.estimators.hutchinson import estimate_of, norms_sq
from hvpfast.analysis.estimators.result import Estimate
from hvpfast.analysis.estimators.sampling import ProbeStream, Settings, probe_stream, sample
from hvpfast.analysis.estimators.subspace import (
    chunks_of,
    multiply,
    orthonormal_rows,
    project_out,
    row_products,
)
from hvpfast.analysis.estimators.tallies import ScalarTally
from hvpfast.operators.matvecs import Products

_PROJECTED = 16  # probes that go through the basis at once


def hutch_plus_plus(products: Products, settings: Settings) -> Estimate[float]:
    """Return tr A: a third of the products each for the sketch, Q'AQ and the rest."""
    stream, basis = _basis(products, settings, "hutch++")
    known = float(_quadratic(products, basis).sum())
    tally = ScalarTally(positive=False)

    def visit(rows: Tensor) -> None:
        rows = stream.on_sphere(project_out(rows, basis), products.size - len(basis))
        tally.add(_quadratic(products, rows) + known)

    reason = sample(stream, settings, 2 * len(basis), visit, [tally])
    return estimate_of(tally, products, settings, reason, "hutch++")


def deflated_frobenius_sq(products: Products, settings: Settings) -> Estimate[float]:
    """Return ||A||_F^2: a third of the products each for the sketch, AQ and the rest."""
    products.check_symmetric()
    stream, basis = _basis(products, settings, "deflated")
    known = 0.0
    for start in range(0, len(basis), _PROJECTED):
        q = basis[start : start + _PROJECTED]
        out = multiply(products, chunks_of(products, q), torch.empty_like(q))
        known += 2 * float(norms_sq(out).sum()) - float(row_products(out, basis).square().sum())
    tally = ScalarTally(positive=True)

    def visit(rows: Tensor) -> None:
        rows = stream.on_sphere(project_out(rows, basis), products.size - len(basis))
        out = multiply(products, chunks_of(products, rows), rows)
        tally.add(norms_sq(project_out(out, basis)) + known)

    reason = sample(stream, settings, 2 * len(basis), visit, [tally])
    return estimate_of(tally, products, settings, reason, "deflated")


def na_hutch_plus_plus(products: Products, settings: Settings) -> Estimate[float]:
    """Return tr A: a quarter of the products for W, a half for Z and a quarter for the rest."""
    check_budget("na-hutch++", settings.num_matvecs, 4)
    narrow, wide = settings.num_matvecs // 4, settings.num_matvecs // 2
    products.check_room(narrow + wide, 2, "na-hutch++ keeps its sketches")
    stream = probe_stream(products, settings, _PROJECTED)
    S = stream.rows(narrow)
    W = multiply(products, chunks_of(products, S), torch.empty_like(S))
    Z = multiply(products, stream.chunks(wide), S.new_empty(wide, products.size))
    # singular values of S'Z below the rounding of products are noise, with large inverses
    noise = 10 * wide * torch.finfo(products.dtype).eps
    core = torch.linalg.pinv(row_products(S, Z), rtol=noise)  # (wide, narrow)
    known = float((core * row_products(Z, W)).sum())
    del S
    tally = ScalarTally(positive=False)

    def visit(rows: Tensor) -> None:
        sketched = (row_products(rows, Z) @ core * row_products(rows, W)).sum(1)  # g'Bg
        tally.add(_quadratic(products, rows) - sketched + known)

    reason = sample(stream, settings, narrow + wide, visit, [tally])
    return estimate_of(tally, products, settings, reason, "na-hutch++")


def _quadratic(products: Products, rows: Tensor) -> Tensor:
    """v'Av (K,) in float64 for rows v (K, P), in chunks."""
    return torch.cat([products.quadratic(part).double() for part in chunks_of(products, rows)])


def check_budget(method: str, num_matvecs: int, least: int) -> None:
    """Raise ValueError if the budget is too small for a method."""
    if num_matvecs < least:
        raise ValueError(f"{method} needs num_matvecs >= {least}; got {num_matvecs}")


def _basis(products: Products, settings: Settings, method: str) -> tuple[ProbeStream, Tensor]:
    """The probes, and a basis of the range of A T as rows (k, P), for a third of the products."""
    check_budget(method, settings.num_matvecs, 3)
    count = min(settings.num_matvecs // 3, products.size)
    products.check_room(count, 4, f"{method} keeps a basis")
    stream = probe_stream(products, settings, min(count, _PROJECTED))
    out = torch.empty(count, products.size, dtype=stream.dtype, device=products.device)
    return stream, orthonormal_rows(multiply(products, stream.chunks(count), out))[0]
