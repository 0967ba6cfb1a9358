"""Checks of the arguments that users pass, for one model and for M models of one network.

Each error says what was expected, what came and what to do. The checks read metadata only. Values
are checked where that is free: labels by the backends while they read them, a loss that is not
finite by :func:`nonfinite_reason` and :func:`check_losses`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hvpfast.mlp.spec import MLPSpec
from hvpfast.utils.choice import check_choice

CURVATURES = ("hessian", "ggn")


def check_curvature(curvature: str) -> bool:
    """Whether the curvature is "ggn" and not "hessian"; ValueError for any other name."""
    check_choice("curvature", curvature, CURVATURES)
    return curvature == "ggn"


# ---- parameters, inputs and targets of one model ----


def check_params(spec: MLPSpec, params: Tensor | Sequence[Tensor]) -> Tensor:
    """The first parameter tensor, whose dtype and device all of them have.

    Raises:
        ValueError: wrong shapes, or not contiguous.
        TypeError: not tensors, not floating point, or a mix of dtypes or devices.
    """
    if isinstance(params, Tensor):
        shape_fits = params.shape == (spec.num_params,)
        if shape_fits and params.is_contiguous() and params.is_floating_point():
            return params
    else:
        try:
            first = params[0]
            uniform = len({(t.dtype, t.device) for t in params}) == 1 and first.is_floating_point()
            shapes_fit = tuple([t.shape for t in params]) == spec.shapes
            if uniform and shapes_fit and all(map(Tensor.is_contiguous, params)):
                return first
        except (AttributeError, IndexError, TypeError):  # not a list of tensors
            pass
    raise _params_mismatch(spec, params)


def _params_mismatch(spec: MLPSpec, params: object) -> Exception:
    """The error for parameters that are not what ``spec`` needs."""
    if isinstance(params, Tensor):
        if params.shape != (spec.num_params,):
            return ValueError(
                f"params must be a flat tensor ({spec.num_params},) or the list [W1, b1, ...] for "
                f"sizes {spec.sizes}; got {tuple(params.shape)}"
            )
        tensors: Sequence[Tensor] = [params]
    elif isinstance(params, Sequence) and all(isinstance(t, Tensor) for t in params):
        tensors = params
        shapes = tuple(tuple(t.shape) for t in tensors)
        if shapes != spec.shapes:
            return ValueError(
                f"params must have the shapes {spec.shapes} (layer by layer, bias={spec.bias}); "
                f"got {shapes}"
            )
    else:
        return TypeError(
            f"params must be a flat tensor or a list of tensors [W1, b1, ...]; got {_kind(params)}."
            " For a module pass hf.params_of(module)"
        )
    if not tensors[0].is_floating_point():
        return TypeError(f"params must be floating point; got {tensors[0].dtype}")
    for name, t in zip(spec.names if len(tensors) > 1 else ("params",), tensors, strict=True):
        if (t.dtype, t.device) != (tensors[0].dtype, tensors[0].device):
            return TypeError(
                f"params must share one dtype and device; {name} is {t.dtype} on {t.device}, "
                f"the first is {tensors[0].dtype} on {tensors[0].device}"
            )
        if not t.is_contiguous():
            return ValueError(
                f"params must be contiguous: they are used in place, never copied; {name} has "
                f"strides {t.stride()} for shape {tuple(t.shape)}. Pass {name}.contiguous()"
            )
    raise AssertionError("params match")


def check_batch(
    spec: MLPSpec, like: Tensor, x: Tensor, y: Tensor, *, name: str = "params"
) -> tuple[Tensor, Tensor]:
    """The batch (x (N, D[0]), y) contiguous, with the dtype and device of ``like``.

    Inputs (N, ...) with D[0] entries per sample are flattened.

    Raises:
        ValueError: wrong shapes, or no samples.
        TypeError: not tensors, or a dtype or device other than that of the parameters.
    """
    if not isinstance(x, Tensor) or not isinstance(y, Tensor):
        raise TypeError(f"x and y must be tensors; got {_kind(x)} and {_kind(y)}")
    dtype, device = like.dtype, like.device
    both_cpu = x.is_cpu and y.is_cpu and like.is_cpu  # cheaper than comparing devices
    if x.dtype is not dtype or not (both_cpu or x.device == device):
        raise _unlike_params(x, like, name)
    shape = x.shape
    if len(shape) != 2 or shape[1] != spec.sizes[0]:
        x = _flatten_inputs(x, spec.sizes[0])
        shape = x.shape
    n = shape[0]
    if n == 0:
        raise _no_samples(x)
    mse = spec.loss == "mse"
    y_dtype = dtype if mse else torch.int64
    if y.dtype is not y_dtype or not (both_cpu or y.device == device):
        raise _wrong_targets(spec, y, y_dtype, device)
    y_shape = (n, spec.sizes[-1]) if mse else (n,)
    if y.shape != y_shape:
        hint = ". Did you mean y[:, None]?" if y_shape == (n, 1) and y.shape == (n,) else ""
        raise ValueError(
            f"{spec.loss} targets y must be {y_shape} for x {tuple(shape)}; got "
            f"{tuple(y.shape)}{hint}"
        )
    return (
        x if x.is_contiguous() else x.contiguous(),
        y if y.is_contiguous() else y.contiguous(),
    )


def _flatten_inputs(x: Tensor, d_in: int) -> Tensor:
    if x.dim() > 2 and math.prod(x.shape[1:]) == d_in:
        return x.flatten(1)
    hint = ". For one sample pass x[None]" if x.shape == (d_in,) else ""
    if x.dim() == 2 and x.size(0) == d_in:
        hint = ". Did you mean x.T?"
    raise ValueError(f"x must be (N, {d_in}) to match the first layer; got {tuple(x.shape)}{hint}")


# ---- parameters, inputs and targets of M models ----


def check_models(spec: MLPSpec, params: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs x and targets y of M models at ``params`` (M, P), contiguous.

    x is (M, N, D[0]), or (N, D[0]) where all models share it; y is (M, N) or (N,) for
    cross-entropy, (M, N, D[L]) or (N, D[L]) for mse. A tensor expanded along M comes back without
    that axis, as shared.

    Raises:
        ValueError: wrong shapes, no models, no samples, or parameters that are not contiguous.
        TypeError: not tensors, or a mix of dtypes or devices.
    """
    _check_rows_of_params(spec, params)
    if not isinstance(x, Tensor) or not isinstance(y, Tensor):
        raise TypeError(f"x and y must be tensors; got {type(x).__name__} and {type(y).__name__}")
    classes = spec.loss == "cross_entropy"
    if (x.dtype, x.device) != (params.dtype, params.device):
        raise _unlike_params(x, params, "params")
    y_dtype = torch.int64 if classes else params.dtype
    if (y.dtype, y.device) != (y_dtype, params.device):
        raise _wrong_targets(spec, y, y_dtype, params.device)
    M, d_in, d_out = len(params), spec.sizes[0], spec.sizes[-1]
    if x.dim() not in (2, 3) or x.shape[-1] != d_in or (x.dim() == 3 and len(x) != M):
        raise ValueError(
            f"x must be ({M}, N, {d_in}), one batch per model, or (N, {d_in}) for samples that all "
            f"{M} models share; got {tuple(x.shape)}"
        )
    N = x.shape[-2]
    if N == 0:
        raise _no_samples(x)
    shared = (N,) if classes else (N, d_out)
    if y.shape not in (shared, (M, *shared)):
        raise ValueError(
            f"{spec.loss} targets y must be {(M, *shared)}, or {shared} for targets that all {M} "
            f"models share, for x {tuple(x.shape)}; got {tuple(y.shape)}"
        )
    return _shared_or_own(x, 2), _shared_or_own(y, len(shared))


def _check_rows_of_params(spec: MLPSpec, params: Tensor) -> None:
    """The errors of :func:`check_models` for params (M, P)."""
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
    """The tensor contiguous; without its model axis, above ``dim`` axes, where it is expanded."""
    if t.dim() > dim and t.stride(0) == 0:
        t = t[0]
    return t.contiguous()


# ---- tangents ----


def tangent_rows(tangents: Tensor, num_params: int, like: Tensor, name: str = "tangents") -> Tensor:
    """Columns (P,) or (P, K) as contiguous rows (1, P) or (K, P); copies only if it must.

    Raises:
        ValueError: wrong shape.
        TypeError: not a tensor, or a dtype or device other than that of the parameters.
    """
    check_tangents(tangents, num_params, like, name)
    rows = tangents.unsqueeze(0) if tangents.dim() == 1 else tangents.T
    return rows if rows.is_contiguous() else rows.contiguous()


def check_tangents(tangents: Tensor, num_params: int, like: Tensor, name: str = "tangents") -> None:
    """The checks of :func:`tangent_rows`: raises its errors, returns nothing."""
    if not isinstance(tangents, Tensor):
        raise TypeError(
            f"{name} must be a tensor ({num_params},) or ({num_params}, K); got {_kind(tangents)}. "
            "Convert it: torch.as_tensor(...)"
        )
    same_device = (tangents.is_cpu and like.is_cpu) or tangents.device == like.device
    if tangents.dtype is not like.dtype or not same_device:
        raise _unlike_tangents(tangents, like, name)
    shape = tangents.shape
    if len(shape) not in (1, 2) or shape[0] != num_params:
        hint = ". Did you mean .T?" if len(shape) == 2 and shape[1] == num_params else ""
        raise ValueError(
            f"{name} must be ({num_params},) or ({num_params}, K), one direction per column, to "
            f"match params; got {tuple(shape)}{hint}"
        )


def model_rows(tangents: Tensor, M: int, P: int, like: Tensor, name: str = "tangents") -> Tensor:
    """Tangents of M models (M, P), or columns (M, P, K), as contiguous rows (M, 1, P), (M, K, P).

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
        raise _unlike_tangents(tangents, like, name)
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


def _unlike_tangents(tangents: Tensor, like: Tensor, name: str) -> TypeError:
    return TypeError(
        f"{name} must be {like.dtype} on {like.device}, as the parameters; got "
        f"{tangents.dtype} on {tangents.device}. Convert: {name}.to(device=..., dtype=...)"
    )


# ---- values: labels and losses ----


def check_labels(spec: MLPSpec, y: Tensor) -> None:
    """Raise ValueError unless every label is in [0, D[L]) or is ``ignore_index``."""
    classes = spec.sizes[-1]
    wrong = ((y < 0) | (y >= classes)) & (y != spec.ignore_index)
    if wrong.any():
        n = int(wrong.nonzero()[0, 0])
        raise ValueError(label_message(int(y[n]), n, classes, spec.ignore_index))


def label_message(label: int, n: int, classes: int, ignore_index: int) -> str:
    """The message for label ``n`` out of range; the compiled backends use the same words."""
    return (
        f"labels must be in [0, {classes}) or equal ignore_index={ignore_index}; "
        f"got y[{n}] = {label}. Is the last layer as wide as there are classes?"
    )


def check_losses(spec: MLPSpec, loss: Tensor, params: Tensor, x: Tensor, y: Tensor) -> None:
    """Raise ValueError unless all losses (M,) are finite; the message explains the first other."""
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


def nonfinite_reason(
    loss: float, spec: MLPSpec, params: Tensor | Sequence[Tensor], x: Tensor, y: Tensor
) -> str:
    """Why a loss is not finite: inputs with NaN or inf, no target that counts, or an overflow."""
    if isinstance(params, Tensor):
        named = {"params": params}
    else:
        named = {f"params {name}": t for name, t in zip(spec.names, params, strict=True)}
    named |= {"x": x, "y": y} if spec.loss == "mse" else {"x": x}
    bad = [_nonfinite_entry(name, t) for name, t in named.items() if not torch.isfinite(t).all()]
    if bad:
        return f"the loss is {loss}: {'; '.join(bad)}. All inputs must be finite"
    if spec.loss == "cross_entropy" and spec.reduction == "mean" and math.isnan(loss):
        return (
            "the mean cross-entropy is undefined: every target is ignore_index or has class weight "
            "zero; drop this batch or use reduction='sum'"
        )
    return (
        f"the loss is {loss} though all inputs are finite: the network overflows {x.dtype}. "
        "Scale the inputs or the parameters down, or use float64"
    )


def _nonfinite_entry(name: str, t: Tensor) -> str:
    wrong = ~torch.isfinite(t)
    index = wrong.nonzero()[0].tolist()
    where = ", ".join(str(i) for i in index)
    return f"{name} has {int(wrong.sum())} entries that are NaN or inf, the first at [{where}]"


# ---- messages in common ----


def _unlike_params(x: Tensor, like: Tensor, name: str) -> TypeError:
    return TypeError(
        f"x must be {like.dtype} on {like.device}, as {name}; got {x.dtype} on {x.device}. "
        f"Convert it: x.to({name})"
    )


def _wrong_targets(spec: MLPSpec, y: Tensor, dtype: torch.dtype, device: torch.device) -> TypeError:
    return TypeError(
        f"{spec.loss} targets y must be {dtype} on {device}; got {y.dtype} on {y.device}"
    )


def _no_samples(x: Tensor) -> ValueError:
    return ValueError(f"the batch is empty: x is {tuple(x.shape)}; pass one sample or more")


def _kind(value: object) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"a {type(value).__name__} of {sorted({type(v).__name__ for v in value})}"
    return type(value).__name__
