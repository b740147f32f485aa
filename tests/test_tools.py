"""Tests of likelihood.py (against closed forms), benchmark.py and figures.py."""

import math

import benchmark
import figures
import likelihood
import numpy as np
import pytest
import torch
from conftest import ROOT, exact_schedule, run_script
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal, kl_divergence

import ddpm_unet


@pytest.mark.parametrize(("T", "terms"), [(50, 49), (50, 7), (20, 40)])
def test_bound_of_normal_data(T, terms):
    """For x_0 ~ N(0, s^2) the best network is linear, and each part of the bound has a formula."""
    s = 0.25
    betas, alpha_bars = exact_schedule(T)
    slopes = np.sqrt(1 - alpha_bars) / (alpha_bars * s**2 + 1 - alpha_bars)
    left = s**2 * np.sqrt(1 - alpha_bars) * slopes  # the variance of x_0 - x_0_hat

    def net(x_t, t, labels):
        return x_t * torch.tensor(slopes)[t].view(-1, 1, 1, 1)

    torch.manual_seed(0)
    x_0 = s * torch.randn(3000, 1, 4, 4).double()
    labels = torch.zeros(3000).long()
    bits = likelihood.bound(net, ddpm_unet.make_schedule(T), x_0, labels, terms)
    q = Normal(alpha_bars[-1] ** 0.5 * x_0, (1 - alpha_bars[-1]) ** 0.5)
    L_T = kl_divergence(q, Normal(0.0, 1.0)).flatten(1).mean(dim=1) / math.log(2)
    torch.testing.assert_close(bits[:, 0], L_T)
    before, now = alpha_bars[1:-1], alpha_bars[2:]  # for t = 2..T
    coefs = np.sqrt(before) * betas[2:] / (1 - now)  # eq. 7
    variances = (1 - before) / (1 - now) * betas[2:]
    steps = (coefs**2 * left[2:] / variances).sum() / math.log(4)
    misses = torch.linspace(0, 8, 4000).double() * left[1] ** 0.5  # quadrature over x_0 - x_0_hat
    nats = likelihood.decoder_nats(0 * misses, misses, variances[0] ** 0.5)
    L_0 = np.average(nats / math.log(2), weights=(-(misses**2) / (2 * left[1])).exp())
    errors = bits.std(dim=0).numpy() / 3000**0.5
    assert (abs(bits.mean(dim=0).numpy() - (L_T.mean(), steps, L_0)) < 4 * errors).all()


@pytest.mark.parametrize(("T", "mean"), [(20, 0.5), (1000, -1), (1000, 0), (1000, 0.3), (1000, 1)])
def test_decoder_is_a_distribution_over_levels(T, mean):
    """The levels share a normal distribution, cut half-way between them; and the floor."""
    betas, alpha_bars = exact_schedule(T)
    std = likelihood.decoder_std(ddpm_unet.make_schedule(T))
    assert std**2 == pytest.approx((1 - alpha_bars[1]) / (1 - alpha_bars[2]) * betas[2])
    levels = torch.arange(256).double() / 127.5 - 1
    nats = likelihood.decoder_nats(levels, torch.full_like(levels, mean), std)
    cuts = np.arange(0.5, 255) / 127.5 - 1
    below = [math.erfc((mean - cut) / std / 2**0.5) / 2 for cut in cuts]
    assert (-nats).exp().tolist() == pytest.approx(np.diff([0, *below, 1]).tolist(), abs=1e-9)
    costs = likelihood.decoder_nats(levels, levels, std) / math.log(2)  # if the mean is perfect
    assert likelihood.decoder_floor(levels, std) == pytest.approx(costs.mean().item())


def test_whole_run(tmp_path, mnist_dir, capsys):
    """Of a tiny network with random weights. The table adds up."""
    options = dict(zip(ddpm_unet.MODEL, (1, 10, 30, 8, [1, 2])))
    weights = ddpm_unet.UNet(**options).state_dict()
    path = tmp_path / "model.pt"
    torch.save({"options": options, "step": 1, "net": {}, "ema": weights, "optimizer": {}}, path)
    run_script("tests/likelihood.py", path, "--data_dir", mnist_dir, "--num_images", 200)
    rows = [row.strip("| ").split(" | ") for row in capsys.readouterr().out.splitlines()[2:]]
    L_T, steps, L_0, total, floor, _ = (float(row[1].split(" ± ")[0]) for row in rows)
    assert total == pytest.approx(L_T + steps + L_0, abs=2e-3)
    assert floor < L_0


def test_parzen_is_a_mixture_of_normals():
    torch.manual_seed(0)
    samples, x = torch.randn(7, 3), torch.randn(1100, 3)
    normals = Independent(Normal(samples, 0.3), 1)
    log_p = MixtureSameFamily(Categorical(torch.ones(7)), normals).log_prob(x)
    bits = log_p.mean().item() / math.log(2)
    assert benchmark.parzen(samples, x, 0.3) == pytest.approx(bits, rel=1e-3)


def test_sliced_w2():
    """From N(0, I) to N(m, 4 I), the squared distance is 1 + (m d)^2 in a direction d."""
    a = torch.randn(100_000, 2)
    b = 2 * torch.randn(100_000, 2) + torch.tensor([3, 4])
    assert benchmark.sliced_w2(a, b) == pytest.approx(math.sqrt(1 + 25 / 2), rel=0.01)


@pytest.mark.parametrize(("title", "options", "changes"), figures.EXPERIMENTS)
def test_experiments_change_lines_that_exist(title, options, changes):
    source = (ROOT / "main.py").read_text()
    assert all(source.count(old) == 1 for old in changes), title
    figures.main.parse_options(options.split())
