"""The forms shared by torch.func and JAX, whose jvp, grad, vjp and vmap have the same meaning.

For a scalar f of the parameters p and a tangent v, each line is one way to the Hessian-vector
product H v:

    jvp(grad)   forward over reverse      d/dt grad f(p + t v)
    grad(jvp)   reverse over forward      grad_p [d/dt f(p + t v)]
    vjp(grad)   reverse over reverse      grad_p <grad f, v>

With K tangents each is mapped (``vmap``) or repeated (``loop``).  Trees are tuples of arrays;
tangents are a tuple of stacked arrays (K, *shape) for ``vmap`` and a tuple of K trees for
``loop``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Tree = tuple[Any, ...]
MODES = ("jvp(grad)", "grad(jvp)", "vjp(grad)")


def split_form(form: str) -> tuple[str, str]:
    """``"grad(jvp) vmap"`` -> ``("grad(jvp)", "vmap")``; a single tangent is a loop of one."""
    mode, _, mapping = form.partition(" ")
    return mode, mapping or "loop"


def forms(operation: str, num_tangents: int) -> tuple[str, ...]:
    """Forms of an operation: modes x mappings; no mapping in the name when there is one tangent."""
    if operation == "gradient":
        return ("grad",)
    modes = {
        "hvp": MODES,
        "hvp_warm": ("linearize", "vjp"),
        "quadratic": (*MODES, "jvp(jvp)"),
    }.get(operation, (*MODES, "grad(jvp(jvp))"))
    mappings = ("",) if num_tangents == 1 else (" vmap", " loop")
    return tuple(mode + mapping for mode in modes for mapping in mappings)


def dot(u: Tree, v: Tree) -> Any:
    """<u, v> over all leaves."""
    return sum((a * b).sum() for a, b in zip(u, v, strict=True))


def directional(T: Any, f: Callable[[Tree], Any], params: Tree, v: Tree) -> Any:
    """d/dt f(params + t v)."""
    return T.jvp(f, (params,), (v,))[1]


def products(T: Any, f: Callable[[Tree], Any], form: str, params: Tree, tangents: Tree) -> Any:
    """H V: a list of K trees (loop) or a tree of stacked arrays (vmap)."""
    mode, mapping = split_form(form)
    if mode == "jvp(grad)":

        def one(v: Tree) -> Any:
            return directional(T, T.grad(f), params, v)

    elif mode == "grad(jvp)":

        def one(v: Tree) -> Any:
            return T.grad(lambda p: directional(T, f, p, v))(params)

    else:
        _, pull = T.vjp(T.grad(f), params)

        def one(v: Tree) -> Any:
            return pull(v)[0]

    return T.vmap(one)(tangents) if mapping == "vmap" else [one(v) for v in tangents]


def quadratic(T: Any, f: Callable[[Tree], Any], form: str, params: Tree, tangents: Tree) -> Any:
    """Curvature v'Hv of each tangent: <v, H v>, or two forward derivatives."""
    mode, mapping = split_form(form)
    if mode == "jvp(jvp)":

        def one(v: Tree) -> Any:
            return directional(T, lambda p: directional(T, f, p, v), params, v)

        return T.vmap(one)(tangents) if mapping == "vmap" else [one(v) for v in tangents]
    found = products(T, f, form, params, tangents)
    if mapping == "vmap":
        return T.vmap(dot)(tangents, found)
    return [dot(v, h) for v, h in zip(tangents, found, strict=True)]


def penalty(
    T: Any,
    f: Callable[[Tree], Any],
    form: str,
    params: Tree,
    tangents: Tree,
    weights: tuple[float, float],
    num_tangents: int,
) -> tuple[Any, Any, Tree]:
    """loss, mean_k ||H v_k||^2 and the gradient of their weighted sum.

    The last form differentiates v'H u with u = H v held fixed: then
    grad ||H v||^2 = 2 grad [d2 f(p) [v, u]].
    """
    mode, mapping = split_form(form)
    if mode != "grad(jvp(jvp))":

        def total(p: Tree) -> tuple[Any, tuple[Any, Any]]:
            found = products(T, f, form, p, tangents)
            rows = [found] if mapping == "vmap" else found
            value, mean = f(p), sum(dot(h, h) for h in rows) / num_tangents
            return weights[0] * value + weights[1] * mean, (value, mean)

        gradient, (value, mean) = T.grad(total, has_aux=True)(params)
        return value, mean, gradient

    found = products(T, f, f"jvp(grad) {mapping}", params, tangents)

    def second(p: Tree, v: Tree, u: Tree) -> Any:
        return directional(T, lambda q: directional(T, f, q, v), p, u)

    def linear(p: Tree) -> tuple[Any, Any]:
        if mapping == "vmap":
            mixed = T.vmap(second, (None, 0, 0))(p, tangents, found).sum()
        else:
            mixed = sum(second(p, v, u) for v, u in zip(tangents, found, strict=True))
        value = f(p)
        return weights[0] * value + (2 * weights[1] / num_tangents) * mixed, value

    rows = [found] if mapping == "vmap" else found
    mean = sum(dot(h, h) for h in rows) / num_tangents
    gradient, value = T.grad(linear, has_aux=True)(params)
    return value, mean, gradient
