"""The public estimators: checks, choice of the method, one table of methods per quantity."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hvpfast.analysis.estimators import deflated, exact, hutchinson, leave_one_out, many_models
from hvpfast.analysis.estimators.result import Estimate, Estimates
from hvpfast.analysis.estimators.sampling import Settings
from hvpfast.operators.many_models import ModelsOperator
from hvpfast.operators.matvecs import Products
from hvpfast.utils.choice import check_choice

_Method = Callable[[Products, Settings], Estimate[Any]]
# Besides "hutchinson", "exact" and "auto", which every quantity has.
_METHODS: dict[str, dict[str, _Method]] = {
    "trace": {
        "hutch++": deflated.hutch_plus_plus,
        "na-hutch++": deflated.na_hutch_plus_plus,
        "xtrace": leave_one_out.xtrace,
    },
    "frobenius_sq": {"deflated": deflated.deflated_frobenius_sq},
    "diagonal": {"xdiag": leave_one_out.xdiag},
    "row_norms_sq": {},
}


def trace(
    A: Any,
    num_matvecs: int = 100,
    *,
    method: str = "hutchinson",
    distribution: str = "rademacher",
    seed: int | None = None,
    rtol: float | None = None,
    confidence: float = 0.95,
    max_matvecs: int | None = None,
    progressbar: bool = False,
) -> Estimate[float]:
    """Trace tr A of a symmetric operator A (P, P).

    Methods: ``"hutchinson"``, the mean of v'Av, which takes quadratic forms at half the price of
    products where the operator has them; ``"hutch++"`` and ``"na-hutch++"``, which treat a
    dominant subspace exactly, ``"xtrace"``, which does so with every probe left out in turn: better
    where few eigenvalues dominate, at the price of num_matvecs / 3 to 3/2 num_matvecs vectors in
    memory; ``"exact"``, from per-sample Hessian cores where the operator has them and from P
    products otherwise; ``"auto"``, exact if that is cheaper than the budget, else hutchinson.

    Args:
        A: has ``.shape`` and ``@`` on columns (P, K): an operator of this library, of SciPy or of
            others, a matrix of torch or NumPy. A :class:`hvpfast.ModelsOperator` (M, P, P) takes
            ``"hutchinson"`` and gives a :class:`hvpfast.ModelsEstimate`, M in front; then
            num_matvecs counts the products of each model, and all models reach a tolerance.
        num_matvecs: products to spend; with ``rtol``, before the tolerance is first checked. Two
            more test the symmetry of an operator not known to be symmetric, if the method needs it.
        method: see above.
        distribution: of the probes: ``"rademacher"`` (entries +-1), ``"normal"`` (or
            ``"gaussian"``), ``"sphere"`` (normal, scaled to length sqrt(P)).
        seed: of the probes, in [0, 2**64); None takes fresh entropy. It is in the result.
        rtol: stop when |estimate - truth| <= rtol |truth| with probability ``confidence``, over all
            checks together; for P numbers in Euclidean norms. Not for xtrace and xdiag.
        confidence: of the tolerance, in (0, 1).
        max_matvecs: largest number of products, with ``rtol`` (None for 100 num_matvecs) and for
            exact values by identity columns (None for 20,000).
        progressbar: show one.

    Returns:
        The estimate with its standard error: ``float(result)``, ``result.ci(0.95)``.

    Raises:
        ValueError: an argument is out of range; A is not symmetric, where the method needs that.
        TypeError: A is not an operator, or a count is not an integer.
        MemoryError: what the method keeps does not fit.
        NonFiniteProductError: a product holds NaN or infinity.

    References:
        Hutchinson (1990), doi:10.1080/03610919008812866; Meyer, Musco, Musco, Woodruff (2021),
        doi:10.1137/1.9781611976496.16; Epperly, Tropp, Webber (2024), doi:10.1137/23M1548323.
    """
    given = Settings.of(num_matvecs, distribution, seed, rtol, confidence, max_matvecs, progressbar)
    return _one(A, "trace", method, given)


def frobenius_sq(
    A: Any,
    num_matvecs: int = 100,
    *,
    method: str = "hutchinson",
    distribution: str = "rademacher",
    seed: int | None = None,
    rtol: float | None = None,
    confidence: float = 0.95,
    max_matvecs: int | None = None,
    progressbar: bool = False,
) -> Estimate[float]:
    """Squared Frobenius norm ||A||_F^2 = tr A^2 of a symmetric operator, without bias.

    Methods: ``"hutchinson"``, the mean of ||Av||^2; ``"deflated"``, which treats a dominant
    subspace exactly on both sides; ``"exact"``; ``"auto"``. Arguments, results and errors are those
    of :func:`trace`.
    """
    given = Settings.of(num_matvecs, distribution, seed, rtol, confidence, max_matvecs, progressbar)
    return _one(A, "frobenius_sq", method, given)


def frobenius_norm(
    A: Any,
    num_matvecs: int = 100,
    *,
    method: str = "hutchinson",
    distribution: str = "rademacher",
    seed: int | None = None,
    rtol: float | None = None,
    confidence: float = 0.95,
    max_matvecs: int | None = None,
    progressbar: bool = False,
) -> Estimate[float]:
    """Frobenius norm ||A||_F: the root of :func:`frobenius_sq`, with its arguments.

    The root of an unbiased estimate is biased downwards, by about stderr^2 / (2 estimate). The
    standard error is that of the square over 2 estimate, and ``rtol`` is that of the norm.
    """
    given = Settings.of(num_matvecs, distribution, seed, rtol, confidence, max_matvecs, progressbar)
    if rtol is not None:  # |a/b - 1| <= rtol where |a^2/b^2 - 1| <= 2 rtol - rtol^2
        given = dataclasses.replace(given, rtol=rtol * (2 - rtol))
    square = _one(A, "frobenius_sq", method, given)
    root = square.estimate**0.5
    if isinstance(square, many_models.ModelsEstimate):
        stderr = torch.where(root > 0, square.stderr / (2 * root), square.stderr)
    else:
        stderr = square.stderr / (2 * root) if root > 0 else square.stderr
    return dataclasses.replace(square, estimate=root, stderr=stderr, samples=None)


def diagonal(
    A: Any,
    num_matvecs: int = 100,
    *,
    method: str = "hutchinson",
    distribution: str = "rademacher",
    seed: int | None = None,
    rtol: float | None = None,
    confidence: float = 0.95,
    max_matvecs: int | None = None,
    progressbar: bool = False,
) -> Estimate[Tensor]:
    """Diagonal of a symmetric operator, (P,).

    Methods: ``"hutchinson"``, the mean of v * Av; ``"xdiag"``; ``"exact"``; ``"auto"``. Arguments,
    results and errors are those of :func:`trace`.
    """
    given = Settings.of(num_matvecs, distribution, seed, rtol, confidence, max_matvecs, progressbar)
    return _one(A, "diagonal", method, given)


def row_norms_sq(
    A: Any,
    num_matvecs: int = 100,
    *,
    method: str = "hutchinson",
    distribution: str = "rademacher",
    seed: int | None = None,
    rtol: float | None = None,
    confidence: float = 0.95,
    max_matvecs: int | None = None,
    progressbar: bool = False,
) -> Estimate[Tensor]:
    """Squared Euclidean norms of the rows of a symmetric operator, (P,); they sum to ||A||_F^2.

    Methods: ``"hutchinson"``, the mean of (Av)^2; ``"exact"``; ``"auto"``. Arguments, results and
    errors are those of :func:`trace`.
    """
    given = Settings.of(num_matvecs, distribution, seed, rtol, confidence, max_matvecs, progressbar)
    return _one(A, "row_norms_sq", method, given)


def estimate_all(
    A: Any,
    num_matvecs: int = 100,
    *,
    method: str = "hutchinson",
    distribution: str = "rademacher",
    seed: int | None = None,
    rtol: float | None = None,
    confidence: float = 0.95,
    max_matvecs: int | None = None,
    progressbar: bool = False,
) -> Estimates:
    """Trace, squared Frobenius norm, diagonal and squared row norms from the same products.

    Methods: ``"hutchinson"``, ``"exact"``, ``"auto"``. With ``rtol`` all four reach the tolerance.
    Arguments and errors are those of :func:`trace`.
    """
    given = Settings.of(num_matvecs, distribution, seed, rtol, confidence, max_matvecs, progressbar)
    return Estimates(**_several(A, tuple(_METHODS), method, given))


def _one(A: Any, quantity: str, method: str, settings: Settings) -> Estimate[Any]:
    if isinstance(A, ModelsOperator):
        return many_models.estimate(A, settings, (quantity,), method)[quantity]
    special = _METHODS[quantity].get(method)
    if special is not None:
        products = Products(A)
        return special(products, _agreed(products, settings))
    check_choice("method", method, ("hutchinson", *_METHODS[quantity], "exact", "auto"))
    return _several(A, (quantity,), method, settings)[quantity]


def _agreed(products: Products, settings: Settings) -> Settings:
    """The settings with the same seed in all processes that hold parts of the operator."""
    return dataclasses.replace(settings, seed=products.agreed(settings.seed))


def _several(
    A: Any, wanted: Sequence[str], method: str, settings: Settings
) -> dict[str, Estimate[Any]]:
    check_choice("method", method, ("hutchinson", "exact", "auto"))
    if isinstance(A, ModelsOperator):
        return dict(many_models.estimate(A, settings, wanted, method))
    products = Products(A)
    settings = _agreed(products, settings)
    if method == "auto":
        method = "exact" if exact.is_cheaper(products, settings, wanted) else "hutchinson"
    if method == "exact":
        return exact.estimate(products, settings, wanted)
    return hutchinson.estimate(products, settings, wanted)
