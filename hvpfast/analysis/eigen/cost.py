"""The block size of Lanczos that takes the fewest operations, by counts.

    n(b) (product + basis + call / b)        n(b) = n(1) (1 + GROWTH (b - 1)) products

product: operations of one product with one vector. basis: those of a pass over a basis of 2 k rows
on average, which a block does not save. call: operations that the machine could do during the fixed
time of the calls of one step. Counts, unlike clocks, make the same choice in every run.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from torch import Tensor

from hvpfast.operators.base import Affine
from hvpfast.operators.hessian import CurvatureOperator
from hvpfast.operators.matvecs import Products
from hvpfast.operators.objective import MLPObjective

GROWTH = 0.2  # products that every further vector of a block costs, relative
CALL_OPERATIONS = {"cpu": 1e7, "cuda": 1e9}
SIZES = (1, 2, 4, 8)


def auto_block_size(products: Products, k: int) -> int:
    """The block size with the least estimate, at most k; 1 where a product's cost is not known."""
    product = product_operations(products.operator)
    if product is None:
        return 1
    call = CALL_OPERATIONS.get(products.device.type, CALL_OPERATIONS["cuda"])
    basis = 2.0 * 2 * 2 * k * products.size

    def estimate(b: int) -> float:
        return (1 + GROWTH * (b - 1)) * (product + basis + call / b)

    return min((b for b in SIZES if b <= k), key=estimate)


def product_operations(operator: Any) -> float | None:
    """Floating-point operations of one product; None where they are not known."""
    if isinstance(operator, Affine):
        return product_operations(operator.operand)
    if isinstance(operator, (Tensor, np.ndarray)):
        return 2.0 * operator.shape[0] ** 2
    linearized = operator.linearized if isinstance(operator, CurvatureOperator) else None
    if linearized is None or not isinstance(linearized.objective, MLPObjective):
        return None
    first, *rest = (d_in * d for d_in, d in itertools.pairwise(linearized.objective.spec.sizes))
    # 2 m_1 + 6 sum_{l > 1} m_l multiply-adds, m_l = N D[l-1] D[l]
    return 2.0 * linearized.batches.num_samples * (2 * first + 6 * sum(rest))
