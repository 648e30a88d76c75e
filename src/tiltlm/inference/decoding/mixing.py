"""Have the chains of a Markov chain Monte Carlo run mixed? R-hat and effective sample size."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def split_r_hat(trace: Float[Tensor, "S C P"]) -> Float[Tensor, " P"]:
    """R-hat of S states of C chains for each of P prompts (Gelman et al. 2013, eq. 11.4, each chain cut in half).

    Near 1 where the halves of all chains agree. NaN with fewer than 4 states; inf where chains stand still at different values.
    """
    half = len(trace) // 2
    if half < 2:
        return torch.full((trace.shape[-1],), torch.nan, dtype=trace.dtype)
    parts = torch.cat([trace[:half], trace[-half:]], dim=1)
    within = parts.var(0).mean(0)
    between = half * parts.mean(0).var(0)
    ratio = ((half - 1) / half * within + between / half) / within
    still = (within <= 1e-300) & (between <= 1e-300)
    return torch.where(still, 1.0, ratio).sqrt()


def chain_ess(trace: Float[Tensor, "S C P"]) -> Float[Tensor, " P"]:
    """Effective number of independent states among S states of C chains (Gelman et al. 2013, eq. 11.8).

    Autocorrelations are summed up to Geyer's (1992) first negative pair. At most S C; S C where nothing moves and all agree.
    """
    states, chains, prompts = trace.shape
    if states < 4:
        return torch.full((prompts,), torch.nan, dtype=trace.dtype)
    centred = trace - trace.mean(0)
    # autocovariances by the Fourier transform, padded so that the ends do not meet
    spectrum = torch.fft.rfft(centred, n=2 * states, dim=0)
    covariance = torch.fft.irfft(spectrum.abs().square(), n=2 * states, dim=0)[:states].mean(1) / states
    within = covariance[0] * states / (states - 1)
    spread = within * (states - 1) / states
    if chains > 1:
        spread = spread + trace.mean(0).var(0)
    rho = 1 - (within - covariance) / spread.clamp(min=1e-300)
    pairs = rho[: states // 2 * 2].view(-1, 2, prompts).sum(1)
    positive = (pairs > 0).cumprod(0)
    monotone = pairs.cummin(0).values * positive
    time = (2 * monotone.sum(0) - 1).clamp(min=1e-9)
    total = torch.tensor(float(states * chains), dtype=trace.dtype)
    return torch.where(spread > 0, (total / time).clamp(max=float(total)), total)
