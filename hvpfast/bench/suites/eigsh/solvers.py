"""Solvers that the suite ``eigsh`` compares: from a trained network to k eigenpairs of its Hessian.

Every solver builds what it needs, operator, linearization or graph, and ends with eigenpairs.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.linalg
import scipy.sparse.linalg
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

import hvpfast as hf
from hvpfast.analysis.eigen.solver import eigsh
from hvpfast.bench.suites.eigsh.trained import Trained

TOL = 1e-4
SEED = 7
LOSS = nn.CrossEntropyLoss()

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Found:
    """What a solver gives; vectors are columns, (P, k)."""

    values: Array
    vectors: torch.Tensor
    num_matvecs: int
    note: str = ""


def ours(net: Trained, k: int, **options: Any) -> Found:
    """By hvpfast; an error where not all pairs converge."""
    H = hf.HessianOperator(net.model, LOSS, None, (net.x, net.y))
    result = eigsh(H, k, tol=TOL, seed=SEED, **options)
    if not bool(result.converged.all()):
        raise RuntimeError(result.message)
    note = f"block size {result.block_size}; {result.compressed or 'not compressed'}"
    return Found(result.eigenvalues.numpy(), result.eigenvectors, result.num_matvecs, note)


def _arpack(size: int, k: int, product: Callable[[Array], Array]) -> Found:
    count = 0

    def matvec(v: Array) -> Array:
        nonlocal count
        count += 1
        return product(v)

    v0 = np.random.default_rng(SEED).standard_normal(size).astype(np.float32)
    A = scipy.sparse.linalg.LinearOperator((size, size), matvec=matvec, dtype=np.float32)
    values, vectors = scipy.sparse.linalg.eigsh(A, k, which="LM", tol=TOL, v0=v0)
    order = np.argsort(-np.abs(values))
    columns = torch.from_numpy(np.ascontiguousarray(vectors[:, order]))
    return Found(values[order].astype(np.float64), columns, count, f"ncv {max(2 * k + 1, 20)}")


def _torch_arpack(net: Trained, k: int) -> Found:
    params = list(net.model.parameters())
    loss = F.cross_entropy(net.model(net.x), net.y)
    gradient = torch.autograd.grad(loss, params, create_graph=True)
    flat = torch.cat([g.reshape(-1) for g in gradient])

    def product(v: Array) -> Array:
        tangent = torch.from_numpy(np.ascontiguousarray(v, np.float32).reshape(-1))
        parts = torch.autograd.grad(flat, params, tangent, retain_graph=True)
        out: Array = torch.cat([p.reshape(-1) for p in parts]).numpy()
        return out

    return _arpack(len(flat), k, product)


def _curvlinops() -> Any:
    with warnings.catch_warnings():  # of packages that it imports
        warnings.simplefilter("ignore", DeprecationWarning)
        return importlib.import_module("curvlinops")


def _curvlinops_arpack(net: Trained, k: int) -> Found:
    curvlinops = _curvlinops()
    params = list(net.model.parameters())
    H = curvlinops.HessianLinearOperator(
        net.model, nn.CrossEntropyLoss(), params, [(net.x, net.y)], check_deterministic=False
    )
    exported = H.to_scipy(dtype=np.float32)
    with warnings.catch_warnings():  # of what torch imports for its first product
        warnings.simplefilter("ignore", DeprecationWarning)
        return _arpack(exported.shape[0], k, exported.matvec)


def solvers(net: Trained, k: int, compressed: bool) -> tuple[dict[str, Any], dict[str, str]]:
    """Solvers by name, "hvpfast" first, and why others cannot run.

    ``compressed``: whether hvpfast compresses the operator, so that it is also timed without.
    """
    calls: dict[str, Any] = {"hvpfast": lambda: ours(net, k)}
    if compressed:
        calls["hvpfast, compress=False"] = lambda: ours(net, k, compress=False)
    calls["scipy, torch"] = lambda: _torch_arpack(net, k)
    skipped = {}
    try:
        _curvlinops()
        calls["scipy, curvlinops"] = lambda: _curvlinops_arpack(net, k)
    except ImportError as error:
        skipped["scipy, curvlinops"] = f"curvlinops cannot be imported ({error})"
    return calls, skipped


def least_products(net: Trained, k: int) -> int:
    """Products until the k pairs converge by Lanczos with full orthogonalisation in float64.

    From the start vector of :func:`ours` without compression.
    """
    H = hf.HessianOperator(net.model, LOSS, None, (net.x, net.y))
    size = H.shape[0]
    Q = hf.probes(size, distribution="normal", seed=SEED).T.double().numpy()
    Q /= np.linalg.norm(Q)
    alpha, beta = list[float](), list[float]()
    for done in range(1, 100 * k):
        if len(Q) <= done:  # room for the next vectors
            Q = np.concatenate([Q, np.empty((done + k, size))])
        w = (H @ torch.from_numpy(Q[done - 1]).float()).double().numpy()
        alpha.append(float(w @ Q[done - 1]))
        for _ in range(2):
            w = w - Q[:done].T @ (Q[:done] @ w)
        beta.append(float(np.linalg.norm(w)))
        Q[done] = w / beta[-1]
        if done >= k:
            theta, S = scipy.linalg.eigh_tridiagonal(alpha, beta[:-1])
            top = np.argsort(-np.abs(theta))[:k]
            if (beta[-1] * np.abs(S[-1, top]) <= TOL * np.abs(theta[top])).all():
                return done
    raise RuntimeError("Lanczos did not converge")
