"""Eigenpairs of curvature operators, and linear systems with them."""

from hvpfast.analysis.eigen.cg import CGResult, cg_solve
from hvpfast.analysis.eigen.compression import CompressedOperator, NotCompressibleError, compress
from hvpfast.analysis.eigen.result import EigenResult
from hvpfast.analysis.eigen.solver import eigsh
from hvpfast.analysis.eigen.starts import class_gradients

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
