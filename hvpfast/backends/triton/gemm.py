"""Products that torch's GEMMs do faster than the fused kernels, and when that is.

The fused kernels save the memory traffic of an epilogue, and a launch. A vendor library reaches
more of the peak on large products, and splits long sums over multiprocessors that would be idle.
Products are left to torch in full precision only: never where TF32 is switched on. Of products in
tf32x3, whose peak is above that of full precision, only the long sums are left to torch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hvpfast.backends.triton.tiles import num_tiles, tile_of

# Estimates for an H100, not yet measured on a GPU.
LARGE_PRODUCT = 2**22  # multiply-adds of one product from which a library call is worth it
LARGE_WORK = 2**28  # multiply-adds of all of them from which the library's peak decides
LONG_SUM = 512  # terms from which a tile takes too long alone
FEW_TILES = 132  # tiles that leave multiprocessors idle


def torch_is_faster(
    rows: int, columns: int, depth: int, batch: int, like: Tensor, precision: str = "ieee"
) -> bool:
    """Whether ``batch`` products (rows, depth) (depth, columns) are left to torch."""
    product = rows * columns * depth
    if product < LARGE_PRODUCT or not full_precision(like):
        return False
    tiles = batch * num_tiles(rows, columns, tile_of(rows, columns, batch, largest=32))
    large = batch * product >= LARGE_WORK and precision == "ieee"
    return large or (depth > LONG_SUM and tiles < FEW_TILES)


def full_precision(like: Tensor) -> bool:
    """Whether torch multiplies in the precision of ``like``: float32 without TF32."""
    if like.dtype is torch.float64:
        return True
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # set through the newer of torch's two settings: TF32 in some place
        return False


def multiply_shared(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out[m, k] = a[m] b[m, k] for a (M, N, d) or (1, N, d), b (M, K, d, c), out (M, K, N, c)."""
    K = b.shape[1]
    for m in range(len(b)):
        torch.bmm(a[m % len(a)].expand(K, -1, -1), b[m], out=out[m])


def multiply_rows(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out[m, k] = a[m, k] b[m] for a (M, K, N, d), b (M, d, c), out (M, K, N, c): K N rows."""
    for m in range(len(a)):
        torch.mm(a[m].flatten(0, 1), b[m], out=out[m].flatten(0, 1))


def multiply_each(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out[m, k] = a[m, k] b[m, k] for a (M, K, N, d), b (M, K, d, c), out (M, K, N, c)."""
    for m in range(len(a)):
        torch.bmm(a[m], b[m], out=out[m])


def sum_over_samples(terms: list[tuple[Tensor, Tensor]], out: Tensor) -> None:
    """``out`` = sum over terms of A' B for rows A (n, d), B (n, c), out (d, c) contiguous."""
    for i, (a, b) in enumerate(terms):
        if i == 0:
            torch.mm(a.T, b, out=out)
        else:
            torch.addmm(out, a.T, b, out=out)
