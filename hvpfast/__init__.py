"""hvpfast: Hessian-vector products and curvature penalties of neural networks, fast."""

from hvpfast.backends import available
from hvpfast.checks import SlowBackendWarning
from hvpfast.differentiable import hessian_penalty
from hvpfast.functional import (
    Linearization,
    ggnvp,
    hvp,
    hvp_vjp,
    linearize,
    penalty,
    quadratic_form,
)
from hvpfast.mlp import MLP, MLPSpec, NotAnMLPError, params_of, spec_of
from hvpfast.operators import GGNOperator, HessianOperator
from hvpfast.probes import ProbeSource, fresh_seed, probes

__all__ = [
    "MLP",
    "GGNOperator",
    "HessianOperator",
    "Linearization",
    "MLPSpec",
    "NotAnMLPError",
    "ProbeSource",
    "SlowBackendWarning",
    "available",
    "fresh_seed",
    "ggnvp",
    "hessian_penalty",
    "hvp",
    "hvp_vjp",
    "linearize",
    "params_of",
    "penalty",
    "probes",
    "quadratic_form",
    "spec_of",
]
