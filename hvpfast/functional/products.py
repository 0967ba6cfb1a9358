"""Products with the curvature of a linearized loss."""

from __future__ import annotations

from torch import Tensor

from hvpfast.functional.linearization import Linearization
from hvpfast.mlp.checks import check_curvature


def hvp(lin: Linearization, tangents: Tensor) -> Tensor:
    """Hessian-vector products H v, H = d2 loss / d params2.

    Args:
        lin: from :func:`linearize`.
        tangents: (P,) or columns (P, K), K >= 0, with the dtype and device of the parameters; for M
            models (M, P) or (M, P, K).

    Returns:
        H v, shaped as ``tangents``.

    Raises:
        ValueError, TypeError: ``tangents`` is not as described.
        RuntimeError: the point was changed in place after linearize.

    References:
        Pearlmutter (1994), doi:10.1162/neco.1994.6.1.147.
    """
    return lin.product(tangents, False)


def ggnvp(lin: Linearization, tangents: Tensor) -> Tensor:
    """Generalised Gauss-Newton products G v, G = J' (d2 loss / d outputs2) J; see :func:`hvp`.

    References:
        Schraudolph (2002), doi:10.1162/08997660260028683.
    """
    return lin.product(tangents, True)


def quadratic_form(lin: Linearization, tangents: Tensor, *, curvature: str = "hessian") -> Tensor:
    """Curvature v' H v along directions, without forming H v.

    Args:
        lin: from :func:`linearize`.
        tangents: (P,) or columns (P, K), K >= 0; for M models (M, P) or (M, P, K).
        curvature: ``"hessian"`` or ``"ggn"``.

    Returns:
        0-dim for (P,), (K,) for (P, K); with M in front for M models.

    Raises:
        ValueError, TypeError: an argument is not as described.
        RuntimeError: the point was changed in place after linearize.
    """
    return lin.quadratic(tangents, check_curvature(curvature))


def hvp_vjp(
    lin: Linearization, tangents: Tensor, cotangents: Tensor, *, curvature: str = "hessian"
) -> Tensor:
    """Third-order product d(sum_k u_k' H v_k)/d params, with u_k and v_k held fixed.

    Args:
        lin: from :func:`linearize` with ``order=3``.
        tangents: v, (P,) or columns (P, K); for M models (M, P) or (M, P, K).
        cotangents: u, shaped as ``tangents``.
        curvature: ``"hessian"`` or ``"ggn"``; the ggn is differentiated in full, J included.

    Returns:
        (P,), summed over the K pairs; (M, P) for M models.

    Raises:
        ValueError, TypeError: an argument is not as described.
        RuntimeError: ``order=2``, or the point was changed in place after linearize.
    """
    return lin.hvp_vjp(tangents, cotangents, check_curvature(curvature))
