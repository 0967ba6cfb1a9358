"""Orthonormal bases as rows (k, P), in passes over blocks of entries that stay in cache."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from hvpfast.analysis.estimators.sampling import rows_at_once
from hvpfast.analysis.estimators.tallies import blocks
from hvpfast.operators.matvecs import Products


def orthonormal_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return Q (k, P) with orthonormal rows and L (k, k) float64 such that Y = L Q.

    Twice the Cholesky factor of the Gram matrix, which is two passes of matrix products;
    Householder's QR where Y is too ill-conditioned for that.

    Args:
        rows: Y (k, P), k <= P, float32 or float64; overwritten.

    References:
        Yamamoto, Nakatsukasa, Yanagisawa, Fukaya (2015), Electron. Trans. Numer. Anal. 44.
    """
    size, entries = rows.shape
    eye = torch.eye(size, dtype=torch.float64, device=rows.device)
    total = eye
    for dtype in (torch.float64, rows.dtype):  # the first Gram matrix may be ill-conditioned
        gram = row_products(rows, rows, dtype)
        scale = gram.diagonal().sqrt()
        factor, failed = torch.linalg.cholesky_ex(gram / (scale[:, None] * scale))
        if int(failed) or not float(factor.diagonal().amin()) > 1e-6:
            basis, upper = torch.linalg.qr(rows.T)
            return basis.T.contiguous(), total @ upper.T.double()
        factor *= scale[:, None]
        inverse = torch.linalg.solve_triangular(factor, eye, upper=False).to(rows.dtype)
        for part in blocks(entries, size):
            rows[:, part] = inverse @ rows[:, part]
        total = total @ factor
    return rows, total


def row_products(rows: Tensor, others: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return the inner products (k, K) of rows (k, P) and (K, P), in float64.

    Blocks of entries are multiplied in ``dtype``, that of the rows if None, and summed in float64.
    """
    dtype = rows.dtype if dtype is None else dtype
    out = torch.zeros(len(rows), len(others), dtype=torch.float64, device=rows.device)
    for part in blocks(rows.shape[1], len(rows) + len(others)):
        block = rows[:, part].to(dtype)
        out += block @ (block if others is rows else others[:, part].to(dtype)).T
    return out


def project_out(rows: Tensor, basis: Tensor) -> Tensor:
    """Return (I - Q'Q) v for rows v (K, P) and a basis Q (k, P), in place."""
    coefficients = rows.new_zeros(len(rows), len(basis))
    for part in blocks(rows.shape[1], len(basis)):
        coefficients.addmm_(rows[:, part], basis[:, part].T)
    for part in blocks(rows.shape[1], len(basis)):
        rows[:, part].addmm_(coefficients, basis[:, part], alpha=-1)
    return rows


def multiply(products: Products, chunks: Iterable[Tensor], out: Tensor) -> Tensor:
    """Write A v (k, P) for the rows v of all chunks to ``out`` and return it."""
    at = 0
    for rows in chunks:
        out[at : at + len(rows)] = products.rows(rows)
        at += len(rows)
    return out


def chunks_of(products: Products, rows: Tensor) -> tuple[Tensor, ...]:
    """Return rows (k, P) in parts, as many at a time as are multiplied at once."""
    return torch.split(rows, rows_at_once(products))
