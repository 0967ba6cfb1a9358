"""Evaluating a plane or a line, and resuming one that was interrupted."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from hvpfast.analysis.landscape.directions import NORMALIZE, directions_of, ignored_names, unit_text
from hvpfast.analysis.landscape.losses import Losses
from hvpfast.analysis.landscape.surface import Surface, load
from hvpfast.backends.probes.source import fresh_seed
from hvpfast.operators.batch import bytes_of
from hvpfast.operators.parameters import by_layer, select

Span = float | tuple[float, float]


def plane(
    model: nn.Module,
    loss_fn: Callable[..., Any],
    params: Any,
    data: Any,
    *,
    directions: Tensor | Sequence[Tensor] | None = None,
    normalize: str | None = "auto",
    ignore: str | None = "bias,norm",
    span: Span | tuple[Span, Span] = 1.0,
    num_points: int | tuple[int, int] = 41,
    seed: int | None = None,
    reduction: str | None = None,
    dtype: torch.dtype | None = None,
    points_at_once: int | str = "auto",
    path: str | os.PathLike[str] | None = None,
    save_every: float = 10.0,
    progressbar: bool = False,
) -> Surface:
    """Losses L(p + x d_1 + y d_2) over a data set, on a grid around the model's parameters p.

    The model does not change. With ``path`` the surface is written while it grows, whole files
    only, and a call with the same arguments resumes an interrupted one (or returns a complete one):
    on the same machine, with as many threads, the final file is the same byte by byte.

    Args:
        model: as for :class:`hvpfast.HessianOperator`.
        loss_fn: the same.
        params: the parameters that move, as for the operators.
        data: as for the operators; means are exact for batches of any sizes.
        directions: columns (P, 2), such as two eigenvectors, or two vectors (P,), in the flat
            order of ``params``; None for random normal ones. The second is made orthogonal to the
            first.
        normalize: ``"filter"``, ``"layer"`` or None, see ``directions.py``;
            ``"auto"`` is ``"filter"`` for random directions and None for given ones. The result's
            ``unit`` says what a distance of 1 is.
        ignore: what does not move under random or normalised directions: ``"bias"``, ``"norm"``
            (parameters of normalisation layers), both with a comma, or None.
        span: coordinates from -span to span, or from the first to the second of a pair; a pair of
            such pairs for x and y.
        num_points: points along each axis, or a pair for x and y; an odd number holds the center.
        seed: of random directions, in [0, 2**64); None takes fresh entropy, or the seed of the
            file that is resumed.
        reduction: as for the operators.
        dtype: floating-point type of the computation; None takes that of the parameters.
        points_at_once: points that are evaluated together; ``"auto"`` by the sizes.
        path: of an .npz file.
        save_every: seconds between writes.
        progressbar: show one over the points.

    Returns:
        A :class:`Surface`.

    Raises:
        ValueError: an argument is not as described; BatchNorm or Dropout in train mode; the file
            is of other settings, parameters or data (the message says which).
    """
    axes = [_axis(pair, count) for pair, count in _two_axes(span, num_points)]
    how = _Options(normalize, ignore, seed, reduction, dtype, points_at_once)
    saving = _Saving(None if path is None else Path(path), save_every, progressbar)
    return _sweep(axes, model, loss_fn, params, data, directions, how, saving)


def line(
    model: nn.Module,
    loss_fn: Callable[..., Any],
    params: Any,
    data: Any,
    *,
    direction: Tensor | None = None,
    normalize: str | None = "auto",
    ignore: str | None = "bias,norm",
    span: Span = 1.0,
    num_points: int = 101,
    seed: int | None = None,
    reduction: str | None = None,
    dtype: torch.dtype | None = None,
    points_at_once: int | str = "auto",
    path: str | os.PathLike[str] | None = None,
    save_every: float = 10.0,
    progressbar: bool = False,
) -> Surface:
    """Losses L(p + x d) along one direction; arguments, result and errors as for :func:`plane`.

    ``direction`` is a vector (P,). The straight line to other parameters q is ``direction=q - p``
    with ``span=(0, 1)``.
    """
    given = None if direction is None else [direction]
    axes = [_axis(span, num_points)]
    how = _Options(normalize, ignore, seed, reduction, dtype, points_at_once)
    saving = _Saving(None if path is None else Path(path), save_every, progressbar)
    return _sweep(axes, model, loss_fn, params, data, given, how, saving)


class _Options(NamedTuple):
    """Arguments of :func:`plane` and :func:`line` that say how losses are computed."""

    normalize: str | None
    ignore: str | None
    seed: int | None
    reduction: str | None
    dtype: torch.dtype | None
    points_at_once: int | str


class _Saving(NamedTuple):
    """Where and how often a surface is written, and whether a progress bar is shown."""

    file: Path | None
    every: float
    progressbar: bool


def _sweep(
    axes: list[Tensor],
    model: nn.Module,
    loss_fn: Callable[..., Any],
    params: Any,
    data: Any,
    given: Tensor | Sequence[Tensor] | None,
    how: _Options,
    saving: _Saving,
) -> Surface:
    normalize, ignore, seed, reduction, dtype, points_at_once = how
    if normalize == "auto":
        normalize = "filter" if given is None else None
    if normalize not in NORMALIZE:
        raise ValueError(f'normalize must be "filter", "layer", None or "auto"; got {normalize!r}')
    if points_at_once != "auto" and (type(points_at_once) is not int or points_at_once < 1):
        raise ValueError(
            f'points_at_once must be "auto" or an integer >= 1; got {points_at_once!r}'
        )
    entries = by_layer(model, select(model, params))
    file = saving.file
    stored = load(file) if file is not None and file.exists() else None
    if given is not None and seed is not None:
        raise ValueError("seed is for random directions; drop it, or drop the given directions")
    if given is None and seed is None:
        seed = fresh_seed() if stored is None or stored.seed is None else stored.seed
    still = ignored_names(model, entries, ignore if given is None or normalize else None)
    rows = directions_of(len(axes), given, entries, normalize, seed, still)
    losses = Losses(model, loss_fn, data, reduction, dtype, entries, rows)
    rows = rows.to(losses.dtype)
    settings: dict[str, Any] = {
        "model": type(model).__name__,
        "loss": getattr(loss_fn, "__name__", type(loss_fn).__name__),
        "parameters": [entry.name for entry in entries],
        "dtype": str(losses.dtype),
        "samples": losses.batches.num_samples,
        "normalize": normalize,
        "still": list(still),
        "seed": seed,
        "unit": unit_text(normalize, given is not None, rows.double().norm(dim=1).tolist(), still),
        "points_at_once": losses.points_at_once if points_at_once == "auto" else points_at_once,
    }
    if file is not None:
        checks = {**losses.checksums(), "directions": _digest(rows), "grid": _digest(*axes)}
        settings["checksums"] = checks
    if stored is None:
        shape = tuple(len(axis) for axis in axes)
        stored = Surface(
            losses=torch.full(shape, math.nan, dtype=torch.float64, device="cpu"),
            done=torch.zeros(shape, dtype=torch.bool, device="cpu"),
            x=axes[0],
            y=axes[1] if len(axes) > 1 else None,
            directions=rows.T.contiguous(),
            center_loss=float(
                losses(torch.zeros(1, len(axes), dtype=torch.float64, device="cpu"))[0]
            ),
            settings=settings,
        )
    else:
        _check_same(stored.settings, settings, file)
    _fill(stored, axes, losses, saving)
    return stored


def _fill(surface: Surface, axes: Sequence[Tensor], losses: Losses, saving: _Saving) -> None:
    """Evaluate the points that are not done, in parts of the grid that are always the same."""
    points = torch.cartesian_prod(*axes).view(-1, len(axes))
    at_once = surface.settings["points_at_once"]
    values, done = surface.losses.view(-1), surface.done.view(-1)
    parts = [
        slice(start, min(start + at_once, len(points)))
        for start in range(0, len(points), at_once)
        if not bool(done[start])
    ]
    saved, before = time.monotonic(), int(done.sum())
    with tqdm(
        total=len(points), initial=before, unit="point", desc="landscape",
        disable=not saving.progressbar,
    ) as bar:  # fmt: skip
        for part in parts:
            values[part] = losses(points[part])
            done[part] = True
            bar.update(part.stop - part.start)
            due = part is parts[-1] or time.monotonic() - saved >= saving.every
            if saving.file is not None and due:
                surface.save(saving.file)
                saved = time.monotonic()


def _two_axes(
    span: Span | tuple[Span, Span], num_points: int | tuple[int, int]
) -> list[tuple[Span, int]]:
    spans: Any = span
    if not (isinstance(span, tuple) and any(isinstance(part, tuple) for part in span)):
        spans = (span, span)
    counts = num_points if isinstance(num_points, tuple) else (num_points, num_points)
    if len(spans) != 2 or len(counts) != 2:
        raise ValueError(f"span and num_points are for two axes; got {span!r}, {num_points!r}")
    return list(zip(spans, counts, strict=True))


def _axis(span: Span, count: int) -> Tensor:
    """Coordinates low + (high - low) i / (n - 1); the middle one of -s to s is exactly 0."""
    low, high = span if isinstance(span, tuple) else (-span, span)
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"span must go up between finite numbers; got {low!r} to {high!r}")
    if type(count) is not int or count < 2:
        raise ValueError(f"num_points must be integers >= 2; got {count!r}")
    return low + (high - low) * (
        torch.arange(count, dtype=torch.float64, device="cpu") / (count - 1)
    )


def _digest(*tensors: Tensor) -> str:
    return hashlib.sha256(b"".join(map(bytes_of, tensors))).hexdigest()


def _check_same(stored: Any, wanted: Any, file: Path | None) -> None:
    """Raise ValueError if a file holds a surface of other settings."""
    wanted = json.loads(json.dumps(wanted))
    different = []
    for name in sorted({*stored, *wanted} - {"checksums", "unit"}):
        if stored.get(name) != wanted.get(name):
            different.append(f"{name} is {stored.get(name)!r}, asked for {wanted.get(name)!r}")
    old, new = stored.get("checksums", {}), wanted["checksums"]
    different += [f"other {name}" for name in sorted(new) if old.get(name) != new[name]]
    if different:
        raise ValueError(
            f"{file} holds another landscape: {'; '.join(different)}. Choose another path, or "
            "delete the file"
        )
