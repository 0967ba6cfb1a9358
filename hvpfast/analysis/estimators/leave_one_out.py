"""XTrace and XDiag: every probe is in the sketch, and samples what the sketch of the others leaves.

For probes w_i, Y = A [w_1 ... w_n] and Q_i an orthonormal basis of Y without its column i,

    t_i = tr Q_i'AQ_i + w_i' R_i A R_i w_i         R_i = I - Q_i Q_i'                  (XTrace)
    t_i = diag(Q_i Q_i'A) + w_i * (R_i A w_i)                                          (XDiag)

are unbiased given the other probes, and their mean is the estimate. With Y = Q L' and the unit
vector s_i along L^-1 e_i, Q_i Q_i' = Q (I - s_i s_i') Q': no t_i takes a product of its own.

The t_i are correlated. Let t_i^j be t_i without w_j in its sketch: it does not depend on w_j. With
d = t - (truth), the means of d_i and d_i^j given all probes but w_i vanish, so that

    E d_i d_j = E (t_i - t_i^j)(t_j - t_j^i),      Var mean(t) = E [s^2 / n + c]

with the sample variance s^2 of the t_i and the mean c of (t_i - t_i^j)(t_j - t_j^i) over i != j.
This estimate of the variance is unbiased; s^2 / n alone is often half of it. A negative c is noise
and counts as 0.

References: Epperly, Tropp, Webber (2024), doi:10.1137/23M1548323.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hvpfast.analysis.estimators.deflated import check_budget
from hvpfast.analysis.estimators.result import Estimate
from hvpfast.analysis.estimators.sampling import ProbeStream, Settings, probe_stream
from hvpfast.analysis.estimators.subspace import chunks_of, multiply, orthonormal_rows, row_products
from hvpfast.analysis.estimators.tallies import blocks
from hvpfast.operators.matvecs import Products

_SOME = 16  # entries from which the ratio of variances is estimated
_BLOCK = 2**18  # numbers in a temporary array


@dataclass(frozen=True)
class _Sketch:
    """Rows Omega, Q, Z = A Q (n, P); small matrices (n, n) in float64, columns per probe.

    L: Y = L Q. S: the s_i. ZO = Z Omega'. G: S'S with zeros on the diagonal; ``rest``: the inverse
    length of the part of s_j orthogonal to s_i, at [i, j], 0 where there is none.
    """

    probes: Tensor
    Q: Tensor
    Z: Tensor
    L: Tensor
    S: Tensor
    ZO: Tensor
    G: Tensor
    rest: Tensor


def _sketch(products: Products, settings: Settings, stream: ProbeStream, method: str) -> _Sketch:
    if settings.rtol is not None:
        raise ValueError(f"{method} has a fixed budget: give num_matvecs, or another method")
    if products.size < 2:
        raise ValueError(f"{method} leaves probes out in turn and needs P >= 2; got P = 1")
    products.check_symmetric()
    check_budget(method, settings.num_matvecs, 4)
    count = min(settings.num_matvecs // 2, products.size)
    products.check_room(count, 4, f"{method} keeps its probes, their products and a basis")
    probes = stream.rows(count)
    Y = multiply(products, chunks_of(products, probes), torch.empty_like(probes))
    Q, L = orthonormal_rows(Y)
    Z = multiply(products, chunks_of(products, Q), torch.empty_like(Q))
    pivots = L.diagonal().abs()
    if float(pivots.amin()) > count * 2.3e-16 * float(pivots.amax()):
        eye = torch.eye(count, dtype=L.dtype, device=L.device)
        S = torch.linalg.solve_triangular(L, eye, upper=False)
        S = S / S.norm(dim=0)
    else:  # the products of the others span all of Y: no direction is lost with any one of them
        S = torch.zeros_like(L)
    G = (S.T @ S).fill_diagonal_(0)
    sine_sq = 1 - G.square()
    rest = torch.where(sine_sq > 1e-10, sine_sq.rsqrt(), 0.0).fill_diagonal_(0)
    ZO = row_products(Z, probes)
    return _Sketch(probes, Q, Z, L, S, ZO, G, rest)


def xtrace(products: Products, settings: Settings) -> Estimate[float]:
    """Return tr A from num_matvecs / 2 probes and as many products with the basis."""
    stream = probe_stream(products, settings)
    k = _sketch(products, settings, stream, "xtrace")
    n, S, ZO, G, rest = len(k.L), k.S, k.ZO, k.G, k.rest
    T, W = row_products(k.Z, k.Q), row_products(k.Q, k.probes)
    # w_i = Q W_i + w_i_perp;  U_i = Q A w_i_perp;  q_i = w_i_perp' A w_i_perp
    U = ZO - T @ W
    q = (k.L @ W).diagonal() - 2 * (W * ZO).sum(0) + (W * (T @ W)).sum(0)
    lengths = torch.linalg.vector_norm(k.probes, dim=1, dtype=torch.float64).square()
    perp = lengths - W.square().sum(0)
    TS = T @ S
    sTs, sU, sW = (S * TS).sum(0), (S * U).sum(0), (S * W).sum(0)
    rotated = settings.distribution != "rademacher"

    def value(trace: Tensor, form: Tensor, length_sq: Tensor, dropped: int) -> Tensor:
        if rotated:  # the direction of R w is uniform and independent of its length
            form = form * ((products.size - n + dropped) / length_sq)
        return trace + form

    trace = T.trace() - sTs
    form = q + 2 * sU * sW + sTs * sW.square()
    length_sq = perp + sW.square()
    t = value(trace, form, length_sq, 1)
    # at [i, j]: the same without d too, the unit vector along s_j - (s_i's_j) s_i
    dW = ((S.T @ W).T - G * sW[:, None]) * rest
    dU = ((S.T @ U).T - G * sU[:, None]) * rest
    sTS = S.T @ TS
    dTd = (sTs - 2 * G * sTS + G.square() * sTs[:, None]) * rest.square()
    sTd = (sTS - G * sTs[:, None]) * rest
    fewer = value(
        trace[:, None] - dTd,
        form[:, None] + 2 * dU * dW + 2 * sW[:, None] * dW * sTd + dW.square() * dTd,
        length_sq[:, None] + dW.square(),
        2,
    )
    change = torch.where(rest > 0, t[:, None] - fewer, 0.0)
    covariance = float((change * change.T).sum()) / (n * (n - 1))
    spread = float(t.var()) / n
    return Estimate(
        estimate=float(t.mean()),
        stderr=math.sqrt(max(spread, spread + covariance)),
        samples=t.cpu(),
        num_matvecs=products.num_matvecs,
        stop_reason="budget",
        seed=settings.seed,
        method="xtrace",
        dof=n - 1,
    )


def xdiag(products: Products, settings: Settings) -> Estimate[Tensor]:
    """Return diag A (P,) from num_matvecs / 2 probes and as many products with the basis.

    The ratio of the variance to s^2 / n is assumed to be the same for all entries, and is estimated
    from the sums of both over some of them.
    """
    if settings.distribution != "rademacher":
        raise ValueError(
            "xdiag needs entries with w_i^2 = 1: distribution='rademacher'; "
            f"got {settings.distribution!r}"
        )
    stream = probe_stream(products, settings)
    k = _sketch(products, settings, stream, "xdiag")
    n = len(k.L)
    dtype = stream.dtype
    lost = k.S.T.to(dtype)  # Q's_i and Z's_i are rows of lost @ Q and lost @ Z
    # w_i * (R_i A w_i) = w_i * Q'(column i of L' - ZO + s_i s_i' ZO)
    residual = (k.L - k.ZO.T + (k.S * k.ZO).sum(0)[:, None] * k.S.T).to(dtype)
    estimate = torch.empty(products.size, dtype=torch.float64, device=products.device)
    spread = torch.empty_like(estimate)
    for part in blocks(products.size, n):
        Q, Z = k.Q[:, part], k.Z[:, part]
        t = k.probes[:, part] * (residual @ Q) - (lost @ Q) * (lost @ Z)
        estimate[part] = (Q * Z).sum(0) + t.mean(0)
        spread[part] = t.var(0) / n
    entries = torch.linspace(
        0, products.size - 1, min(_SOME, products.size), dtype=torch.float64, device="cpu"
    ).long()
    entries = entries.to(products.device)
    some = float(spread[entries].sum())
    ratio = 1 + _covariance(k, entries) / some if some > 0 else 1.0
    return Estimate(
        estimate=estimate.to(products.dtype),
        stderr=(max(ratio, 1.0) * spread).sqrt().to(products.dtype),
        samples=None,
        num_matvecs=products.num_matvecs,
        stop_reason="budget",
        seed=settings.seed,
        method="xdiag",
        dof=n - 1,
    )


def _covariance(k: _Sketch, entries: Tensor) -> float:
    """The mean over i != j of (t_i - t_i^j)(t_j - t_j^i), summed over some entries of XDiag."""
    n = len(k.L)
    Q, Z, probes = (rows[:, entries].double() for rows in (k.Q, k.Z, k.probes))
    A, B, sZO = k.S.T @ Q, k.S.T @ Z, k.S.T @ k.ZO
    own = sZO.diagonal()
    total = 0.0
    step = max(1, _BLOCK // (n * len(entries)))
    for start in range(0, n, step):  # arrays [i, j, entry]
        i = slice(start, start + step)
        g, r = k.G[i, :, None], k.rest[i, :, None]
        # t_i loses d = r (s_j - g s_i) too: Q'd * (w_i d'ZO_i - Z'd); and t_j loses r (s_i - g s_j)
        dZO, eZO = sZO.T[i] - k.G[i] * own[i, None], sZO[i] - k.G[i] * own
        Ai, Bi = A[i, None], B[i, None]
        mine = (A - g * Ai) * (probes[i, None] * dZO[..., None] - (B - g * Bi))
        theirs = (Ai - g * A) * (probes * eZO[..., None] - (Bi - g * B))
        total += float((mine * theirs * r**4).sum())
    return total / (n * (n - 1))
