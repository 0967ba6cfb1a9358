"""Random probes from a counter-based generator: the same numbers for (seed, probe, entry) anywhere.

Philox4x32-10 maps a 128-bit counter and a 64-bit key to four 32-bit words w_0..w_3:

    key = (seed mod 2^32, seed div 2^32)       counter = (block mod 2^32, block div 2^32, probe, s)

Rademacher probes are stream s = 0: entry i is +1 where bit i mod 32 of word (i mod 128) div 32 of
block i div 128 is clear, -1 where it is set. Normal probes are stream s = 1: entries 0, 1 of block
i div 4 are the Box-Muller pair (cos, sin) of words 0, 1; entries 2, 3 that of words 2, 3.
Everything after the integers is float32 arithmetic in a fixed order without fused multiply-adds, so
that every implementation gives the same bits. float64 probes are the float32 numbers, cast.

References: Salmon, Moraes, Dror, Shaw (2011), doi:10.1145/2063384.2063405; the polynomials for log,
sine and cosine are those of Moshier's Cephes library (single precision).

source: probes described. numpy: the bits that the others must equal. torch, triton: the same on a
device. draw: the probes themselves, by the fastest of them that can run.
"""
