"""Per-parameter learning rates from curvature, around any optimizer of torch.

    s_t     = beta s_{t-1} + (1 - beta) c_t^2        entry by entry, s_0 = 0
    scaled  = g_t / (sqrt(s_t) + eps)                what the base optimizer steps on

    curvature     c_t
    difference    g_t - g_{t-1}, gradients of consecutive steps: a gradient, not a curvature
    secant        y_t / x_t,  y_t = g(p_t) - g(p_{t-1}) on the batch of step t,  x_t = p_t - p_{t-1}
    hutchinson    v * (H v), one Rademacher probe v a step; E c_t^2 = |H e_i|^2
    exact         diag(H)

The secant's quotient has no finite mean where x_t crosses zero, so its two parts are averaged:
sqrt(s_t) = sqrt(mean y^2) / sqrt(mean x^2), with the same weights.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from hvpfast.backends.probes.source import fresh_seed
from hvpfast.optim import diagonals
from hvpfast.utils.choice import check_choice

CURVATURES = ("difference", "secant", "hutchinson", "exact")

_SETTINGS = ("curvature", "beta", "eps", "bias_correction", "seed", "num_steps")


class HessianLRAdaptation(Optimizer):
    """Wraps an optimizer: it steps on ``g / (sqrt(s) + eps)``, s a running mean of curvature^2.

    It is an optimizer itself: learning-rate schedulers, closures, parameter groups, hooks and
    ``state_dict`` (the base optimizer's is inside) work as usual. ``param_groups`` are the base
    optimizer's own. The base optimizer sees scaled gradients; ``.grad`` is restored. What the base
    adds to gradients by itself, such as Adam's ``weight_decay``, is not scaled.

    A step without curvature (the first, for "difference" and "secant") does not scale the gradient.
    Where the average vanishes, only ``|g| / eps`` bounds the quotient: "difference" takes ever
    larger steps where gradients stop changing.

    Args:
        base: any optimizer that evaluates no closure of its own (not LBFGS).
        curvature: "difference" (needs nothing more), "secant" (needs ``step(closure)``, evaluated
            twice), "hutchinson" or "exact" (need ``step(operator=H)``).
        beta: weight of the past in the running mean, in [0, 1).
        eps: added to sqrt(s).
        bias_correction: divide s by 1 - beta^t, so that early steps are not too long.
        seed: of the probes, in [0, 2**64); None takes fresh entropy.

    Attributes:
        base: the wrapped optimizer.
        state: per parameter ``s`` and what the next step needs.

    Raises:
        TypeError: base is no optimizer, or needs a closure.
        ValueError: an argument is out of range.

    Example:
        >>> optimizer = hf.optim.HessianLRAdaptation(torch.optim.Adam(model.parameters(), lr=3e-3))
        >>> loss_fn(model(x), y).backward()
        >>> optimizer.step()

    References:
        Yao et al. (2021), AdaHessian, arXiv:2006.00719, for the diagonal by Hutchinson's method.
    """

    def __init__(
        self,
        base: Optimizer,
        curvature: str = "difference",
        *,
        beta: float = 0.9,
        eps: float = 1e-8,
        bias_correction: bool = False,
        seed: int | None = None,
    ) -> None:
        if not isinstance(base, Optimizer):
            raise TypeError(f"base must be a torch.optim.Optimizer; got {type(base).__name__}")
        closure = inspect.signature(base.step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise TypeError(
                f"{type(base).__name__} evaluates closures inside its step, where gradients cannot "
                "be scaled; wrap an optimizer that steps on the gradients it is given"
            )
        check_choice("curvature", curvature, CURVATURES)
        if not 0 <= beta < 1:
            raise ValueError(f"beta must be in [0, 1); got {beta}")
        if not eps >= 0:
            raise ValueError(f"eps must be at least 0; got {eps}")
        super().__init__(base.param_groups, base.defaults)
        self.base = base
        self.param_groups = base.param_groups
        self.curvature, self.beta, self.eps = curvature, beta, eps
        self.bias_correction = bias_correction
        self.seed = fresh_seed() if seed is None else seed
        self.num_steps = 0

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, operator: Any = None) -> Any:
        """Take one step of the base optimizer on scaled gradients.

        Args:
            closure: clears the gradients, evaluates the loss, calls backward and returns the loss.
                With "secant" it is evaluated at the previous parameters too and must be
                deterministic; otherwise it is optional, as for any optimizer.
            operator: the Hessian of the batch, for "hutchinson" and "exact": a
                :class:`hvpfast.Linearization`, or an operator whose flat vector is this optimizer's
                parameters with a gradient, in the order of its groups.

        Returns:
            What the closure returned, or None.

        Raises:
            TypeError: the closure or operator that the curvature needs is missing, or one is given
                that it does not use; a gradient is sparse or complex.
            ValueError: the operator is one of other parameters.
        """
        if operator is not None and self.curvature not in ("hutchinson", "exact"):
            raise TypeError(f"curvature {self.curvature!r} uses no operator; leave it out")
        before = self._gradients_before(closure) if self.curvature == "secant" else {}
        with torch.enable_grad():
            loss = None if closure is None else closure()
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        for p in params:
            if p.grad.layout is not torch.strided or p.grad.is_complex():
                raise TypeError("gradients must be dense and real for HessianLRAdaptation")
        for p, c in self._signals(params, before, operator):
            state = self.state[p]
            if "s" not in state:
                state["s"], state["count"] = torch.zeros_like(p), 0
            state["s"].mul_(self.beta).addcmul_(c, c, value=1 - self.beta)
            state["count"] += 1
        self.num_steps += 1
        grads = [p.grad for p in params]
        try:
            for p in params:
                rms = self.rms_curvature(p)
                if rms is not None:
                    p.grad = p.grad / rms.add_(self.eps)
            self.base.step()
        finally:
            for p, grad in zip(params, grads, strict=True):
                p.grad = grad
        return loss

    def rms_curvature(self, param: Tensor) -> Tensor | None:
        """sqrt(s), shaped as the parameter, or None before there is any."""
        state = self.state.get(param, {})
        if "s" not in state:
            return None
        s: Tensor = state["s"]
        if self.curvature == "secant":
            # where nothing moved, no gradient changed either: 0 / tiny = 0
            s = s / state["x2"].clamp(min=torch.finfo(param.dtype).tiny)
        elif self.bias_correction:
            s = s / (1 - self.beta ** state["count"])
        return s.sqrt()

    def _signals(
        self, params: list[Tensor], before: dict[Tensor, Tensor], operator: Any
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (parameter, c_t) for those that have one now; for "secant" c_t is y_t."""
        if self.curvature in ("difference", "secant"):
            secant = self.curvature == "secant"
            for p in params:
                state, grad = self.state[p], p.grad
                assert grad is not None
                earlier = before.get(p) if secant else state.get("previous")
                if earlier is not None:
                    if secant:
                        x = p - state["previous"]
                        if "x2" not in state:
                            state["x2"] = torch.zeros_like(p)
                        state["x2"].mul_(self.beta).addcmul_(x, x, value=1 - self.beta)
                    yield p, grad - earlier
                now = p if secant else grad
                state.setdefault("previous", torch.empty_like(now)).copy_(now)
        elif params:
            diagonals.check_operator(operator, params, f"curvature {self.curvature!r}")
            if self.curvature == "hutchinson":
                found = diagonals.hutchinson(operator, params, self.seed, self.num_steps)
            else:
                found = diagonals.exact(operator, params)
            yield from zip(params, found, strict=True)

    def _gradients_before(self, closure: Callable[[], Any] | None) -> dict[Tensor, Tensor]:
        """The gradients of this step's closure at the parameters before the last step."""
        if closure is None:
            raise TypeError(
                'curvature "secant" evaluates the batch at two points: call step(closure) with a '
                "closure that clears the gradients, evaluates the loss, calls backward and "
                "returns the loss"
            )
        params = [p for group in self.param_groups for p in group["params"]]
        moved = [p for p in params if "previous" in self.state.get(p, {})]
        if not moved:
            return {}
        now = [p.detach().clone() for p in moved]
        try:
            for p in moved:
                p.copy_(self.state[p]["previous"])
            with torch.enable_grad():
                closure()
            return {p: p.grad.clone() for p in moved if p.grad is not None}
        finally:
            for p, value in zip(moved, now, strict=True):
                p.copy_(value)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base optimizer, whose groups these are."""
        if "base" in self.__dict__:
            self.base.add_param_group(param_group)
        else:  # called by Optimizer.__init__ for the base's groups
            super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """The running means, the settings and the base optimizer's ``state_dict``."""
        settings = {name: getattr(self, name) for name in _SETTINGS}
        return {**super().state_dict(), "adaptation": settings, "base": self.base.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a ``state_dict``: running means, settings and the base optimizer's state.

        Raises:
            ValueError: it is another optimizer's, or one of another curvature.
        """
        if "adaptation" not in state_dict or "base" not in state_dict:
            raise ValueError(
                "this is not the state_dict of a HessianLRAdaptation; load that of a plain "
                "optimizer into .base"
            )
        settings = state_dict["adaptation"]
        if settings["curvature"] != self.curvature:
            raise ValueError(
                f"the state_dict has curvature {settings['curvature']!r}, and this optimizer has "
                f"{self.curvature!r}; make it with the one of the state_dict"
            )
        super().load_state_dict(state_dict)
        self.base.load_state_dict(state_dict["base"])
        self.param_groups = self.base.param_groups
        for name in _SETTINGS:
            setattr(self, name, settings[name])

    def __getstate__(self) -> dict[str, Any]:
        settings = {name: getattr(self, name) for name in _SETTINGS}
        return {**super().__getstate__(), **settings, "base": self.base}

    def __repr__(self) -> str:
        return f"HessianLRAdaptation({self.curvature}, beta={self.beta}, base={self.base!r})"
