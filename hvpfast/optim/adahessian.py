"""AdaHessian: Adam with Hutchinson's diagonal of the Hessian in place of the gradient.

m_t = b1 m_{t-1} + (1 - b1) g_t          D_t = v * (H v), one Rademacher probe v a step
w_t = b2 w_{t-1} + (1 - b2) D_t^2
p_t = p_{t-1} - lr (m_t / (1 - b1^t)) / (sqrt(w_t / (1 - b2^t)) + eps)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

from hvpfast.backends.probes.source import fresh_seed
from hvpfast.optim import diagonals


class AdaHessian(Optimizer):
    """AdaHessian for dense layers, whose diagonal is not averaged over blocks of parameters.

    Args:
        params: as for any optimizer.
        lr: learning rate.
        betas: weights of the past (b1, b2) in the two running means, each in [0, 1).
        eps: added to the denominator.
        weight_decay: decoupled: parameters shrink by lr * weight_decay a step.
        seed: of the probes, in [0, 2**64); None takes fresh entropy.

    Raises:
        ValueError: an argument is out of range.

    References:
        Yao, Gholami, Shen, Mustafa, Keutzer, Mahoney (2021), arXiv:2006.00719.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        seed: int | None = None,
    ) -> None:
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if not value >= 0:
                raise ValueError(f"{name} must be at least 0; got {value}")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must be in [0, 1); got {betas}")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)
        self.seed = fresh_seed() if seed is None else seed
        self.num_steps = 0

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, operator: Any = None) -> Any:
        """Take one step; ``operator`` is the Hessian of the batch, as in HessianLRAdaptation.

        Returns:
            What the closure returned, or None.

        Raises:
            TypeError: there is no operator.
            ValueError: the operator is one of other parameters.
        """
        with torch.enable_grad():
            loss = None if closure is None else closure()
        pairs = [(g, p) for g in self.param_groups for p in g["params"] if p.grad is not None]
        params = [p for _, p in pairs]
        if not params:
            return loss
        diagonals.check_operator(operator, params, "AdaHessian")
        found = diagonals.hutchinson(operator, params, self.seed, self.num_steps)
        self.num_steps += 1
        for (group, p), diagonal in zip(pairs, found, strict=True):
            state, (b1, b2) = self.state[p], group["betas"]
            if not state:
                state["count"] = 0
                state["m"], state["w"] = torch.zeros_like(p), torch.zeros_like(p)
            state["count"] += 1
            state["m"].lerp_(p.grad, 1 - b1)
            state["w"].mul_(b2).addcmul_(diagonal, diagonal, value=1 - b2)
            p.mul_(1 - group["lr"] * group["weight_decay"])
            root = math.sqrt(1 - b2 ** state["count"])
            denominator = (state["w"].sqrt() / root).add_(group["eps"])
            rate = group["lr"] / (1 - b1 ** state["count"])
            p.addcdiv_(state["m"], denominator, value=-rate)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The running means, and the position in the stream of probes."""
        return {**super().state_dict(), "probes": (self.seed, self.num_steps)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a ``state_dict``."""
        super().load_state_dict(state_dict)
        self.seed, self.num_steps = state_dict["probes"]

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "seed": self.seed, "num_steps": self.num_steps}
