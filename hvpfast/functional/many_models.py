"""Many models of one network at once: parameters (M, P), and M in front of every result.

    lin = hf.linearize(spec, params, x, y)     loss (M,), grad (M, P)
    hvp(lin, V), ggnvp(lin, V)                 V (M, P) or (M, P, K): shaped as V
    quadratic_form(lin, V)                     (M,) or (M, K)
    hvp_vjp(lin, V, U)                         (M, P)
    penalty(lin)                               (M,), (M,), (M, P)

Model m's results are those of ``linearize(spec, params[m], x_m, y_m)`` alone, but for the way in
which a backend rounds: on the CPU, where threads share out the models, they are the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from hvpfast.backends.contract import ModelsState, PenaltyState
from hvpfast.backends.probes.draw import probes_of_models
from hvpfast.backends.probes.source import ProbeSource
from hvpfast.functional.linearization import Linearization, check_pairs
from hvpfast.functional.penalty_kinds import NO_PROBES, TracePenalty
from hvpfast.mlp.checks import model_rows
from hvpfast.utils.memory import available_bytes, bytes_text, out_of_memory

_MOST_PROBES = 2**32  # of one seed


class ModelsLinearization(Linearization):
    """M losses at M points, ready for products. Made by :func:`hvpfast.linearize` for (M, P).

    The functions of a single :class:`hvpfast.Linearization` take it: ``hvp``, ``ggnvp``,
    ``quadratic_form``, ``hvp_vjp``, ``penalty``; :class:`hvpfast.ModelsOperator` is for estimators.

    Attributes:
        spec, order, num_params, like: as of one model.
        state: the backend's state; rows (M, K, P) inside.
    """

    __slots__ = ()
    state: ModelsState

    @property
    def num_models(self) -> int:
        """M."""
        return len(self.like)

    @property
    def loss(self) -> Tensor:
        """The losses, (M,)."""
        return self.state.loss

    @property
    def normalizers(self) -> Tensor:
        """What each loss divides its sum by, (M,) float64."""
        return self.state.normalizers

    def explain(self) -> str:
        """What runs where and why, in a few lines."""
        return f"{self.num_models} models at once: {super().explain()}"

    def product(self, tangents: Tensor, ggn: bool) -> Tensor:
        """H V or G V, shaped as ``tangents`` (M, P) or (M, P, K)."""
        out = self.product_rows(self.rows(tangents), ggn)
        return out.squeeze(1) if tangents.dim() == 2 else out.transpose(1, 2)

    def quadratic(self, tangents: Tensor, ggn: bool) -> Tensor:
        """v' H v: (M,) for (M, P), (M, K) for (M, P, K)."""
        out = self.quadratic_rows(self.rows(tangents), ggn)
        return out.squeeze(1) if tangents.dim() == 2 else out

    def product_rows(self, rows: Tensor, ggn: bool) -> Tensor:
        """H V or G V for contiguous rows (M, K, P)."""
        self.check_current()
        with self._in_memory("products", rows.shape[1]):
            return self.state.hvp(rows, ggn)

    def quadratic_rows(self, rows: Tensor, ggn: bool) -> Tensor:
        """v' H v, (M, K), for contiguous rows (M, K, P)."""
        self.check_current()
        with self._in_memory("quadratic forms", rows.shape[1]):
            return self.state.quadratic(rows, ggn)

    def hvp_vjp(self, tangents: Tensor, cotangents: Tensor, ggn: bool) -> Tensor:
        """d sum_k u_k' H v_k / d params, (M, P)."""
        rows, cotangent_rows = self.rows(tangents), self.rows(cotangents, "cotangents")
        check_pairs(tangents, cotangents)
        self.check_third_order("hvp_vjp")
        self.check_current()
        with self._in_memory("third-order products", rows.shape[1]):
            return self.state.hvp_vjp(rows, cotangent_rows, ggn)

    def penalty(self, probes: Tensor | ProbeSource, kind: str, ggn: bool) -> PenaltyState:
        """The penalties by probes (M, P) or (M, P, K), or by those of a source; K >= 1."""
        self.check_third_order("penalty")
        if isinstance(probes, ProbeSource):
            check_probe_count(self.num_models, probes.num_probes)
        else:
            probes = self.rows(probes)
        K = probes.num_probes if isinstance(probes, ProbeSource) else probes.shape[1]
        if K < 1:
            raise ValueError(NO_PROBES)
        self.check_current()
        with self._in_memory("penalties", K):
            if kind == "fro2":
                return self.state.penalty(probes, ggn)
            if isinstance(probes, ProbeSource):
                place = self.num_params, self.dtype, self.device
                probes = probes_of_models(probes, K, self.num_models, *place)
            return TracePenalty(self.state, probes, ggn)

    def exact_penalty(self, kind: str, ggn: bool) -> PenaltyState:
        """Not for many models: NotImplementedError."""
        raise NotImplementedError(
            "estimator='exact' takes one model at a time; for many use estimator='hutchinson', or "
            "linearize(spec, params[m], ...) for each"
        )

    def diagonal(self, ggn: bool) -> Tensor:
        """Not for many models: RuntimeError."""
        raise RuntimeError(
            "a linearization of many models is not one of a single model; take one model: "
            "linearize(spec, params[m], ...)"
        )

    @contextmanager
    def _in_memory(self, what: str, K: int) -> Iterator[None]:
        """Around what may run out of memory: says then how much was asked for, and what helps."""
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error) or "ran out of memory" in str(error):
                raise
            M, P = self.num_models, self.num_params
            rows = bytes_text(M * K * P * self.dtype.itemsize)
            raise MemoryError(
                f"{what} of {M} models with {K} tangents of {P:,} {self.dtype} parameters ran out "
                f"of memory: the tangents alone take {rows}, and "
                f"{bytes_text(available_bytes(self.device))} are available; take fewer models or "
                "tangents at a time"
            ) from error

    def rows(self, tangents: Tensor, name: str = "tangents") -> Tensor:
        """Tangents as contiguous rows (M, K, P)."""
        return model_rows(tangents, self.num_models, self.num_params, self.like, name)


def check_probe_count(num_models: int, num_probes: int) -> None:
    """Raise ValueError where M models have more probes than there are for one seed."""
    if num_models * num_probes > _MOST_PROBES:
        raise ValueError(
            f"{num_models} models with {num_probes} probes each need more than the 2**32 probes "
            "of one seed; take fewer at a time"
        )
