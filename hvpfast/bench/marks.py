"""The speeds that the project promises, as data, and how a run's rows compare with them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

from hvpfast.bench.record import cells_of, timed
from hvpfast.bench.tables import Row


@dataclass(frozen=True)
class Mark:
    """A promised ratio, ``wanted``; ``against`` says of what.

    - ``compiled``, ``eager``, ``peer`` (all kinds of peers), ``torch-compile`` (that provider): the
      fastest such row's time over ours, at least;
    - ``plain`` (an unpenalised step), ``gradient`` (torch's eager gradient of the case), ``floor``
      (minimal operations at the FMA peak): our time over it, at most;
    - ``peak``: our share of the FMA peak by minimal operation counts, at least.
    """

    case: str
    num_tangents: int
    operation: str
    against: str
    wanted: float
    device: str = "cpu"


_TINY, _WIDE, _LARGE = "40-32-10", "3072-256-100", "784-128-128-10"
_DEEP = "784-1024-512-256-128-64-10"
MARKS = (
    Mark(_TINY, 1, "hvp", "compiled", 10.0),
    Mark(_TINY, 1, "hvp", "eager", 35.0),
    Mark(_TINY, 1, "penalty", "compiled", 6.0),
    Mark(_TINY, 1, "penalty", "eager", 40.0),
    Mark(_TINY, 8, "hvp", "compiled", 6.0),
    Mark(_TINY, 8, "penalty", "compiled", 7.0),
    Mark(_WIDE, 3, "hvp", "peer", 1.4),
    Mark(_WIDE, 3, "penalty", "compiled", 3.0),
    Mark(_WIDE, 3, "penalty", "eager", 5.0),
    Mark(_WIDE, 3, "penalty_normal", "compiled", 5.0),
    Mark(_LARGE, 8, "hvp", "peak", 0.70),
    Mark(_LARGE, 8, "hvp", "peer", 1.3),
    Mark(_LARGE, 8, "quadratic", "peer", 2.6),
    Mark(_LARGE, 8, "penalty", "peer", 1.8),
    Mark("train-40-32-32-10", 1, "train_step", "plain", 1.0),
    Mark("train-3072-256-100", 3, "train_step", "plain", 1.4),
    Mark(_DEEP, 1, "hvp", "torch-compile", 3.0, "cuda"),
    Mark(_DEEP, 1, "hvp", "gradient", 1.5, "cuda"),
    Mark(_DEEP, 1, "hvp_warm", "gradient", 1.5, "cuda"),
    Mark("train-3072-256-100", 3, "train_step", "peer", 5.0, "cuda"),
    Mark("784-128-128-10-n60000", 1, "hvp_warm", "floor", 1.5, "cuda"),
)
AT_MOST = ("plain", "gradient", "floor")
# Which rows of the cell our time is compared with; of the case's gradients for "gradient".
_RIVALS: dict[str, Callable[[Row], bool]] = {
    "compiled": lambda row: row["kind"] == "compiled",
    "eager": lambda row: row["kind"] == "eager",
    "peer": lambda row: row["kind"] in ("compiled", "eager", "graphed"),
    "torch-compile": lambda row: row["provider"] == "torch-compile",
    "plain": lambda row: row["kind"] == "plain" and not row["form"].startswith("compiled"),
    "gradient": lambda row: row["kind"] == "eager",
}
# Providers that marks are about. Probes are those of the peers; normal ones the library draws.
FUNCTIONAL, AUTOGRAD = "ours-cpu", "ours-autograd"
ON_GPU = ("ours-cuda", "ours-triton")
ENGINES = (FUNCTIONAL, *ON_GPU)


def _fastest(rows: Iterable[Row]) -> Row | None:
    return next(iter(timed(rows)), None)


def _eligible(row: Row, provider: str, operation: str) -> bool:
    """Whether a row of ours is what a mark is about: drawn probes only where it names them."""
    if row["provider"] != provider:
        return False
    if provider in ON_GPU:  # a recorded step is what its mark is about; other marks are not
        return ("captured" in str(row["form"])) == (operation == "train_step")
    if operation == "penalty":
        return "drawn" not in str(row["form"])
    return operation != "penalty_normal" or "drawn" in str(row["form"])


def judge(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Every mark whose cell was run, with what was reached.

    Returns:
        One dict per mark and provider of ours (the functional one, and the one by autograd where it
        has the operation): ``case, num_tangents, operation, against, wanted, provider, form, rival,
        reached, met``; where a row is missing ``reached`` and ``met`` are None, and ``reason`` says
        why.
    """
    rows = list(rows)
    found = []
    for mark in MARKS:
        here = (mark.case, mark.device)
        of_case = [row for row in rows if (row["case"], row.get("device", "cpu")) == here]
        wanted = (mark.num_tangents, mark.operation)
        cell = [row for row in of_case if (row["num_tangents"], row["operation"]) == wanted]
        if not cell:
            continue
        both = mark.operation in ("penalty", "penalty_normal", "train_step")
        ways = (FUNCTIONAL, AUTOGRAD) if both else (FUNCTIONAL,)
        for provider in ON_GPU if mark.device == "cuda" else ways:
            ours = _fastest(row for row in cell if _eligible(row, provider, mark.operation))
            rivals = cell
            if mark.against == "gradient":
                rivals = [row for row in of_case if row["operation"] == "gradient"]
            found.append(_reached(mark, provider, ours, rivals))
    return found


def judge_memory(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Peak memory of ours against reverse-mode differentiation, cell by cell.

    Returns:
        One dict per cell where both were measured: ``case, num_tangents, operation, form, ours,
        rival_form, rival, met``; bytes of the fastest timed form of ``ours-cpu`` and of the
        torch-eager form that needs least.
    """
    measured = (row for row in rows if row["memory"] and "first" in row["memory"])
    found = []
    for (case, K, operation), cell in cells_of(measured).items():
        ours = _fastest(row for row in cell if row["provider"] == FUNCTIONAL)
        eager = [row for row in cell if row["provider"] == "torch-eager"]
        if ours is None or not eager:
            continue
        rival = min(eager, key=lambda row: int(row["memory"]["first"]))
        found.append(
            {
                "case": case,
                "num_tangents": K,
                "operation": operation,
                "form": ours["form"],
                "ours": ours["memory"]["first"],
                "rival_form": rival["form"],
                "rival": rival["memory"]["first"],
                "met": ours["memory"]["first"] <= rival["memory"]["first"],
            }
        )
    return found


def _reached(mark: Mark, provider: str, ours: Row | None, rivals: list[Row]) -> dict[str, Any]:
    result = {**asdict(mark), "provider": provider, "form": ours and ours["form"]}
    result |= dict.fromkeys(("rival", "reached", "met"))
    del result["device"]
    if ours is None:
        return {**result, "reason": f"{provider} was not timed"}
    if mark.against == "peak":
        if (reached := ours["peak_fraction"]) is None:
            return {**result, "reason": "the peak was not measured"}
    elif mark.against == "floor":
        if ours["arithmetic_floor_s"] is None:
            return {**result, "reason": "the peak is not known"}
        reached = ours["median_s"] / ours["arithmetic_floor_s"]
    else:
        rival = _fastest(filter(_RIVALS[mark.against], rivals))
        if rival is None:
            return {**result, "reason": f"no row of kind {mark.against} was timed"}
        result["rival"] = f"{rival['provider']}: {rival['form']}"
        ratio = rival["median_s"] / ours["median_s"]
        reached = 1 / ratio if mark.against in AT_MOST else ratio
    met = reached <= mark.wanted if mark.against in AT_MOST else reached >= mark.wanted
    return {**result, "reached": reached, "met": met}
