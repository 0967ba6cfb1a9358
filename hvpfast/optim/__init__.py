"""Optimizers that scale steps by curvature: real ``torch.optim.Optimizer`` classes."""

from hvpfast.optim.adahessian import AdaHessian
from hvpfast.optim.adaptation import CURVATURES, HessianLRAdaptation

__all__ = ["CURVATURES", "AdaHessian", "HessianLRAdaptation"]
