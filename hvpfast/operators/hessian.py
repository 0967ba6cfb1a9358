"""Curvature matrices of a whole data set as linear operators, never formed.

    L(p) = mean or sum over all samples of loss(model(x; p), y)
    H = d2 L / dp2                 HessianOperator
    G = sum J' (d2 loss / dz2) J   GGNOperator, the generalised Gauss-Newton matrix; J = dz / dp

p is the flat vector (P,) of the chosen parameters. Batches are linearized when an operator is made,
and all products use these linearizations; only what does not fit into memory is linearized again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hvpfast.backends.contract import State
from hvpfast.mlp.module_checks import check_deterministic_modules
from hvpfast.operators.base import LinearOperator
from hvpfast.operators.data import Batches
from hvpfast.operators.determinism import check_batch_twice, check_everything_twice
from hvpfast.operators.distributed import Group, processes_here, settings_of, together
from hvpfast.operators.exact import Cores
from hvpfast.operators.linearized_data import LinearizedData
from hvpfast.operators.objective import objective_for
from hvpfast.operators.parameters import Entry, Subset, by_layer, matching, select
from hvpfast.operators.reduction import BatchWeight
from hvpfast.operators.tangents import Layout, matrix_rows
from hvpfast.utils.memory import WORK_SHARE, available_bytes, budget_of, bytes_text, out_of_memory

_LARGE = 2**26  # bytes of products from which free memory is checked before


class CurvatureOperator(LinearOperator):
    """The Hessian or the Gauss-Newton matrix of a loss over a data set; they differ in one flag.

    Attributes:
        model: the module.
        linearized: the data, all batches linearized.
        entries: the chosen parameters.
        subset: how rows over all parameters become rows over the chosen ones.
    """

    self_adjoint = True
    _ggn: ClassVar[bool]

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[..., Any],
        params: Any,
        data: Any,
        *,
        reduction: str | None = None,
        backend: str = "auto",
        dtype: torch.dtype | None = None,
        chunk_size: int | str = "auto",
        memory_budget: int | float | str = "auto",
        progressbar: bool = False,
        check_deterministic: bool | str = "auto",
        process_group: Any = None,
    ) -> None:
        group = None if process_group is None else Group(process_group)
        with together(group, "construction of an operator"):
            _check_options(model, chunk_size, check_deterministic, dtype)
            check_deterministic_modules(model)
            entries = select(model, params)
            weight = BatchWeight(loss_fn, reduction)
            device = entries[0].owner.device
            free = available_bytes(device, max_age=1.0) // processes_here(group, device)
            budget = budget_of(memory_budget, free)
            batches = Batches(data, device, dtype, budget, may_be_empty=group is not None)
            first = next(iter(batches), None)
            objective = objective_for(model, loss_fn, entries, weight, first, backend, dtype)
        if group is not None:
            chosen = {f"parameter {i}": f"{e.name} {e.shape}" for i, e in enumerate(entries)}
            kind = {"kind": type(self).__name__, "check_deterministic": check_deterministic}
            form = {"dtype": objective.dtype, "reduction": weight.reduction}
            group.same("settings", settings_of(model, loss_fn) | chosen | kind | form)
        linearized = LinearizedData(objective, batches, weight, budget, free, progressbar, group)
        self._setup(model, linearized, entries, chunk_size)
        self._determinism = "not checked"
        if check_deterministic is True:
            self._determinism = check_everything_twice(self, linearized)
        elif check_deterministic == "auto":
            with together(group, "check that the loss is deterministic"):
                self._determinism = check_batch_twice(linearized, model, loss_fn, data)

    def _setup(
        self,
        model: nn.Module,
        linearized: LinearizedData,
        entries: list[Entry],
        chunk_size: int | str,
    ) -> None:
        layout = Layout(tuple(e.name for e in entries), tuple(e.shape for e in entries))
        super().__init__(
            sum(layout.numels), linearized.objective.dtype, linearized.objective.device, layout
        )
        self.model, self.linearized, self.entries = model, linearized, entries
        self._chunk_size = chunk_size
        self.subset = Subset(entries, linearized.objective.tensors)
        # memory per tangent, estimated: the tangent and its product, both whole and chosen parts,
        # and the values of the layers
        self._row_bytes = 4 * linearized.width * self.dtype.itemsize + linearized.largest

    @property
    def backend(self) -> str:
        """Name of the backend that runs."""
        return self.linearized.objective.backend

    @property
    def num_params(self) -> int:
        """Number of chosen parameters P."""
        return self.shape[0]

    @property
    def param_names(self) -> tuple[str, ...]:
        """Names of the chosen parameters, in the order of the flat vector."""
        return self.layout.names

    @property
    def loss(self) -> Tensor:
        """The loss L over all data, 0-dim."""
        self.linearized.check_current()
        return self.linearized.loss.clone()

    def gradient(self) -> Tensor:
        """The gradient dL/dp over all data, (P,)."""
        return self.subset.restrict(self.linearized.gradient().unsqueeze(0))[0]

    def refresh(self) -> None:
        """Linearize again, at the present values of parameters, buffers and data.

        Parameters may have been replaced by others of the same shapes, as
        ``load_state_dict(assign=True)`` does.

        Blocks made by :meth:`blocks` on a backend for MLPs are refreshed with their operator.
        """
        before = self.linearized.objective.tensors
        self.linearized.update()
        now = self.linearized.objective.tensors
        owners = {id(old): new for old, new in zip(before, now, strict=True)}
        self.entries = [e._replace(owner=owners.get(id(e.owner), e.owner)) for e in self.entries]

    def blocks(
        self, groups: Iterable[str | Iterable[str]] | None = None
    ) -> Iterator[CurvatureOperator]:
        """Operators of the diagonal blocks: principal submatrices for groups of parameters.

        Args:
            groups: name patterns, or lists of them, one per block; None for one block per layer
                (parameters whose names differ only after the last dot).

        Yields:
            Operators of the same kind; ``param_names`` says which block it is. For an MLP they
            share the linearizations of this operator; otherwise each linearizes for its own
            parameters.

        Raises:
            ValueError: a pattern matches no parameter of this operator.
        """
        self.linearized.check_current()
        entries, parts = by_layer(self.model, self.entries), list[list[Entry]]()
        if groups is None:
            layers: dict[str, list[Entry]] = {}
            for entry in entries:
                layers.setdefault(entry.name.rpartition(".")[0], []).append(entry)
            parts = list(layers.values())
        else:
            parts = [matching(entries, patterns) for patterns in groups]
        for part in parts:
            block = type(self).__new__(type(self))
            block._setup(self.model, self.linearized.narrowed(part), part, self._chunk_size)
            block._determinism = self._determinism
            yield block

    def explain(self) -> str:
        """Text: what runs where and why, what is kept in memory, and what was checked."""
        kind = "generalised Gauss-Newton" if self._ggn else "Hessian"
        names = self.param_names
        chunk = f"{self._chunk_size} tangents at a time"
        if self._chunk_size == "auto":
            chunk = f"auto, up to {self._chunk()} tangents at a time"
        lines = [
            f"{kind} of {type(self.model).__name__}, P = {self.num_params}, {self.dtype} on "
            f"{self.device}",
            self.linearized.objective.text,
            f"parameters: {', '.join(names[:8])}" + (", ..." if len(names) > 8 else ""),
            *self.linearized.describe(),
            f"chunk_size: {chunk}",
            f"determinism: {self._determinism}",
        ]
        return "\n".join(lines)

    def cores(self) -> Cores:
        """Exact trace, diagonal, tr A^2 and traces of samples without probes, for perceptrons.

        Raises:
            NotImplementedError: the model is not a perceptron, or the data are spread over
                processes; the message is the reason.
        """
        return Cores(self.linearized, self.subset, self._ggn)

    def quadratic_form(self, tangents: Tensor) -> Tensor:
        """``v' A v`` without forming ``A v``: 0-dim for (P,), (K,) for columns (P, K)."""
        rows = matrix_rows(tangents, 0, self._size, self._dtype, self._device)
        group = self.linearized.group
        if group is None:
            out = self._own_quadratic(rows)
        else:
            part = functools.partial(self._own_quadratic, rows)
            out = group.product("quadratic form", part, rows.shape[:1], rows)
        return out[0] if tangents.dim() == 1 else out

    def _own_quadratic(self, rows: Tensor) -> Tensor:
        """``v_k' A v_k`` (K,) over this process's data."""
        out = rows.new_zeros(rows.shape[0])
        self._add_up(rows, out, lambda state, part: state.quadratic(part, self._ggn))
        return out

    def _apply(self, rows: Tensor) -> Tensor:
        group = self.linearized.group
        if group is None:
            return self._own_product(rows)
        part = functools.partial(self._own_product, rows)
        return group.product("product", part, rows.shape, rows)

    def _own_product(self, rows: Tensor) -> Tensor:
        """``A v_k`` (K, P) over this process's data."""
        linearized, subset, count = self.linearized, self.subset, rows.shape[0]
        if rows.nbytes > _LARGE:
            self._check_room(count, rows.nbytes)
        state = linearized.only
        if state is not None and count <= self._chunk():
            linearized.check_current()
            try:
                return subset.restrict(state.hvp(subset.embed(rows), self._ggn))
            except (MemoryError, RuntimeError) as error:
                self._explain_memory(error, count)
                raise
        out = torch.zeros_like(rows)
        self._add_up(rows, out, lambda state, part: subset.restrict(state.hvp(part, self._ggn)))
        return out

    def _add_up(
        self, rows: Tensor, out: Tensor, product: Callable[[State, Tensor], Tensor]
    ) -> None:
        """``out[k] += sum_b c_b product(state of batch b, row k)``, in chunks of the K rows."""
        linearized, chunk, count = self.linearized, self._chunk(), rows.shape[0]
        linearized.check_current()
        try:
            with linearized.running():
                for coefficient, state in linearized.states("product") if count else ():
                    for start in range(0, count, chunk):
                        part = self.subset.embed(rows[start : start + chunk])
                        value = product(state, part)
                        out[start : start + chunk].add_(value, alpha=coefficient)
        except (MemoryError, RuntimeError) as error:
            self._explain_memory(error, min(chunk, count))
            raise

    def agreed(self, number: int) -> int:
        """The least of the processes' numbers; ``number`` itself where there is one process."""
        group = self.linearized.group
        return number if group is None else group.least(number)

    def _explain_memory(self, error: Exception, count: int) -> None:
        """Raise MemoryError with sizes if ``error`` says that ``count`` tangents took too much."""
        if out_of_memory(error) and "ran out of memory" not in str(error):
            raise MemoryError(
                f"a product with {count} tangents of {self.num_params:,} {self.dtype} parameters "
                f"ran out of memory: it needs about {bytes_text(count * self._row_bytes)}, and "
                f"{bytes_text(available_bytes(self.device))} are available; "
                f"chunk_size={max(1, count // 4)} takes a quarter, smaller batches help too"
            ) from error

    def _chunk(self) -> int:
        """Number of tangents that are multiplied at once."""
        if isinstance(self._chunk_size, int):
            return self._chunk_size
        return max(1, int(WORK_SHARE * self.linearized.free) // self._row_bytes)

    def _check_room(self, count: int, size: int) -> None:
        """Raise MemoryError if ``count`` products of ``size`` bytes in all do not fit."""
        free = available_bytes(self.device)
        if size > free:
            raise MemoryError(
                f"K = {count} products of {self.num_params:,} {self.dtype} parameters take "
                f"{bytes_text(size)}, and {bytes_text(free)} are available; give at most "
                f"{max(1, free * count // (2 * size))} columns at a time"
            )


def _check_options(model: Any, chunk_size: Any, check_deterministic: Any, dtype: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    if chunk_size != "auto" and (type(chunk_size) is not int or chunk_size < 1):
        raise ValueError(f'chunk_size must be "auto" or an integer >= 1; got {chunk_size!r}')
    if check_deterministic not in ("auto", True, False):
        raise ValueError(
            f'check_deterministic must be "auto", True or False; got {check_deterministic!r}'
        )
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating-point type or None; got {dtype}")


class HessianOperator(CurvatureOperator):
    """The Hessian of a loss over a data set, as a linear operator (P, P).

    ``H @ v`` takes (P,), columns (P, K), or a list or dict of tensors shaped like the parameters;
    see :class:`LinearOperator` for formats and algebra. Products are exact, for
    batches of any sizes: a mean over batches is weighted by the number of targets that count (by
    class weights, without ignored ones), of elements for mse and similar losses, of samples for
    others. The model stays as it is: ``.grad``, mode, ``requires_grad``, and the random state.

    Args:
        model: any module, called as ``model(x)``. BatchNorm, and Dropout with p > 0, must be in
            eval mode.
        loss_fn: called as ``loss_fn(outputs, y)``, returns a scalar. A perceptron with
            cross-entropy or mse (see :func:`hvpfast.spec_of`) runs on a fast backend; anything
            else runs on the reference backend, and a warning says why, once.
        params: None for all that require gradients, or a dict name -> parameter, a list of
            parameters, a name pattern such as ``"0.*"`` or a list of them. The flat order is
            theirs, with row-major entries. The layers of a ``hvpfast.MLP`` are ``"0.weight"``,
            ``"0.bias"``, ...
        data: a pair (x, y), a list of such pairs, or a DataLoader; see
            :class:`hvpfast.operators.data.Batches`.
        reduction: ``"mean"`` or ``"sum"``, for losses without ``.reduction``.
        backend: ``"auto"``, or a name from :func:`hvpfast.available`.
        dtype: floating-point type of the computation; parameters and data are converted. None
            takes that of the parameters.
        chunk_size: number of tangents multiplied at once; ``"auto"`` by memory. It changes
            rounding only.
        memory_budget: bytes that may be kept between products, of data and of linearizations;
            ``"auto"`` is half of the memory that is free. Beyond it batches are linearized again
            in every product; ``explain()`` says how many.
        progressbar: show progress over the batches.
        check_deterministic: ``"auto"`` compares two evaluations of one batch, once per kind of
            model, mode and data; True compares two evaluations of everything; False nothing.
        process_group: of ``torch.distributed``. Each process gives its own part of the data
            (:func:`hvpfast.shard`), of any size, and results are over the data of all. All
            processes make the operator and call it in the same way, with the same parameters,
            settings and tangents; a call is one all-reduce. A failure in one process raises in all.

    Raises:
        TypeError: an argument of the wrong kind, or data that can be read only once.
        ValueError: a wrong value, empty data, a parameter that is not the model's, BatchNorm or
            Dropout in train mode, a loss that is not finite.
        RuntimeError: the named backend cannot run this; the loss is not deterministic; in
            products: parameters, buffers or data were changed in place (see :meth:`refresh`;
            changes through ``.data`` cannot be seen).
        MemoryError: products do not fit into memory; the message says what does.
        DistributedError: another process failed, or differs in parameters, settings or tangents.

    References:
        Pearlmutter (1994), doi:10.1162/neco.1994.6.1.147.
    """

    _ggn = False


class GGNOperator(CurvatureOperator):
    """The generalised Gauss-Newton matrix of a loss over a data set, (P, P), semi-definite.

    ``sum_n J_n' (d2 loss_n / dz2) J_n`` with the Jacobian J_n of the outputs: the Hessian of the
    loss for the model linearized in its parameters. Arguments and errors are those of
    :class:`HessianOperator`.

    References:
        Schraudolph (2002), doi:10.1162/08997660260028683.
    """

    _ggn = True
