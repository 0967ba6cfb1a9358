"""Perceptrons in compiled code, or over some of their parameters, by ``torch.ops.hvpfast``."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, count

import torch
from torch import Tensor

from hvpfast.functional.hessian_penalty.call import PenaltyCall
from hvpfast.functional.torch_ops import ops
from hvpfast.utils.torch_private import constant_in_compiled_code


def some_require_grad(params: Sequence[Tensor]) -> bool:
    """Whether some parameters require gradients and some do not."""
    if len(params) == 1:
        return False
    required = [p.requires_grad for p in params]
    return True in required and False in required


def by_operators(
    key: str, params: list[Tensor], x: Tensor, y: Tensor, call: PenaltyCall
) -> tuple[Tensor, Tensor]:
    """(loss, penalty) of the perceptron whose ``MLPSpec.key`` this is."""
    tangents, seed, num_probes, distribution = (
        call.tangents, call.seed, call.num_probes, call.distribution
    )  # fmt: skip
    ggn, backend = call.ggn, call.backend
    rows = seed_tensor = None
    if tangents is not None:
        rows = tangents.T if tangents.dim() == 2 else tangents
    elif isinstance(seed, Tensor):
        seed_tensor = seed
    elif seed is None:
        seed_tensor = ops.fresh_seed(_call_site())
    elif 0 <= seed < 2**64:  # int64 in two's complement
        seed_tensor = torch.full(
            (), seed - 2**64 if seed >= 2**63 else seed, dtype=torch.int64, device="cpu"
        )
    else:
        raise ValueError(f"seed must be in [0, 2**64); got {seed}")
    if call.kind == "fro2" and not some_require_grad(params):
        loss, penalty = ops.penalty(
            params, x, y, rows, seed_tensor, key, num_probes, distribution, ggn, backend
        )
        return loss, penalty
    # over some parameters: v zero elsewhere, H v restricted to them
    like, ends = params[0], list(accumulate(p.numel() for p in params))
    index = torch.cat(
        [
            torch.arange(end - p.numel(), end, device=like.device)
            for p, end in zip(params, ends, strict=True)
            if p.requires_grad or not some_require_grad(params)
        ]
    )
    if rows is None:
        rows = ops.probes(
            seed_tensor, index.numel(), num_probes, distribution, like.dtype, like.device
        )
    if rows.shape[-1] != index.numel() or rows.numel() == 0:
        raise ValueError(
            f"tangents must be ({index.numel()},) or ({index.numel()}, K), K >= 1, over the "
            f"parameters that require gradients; got {tuple(rows.T.shape)}"
        )
    full = rows.new_zeros((*rows.shape[:-1], ends[-1])).index_copy(-1, index, rows)
    if call.kind == "trace":
        forms = ops.quadratic(params, x, y, full, key, ggn, backend)
        return ops.loss(params, x, y, key, backend), forms.mean()
    product = ops.ggnvp if ggn else ops.hvp
    products = product(params, x, y, full, key, backend).index_select(-1, index)
    return ops.loss(params, x, y, key, backend), products.square().sum(-1).mean()


_calls = count()


@constant_in_compiled_code
def _call_site() -> int:
    """A new number: two fresh seeds in one compiled graph must not be merged into one."""
    return next(_calls)
