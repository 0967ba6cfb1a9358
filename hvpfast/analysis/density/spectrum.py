"""A spectral density as weighted points per probe: moments, smooth curves, distances, a figure."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hvpfast.analysis.estimators.result import Estimate, student_quantile
from hvpfast.utils import plotting
from hvpfast.utils.choice import check_choice

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SCALES = ("linear", "log")
_DECADES = 7  # of density that a logarithmic axis shows below the highest point


@dataclass(frozen=True, eq=False)
class DensityCurve:
    """A density on a grid, smoothed by a Gaussian kernel, with an error band over probes.

    Attributes:
        grid: eigenvalues t (G,).
        coordinate: u (G,): t itself, or asinh(t / threshold) where the axis is ``"log"``.
        samples: the density of every probe per unit of u, (K, G).
        density: their mean (G,); its integral over u is 1.
        lower, upper: ends of the band (G,); 0 and inf for one probe.
        confidence: of the band, point by point.
        kernel_width: standard deviation of the kernel, in units of u.
        threshold: where the axis goes from linear to logarithmic; None on a linear axis.
    """

    grid: Tensor
    coordinate: Tensor
    samples: Tensor
    density: Tensor
    lower: Tensor
    upper: Tensor
    confidence: float
    kernel_width: float
    threshold: float | None


@dataclass(frozen=True, eq=False)
class SpectralDensity:
    """The density of the eigenvalues of A (P, P) as weighted points, K probes apart.

    Attributes:
        ritz_values: nodes theta (K, m), ascending per probe; float64 on the CPU, as all tensors.
        weights: w (K, m) >= 0, every row summing to 1.
        num_nodes: nodes of each probe (K,); later entries repeat its first node with weight 0.
        size: P.
        num_matvecs: products with A that were used.
        seed, distribution: of the probes; probe k is ``hf.probes(P, 1, first=k, ...)``.
    """

    ritz_values: Tensor
    weights: Tensor
    num_nodes: Tensor
    size: int
    num_matvecs: int
    seed: int
    distribution: str

    @property
    def num_probes(self) -> int:
        """K."""
        return self.ritz_values.shape[0]

    @property
    def num_steps(self) -> int:
        """m, the largest number of nodes of a probe."""
        return self.ritz_values.shape[1]

    def trace(self, function: Callable[[Tensor], Tensor] | None = None) -> Estimate[float]:
        """Tr f(A) = sum_i f(lambda_i), with the standard error over probes.

        Args:
            function: f, applied to a tensor of eigenvalues entry by entry; None for f(t) = t. For
                polynomials of degree below 2 m the only error is that of the probes; for others
                compare with the result of more steps.

        Returns:
            An estimate with one sample per probe.

        Raises:
            ValueError: f is not finite at a node.
        """
        values = self.ritz_values if function is None else function(self.ritz_values)
        if not bool(torch.isfinite(values).all()):
            node = float(self.ritz_values[~torch.isfinite(values)][0])
            raise ValueError(f"the function is not finite at {node:.6g}, a node of the quadrature")
        samples = self.size * (self.weights * values.double()).sum(1)
        return Estimate(
            estimate=float(samples.mean()),
            stderr=float(_stderr(samples)),
            samples=samples,
            num_matvecs=self.num_matvecs,
            stop_reason="budget",
            seed=self.seed,
            method="slq",
            dof=self.num_probes - 1,
        )

    def cumulative(self, grid: Tensor) -> tuple[Tensor, Tensor]:
        """The share of eigenvalues <= t for t in ``grid`` (G,), with its standard error (G,)."""
        below = self.ritz_values[:, :, None] <= grid.double()
        samples = (self.weights[:, :, None] * below).sum(1)
        return samples.mean(0), _stderr(samples)

    def curve(
        self,
        *,
        axis: str = "linear",
        kernel_width: float | None = None,
        threshold: float | None = None,
        num_points: int = 1001,
        confidence: float = 0.95,
    ) -> DensityCurve:
        """The density on a grid: the points smoothed by a Gaussian kernel.

        On a ``"log"`` axis the kernel acts on u = asinh(t / threshold), which is t / threshold
        near 0 and the logarithm of |t| far from it, so that bulk and outliers are both visible.

        Args:
            axis: ``"linear"`` or ``"log"``.
            kernel_width: standard deviation of the kernel in units of u; None for a hundredth of
                the range of the nodes in u.
            threshold: on a log axis; None for 1e-4 of the largest |node|.
            num_points: grid points G, evenly spaced in u.
            confidence: of the band, from Student's t over the probes.

        Raises:
            ValueError: an argument out of range.
        """
        check_choice("axis", axis, SCALES)
        for name, value in (("kernel_width", kernel_width), ("threshold", threshold)):
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive; got {value!r}")
        if not 0 < confidence < 1:
            raise ValueError(f"confidence must be between 0 and 1; got {confidence!r}")
        nodes = self.ritz_values
        if axis == "linear":
            threshold = None
        elif threshold is None:
            threshold = 1e-4 * float(nodes.abs().max()) or 1.0
        u = nodes if threshold is None else torch.asinh(nodes / threshold)
        low, high = float(u.min()), float(u.max())
        parts = 100 if threshold is None else 50
        width = kernel_width or (high - low) / parts or max(abs(high), 1.0) / parts
        coordinate = torch.linspace(
            low - 4 * width, high + 4 * width, num_points, dtype=torch.float64, device="cpu"
        )
        samples = torch.zeros(self.num_probes, num_points, dtype=torch.float64, device="cpu")
        for k, (points, masses) in enumerate(zip(u, self.weights, strict=True)):
            away = (coordinate[:, None] - points) / width
            samples[k] = torch.exp(-0.5 * away.square()) @ masses
        samples /= width * math.sqrt(2 * math.pi)
        mean = samples.mean(0)
        half = student_quantile(self.num_probes - 1, confidence) * _stderr(samples)
        return DensityCurve(
            grid=coordinate if threshold is None else threshold * torch.sinh(coordinate),
            coordinate=coordinate,
            samples=samples,
            density=mean,
            lower=(mean - half).clamp(min=0),
            upper=mean + half,
            confidence=confidence,
            kernel_width=width,
            threshold=threshold,
        )

    def distance(self, values: Tensor, weights: Tensor | None = None) -> float:
        """Wasserstein-1 distance to another spectrum, such as exact eigenvalues.

        Args:
            values: eigenvalues (M,).
            weights: their masses (M,); None for equal ones.
        """
        return wasserstein(
            self.ritz_values.reshape(-1), self.weights.reshape(-1), values.reshape(-1), weights
        )

    def plot(
        self,
        *,
        axis: str = "log",
        density: str = "log",
        kernel_width: float | None = None,
        exact: Tensor | None = None,
        title: str = "Spectral density",
        ax: Axes | None = None,
    ) -> Figure:
        """Draw the density with its band.

        Args:
            axis: of the eigenvalues, ``"log"`` (both signs, linear near 0) or ``"linear"``.
            density: scale of the density, ``"log"`` or ``"linear"``.
            kernel_width: as for :meth:`curve`; the figure states it.
            exact: eigenvalues (M,) to draw beside it, smoothed by the same kernel.
            title: of the panel.
            ax: a panel to draw into; None makes a figure.

        Returns:
            The figure; ``figure.savefig("density.png")`` writes it.
        """
        check_choice("density", density, SCALES)
        curve = self.curve(axis=axis, kernel_width=kernel_width)
        if ax is None:
            ax = plotting.new_figure(6.4, 4.2).add_subplot()
        figure: Any = ax.figure
        plotting.frame(ax)
        u, mean = curve.coordinate.numpy(), curve.density.numpy()
        if self.num_probes > 1:
            band = f"{curve.confidence:.0%} band over {self.num_probes} probes"
            lower, upper = curve.lower.numpy(), curve.upper.numpy()
            ax.fill_between(u, lower, upper, color=plotting.COLORS[0], alpha=0.25, lw=0, label=band)
        ax.plot(u, mean, color=plotting.COLORS[0], lw=1.6, label="mean over probes")
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
            low, high = float(curve.grid[0]), float(curve.grid[-1])
            ax.set_xticks(*_log_ticks(low, high, curve.threshold))
            per = f"asinh(eigenvalue / {curve.threshold:.2g})"
        plotting.label(ax, title, "eigenvalue", f"density per unit of {per}")
        ax.legend(frameon=False, fontsize=8.5, labelcolor=plotting.INK)
        plotting.caption(
            figure,
            f"{self.num_steps} Lanczos steps, {self.num_probes} {self.distribution} "
            f"probes (seed {self.seed}), {self.num_matvecs} products, P = {self.size}; "
            f"Gaussian kernel of width {curve.kernel_width:.3g}",
        )
        return figure  # type: ignore[no-any-return]


def wasserstein(
    values: Tensor, weights: Tensor | None, other_values: Tensor, other_weights: Tensor | None
) -> float:
    """Wasserstein-1 distance of two weighted point sets on the line, exactly.

    W_1 = integral |F(t) - G(t)| dt for their distribution functions F and G, which are constant
    between neighbouring points.

    Args:
        values: points (M,), in any order.
        weights: masses >= 0 (M,), which are scaled to sum to 1; None for equal ones.
        other_values: points of the other set.
        other_weights: its masses.

    Raises:
        ValueError: shapes differ, a set is empty or not finite, or a mass is negative.
    """
    points, masses = [], []
    for sign, value, weight in ((1, values, weights), (-1, other_values, other_weights)):
        weight = (
            torch.ones(value.shape, dtype=torch.float64, device="cpu") if weight is None else weight
        )
        v, w = value.detach().double().cpu(), weight.detach().double().cpu()
        if v.dim() != 1 or v.shape != w.shape or v.numel() == 0:
            raise ValueError(
                f"points and masses must be (M,), M >= 1; got {tuple(v.shape)}, {tuple(w.shape)}"
            )
        if not bool(torch.isfinite(v).all()) or not bool((w >= 0).all()) or not 0 < w.sum() < 1e300:
            raise ValueError("points must be finite, masses >= 0 with a finite positive sum")
        points.append(v)
        masses.append(sign * w / w.sum())
    t, order = torch.cat(points).sort()
    difference = torch.cat(masses)[order].cumsum(0)  # F - G from t_i to t_{i+1}
    return float((difference[:-1].abs() * t.diff()).sum())


def _stderr(samples: Tensor) -> Tensor:
    """Standard error of the mean over the first dimension; inf (unknown) for one sample."""
    count = samples.shape[0]
    if count < 2:
        return torch.full_like(samples[0], math.inf)
    return samples.std(0) / math.sqrt(count)


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
