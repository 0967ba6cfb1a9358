"""Tiles: which part of an output a program computes, and the sum of products in it."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

DEPTH = tl.constexpr(16)  # of one step of a sum, the least of tl.dot


class Tile(NamedTuple):
    """Shape of the tiles of an output and the warps that share one."""

    rows: int
    columns: int
    num_warps: int


_WHOLE_DEVICE = 264  # programs that keep an H100 (132 multiprocessors) busy


def tile_of(rows: int, columns: int, batch: int, largest: int) -> Tile:
    """The tile for ``batch`` outputs (rows, columns), of at most ``largest`` rows and columns.

    It exceeds 32 only where there are enough such tiles to keep the device busy.
    """
    side = largest
    if batch * triton.cdiv(rows, 64) * triton.cdiv(columns, 64) < _WHOLE_DEVICE:
        side = min(32, largest)
    # tl.dot takes powers of two from 16 on
    tile_rows = min(side, max(16, triton.next_power_of_2(rows)))
    tile_columns = min(side, max(16, triton.next_power_of_2(columns)))
    return Tile(tile_rows, tile_columns, 8 if tile_rows * tile_columns == 64 * 64 else 4)


def num_tiles(rows: int, columns: int, tile: Tile) -> int:
    """Tiles of one output (rows, columns)."""
    return int(triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns))


@triton.jit
def own_tile(rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """This program's (index in the batch, row numbers (ROWS,), column numbers (COLUMNS,))."""
    program = tl.program_id(0)
    column_tiles = tl.cdiv(columns, COLUMNS)
    row_tiles = tl.cdiv(rows, ROWS)
    column = program % column_tiles
    row = program // column_tiles % row_tiles
    batch = program // (column_tiles * row_tiles)
    return (
        batch.to(tl.int64),
        row * ROWS + tl.arange(0, ROWS),
        column * COLUMNS + tl.arange(0, COLUMNS),
    )


@triton.jit
def own_entries(rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """:func:`own_tile`, the numbers of its entries in the output, and which entries there are."""
    batch, i, j = own_tile(rows, columns, ROWS, COLUMNS)
    at = i.to(tl.int64)[:, None] * columns + j[None, :]
    return batch, i, j, at, (i[:, None] < rows) & (j[None, :] < columns)


@triton.jit
def add_product(
    sum, a, a_row, a_depth, b, b_depth, b_column, rows, columns, i, j, depth,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """``sum`` + A B for rows i, columns j: A[i, d] at a + i a_row + d a_depth, B[d, j] likewise."""
    inner = tl.arange(0, DEPTH)
    a_tile = a + i.to(tl.int64)[:, None] * a_row + inner[None, :] * a_depth
    b_tile = b + inner[:, None] * b_depth + j.to(tl.int64)[None, :] * b_column
    for start in range(0, depth, DEPTH):
        left = depth - start
        a_part = tl.load(a_tile, mask=(i[:, None] < rows) & (inner[None, :] < left), other=0.0)
        b_part = tl.load(b_tile, mask=(inner[:, None] < left) & (j[None, :] < columns), other=0.0)
        sum = tl.dot(a_part, b_part, sum, input_precision=PRECISION, out_dtype=sum.dtype)
        a_tile += DEPTH * a_depth
        b_tile += DEPTH * b_depth
    return sum


@triton.jit
def load_sums(sums, num_sums, sums_t, at, inside, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The sum of ``num_sums`` terms, ``sums_t`` apart, that torch computed."""
    total = tl.zeros((ROWS, COLUMNS), sums.dtype.element_ty)
    for _ in range(num_sums):
        total += tl.load(sums + at, mask=inside, other=0.0)
        sums += sums_t
    return total
