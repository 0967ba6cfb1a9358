"""Eigenpairs of curvature operators, and linear systems with them."""

from hvpfast.eigen.cg import CGResult, cg_solve
from hvpfast.eigen.compression import CompressedOperator, NotCompressibleError, compress
from hvpfast.eigen.result import EigenResult
from hvpfast.eigen.solver import eigsh
from hvpfast.eigen.starts import class_gradients

__all__ = [
    "CGResult",
    "CompressedOperator",
    "EigenResult",
    "NotCompressibleError",
    "cg_solve",
    "class_gradients",
    "compress",
    "eigsh",
]
