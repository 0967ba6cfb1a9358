"""CUDA graphs: a Hessian-vector product and a penalised training step, recorded and replayed.

    product = CapturedHVP(spec, params, x, y, V)         HV = product(V, x=x, y=y)
    step = CapturedStep(spec, params, optimizer, x, y)   loss, penalty = step(x, y)

On a small network the kernels of a GPU wait for the host that launches them. A recorded call is
launched at once. Its shapes are fixed; its numbers are not: data and probes are copied into tensors
of the recording, parameters are read (and stepped) where they are, and drawn probes come from a
counter on the device that moves on at every replay.

Nothing is read back during a replay: labels out of range and a loss that is not finite are noticed
by ``check()``, which waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hvpfast.backends.probes.draw import draw
from hvpfast.backends.probes.source import ProbeSource, fresh_seed
from hvpfast.functional.linearization import Linearization
from hvpfast.functional.linearize import linearize
from hvpfast.functional.penalty import penalty
from hvpfast.functional.penalty_kinds import NO_PROBES
from hvpfast.functional.products import ggnvp, hvp
from hvpfast.mlp.checks import (
    check_batch,
    check_curvature,
    check_labels,
    check_params,
    check_tangents,
    nonfinite_reason,
)
from hvpfast.mlp.spec import MLPSpec
from hvpfast.utils import cuda_graph

Params = Tensor | Sequence[Tensor]


class _Captured:
    """What both recordings hold: the point's tensors, and where the parameters lie."""

    def __init__(self, spec: MLPSpec, params: Params, x: Tensor, y: Tensor, backend: str) -> None:
        self.spec, self.backend = spec, backend
        self._like = check_params(spec, params)
        check_batch(spec, self._like, x, y)
        cuda_graph.check_on_gpu(self._like)
        self._params = params
        tensors = (params,) if isinstance(params, Tensor) else tuple(params)
        self._addresses = cuda_graph.Addresses(tensors)
        self._data = cuda_graph.Buffers(x=x, y=y)
        self._loss: Tensor | None = None

    def _linearize(self, order: int) -> Linearization:
        data = self._data
        # What it holds outside the recording's own memory lives as long as the recording.
        self._lin = linearize(
            self.spec, self._params, data["x"], data["y"], backend=self.backend, order=order
        )
        return self._lin

    def check(self) -> None:
        """Wait for the device and look at the last call's data and loss.

        Raises:
            ValueError: a label is out of range, or the loss is NaN or infinite.
        """
        if self._loss is None:
            return
        x, y = self._data["x"], self._data["y"]
        if self.spec.loss == "cross_entropy":
            check_labels(self.spec, y)
        loss = float(self._loss)
        if not abs(loss) <= torch.finfo(self._like.dtype).max:
            raise ValueError(nonfinite_reason(loss, self.spec, self._params, x, y))


class CapturedHVP(_Captured):
    """Products H V (or G V) for fixed shapes: one CUDA graph from the data to the product.

    The primal passes are in it, so that every call sees the parameters' present values.

    Args:
        spec: the network and its loss.
        params: flat (P,) or ``[W1, b1, ...]`` on a GPU; read in place at every call.
        x, y: a batch as for :func:`hvpfast.linearize`; its shapes are those of every call.
        tangents: V, (P,) or columns (P, K), K >= 1.
        curvature: ``"hessian"`` or ``"ggn"``.
        backend: ``"auto"`` or a name from ``available()``.

    Raises:
        ValueError, TypeError: an argument is not as described, or the loss is not finite.
        RuntimeError: no GPU, or the backend cannot be recorded.
    """

    def __init__(
        self,
        spec: MLPSpec,
        params: Params,
        x: Tensor,
        y: Tensor,
        tangents: Tensor,
        *,
        curvature: str = "hessian",
        backend: str = "auto",
    ) -> None:
        super().__init__(spec, params, x, y, backend)
        self._product = ggnvp if check_curvature(curvature) else hvp
        check_tangents(tangents, spec.num_params, self._like)
        self._tangents = _rows(tangents)
        with cuda_graph.side_stream(self._like.device):
            for _ in range(cuda_graph.WARMUPS):
                self._call()
        self._recording = cuda_graph.Recording(
            self._like.device, f"the {curvature} product", self._call
        )
        self._loss = self._recording.outputs[0]

    def _call(self) -> tuple[Tensor, Tensor]:
        lin = self._linearize(order=2)
        return lin.loss, self._product(lin, self._tangents["V"].t())

    def __call__(
        self, tangents: Tensor | None = None, *, x: Tensor | None = None, y: Tensor | None = None
    ) -> Tensor:
        """The product at the parameters' present values; None keeps what the last call had.

        Returns:
            H V, shaped as the tangents: the recording's own tensor, which the next call overwrites.

        Raises:
            ValueError, TypeError: another shape, dtype or device than at the recording.
            RuntimeError: the parameters were given other memory.
        """
        self._addresses.check()
        self._data.fill("x", x)
        self._data.fill("y", y)
        _fill_rows(self._tangents, tangents)
        return self._recording.replay()[1]


class CapturedStep(_Captured):
    """One step on w_loss * loss + w_penalty * (1/K) sum_k ||H v_k||^2, recorded as a CUDA graph.

    Products, gradient and optimizer are in it. The first calls are ordinary steps, in which
    libraries and optimizer set themselves up; then the step is recorded, once, and replayed. Call t
    (from 0) draws the probes t K ... (t+1) K - 1 of ``hvpfast.probes(P, K, seed=seed, first=t K)``,
    so a run is the same run recorded or not; :meth:`seek` goes to another t.

    Args:
        spec: the network and its loss.
        params: flat (P,) or ``[W1, b1, ...]`` on a GPU, the optimizer's own tensors.
        optimizer: over exactly these parameters; Adam and its like with ``capturable=True``. A
            learning rate that changes must be a tensor, changed in place.
        x, y: a batch as for :func:`hvpfast.linearize`; its shapes are those of every call.
        tangents: probes (P,) or (P, K) that calls replace; None to have them drawn.
        num_probes: K, where they are drawn.
        distribution: ``"rademacher"`` or ``"normal"``.
        seed: of the drawn probes, in [0, 2**64); None takes fresh entropy.
        weights: (w_loss, w_penalty).
        curvature: ``"hessian"`` or ``"ggn"``.
        backend: ``"auto"`` or a name from ``available()``.

    Attributes:
        seed: of the drawn probes.

    Raises:
        ValueError, TypeError: an argument is not as described.
        RuntimeError: no GPU.
    """

    def __init__(
        self,
        spec: MLPSpec,
        params: Params,
        optimizer: torch.optim.Optimizer,
        x: Tensor,
        y: Tensor,
        *,
        tangents: Tensor | None = None,
        num_probes: int = 1,
        distribution: str = "rademacher",
        seed: int | None = None,
        weights: tuple[float, float] = (1.0, 1.0),
        curvature: str = "hessian",
        backend: str = "auto",
    ) -> None:
        super().__init__(spec, params, x, y, backend)
        check_curvature(curvature)
        self._curvature, self._weights = curvature, weights
        self._optimizer = optimizer
        _check_optimizer(optimizer, params)
        self.seed = fresh_seed() if seed is None else seed
        self._counter: Tensor | None = None
        if tangents is None:
            source = ProbeSource(num_probes, distribution, self.seed)
            if num_probes < 1:
                raise ValueError(NO_PROBES)
            self._source = source
            self._counter = torch.zeros((), dtype=torch.int64, device=self._like.device)
            tangents = self._like.detach().new_empty(num_probes, spec.num_params).T
        check_tangents(tangents, spec.num_params, self._like)
        self._tangents = _rows(tangents)
        self._calls = 0
        self._recording: cuda_graph.Recording[tuple[Tensor, Tensor]] | None = None

    def seek(self, t: int) -> None:
        """Let the next call draw the probes of call ``t``, to resume a run.

        Raises:
            ValueError: ``t`` is no integer >= 0, or the step draws no probes.
        """
        if self._counter is None:
            raise ValueError("this step draws no probes: it was made with tangents=")
        if not isinstance(t, int) or isinstance(t, bool) or t < 0:
            raise ValueError(f"t must be an integer >= 0; got {t!r}")
        self._counter.fill_(t * self._source.num_probes)

    def _call(self) -> tuple[Tensor, Tensor]:
        rows = self._tangents["V"]
        if self._counter is not None:
            draw(rows, self._source.distribution, self.seed, self._counter)
            self._counter += len(rows)
        loss, value, gradient = penalty(
            self._linearize(order=3), rows.t(), weights=self._weights, curvature=self._curvature
        )
        if isinstance(self._params, Tensor):
            self._params.grad = gradient
        else:
            for p, g in zip(self._params, self.spec.unflatten(gradient), strict=True):
                p.grad = g
        self._optimizer.step()
        return loss, value

    def __call__(
        self, x: Tensor | None = None, y: Tensor | None = None, tangents: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Take one step; None keeps what the last call had.

        Returns:
            (loss, penalty) before the step, 0-dim: overwritten by the next call.

        Raises:
            ValueError, TypeError: another shape, dtype or device than at first; probes given though
                they are drawn.
            RuntimeError: the step cannot be recorded, or the parameters were given other memory.
        """
        if tangents is not None and self._counter is not None:
            raise ValueError("this step draws its probes; make it with tangents= to pass them")
        self._addresses.check()
        self._data.fill("x", x)
        self._data.fill("y", y)
        _fill_rows(self._tangents, tangents)
        self._calls += 1
        if self._calls <= cuda_graph.WARMUPS:
            with cuda_graph.side_stream(self._like.device):
                found = self._call()
        else:
            if self._recording is None:
                self._recording = cuda_graph.Recording(
                    self._like.device, "the training step", self._call
                )
            found = self._recording.replay()
        self._loss = found[0]
        return found


def _rows(tangents: Tensor) -> cuda_graph.Buffers:
    """A copy of (P,) or columns (P, K) as contiguous rows."""
    return cuda_graph.Buffers(V=tangents.t().contiguous())


def _fill_rows(buffers: cuda_graph.Buffers, tangents: Tensor | None) -> None:
    if tangents is None:
        return
    held = buffers["V"].t()
    if isinstance(tangents, Tensor) and tangents.shape != held.shape:
        raise ValueError(
            f"tangents must be {tuple(held.shape)}, as they were recorded; got "
            f"{tuple(tangents.shape)}. Another shape needs another recording"
        )
    buffers.fill("V", tangents.t() if isinstance(tangents, Tensor) else tangents)


def _check_optimizer(optimizer: torch.optim.Optimizer, params: Params) -> None:
    """ValueError unless the optimizer steps exactly these tensors and can be recorded."""
    tensors = [params] if isinstance(params, Tensor) else list(params)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    if sorted(map(id, held)) != sorted(map(id, tensors)):
        raise ValueError(
            "the optimizer must hold exactly the parameters of the step, the same tensors; it has "
            f"{len(held)} tensors, {len({*map(id, held)} & {*map(id, tensors)})} of them the step's"
        )
    for group in optimizer.param_groups:
        if group.get("capturable") is False:
            raise ValueError(
                f"{type(optimizer).__name__} keeps its count of steps on the host; make it with "
                "capturable=True, so that a recorded step counts"
            )
