"""hvpfast: the functional layer on a named backend, and the differentiable penalty."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import hvpfast as hf
from hvpfast.backends import choose
from hvpfast.bench.cases import ADAM, PENALTY_WEIGHTS, PROBE_SEED, Array, Problem
from hvpfast.bench.providers import torch_common as common
from hvpfast.bench.providers.base import Prepared, Provider
from hvpfast.bench.providers.torch_eager import step_outputs
from hvpfast.bench.providers.torch_plain import flat_model, sequential_model
from hvpfast.utils import cuda_graph

RECORDED = ("cuda", "triton", "triton_tf32x3")  # backends whose work is timed as a CUDA graph too
# By operation; two layouts of the parameters where it is not among them.
FORMS = {
    "penalty": ("flat", "layers", "flat drawn"),
    "penalty_normal": ("flat drawn", "layers drawn", "flat given"),
    "train_step": ("flat rademacher fused", "flat normal fused"),
}
RECORDED_FORMS = {
    "hvp": ("flat captured",),
    "train_step": ("flat rademacher captured", "flat normal captured"),
}
AUTOGRAD_FORMS = {
    "penalty": ("MLP", "Sequential"),
    "penalty_normal": ("MLP drawn", "Sequential drawn"),
    "train_step": ("MLP rademacher fused", "Sequential rademacher fused", "MLP normal fused"),
}


def spec_of(problem: Problem) -> hf.MLPSpec:
    return hf.MLPSpec(problem.case.sizes, problem.case.activation)


def columns(rows: Array, device: str = "cpu") -> Tensor:
    """Tangents (P, K) whose transpose is contiguous, as ``hf.probes`` returns them."""
    return torch.tensor(rows, device=device).T


class Functional(Provider):
    """``hf.linearize`` and what follows it; no autograd.

    Forms: parameters ``flat`` (P,) or ``layers`` [W_1, b_1, ...]; ``drawn`` has the library draw
        the probes; ``captured`` replays a CUDA graph.
    """

    kind = "ours"

    def __init__(self, backend: str) -> None:
        self.backend, self.name = backend, f"ours-{backend}"

    def unavailable(self, device: str = "cpu") -> str | None:
        if reason := hf.available()[self.backend] or super().unavailable(device):
            return reason
        try:
            choose(self.backend, hf.MLPSpec((2, 2)), torch.device(device), torch.float32)
        except RuntimeError as error:
            return str(error)
        return None

    def forms(self, operation: str, num_tangents: int) -> tuple[str, ...]:
        recorded = RECORDED_FORMS.get(operation, ()) if self.backend in RECORDED else ()
        return (*FORMS.get(operation, ("flat", "layers")), *recorded)

    def prepare(self, form: str, operation: str, problem: Problem) -> Prepared:
        if operation == "train_step":
            return self._train_step(form, problem)
        params: Any = torch.tensor(problem.flat(), device=problem.device)
        if form.startswith("layers"):
            params = list(common.tensors(problem.params, problem.device))
        _, x, y = common.inputs(problem)
        spec, backend, K = spec_of(problem), self.backend, problem.num_tangents
        V = columns(problem.tangents(operation), problem.device)
        outputs = common.named_outputs(operation)
        if form.endswith("captured"):
            return Prepared(hf.CapturedHVP(spec, params, x, y, V, backend=backend), outputs)
        if operation == "hvp_warm":
            lin = hf.linearize(spec, params, x, y, backend=backend, order=2)
            return Prepared(lambda: hf.hvp(lin, V), outputs)

        def gradient() -> Any:
            lin = hf.linearize(spec, params, x, y, backend=backend, order=2)
            return lin.loss, lin.grad

        def hvp() -> Any:
            return hf.hvp(hf.linearize(spec, params, x, y, backend=backend, order=2), V)

        def quadratic() -> Any:
            lin = hf.linearize(spec, params, x, y, backend=backend, order=2)
            return hf.quadratic_form(lin, V)

        def given_penalty() -> Any:
            lin = hf.linearize(spec, params, x, y, backend=backend)
            return hf.penalty(lin, V, weights=PENALTY_WEIGHTS)

        normal = operation == "penalty_normal"
        distribution = "normal" if normal else "rademacher"
        seeds = iter(range(PROBE_SEED, 2**62)) if normal else None

        def drawn_penalty() -> Any:
            seed = PROBE_SEED if seeds is None else next(seeds)
            lin = hf.linearize(spec, params, x, y, backend=backend)
            return hf.penalty(
                lin, num_probes=K, distribution=distribution, seed=seed, weights=PENALTY_WEIGHTS
            )

        if form.endswith("drawn"):
            return Prepared(drawn_penalty, outputs, drawn=normal)
        calls = {"gradient": gradient, "hvp": hvp, "quadratic": quadratic}
        return Prepared(calls.get(operation, given_penalty), outputs)

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


class Autograd(Provider):
    """``hf.hessian_penalty(...)`` followed by ``backward()``, as a training loop has it.

    Forms: ``MLP`` is hvpfast.MLP with its one flat parameter, ``Sequential`` an ordinary module.
    """

    name = "ours-autograd"
    kind = "ours"

    def unavailable(self, device: str = "cpu") -> str | None:
        return hf.available()["cpu"] if device == "cpu" else super().unavailable(device)

    def forms(self, operation: str, num_tangents: int) -> tuple[str, ...]:
        return AUTOGRAD_FORMS.get(operation, ())

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
