"""Everything that hvpfast takes from the private parts of torch: a new torch is checked here first.

Each name says what it is and why no public part of torch does.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.nn.modules import batchnorm, dropout
from torch.nn.modules import module as _every
from torch.utils import _pytree

_C = torch._C
_Function = TypeVar("_Function", bound=Callable[..., Any])

# ---- modules ----

# The class above BatchNorm1d to 3d and SyncBatchNorm: new kinds are known without their names.
AnyBatchNorm = batchnorm._BatchNorm

# The class above BatchNorm1d to 3d and InstanceNorm1d to 3d.
AnyNorm = batchnorm._NormBase

# The class above Dropout, Dropout1d to 3d and AlphaDropout: all that draw with a probability ``p``.
AnyDropout = dropout._DropoutNd


def alterations_of(module: nn.Module) -> object:
    """What changes a call of the module beside its class, or None.

    Hooks, which torch lists nowhere, and a ``forward`` of its own, which wrappers put into the
    module's ``__dict__``. This runs once per module and call.
    """
    state = module.__dict__
    return (
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
        or state.get("forward")
        or None
    )


def hooks_of_all_modules() -> object:
    """The hooks that change what a call of any module computes, or None."""
    return (
        _every._global_forward_hooks
        or _every._global_forward_pre_hooks
        or _every._global_backward_hooks
        or _every._global_backward_pre_hooks
        or None
    )


# ---- where a call comes from: compiled code, torch.func, a dispatch mode, a backward pass ----

# Whether torch.compile or torch.export traces the call. Public; it is asked beside the next two.
is_compiling = torch.compiler.is_compiling

# Whether the call runs inside torch.func.grad, vjp, jvp or vmap.
torch_func_is_active = _C._are_functorch_transforms_active

# How many dispatch modes are active (fake tensors, tracing, FLOP counters): 0 in plain eager mode.
num_dispatch_modes = _C._len_torch_dispatch_stack

# Inside a backward pass: whether it keeps its graph (``retain_graph``), as saved tensors must know.
graph_is_kept = _C._autograd._get_current_graph_task_keep_graph


def forward_mode_is_on() -> bool:
    """Whether forward-mode differentiation is on, so that tensors may have tangents."""
    return forward_ad._current_level >= 0


def has_forward_tangent(t: Tensor) -> bool:
    """Whether forward-mode differentiation gave the tensor a tangent."""
    dual = forward_ad.unpack_dual(t)  # type: ignore[no-untyped-call]  # torch
    return dual.tangent is not None


# ---- autograd.Function ----


def apply_of(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """What ``function.apply`` wraps in checks for torch.func, for less time in every call.

    ``apply`` itself refuses to run at a level of torch.func. The caller makes sure that there is
    none, or that :func:`at_this_level` is on.
    """
    apply: Callable[..., Any] = super(torch.autograd.Function, function).apply  # type: ignore[misc]
    return apply


def at_this_level() -> AbstractContextManager[None]:
    """Lets a Function run at the level of torch.func that is current, as torch.func itself does."""
    context: AbstractContextManager[None] = enable_single_level_autograd_function()
    return context


def forward_gradients() -> AbstractContextManager[None]:
    """Forward-mode differentiation switched on again for the levels outside, inside a Function."""
    context: AbstractContextManager[None] = forward_ad._set_fwd_grad_enabled(True)
    return context


# ---- the dispatcher ----

_ONLY_CPU = _C.DispatchKeySet(_C.DispatchKey.CPU).raw_repr()


def below_autograd(op: Any, kernel: Callable[..., Any], keyset: Any, args: tuple[Any, ...]) -> Any:
    """Run an operator as the dispatcher does below autograd; ``keyset`` is what autograd was given.

    Where nothing stands in between, on plain CPU tensors, ``kernel`` is called without it.
    """
    if (keyset & _C._after_autograd_keyset).raw_repr() == _ONLY_CPU:
        return kernel(*args)
    with _C._AutoDispatchBelowAutograd():
        return op.redispatch(keyset & _C._after_autograd_keyset, *args)


def with_torch_func(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The kernel with torch.func switched on again where a dispatch mode calls it.

    The first run of compiled code is such a place; the reference backend is made of torch.func.
    """

    def run(*args: Any) -> Any:
        excluded = _C._dispatch_tls_local_exclude_set()
        if excluded.has(_C.DispatchKey.FuncTorchDynamicLayerFrontMode):
            included = _C._dispatch_tls_local_include_set()
            with _C._ForceDispatchKeyGuard(included, excluded - _torch_func_keys()):
                return kernel(*args)
        return kernel(*args)

    return run


def _torch_func_keys() -> _C.DispatchKeySet:
    keys = _C.DispatchKeySet(_C.DispatchKey.FuncTorchDynamicLayerFrontMode)
    for name in ("DynamicLayerBackMode", "GradWrapper", "Batched", "VmapMode"):
        keys = keys.add(getattr(_C.DispatchKey, f"FuncTorch{name}"))
    return keys


# ---- torch.compile, nested containers ----


def constant_in_compiled_code(function: _Function) -> _Function:
    """Decorator: the function is called while torch.compile traces, and its result is a constant.

    ``torch.compiler.assume_constant_result`` does the same, but imports the compiler, which takes
    longer than importing torch.
    """
    setattr(function, "_dynamo_marked_constant", True)  # noqa: B010  # no declared attribute
    return function


# The tensors and other leaves of nested tuples, lists and dicts, in order.
tree_leaves = _pytree.tree_leaves
