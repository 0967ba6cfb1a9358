"""A plain, unpenalised training step in torch with Adam, in the settings that can be fastest."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import nn

from hvpfast.bench.cases import ADAM, Problem
from hvpfast.bench.providers import torch_common as common
from hvpfast.bench.providers.base import Prepared, Provider
from hvpfast.bench.providers.torch_compile import own_code
from hvpfast.bench.providers.torch_eager import step_outputs
from hvpfast.mlp.module import MLP

_OPTIMIZERS: dict[str, dict[str, Any]] = {
    "foreach": {"foreach": True},
    "fused": {"fused": True},
    "single": {"foreach": False, "fused": False},
}
_MODULES = {"relu": nn.ReLU, "sigmoid": nn.Sigmoid}


class TorchPlain(Provider):
    """zero_grad, forward, cross-entropy, backward, Adam step; nothing penalised."""

    name = "torch-plain"
    kind = "plain"

    def forms(self, operation: str, num_tangents: int) -> tuple[str, ...]:
        if operation != "train_step":
            return ()
        sequential = tuple(f"Sequential {o}" for o in _OPTIMIZERS)
        return (*sequential, "flat MLP fused", "flat MLP single", "compiled Sequential fused")

    def prepare(self, form: str, operation: str, problem: Problem) -> Prepared:
        _, x, y = common.inputs(problem)
        model = flat_model(problem) if form.startswith("flat") else sequential_model(problem)
        params = tuple(model.parameters())
        optimizer = torch.optim.Adam(params, **_OPTIMIZERS[form.rsplit(" ", 1)[1]], **ADAM)
        criterion = nn.CrossEntropyLoss()

        def loss() -> Any:
            return criterion(model(x), y)

        if form.startswith("compiled"):
            loss = torch.compile(own_code(loss), fullgraph=True, dynamic=False)

        def step() -> Any:
            optimizer.zero_grad(set_to_none=True)
            loss().backward()
            optimizer.step()
            return params

        return Prepared(step, step_outputs)


def sequential_model(problem: Problem) -> nn.Sequential:
    sizes, layers = problem.case.sizes, list[nn.Module]()
    values = common.tensors(problem.params, problem.device)
    for i, (d_in, d) in enumerate(itertools.pairwise(sizes)):
        linear = nn.Linear(d_in, d, dtype=values[0].dtype, device=problem.device)
        linear.weight, linear.bias = nn.Parameter(values[2 * i]), nn.Parameter(values[2 * i + 1])
        layers += [linear, _MODULES[problem.case.activation]()]
    return nn.Sequential(*layers[:-1])


def flat_model(problem: Problem) -> MLP:
    model = MLP(
        problem.case.sizes,
        problem.case.activation,
        dtype=getattr(torch, problem.dtype),
        generator=torch.Generator(),
    )
    with torch.no_grad():
        model.flat.copy_(torch.tensor(problem.flat()))
    return model.to(problem.device)
