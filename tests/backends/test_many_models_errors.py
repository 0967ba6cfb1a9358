"""Many models at once: what is wrong is refused clearly, values with the model that has them."""

from __future__ import annotations

import pytest
import torch
from backends_here import BACKENDS
from many_models import Models, few, linearize
from torch import Tensor

import hvpfast as hf
from hvpfast.mlp.checks import check_models

on_each = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture
def q() -> Models:
    return few()


def test_samples_expanded_over_models_are_shared(q: Models) -> None:
    x, y = q.x[0].expand(3, -1, -1), q.y[0].expand(3, -1)
    assert [t.dim() for t in check_models(q.spec, q.params, x, y)] == [2, 1]
    assert [t.dim() for t in check_models(q.spec, q.params, q.x, q.y)] == [3, 2]


WRONG = [
    ({"params": torch.zeros(0, 39)}, ValueError, "no models"),
    ({"params": torch.zeros(39, 3)}, ValueError, r"Did you mean \.T"),
    ({"params": torch.zeros(3, 38)}, ValueError, r"must be \(M, 39\)"),
    ({"params": torch.zeros(39, 3).T}, ValueError, "must be contiguous"),
    ({"params": torch.zeros(3, 39, dtype=torch.int64)}, TypeError, "must be floating point"),
    ({"params": torch.zeros(2, 3, 39)}, ValueError, "flat tensor"),
    ({"x": torch.zeros(3, 6, 5)}, TypeError, "x must be torch.float64"),
    ({"x": [[1.0]]}, TypeError, "x and y must be tensors"),
    ({"x": torch.zeros(2, 6, 5).double()}, ValueError, r"x must be \(3, N, 5\)"),
    ({"x": torch.zeros(3, 6, 4).double()}, ValueError, r"x must be \(3, N, 5\)"),
    ({"x": torch.zeros(3, 6, 5, 1).double()}, ValueError, r"x must be \(3, N, 5\)"),
    ({"x": torch.zeros(5).double()}, ValueError, r"x must be \(3, N, 5\)"),
    ({"x": torch.zeros(3, 0, 5).double()}, ValueError, "batch is empty"),
    ({"y": torch.zeros(3, 6).double()}, TypeError, "must be torch.int64"),
    ({"y": torch.zeros(3, 5, dtype=torch.int64)}, ValueError, r"must be \(3, 6\), or \(6,\)"),
    ({"y": torch.zeros(6, 3, dtype=torch.int64)}, ValueError, r"must be \(3, 6\), or \(6,\)"),
    ({"order": 4}, ValueError, "order must be 2 or 3"),
    ({"backend": "gpu"}, ValueError, "backend must be"),
]


@pytest.mark.parametrize(("given", "error", "message"), WRONG)
def test_bad_arguments(
    q: Models, given: dict[str, object], error: type[Exception], message: str
) -> None:
    params = given.get("params", q.params)
    if isinstance(params, Tensor) and params.dtype == torch.float32:
        params = params.double() if params.is_contiguous() else params.T.double().T
    arguments = {"x": q.x, "y": q.y} | {k: v for k, v in given.items() if k != "params"}
    with pytest.raises(error, match=message):
        hf.linearize(q.spec, params, **arguments)


@pytest.mark.parametrize(
    ("tangents", "error", "message"),
    [
        (torch.zeros(39).double(), ValueError, r"tangents\.expand\(3, \*tangents\.shape\)"),
        (torch.zeros(39, 2).double(), ValueError, r"tangents\.expand\(3, \*tangents\.shape\)"),
        (torch.zeros(3, 2, 39).double(), ValueError, r"Did you mean \.transpose\(1, 2\)"),
        (torch.zeros(2, 39, 2).double(), ValueError, r"must be \(3, 39\) or \(3, 39, K\)"),
        (torch.zeros(3, 39), TypeError, "must be torch.float64"),
        ([0.0], TypeError, "must be a tensor"),
    ],
)
def test_bad_tangents(q: Models, tangents: Tensor, error: type[Exception], message: str) -> None:
    lin = hf.linearize(q.spec, q.params, q.x, q.y)
    good = q.tangents
    for call in (
        lambda: hf.hvp(lin, tangents),
        lambda: hf.ggnvp(lin, tangents),
        lambda: hf.quadratic_form(lin, tangents),
        lambda: hf.hvp_vjp(lin, tangents, good),
        lambda: hf.penalty(lin, tangents),
        lambda: hf.ModelsOperator(lin) @ tangents,
    ):
        with pytest.raises(error, match=message):
            call()
    with pytest.raises(error, match=message.replace("tangents", "cotangents")):
        hf.hvp_vjp(lin, good, tangents)


def test_misuse(q: Models) -> None:
    lin = hf.linearize(q.spec, q.params, q.x, q.y)
    with pytest.raises(ValueError, match="one shape, pair by pair"):
        hf.hvp_vjp(lin, q.tangents, q.tangents[:, :, :1])
    with pytest.raises(ValueError, match="one or more; got 0"):
        hf.penalty(lin, q.tangents[:, :, :0])
    with pytest.raises(ValueError, match="one or more; got 0"):
        hf.penalty(lin, num_probes=0)
    with pytest.raises(ValueError, match=r"more than the 2\*\*32 probes"):
        hf.penalty(lin, num_probes=2**31)
    with pytest.raises(NotImplementedError, match="one model at a time"):
        hf.penalty(lin, estimator="exact")
    with pytest.raises(RuntimeError, match="take one model"):
        lin.diagonal(False)
    with pytest.raises(ValueError, match="curvature must be"):
        hf.ModelsOperator(lin, "fisher")
    one = hf.linearize(q.spec, *q.alone(0))
    with pytest.raises(TypeError, match="parameters \\(M, P\\)"):
        hf.ModelsOperator(one)
    second = hf.linearize(q.spec, q.params, q.x, q.y, order=2)
    assert torch.equal(hf.hvp(second, q.tangents), hf.hvp(lin, q.tangents))
    for call in (lambda: hf.hvp_vjp(second, q.tangents, q.tangents), lambda: hf.penalty(second)):
        with pytest.raises(RuntimeError, match="order=2"):
            call()


def test_too_little_memory_is_explained(q: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    lin = linearize(q, "reference")

    def fail(*arguments: object) -> Tensor:
        raise MemoryError("std::bad_alloc")

    for name in ("hvp", "quadratic", "hvp_vjp", "penalty"):
        monkeypatch.setattr(lin.state, name, fail)
    for call in (
        lambda: hf.hvp(lin, q.tangents),
        lambda: hf.quadratic_form(lin, q.tangents),
        lambda: hf.hvp_vjp(lin, q.tangents, q.tangents),
        lambda: hf.penalty(lin, q.tangents),
        lambda: hf.penalty(lin, q.tangents, kind="trace"),
        lambda: hf.row_norms_sq(hf.ModelsOperator(lin), 2),
    ):
        with pytest.raises(MemoryError, match=r"3 models with 2 tangents of 39 .* fewer models"):
            call()


@on_each
@pytest.mark.parametrize("which", ["params", "x", "y"])
def test_changes_in_place_are_noticed(q: Models, backend: str, which: str) -> None:
    lin = linearize(q, backend)
    A = hf.ModelsOperator(lin)
    getattr(q, which)[1] += 1
    for call in (
        lambda: hf.hvp(lin, q.tangents),
        lambda: hf.quadratic_form(lin, q.tangents),
        lambda: hf.hvp_vjp(lin, q.tangents, q.tangents),
        lambda: hf.penalty(lin),
        lambda: lin.grad,
        lambda: hf.trace(A, 2),
        lambda: hf.diagonal(A, 2),
    ):
        with pytest.raises(RuntimeError, match="changed in place"):
            call()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # interpreted kernels meet NaN
@on_each
def test_wrong_values_name_the_model(q: Models, backend: str) -> None:
    def refused(params: Tensor, x: Tensor, y: Tensor, spec: hf.MLPSpec = q.spec) -> str:
        with pytest.raises(ValueError, match=r"model|labels|mean") as caught:
            hf.linearize(spec, params, x, y, backend=backend)
        return str(caught.value)

    params, x, y = q.params.clone(), q.x.clone(), q.y.clone()
    params[2, 7] = torch.nan
    message = refused(params, x, y)
    assert message.startswith("model 2: the loss is nan: params has 1 entries")
    assert "[7]" in message and "more of" not in message
    params[1, 3] = torch.nan
    message = refused(params, x, y)
    assert message.startswith("model 1: ") and "1 more of the 3 models" in message
    x[1, 4, 2] = torch.nan
    assert refused(q.params, x, y).startswith("model 1: the loss is nan: x has 1 entries")
    shared = refused(q.params, x[1], y)
    assert shared.startswith("model 0: the loss is nan") and "2 more of the 3" in shared
    y[2, 5] = 3
    assert "y[5] = 3" in (message := refused(q.params, q.x, y))
    assert message.startswith("model 2: labels must be in [0, 3)")
    assert refused(q.params, q.x, y[2]).startswith("labels must be in [0, 3)")
    y = q.y.clone()
    y[1] = -100
    message = refused(q.params, q.x, y)
    assert message.startswith("model 1: ") and "mean cross-entropy is undefined" in message
    assert "mean cross-entropy is undefined" in refused(q.params, q.x, y[1])
