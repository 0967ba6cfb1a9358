"""Directions of a landscape: random or given, normalised, orthogonal.

    filter   every filter of a weight (row of a matrix, output channel of a convolution) of the
             direction gets the norm of that filter of the parameters
    layer    every tensor of the direction gets the norm of that tensor of the parameters
    None     the direction as a whole: length 1 if random, as it is if given

Within each such group the second direction is made orthogonal to the first and then gets its norm,
so that both hold exactly. One-dimensional tensors, and tensors whose filters have one entry each,
are one group, for a single entry allows no right angle.

Reference: Li, Xu, Taylor, Studer, Goldstein (2018), arXiv:1712.09913.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hvpfast.backends.probes.draw import probe_rows
from hvpfast.backends.probes.source import ProbeSource
from hvpfast.operators.parameters import Entry
from hvpfast.utils.choice import check_choice
from hvpfast.utils.torch_private import AnyNorm

NORMALIZE = ("filter", "layer", None)
_IGNORED = ("bias", "norm")
_NORMS = (AnyNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_PARALLEL = 1e-6  # sine of the angle below which two directions span no plane


def ignored_names(
    model: nn.Module, entries: Sequence[Entry], ignore: str | None
) -> tuple[str, ...]:
    """Names of the entries that do not move: those of the words of ``ignore``, as "bias,norm"."""
    words = [word.strip() for word in (ignore or "").split(",") if word.strip()]
    for word in words:
        check_choice("each word of ignore", word, _IGNORED)
    norms = {name for name, module in model.named_modules() if isinstance(module, _NORMS)}

    def stays(name: str) -> bool:
        owner, _, last = name.rpartition(".")
        return ("bias" in words and last.endswith("bias")) or ("norm" in words and owner in norms)

    return tuple(entry.name for entry in entries if stays(entry.name))


def directions_of(
    count: int,
    given: Tensor | Sequence[Tensor] | None,
    entries: Sequence[Entry],
    normalize: str | None,
    seed: int | None,
    still: Sequence[str],
) -> Tensor:
    """Directions (D, P) in float64 on the CPU."""
    stops = list(itertools.accumulate(entry.numel for entry in entries))
    places = list(zip(entries, map(slice, [0, *stops], stops), strict=True))
    size = stops[-1]
    fixed = [part for entry, part in places if entry.name in still]
    if given is None:
        assert seed is not None
        rows = probe_rows(ProbeSource(count, "normal", seed), size, torch.float64)
    else:
        rows = _given_rows(given, count, size)
    for part in fixed:
        rows[:, part] = 0
    if given is None and not bool(rows.any()):
        raise ValueError(f"ignore leaves nothing to move: {', '.join(still)} are all there is")
    if normalize is not None:
        center = torch.cat([entry.values() for entry in entries]).double().cpu()
        return _normalised(rows, center, places, normalize)
    rows = _orthogonal(rows)
    return rows if given is not None else rows / rows.norm(dim=1, keepdim=True)


def _given_rows(given: Tensor | Sequence[Tensor], count: int, size: int) -> Tensor:
    columns = given.T if isinstance(given, Tensor) and given.dim() == 2 else given
    rows = [row.detach().double().cpu() for row in columns]
    if len(rows) != count or any(tuple(row.shape) != (size,) for row in rows):
        wanted = f"columns ({size}, 2), or two vectors ({size},)" if count > 1 else f"({size},)"
        got = tuple(given.shape) if isinstance(given, Tensor) else [tuple(r.shape) for r in rows]
        raise ValueError(f"directions must be {wanted}, flat as params; got {got}")
    return torch.stack(rows)


def _normalised(
    rows: Tensor, center: Tensor, places: Sequence[tuple[Entry, slice]], normalize: str
) -> Tensor:
    """Directions (D, P) with the norms of the parameters (P,) and right angles, by groups.

    Args:
        rows: float64 directions.
        center: float64 parameters.
        places: the entries with their parts of the flat vector.
        normalize: ``"filter"`` or ``"layer"``.
    """
    out = torch.empty_like(rows)
    for entry, part in places:
        filters = entry.shape[0] if normalize == "filter" and len(entry.shape) > 1 else 1
        filters = 1 if filters == entry.numel else filters
        shape = (filters, entry.numel // filters)
        wanted = torch.linalg.vector_norm(center[part].view(shape), dim=1, keepdim=True)
        done: list[Tensor] = []
        for row in rows:
            group = row[part].reshape(shape)
            own = torch.linalg.vector_norm(group, dim=1, keepdim=True)
            for _ in range(2):
                for other in done:
                    group = group - (group * other).sum(1, keepdim=True) * other
            length = torch.linalg.vector_norm(group, dim=1, keepdim=True)
            lives = length > _PARALLEL * own
            done.append(torch.where(lives, group / torch.where(lives, length, 1.0), 0.0))
        for row, unit in zip(out, done, strict=True):
            row[part] = (unit * wanted).reshape(-1)
    return out


def _orthogonal(rows: Tensor) -> Tensor:
    """Directions (D, P) of the same lengths and span, each orthogonal to those before it.

    Raises:
        ValueError: a direction is zero, or in the span of those before it.
    """
    done: list[Tensor] = []
    lengths = torch.linalg.vector_norm(rows, dim=1)
    for index, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        if float(length) == 0 or not bool(torch.isfinite(length)):
            raise ValueError(
                f"direction {index} must have a positive, finite length; got {float(length)}"
            )
        rest = row / length
        for _ in range(2):
            for other in done:
                rest = rest - (rest @ other) * other
        norm = torch.linalg.vector_norm(rest)
        if float(norm) < _PARALLEL:
            raise ValueError("the two directions are parallel and span no plane; give others")
        done.append(rest / norm)
    out: Tensor = torch.stack(done) * lengths[:, None]
    return out


def unit_text(
    normalize: str | None, given: bool, lengths: Sequence[float], still: Sequence[str]
) -> str:
    """Text: what a step of 1 along a direction means."""
    shown = " and ".join(f"{length:.4g}" for length in lengths)
    what = {
        "filter": "a step of the norm of each filter, in every filter at once",
        "layer": "a step of the norm of each tensor, in every tensor at once",
        None: "one given direction" if given else "a step of length 1",
    }[normalize]
    text = f"distance 1 is {what} (length {shown} in parameter space)"
    return text + (f"; {', '.join(still)} stay" if still else "")
