"""The measuring loop of all suites: forms are checked, screened, then timed in turns."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hvpfast.bench import record
from hvpfast.lab.measure import timing

SCREEN = 1.5  # a form this many times slower than the fastest of its group is not timed further


@dataclass(frozen=True)
class Form:
    """One way to do the work: ``call`` does it once, ``clock`` takes its time."""

    call: Callable[[], Any]
    clock: timing.Clock


def clock(device: str, wait: Callable[[Any], Any] | None = None) -> timing.Clock:
    """What times a form: the host, the GPU's events, or the host once ``wait`` has returned."""
    if wait is not None:
        return timing.waiting(wait)
    return timing.host_seconds if device == "cpu" else timing.event_seconds


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """So many threads in torch and hvpfast; as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Cell:
    """Forms that do the same work and are compared with each other.

    Call in this order: :meth:`check` or :meth:`leave_out` for every form, :meth:`screen`,
    :meth:`time`; then :meth:`rows` gives what was found. A form's key is "provider: form".

    Attributes:
        disturbance: cores that other processes used while the forms were timed.
    """

    def __init__(self) -> None:
        self.disturbance: float | None = None
        self._identities: dict[str, Mapping[str, Any]] = {}
        self._found: dict[str, dict[str, Any]] = {}
        self._ready: dict[str, tuple[Form, Hashable]] = {}  # what is still to be timed; its group

    def leave_out(self, identity: Mapping[str, Any], reason: str) -> None:
        """A form that is not run at all; ``identity`` begins its row."""
        self._found[self._add(identity)].update(status="left out", reason=reason)

    def check(
        self,
        identity: Mapping[str, Any],
        group: Hashable,
        prepare: Callable[[], tuple[Form, dict[str, Any], str]],
    ) -> None:
        """Prepare and judge one form; a right one gets a quick estimate of its time.

        Args:
            identity: begins its row, with at least "provider" and "form".
            group: of the forms that it is screened among.
            prepare: makes the form, runs it and returns it with what its row says of the check
                and why its result is wrong, "" if it is right. What it raises fails the form.
        """
        key = self._add(identity)
        found = self._found[key]
        try:
            form, facts, wrong = prepare()
            found.update(facts)
            if wrong:
                found.update(status="wrong", reason=wrong)
                return
            found.update(status="checked", median_s=timing.estimate(form.call, form.clock))
        except Exception as error:  # a form that breaks is reported; the others are still run
            found.update(record.failure(error))
            return
        self._ready[key] = form, group

    def _add(self, identity: Mapping[str, Any]) -> str:
        key = f"{identity['provider']}: {identity['form']}"
        self._identities[key], self._found[key] = identity, {}
        return key

    def estimates(self) -> dict[str, float]:
        """Seconds per call of the forms that are still to be timed, by key."""
        return {key: float(self._found[key]["median_s"]) for key in self._ready}

    def screen(self) -> None:
        """Drop the forms that are far slower than the fastest of their group."""
        best: dict[Hashable, float] = {}
        for key, seconds in self.estimates().items():
            group = self._ready[key][1]
            best[group] = min(seconds, best.get(group, seconds))
        for key, seconds in self.estimates().items():
            if seconds > SCREEN * best[self._ready[key][1]]:
                self.drop(key, f"over {SCREEN} times its provider's best form")

    def drop(self, key: str, reason: str) -> None:
        """Do not time a form further; its row keeps the quick estimate."""
        self._found[key].update(status="screened", reason=reason)
        del self._ready[key]

    def rounds_within(self, budget: float, wanted: int, least: int, calls: int = 1) -> int:
        """Rounds that fit into a budget of seconds.

        Args:
            budget: seconds.
            wanted: at most so many.
            least: at least so many, unless fewer are wanted.
            calls: how many calls of a long form make a turn.
        """
        turn = sum(
            timing.SETTLE_SECONDS + max(calls * seconds, timing.TURN_SECONDS + timing.WARM_SECONDS)
            for seconds in self.estimates().values()
        )
        return min(wanted, max(least, int(budget / max(turn, 1e-9))))

    def time(self, rounds: int, tick: Callable[[int], None] = lambda done: None) -> None:
        """Time the forms that are left in interleaved rounds, and release them.

        ``tick`` is called after every round with the number of rounds done.
        """
        disturbance = timing.Disturbance()
        times = timing.interleave(
            {key: form.call for key, (form, _) in self._ready.items()},
            self.estimates(),
            rounds,
            tick,
            {key: form.clock for key, (form, _) in self._ready.items()},
            lambda key, error: self._found[key].update(record.failure(error)),
        )
        self.disturbance = disturbance.share()
        for key, measured in times.items():
            low, high = measured.quartiles
            self._found[key].update(
                status="timed", median_s=measured.median, q1_s=low, q3_s=high,
                min_s=min(measured.seconds), rounds=rounds, inner=measured.inner,
                disturbance=self.disturbance,
            )  # fmt: skip
        self._ready.clear()

    def rows(self, columns: Sequence[str]) -> list[dict[str, Any]]:
        """The rows in the order of checks: identity, then these columns, None where there is none.

        ``status`` (left out, failed, wrong, screened or timed), ``reason``; ``median_s``, the
        estimate of a screened form; of a timed one also ``q1_s``, ``q3_s``, ``min_s``, ``rounds``,
        ``inner`` and ``disturbance``; and what the checks say.
        """
        return [
            {**identity, **{name: self._found[key].get(name) for name in columns}}
            for key, identity in self._identities.items()
        ]
