"""A record printed as tables, and drawn as a figure. Functions of the record only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hvpfast.bench import tables
from hvpfast.bench.marks import AT_MOST, ENGINES, judge, judge_memory
from hvpfast.bench.record import BROKEN, cells_of, fastest_forms
from hvpfast.bench.tables import Row, duration, number

DISTURBED = 0.05  # cores used by other processes; a quiet machine shows less
COLOURS = {"ours": "#c44e52", "eager": "#4c72b0", "compiled": "#55a868", "graphed": "#8172b2",
           "plain": "#8c8c8c", "loop": "#c44e52"}  # fmt: skip


def _gradients(rows: Iterable[Row]) -> dict[str, float]:
    """Seconds of torch's own gradient per case, the unit of the column "gradients"."""
    return {
        row["case"]: row["median_s"]
        for row in rows
        if row["operation"] == "gradient" and row["provider"] == "torch-eager" and row["median_s"]
    }


def form_and_status(row: Row) -> str:
    """The form's name, and what became of it unless it was timed."""
    return str(row["form"]) + ("" if row["status"] == "timed" else f" ({row['status']})")


# Who was timed, and how fast: the first columns of every table of forms.
TIMES: tables.Columns = (
    ("provider", "provider"),
    ("form", form_and_status),
    ("median", lambda row: duration(row["median_s"])),
    ("q1", lambda row: duration(row["q1_s"])),
    ("q3", lambda row: duration(row["q3_s"])),
    ("GFLOP/s", lambda row: number(row["gflops"], ".3g")),
    ("peak", lambda row: number(row["peak_fraction"], ".0%")),
)


def fastest_first(rows: Iterable[Row]) -> list[Row]:
    """Rows by their time, those without one last."""
    return sorted(rows, key=lambda row: row["median_s"] or float("inf"))


def cell_table(rows: list[Row], gradient: float | None) -> str:
    """One cell, fastest first; ``gradient``: seconds of torch's gradient of the case, if timed."""
    ours = [r["median_s"] for r in rows if r["provider"] in ENGINES and r["status"] == "timed"]
    best = min(ours, default=None)

    def times(unit: float | None) -> tables.Show:
        return lambda row: f"{row['median_s'] / unit:.2f}" if row["median_s"] and unit else "-"

    columns = (
        *TIMES,
        ("gradients", times(gradient)),
        ("x ours", times(best)),
        ("memory", _memory),
    )
    return tables.fitted(columns, fastest_first(rows))


def _memory(row: Row) -> str:
    found = row["memory"]
    return _mebibytes(found["first"]) if found and "first" in found else "-"


def _mebibytes(count: float) -> str:
    return f"{count / 2**20:.3g} MiB"


def marks_table(rows: Iterable[Row]) -> str:
    found = judge(rows)
    return tables.fitted(MARKS, found) if found else "no mark is about the cells of this run"


def _wanted(mark: Row) -> str:
    return f"{'<=' if mark['against'] in AT_MOST else '>='} {mark['wanted']:g}"


def _met(mark: Row) -> str:
    return str(mark["reason"]) if mark["reached"] is None else _yes(mark)


def _yes(row: Row) -> str:
    return "yes" if row["met"] else "NO"


MARKS: tables.Columns = (
    ("case", "case"),
    ("operation", "operation"),
    ("K", "num_tangents"),
    ("against", "against"),
    ("wanted", _wanted),
    ("reached", lambda mark: number(mark["reached"], ".2f")),
    ("met", _met),
    ("ours", lambda mark: f"{mark['provider']}: {mark['form'] or '-'}"),
    ("rival", lambda mark: mark["rival"] or "-"),
)
MEMORY: tables.Columns = (
    ("case", "case"),
    ("operation", "operation"),
    ("K", "num_tangents"),
    ("ours", lambda cell: _mebibytes(cell["ours"])),
    ("torch-eager", lambda cell: _mebibytes(cell["rival"])),
    ("met", _yes),
    ("form", "form"),
    ("form of torch-eager", "rival_form"),
)


def memory_table(rows: Iterable[Row]) -> str:
    """Peak memory of ours against torch's reverse mode, where it was measured; else empty."""
    cells = judge_memory(rows)
    return tables.fitted(MEMORY, cells) if cells else ""


def render(result: Mapping[str, Any]) -> str:
    environment, limits, rows = result["environment"], result["peak"], result["rows"]
    parts = [machine_line(environment, limits), limits_line(limits)]
    if (limits["disturbance"] or 0.0) > DISTURBED:
        parts.append(
            f"DISTURBED: other processes used {limits['disturbance']:.2f} cores while the peak was "
            "measured, so shares of the peak are too large"
        )
    gradients = _gradients(rows)
    for (case, K, operation), cell in cells_of(rows).items():
        macs = next((r for r in cell if r["kind"] != "plain"), cell[0])
        parts.append(
            f"\n{case}, K = {K}, {operation}: at least {macs['macs'] / 1e6:.4g} M multiply-adds "
            f"(schedule: {macs['schedule']}), {macs['bytes'] / 1e6:.4g} MB; floors: arithmetic "
            f"{duration(macs['arithmetic_floor_s'])}, traffic {duration(macs['traffic_floor_s'])}\n"
            + cell_table(cell, gradients.get(case))
        )
        busy = max((r["disturbance"] or 0.0 for r in cell), default=0.0)
        if busy > DISTURBED:
            parts.append(f"  DISTURBED: other processes used {busy:.2f} cores during this timing")
        parts += [
            f"  {r['status']}: {r['provider']}: {r['form']}: {r['reason']}"
            for r in cell
            if r["status"] in BROKEN
        ]
    parts.append("\nMarks (ratios of medians of this run)\n" + marks_table(rows))
    if memories := memory_table(rows):
        parts.append("\nPeak memory above the inputs\n" + memories)
    parts += [f"skipped {name}: {reason}" for name, reason in result["skipped"].items()]
    if result["interrupted"]:
        parts.append("INTERRUPTED: the cells that were not finished are missing")
    return "\n".join(parts)


def machine_line(environment: Mapping[str, Any], limits: Mapping[str, Any]) -> str:
    if "gemm_gflops" in limits:
        device = environment["gpu"] or {"name": "a GPU", "driver_version": "unknown"}
        return (
            f"{device['name']}, driver {device.get('driver_version', 'unknown')}, torch "
            f"{environment['packages']['torch']}, {limits['dtype']}"
        )
    return (
        f"{environment['cpu_model']}, {environment['cpu_affinity']} cores, "
        f"{limits['threads']} threads, {limits['dtype']}"
    )


def limits_line(limits: Mapping[str, Any]) -> str:
    """The limits that shares of the peak and floors are of."""
    copy = f"copy {limits['copy_gbytes_per_s']:.1f} GB/s"
    if "gemm_gflops" in limits:
        nominal = limits["fma_gflops_all"]
        peak = "unknown" if nominal is None else f"{nominal:.0f} GFLOP/s"
        return (
            f"FMA peak: {peak} ({limits['fma_source']}); torch's matrix product "
            f"{limits['gemm_gflops']:.0f} GFLOP/s; {copy}"
        )
    if not limits["fma_gflops_all"]:
        return f"FMA peak: {limits['fma_source']}; {copy}"
    return (
        f"FMA peak: {limits['fma_gflops_1']:.0f} GFLOP/s on one thread, "
        f"{limits['fma_gflops_all']:.0f} on all; {copy}"
    )


def draw(result: Mapping[str, Any], path: Path) -> None:
    """One panel per cell: the fastest form of each provider, median with quartiles, log scale.

    Raises:
        RuntimeError: matplotlib is not installed, or nothing was timed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RuntimeError("figures need matplotlib: pip install 'hvpfast[bench]'") from error
    panels = {
        cell: best
        for cell, rows in cells_of(result["rows"]).items()
        if (best := fastest_forms(rows))
    }
    if not panels:
        raise RuntimeError("nothing was timed, so there is nothing to draw")
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(5.2 * columns, 2.6 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for axis, ((case, K, operation), rows) in zip(axes, panels.items(), strict=False):
        places = range(len(rows))
        medians, low, high = ([r[name] for r in rows] for name in ("median_s", "q1_s", "q3_s"))
        spread = [np.subtract(medians, low), np.subtract(high, medians)]
        colours = [COLOURS[r["kind"]] for r in rows]
        axis.barh(places, medians, xerr=spread, color=colours, height=0.7, error_kw={"lw": 1})
        axis.set_yticks(list(places), [f"{r['provider']}\n{r['form']}" for r in rows], fontsize=6)
        axis.set_xscale("log")
        axis.tick_params(axis="x", which="minor", labelbottom=False)  # they would overlap
        axis.set_xlim(min(medians) / 2, max(medians) * 6)
        for place, r in zip(places, rows, strict=True):
            share = "" if r["peak_fraction"] is None else f", {r['peak_fraction']:.0%} of peak"
            axis.text(
                r["q3_s"] * 1.1, place, duration(r["median_s"]) + share, va="center", fontsize=6
            )
        axis.invert_yaxis()
        axis.set_title(f"{case}, K = {K}: {operation}", fontsize=8)
        axis.set_xlabel("seconds per call", fontsize=7)
        axis.tick_params(labelsize=6)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
