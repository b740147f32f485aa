"""Tests of likelihood.py: closed forms for normal data, the decoder level by level, whole runs."""

import gzip
import math
import runpy
import sys
from pathlib import Path

import ddpm_unet
import likelihood
import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

HERE = Path(__file__).resolve().parent
TINY = {"channels": 1, "num_classes": 10, "num_timesteps": 30}
TINY |= {"base_channels": 8, "channel_mults": [1, 2]}
LEVELS = torch.arange(256).double().view(-1, 1, 1, 1) / 127.5 - 1


def schedule(T):
    """alpha_bars of the paper, anew, and the standard deviations of eq. 7 from t = 1 on."""
    betas = np.minimum(np.linspace(1e-4, 0.02, T) * 1000 / T, 0.999)
    alpha_bars = np.cumprod(1 - betas)
    return alpha_bars, np.sqrt((1 - alpha_bars[:-1]) / (1 - alpha_bars[1:]) * betas[1:])


@pytest.mark.parametrize(("T", "terms"), [(50, 49), (50, 7), (20, 40)])
def test_bound_of_normal_data(T, terms):
    """For x_0 ~ N(0, s^2) the best network is linear, and x_0 - x_0_hat ~ N(0, left)."""
    alpha_bars, stds = schedule(T)
    s, D, labels = 0.25, 16, torch.arange(3000) % 10
    variances = alpha_bars * s**2 + 1 - alpha_bars  # of x_t
    left = s**2 * (1 - alpha_bars) / variances

    def net(x_t, t, labels_too):
        assert x_t.dtype == torch.float32 and torch.equal(labels_too, labels)
        return x_t * torch.tensor(np.sqrt(1 - alpha_bars) / variances)[t].view(-1, 1, 1, 1).float()

    torch.manual_seed(0)
    x_0 = s * torch.randn(3000, 1, 4, 4, dtype=torch.float64)
    bits = likelihood.bound(net, ddpm_unet.make_schedule(T), x_0, labels, terms)
    last = alpha_bars[-1]
    prior = kl_divergence(Normal(x_0 * last**0.5, (1 - last) ** 0.5), Normal(0.0, 1.0))
    torch.testing.assert_close(bits[:, 0], prior.flatten(1).mean(dim=1) / math.log(2))
    betas = 1 - alpha_bars[1:] / alpha_bars[:-1]
    errors = alpha_bars[:-1] * (betas / (1 - alpha_bars[1:])) ** 2 * left[1:]  # of the means
    steps = (errors / (2 * stds**2)).sum() / math.log(2)
    miss = torch.linspace(-8, 8, 4001).double() * left[0] ** 0.5
    weights = Normal(0.0, left[0] ** 0.5).log_prob(miss).softmax(dim=0)
    within = Normal(miss, stds[0])
    L_0 = -(
        weights * (within.cdf(torch.tensor(1 / 255)) - within.cdf(torch.tensor(-1 / 255))).log2()
    )
    for found, expected in ((bits[:, 1], steps), (bits[:, 2], L_0.sum().item())):
        error = found.std().item() / 3000**0.5
        assert found.mean().item() == pytest.approx(expected, abs=4 * error + 1e-4)
        assert error < 0.02 * expected and D == x_0[0].numel()


def test_one_step_is_the_kl_of_two_normals():
    alpha_bars, stds = schedule(30)
    x_0, t = LEVELS[50:200:7].clone(), torch.arange(1, 23)
    torch.manual_seed(0)
    found = likelihood.step_nats(
        lambda x_t, *_: x_t.cos(), ddpm_unet.make_schedule(30), x_0, 0 * t, t
    )
    torch.manual_seed(0)
    now, before = (torch.tensor(alpha_bars)[k].view(-1, 1, 1, 1) for k in (t, t - 1))
    x_t = now.sqrt() * x_0 + (1 - now).sqrt() * torch.randn_like(x_0)
    x_0_hat = ((x_t - (1 - now).sqrt() * x_t.cos()) / now.sqrt()).clip(-1, 1)
    assert (x_0_hat.abs() == 1).any() and (x_0_hat.abs() < 1).any()
    precision = 1 / (1 - before) + (now / before) / (1 - now / before)  # Bayes' rule
    tilted = (now / before).sqrt() / (1 - now / before) * x_t
    q, p = (
        Normal((before.sqrt() / (1 - before) * x + tilted) / precision, precision**-0.5)
        for x in (x_0, x_0_hat)
    )
    torch.testing.assert_close(q.stddev.flatten(), torch.tensor(stds)[t - 1])
    torch.testing.assert_close(found, kl_divergence(q, p), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("terms", [29, 5])
def test_terms_are_spread_evenly(terms):
    seen, zeros = [], torch.zeros(300, 1, 2, 2).double()
    net = lambda x_t, t, labels: seen.append(t) or x_t
    likelihood.bound(net, ddpm_unet.make_schedule(30), zeros, torch.zeros(300).long(), terms)
    taken, gaps = torch.stack(seen[:-1]).sort(dim=0)[0], {1} if terms == 29 else {5, 6}
    assert taken.shape == (terms, 300) and not seen[-1].any()  # and L_0, at t = 0
    assert set(taken.diff(dim=0).flatten().tolist()) == gaps
    assert taken.unique().tolist() == list(range(1, 30))


@pytest.mark.parametrize("T", [20, 1000])
@pytest.mark.parametrize("mean", [-1.0, -0.99, -0.3, 0.0, 0.5, 1.0])
def test_decoder_is_a_distribution_over_levels(T, mean):
    std = likelihood.decoder_std(ddpm_unet.make_schedule(T))
    assert std == pytest.approx(schedule(T)[1][0])
    nats = likelihood.decoder_nats(LEVELS, torch.full_like(LEVELS, mean), std).flatten()
    edges = [
        0,
        *(0.5 * math.erfc((mean - (2 * k - 256) / 255) / std / 2**0.5) for k in range(1, 256)),
        1,
    ]
    assert (-nats).exp().sum().item() == pytest.approx(1)
    assert (-nats).exp().tolist() == pytest.approx(np.diff(edges).tolist(), abs=1e-12)
    assert nats.isfinite().all()  # also far from the mean, where a probability rounds to 0
