"""hvpfast: Hessian-vector products, curvature estimates and penalties of neural networks, fast."""

from hvpfast import optim
from hvpfast.analysis import landscape
from hvpfast.analysis.density.quadrature import SpectralDensity, spectral_density
from hvpfast.analysis.eigen import CGResult, EigenResult, cg_solve, class_gradients, eigsh
from hvpfast.analysis.estimators import (
    Estimate,
    Estimates,
    ModelsEstimate,
    diagonal,
    estimate_all,
    frobenius_norm,
    frobenius_sq,
    row_norms_sq,
    trace,
)
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
from hvpfast.mlp.module import MLP, MLPSpec, NotAnMLPError, params_of, spec_of
from hvpfast.mlp.module_checks import SlowBackendWarning
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
