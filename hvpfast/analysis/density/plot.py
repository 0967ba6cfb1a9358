"""The figure of a spectral density."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hvpfast.utils import plotting

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from hvpfast.analysis.density.spectrum import DensityCurve, SpectralDensity

__all__ = ["draw_density"]

_DECADES = 7  # of density that a logarithmic axis shows below the highest point


def draw_density(
    spectrum: SpectralDensity,
    axis: str,
    density: str,
    kernel_width: float | None,
    exact: Tensor | None,
    title: str,
    ax: Axes | None,
) -> Figure:
    """See :meth:`SpectralDensity.plot`."""
    curve = spectrum.curve(axis=axis, kernel_width=kernel_width)
    if ax is None:
        ax = plotting.new_figure(6.4, 4.2).add_subplot()
    figure: Any = ax.figure
    plotting.frame(ax)
    u = curve.coordinate.numpy()
    if spectrum.num_probes > 1:
        band = f"{curve.confidence:.0%} band over {spectrum.num_probes} probes"
        lower, upper = curve.lower.numpy(), curve.upper.numpy()
        ax.fill_between(u, lower, upper, color=plotting.COLORS[0], alpha=0.25, lw=0, label=band)
    ax.plot(u, curve.density.numpy(), color=plotting.COLORS[0], lw=1.6, label="mean over probes")
    if exact is not None:
        smooth = _smoothed(exact, curve).numpy()
        ax.plot(u, smooth, color=plotting.INK, lw=1.0, ls="--", label="exact eigenvalues")
    top = float(curve.density.max())
    if density == "log":
        ax.set_yscale("log")
        ax.set_ylim(top * 10.0**-_DECADES, top * 3)
    else:
        ax.set_ylim(0, top * 1.15)
    ax.set_xlim(float(u[0]), float(u[-1]))
    per = "eigenvalue"
    if curve.threshold is not None:
        positions, names = _log_ticks(float(curve.grid[0]), float(curve.grid[-1]), curve.threshold)
        ax.set_xticks(positions, names)
        per = f"asinh(eigenvalue / {curve.threshold:.2g})"
    plotting.label(ax, title, "eigenvalue", f"density per unit of {per}")
    ax.legend(frameon=False, fontsize=8.5, labelcolor=plotting.INK)
    plotting.caption(
        figure,
        (
            f"{spectrum.num_steps} Lanczos steps, {spectrum.num_probes} {spectrum.distribution} "
            f"probes (seed {spectrum.seed}), {spectrum.num_matvecs} products, P = {spectrum.size}; "
            f"Gaussian kernel of width {curve.kernel_width:.3g}"
        ),
    )
    return figure  # type: ignore[no-any-return]


def _smoothed(values: Tensor, curve: DensityCurve) -> Tensor:
    """Eigenvalues (M,) under the kernel of a curve, on its grid."""
    values = values.detach().double().cpu().reshape(-1)
    u = values if curve.threshold is None else torch.asinh(values / curve.threshold)
    total = torch.zeros_like(curve.coordinate)
    for part in torch.split(u, 1024):
        away = (curve.coordinate[:, None] - part) / curve.kernel_width
        total += torch.exp(-0.5 * away.square()).sum(1)
    return total / (values.numel() * curve.kernel_width * math.sqrt(2 * math.pi))


def _log_ticks(low: float, high: float, threshold: float) -> tuple[list[float], list[str]]:
    """Positions asinh(t / threshold) and names of the decades t between low and high, and 0."""
    first, last = math.ceil(math.log10(threshold)), math.floor(math.log10(max(-low, high)))
    found = [(0.0, "0")]
    room = 0.07 * (math.asinh(high / threshold) - math.asinh(low / threshold))
    for power in range(last, first - 1, -1):
        for sign, text in ((1, ""), (-1, "−")):
            value = sign * 10.0**power
            position = math.asinh(value / threshold)
            if low <= value <= high and all(abs(position - other) > room for other, _ in found):
                found.append((position, f"${text}10^{{{power}}}$"))
    return [position for position, _ in found], [name for _, name in found]
