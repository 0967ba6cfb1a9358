"""hvpfast: the functional layer on a named backend, and the differentiable penalty."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import hvpfast as hf
from hvpfast.backends import choose
from hvpfast.bench.cases import ADAM, PENALTY_WEIGHTS, PROBE_SEED, Array, Problem
from hvpfast.bench.providers import torch_common as common
from hvpfast.bench.providers.base import Prepared
from hvpfast.bench.providers.torch_eager import step_outputs
from hvpfast.bench.providers.torch_plain import flat_model, sequential_model
from hvpfast.utils import cuda_graph

RECORDED = ("cuda", "triton", "triton_tf32x3")  # backends whose work is timed as a CUDA graph too


def spec_of(problem: Problem) -> hf.MLPSpec:
    """The problem's network with mean cross-entropy."""
    return hf.MLPSpec(problem.case.sizes, problem.case.activation)


def columns(rows: Array, device: str = "cpu") -> Tensor:
    """Tangents (P, K) whose transpose is contiguous, as ``hf.probes`` returns them."""
    return torch.tensor(rows, device=device).T


def _outputs(operation: str) -> Callable[[Any], dict[str, Array]]:
    if operation in ("hvp", "hvp_warm"):
        return lambda out: {"hvp": np.ascontiguousarray(common.array(out).T)}
    names = {"quadratic": ("quadratic",), "gradient": ("loss", "gradient")}.get(
        operation, ("loss", "penalty", "gradient")
    )

    def named(out: Any) -> dict[str, Array]:
        values = (out,) if len(names) == 1 else out
        return {name: common.array(value) for name, value in zip(names, values, strict=True)}

    return named


class Functional:
    """``hf.linearize`` and what follows it; no autograd.

    Forms: parameters ``flat`` (P,) or ``layers`` [W_1, b_1, ...]; ``drawn`` has the library draw
        the probes; ``captured`` replays a CUDA graph.
    """

    kind = "ours"

    def __init__(self, backend: str) -> None:
        self.backend, self.name = backend, f"ours-{backend}"

    def unavailable(self, device: str = "cpu") -> str | None:
        reason = hf.available().get(self.backend, f"there is no backend {self.backend!r}")
        reason = reason or common.no_device(device)
        if reason is not None:
            return reason
        try:
            choose(self.backend, hf.MLPSpec((2, 2)), torch.device(device), torch.float32)
        except RuntimeError as error:
            return str(error)
        return None

    def forms(self, operation: str, num_tangents: int) -> tuple[str, ...]:
        forms = self._plain_forms(operation)
        if self.backend not in RECORDED:
            return forms
        if operation == "train_step":
            return (*forms, "flat rademacher captured", "flat normal captured")
        return (*forms, "flat captured") if operation == "hvp" else forms

    def _plain_forms(self, operation: str) -> tuple[str, ...]:
        if operation == "penalty":
            return ("flat", "layers", "flat drawn")
        if operation == "penalty_normal":
            return ("flat drawn", "layers drawn", "flat given")
        if operation == "train_step":
            return ("flat rademacher fused", "flat normal fused")
        return ("flat", "layers")

    def prepare(self, form: str, operation: str, problem: Problem) -> Prepared:
        if operation == "train_step":
            return self._train_step(form, problem)
        params: Any = torch.tensor(problem.flat(), device=problem.device)
        if form.startswith("layers"):
            params = list(common.tensors(problem.params, problem.device))
        _, x, y = common.inputs(problem)
        spec, backend = spec_of(problem), self.backend
        V = columns(problem.tangents(operation), problem.device)
        call: Callable[[], Any]
        if form.endswith("captured"):
            return Prepared(
                hf.CapturedHVP(spec, params, x, y, V, backend=backend), _outputs(operation)
            )
        if operation == "gradient":

            def call() -> Any:
                lin = hf.linearize(spec, params, x, y, backend=backend, order=2)
                return lin.loss, lin.grad

        elif operation == "hvp":

            def call() -> Any:
                return hf.hvp(hf.linearize(spec, params, x, y, backend=backend, order=2), V)

        elif operation == "hvp_warm":
            lin = hf.linearize(spec, params, x, y, backend=backend, order=2)

            def call() -> Any:
                return hf.hvp(lin, V)

        elif operation == "quadratic":

            def call() -> Any:
                lin = hf.linearize(spec, params, x, y, backend=backend, order=2)
                return hf.quadratic_form(lin, V)

        else:
            return self._penalty(form, operation, problem, params, x, y, V)
        return Prepared(call, _outputs(operation))

    def _penalty(
        self,
        form: str,
        operation: str,
        problem: Problem,
        params: Any,
        x: Tensor,
        y: Tensor,
        V: Tensor,
    ) -> Prepared:
        spec, backend, K = spec_of(problem), self.backend, problem.num_tangents
        if not form.endswith("drawn"):

            def given() -> Any:
                lin = hf.linearize(spec, params, x, y, backend=backend)
                return hf.penalty(lin, V, weights=PENALTY_WEIGHTS)

            return Prepared(given, _outputs(operation))
        normal = operation == "penalty_normal"
        distribution = "normal" if normal else "rademacher"
        seeds = iter(range(PROBE_SEED, 2**62)) if normal else None

        def drawn() -> Any:
            seed = PROBE_SEED if seeds is None else next(seeds)
            lin = hf.linearize(spec, params, x, y, backend=backend)
            return hf.penalty(
                lin, num_probes=K, distribution=distribution, seed=seed, weights=PENALTY_WEIGHTS
            )

        return Prepared(drawn, _outputs(operation), drawn=normal)

    def _train_step(self, form: str, problem: Problem) -> Prepared:
        """The penalised gradient written to ``.grad`` of the one flat parameter, then Adam."""
        model = flat_model(problem)
        _, x, y = common.inputs(problem)
        spec, backend, K = spec_of(problem), self.backend, problem.num_tangents
        captured, distribution = form.endswith("captured"), form.split(" ")[1]
        optimizer = torch.optim.Adam([model.flat], fused=True, capturable=captured, **ADAM)
        seeds = iter(range(PROBE_SEED, 2**62))
        restore = common.restorer((model.flat,))
        if captured:
            recorded = hf.CapturedStep(
                spec, model.flat, optimizer, x, y, num_probes=K, distribution=distribution,
                seed=PROBE_SEED, weights=PENALTY_WEIGHTS, backend=backend,
            )  # fmt: skip

            for _ in range(cuda_graph.WARMUPS + 1):  # ordinary steps, and the one recorded
                recorded()
            restore()
            for state in optimizer.state[model.flat].values():
                state.zero_()
            recorded.seek(0)

            def replay() -> Any:
                recorded()
                return (model.flat,)

            return Prepared(replay, step_outputs, distribution == "normal", restore)

        def step() -> Any:
            lin = hf.linearize(spec, model.flat, x, y, backend=backend)
            _, _, model.flat.grad = hf.penalty(
                lin,
                num_probes=K,
                distribution=distribution,
                seed=next(seeds),
                weights=PENALTY_WEIGHTS,
            )
            optimizer.step()
            return (model.flat,)

        return Prepared(step, step_outputs, distribution == "normal", restore)


class Autograd:
    """``hf.hessian_penalty(...)`` followed by ``backward()``, as a training loop has it.

    Forms: ``MLP`` is hvpfast.MLP with its one flat parameter, ``Sequential`` an ordinary module.
    """

    name = "ours-autograd"
    kind = "ours"

    def unavailable(self, device: str = "cpu") -> str | None:
        if not hasattr(hf, "hessian_penalty"):
            return "this version of hvpfast has no hessian_penalty"
        return hf.available()["cpu"] if device == "cpu" else common.no_device(device)

    def forms(self, operation: str, num_tangents: int) -> tuple[str, ...]:
        if operation == "penalty":
            return ("MLP", "Sequential")
        if operation == "penalty_normal":
            return ("MLP drawn", "Sequential drawn")
        if operation == "train_step":
            return ("MLP rademacher fused", "Sequential rademacher fused", "MLP normal fused")
        return ()

    def prepare(self, form: str, operation: str, problem: Problem) -> Prepared:
        model: nn.Module = (
            flat_model(problem) if form.startswith("MLP") else sequential_model(problem)
        )
        params = tuple(model.parameters())
        _, x, y = common.inputs(problem)
        criterion, K = nn.CrossEntropyLoss(), problem.num_tangents
        normal = operation == "penalty_normal" or "normal" in form
        distribution = "normal" if normal else "rademacher"
        fixed = operation == "penalty"
        seeds = iter(range(PROBE_SEED, 2**62))

        def backward() -> Any:
            loss, penalty = hf.hessian_penalty(
                model,
                criterion,
                (x, y),
                num_probes=K,
                distribution=distribution,
                seed=PROBE_SEED if fixed else next(seeds),
                backend="cpu" if problem.device == "cpu" else "auto",
            )
            total: Any = PENALTY_WEIGHTS[0] * loss + PENALTY_WEIGHTS[1] * penalty
            total.backward()
            return loss, penalty

        if operation == "train_step":
            optimizer = torch.optim.Adam(params, fused=True, **ADAM)

            def step() -> Any:
                optimizer.zero_grad(set_to_none=True)
                backward()
                optimizer.step()
                return params

            return Prepared(step, step_outputs, normal, common.restorer(params))

        def call() -> Any:
            for p in params:
                p.grad = None
            loss, penalty = backward()
            return loss, penalty, tuple(p.grad for p in params)

        return Prepared(call, common.named_outputs(operation), drawn=normal)
