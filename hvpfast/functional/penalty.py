"""The curvature penalty of a linearized loss, with one gradient of loss and penalty."""

from __future__ import annotations

from torch import Tensor

from hvpfast.functional.linearization import Linearization
from hvpfast.functional.penalty_kinds import check_kind, probes_given
from hvpfast.mlp.checks import check_curvature


def penalty(
    lin: Linearization,
    tangents: Tensor | None = None,
    *,
    num_probes: int = 1,
    distribution: str = "rademacher",
    seed: int | None = None,
    weights: tuple[float, float] = (1.0, 1.0),
    curvature: str = "hessian",
    kind: str = "fro2",
    estimator: str = "hutchinson",
) -> tuple[Tensor, Tensor, Tensor]:
    """Curvature penalty with the loss and one gradient of both.

    The penalty of kind "fro2" is (1/K) sum_k ||H v_k||^2, whose mean over random probes is the
    squared Frobenius norm of H; that of kind "trace" is (1/K) sum_k v_k' H v_k, of mean tr H.
    The estimator "exact" takes these means themselves, without probes.

    Args:
        lin: from :func:`linearize` with ``order=3``.
        tangents: probes v, (P,) or columns (P, K), K >= 1; None to have them drawn. For M models
            (M, P) or (M, P, K).
        num_probes: how many to draw.
        distribution: ``"rademacher"`` or ``"normal"``. A backend may draw normal probes in
            another basis: same distribution, other numbers than :func:`hvpfast.probes`.
        seed: of the drawn probes, in [0, 2**64); None takes fresh entropy. Of M models, model m has
            the K probes from number m K on: ``hvpfast.probes(P, K, seed=seed, first=m * K)``.
        weights: (w_loss, w_penalty) of the gradient.
        curvature: ``"hessian"`` or ``"ggn"``.
        kind: ``"fro2"`` or ``"trace"``.
        estimator: ``"hutchinson"`` or ``"exact"``; the work of the exact ``fro2`` grows with the
            square of the number of samples.

    Returns:
        (loss, penalty, gradient of w_loss * loss + w_penalty * penalty): 0-dim, 0-dim, (P,); for M
        models (M,), (M,), (M, P).

    Raises:
        ValueError, TypeError: an argument is not as described.
        RuntimeError: ``order=2``, or the point was changed in place after linearize.
        MemoryError: ``estimator="exact"`` where the scratch memory of a few samples is not there.
        NotImplementedError: ``estimator="exact"`` for M models.
    """
    check_kind(kind, estimator, tangents)
    ggn = check_curvature(curvature)
    if estimator == "exact":
        found = lin.exact_penalty(kind, ggn)
    else:
        probes = probes_given(tangents, num_probes, distribution, seed)
        found = lin.penalty(probes, kind, ggn)
    return found.loss, found.penalty, found.gradient(float(weights[0]), float(weights[1]))
