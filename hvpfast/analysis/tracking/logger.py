"""Curvature during training: chosen quantities every so many steps, as lines of JSON.

    with CurvatureLogger(model, loss_fn, (x, y), "curvature.jsonl", every=100) as logger:
        for batch in loader:
            ...
            optimizer.step()
            logger.step()

The log is a file of whole lines in the order of steps, at most one per step, even if the training
is interrupted.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hvpfast.analysis.tracking.measures import QUANTITIES, Measurement
from hvpfast.backends.probes.source import fresh_seed
from hvpfast.mlp.checks import check_curvature
from hvpfast.operators.hessian import GGNOperator, HessianOperator
from hvpfast.operators.parameters import select
from hvpfast.utils.files import write_whole

Line = dict[str, Any]

_APPEND = os.O_WRONLY | os.O_APPEND
_NOT_FINITE = re.compile(r"the loss is -?(nan|inf)\b")  # the operators' message for such a loss


class CurvatureLogger:
    """Logs curvature of a loss on given data while a model is trained by an ordinary loop.

    :meth:`step` is called after every optimizer step; every ``every``-th call measures. A line
    holds ``step``, ``seconds`` (since the training began), ``measure_seconds``, ``num_matvecs``,
    ``seed``, ``skipped`` (measurements left out for the budget since the last line), and

        loss                of the given data
        gradient_norm       of its gradient g
        trace               Tr A, with trace_stderr; A is the Hessian, or the Gauss-Newton matrix
        frobenius_sq        Tr A^2, with frobenius_sq_stderr
        diagonal_norm       length of the diagonal of A, with diagonal_norm_stderr
        top_eigenvalues     the largest ones, algebraically, descending, with their residual norms
                            as top_residuals; each search starts from the last vectors
        sharpness           the largest eigenvalue
        gradient_curvature  g'Ag / g'g
        update_curvature    u'Au / u'u for the last change u of the parameters; null where none is
                            known, as before the first step

    If the loss or the parameters are not finite, a line has nulls and an ``error``, and training
    continues. Modules are measured in eval mode. Training is not disturbed: modes, gradients,
    parameters, buffers and random generators are the same afterwards.

    Args:
        model, loss_fn, reduction, dtype, backend: as for :class:`hvpfast.HessianOperator`.
        data: what to measure on, as for the operators.
        path: of the log.
        every: steps between measurements.
        quantities: names from the list above.
        params: the parameters whose curvature is measured, as for the operators.
        curvature: ``"hessian"`` or ``"ggn"``.
        num_matvecs: products for trace, frobenius_sq and diagonal_norm, which share them.
        num_eigenvalues: number of top_eigenvalues.
        tol: relative residual of the eigenvalues.
        max_matvecs: products that a search for eigenvalues may take; its best so far is logged.
        seed: of the probes; every step has probes of its own. None takes fresh entropy.
        budget: share of the time that measuring may take, in (0, 1); a measurement that would
            exceed it is skipped, except for the first. None has no limit.
        resume: continue an existing log: an incomplete last line is cut off, and steps in the log
            are not measured again. False refuses a file that is not empty.

    Raises:
        ValueError, TypeError: an argument is not as described.
        FileExistsError: the log exists and ``resume`` is False.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[..., Any],
        data: Any,
        path: str | os.PathLike[str],
        *,
        every: int = 100,
        quantities: Iterable[str] = ("loss", "gradient_norm", "trace", "sharpness"),
        params: Any = None,
        curvature: str = "hessian",
        num_matvecs: int = 20,
        num_eigenvalues: int = 1,
        tol: float = 1e-3,
        max_matvecs: int = 200,
        seed: int | None = None,
        budget: float | None = None,
        reduction: str | None = None,
        dtype: torch.dtype | None = None,
        backend: str = "auto",
        resume: bool = False,
    ) -> None:
        for name, value in (("every", every), ("num_eigenvalues", num_eigenvalues)):
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be an integer >= 1; got {value!r}")
        if budget is not None and not 0 < budget < 1:
            raise ValueError(f"budget must be a share of the time in (0, 1), or None; got {budget}")
        self._quantities = (quantities,) if isinstance(quantities, str) else tuple(quantities)
        for name in self._quantities:
            if name not in QUANTITIES:
                raise ValueError(f"quantities are {', '.join(QUANTITIES)}; got {name!r}")
        kind = GGNOperator if check_curvature(curvature) else HessianOperator
        options: dict[str, Any] = {"reduction": reduction, "dtype": dtype, "backend": backend}
        self._operator = partial(kind, model, loss_fn, params, data, **options)
        self._model, self._entries = model, select(model, params)
        self._measurement = Measurement(
            self._quantities, num_matvecs, num_eigenvalues, tol, max_matvecs
        )
        self._every, self._budget = every, budget
        self._seed = fresh_seed() if seed is None else seed
        self._path = Path(path)
        self._last = _heal(self._path, resume)
        self._steps = self._skipped = 0
        self._before: Tensor | None = None
        self._measured = self._cost = self._earlier = 0.0
        self._began = time.monotonic()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file: int | None = os.open(self._path, _APPEND | os.O_CREAT, 0o666)

    @property
    def num_steps(self) -> int:
        """Calls of :meth:`step` so far, those before a restored state included."""
        return self._steps

    @property
    def seconds(self) -> float:
        """Time since the training began, without the time between an end and its resumption."""
        return self._earlier + time.monotonic() - self._began

    def step(self) -> Line | None:
        """Count a step of the training, and measure if it is due.

        Returns:
            The line that was logged, or None.
        """
        self._steps += 1
        line = None
        if self._steps % self._every == 0 and self._steps > self._last:
            if self._affordable():
                line = self._log()
            else:
                self._skipped += 1
        next_due = (self._steps + 1) % self._every == 0
        wanted = "update_curvature" in self._quantities and self._steps >= self._last
        self._before = self._flat() if next_due and wanted else None
        return line

    def measure(self) -> Line | None:
        """Measure now, regardless of ``every`` and ``budget``; for instance before the first step.

        Returns:
            The line that was logged; None if the log has this step, or a later one, already.
        """
        return self._log() if self._steps > self._last else None

    def close(self) -> None:
        """Close the log."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def __enter__(self) -> CurvatureLogger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def state_dict(self) -> dict[str, Any]:
        """The state for a checkpoint of the training, from which the log can continue."""
        return {
            "steps": self._steps,
            "skipped": self._skipped,
            "seed": self._seed,
            "seconds": self.seconds,
            "measured_seconds": self._measured,
            "last_cost": self._cost,
            "before": self._before,
            "vectors": self._measurement.vectors,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint: lines of later steps are removed from the log."""
        self._steps, self._skipped = int(state["steps"]), int(state["skipped"])
        self._seed, self._before = int(state["seed"]), state["before"]
        self._measured, self._cost = float(state["measured_seconds"]), float(state["last_cost"])
        self._earlier, self._began = float(state["seconds"]), time.monotonic()
        self._measurement.vectors = state["vectors"]
        lines = self._path.read_bytes().splitlines(keepends=True)
        kept = [line for line in lines if json.loads(line)["step"] <= self._steps]
        if len(kept) < len(lines):
            write_whole(self._path, b"".join(kept))
            self.close()
            self._file = os.open(self._path, _APPEND)
        self._last = json.loads(kept[-1])["step"] if kept else -1

    def _affordable(self) -> bool:
        if self._budget is None or self._cost == 0:
            return True
        return self._measured + self._cost <= self._budget * self.seconds

    def _log(self) -> Line:
        if self._file is None:
            raise ValueError("the log is closed")
        start = time.monotonic()
        digest = hashlib.sha256(f"{self._seed}/{self._steps}".encode()).digest()
        seed = int.from_bytes(digest[:8], "big") >> 1  # 63 bits for every step
        with _eval_mode(self._model), torch.enable_grad():
            found = self._measure(seed)
        self._cost = time.monotonic() - start
        self._measured += self._cost
        line: Line = {
            "step": self._steps,
            "seconds": round(self.seconds, 6),
            "measure_seconds": round(self._cost, 6),
            "skipped": self._skipped,
            "seed": seed,
            **found,
        }
        line = {name: _finite(value) for name, value in line.items()}
        content = (json.dumps(line, allow_nan=False) + "\n").encode()
        while content:
            content = content[os.write(self._file, content) :]
        self._last, self._skipped = self._steps, 0
        return line

    def _measure(self, seed: int) -> Line:
        wrong = [e.name for e in self._entries if not bool(torch.isfinite(e.owner).all())]
        if wrong:
            return self._measurement.nothing(f"parameters are not finite: {', '.join(wrong)}")
        update = None if self._before is None else self._flat() - self._before
        try:
            return self._measurement(self._operator(), update, seed)
        except (ValueError, FloatingPointError) as error:
            if isinstance(error, ValueError) and not _NOT_FINITE.search(str(error)):
                raise
            return self._measurement.nothing(str(error))

    def _flat(self) -> Tensor:
        """A copy of the parameters (P,)."""
        return torch.cat([entry.values() for entry in self._entries])


def read_log(path: str | os.PathLike[str]) -> list[Line]:
    """The lines of a log, without an incomplete last one.

    Raises:
        ValueError: another line is damaged.
    """
    text = Path(path).read_bytes()
    lines = text[: text.rfind(b"\n") + 1].splitlines()
    try:
        return [json.loads(line) for line in lines]
    except ValueError as error:
        raise ValueError(f"{path} is not a log of this library, or is damaged ({error})") from error


def _heal(path: Path, resume: bool) -> int:
    """Cut an incomplete last line off an existing log; returns its last step, -1 if none."""
    if not path.exists() or path.stat().st_size == 0:
        return -1
    if not resume:
        raise FileExistsError(
            f"{path} exists: pass resume=True to go on with it, or choose another path"
        )
    lines = read_log(path)
    os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
    return int(lines[-1]["step"]) if lines else -1


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """A context with all modules in eval mode; it restores the mode of each."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _finite(value: Any) -> Any:
    """The value with None for numbers that are not finite, which JSON cannot write."""
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
