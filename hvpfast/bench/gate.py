"""The gate before the clock: numbers against float64, judged by the error torch makes itself.

    max |found - truth|  <=  2 max |torch, same dtype - truth|  +  c eps max |truth|        and the
    same in the 2-norm

The truth is torch.autograd, reverse over reverse, in float64; torch in the dtype of the run is the
same code. Probes that a form draws itself cannot be compared number by number: there the means over
repeated calls must agree within their standard errors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from hvpfast.bench.cases import ADAM, PENALTY_WEIGHTS, Array, Problem
from hvpfast.bench.providers.base import Prepared
from hvpfast.bench.providers.torch_eager import TorchEager

SLACK = 32.0  # c of the rule: roundings of a few chained sums of length up to about 10^4
REPEATS = 24  # calls on each side of the statistical comparison
SIGMAS = 6.0  # a false alarm in one of 10^8 comparisons


@dataclass(frozen=True)
class Verdict:
    """``ok``, and per comparison the error and the error allowed, relative to the truth's size."""

    ok: bool
    errors: dict[str, tuple[float, float]]
    reason: str = ""


def truth(operation: str, problem: Problem, *, plain: bool = False) -> dict[str, Array]:
    """Outputs by reverse mode on reverse mode in the problem's dtype, one probe at a time.

    A ``plain`` training step is that of the loss alone.
    """
    if operation == "train_step":
        found = truth("gradient" if plain else "penalty", problem)
        return {**found, "params": adam_step(problem.flat(), found["gradient"])}
    eager, exact = TorchEager(), "triple backward, per probe"
    form = exact if operation.startswith("penalty") else eager.forms(operation, 1)[0]
    prepared = eager.prepare(form, operation, problem)
    return prepared.outputs(prepared.call())


def adam_step(params: Array, gradient: Array) -> Array:
    """Adam's first step, p - lr g / (|g| + eps): its corrected moments are g and g^2."""
    return np.asarray(params - ADAM["lr"] * gradient / (np.abs(gradient) + ADAM["eps"]))


class Gate:
    """Judges the forms of one problem and operation; truths are computed when first needed."""

    def __init__(self, problem: Problem, operation: str) -> None:
        self.problem, self.operation = problem, operation
        self._truths: dict[bool, tuple[dict[str, Array], dict[str, Array]]] = {}
        self._samples: tuple[Array, dict[str, Array]] | None = None

    def truths(self, kind: str) -> tuple[dict[str, Array], dict[str, Array]]:
        """(float64, dtype of the run) outputs; a plain training step has its own."""
        plain = kind == "plain"
        if plain not in self._truths:
            exact = truth(self.operation, self.problem.astype("float64"), plain=plain)
            same = exact
            if self.problem.dtype != "float64":
                same = truth(self.operation, self.problem, plain=plain)
            self._truths[plain] = exact, same
        return self._truths[plain]

    def judge(self, prepared: Prepared, kind: str) -> Verdict:
        """Run the form once (or repeatedly, when it draws its probes) and judge its outputs."""
        if prepared.drawn:
            return self._statistical(prepared)
        exact, same = self.truths(kind)
        return compare(prepared.outputs(prepared.call()), exact, same, self.problem.dtype)

    def _statistical(self, prepared: Prepared) -> Verdict:
        """Means over calls with fresh probes against torch's means with other normal probes."""
        direction, theirs = self._torch_samples()
        eps = float(np.finfo(self.problem.dtype).eps)
        start, ours = self.problem.flat(), []
        errors: dict[str, tuple[float, float]] = {}
        for _ in range(REPEATS):
            found = prepared.outputs(prepared.call())
            ours.append(_statistics(found, direction))
            if "params" in found and prepared.restore is not None:
                if not errors:  # Adam's first step from the gradient it was given
                    step = adam_step(start.astype(np.float64), found["gradient"].astype(np.float64))
                    size = _largest(step)
                    errors["params"] = (_largest(found["params"] - step) / size, SLACK * eps)
                prepared.restore()
        for name in ours[0]:
            a = np.array([sample[name] for sample in ours])
            b = theirs[name]
            scale = abs(float(b.mean()))
            stderr = float(np.hypot(a.std(ddof=1), b.std(ddof=1)) / REPEATS**0.5)
            errors[f"mean {name}"] = (
                abs(float(a.mean() - b.mean())) / scale,
                SIGMAS * stderr / scale + SLACK * eps,
            )
        return _verdict(errors)

    def _torch_samples(self) -> tuple[Array, dict[str, Array]]:
        """What gradients are projected on, and torch's statistics for fresh normal probes."""
        if self._samples is None:
            direction = truth("penalty_normal", self.problem)["gradient"]
            direction = direction - PENALTY_WEIGHTS[0] * truth("gradient", self.problem)["gradient"]
            direction = direction / np.linalg.norm(direction)
            rng = np.random.default_rng(REPEATS)
            samples = []
            for _ in range(REPEATS):
                normal = rng.standard_normal(self.problem.normal.shape).astype(self.problem.dtype)
                found = truth("penalty_normal", replace(self.problem, normal=normal))
                samples.append(_statistics(found, direction))
            columns = {name: np.array([s[name] for s in samples]) for name in samples[0]}
            self._samples = direction, columns
        return self._samples


def _statistics(found: Mapping[str, Array], direction: Array) -> dict[str, float]:
    """The gradient along ``direction``, and the loss and penalty where they are returned."""
    scalars = {name: float(found[name]) for name in ("loss", "penalty") if name in found}
    return {**scalars, "gradient": float(found["gradient"] @ direction)}


def compare(
    found: Mapping[str, Array],
    exact: Mapping[str, Array],
    same_dtype: Mapping[str, Array],
    dtype: str,
) -> Verdict:
    """The error rule for every output that is found; ``same_dtype`` is torch's, in ``dtype``.

    A missing or non-finite output, or a wrong shape, is an error of infinity.
    """
    eps = float(np.finfo(dtype).eps)
    errors: dict[str, tuple[float, float]] = {}
    if not found:
        return Verdict(False, {}, "no outputs to compare")
    for name, value in found.items():
        t, s = exact[name], same_dtype[name]
        v = np.asarray(value, dtype=np.float64)
        if v.shape != t.shape:
            return Verdict(False, errors, f"{name}: expected shape {t.shape}, got {v.shape}")
        for norm, size in (("max", _largest), ("2", _euclidean)):
            scale = size(t) or 1.0
            allowed = 2 * size(s - t) / scale + SLACK * eps
            errors[f"{name} {norm}"] = (size(v - t) / scale, allowed)
    return _verdict(errors)


def _verdict(errors: dict[str, tuple[float, float]]) -> Verdict:
    bad = [
        f"{name}: error {error:.2e} of the largest value, allowed {allowed:.2e}"
        for name, (error, allowed) in errors.items()
        if not error <= allowed  # NaN is not <=
    ]
    return Verdict(not bad, errors, "; ".join(bad))


def _largest(array: Array) -> float:
    return float(np.max(np.abs(array), initial=0.0))


def _euclidean(array: Array) -> float:
    return float(np.linalg.norm(array.ravel()))
