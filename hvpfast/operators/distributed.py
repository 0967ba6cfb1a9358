"""Operators over ``torch.distributed`` process groups: each process holds a shard of the data.

    L(p) = sum_r sum_{b on r} c_b L_b(p)      processes r; coefficients c_b over all processes' data
    A v  = sum_r A_r v                        one all-reduce

Two numbers per process are reduced along with the sum: whether its part failed, and a mark of what
must be the same everywhere (the tangents, the parameters). A process that fails therefore still
takes part in the all-reduce, which tells all the others: they raise together, and none waits.

The rest of an algorithm, such as the vectors of Lanczos, is computed by every process from the same
numbers. gloo (CPU) is tested with two and three processes; NCCL takes the same path and has not
been run on several GPUs.
"""

from __future__ import annotations

import inspect
import os
import weakref
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hvpfast.backends.probes.draw import probe_rows
from hvpfast.backends.probes.source import ProbeSource
from hvpfast.operators.batch import bytes_of, map_tensors, tensors_in

T = TypeVar("T")

_FOLD = 4093  # a prime: a difference cannot hide in the period of the parameters


class DistributedError(RuntimeError):
    """Another process of the group failed, or does not have what this one has."""


class Group:
    """A process group with sums that fail in all processes or in none.

    Args:
        process_group: of ``torch.distributed``, with this process in it.

    Attributes:
        rank, size: of this process in the group, and of the group.

    Raises:
        RuntimeError: ``torch.distributed`` is not available or not initialised.
        ValueError: this process is not in the group.
        TypeError: not a process group.
    """

    def __init__(self, process_group: Any) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise RuntimeError(
                "process_group= needs torch.distributed: start the program with torchrun, and call "
                "torch.distributed.init_process_group first"
            )
        if process_group is dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError(
                "this process is not in the process group: make the operator only in its members"
            )
        if not isinstance(process_group, dist.ProcessGroup):
            raise TypeError(
                "process_group must be a torch.distributed process group, such as "
                f"torch.distributed.group.WORLD; got {type(process_group).__name__}"
            )
        # torch may end a process in which a destroyed group still has an owner at exit
        self._reference = weakref.ref(process_group)
        self.rank, self.size = dist.get_rank(process_group), dist.get_world_size(process_group)
        self.backend = str(dist.get_backend(process_group))
        on_gpu = "nccl" in self.backend and "gloo" not in self.backend
        self._device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else None
        self._weights = torch.empty(0, dtype=torch.float32, device="cpu")

    @property
    def _group(self) -> dist.ProcessGroup:
        group = self._reference()
        if group is None:
            raise RuntimeError(
                "the process group was destroyed: make operators again with one that exists"
            )
        return group

    def describe(self) -> str:
        """Text: which process this is."""
        return f"process group: rank {self.rank} of {self.size}, {self.backend}"

    def total(
        self,
        what: str,
        part: Callable[[], Tensor],
        shape: Sequence[int],
        dtype: torch.dtype = torch.float64,
        device: torch.device | None = None,
        mark: Callable[[], Tensor | float] = float,
    ) -> tuple[Tensor, list[float]]:
        """The sum of all processes' parts, and their marks, by one all-reduce.

        Args:
            what: name of the sum, for messages.
            part: returns this process's summand, of ``shape``; may raise.
            shape: of the summands.
            dtype: of the summands.
            device: of the summands; that of the group's collectives if None.
            mark: gives a number to show to all processes; may raise.

        Returns:
            (sum, marks): a new tensor of ``shape``, and one number per process.

        Raises:
            DistributedError: another process raised, or was lost.
            FloatingPointError: this process's part holds NaN or infinity.
            Exception: what ``part`` or ``mark`` raised here.
        """
        count, size = torch.Size(shape).numel(), self.size
        buffer = torch.zeros(count + 2 * size, dtype=dtype, device=device or self._device)
        summed, failed, marks = torch.split(buffer, [count, size, size])
        mine, error = summed, None
        try:
            marks[self.rank] = mark()
            mine = part()
            summed.copy_(mine.reshape(-1))
            # a sum is finite unless an entry is not, or it overflows: _explain tells these apart
            failed[self.rank] = ~torch.isfinite(summed.sum())
        except Exception as raised:
            error = raised
            buffer.zero_()
            failed[self.rank] = 1.0
        self._all_reduce(what, buffer)
        shown: list[float] = buffer[count:].tolist()
        if any(shown[:size]):
            if error is None and not bool(torch.isfinite(mine).all()):
                error = FloatingPointError(f"its part of the {what} holds NaN or infinity")
            self._explain(what, error)
        return summed.view(*shape), shown[size:]

    def _explain(self, what: str, error: Exception | None) -> None:
        """Raise in every process if any of them failed."""
        reasons = self.gathered(what, None if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        failures = [
            f"rank {rank} of {self.size} failed in the {what}: {reason}"
            for rank, reason in enumerate(reasons)
            if reason is not None
        ]
        if failures:
            raise DistributedError("\n".join(failures))

    def same(self, what: str, details: Mapping[str, Any]) -> None:
        """Raise in every process unless all have equal ``details``.

        Raises:
            DistributedError: with the first entry in which two processes differ.
        """
        everyone = self.gathered(what, dict(details))
        for rank, others in enumerate(everyone[1:], start=1):
            for key in [*everyone[0], *others]:
                first, other = everyone[0].get(key, "absent"), others.get(key, "absent")
                if first != other:
                    raise DistributedError(
                        f"the processes differ in {key}: rank 0 has {first}, rank {rank} has "
                        f"{other}. All processes need the same {what}; only the data may differ"
                    )

    def gathered(self, what: str, mine: T) -> list[T]:
        """``mine`` of every process, by rank."""
        everyone: list[Any] = [None] * self.size
        try:
            dist.all_gather_object(everyone, mine, group=self._group)
        except RuntimeError as error:
            self._lost(what, error)
        return everyone

    def least(self, value: int) -> int:
        """The least of all processes' integers in [0, 2**64)."""
        tensor = torch.tensor(value - 2**63, dtype=torch.int64, device=self._device)
        self._all_reduce("choice of a common number", tensor, dist.ReduceOp.MIN)
        return int(tensor) + 2**63

    def _all_reduce(self, what: str, tensor: Tensor, op: Any = None) -> None:
        try:
            dist.all_reduce(tensor, op or dist.ReduceOp.SUM, group=self._group)
        except RuntimeError as error:
            self._lost(what, error)

    def _lost(self, what: str, error: RuntimeError) -> NoReturn:
        raise DistributedError(
            f"rank {self.rank} of {self.size} lost the others in the {what}: a process has ended, "
            f"is stuck, or broke the connection; its own output tells why. Here: {error}"
        ) from error

    # Products: the tangents must be the same in all processes.

    def product(
        self, what: str, part: Callable[[], Tensor], shape: Sequence[int], rows: Tensor
    ) -> Tensor:
        """The sum of all processes' parts of a product with the same ``rows`` (K, P).

        Raises:
            DistributedError: as :meth:`total`, or the processes have different rows.
        """
        out, marks = self.total(
            what, part, shape, rows.dtype, rows.device, lambda: self._mark(rows)
        )
        scale, tolerance = max(map(abs, marks)), torch.finfo(rows.dtype).eps ** 0.5
        wrong = [r for r, m in enumerate(marks) if not abs(m - marks[0]) <= tolerance * scale]
        if wrong:
            raise DistributedError(
                f"the processes gave different tangents to the {what}: those of rank {wrong[0]} "
                "are not those of rank 0. Draw them from the same seed= in every process, or "
                "broadcast them"
            )
        return out

    def _mark(self, rows: Tensor) -> Tensor | float:
        """A weighted sum of the entries, folded to (4093,): it differs where tangents do."""
        flat, weights = rows.reshape(-1), self._weights
        if weights.dtype != rows.dtype or weights.device != rows.device or not weights.numel():
            source = ProbeSource(1, "normal", seed=0)
            weights = self._weights = probe_rows(source, _FOLD, rows.dtype, rows.device)[0]
        whole = flat.numel() // _FOLD * _FOLD
        folded = flat[:whole].view(-1, _FOLD).sum(0)
        folded[: flat.numel() - whole] += flat[whole:]
        return folded @ weights


@contextmanager
def together(group: Group | None, what: str) -> Iterator[None]:
    """A context for work that each process does on its own: if it fails in one, all raise.

    Raises:
        DistributedError: it raised in another process.
        Exception: whatever the work raised here.
    """
    if group is None:
        yield
        return
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised

    def part() -> Tensor:
        if error is not None:
            raise error
        return torch.zeros(0, dtype=torch.float32, device="cpu")

    group.total(what, part, (0,))


def processes_here(group: Group | None, device: torch.device) -> int:
    """Number of processes that share this machine's memory, for operators on the CPU; else 1."""
    if group is None or device.type != "cpu":
        return 1
    return min(group.size, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def checksum(tensors: Iterable[Tensor]) -> int:
    """CRC-32 of the bytes of tensors."""
    value = 0
    for tensor in tensors:
        value = zlib.crc32(bytes_of(tensor), value)
    return value


def settings_of(model: nn.Module, loss_fn: Callable[..., Any]) -> dict[str, str]:
    """What operators must have in common in all processes, besides the values of parameters."""
    modules = {
        f"the module {name!r}": f"{type(module).__qualname__}({module.extra_repr()})"
        for name, module in model.named_modules()
    }
    return {**modules, "the loss": _loss_text(loss_fn)}


def _loss_text(loss_fn: Any) -> str:
    if isinstance(loss_fn, nn.Module):
        plain = (bool, int, float, str, type(None))
        options = [f"{k}={v!r}" for k, v in vars(loss_fn).items() if isinstance(v, plain)]
        tensors = checksum([*loss_fn.parameters(), *loss_fn.buffers()])
        return f"{type(loss_fn).__qualname__}({', '.join(options)}), tensors {tensors:08x}"
    if inner := getattr(loss_fn, "func", None):  # functools.partial
        given = [repr(v) for v in loss_fn.args] + [f"{k}={v}" for k, v in loss_fn.keywords.items()]
        return f"{_loss_text(inner)} with {', '.join(given)}"
    named = loss_fn if inspect.isroutine(loss_fn) else type(loss_fn)
    return f"{named.__module__}.{named.__qualname__}"


def shard(data: Any, process_group: Any) -> Any:
    """This process's part of tensors (N, ...): N // size consecutive samples, or one more.

    Every sample is in one part, while ``torch.utils.data.DistributedSampler`` repeats samples so
    that all parts have one size. With fewer samples than processes some parts are empty, which
    operators allow.

    Args:
        data: a tensor or nested tuples, lists and dicts of tensors with the same N, such as (x, y).
        process_group: of ``torch.distributed``, with this process in it.

    Returns:
        The same nest with views into the tensors.

    Raises:
        ValueError: the tensors differ in N.
    """
    group = Group(process_group)
    sizes = {tensor.shape[:1] for tensor in tensors_in(data)}
    if len(sizes) != 1 or sizes == {torch.Size()}:
        raise ValueError(
            "data must hold tensors with one number of samples N as their first dimension; got "
            f"{sorted(tuple(size) for size in sizes)}"
        )
    return map_tensors(lambda t: t.tensor_split(group.size)[group.rank], data)
