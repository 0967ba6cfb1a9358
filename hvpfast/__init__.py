"""hvpfast: Hessian-vector products, curvature estimates and penalties of neural networks, fast."""

from hvpfast import landscape, optim
from hvpfast.backends import available
from hvpfast.checks import SlowBackendWarning
from hvpfast.density import SpectralDensity, spectral_density
from hvpfast.differentiable import hessian_penalty
from hvpfast.distributed import DistributedError, shard
from hvpfast.eigen import CGResult, EigenResult, cg_solve, class_gradients, eigsh
from hvpfast.estimators import (
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
from hvpfast.functional import (
    ggnvp,
    hvp,
    hvp_vjp,
    linearize,
    penalty,
    quadratic_form,
)
from hvpfast.graphs import CapturedHVP, CapturedStep
from hvpfast.linearization import Linearization
from hvpfast.mlp import MLP, MLPSpec, NotAnMLPError, params_of, spec_of
from hvpfast.models import ModelsLinearization, ModelsOperator
from hvpfast.operators import GGNOperator, HessianOperator
from hvpfast.probes import ProbeSource, fresh_seed, probes
from hvpfast.products import NonFiniteProductError
from hvpfast.tracking import CurvatureLogger, read_log

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
