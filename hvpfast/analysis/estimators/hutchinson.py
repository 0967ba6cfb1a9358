"""Plain Monte Carlo over isotropic probes, E vv' = I.

    tr A        = E v'Av            ||A||_F^2  = E ||Av||^2
    diag A      = E v * Av          ||A_i||^2  = E (Av)_i^2        for every row i

References: Girard (1989), doi:10.1007/BF01395775; Hutchinson (1990), doi:10.1080/03610919008812866;
Bekas, Kokiopoulou, Saad (2007), doi:10.1016/j.apnum.2007.01.003.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from hvpfast.analysis.estimators.result import Estimate, skewness_coefficients
from hvpfast.analysis.estimators.sampling import ProbeStream, Settings, probe_stream, sample
from hvpfast.analysis.estimators.tallies import EntryTally, ScalarTally, Tally
from hvpfast.operators.matvecs import Products

POSITIVE = ("frobenius_sq", "row_norms_sq")
SCALARS = ("trace", "frobenius_sq")
_BLOCK = 2**14  # entries whose squares are summed in the dtype of a row


class RowProducts(Protocol):
    """Products with one matrix for rows (k, P), or with those of many models for rows (M, k, P)."""

    num_matvecs: int
    dtype: torch.dtype
    device: torch.device

    def rows(self, rows: Tensor) -> Tensor:
        """A v for every row v, shaped as the rows."""

    def quadratic(self, rows: Tensor) -> Tensor:
        """v'Av for every row v, (k,) or (M, k)."""


def estimate(
    products: Products, settings: Settings, wanted: Sequence[str]
) -> dict[str, Estimate[Any]]:
    """Return estimates of the wanted quantities by name, from the same products."""
    tallies, reason = sampled(products, probe_stream(products, settings), settings, wanted)
    return {
        name: estimate_of(tally, products, settings, reason, "hutchinson")
        for name, tally in tallies.items()
    }


def sampled(
    products: RowProducts, stream: ProbeStream, settings: Settings, wanted: Sequence[str]
) -> tuple[dict[str, Tally], str]:
    """Return samples of the wanted quantities by name, and the reason to stop.

    For the trace alone quadratic forms are taken: half the price where the operator has them.
    """
    scalars = {name: ScalarTally(name in POSITIVE) for name in wanted if name in SCALARS}
    entries = {
        name: EntryTally(stream.shape, products.device, name in POSITIVE)
        for name in wanted
        if name not in SCALARS
    }
    tallies: dict[str, Tally] = {**scalars, **entries}

    def visit(rows: Tensor) -> None:
        if list(wanted) == ["trace"]:
            scalars["trace"].add(products.quadratic(rows))
            return
        out, count = products.rows(rows).to(stream.dtype), rows.shape[-2]
        if "trace" in scalars:
            scalars["trace"].add(torch.linalg.vecdot(rows, out))
        if "frobenius_sq" in scalars:
            lengths_sq = norms_sq(out.reshape(-1, out.shape[-1]))
            scalars["frobenius_sq"].add(lengths_sq.view(out.shape[:-1]))
        if "diagonal" in entries:
            entries["diagonal"].add(lambda part: rows[..., part] * out[..., part], count)
        if "row_norms_sq" in entries:
            entries["row_norms_sq"].add(lambda part: out[..., part].square(), count)

    reason = sample(stream, settings, 0, visit, list(tallies.values()))
    return tallies, reason


def estimate_of(
    tally: Tally, products: Products, settings: Settings, reason: str, method: str
) -> Estimate[Any]:
    """Return the mean of independent samples as an estimate."""
    mean, stderr = (float(t) if t.dim() == 0 else t.to(products.dtype) for t in tally.moments())
    samples = tally.samples() if isinstance(tally, ScalarTally) else None
    return Estimate[Any](
        estimate=mean,
        stderr=stderr,
        samples=samples,
        num_matvecs=products.num_matvecs,
        stop_reason=reason,
        seed=settings.seed,
        method=method,
        dof=tally.count - 1,
        positive=tally.positive,
        skew=(0.0, 0.0) if samples is None else skewness_coefficients(samples, tally.positive),
    )


def norms_sq(rows: Tensor) -> Tensor:
    """Squared lengths (K,) of rows (K, P): blocks summed in their dtype, the sums in float64."""
    whole = rows.shape[1] // _BLOCK * _BLOCK
    total: Tensor = torch.linalg.vector_norm(rows[:, whole:], dim=1).double().square()
    if whole:
        blocks = rows[:, :whole].reshape(len(rows), -1, _BLOCK)
        total += torch.linalg.vector_norm(blocks, dim=2).double().square().sum(1)
    return total
