"""What a check found: the bars, and the whole record in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Steps = Mapping[str, Mapping[str, Any]]


def bars(steps: Steps) -> list[dict[str, Any]]:
    """What the project promises, as reached by the better of its GPU engines.

    Args:
        steps: of the record.

    Returns:
        One dict per bar: ``what``, ``wanted``, ``reached`` by provider, and ``met``: whether one of
        them meets it, None when none was timed. The last bar is about every row of ours.
    """
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    wrong, judged = [], 0
    for entry in steps.values():
        for mark in entry["facts"].get("marks", []):
            key = (mark["case"], mark["operation"], mark["against"])
            bar = found.setdefault(
                key,
                {
                    "what": f"{key[0]}, {key[1]} against {key[2]}",
                    "wanted": mark["wanted"],
                    "reached": {},
                    "met": None,
                },
            )
            bar["reached"][mark["provider"]] = mark["reached"]
            if mark["met"] is not None:
                bar["met"] = bool(bar["met"]) or mark["met"]
        ours = [row for row in entry["facts"].get("rows", []) if row["kind"] == "ours"]
        judged += sum(row["status"] in ("timed", "screened", "wrong") for row in ours)
        wrong += [f"{row['provider']}: {row['form']}" for row in ours if row["status"] == "wrong"]
    if judged:
        error = {
            "what": "error of every form of ours, at most twice torch's in the same dtype",
            "wanted": 0,
            "reached": {"wrong forms": len(wrong)},
            "met": not wrong,
        }
        return [*found.values(), error]
    return list(found.values())


def render(result: Mapping[str, Any]) -> str:
    """The record as text: bars, steps, and what went wrong, longest last."""
    steps: Steps = result["steps"]
    lines = [_machine(steps)]
    if result["dry_run"]:
        lines.append("DRY RUN on the CPU with tiny cases: it proves the script and nothing else")
    lines += ["", "bars"]
    for bar in result["bars"]:
        met = {True: "met", False: "NOT met", None: "not timed"}[bar["met"]]
        reached = ", ".join(
            f"{name} {'-' if value is None else f'{value:.3g}'}"
            for name, value in bar["reached"].items()
        )
        lines.append(f"  {met:10} {bar['what']}: wanted {bar['wanted']:g}; {reached}")
    if not result["bars"]:
        lines.append("  none was measured")
    lines += ["", "steps"]
    for name, entry in steps.items():
        said = "; ".join(filter(None, [entry["reason"], _said(entry["facts"])]))
        lines.append(f"  {entry['status']:12} {entry['seconds']:6.1f} s  {name:20} {said}")
    for name, entry in steps.items():
        lines += [f"  failed: {test}" for test in entry["facts"].get("failures", [])]
        lines += [
            f"  {row['status']}: {name}: {row['provider']}: {row['form']}: {_first(row['reason'])}"
            for row in entry["facts"].get("rows", [])
            if row["status"] in ("wrong", "failed")
        ]
        for provider, reason in _skipped(entry["facts"]).items():
            lines.append(f"  without {provider}: {name}: {_first(reason)}")
    for name, entry in steps.items():
        if entry["tail"]:
            lines += ["", f"---- the end of what {name} wrote", entry["tail"][-1200:].strip()]
    verdict = "everything succeeded" if result["ok"] else "NOT everything succeeded"
    return "\n".join([*lines, "", f"{verdict}; {result['seconds']:.0f} s"])


def _machine(steps: Steps) -> str:
    facts = steps.get("environment", {}).get("facts", {})
    gpu = facts.get("gpu") or {}
    torch = facts.get("packages", {}).get("torch", "torch of unknown version")
    name = gpu.get("name", "no GPU")
    return f"{name}, driver {gpu.get('driver_version', 'unknown')}, torch {torch}"


def _said(facts: Mapping[str, Any]) -> str:
    """A step's facts in a few words."""
    if "collected" in facts:
        total = facts["collected"]
        return (
            f"{facts['passed']} passed, {facts['failed']} failed, {facts['skipped']} skipped "
            f"of {'?' if total is None else total}"
        )
    if "rows" in facts:
        counts: dict[str, int] = {}
        for row in facts["rows"]:
            counts[row["status"]] = counts.get(row["status"], 0) + 1
        return ", ".join(f"{count} {status}" for status, count in counts.items())
    return ""


def _first(text: str | None) -> str:
    return (text or "").partition("\n")[0][:200]


def _skipped(facts: Mapping[str, Any]) -> Mapping[str, str]:
    """Providers that a benchmark could not use; a test run counts its skipped tests instead."""
    skipped = facts.get("skipped", {})
    return skipped if isinstance(skipped, Mapping) else {}
