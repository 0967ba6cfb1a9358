"""Bad input: the error says what was expected, what came and what to do."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from cases import Case, problem
from torch import Tensor

import hvpfast as hf

RUNNING = [name for name, reason in hf.available().items() if reason is None]
backends = pytest.mark.parametrize("backend", RUNNING)
SPEC = hf.MLPSpec((5, 4, 3), "relu")
MSE = hf.MLPSpec((5, 4, 1), "tanh", "mse")
P = SPEC.num_params


def _tensors() -> dict[str, object]:
    q = problem(Case(SPEC, 6))
    return {"spec": SPEC, "params": q.flat, "x": q.x, "y": q.y}


def _layers(change: Callable[[list[Tensor]], object]) -> list[Tensor]:
    layers = [t.clone() for t in SPEC.unflatten(problem(Case(SPEC, 6)).flat)]
    change(layers)
    return layers


X = problem(Case(SPEC, 6)).x
FLAT = problem(Case(SPEC, 6)).flat

BAD_INPUT: list[tuple[str, dict[str, object], type[Exception], str]] = [
    ("flat length", {"params": FLAT[:-1]}, ValueError, rf"flat tensor \({P},\).*got \({P - 1},\)"),
    ("flat 2-d", {"params": FLAT[:, None]}, ValueError, rf"got \({P}, 1\)"),
    ("flat strided", {"params": torch.stack([FLAT, FLAT], 1)[:, 0]}, ValueError, "contiguous"),
    ("integers", {"params": FLAT.long()}, TypeError, "params must be floating point"),
    ("numpy", {"params": FLAT.numpy()}, TypeError, "got ndarray"),
    ("module", {"params": torch.nn.Linear(5, 3)}, TypeError, "hf.params_of"),
    ("no layers", {"params": []}, ValueError, r"params must have the shapes .* got \(\)"),
    ("too few", {"params": _layers(lambda t: t.pop())}, ValueError, "params must have the shapes"),
    (
        "layer shape",
        {"params": _layers(lambda t: t.__setitem__(0, t[0].T.contiguous()))},
        ValueError,
        r"params must have the shapes \(\(4, 5\).*got \(\(5, 4\)",
    ),
    (
        "layer strides",
        {"params": _layers(lambda t: t.__setitem__(0, t[0].T.contiguous().T))},
        ValueError,
        "0.weight has strides",
    ),
    (
        "layer dtype",
        {"params": _layers(lambda t: t.__setitem__(3, t[3].float()))},
        TypeError,
        "1.bias is torch.float32",
    ),
    ("x dtype", {"x": X.float()}, TypeError, "x must be torch.float64.*Convert it"),
    ("x integers", {"x": X.long()}, TypeError, "x must be torch.float64"),
    ("x numpy", {"x": X.numpy()}, TypeError, "x and y must be tensors; got ndarray and Tensor"),
    ("x device", {"x": X.to("meta")}, TypeError, "x must be torch.float64 on cpu.*on meta"),
    ("x transposed", {"x": X.T}, ValueError, r"x must be \(N, 5\).*got \(5, 6\). Did you mean x.T"),
    ("x width", {"x": X[:, :4]}, ValueError, r"got \(6, 4\)"),
    ("one sample", {"x": X[0]}, ValueError, r"got \(5,\). For one sample pass x\[None\]"),
    ("images", {"x": X.reshape(3, 2, 5)}, ValueError, r"got \(3, 2, 5\)"),
    ("empty", {"x": X[:0], "y": torch.zeros(0).long()}, ValueError, "batch is empty"),
    ("labels dtype", {"y": torch.zeros(6).int()}, TypeError, "torch.int64 on cpu; got torch.int32"),
    (
        "probabilities",
        {"y": torch.zeros(6, 3).double()},
        TypeError,
        "targets y must be torch.int64",
    ),
    ("labels shape", {"y": torch.zeros(6, 1).long()}, ValueError, r"\(6,\) .* got \(6, 1\)"),
    ("labels N", {"y": torch.zeros(5).long()}, ValueError, r"must be \(6,\) for x \(6, 5\)"),
    ("labels high", {"y": torch.tensor([0, 1, 3, 0, 0, 9])}, ValueError, r"y\[2\] = 3"),
    ("labels low", {"y": torch.tensor([0, 1, 2, 0, -1, 9])}, ValueError, r"y\[4\] = -1"),
    (
        "mse targets",
        {"spec": MSE, "params": FLAT[: MSE.num_params].clone(), "y": torch.zeros(6).double()},
        ValueError,
        r"got \(6,\). Did you mean y\[:, None\]",
    ),
    (
        "mse dtype",
        {"spec": MSE, "params": FLAT[: MSE.num_params].clone(), "y": torch.zeros(6, 1)},
        TypeError,
        "mse targets y must be torch.float64",
    ),
    ("order", {"order": 4}, ValueError, "order must be 2 or 3; got 4"),
    ("backend", {"backend": "gpu"}, ValueError, "backend must be one of auto, cpu, .*reference"),
]


@pytest.mark.parametrize(
    ("change", "error", "message"), [row[1:] for row in BAD_INPUT], ids=[r[0] for r in BAD_INPUT]
)
@backends
def test_linearize_rejects(
    backend: str, change: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        hf.linearize(**{**_tensors(), "backend": backend, **change})  # type: ignore[arg-type]


@backends
def test_label_messages_are_the_same_everywhere(backend: str) -> None:
    arguments = {**_tensors(), "y": torch.tensor([0, 1, 2, 0, 7, 9]), "backend": backend}
    message = r"labels must be in \[0, 3\) or equal ignore_index=-100; got y\[4\] = 7"
    with pytest.raises(ValueError, match=message):
        hf.linearize(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("activation", ["relu", "sigmoid", "tanh", "gelu", "silu", "softplus"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@backends
def test_not_finite_numbers_are_named(
    backend: str, dtype: torch.dtype, value: float, activation: str
) -> None:
    """NaN anywhere reaches the loss, through every activation, and the error says where it is."""
    spec = hf.MLPSpec((5, 4, 3), activation)
    q = problem(Case(spec, 6, dtype=dtype))
    finite = value == value
    for index in (0, 21, spec.num_params - 1):  # a weight and a bias of layer 1, the last bias
        if finite and index < spec.num_params - 1:
            continue  # an infinite hidden input may well give a finite loss
        params = q.flat.clone()
        params[index] = value
        message = rf"the loss is .*params has 1 entries that are NaN or inf.*at \[{index}\]"
        with pytest.raises(ValueError, match=message):
            hf.linearize(spec, params, q.x, q.y, backend=backend)
    if not finite:
        layers = [t.clone() for t in spec.unflatten(q.flat)]
        layers[2][1, 3] = value
        with pytest.raises(ValueError, match=r"params 1.weight has 1 .* at \[1, 3\]"):
            hf.linearize(spec, layers, q.x, q.y, backend=backend)
        x = q.x.clone()
        x[4, 2] = value
        with pytest.raises(ValueError, match=r"x has 1 entries .* at \[4, 2\]"):
            hf.linearize(spec, q.flat, x, q.y, backend=backend)


@backends
def test_not_finite_targets_and_overflow(backend: str) -> None:
    q = problem(Case(MSE, 6, dtype=torch.float32))
    y = q.y.clone()
    y[3] = torch.nan
    with pytest.raises(ValueError, match=r"y has 1 entries .* at \[3, 0\]"):
        hf.linearize(MSE, q.flat, q.x, y, backend=backend)
    with pytest.raises(ValueError, match=r"overflows torch.float32.*float64"):
        hf.linearize(MSE, q.flat * 1e30, q.x, q.y, backend=backend)


@backends
def test_a_mean_over_nothing(backend: str) -> None:
    q = problem(Case(SPEC, 6))
    y = torch.full((6,), -100)
    undefined = r"mean cross-entropy is undefined: every target is ignore_index or has class weight"
    with pytest.raises(ValueError, match=undefined):
        hf.linearize(SPEC, q.flat, q.x, y, backend=backend)
    weighted = hf.MLPSpec((5, 4, 3), class_weights=(0.0, 1.0, 1.0))
    with pytest.raises(ValueError, match=undefined):
        hf.linearize(weighted, q.flat, q.x, torch.zeros(6).long(), backend=backend)
    total = hf.MLPSpec((5, 4, 3), reduction="sum")
    lin = hf.linearize(total, q.flat, q.x, y, backend=backend)
    assert float(lin.loss) == 0
    assert not hf.hvp(lin, q.tangents).any()


V = torch.zeros(P, 2, dtype=torch.float64)
BAD_TANGENTS: list[tuple[str, object, type[Exception], str]] = [
    ("rows", V.T, ValueError, rf"\({P}, K\), one direction.*got \(2, {P}\). Did you mean .T\?"),
    ("length", V[:-1], ValueError, rf"tangents must be \({P},\) or"),
    ("3-d", V[:, :, None], ValueError, rf"got \({P}, 2, 1\)"),
    ("0-d", V[0, 0], ValueError, r"got \(\)"),
    ("dtype", V.float(), TypeError, "tangents must be torch.float64.*got torch.float32"),
    ("device", V.to("meta"), TypeError, "on cpu.*on meta"),
    ("numpy", V.numpy(), TypeError, "got ndarray. Convert it: torch.as_tensor"),
    ("list", [V], TypeError, r"got a list of \['Tensor'\]"),
]


@pytest.mark.parametrize(
    ("bad", "error", "message"), [row[1:] for row in BAD_TANGENTS], ids=[r[0] for r in BAD_TANGENTS]
)
@backends
def test_products_reject(backend: str, bad: Tensor, error: type[Exception], message: str) -> None:
    lin = hf.linearize(**_tensors(), backend=backend)  # type: ignore[arg-type]
    for call in (hf.hvp, hf.ggnvp, hf.quadratic_form, hf.penalty):
        with pytest.raises(error, match=message):
            call(lin, bad)
    with pytest.raises(error, match=message):
        hf.hvp_vjp(lin, bad, V)
    with pytest.raises(error, match=message.replace("tangents", "cotangents")):
        hf.hvp_vjp(lin, V, bad)


@backends
def test_options_are_checked(backend: str) -> None:
    lin = hf.linearize(**_tensors(), backend=backend)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=rf"one shape.*\({P}, 2\) and \({P},\)"):
        hf.hvp_vjp(lin, V, V[:, 0])
    for call in (hf.quadratic_form, hf.penalty):
        with pytest.raises(ValueError, match="curvature must be one of hessian, ggn; got 'fisher'"):
            call(lin, V, curvature="fisher")
    with pytest.raises(ValueError, match="curvature must be one of"):
        hf.hvp_vjp(lin, V, V, curvature="gauss")
    for options, message in (
        ({"distribution": "uniform"}, "rademacher, normal; got 'uniform'"),
        ({"seed": -1}, "seed must be an integer >= 0"),
        ({"num_probes": 0}, "needs one or more; got 0"),
        ({"tangents": V[:, :0]}, "needs one or more; got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            hf.penalty(lin, **options)  # type: ignore[arg-type]


def test_a_named_backend_that_cannot_run_raises() -> None:
    if "cpu" not in RUNNING:
        pytest.skip("the cpu backend is not available")
    arguments = {k: v.half() if isinstance(v, Tensor) and v.is_floating_point() else v
                 for k, v in _tensors().items()}  # fmt: skip
    with pytest.raises(RuntimeError, match=r"backend 'cpu' cannot run: cpu: .*float16"):
        hf.linearize(**arguments, backend="cpu")  # type: ignore[arg-type]


def test_numpy_arrays_are_refused_everywhere() -> None:
    with pytest.raises(TypeError, match="params must be a flat tensor or a list"):
        hf.linearize(SPEC, [np.zeros((4, 5))], X, torch.zeros(6).long())  # type: ignore[list-item]
