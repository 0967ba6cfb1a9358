"""What the proxies of curvature measure: the exact diagonal of the Hessian, or gradient noise.

Along one training (parameters p_t, batches B_t, gradients g_t) the second moments q of all arms are
kept side by side, so that all see the same points:

    difference, secant, hutchinson, exact    q = sqrt(s) of HessianLRAdaptation
    adam, adam-0.99, adam-0.9                q = sqrt(v), Adam's own, by its beta2

and compared, coordinate by coordinate, with

    h_i      = |d2 L / dp_i2|                  on the whole train split, exact
    sigma_i  = sd of one sample's gradient / sqrt(batch size)

A proxy of curvature has a high rank correlation with h and slope 1 of log q on log h. What whitens
noise has slope 1 on log sigma; the difference of two independent gradients has q = sqrt(2) sigma.
(For cross-entropy the mean of squared per-sample gradients is close to the Gauss-Newton diagonal
where labels are as likely as the model says. Then sigma grows with sqrt(h), and a measure of noise
has a rank correlation with h, but slope 1/2.)

Rows, by their ``table``: proxy (correlations at some epochs), similarity (mean cosine of the update
of the arm "difference" and that of an Adam fed with the same gradients, per epoch), scatter (some
coordinates of one seed).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from torch.func import functional_call, grad, vmap

import hvpfast as hf
from hvpfast.lab.data.splits import Data, Split, fold, generator
from hvpfast.lab.measure.training import Diverged, linearize
from hvpfast.optim import HessianLRAdaptation
from hvpfast.optim.diagonals import exact_diagonal
from hvpfast.studies.lr_adaptation import train
from hvpfast.studies.lr_adaptation.config import Config

ADAMS = ("adam", "adam-0.99", "adam-0.9")
PROXIES = (*ADAMS, *train.CURVATURES)
CHUNK = 256
"""Samples whose gradients are in memory at once."""
NUM_POINTS = 300
"""Coordinates of each proxy that have a row in the table "scatter"."""


class Ghost:
    """The optimizer of an arm on a parameter of its own: what the arm would do with a gradient."""

    def __init__(self, arm: str, like: torch.Tensor) -> None:
        self.param = torch.zeros_like(like)
        self.optimizer: Any = train.make_optimizer(arm, self.param, 1.0, 0)

    def update(self, gradient: torch.Tensor, operator: hf.Linearization | None = None) -> None:
        """Set `param` to the update that the gradient leads to."""
        self.param.zero_()
        self.param.grad = gradient
        if operator is None:
            self.optimizer.step()
        else:
            self.optimizer.step(operator=operator)

    def second_moment(self) -> torch.Tensor | None:
        """Return what the optimizer divides the update by, its bias correction included."""
        if isinstance(self.optimizer, HessianLRAdaptation):
            return self.optimizer.rms_curvature(self.param)
        state, (group,) = self.optimizer.state[self.param], self.optimizer.param_groups
        correction: float = 1 - group["betas"][1] ** float(state["step"])
        average: torch.Tensor = state["exp_avg_sq"]
        return (average / correction).sqrt()


def proxy_rows(
    config: Config, data: Data, trajectory: str, rate: float, seed: int
) -> Iterator[dict[str, Any]]:
    """Train one arm as in its final run, all proxies beside it; yield the rows of three tables."""
    network, stream = train.spec(config), ("final", seed)
    model = train.new_model(config, *stream)
    probes = fold(config.root_seed, "probes", *stream)
    optimizer = train.make_optimizer(trajectory, model.flat, rate, probes)
    still = torch.optim.SGD([model.flat], lr=0.0)
    secant = HessianLRAdaptation(still, "secant")
    ghosts = {arm: Ghost(arm, model.flat.detach()) for arm in PROXIES if arm != "secant"}
    about = {"trajectory": trajectory, "seed": seed}
    try:
        for epoch, parts in enumerate(train.batches(config, data.train, stream, config.epochs), 1):
            cosines: dict[str, list[float]] = {arm: [] for arm in ADAMS}
            for batch in parts:
                train.take_step(config, network, model, secant, "secant", batch)
                lin = linearize(network, model, batch, config.backend, order=2)
                for arm, ghost in ghosts.items():
                    needs = arm in ("hutchinson", "exact")
                    ghost.update(lin.grad, lin if needs else None)
                for arm in ADAMS:
                    pair = ghosts["difference"].param, ghosts[arm].param
                    cosines[arm].append(float(F.cosine_similarity(*pair, dim=0)))
                model.flat.grad = lin.grad
                optimizer.step()
            for arm, values in cosines.items():
                row = {"epoch": epoch, "control": arm, "cosine": fmean(values)}
                yield {"table": "similarity", **about, **row}
            if epoch in config.proxy_epochs:
                moments = {arm: ghost.second_moment() for arm, ghost in ghosts.items()}
                moments["secant"] = secant.rms_curvature(model.flat)
                yield from compare_proxies(config, model, data.train, moments, epoch, about)
    except Diverged:
        return


def compare_proxies(
    config: Config,
    model: hf.MLP,
    split: Split,
    moments: dict[str, torch.Tensor | None],
    epoch: int,
    about: dict[str, Any],
) -> Iterator[dict[str, Any]]:
    """Compare the proxies with the exact diagonal and with the noise; a row each."""
    lin = linearize(train.spec(config), model, split, config.backend, order=2)
    h = exact_diagonal(lin).abs().double()
    sigma = gradient_noise(model, split) / math.sqrt(config.batch_size)
    first = ("adam", config.proxy_seeds[0])
    shown = epoch == max(config.proxy_epochs) and (about["trajectory"], about["seed"]) == first
    order = torch.randperm(len(h), generator=generator(config.root_seed, "scatter"))
    for name in PROXIES:
        if (moment := moments[name]) is None:
            continue
        q = moment.detach().double()
        alive = (h > 0) & (sigma > 0) & (q > 0)  # a unit that is off for every sample has none
        log_q, log_h, log_sigma = (values[alive].log() for values in (q, h, sigma))
        yield {
            "table": "proxy",
            **about,
            "epoch": epoch,
            "proxy": name,
            "num_coordinates": int(alive.sum()),
            "curvature_rank": rank_correlation(log_q, log_h),
            "curvature_slope": slope(log_q, log_h),
            "noise_rank": rank_correlation(log_q, log_sigma),
            "noise_slope": slope(log_q, log_sigma),
            "noise_ratio": float((log_q - log_sigma).median().exp()),
        }
        for i in order[alive[order]][:NUM_POINTS].tolist() if shown else ():
            point = {"curvature": float(h[i]), "noise": float(sigma[i]), "value": float(q[i])}
            yield {"table": "scatter", **about, "proxy": name, "coordinate": i, **point}


def gradient_noise(model: hf.MLP, split: Split) -> torch.Tensor:
    """Return the standard deviation over samples of each entry of the gradient, (P,) float64."""

    def loss(flat: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(functional_call(model, {"flat": flat}, (x[None],)), y[None])

    per_sample, flat = vmap(grad(loss), (None, 0, 0)), model.flat.detach()
    count, total = len(split.y), torch.zeros(flat.numel(), dtype=torch.float64)
    squares = total.clone()
    for x, y in zip(torch.split(split.x, CHUNK), torch.split(split.y, CHUNK), strict=True):
        gradients = per_sample(flat, x, y).double()  # (n, P)
        total += gradients.sum(0)
        squares += gradients.square().sum(0)
    variance = (squares - total.square() / count) / (count - 1)
    return variance.clamp(min=0).sqrt()


def rank_correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return Spearman's rank correlation of values without ties."""
    ranks = [v.argsort().argsort().double() for v in (a, b)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def slope(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the slope s of the least-squares line a = s b + c."""
    centred = b - b.mean()
    return float((centred @ a) / (centred @ centred))
