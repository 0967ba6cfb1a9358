"""Checks of what users pass in for many models at once; the same words as for one, with M in front.

Like ``checks.py`` they look at metadata only, but for losses that are not finite.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hvpfast.mlp.checks import nonfinite_reason
from hvpfast.mlp.spec import MLPSpec

__all__ = ["check_losses", "check_models", "model_rows"]


def check_models(spec: MLPSpec, params: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs x and targets y of M models at ``params`` (M, P), contiguous.

    x is (M, N, D[0]), or (N, D[0]) where all models share it, y likewise with its own shape. What
    was expanded along M comes back without that axis: shared.

    Raises:
        ValueError: wrong shapes, no models, no samples, or parameters that are not contiguous.
        TypeError: not tensors, or a mix of dtypes or devices.
    """
    _check_params(spec, params)
    if not isinstance(x, Tensor) or not isinstance(y, Tensor):
        raise TypeError(f"x and y must be tensors; got {type(x).__name__} and {type(y).__name__}")
    classes = spec.loss == "cross_entropy"
    like = params.dtype, params.device
    if (x.dtype, x.device) != like:
        raise TypeError(
            f"x must be {params.dtype} on {params.device}, as params; got {x.dtype} on {x.device}. "
            "Convert it: x.to(params)"
        )
    y_like = (torch.int64 if classes else params.dtype), params.device
    if (y.dtype, y.device) != y_like:
        raise TypeError(
            f"{spec.loss} targets y must be {y_like[0]} on {y_like[1]}; got {y.dtype} on {y.device}"
        )
    M, d_in, d_out = len(params), spec.sizes[0], spec.sizes[-1]
    if x.dim() not in (2, 3) or x.shape[-1] != d_in or (x.dim() == 3 and len(x) != M):
        raise ValueError(
            f"x must be ({M}, N, {d_in}), one batch per model, or (N, {d_in}) for samples that all "
            f"{M} models share; got {tuple(x.shape)}"
        )
    N = x.shape[-2]
    if N == 0:
        raise ValueError(f"the batch is empty: x is {tuple(x.shape)}; pass one sample or more")
    shared = (N,) if classes else (N, d_out)
    if y.shape not in (shared, (M, *shared)):
        raise ValueError(
            f"{spec.loss} targets y must be {(M, *shared)}, or {shared} for targets that all {M} "
            f"models share, for x {tuple(x.shape)}; got {tuple(y.shape)}"
        )
    return _shared_or_own(x, 2), _shared_or_own(y, len(shared))


def _check_params(spec: MLPSpec, params: Tensor) -> None:
    P, shape = spec.num_params, tuple(params.shape)
    if shape[1] != P:
        hint = ". Did you mean .T?" if shape[0] == P else ""
        raise ValueError(
            f"params of many models must be (M, {P}), one flat row per model, for sizes "
            f"{spec.sizes}; got {shape}{hint}"
        )
    if shape[0] == 0:
        raise ValueError(f"params is {shape}: no models; pass one row or more")
    if not params.is_floating_point():
        raise TypeError(f"params must be floating point; got {params.dtype}")
    if not params.is_contiguous():
        raise ValueError(
            "params must be contiguous: they are used in place, never copied; got strides "
            f"{params.stride()} for shape {shape}. Pass params.contiguous()"
        )


def _shared_or_own(t: Tensor, dim: int) -> Tensor:
    if t.dim() > dim and t.stride(0) == 0:
        t = t[0]
    return t.contiguous()


def check_losses(spec: MLPSpec, loss: Tensor, params: Tensor, x: Tensor, y: Tensor) -> None:
    """Raise ValueError where a loss of M models is not finite, for the first such model."""
    wrong = ~torch.isfinite(loss)
    if not bool(wrong.any()):
        return
    m = int(wrong.nonzero()[0, 0])
    x_own = x[m] if x.dim() == 3 else x
    y_own = y[m] if y.dim() > (1 if spec.loss == "cross_entropy" else 2) else y
    reason = nonfinite_reason(float(loss[m]), spec, params[m], x_own, y_own)
    others = int(wrong.sum()) - 1
    rest = f". So it is for {others} more of the {len(loss)} models" if others else ""
    raise ValueError(f"model {m}: {reason}{rest}")


def model_rows(tangents: Tensor, M: int, P: int, like: Tensor, name: str = "tangents") -> Tensor:
    """Tangents (M, P), or columns (M, P, K), as contiguous rows (M, 1, P) or (M, K, P).

    Raises:
        ValueError: wrong shape.
        TypeError: not a tensor, or a dtype or device other than that of the parameters.
    """
    if not isinstance(tangents, Tensor):
        raise TypeError(
            f"{name} must be a tensor ({M}, {P}) or ({M}, {P}, K); got {type(tangents).__name__}. "
            "Convert it: torch.as_tensor(...)"
        )
    if (tangents.dtype, tangents.device) != (like.dtype, like.device):
        raise TypeError(
            f"{name} must be {like.dtype} on {like.device}, as the parameters; got "
            f"{tangents.dtype} on {tangents.device}. Convert: {name}.to(device=..., dtype=...)"
        )
    shape = tuple(tangents.shape)
    if len(shape) not in (2, 3) or shape[:2] != (M, P):
        hint = ""
        if shape[:1] == (P,) and len(shape) < 3:
            hint = f". For the same ones in every model: {name}.expand({M}, *{name}.shape)"
        elif len(shape) == 3 and shape[::2] == (M, P):
            hint = ". Did you mean .transpose(1, 2)?"
        raise ValueError(
            f"{name} of {M} models must be ({M}, {P}) or ({M}, {P}, K), one direction per column; "
            f"got {shape}{hint}"
        )
    rows = tangents.unsqueeze(1) if len(shape) == 2 else tangents.transpose(1, 2)
    return rows.detach().contiguous()
