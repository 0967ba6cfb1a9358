"""The oracle, which shares no code with the library, and the rule by which errors are judged.

err(result) <= 2 * err(torch in the same dtype) + C[dtype] * eps * scale,   err against float64.
"""

from __future__ import annotations

import torch
from device import one_thread
from torch import Tensor, nn

from hvpfast.mlp.spec import MLPSpec

# Allowed roundings beyond torch's own error, in units of eps * max|truth|.
C = {torch.float32: 16.0, torch.float64: 64.0}

ACTIVATION_MODULES: dict[str, nn.Module] = {
    "relu": nn.ReLU(),
    "sigmoid": nn.Sigmoid(),
    "tanh": nn.Tanh(),
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU(approximate="tanh"),
    "silu": nn.SiLU(),
    "softplus": nn.Softplus(),
    "identity": nn.Identity(),
}


def outputs(spec: MLPSpec, flat: Tensor, x: Tensor) -> Tensor:
    """z_L (N, D[L]), written out with slices of the flat parameters."""
    a, at = x, 0
    for layer in range(1, len(spec.sizes)):
        d_out, d_in = spec.sizes[layer], spec.sizes[layer - 1]
        z = a @ flat[at : at + d_out * d_in].reshape(d_out, d_in).T
        at += d_out * d_in
        if spec.bias:
            z = z + flat[at : at + d_out]
            at += d_out
        a = ACTIVATION_MODULES[spec.activation](z) if layer < len(spec.sizes) - 1 else z
    assert at == flat.numel()
    return a


def loss_of(spec: MLPSpec, z: Tensor, y: Tensor) -> Tensor:
    """The loss, by torch's own modules."""
    if spec.loss == "mse":
        return nn.MSELoss(reduction=spec.reduction)(z, y)
    weight = spec.class_weights and torch.tensor(spec.class_weights, dtype=z.dtype)
    return nn.CrossEntropyLoss(
        weight=weight,
        ignore_index=spec.ignore_index,
        reduction=spec.reduction,
        label_smoothing=spec.label_smoothing,
    )(z, y)


@one_thread()
def oracle(
    spec: MLPSpec, flat: Tensor, x: Tensor, y: Tensor, V: Tensor, U: Tensor
) -> dict[str, Tensor]:
    """Every operation by repeated backward passes, in the dtype of its inputs.

    Keys: loss, gradient, and for curvature in (hessian, ggn): "<curvature> product" (P, K),
    "quadratic" (K,), "vjp" (P,), "penalty" 0-dim and "penalty gradient" (P,), the last two only
    for K >= 1.
    """
    p = flat.detach().clone().requires_grad_()
    z = outputs(spec, p, x)
    loss = loss_of(spec, z, y)
    (gradient,) = torch.autograd.grad(loss, p, create_graph=True)
    results = {"loss": loss, "gradient": gradient}

    def derivative(of: Tensor, wrt: Tensor, seed: Tensor | None = None) -> Tensor:
        if not of.requires_grad:  # constant: torch has no graph to go back through
            return torch.zeros_like(wrt)
        out = torch.autograd.grad(
            of, wrt, seed, create_graph=True, allow_unused=True, retain_graph=True
        )[0]
        return torch.zeros_like(wrt) if out is None else out

    seed = torch.zeros_like(z, requires_grad=True)
    transposed_jacobian = derivative(z, p, seed)  # J' seed, linear in seed
    z_bar = derivative(loss, z)

    def ggn_product(v: Tensor) -> Tensor:
        z_dot = derivative(transposed_jacobian, seed, v)  # J v
        return derivative(z, p, derivative(z_bar, z, z_dot))

    def hessian_product(v: Tensor) -> Tensor:
        return derivative(gradient, p, v)

    for curvature, product in (("hessian", hessian_product), ("ggn", ggn_product)):
        columns = [product(v) for v in V.T]
        Y = torch.stack(columns, 1) if columns else torch.zeros_like(V)
        results[f"{curvature} product"] = Y
        results[f"{curvature} quadratic"] = (V * Y).sum(0)
        results[f"{curvature} vjp"] = derivative((U * Y).sum(), p)
        if columns:
            penalty = Y.square().sum(0).mean()
            results[f"{curvature} penalty"] = penalty
            results[f"{curvature} penalty gradient"] = derivative(penalty, p)
    return {key: value.detach() for key, value in results.items()}


def expectations(
    spec: MLPSpec, flat: Tensor, x: Tensor, y: Tensor, V: Tensor, U: Tensor
) -> dict[str, dict[str, Tensor]]:
    """The oracle three times: "truth" in float64, torch's "own" dtype, truth for "nudged" inputs.

    In float64 all three are the same.
    """
    tensors = (flat, x, y, V, U)
    own = oracle(spec, *tensors)
    if flat.dtype == torch.float64:
        return {"truth": own, "own": own, "nudged": own}
    g = torch.Generator().manual_seed(0)

    def wide(t: Tensor, nudge: float) -> Tensor:
        signs = 2 * torch.randint(0, 2, t.shape, generator=g) - 1
        return t.double() * (1 + nudge * signs) if t.is_floating_point() else t

    half_ulp = torch.finfo(flat.dtype).eps / 2
    return {
        "truth": oracle(spec, *(wide(t, 0.0) for t in tensors)),
        "own": own,
        "nudged": oracle(spec, *(wide(t, half_ulp) for t in tensors)),
    }


@one_thread()
def dense_hessian(spec: MLPSpec, flat: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """H (P, P) by torch.autograd.functional."""

    def loss(p: Tensor) -> Tensor:
        return loss_of(spec, outputs(spec, p, x), y)

    return torch.autograd.functional.hessian(loss, flat.detach())


@one_thread()
def dense_ggn(spec: MLPSpec, flat: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """J' (d2 loss / dz2) J (P, P) by torch.autograd.functional."""
    z = outputs(spec, flat.detach(), x)
    J = torch.autograd.functional.jacobian(lambda p: outputs(spec, p, x), flat.detach())
    D = torch.autograd.functional.hessian(lambda t: loss_of(spec, t, y), z)
    J, D = J.reshape(z.numel(), -1), D.reshape(z.numel(), z.numel())
    return J.T @ D @ J


def assert_within_reference_error(
    actual: Tensor,
    truth: Tensor,
    same_dtype: Tensor,
    label: str,
    *,
    nudged: Tensor | None = None,
    floor: float = 0.0,
) -> None:
    """Fail unless err(actual) <= 2 err(torch) + C eps scale, by entries and by norm.

    Args:
        actual: the result under test.
        truth: the float64 result.
        same_dtype: what torch computes in the dtype of ``actual``.
        label: backend, case and operation, for the message.
        nudged: the float64 result for inputs that differ by one rounding in ``actual``'s dtype;
            where its distance from the truth is larger than torch's error, torch was lucky and
            the distance is taken instead.
        floor: least scale, for results that are differences of larger terms.
    """
    assert actual.dtype == same_dtype.dtype, f"{label}: dtype {actual.dtype}"
    assert actual.shape == truth.shape, f"{label}: shape {tuple(actual.shape)} not {truth.shape}"
    assert truth.dtype == torch.float64, f"{label}: the oracle is not float64"
    assert same_dtype.shape == truth.shape, f"{label}: the oracle has two shapes"
    assert torch.isfinite(truth).all(), f"{label}: the oracle is not finite"
    if truth.numel() == 0:
        return
    error, own = (actual.double() - truth).abs(), (same_dtype.double() - truth).abs()
    sensitivity = torch.zeros_like(truth) if nudged is None else (nudged - truth).abs()
    unit = C[actual.dtype] * torch.finfo(actual.dtype).eps
    for measure, size in (("max", torch.amax), ("2-norm", torch.linalg.vector_norm)):
        err, scale = size(error), max(float(size(truth.abs())), floor)
        allowed = max(float(size(own)), float(size(sensitivity)))
        bound = 2 * allowed + unit * scale
        if not err <= bound:  # also when err is NaN
            entries = torch.where(error.isnan(), torch.inf, error).reshape(-1)
            worst = int(entries.argmax())
            raise AssertionError(
                f"{label}: {measure} error {err:.3e} > {bound:.3e} = 2 * torch's {allowed:.3e} + "
                f"{unit:.1e} * scale {scale:.3e}; worst at flat index {worst}: got "
                f"{actual.reshape(-1)[worst]:.9e}, truth {truth.reshape(-1)[worst]:.9e}"
            )
