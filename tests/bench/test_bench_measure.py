"""The measuring loop and the tables of the benchmark."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from hvpfast.bench import tables
from hvpfast.bench.measure import Cell, Form
from hvpfast.lab.measure import timing

COLUMNS = ("status", "reason", "median_s", "q1_s", "rounds", "inner", "errors", "disturbance")


def form(seconds: float, wrong: str = "") -> Callable[[], tuple[Form, dict[str, Any], str]]:
    """A form whose clock shows ``seconds`` per call."""
    made = Form(lambda: None, lambda call, calls: seconds * calls)
    return lambda: (made, {"errors": [seconds]}, wrong)


def checked(cell: Cell, **forms: Any) -> dict[str, dict[str, Any]]:
    """The rows by form after all steps of the loop."""
    for name, prepare in forms.items():
        cell.check({"provider": "p", "form": name}, "p", prepare)
    cell.screen()
    cell.time(2)
    return {row["form"]: row for row in cell.rows(COLUMNS)}


def test_a_row_says_what_became_of_a_form() -> None:
    def breaks() -> Any:
        raise ValueError("no such form")

    cell = Cell()
    cell.leave_out({"provider": "p", "form": "late"}, "no time")
    rows = checked(
        cell, good=form(1e-3), near=form(1.4e-3), slow=form(2e-3), off=form(1e-6, "off"), bad=breaks
    )
    assert list(rows) == ["late", "good", "near", "slow", "off", "bad"]
    assert all(list(row) == ["provider", "form", *COLUMNS] for row in rows.values())
    said = {name: (row["status"], row["reason"], row["median_s"]) for name, row in rows.items()}
    assert said == {
        "late": ("left out", "no time", None),
        "good": ("timed", None, pytest.approx(1e-3)),
        "near": ("timed", None, pytest.approx(1.4e-3)),
        "slow": ("screened", "over 1.5 times its provider's best form", 2e-3),
        "off": ("wrong", "off", None),
        "bad": ("failed", "ValueError: no such form", None),
    }
    assert rows["off"]["errors"] == [1e-6] and rows["bad"]["errors"] is None
    assert (rows["good"]["rounds"], rows["good"]["inner"]) == (2, 2)
    assert rows["slow"]["rounds"] is None and rows["slow"]["disturbance"] is None


def test_groups_are_screened_apart() -> None:
    cell = Cell()
    cell.check({"provider": "p", "form": "fast"}, "one", form(1e-3))
    cell.check({"provider": "p", "form": "slow"}, "other", form(1.0))
    cell.screen()
    assert list(cell.estimates()) == ["p: fast", "p: slow"]


def test_a_form_that_breaks_while_it_is_timed_is_reported() -> None:
    calls = iter(range(2))  # the estimate and the first round

    def clock(call: Callable[[], Any], count: int) -> float:
        if next(calls, None) is None:
            raise RuntimeError("out of memory")
        return 2.0  # so long that one call is its estimate

    prepare = lambda: (Form(lambda: None, clock), {"errors": [0.0]}, "")  # noqa: E731
    row = checked(Cell(), one=prepare)["one"]
    assert (row["status"], row["reason"]) == ("failed", "RuntimeError: out of memory")
    assert row["errors"] == [0.0] and row["median_s"] is None


def test_rounds_fit_into_a_budget() -> None:
    cell = Cell()
    cell.check({"provider": "p", "form": "long"}, "p", form(2.0))
    turn = timing.SETTLE_SECONDS + 2.0
    assert cell.rounds_within(10 * turn + 0.1, wanted=25, least=3) == 10
    assert cell.rounds_within(10 * turn + 0.1, wanted=25, least=3, calls=2) == 5
    assert cell.rounds_within(0.0, wanted=25, least=3) == 3
    assert cell.rounds_within(0.0, wanted=2, least=3) == 2


def test_tables() -> None:
    rows = [{"name": "a", "size": None}, {"name": "longer", "size": 0.1234}]
    columns: tables.Columns = (
        ("name", "name"),
        ("x", lambda row: "" if row["size"] else "y"),
        ("size", lambda row: tables.number(row["size"], ".2f")),
    )
    assert tables.fitted(columns, rows).splitlines() == [
        "name    x  size",
        "------  -  ----",
        "a       y     -",
        "longer     0.12",
    ]
    fixed: tables.FixedColumns = (("name", "name", "8"), ("n", "size", ">5"))
    assert tables.fixed_head(fixed, "|") == "name    |    n"
    assert tables.fixed_line(fixed, {"name": "a", "size": 3}, "|") == "a       |    3"
