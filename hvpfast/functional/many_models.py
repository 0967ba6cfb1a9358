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

from hvpfast import backends
from hvpfast.backends.contract import ModelsPenalty, ModelsState
from hvpfast.backends.probes.draw import probes_of_models
from hvpfast.backends.probes.source import ProbeSource, fresh_seed
from hvpfast.functional.linearization import Linearization
from hvpfast.mlp.checks import model_rows
from hvpfast.mlp.spec import MLPSpec
from hvpfast.utils.memory import available_bytes, bytes_text, out_of_memory

_MOST_PROBES = 2**32  # of one seed


class ModelsLinearization(Linearization):
    """M losses at M points, ready for products. Made by :func:`hvpfast.linearize` for (M, P).

    The functions of a single :class:`hvpfast.Linearization` take it: ``hvp``, ``ggnvp``,
    ``quadratic_form``, ``hvp_vjp``, ``penalty``; :class:`hvpfast.ModelsOperator` is for estimators.

    Attributes:
        spec, order, num_params: as of one model.
        num_models: M.
        models: the backend's state; rows (M, K, P) inside.
    """

    __slots__ = ("models", "num_models")

    def __init__(
        self,
        spec: MLPSpec,
        models: ModelsState,
        choice: backends.Choice,
        order: int,
        params: Tensor,
        inputs: tuple[Tensor, ...],
    ) -> None:
        super().__init__(spec, None, choice, order, params, inputs)
        self.models, self.num_models = models, len(params)

    @property
    def loss(self) -> Tensor:
        """The losses, (M,)."""
        return self.models.loss.clone()

    @property
    def grad(self) -> Tensor:
        """The gradients of the losses, (M, P); computed when first asked for."""
        if self._grad is None:
            self.check_current()
            self._grad = self.models.gradient()
        return self._grad

    @property
    def normalizers(self) -> Tensor:
        """What each loss divides its sum by, (M,) float64."""
        return self.models.normalizers

    def explain(self) -> str:
        """What runs where and why, in a few lines."""
        return f"{self.num_models} models at once: {super().explain()}"

    @property
    def _any_state(self) -> ModelsState:
        """The state, of one model or of many."""
        return self.models

    # What the functional layer calls.

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
            return self.models.hvp(rows, ggn)

    def quadratic_rows(self, rows: Tensor, ggn: bool) -> Tensor:
        """v' H v, (M, K), for contiguous rows (M, K, P)."""
        self.check_current()
        with self._in_memory("quadratic forms", rows.shape[1]):
            return self.models.quadratic(rows, ggn)

    def hvp_vjp(self, tangents: Tensor, cotangents: Tensor, ggn: bool) -> Tensor:
        """d sum_k u_k' H v_k / d params, (M, P)."""
        rows, cotangent_rows = self.rows(tangents), self.rows(cotangents, "cotangents")
        if tangents.shape != cotangents.shape:
            raise ValueError(
                "tangents and cotangents must have one shape, pair by pair; got "
                f"{tuple(tangents.shape)} and {tuple(cotangents.shape)}"
            )
        self.check_third_order("hvp_vjp")
        self.check_current()
        with self._in_memory("third-order products", rows.shape[1]):
            return self.models.hvp_vjp(rows, cotangent_rows, ggn)

    def penalty(
        self,
        tangents: Tensor | None,
        num_probes: int,
        distribution: str,
        seed: int | None,
        ggn: bool,
        kind: str,
    ) -> ModelsPenalty:
        """The values of the penalties, with gradients for weights that come later."""
        self.check_third_order("penalty")
        probes: Tensor | ProbeSource
        if tangents is not None:
            probes = self.rows(tangents)
            num_probes = probes.shape[1]
        else:
            seed = fresh_seed() if seed is None else seed
            probes = ProbeSource(num_probes, distribution, seed)
            check_probe_count(self.num_models, num_probes)
        if num_probes < 1:
            raise ValueError("the penalty is a mean over probes and needs one or more; got 0")
        self.check_current()
        with self._in_memory("penalties", num_probes):
            if kind == "fro2":
                return self.models.penalty(probes, ggn)
            if isinstance(probes, ProbeSource):
                probes = probes_of_models(
                    probes, num_probes, self.num_models, self.num_params, self.dtype, self.device
                )
            return TracePenalties(self.models, probes, ggn)

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


class TracePenalties:
    """(1/K) sum_k v_mk' H_m v_mk of M models, before gradients; v are rows (M, K, P)."""

    def __init__(self, models: ModelsState, rows: Tensor, ggn: bool) -> None:
        self._models, self._rows, self._ggn = models, rows, ggn
        self._values = models.quadratic(rows, ggn).mean(1)

    @property
    def loss(self) -> Tensor:
        """The losses, (M,)."""
        return self._models.loss.detach()

    @property
    def penalty(self) -> Tensor:
        """The penalties, (M,)."""
        return self._values.detach()

    def gradient(self, g_loss: float, g_penalty: float) -> Tensor:
        """Gradients d(g_loss * loss + g_penalty * penalty) / d params, (M, P)."""
        third = self._models.hvp_vjp(self._rows, self._rows, self._ggn)
        third.mul_(g_penalty / self._rows.shape[1])
        return third.add_(self._models.gradient(), alpha=g_loss)
