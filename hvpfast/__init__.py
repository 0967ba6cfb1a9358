"""hvpfast: Hessian-vector products, curvature estimates and penalties of neural networks, fast."""

from hvpfast import optim
from hvpfast.analysis import landscape
from hvpfast.analysis.density.quadrature import spectral_density
from hvpfast.analysis.density.spectrum import SpectralDensity
from hvpfast.analysis.eigen.cg import CGResult, cg_solve
from hvpfast.analysis.eigen.result import EigenResult
from hvpfast.analysis.eigen.solver import eigsh
from hvpfast.analysis.eigen.starts import class_gradients
from hvpfast.analysis.estimators.estimate import (
    diagonal,
    estimate_all,
    frobenius_norm,
    frobenius_sq,
    row_norms_sq,
    trace,
)
from hvpfast.analysis.estimators.many_models import ModelsEstimate
from hvpfast.analysis.estimators.result import Estimate, Estimates
from hvpfast.analysis.tracking.logger import CurvatureLogger, read_log
from hvpfast.backends import available
from hvpfast.backends.probes.draw import probes
from hvpfast.backends.probes.source import ProbeSource, fresh_seed
from hvpfast.functional.cuda_graphs import CapturedHVP, CapturedStep
from hvpfast.functional.hessian_penalty import hessian_penalty
from hvpfast.functional.linearization import Linearization
from hvpfast.functional.linearize import linearize
from hvpfast.functional.many_models import ModelsLinearization
from hvpfast.functional.penalty import penalty
from hvpfast.functional.products import (
    ggnvp,
    hvp,
    hvp_vjp,
    quadratic_form,
)
from hvpfast.mlp.module import MLP, NotAnMLPError, params_of, spec_of
from hvpfast.mlp.module_checks import SlowBackendWarning
from hvpfast.mlp.spec import MLPSpec
from hvpfast.operators.distributed import DistributedError, shard
from hvpfast.operators.hessian import GGNOperator, HessianOperator
from hvpfast.operators.many_models import ModelsOperator
from hvpfast.operators.matvecs import NonFiniteProductError

__all__ = [
    "MLP",
    "CGResult",
    "CapturedHVP",
    "CapturedStep",
    "CurvatureLogger",
    "DistributedError",
    "EigenResult",
    "Estimate",
    "Estimates",
    "GGNOperator",
    "HessianOperator",
    "Linearization",
    "MLPSpec",
    "ModelsEstimate",
    "ModelsLinearization",
    "ModelsOperator",
    "NonFiniteProductError",
    "NotAnMLPError",
    "ProbeSource",
    "SlowBackendWarning",
    "SpectralDensity",
    "available",
    "cg_solve",
    "class_gradients",
    "diagonal",
    "eigsh",
    "estimate_all",
    "fresh_seed",
    "frobenius_norm",
    "frobenius_sq",
    "ggnvp",
    "hessian_penalty",
    "hvp",
    "hvp_vjp",
    "landscape",
    "linearize",
    "optim",
    "params_of",
    "penalty",
    "probes",
    "quadratic_form",
    "read_log",
    "row_norms_sq",
    "shard",
    "spec_of",
    "spectral_density",
    "trace",
]
