"""Tests of dpm_2015.py.

The bound is compared with sums over all chains of 4 bits, with quadrature, and with best networks
that are known. The script runs as a user runs it, tiny: mostly in this process, to save seconds.
"""

import gzip
import json
import os
import runpy
import subprocess
import sys
from itertools import combinations, count, pairwise
from math import e, log, log2, pi, sqrt
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.distributions import Bernoulli, kl_divergence
from torch.testing import assert_close
from torchvision import datasets
from tqdm import tqdm

import dpm_2015 as dpm

torch.set_num_threads(1)  # as dpm_2015.py does for points and bits
ROOT = Path(__file__).resolve().parent.parent
TINY = "--num_timesteps 5 --hidden_size 16 --train_batch_size 50 --num_training_steps 6"
TINY = f"{TINY} --num_samples 100 --device cpu".split()
FILES = {"process.gif", "run.json", "samples.npy", "samples.png", "inpainted.npy", "inpainting.png"}
MAKERS = {"Gaussian": lambda: dpm.Gaussian(8, 0.01, True), "Binomial": lambda: dpm.Binomial(8, 0.2)}
BOTH = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
BEATS = torch.eye(5).repeat(1, 4)
content = lambda folder: {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def network(process, z):
    """Return, in place of a network, a function z of x_t and t."""
    z.process = process
    return z


def bound_at(net, x_0, t, sample):
    """Return K (B,) for the t (B, 1) and the way to draw x_t that a test wants."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randint", lambda *args: t)
        patch.setattr(net.process, "sample", sample)
        return dpm.bound(net, x_0)[0]


# %% The bound
WORDS = (torch.arange(16)[:, None] // torch.tensor([8, 4, 2, 1]) % 2).double()  # (16, 4)
ALPHA_BARS = [[1.0, 0.75, 0.5, 0.25, 0.0], [1.0, 0.9, 0.6, 0.5, 0.2], [1.0, 0.95, 0.1, 0.06, 0.02]]
log_bernoulli = lambda x, p: Bernoulli(p).log_prob(x).sum(dim=-1)


def all_chains(alpha_bars, m, table):
    """Return the bound and the log likelihood, in bits for each x_0, summed over x_1, ..., x_4."""
    log_q, log_p = torch.zeros(()), log_bernoulli(WORDS, torch.tensor(m))  # 5 axes, x_0 to x_4
    for t, (before, now) in enumerate(pairwise(alpha_bars), 1):
        axes = [16 if k in (t - 1, t) else 1 for k in range(5)]
        step = WORDS * now / before + m * (1 - now / before)  # of each bit to be 1 after the step
        odds = step / (1 - step) * (table[t].exp() if t > 1 else 1)  # eq. 44: z = 0 at t = 1
        log_q = log_q + log_bernoulli(WORDS, step[:, None]).view(axes)
        log_p = log_p + log_bernoulli(WORDS[:, None], odds / (1 + odds)).view(axes)
    assert log_p.exp().sum().item() == pytest.approx(1)
    K = (log_q.exp() * (log_p - log_q)).sum((1, 2, 3, 4)) / log(2)
    return K, log_p.logsumexp((1, 2, 3, 4)) / log(2)


def eq_14(alpha_bars, m, table):
    """Return the mean of K over t and x_t, for each x_0, and the term that eq. 14 lacks."""
    start, t, end = torch.cartesian_prod(torch.arange(16), torch.arange(2, 5), torch.arange(16)).T
    process, places = dpm.Binomial(4, m), torch.tensor([8.0, 4, 2, 1])
    process.alpha_bars = torch.tensor(alpha_bars)
    net = network(process, lambda x_t, t: table[t[:, 0], (x_t @ places).long()])
    K = bound_at(net, WORDS[start], t[:, None], lambda q: WORDS[end])
    x_t_mean = process.alpha_bars[t, None] * (WORDS[start] - m) + m
    weights = log_bernoulli(WORDS[end], x_t_mean).exp()
    lack = (WORDS.sum(dim=1) - 4 * m) * log2(m / (1 - m)) * (1 - alpha_bars[1] + alpha_bars[4])
    return (weights * K).view(16, 48).sum(dim=1) / 3, lack


@pytest.mark.parametrize("alpha_bars", ALPHA_BARS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_bound_is_the_sum_over_all_chains(float64, alpha_bars, seed):
    """For any network. The term that eq. 14 lacks is 0 on average over data whose mean is m."""
    torch.manual_seed(seed)
    data, table = torch.randn(16).softmax(dim=0), 2 * torch.randn(5, 16, 4)
    m = (data @ WORDS).mean().item()
    expected, log_likelihood = all_chains(alpha_bars, m, table)
    K, lack = eq_14(alpha_bars, m, table)
    assert_close(K + lack, expected)
    assert lack.abs().max() > 0.001 and abs(data @ lack) < 1e-9
    assert data @ K < data @ log_likelihood


def quadrature(process, z, stds):
    """Return the mean of K over t, x_t and x_0 ~ N(0, stds^2), if K is a sum over the x_i."""
    (nodes, weights), times = np.polynomial.hermite_e.hermegauss(4), torch.arange(2, process.T + 1)
    nodes, weights = torch.tensor(nodes), torch.tensor(weights / weights.sum())
    x_0, eps, t = torch.cartesian_prod(nodes, nodes, times.double()).T[:, :, None]
    weights = torch.cartesian_prod(weights, weights, torch.ones(len(times)) / len(times))
    sample = lambda q: q.mean + q.stddev * eps  # all x_i share the nodes
    K = bound_at(network(process, z), x_0 * torch.tensor(stds), t.long(), sample)
    return (weights.prod(dim=1) @ K).item()


@pytest.mark.parametrize("variances", [[1.0], [2.0], [0.5], [0.5, 1.5], [0.1, 0.3, 2.6]])
@pytest.mark.parametrize(("T", "beta_1"), [(40, 0.1), (40, 1e-4), (1000, 1e-5)])
def test_linear_gaussian_chain(float64, variances, T, beta_1):
    """Its best network is linear. Eq. 14 is a bound for standardised data, not for variance 2."""
    process, betas = dpm.Gaussian(T, beta_1, True), 1 / torch.linspace(T + 1, 2, T + 1)
    betas[0], betas[1], process.logit_betas.data = 0, beta_1, betas[2:].logit()
    alpha_bars, excess = (1 - betas).cumprod(dim=0)[:, None], sum(variances) - len(variances)
    V = alpha_bars * torch.tensor(variances) + 1 - alpha_bars  # (T + 1, D): variances of x_t

    def z(x_t, t):  # 0 if all variances are 1
        beta, ratio = betas[t], V[t[:, 0] - 1] / V[t[:, 0]]
        z_mu = (1 - beta).sqrt() * (ratio - 1) * x_t / beta.sqrt()
        return torch.cat((z_mu, (beta * ratio).logit() - beta.logit()), dim=1)

    K = quadrature(process, z, np.sqrt(variances))
    lack = -0.5 * excess * (beta_1 + alpha_bars[-1].item()) / log(2)
    exact = sum(-0.5 * log2(2 * pi * e * v) for v in variances)
    assert K + lack < exact + 1e-9 and (variances != [1.0] or abs(K - exact) < 1e-9)
    if variances == [2.0] and beta_1 == 0.1:  # in nats, worked out by other means
        found = [x * log(2) for x in (K, exact, K + lack)]
        assert found == pytest.approx([-1.729, -1.766, -1.790], abs=1e-3)


# %% The two processes
def betas_of(process):
    """Return beta_0, ..., beta_T of a Gaussian process, as they are, in float64."""
    return np.append(process.fixed_betas, process.logit_betas.detach().double().sigmoid())


@pytest.mark.parametrize(("T", "beta_1"), [(2, 0.1), (40, 1e-4), (1000, 1e-5), (4000, 1e-5)])
def test_gaussian_process_in_float32(T, beta_1):
    """Tiny betas keep their digits, in q, and in q_posterior as DDPM prints it (eq. 6 and 7)."""
    process, x_0, x_t = dpm.Gaussian(T, beta_1, False), 0.7, torch.tensor(-0.4)
    log_odds, betas = np.linspace(log(1 / beta_1 - 1), -7, T), betas_of(process)
    alpha_bars, t = np.cumprod(1 - betas), torch.arange(T + 1)[:, None]
    np.testing.assert_allclose(alpha_bars[1:], 1 / (1 + np.exp(-log_odds)), rtol=0.01)
    for s in (0 * t, t // 2, (t - 1).clamp(min=0)):
        found, alpha = process.q(x_0, s, t), alpha_bars[t] / alpha_bars[s]
        np.testing.assert_allclose(found.mean, np.sqrt(alpha) * x_0, rtol=1e-3)
        np.testing.assert_allclose(found.variance, 1 - alpha, rtol=1e-3)
    found = process.q_posterior(x_0, x_t, t[2:])
    beta, before, now = betas[2:, None], alpha_bars[1:-1, None], alpha_bars[2:, None]
    mean = np.sqrt(before) * beta * x_0 + np.sqrt(1 - beta) * (1 - before) * x_t.item()
    np.testing.assert_allclose(found.mean, mean / (1 - now), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(found.variance, beta * (1 - before) / (1 - now), rtol=1e-3)


@BOTH
def test_q_is_many_single_steps(float64, make):
    """Single steps as the paper prints them. For z = 0, p takes one of them, from x_t."""
    process, x = make(), torch.tensor([[0.0], [1.0]])
    bits, z = process.z_per_x == 1, torch.zeros(2, process.z_per_x)
    betas = [0, *(1 / np.arange(8, 0, -1))] if bits else betas_of(process)
    for s, t in combinations(range(9), 2):
        mean, variance = x, torch.zeros(2, 1)
        for beta in betas[s + 1 : t + 1]:
            mean = (1 - beta) * mean + 0.2 * beta if bits else sqrt(1 - beta) * mean
            variance = mean * (1 - mean) if bits else (1 - beta) * variance + beta
        found = [process.q(x, s, torch.tensor([[t]])), process.p_reverse(z, x, t)]
        for q in found[: 1 + (s == t - 1)]:
            assert_close([q.mean, q.variance.expand(2, 1)], [mean, variance])


@BOTH
@pytest.mark.parametrize(("t", "x_t"), [(2, 0.0), (2, 1.0), (5, 1.0), (8, 0.0)])
def test_q_posterior_is_bayes_rule(float64, make, t, x_t):
    """It is q(x_{t-1} | x_0) times q(x_t | x_{t-1}), for all x_{t-1} there are, or a fine grid."""
    process, x_0, x_t = make(), torch.tensor([[0.0], [1.0]]), torch.full((2, 1), x_t)
    x = torch.arange(2.0) if process.z_per_x == 1 else torch.linspace(-9, 9, 100_001)
    terms = process.q(x_0, 0, t - 1).log_prob(x) + process.q(x, t - 1, t).log_prob(x_t)
    weights, found = terms.softmax(dim=1), process.q_posterior(x_0, x_t, torch.tensor([[t]]))
    mean = (weights * x).sum(dim=1, keepdim=True)
    assert_close(found.mean, mean)
    assert_close(found.variance, (weights * (x - mean) ** 2).sum(dim=1, keepdim=True))


@BOTH
def test_p_reverse_and_kl(float64, make):
    """What z does, eq. 64 among it; and the KL, by drawing from q_posterior."""
    torch.manual_seed(0)
    process, (x_0, x_t) = make(), torch.rand(2, 5, 3).round()
    t, z = torch.tensor([[2], [3], [5], [7], [8]]), torch.randn(5, 3 * process.z_per_x)
    p, step, odds = process.p_reverse(z, x_t, t), process.q(x_t, t - 1, t), lambda p: p / (1 - p)
    if process.z_per_x == 1:
        assert_close(odds(p.mean), odds(step.mean) * z.exp())
        assert 0 < process.p_reverse(-1e3, x_t, t).probs.float().min()  # so that K stays finite
        assert process.p_reverse(1e3, x_t, t).probs.float().max() < 1
    else:
        assert_close(p.mean, step.mean + step.variance.sqrt() * z[:, :3])
        assert_close(odds(p.variance), odds(step.variance) * z[:, 3:].exp())
    q = process.q_posterior(x_0, x_t, t)
    x, kl = q.sample((40_000,)), kl_divergence(q, p).sum(dim=1)
    terms = (q.log_prob(x) - p.log_prob(x)).sum(dim=2)
    assert ((terms.mean(dim=0) - kl).abs() < 4 * terms.std(dim=0) / 200).all() and kl.min() > 0.01


@BOTH
def test_bound_draws_each_t_as_often(make):
    torch.manual_seed(0)
    process, n = make(), 21_000
    net = network(process, lambda x_t, t: torch.zeros(n, process.z_per_x))
    K, t = dpm.bound(net, torch.ones(n, 1))
    counts = t[:, 0].bincount(minlength=9)
    assert K.shape == (n,) and t.shape == (n, 1) and counts[:2].sum() == 0  # from t = 2 on
    assert ((counts[2:] - 3000) ** 2 / 3000).sum() < 25  # chi-square


def test_gradient_of_the_betas(float64):
    """By finite differences, with the same noise each time. beta_1 is not learned."""
    process, x_0 = dpm.Gaussian(6, 0.01, True), torch.randn(400, 2)
    net = network(process, lambda x_t, t: torch.cat((0.3 * x_t, 0.1 - 0.2 * x_t), dim=1))
    start, nudges = process.logit_betas.data.clone(), 1e-5 * torch.eye(5)

    def K(change):
        torch.manual_seed(0)
        process.logit_betas.data = start + change
        return dpm.bound(net, x_0)[0].mean()

    K(0).backward()
    slopes = [(K(nudge) - K(-nudge)).item() / 2e-5 for nudge in nudges]
    assert process.logit_betas.grad.tolist() == pytest.approx(slopes, rel=1e-5)
    assert [name for name, _ in process.named_parameters()] == ["logit_betas"]
    assert not dpm.Gaussian(6, 0.01, learn_betas=False).logit_betas.requires_grad


def test_best_network_for_heartbeats():
    """Its K is known. Its samples are heartbeats, and it completes a half of one."""
    process, beats = dpm.Binomial(100, 0.2), BEATS[:, None]  # (5, 1, 20)

    def z(x_t, t):  # q(x_0 | x_t) is a softmax over 5 sequences
        log_q = process.q(beats, 0, t).log_prob(x_t).sum(dim=2, keepdim=True)  # (5, B, 1)
        p = (log_q.softmax(dim=0) * process.q_posterior(beats, x_t, t).probs).sum(dim=0)
        return p.logit(eps=1e-7) - process.q(x_t, t - 1, t).logits

    torch.manual_seed(0)
    net, x_0 = network(process, z), BEATS.repeat(100, 1)
    t = torch.arange(2, 101).repeat_interleave(1000)[:, None]
    assert abs(bound_at(net, x_0.repeat(198, 1), t, process.sample).mean() + 2.975) < 0.05
    *_, (_, x) = dpm.p_sample_loop(net, x_0, torch.zeros(20).bool(), 1)
    exact = (x[:, None] == BEATS).all(dim=2).float().mean(dim=0)
    assert exact.sum() > 0.85 and (exact / exact.sum() - 0.2).abs().max() < 0.06
    *_, (_, x) = dpm.p_sample_loop(net, x_0, torch.arange(20) < 10, 2)
    assert (x == x_0).all(dim=1).float().mean() > 0.9


@BOTH
@pytest.mark.parametrize(("passes", "known"), [(1, [0, 0, 0, 0]), (3, [1, 1, 0, 0])])
def test_p_sample_loop(make, passes, known):
    """Step by step, where mean + variance replaces each draw, so that the result is known."""
    process, calls, x_0 = make(), [], torch.rand(5000, 4).round()
    process.sample, known = lambda q: q.mean + q.variance, torch.tensor(known).bool()
    z = lambda x_t, t: (0.3 * x_t - 0.2 * t).repeat(1, process.z_per_x)
    net = network(process, lambda x_t, t: calls.append((x_t, t)) or z(x_t, t))
    chain = [*dpm.p_sample_loop(net, x_0, known, passes)]
    assert [t for t, _ in chain] == [*range(8, -1, -1)]
    assert (chain[0][1].mean(dim=0) - process.prior.mean).abs().max() < 0.06
    assert (chain[0][1].std(dim=0) - process.prior.stddev).abs().max() < 0.04
    for (t, x), (_, x_after) in pairwise(chain):
        for k in range(passes if t > 1 else 1):
            x = x if k == 0 else process.sample(process.q(x, t - 1, t))  # from x_{t-1} back to x_t
            x_t, times = calls.pop(0)
            assert_close(x_t, x)
            assert times.shape == (5000, 1) and (times == t).all()
            x = process.sample(process.p_reverse(z(x, t) * (t > 1), x, t))  # z = 0 in eq. 44
            x[:, known] = process.sample(process.q(x_0, 0, t - 1))[:, known]
        assert_close(x_after, x)
    assert torch.equal(x[:, known], x_0[:, known]) and not calls


@BOTH
@pytest.mark.parametrize(("B", "D"), [(1, 2), (7, 6), (1, 3 * 4 * 4)])
def test_network(make, B, D):
    """z = 0 before training; all inputs and weights matter; z_mu of all x_i, and then z_sigma."""
    torch.manual_seed(0)
    process, x_t, t = make(), torch.rand(B, D).round(), torch.arange(B)[:, None] + 2
    model, n = dpm.Model(process, D, 16), process.z_per_x
    assert (model(x_t, t) == 0).all()
    nn.init.normal_(model.read_out.weight)
    z = model(x_t, t)
    assert z.shape == (B, D * n)
    assert_close(z[:1], model(x_t[:1], t[:1]), rtol=1e-4, atol=1e-5)  # examples do not mix
    for inputs in ((x_t, t - 1), (x_t + torch.eye(D)[0], t), (x_t + torch.eye(D)[-1], t)):
        assert (model(*inputs) != z).float().mean() > 0.9
    dpm.bound(model, x_t.repeat(9, 1))[0].sum().backward()
    assert all(weight.grad.abs().sum() > 0 for weight in model.parameters())
    nn.init.zeros_(model.dense[-1].weight)
    for change in (x_t, model.dense[-1].bias.data.view(1, D, 4)):  # the inputs of the last layers
        before = model(x_t, t)
        change[:, 1] += 1
        changed = (model(x_t, t) != before).any(dim=0)
        assert changed.nonzero().flatten().tolist() == [1, D + 1][:n]


@pytest.mark.parametrize(("T", "bits"), [(40, False), (1000, False), (2000, True)])
def test_temporal_basis(T, bits):
    """Ten bumps, evenly spaced in the log-odds of alpha_bar. z sees t only through them."""
    model = dpm.Model(dpm.Binomial(T, 0.2) if bits else dpm.Gaussian(T, 1e-4, True), 2, 16)
    nn.init.normal_(model.read_out.weight)
    alpha_bars = 1 - np.arange(T + 1) / T if bits else np.cumprod(1 - betas_of(model.process))
    with np.errstate(divide="ignore"):
        log_odds = (np.log(alpha_bars) - np.log(1 - alpha_bars))[1:, None].clip(min=-8)
    centres, basis = np.linspace(log_odds[0, 0], log_odds[-1, 0], 10), model.temporal_basis
    bumps = np.exp(-(((log_odds - centres) / (centres[1] - centres[0])) ** 2) / 2)
    np.testing.assert_allclose(basis, bumps / bumps.sum(axis=1, keepdims=True), atol=0.01)
    assert_close(basis.sum(dim=1), torch.ones(T))
    x_t, t = torch.randn(1, 2).expand(T, 2), torch.arange(1, T + 1)[:, None]
    before, basis[4] = model(x_t, t), basis[30]  # t = 5 and t = 31
    after = model(x_t, t)
    assert_close(after[4], before[30])
    assert (after != before).any(dim=1).nonzero().flatten().tolist() == [4]


@pytest.fixture
def digits(monkeypatch):
    """Put 800 real training digits and 200 for tests, these 50 times, in place of MNIST."""
    files = [ROOT / f"tests/mnist/{name}-images-idx3-ubyte.gz" for name in ("t10k", "train")]
    test, train = (torch.tensor([*gzip.decompress(file.read_bytes())[16:]]) for file in files)
    real = [test.view(-1, 28, 28).byte().repeat(50, 1, 1), train.view(-1, 28, 28).byte()]
    fake = lambda data_dir, train, download: SimpleNamespace(data=real[train])
    monkeypatch.setattr(datasets, "MNIST", fake)
    return [x.flatten(1) for x in real]


@pytest.mark.parametrize("dataset", ["swiss_roll", "heartbeat", "mnist"])
def test_load_data(dataset, digits):
    """Mean 0 and variance 1, but for bits; the data behind them; and the same for every seed."""
    rows, test_rows, shift, scale = dpm.load_data(dataset, "")
    torch.manual_seed(7)
    assert all(map(torch.equal, dpm.load_data(dataset, "")[:2], (rows, test_rows)))
    x = torch.cat((rows, test_rows))
    if dataset == "heartbeat":
        assert torch.equal(x, BEATS.repeat(2, 1)) and (shift, scale) == (0, 1)
        return
    assert abs(x.mean()) < 1e-3 and abs(x.square().mean() - 1) < 1e-3 and len(test_rows) == 10_000
    if dataset == "swiss_roll":
        x = x * scale + shift
        assert x.shape == (100_000, 2) and len(x.unique(dim=0)) > 99_990
        turns = (x.norm(dim=1) - torch.atan2(x[:, 1], x[:, 0])) / (2 * pi)  # whole, on the spiral
        assert (turns - turns.round()).std().item() * 2 * pi == pytest.approx(0.25, rel=0.02)
        assert turns.round().unique().tolist() == [1, 2] and 4.4 < x.norm(dim=1).max() / pi < 5
    for x, levels in zip((test_rows, rows), digits if dataset == "mnist" else ()):
        inside = x * scale + shift - levels  # each level is an interval
        assert -1e-3 < inside.min() < 0.01 and 0.99 < inside.max() < 1.001
        assert abs(inside.mean() - 0.5) < 0.01 and abs(inside.std() - sqrt(1 / 12)) < 0.01


# %% Training
@pytest.mark.parametrize("dataset", ["swiss_roll", "mnist"])
def test_training(monkeypatch, tmp_path, dataset):
    """The rate rises and falls, gradients are clipped, and what weight each K has in the loss."""
    rates, norms, seen, saved = [], [], [], []
    bound, adam_step, save = dpm.bound, torch.optim.Adam.step, torch.save

    def watched_bound(model, x_0):
        K, t = bound(model, x_0)
        seen.append((x_0, 1000 * K, t))  # makes all gradients large
        seen[-1][1].retain_grad()
        return seen[-1][1:]

    def watched_step(adam):
        rates.append(adam.param_groups[0]["lr"])
        grads = [p.grad for p in adam.param_groups[0]["params"] if p.requires_grad]
        norms.append(nn.utils.get_total_norm(grads).item())
        adam_step(adam)

    monkeypatch.setattr(dpm, "bound", watched_bound)
    monkeypatch.setattr(torch.optim.Adam, "step", watched_step)
    monkeypatch.setattr(torch, "save", lambda x, file: saved.append(file.name) or save(x, file))
    options = {"dataset": dataset, "num_training_steps": 30, "learning_rate": 0.01}
    rows, options["train_batch_size"] = torch.randn(500, 3), 4
    for options["seed"] in (0, 1):
        process = dpm.Gaussian(5, 0.01, learn_betas=dataset == "swiss_roll")
        weights = torch.tensor(1 - np.cumprod(1 - betas_of(process))).float()  # 1 - alpha_bar_t
        dpm.train(dpm.Model(process, 3, 8), rows, options, tmp_path / "model.pt", {})
    expected = [0.01 * min((step + 1) / 100, 1 - step / 30) for step in range(30)]
    assert rates == pytest.approx(2 * expected) and norms == pytest.approx([1] * 60, rel=1e-3)
    x_0, gradients, t = map(torch.stack, zip(*((x_0, K.grad, t) for x_0, K, t in seen)))
    weights = weights[t[:, :, 0]] if dataset == "mnist" else torch.ones(60, 4)
    assert_close(gradients, -weights / (4 * 3))
    assert len(x_0[:, :, 0].unique(dim=0)) == 60  # all batches differ
    assert torch.isin(x_0, rows).all() and os.listdir(tmp_path) == ["model.pt"]
    assert saved == 2 * [f"{tmp_path}/model.part"]  # which gets its name when it is complete


# %% Whole runs
def run(*options):
    """Run the whole of dpm_2015.py in this process, with few examples for K."""
    with pytest.MonkeyPatch.context() as patch:
        few = lambda steps, title, *_, **__: tqdm(list(steps)[:2] if title == "bound" else steps)
        patch.setattr(dpm, "tqdm", few)
        dpm.main([*map(str, options)])


def state_of(folder):
    state = torch.load(folder / "model.pt", weights_only=True)
    return state["step"], state["model"], state["optimizer"]["state"]


@pytest.fixture(scope="session")
def roll(tmp_path_factory):
    """The folder of a training run of 6 steps on the swiss roll, and the lines it printed."""
    out = tmp_path_factory.mktemp("roll") / "run"
    command = [sys.executable, ROOT / "dpm_2015.py", *TINY, "--output_dir", out]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out, done.stdout.splitlines()


def test_training_run(roll):
    (out, lines), scale = roll, dpm.load_data("swiss_roll", "")[3]
    assert {*os.listdir(out)} == FILES | {"model.pt"} and state_of(out)[0] == 6
    betas = dpm.Gaussian(5, 1e-4, True).logit_betas
    assert not torch.equal(state_of(out)[1]["process.logit_betas"], betas)  # they are learned
    facts, samples = json.loads((out / "run.json").read_text()), np.load(out / "samples.npy")
    assert facts["options"]["num_timesteps"] == 5 and facts["torch"] == torch.__version__
    figures = ", ".join(f"{name} {x:.3f}" for name, x in facts["figures"].items())
    assert lines == ["device: cpu, 1 CPU threads", f"{out}: {figures}"]
    K, error, L_null, bits = facts["figures"].values()
    assert bits == pytest.approx(log2(scale) - K / 2) and abs(K - L_null) < 0.1
    assert L_null == pytest.approx(-log2(2 * pi * e), abs=0.02) and 0.005 < error < 0.05
    assert samples.shape == (100, 2) and samples.std() == pytest.approx(scale, rel=0.2)  # units
    with Image.open(out / "process.gif") as gif:
        times = [gif.seek(k) or gif.info["duration"] for k in range(gif.n_frames)]
        assert sum(times) == 100 * (6 + 20) and gif.info["loop"] == 0  # stays, then again
    assert Image.open(out / "inpainting.png").size == (3 * gif.width, gif.height)


def test_seeds_and_checkpoints(roll, tmp_path, monkeypatch):
    """A checkpoint gives the same samples, in another folder; another seed gives other ones."""
    monkeypatch.chdir(tmp_path)
    before, checkpoint = content(roll[0]), ["--checkpoint", roll[0] / "model.pt"]
    run("--eval_path", checkpoint[1], "--eval_batch_size", 100)
    run(*checkpoint, "--num_samples", 100, "--seed", 1, "--output_dir", "sampled")
    run(*TINY, "--seed", 1, "--output_dir", "trained")
    folders = map(Path, ("outputs/dpm_2015_swiss_roll_samples", "sampled", "trained"))
    again, sampled, trained = map(content, folders)
    assert {*again} == {*sampled} == FILES and content(roll[0]) == before
    for name in ("samples.npy", "inpainted.npy"):
        assert again[name] == before[name] != sampled[name] != trained[name]
    weights = [state_of(folder)[1]["dense.0.weight"] for folder in (roll[0], Path("trained"))]
    assert (weights[0] - weights[1]).abs().max() > 0.2


def test_ctrl_c_and_resume(tmp_path, monkeypatch):
    """Ctrl-C goes on to the samples. A resumed training is the same as one in one go."""
    steps, bound, whole, parts = count(1), dpm.bound, tmp_path / "whole", tmp_path / "parts"
    run(*TINY, "--num_training_steps", 503, "--output_dir", whole)

    def interrupted_bound(*args):
        if next(steps) == 502:
            raise KeyboardInterrupt
        return bound(*args)

    monkeypatch.setattr(dpm, "bound", interrupted_bound)
    run(*TINY, "--num_training_steps", 503, "--output_dir", parts)
    assert state_of(parts)[0] == 500 and {*os.listdir(parts)} == FILES | {"model.pt"}
    run("--resume", parts / "model.pt", "--num_samples", 100)
    assert_close(state_of(parts), state_of(whole), rtol=0, atol=0)
    assert content(parts)["samples.npy"] == content(whole)["samples.npy"]


def test_heartbeats(tmp_path):
    run(*TINY, "--dataset", "heartbeat", "--output_dir", tmp_path)
    samples, completed = (np.load(tmp_path / f"{name}.npy") for name in ("samples", "inpainted"))
    assert samples.shape == (100, 20) and {*np.unique(samples)} == {0.0, 1.0}
    assert (np.unique(completed[:, :10], axis=0) == np.unique(BEATS[:, :10], axis=0)).all()
    figures = json.loads(content(tmp_path)["run.json"])["figures"]
    assert figures["L_null"] == pytest.approx(-14.438, abs=1e-3) and figures["K"] < -2.322


def test_digits(digits, tmp_path):
    """Grey levels, and completions whose known half is that of a test digit."""
    run(*TINY, "--dataset", "mnist", "--num_timesteps", 2, "--output_dir", tmp_path)
    samples, completed = (np.load(tmp_path / f"{name}.npy") for name in ("samples", "inpainted"))
    shift, scale = dpm.load_data("mnist", "")[2:]
    assert abs(samples.mean() - shift) < 5 > abs(samples.std() - scale) and len(samples) == 100
    halves = torch.tensor(completed[:, :392]) - 0.5
    test, train = (torch.cdist(halves, x[:800, :392].float()).amin(dim=1) for x in digits)
    assert test.max() < 10 and train.min() > 100
    betas = dpm.Gaussian(2, 1e-5, False).logit_betas
    assert torch.equal(state_of(tmp_path)[1]["process.logit_betas"], betas)  # not learned
    figures = json.loads(content(tmp_path)["run.json"])["figures"]
    assert figures["bits per dimension"] == pytest.approx(log2(scale) - figures["K"] / 784)


# %% Bad input
COUNTS = ["num_timesteps", "hidden_size", "train_batch_size", "num_training_steps", "num_samples"]
BAD = [(f"--{flag} {value}", f"--{flag}") for flag in COUNTS for value in (0, -2, "many", 2.5)]
BAD += [(f"--learning_rate {value}", "--learning_rate") for value in (0, -1, "nan", "fast")]
FLAGS = ["seed x", "seed -1", "dataset x", "device x", "colour x", "num_timesteps 1"]
BAD += [(f"--{flag}", "--" + flag.split()[0]) for flag in FLAGS]
NAMES = ["missing.pt", "empty.pt", "text.pt", "truncated.pt", "other.pt", "list.pt", "evil.pt", ""]
SOURCES = [f"{flag} {name}" for flag in ("--checkpoint", "--resume") for name in NAMES]
BAD += [(options, "cannot use " + options.split(" ")[1] + ": ") for options in SOURCES]
BAD += [(f"--output_dir {path}", path) for path in ("file", "file/out")]
BAD += [
    ("--checkpoint model.pt --resume model.pt", "--resume: not allowed with"),
    ("--checkpoint model.pt --hidden_size 8", "size mismatch for"),
    ("--resume model.pt --num_timesteps 9", "size mismatch for"),
    ("--resume model.pt --num_training_steps 9 --learning_rate 1e30", "K is not finite: lower"),
    ("--checkpoint model.pt --output_dir .", "holds a model"),
    ("--output_dir .", "holds a model"),
    ("--dataset mnist --data_dir .", "downloading"),
]


@pytest.fixture(scope="session")
def bad_files(roll, tmp_path_factory):
    """A folder with files that dpm_2015.py must refuse."""
    folder, state = tmp_path_factory.mktemp("bad"), torch.load(roll[0] / "model.pt")
    evil = type("Evil", (), {"__reduce__": lambda self: (os.mkdir, ("pwned",))})()
    files = {"model": state, "other": {"options": 1, "step": 1, "net": 1}, "list": [1]}
    for name, value in {**files, "evil": {**state, "model": evil}}.items():
        torch.save(value, folder / f"{name}.pt")
    (folder / "truncated.pt").write_bytes((folder / "model.pt").read_bytes()[:9999])
    for name, text in (("empty.pt", ""), ("text.pt", "hello"), ("file", "mine")):
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize(("options", "words"), BAD)
def test_bad_input(options, words, bad_files, tmp_path, monkeypatch, capsys):
    """One line names what is wrong, and no file changes."""
    monkeypatch.chdir(bad_files)
    before = {path: path.stat().st_mtime_ns for path in bad_files.rglob("*") if path.is_file()}
    command = ["--output_dir", str(tmp_path / "out"), *options.split(" ")]  # the last one counts
    command = command if "model.pt" in options else [*TINY, *command]
    monkeypatch.setattr(sys, "argv", ["dpm_2015.py", *command])
    monkeypatch.setattr(datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])  # no network
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "dpm_2015.py"), run_name="__main__")
    # argparse prints its message itself, and exits with 2. Ours goes to sys.exit, which prints it.
    line = capsys.readouterr().err.splitlines()[-1] if stop.value.code == 2 else stop.value.code
    assert line.startswith("dpm_2015.py: error: ") and "\n" not in line and words in line
    assert before == {p: p.stat().st_mtime_ns for p in bad_files.rglob("*") if p.is_file()}
    assert not (bad_files / "pwned").exists() and not (tmp_path / "out" / "model.pt").exists()
