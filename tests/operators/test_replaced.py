"""Parameters that were replaced by other objects: noticed, and taken up by refresh()."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from dense import classes, dense
from torch import Tensor, nn

import hvpfast as hf

pytestmark = [
    pytest.mark.usefixtures("single_threaded"),
    pytest.mark.filterwarnings("ignore::hvpfast.mlp.module_checks.SlowBackendWarning"),
]
LOSS = nn.CrossEntropyLoss()
KINDS = ["perceptron", "any module"]


def made(kind: str, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    activation = nn.Tanh() if kind == "perceptron" else nn.CELU()
    return nn.Sequential(nn.Linear(4, 5), activation, nn.Linear(5, 3)).double()


def load(model: nn.Sequential, kind: str) -> None:
    model.load_state_dict(made(kind, 1).state_dict(), assign=True)


def replace_layer(model: nn.Sequential, kind: str) -> None:
    model[2] = nn.Linear(5, 3).double()


def replace_parameter(model: nn.Sequential, kind: str) -> None:
    model[0].weight = nn.Parameter(torch.randn(5, 4).double())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", [load, replace_layer, replace_parameter])
@pytest.mark.parametrize("params", [None, "*weight"])
def test_replaced_parameters_are_noticed_and_taken_up(
    kind: str, change: Callable[[nn.Sequential, str], None], params: str | None
) -> None:
    model, (x, y) = made(kind), classes(7, 4)
    H = hf.HessianOperator(model, LOSS, params, (x, y), backend="auto")
    eye = torch.eye(H.shape[0]).double()
    before = H @ eye
    change(model, kind)
    with pytest.raises(RuntimeError, match=r"changed in place or replaced .* H.refresh\(\)"):
        H @ eye
    H.refresh()
    truth = dense(model, LOSS, x, y)
    if params is not None:
        names = [n for n, p in model.named_parameters() for _ in range(p.numel())]
        kept = torch.tensor(["weight" in name for name in names])
        truth = truth[kept][:, kept]
    torch.testing.assert_close(H @ eye, truth, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(before, truth)
    own = {id(p) for p in model.parameters()}
    assert all(id(entry.owner) in own for entry in H.entries)
    blocks = list(H.blocks())
    assert sum(block.shape[0] for block in blocks) == H.shape[0]


@pytest.mark.parametrize("kind", KINDS)
def test_another_network_needs_another_operator(kind: str) -> None:
    model, data = made(kind), classes(7, 4)
    H = hf.HessianOperator(model, LOSS, None, data)
    model[0], model[2] = nn.Linear(4, 6).double(), nn.Linear(6, 3).double()
    with pytest.raises(ValueError, match="make a new operator"):
        H.refresh()
    with pytest.raises(RuntimeError, match="refresh"):
        H @ torch.ones(H.shape[0]).double()


def test_another_activation_needs_another_operator() -> None:
    model, data = made("perceptron"), classes(7, 4)
    H = hf.HessianOperator(model, LOSS, None, data)
    model[1] = nn.ReLU()
    with pytest.raises(RuntimeError, match="changed in place or replaced"):
        H @ torch.ones(H.shape[0]).double()
    with pytest.raises(ValueError, match=r"relu.*make a new operator"):
        H.refresh()


def penalty_gradient(model: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
    model.zero_grad()
    _, penalty = hf.hessian_penalty(model, LOSS, data, seed=3)
    penalty.backward()
    return torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])


def reference_gradient(model: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
    """The same by torch's double backward."""
    params = [p for p in model.parameters() if p.requires_grad]
    v = hf.probes(sum(p.numel() for p in params), seed=3, dtype=torch.float64)[:, 0]
    gradient = torch.autograd.grad(LOSS(model(data[0]), data[1]), params, create_graph=True)
    flat = torch.cat([g.reshape(-1) for g in gradient])
    Hv = torch.autograd.grad(flat @ v, params, create_graph=True)
    penalty = torch.cat([h.reshape(-1) for h in Hv]).square().sum()
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(penalty, params)])


def tie(model: nn.Sequential) -> None:
    model[2].weight = model[0].weight


def drop_bias(model: nn.Sequential) -> None:
    model[0].bias = None


def make_buffer(model: nn.Sequential) -> None:
    weight = model[2].weight.detach()
    del model[2].weight
    model[2].register_buffer("weight", weight)


def make_tensor(model: nn.Sequential) -> None:
    bias = model[2].bias.detach()
    del model[2].bias
    model[2].bias = bias


def resize(model: nn.Sequential) -> None:
    model[0], model[2] = nn.Linear(4, 7).double(), nn.Linear(7, 4).double()


@pytest.mark.parametrize("change", [tie, drop_bias, make_buffer, make_tensor, resize])
def test_a_structure_that_changed_after_the_first_penalty(
    change: Callable[[nn.Sequential], None],
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    data = classes(6, 4)
    torch.testing.assert_close(penalty_gradient(model, data), reference_gradient(model, data))
    change(model)
    torch.testing.assert_close(penalty_gradient(model, data), reference_gradient(model, data))


class TwoNames(nn.Module):
    """One weight in two layers, and a layer used twice, under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.norm = nn.Sequential(nn.LayerNorm(4))
        self.again = self.norm[0]

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.second(torch.tanh(self.norm(self.first(x)))))


@pytest.mark.parametrize("make", [TwoNames, lambda: nn.Sequential(*2 * [nn.Linear(4, 4)])])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_modules_used_twice_keep_their_parameters(
    make: Callable[[], nn.Module], backend: str
) -> None:
    torch.manual_seed(0)
    model, data = make().double(), classes(6, 4)
    before = [(name, id(p)) for name, p in model.named_parameters(remove_duplicate=False)]
    torch.testing.assert_close(penalty_gradient(model, data), reference_gradient(model, data))
    H = hf.HessianOperator(model, LOSS, None, data, backend=backend)
    eye = torch.eye(H.shape[0]).double()
    truth = dense(copy.deepcopy(model), LOSS, *data)  # torch's call may damage a model
    torch.testing.assert_close(H @ eye, truth)
    hf.landscape.plane(model, LOSS, None, data, num_points=3, seed=0)
    H.refresh()
    assert [(name, id(p)) for name, p in model.named_parameters(remove_duplicate=False)] == before
