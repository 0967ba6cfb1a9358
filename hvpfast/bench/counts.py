"""Multiply-adds (MAC) and bytes that an operation needs, per case: the yardstick of every time.

With m_l = N D[l-1] D[l] (one product of layer l), S = m_1 + ... + m_L, S' = S - m_1, and for the
widest layer gamma = N^2 D[1] (a product with the N x N Gram matrix of the inputs):

    gradient                  2 m_1 + 3 S'
    primal for products       m_1 + 2 S'                    once
    Hessian-vector product    2 m_1 + 6 S'                  per tangent
    v'Hv                      m_1 + 3 S'                    per tangent
    penalty gradient          2 m_1 + 6 S' once             + 3 m_1 + 16 S' per tangent
      with the Gram matrix    2 m_1 + 6 S' + N^2 D[0] / 2   + m_1 + gamma + 16 S' per tangent
      with implicit normals   the same once                 + 1.5 gamma + 16 S' per tangent

One MAC is two floating-point operations.  Elementwise work is not counted.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from hvpfast.bench.cases import Case


@dataclass(frozen=True)
class Macs:
    once: float
    per_tangent: float

    def total(self, num_tangents: int) -> float:
        return self.once + num_tangents * self.per_tangent


def schedules(case: Case, operation: str) -> dict[str, Macs]:
    """Every known schedule of an operation by name, first that of automatic differentiation.

    Raises:
        ValueError: the operation is unknown.
    """
    N, sizes = case.num_samples, case.sizes
    m = [float(N * d_in * d) for d_in, d in itertools.pairwise(sizes)]
    m_1, rest = m[0], sum(m[1:])
    gamma = float(N * N * sizes[1])
    gram = N * N * sizes[0] / 2.0
    hvp = Macs(m_1 + 2 * rest, 2 * m_1 + 6 * rest)
    if operation == "gradient":
        return {"reverse": Macs(2 * m_1 + 3 * rest, 0.0)}
    if operation == "hvp":
        return {"products": hvp}
    if operation == "hvp_warm":
        return {"products": Macs(0.0, hvp.per_tangent)}
    if operation == "quadratic":
        return {"products": hvp, "adjoint": Macs(hvp.once, m_1 + 3 * rest)}
    if operation in ("penalty", "penalty_normal", "train_step"):
        once = 2 * m_1 + 6 * rest
        found = {
            "products": Macs(once, 3 * m_1 + 16 * rest),
            "gram": Macs(once + gram, m_1 + gamma + 16 * rest),
        }
        if operation == "penalty_normal":
            found["implicit"] = Macs(once + gram, 1.5 * gamma + 16 * rest)
        return found
    raise ValueError(f"no operation count for {operation!r}")


def minimal(case: Case, operation: str, num_tangents: int) -> tuple[str, float]:
    """Name and MACs of the cheapest known schedule with K tangents."""
    totals = {name: macs.total(num_tangents) for name, macs in schedules(case, operation).items()}
    name = min(totals, key=totals.__getitem__)
    return name, totals[name]


def minimal_bytes(case: Case, operation: str, num_tangents: int, itemsize: int) -> float:
    """Bytes of inputs read once and results written once: the least traffic of a cold call."""
    inputs = case.num_params + case.num_samples * case.sizes[0]
    products = num_tangents * case.num_params
    given = 0 if operation in ("gradient", "penalty_normal") else products
    results = {"hvp": products, "hvp_warm": products, "quadratic": 0}
    written = results.get(operation, case.num_params)
    return float(itemsize * (inputs + given + written) + 8 * case.num_samples)
