"""Formats, algebra and SciPy form of linear operators, judged by dense matrices."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from dense import classes, close, convnet, dense, perceptron, tangents
from torch import Tensor, nn

from hvpfast.operators.base import LinearOperator
from hvpfast.operators.hessian import GGNOperator, HessianOperator
from hvpfast.operators.tangents import Layout

LOSS = nn.CrossEntropyLoss()


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tiny tensors: more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Matrix(LinearOperator):
    """A dense matrix (P, P), not symmetric."""

    def __init__(self, matrix: Tensor, layout: Layout | None = None) -> None:
        super().__init__(len(matrix), matrix.dtype, matrix.device, layout)
        self.matrix = matrix

    @property
    def self_adjoint(self) -> bool:
        return False

    def explain(self) -> str:
        return f"a matrix of {len(self.matrix)}"

    def _apply(self, rows: Tensor) -> Tensor:
        return rows @ self.matrix.T

    def _apply_adjoint(self, rows: Tensor) -> Tensor:
        return rows @ self.matrix


@pytest.fixture(scope="module")
def operators() -> tuple[HessianOperator, Tensor, GGNOperator, Tensor]:
    model, (x, y) = perceptron(), classes(9, 4)
    H = HessianOperator(model, LOSS, None, (x, y))
    G = GGNOperator(model, LOSS, None, (x, y))
    return H, dense(model, LOSS, x, y), G, dense(model, LOSS, x, y, ggn=True)


def test_vectors_and_columns(operators: Any) -> None:
    H, M, _, _ = operators
    P = M.shape[0]
    assert H.shape == (P, P)
    assert (H.dtype, H.device, H.num_params) == (torch.float64, torch.device("cpu"), P)
    V = tangents(P, 5)
    close(H @ V, M @ V)
    close(H @ V[:, 0], M @ V[:, 0])
    close(H @ V[:, :0], M @ V[:, :0])
    close(V.T @ H, V.T @ M)
    close(V[:, 1] @ H, V[:, 1] @ M)
    close(H @ V.T.contiguous().T, M @ V)
    wide = tangents(P, 10)[:, ::2]
    close(H @ wide, M @ wide)
    close(H.quadratic_form(V), (V * (M @ V)).sum(0))
    close(H.quadratic_form(V[:, 0]), V[:, 0] @ M @ V[:, 0])
    assert H.quadratic_form(V[:, :0]).shape == (0,)


def test_trees_keep_their_format(operators: Any) -> None:
    H, M, _, _ = operators
    shapes = [(5, 4), (5,), (6, 5), (6,), (3, 6), (3,)]
    names = ["0.weight", "0.bias", "2.weight", "2.bias", "4.weight", "4.bias"]
    assert H.param_names == tuple(names)
    numels = [int(np.prod(s)) for s in shapes]
    V = tangents(sum(numels), 3)
    single = [p.reshape(s) for p, s in zip((V[:, 0]).split(numels), shapes, strict=True)]
    stacked = [p.reshape(*s, 3) for p, s in zip(V.split(numels), shapes, strict=True)]
    out = H @ single
    assert isinstance(out, list)
    assert [tuple(t.shape) for t in out] == shapes
    close(torch.cat([t.reshape(-1) for t in out]), M @ V[:, 0])
    out = H @ tuple(stacked)
    assert [tuple(t.shape) for t in out] == [(*s, 3) for s in shapes]
    close(torch.cat([t.reshape(-1, 3) for t in out]), M @ V)
    reordered = dict(reversed(list(zip(names, single, strict=True))))
    named = H @ reordered
    assert isinstance(named, dict)
    close(torch.cat([named[n].reshape(-1) for n in names]), M @ V[:, 0])
    empty = H @ [t[..., :0] for t in stacked]
    assert [tuple(t.shape) for t in empty] == [(*s, 0) for s in shapes]
    with pytest.raises(ValueError, match=r"expected 6 tensors.*got 5"):
        H @ single[:5]
    with pytest.raises(ValueError, match=r"entry for 0.bias must have the shape \(5,\)"):
        H @ [single[0], single[3], *single[2:]]
    with pytest.raises(ValueError, match=r"missing: \['0.bias'\], unknown: \['bias'\]"):
        H @ {("bias" if n == "0.bias" else n): t for n, t in reordered.items()}
    with pytest.raises(TypeError, match=r"entry for 4.bias must be a tensor"):
        H @ [*single[:5], 1.0]
    with pytest.raises(TypeError, match="one dtype and device"):
        H @ [*single[:5], single[5].float()]
    with pytest.raises(TypeError, match=r"must be torch.float64"):
        H @ [t.float() for t in single]


def test_algebra(operators: Any) -> None:
    H, M, G, N = operators
    P = M.shape[0]
    V, eye = tangents(P, 4), torch.eye(P, dtype=torch.float64)
    for operator, matrix in (
        (H + G, M + N),
        (H - G, M - N),
        (-H, -M),
        (2 * H, 2 * M),
        (H * 0.5, 0.5 * M),
        (H / 4, M / 4),
        (np.float64(3) * H, 3 * M),
        (torch.tensor(3.0) * H, 3 * M),
        (H.shift(0.7), M + 0.7 * eye),
        (H @ G, M @ N),
        ((H @ G).T, N @ M),
        ((H @ G).adjoint().T, M @ N),
        (2 * (H - G.shift(1.0)) @ H + G, 2 * (M - N - eye) @ M + N),
    ):
        close(operator @ V, matrix @ V)
        close(V.T @ operator, V.T @ matrix)
        assert operator.shape == (P, P)
    assert H.T is H
    assert H.adjoint() is H
    assert (H + G).T.self_adjoint
    assert not (H @ G).self_adjoint
    assert "A B, where\nA = Hessian" in (H @ G).explain()
    assert "2 A, where" in (2 * H).explain()
    assert "A + 3 I, where" in H.shift(3).explain()
    assert repr(H) == f"<{P}x{P} HessianOperator, torch.float64 on cpu>"
    tree = [t.reshape(s) for t, s in zip(V[:, 0].split([20, 5, 30, 6, 18, 3]),
            [(5, 4), (5,), (6, 5), (6,), (3, 6), (3,)], strict=True)]  # fmt: skip
    close(torch.cat([t.reshape(-1) for t in (H + G) @ tree]), (M + N) @ V[:, 0])


def test_algebra_of_unsymmetric_operators() -> None:
    A, B = tangents(4, 4), tangents(4, 4, seed=5)
    V = tangents(4, 2, seed=6)
    for operator, matrix in (
        (Matrix(A), A),
        (Matrix(A).T, A.T),
        ((Matrix(A) + Matrix(B)).T, (A + B).T),
        ((3 * Matrix(A)).shift(2.0).T, (3 * A + 2 * torch.eye(4, dtype=A.dtype)).T),
        ((Matrix(A) @ Matrix(B)).T, (A @ B).T),
    ):
        close(operator @ V, matrix @ V)
        close(V.T @ operator, V.T @ matrix)
        close(torch.from_numpy(operator.to_scipy().rmatmat(V.numpy())), matrix.T @ V)
    with pytest.raises(TypeError, match="different parameters"):
        Matrix(A) @ [V[:, 0]]


def test_algebra_errors(operators: Any) -> None:
    H, M, _, _ = operators
    for wrong in (lambda: H + 1.0, lambda: 1 + H, lambda: H - torch.tensor(1.0), lambda: 2 - H):
        with pytest.raises(TypeError, match=r"use A.shift\(c\)"):
            wrong()
    for wrong in (lambda: H * "a", lambda: H * H, lambda: H / H, lambda: H + "a", lambda: "a" @ H):
        with pytest.raises(TypeError):
            wrong()
    with pytest.raises(TypeError, match="shift needs a real number"):
        H.shift(torch.ones(2))
    with pytest.raises(ValueError, match="must agree in shape, dtype and device"):
        H + Matrix(M[:4, :4])
    with pytest.raises(ValueError, match="must agree"):
        H @ Matrix(M.float())


def test_tangent_errors(operators: Any) -> None:
    H, M, _, _ = operators
    P = M.shape[0]
    V = tangents(P, 3)
    with pytest.raises(ValueError, match=r"columns \(82, K\).*got \(3, 82\). Did you mean .T\?"):
        H @ V.T
    with pytest.raises(ValueError, match=r"rows \(K, 82\).*got \(82, 3\). Did you mean .T\?"):
        V @ H
    with pytest.raises(ValueError, match=r"got \(81,\)$"):
        H @ V[1:, 0]
    for wrong in (V[None], V[0, 0]):
        with pytest.raises(ValueError, match="tangents must be"):
            H @ wrong
        with pytest.raises(ValueError, match="tangents must be"):
            wrong @ H
        with pytest.raises(ValueError, match="tangents must be"):
            H.quadratic_form(wrong)
    with pytest.raises(TypeError, match=r"must be torch.float64 on cpu; got torch.float32"):
        H @ V.float()
    with pytest.raises(TypeError, match=r"got torch.float64 on meta"):
        H @ V.to("meta")
    for product in (lambda: H @ V.numpy(), lambda: V.T.numpy() @ H):
        with pytest.raises(TypeError, match="got a NumPy array"):
            product()


def test_products_are_detached(operators: Any) -> None:
    H, M, _, _ = operators
    V = tangents(M.shape[0], 2).requires_grad_()
    for out in (H @ V, V.T @ H, H.shift(1.0) @ V[:, 0], H.quadratic_form(V)):
        assert not out.requires_grad


def test_products_do_not_alias_their_tangents() -> None:
    class Identity(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p = nn.Parameter(torch.ones(3, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return self.p

    data = (torch.zeros(1), torch.zeros(1))
    H = HessianOperator(
        Identity(), lambda z, y: 0.5 * (z * z).sum(), None, data, reduction="sum",
        backend="reference",
    )  # fmt: skip
    v = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    out = (2 * H).shift(1.0) @ v
    assert v.tolist() == [1.0, 2.0, 3.0]
    close(out, 3 * v)
    (H @ v).zero_()
    assert v.tolist() == [1.0, 2.0, 3.0]


def test_scipy_form(operators: Any) -> None:
    H, M, _, _ = operators
    P = M.shape[0]
    A = H.to_scipy()
    V = tangents(P, 4).numpy()
    assert A.shape == (P, P)
    assert A.dtype == np.float64
    M = M.numpy()
    np.testing.assert_allclose(A @ V, M @ V, rtol=1e-10)
    np.testing.assert_allclose(A.matvec(V[:, 0]), M @ V[:, 0], rtol=1e-10)
    np.testing.assert_allclose(A.matvec(V[:, :1]), M @ V[:, :1], rtol=1e-10)
    np.testing.assert_allclose(A.matmat(np.asfortranarray(V)[::1]), M @ V, rtol=1e-10)
    np.testing.assert_allclose(A.rmatvec(V[:, 0]), M @ V[:, 0], rtol=1e-10)
    single = H.to_scipy(np.float32)
    assert single.dtype == np.float32
    assert (single @ V).dtype == np.float32
    frozen = V.copy()
    frozen.flags.writeable = False
    np.testing.assert_allclose(A @ frozen, M @ V, rtol=1e-10)
    with pytest.raises(TypeError, match="complex"):
        A.matvec(V[:, 0] + 0j)
    half = HessianOperator(
        perceptron(dtype=torch.bfloat16), LOSS, None, classes(3, 4, dtype=torch.bfloat16),
        backend="reference",
    )  # fmt: skip
    assert half.to_scipy().dtype == np.float32
    assert (half.to_scipy() @ V).dtype == np.float32


@pytest.mark.parametrize("which", ["LA", "SA", "LM"])
def test_scipy_eigsh_agrees_with_dense(operators: Any, which: str) -> None:
    H, M, _, _ = operators
    values, vectors = scipy.sparse.linalg.eigsh(H.to_scipy(), k=4, which=which, v0=np.ones(len(M)))
    exact = torch.linalg.eigvalsh(M).numpy()
    order = {"LA": exact, "SA": -exact, "LM": np.abs(exact)}[which].argsort()[-4:]
    np.testing.assert_allclose(np.sort(values), np.sort(exact[order]), atol=1e-9)
    np.testing.assert_allclose(M.numpy() @ vectors, vectors * values, atol=1e-8)


def test_scipy_block_solver_uses_matmat() -> None:
    model, (x, y) = convnet(), classes(6, 1, 4, 4)
    G = GGNOperator(model, LOSS, None, (x, y), backend="reference")
    M = dense(model, LOSS, x, y, ggn=True)
    start = tangents(len(M), 3).numpy()
    values, _ = scipy.sparse.linalg.lobpcg(G.to_scipy(), start, tol=1e-8, maxiter=200)
    np.testing.assert_allclose(np.sort(values), torch.linalg.eigvalsh(M)[-3:].numpy(), rtol=1e-6)
