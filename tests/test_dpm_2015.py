"""Tests of dpm_2015.py: the bound against enumeration, quadrature and oracles; whole runs; bad input."""

import gzip
import json
import math
import os
import re
import subprocess
import sys
import types
from argparse import Namespace
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
import pytest
import torch

import dpm_2015 as dpm

ROOT = Path(__file__).resolve().parent.parent
STEPS = 12
TINY = f"--num_timesteps 5 --hidden_size 16 --batch_size 50 --num_training_steps {STEPS} --eval_batch_size 30"
TINY = TINY.split()
FILES = ["loss.png", "model.pt", "process.gif", "run.json", "samples.npy", "samples.png", "stills.png"]
FILES.append("training.gif")
DATASETS = ["swiss_roll", "heart", "heartbeat", "mnist"]
M = 0.2  # the mean activity of heartbeats
PLACES = torch.tensor([8.0, 4.0, 2.0, 1.0], dtype=torch.float64)
BITS = torch.arange(16)[:, None] // PLACES % 2  # (16, 4): all there is of 4 bits
LN2 = math.log(2)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """A folder with 800 training digits and 200 test digits of MNIST, as torchvision expects them."""
    raw = tmp_path_factory.mktemp("data") / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for path in (ROOT / "tests" / "mnist").glob("*.gz"):
        (raw / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
    return raw.parent.parent


@pytest.fixture(scope="session")
def roll_run(tmp_path_factory):
    """The folder of a tiny run of the real script, and what it printed."""
    out = tmp_path_factory.mktemp("roll") / "run"
    command = [sys.executable, str(ROOT / "dpm_2015.py"), *TINY, "--output_dir", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


@pytest.fixture
def no_evaluation(monkeypatch):
    """Runs that are not about the metrics need not wait for them."""
    monkeypatch.setattr(dpm, "evaluate", lambda *parts: {"K": 0.0})


def run(*options):
    dpm.main([*TINY, *map(str, options)])


def refusal(capsys, options):
    """The one line with which dpm_2015.py refuses these options."""
    with pytest.raises(SystemExit) as stop:
        dpm.main([str(option) for option in options])
    assert stop.value.code == 2
    lines = re.split(r"[\r\n]+", capsys.readouterr().err)  # with those of a progress bar
    assert not any("Traceback" in line for line in lines)
    (line,) = [line for line in lines if line.startswith("dpm_2015.py: error: ")]
    return line


def rows(dataset):
    """The rows that draw_data draws from."""
    return dpm.CURVE.get(dataset, dpm.BEATS)


def arguments(dataset, T, hidden_size=16):
    return Namespace(dataset=dataset, num_timesteps=T, hidden_size=hidden_size, device="cpu", seed=0)


def untrained(dataset, T, C=2, P=1):
    torch.manual_seed(0)
    return dpm.Model(arguments(dataset, T), C, P)


def randomise(model, scale=0.3):
    """A network like one in training: read-outs that are not 0."""
    torch.manual_seed(1)
    for values in (model.weight, model.bias):
        values.data = scale * torch.randn_like(values)
    return model


def null(z_per_x):
    """A network that says nothing: z = 0."""
    return lambda x_t, t: x_t.new_zeros(len(x_t), z_per_x * x_t.shape[1])


def each_t(T, B):
    """t (B,) in 1..T-1, each as often as any other; B is a multiple of T - 1."""
    return torch.arange(1, T).repeat_interleave(B // (T - 1))


def logit(p):
    return p.log() - (1 - p).log()


# Binomial diffusion of 4 bits against sums over all chains

BETAS_4 = {
    "heartbeat": [1 / 4, 1 / 3, 1 / 2, 1.0],
    "rising": [0.1, 0.3, 0.2, 0.6],
    "long": [0.05, 0.9, 0.4, 0.3],
}


def log_bernoulli(x, p):
    return (x * p.log() + (1 - x) * (1 - p).log()).sum(dim=-1)


def lookup_network(T, seed):
    """Any reverse process at all: a random z (T, 16, 4) for every t and x_t."""
    table = 2 * torch.randn(T, 16, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return table, lambda x_t, t: table[t, (x_t @ PLACES).long()]


def one_step(beta):
    """Probabilities (16, 4) of the bits after one step from each state: anew from the prior, or kept."""
    return BITS * (1 - beta) + M * beta


def all_chains(betas, table, start):
    """log q(x_1, ..., x_4 | x_0) and log p(x_0, ..., x_4), each (16, 16, 16, 16), for state x_0 = start."""
    log_q, log_p = torch.zeros(()), log_bernoulli(BITS, torch.full_like(BITS, M))
    log_p = log_p.view(1, 1, 1, 16)
    for t, beta in enumerate(betas):
        forward = log_bernoulli(BITS[None], one_step(beta)[:, None])  # (16, 16): from, to
        odds = one_step(beta) / (1 - one_step(beta)) * (table[t].exp() if t else 1)
        back = log_bernoulli(BITS[:, None], (odds / (1 + odds))[None])  # (16, 16): x_{t-1}, x_t
        shape = [16 if k in (t - 1, t) else 1 for k in range(4)]
        log_q = log_q + (forward if t else forward[start]).view(shape)
        log_p = log_p + (back if t else back[start]).view(shape)
    return log_q, log_p


def averaged_bound(betas, model, start):
    """K for x_0 = start, with the means over t and x_t as sums; and the correction that is in it."""
    betas, x_0 = torch.tensor(betas, dtype=torch.float64), BITS[start]
    process, alpha_bars, K = dpm.Binomial(betas), (1 - betas).cumprod(dim=0), 0.0
    for t in (1, 2, 3):
        weights = log_bernoulli(BITS, x_0 * alpha_bars[t] + M * (1 - alpha_bars[t])).exp()
        assert weights.sum().item() == pytest.approx(1)
        noise = 1 - BITS  # x_t = (noise < probability): 0 makes a 1, 1 makes a 0
        found, _ = dpm.bound(process, model, x_0.expand(16, 4), torch.full((16,), t), noise)
        assert found.shape == (16,)
        K += (weights * found).sum().item() / 3
    ones = x_0.sum().item()
    slope = math.log(M / (1 - M))
    return K, (betas[0] + alpha_bars[-1]).item() * (ones - 4 * M) * slope / LN2


@pytest.mark.parametrize("name", list(BETAS_4))
@pytest.mark.parametrize("start", [0, 1, 6, 11, 15])  # 0 to 4 ones; the prior has 0.8 on average
def test_bound_is_the_sum_over_all_chains(name, start):
    table, model = lookup_network(4, seed=start)
    log_q, log_p = all_chains(BETAS_4[name], table, start)
    assert log_q.exp().sum().item() == pytest.approx(1)
    brute_force = (log_q.exp() * (log_p - log_q)).sum().item() / LN2
    exact = log_p.flatten().logsumexp(dim=0).item() / LN2
    K, correction = averaged_bound(BETAS_4[name], model, start)
    assert pytest.approx(brute_force, abs=1e-9) == K
    assert exact > K
    assert abs(correction) > 0.01  # K without it is another number
    assert K - correction != pytest.approx(brute_force, abs=0.01)


def test_all_chains_are_a_distribution_over_x_0():
    table, _ = lookup_network(4, seed=0)
    total = sum(all_chains(BETAS_4["rising"], table, start)[1].exp().sum().item() for start in range(16))
    assert total == pytest.approx(1)


def test_without_its_correction_the_binomial_bound_is_none():
    """For data that are always 1111 the best z is the posterior's, which leaves no KL."""
    alpha_bars = (1 - torch.tensor(BETAS_4["rising"], dtype=torch.float64)).cumprod(dim=0)
    before = torch.cat((torch.ones(1), alpha_bars[:-1]))
    inner = (before + M * (1 - before)).clamp(max=1 - 1e-12)
    table = (logit(inner) - math.log(M / (1 - M)))[:, None, None].expand(4, 16, 4)
    model = lambda x_t, t: table[t, 0]
    log_q, log_p = all_chains(BETAS_4["rising"], table, 15)
    exact = log_p.flatten().logsumexp(dim=0).item() / LN2
    K, correction = averaged_bound(BETAS_4["rising"], model, 15)
    assert (log_q.exp() * (log_p - log_q)).sum().item() / LN2 == pytest.approx(K, abs=1e-9)
    assert K <= exact < K - correction


@pytest.mark.parametrize("betas", list(BETAS_4.values()))
@pytest.mark.parametrize("t", [1, 2, 3])
def test_binomial_posterior_is_bayes_table(betas, t):
    process = dpm.Binomial(torch.tensor(betas, dtype=torch.float64))
    for x_0 in (0.0, 1.0):
        joint = torch.tensor([1 - x_0, x_0], dtype=torch.float64)  # probabilities of x = 0 and x = 1
        for beta in betas[:t]:
            step = torch.tensor([[1 - M * beta, M * beta], [(1 - M) * beta, 1 - (1 - M) * beta]]).double()
            joint = joint @ step
        beta = betas[t]
        step = torch.tensor([[1 - M * beta, M * beta], [(1 - M) * beta, 1 - (1 - M) * beta]]).double()
        for x_t in (0, 1):
            table = joint * step[:, x_t]
            one = torch.ones(1, 1, dtype=torch.float64)
            kernel = process.q_posterior(x_0 * one, x_t * one, torch.tensor([t]))
            assert kernel.probs.item() == pytest.approx((table[1] / table.sum()).item(), rel=1e-6)


# Gaussian diffusion against quadrature


def hermite(n):
    """Nodes and weights (n,) of the mean over N(0, 1)."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(n)
    return torch.tensor(nodes), torch.tensor(weights / weights.sum())


def quadrature(process, model, std, D=1, n=6):
    """K in bits, averaged over all t and, by nodes, over x_0 ~ N(0, std^2) and x_t; each coordinate alike."""
    nodes, weights = hermite(n)
    x_0, noise = (part.reshape(-1, 1).expand(-1, D) for part in torch.meshgrid(nodes, nodes, indexing="ij"))
    both = (weights[:, None] * weights).flatten()
    total = 0.0
    for t in range(1, process.T):
        K, _ = dpm.bound(process, model, std * x_0, torch.full((n * n,), t), noise)
        total += (both * K).sum().item() / (process.T - 1)
    return total


@pytest.mark.parametrize("t", [1, 5, 20, 39])
def test_gaussian_posterior_is_bayes_rule(t):
    betas = untrained("swiss_roll", 40).double().betas().detach()
    process, x_0, x_t = dpm.Gaussian(betas), 0.7, -0.4
    alpha_bar = (1 - betas[:t]).prod()
    x = torch.linspace(-8, 8, 2_000_001, dtype=torch.float64)
    log_density = -((x - alpha_bar.sqrt() * x_0) ** 2) / (2 * (1 - alpha_bar))  # q(x_{t-1} | x_0)
    log_density = log_density - (x_t - (1 - betas[t]).sqrt() * x) ** 2 / (2 * betas[t])  # q(x_t | x_{t-1})
    weights = log_density.softmax(dim=0)
    mean = (weights * x).sum()
    variance = (weights * (x - mean) ** 2).sum()
    one = torch.ones(1, 1, dtype=torch.float64)
    kernel = process.q_posterior(x_0 * one, x_t * one, torch.tensor([t]))
    assert kernel.mean.item() == pytest.approx(mean.item(), abs=1e-6)
    assert kernel.variance.item() == pytest.approx(variance.item(), rel=1e-5)


@pytest.mark.parametrize("D", [1, 2])
def test_linear_gaussian_chain(D):
    """Data N(0, 2 I): the best reverse process is linear, the numbers are worked out by hand."""
    T, v = 40, 2.0
    betas = 1 / torch.linspace(T, 2, T, dtype=torch.float64)
    betas[0] = 0.1
    alpha_bars = (1 - betas).cumprod(dim=0)
    V = alpha_bars * v + 1 - alpha_bars  # variance of x_t

    def model(x_t, t):
        beta, ratio = betas[t, None], (V[t - 1] / V[t])[:, None]
        mean, variance = (1 - beta).sqrt() * ratio * x_t, beta * ratio
        z_mu = (mean - (1 - beta).sqrt() * x_t) / beta.sqrt()
        return torch.cat((z_mu, (logit(variance) - logit(beta)).expand_as(z_mu)), dim=1)

    found = quadrature(dpm.Gaussian(betas), model, math.sqrt(v), D) * LN2 / D
    correction = -0.5 * (v - 1) * (betas[0] + alpha_bars[-1]).item()
    exact = -0.5 * math.log(2 * math.pi * math.e * v)
    assert exact == pytest.approx(-1.766, abs=1e-3)
    assert found == pytest.approx(-1.790, abs=1e-3)
    assert found - correction == pytest.approx(-1.729, abs=1e-3)  # eq. 14 as printed
    assert found < exact < found - correction


@pytest.mark.parametrize(("dataset", "T"), [("swiss_roll", 40), ("mnist", 1000), ("mnist", 20)])
def test_z_0_is_exact_for_data_from_the_prior(dataset, T):
    betas = untrained(dataset, T, *((2, 1) if dataset == "swiss_roll" else (1, 64))).double().betas().detach()
    process, L_null = dpm.Gaussian(betas), -0.5 * math.log2(2 * math.pi * math.e)
    assert abs(quadrature(process, null(2), 1.0, n=4) - L_null) < 1e-9
    torch.manual_seed(0)
    x_0, D = torch.randn(20_000, 8, dtype=torch.float64), 8
    K, _ = dpm.bound(process, null(2), x_0)
    K = K - torch.distributions.Normal(0, 1).log_prob(x_0).sum(dim=1) / LN2
    assert abs(K.mean()) < 4 * K.std() / math.sqrt(len(K)) and K.std() < 100 * D


# Kernels and KL divergences


def kernels(process, D=3):
    """Posterior and reverse kernels for random x_0, x_t and z; and these."""
    torch.manual_seed(2)
    B, t = process.T - 1, torch.arange(1, process.T)
    binomial = isinstance(process, dpm.Binomial)
    x_0 = torch.randn(B, D, dtype=torch.float64)
    x_0 = (x_0 > 0).double() if binomial else x_0
    noise = process.new_noise(B, D).double()
    x_t = process.sample(process.q_marginal(x_0, t), noise)
    z = 0.5 * torch.randn(B, D if binomial else 2 * D, dtype=torch.float64)
    q, p = process.q_posterior(x_0, x_t, t), process.p_reverse(z, x_t, t)
    return x_0, x_t, t, z, noise, q, p


def monte_carlo_kl(q, p, n=20_000):
    """E_q log q - log p (B,) and its standard error (B,)."""
    x = q.sample((n,))
    gap = (q.log_prob(x) - p.log_prob(x)).sum(dim=2)
    return gap.mean(dim=0), gap.std(dim=0) / math.sqrt(n)


def kl_inside(process, model, x_0, t, noise, entropies, correction):
    """The KL (B,) in nats that bound must have used."""
    K = dpm.bound(process, model, x_0, t, noise)[0] * LN2
    return (entropies + correction - K) / (process.T - 1)


def test_gaussian_kl():
    betas = 1 / torch.linspace(12, 2, 12, dtype=torch.float64)
    process, alpha_bars = dpm.Gaussian(betas), (1 - betas).cumprod(dim=0)
    x_0, x_t, t, z, noise, q, p = kernels(process)
    beta, now, before = betas[t, None], alpha_bars[t, None], alpha_bars[t - 1, None]
    mean = (before.sqrt() * beta * x_0 + (1 - beta).sqrt() * (1 - before) * x_t) / (1 - now)
    variance = beta * (1 - before) / (1 - now)
    mu = (1 - beta).sqrt() * x_t + beta.sqrt() * z[:, :3]
    sigma = 1 / (1 + (1 - beta) / beta * (-z[:, 3:]).exp())  # a variance
    kl = 0.5 * ((variance + (mean - mu) ** 2) / sigma - 1 + (sigma / variance).log()).sum(dim=1)
    H = [0.5 * 3 * math.log(2 * math.pi * math.e * v) for v in (1 - alpha_bars[-1], betas[0], 1.0)]
    correction = -0.5 * (x_0.square().sum(dim=1) - 3) * (betas[0] + alpha_bars[-1])
    found = kl_inside(process, lambda x_t, t: z, x_0, t, noise, H[0] - H[1] - H[2], correction)
    torch.testing.assert_close(found, kl, rtol=1e-9, atol=1e-9)
    estimate, error = monte_carlo_kl(q, p)
    assert ((estimate - kl).abs() < 5 * error).all()


def test_binomial_kl():
    betas = 1 / torch.arange(12, 0, -1, dtype=torch.float64)
    process, alpha_bars = dpm.Binomial(betas), (1 - betas).cumprod(dim=0)
    x_0, x_t, t, z, noise, q, p = kernels(process)
    beta, before = betas[t, None], alpha_bars[t - 1, None]
    r = x_0 * before + M * (1 - before)
    up, down = 1 - (1 - M) * beta, M * beta  # q(x_t = 1 | x_{t-1}), for x_{t-1} = 1 and 0
    one, zero = torch.where(x_t > 0, up, 1 - up) * r, torch.where(x_t > 0, down, 1 - down) * (1 - r)
    a = one / (one + zero)
    forward = torch.where(x_t > 0, up, down)
    b = torch.sigmoid(logit(forward) + z)
    kl = (a * (a / b).log() + (1 - a) * ((1 - a) / (1 - b)).log()).sum(dim=1)

    def entropy(p):
        return -(p * p.log() + (1 - p) * (1 - p).log())

    H = entropy(x_0 * 0 + M) - entropy(x_0 * alpha_bars[0] + M * (1 - alpha_bars[0]))  # alpha_bar_T is 0
    H = (H - entropy(x_0 * 0 + M)).sum(dim=1)
    correction = (x_0.sum(dim=1) - 3 * M) * math.log(M / (1 - M)) * betas[0]
    found = kl_inside(process, lambda x_t, t: z, x_0, t, noise, H, correction)
    torch.testing.assert_close(found, kl, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(q.probs, a, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(p.probs, b, rtol=1e-6, atol=1e-9)
    estimate, error = monte_carlo_kl(q, p)
    assert ((estimate - kl).abs() < 5 * error + 1e-9).all()


@pytest.mark.parametrize("dataset", ["swiss_roll", "heart", "mnist"])
def test_gaussian_marginal_is_single_steps(dataset):
    model = untrained(dataset, 40, *((1, 64) if dataset == "mnist" else (2, 1)))
    betas = model.betas().detach()
    assert len(betas) == 40 and ((betas > 0) & (betas < 1)).all()
    process, one = dpm.Gaussian(betas.double()), torch.ones(1, 1, dtype=torch.float64)
    mean, variance = 1.0, 0.0
    for t, beta in enumerate(betas.double().tolist()):  # the forward kernel is p_reverse for z = 0
        step = process.p_reverse(torch.zeros(1, 2).double(), 0.3 * one, torch.tensor([t]))
        assert step.mean.item() == pytest.approx(math.sqrt(1 - beta) * 0.3)
        assert step.variance.item() == pytest.approx(beta)
        mean, variance = math.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
        marginal = process.q_marginal(one, torch.tensor([t]))
        assert marginal.mean.item() == pytest.approx(mean)
        assert marginal.variance.item() == pytest.approx(variance)
    assert mean < 0.05  # the end is the prior


@pytest.mark.parametrize("T", [5, 100, 2000])
def test_binomial_marginal_is_single_steps(T):
    betas = untrained("heartbeat", T, 20).betas().detach()
    process, p = dpm.Binomial(betas), 1.0  # from x_0 = 1
    one = torch.ones(1, 1)
    for t, beta in enumerate(betas.double().tolist()):
        assert beta == pytest.approx(1 / (T - t), rel=1e-4)
        assert process.alpha_bars[t].item() == pytest.approx(1 - (t + 1) / T, abs=2e-5)
        p = p * (1 - beta) + M * beta
        if t % (T // 5) == 0 or t == T - 1:
            found = process.q_marginal(torch.tensor([[1.0, 0.0]]), torch.tensor([t])).probs[0].tolist()
            assert found == pytest.approx([p, M * (1 - (p - M) / (1 - M))], abs=2e-5)
            for x, expected in ((1.0, 1 - beta + M * beta), (0.0, M * beta)):
                step = process.p_reverse(torch.zeros(1, 1), x * one, torch.tensor([t]))
                assert step.probs.item() == pytest.approx(expected, rel=1e-4)
    assert p == pytest.approx(M)


# Oracles: the best reverse process for data that are known


def heartbeat_oracle(T):
    """z of the best factorised reverse process: q(x_0 | x_t) is a softmax over five sequences."""
    beats = dpm.BEATS.double()

    def model(x_t, t):
        x_t, t = x_t.double()[:, None], t[:, None, None].double()  # against (5, 20)
        now, before, beta = 1 - (t + 1) / T, 1 - t / T, 1 / (T - t)
        r = beats * now + M * (1 - now)
        weights = torch.where(x_t > 0, r, 1 - r).log().sum(dim=2).softmax(dim=1)  # (B, 5)
        r = beats * before + M * (1 - before)
        up, down = 1 - (1 - M) * beta, M * beta
        one, zero = torch.where(x_t > 0, up, 1 - up) * r, torch.where(x_t > 0, down, 1 - down) * (1 - r)
        p = (weights[:, :, None] * one / (one + zero)).sum(dim=1)  # (B, 20)
        return logit(p.clamp(1e-9, 1 - 1e-9)) - logit(torch.where(x_t > 0, up, down)[:, 0])

    return model


@pytest.mark.parametrize(("T", "best", "n"), [(20, -4.82, 120_000), (100, -2.99, 120_000)])
def test_heartbeat_oracle_reaches_its_ceiling(T, best, n):
    process = dpm.Binomial(1 / torch.arange(T, 0, -1, dtype=torch.float64))
    torch.manual_seed(0)
    x_0 = dpm.draw_data(arguments("heartbeat", T), n, rows("heartbeat")).double()
    K = torch.cat([dpm.bound(process, heartbeat_oracle(T), x)[0] for x in x_0.split(10_000)])
    assert K.std() / math.sqrt(n) < 0.02
    assert K.mean().item() == pytest.approx(best, abs=0.06)
    assert K.mean() <= math.log2(1 / 5)


def test_heartbeat_oracle_draws_heartbeats():
    T, n = 100, 2000
    process = dpm.Binomial(1 / torch.arange(T, 0, -1, dtype=torch.float64))
    *_, (step, x) = dpm.p_sample_loop(process, heartbeat_oracle(T), (n, 20), seed=0)
    exact = (x[:, None] == dpm.BEATS).all(dim=2).float().mean(dim=0)  # (5,)
    assert step == 0 and 0.5 < exact.sum() <= 1
    assert (exact / exact.sum() - 0.2).abs().max() < 0.06


@pytest.fixture(scope="module")
def roll_metrics():
    """What evaluate says of the untrained network."""
    model = untrained("swiss_roll", 40)
    torch.manual_seed(0)
    process = dpm.Gaussian(model.betas().detach())
    return dpm.evaluate(process, model, arguments("swiss_roll", 40), rows("swiss_roll"), None)


def test_swiss_roll_oracle_reaches_its_ceiling(roll_metrics):
    """q(x_0) is a mixture of Gaussians along the curve, so that x_{t-1} given x_t is one as well."""
    betas = untrained("swiss_roll", 40).double().betas().detach()
    (shift, scale), alpha_bars = dpm.SCALING["swiss_roll"], (1 - betas).cumprod(dim=0)
    c = ((dpm.CURVE["swiss_roll"][::4] - shift) / scale).double()  # (1000, 2)
    s2 = (dpm.NOISE["swiss_roll"] / scale).item() ** 2

    def model(x_t, t):
        t = t[0]  # one t in all of the batch
        beta, before = betas[t], alpha_bars[t - 1]
        U = before * s2 + 1 - before
        V = (1 - beta) * U + beta
        signal, keep = before.sqrt() * c, (1 - beta).sqrt()
        weights = (torch.cdist(x_t, keep * signal) ** 2 / (-2 * V)).softmax(dim=1)  # (B, 1000)
        first, second = weights @ signal, weights @ signal**2
        gain = keep * U / V
        mean = (1 - gain * keep) * first + gain * x_t
        variance = U * beta / V + (1 - gain * keep) ** 2 * (second - first**2)
        z_mu = (mean - keep * x_t) / beta.sqrt()
        return torch.cat((z_mu, logit(variance.clamp(max=1 - 1e-6)) - logit(beta)), dim=1)

    torch.manual_seed(0)
    Ks = []
    for t in range(1, 40):
        x_0 = dpm.draw_data(arguments("swiss_roll", 40), 1500, rows("swiss_roll")).double()
        noise = torch.randn_like(x_0)
        Ks.append(dpm.bound(dpm.Gaussian(betas), model, x_0, torch.full((1500,), t), noise)[0])
    K, error = torch.stack(Ks).mean().item(), torch.stack(Ks).std(dim=1).mean().item() / math.sqrt(39 * 1500)
    exact = roll_metrics["exact log likelihood"]
    assert error < 0.1
    assert exact - 0.6 < K < exact
    assert roll_metrics["K"] < roll_metrics["L_null"] + 0.1 < K - 2


# The bound as a thing to train on


def test_gradient_of_the_bound_in_the_betas():
    model = randomise(untrained("swiss_roll", 10)).double()
    torch.manual_seed(3)
    B = 90
    x_0, noise = torch.randn(2, B, 2, dtype=torch.float64)
    t = each_t(10, B)

    def K():
        return dpm.bound(dpm.Gaussian(model.betas()), model, x_0, t, noise)[0].mean()

    K().backward()
    found = model.logit_betas.grad
    assert found.shape == (9,) and found.abs().min() > 0
    assert "beta_0" not in dict(model.named_parameters())  # beta_0 stays as it is
    for k in range(9):
        sides = []
        for change in (1e-5, -2e-5, 1e-5):
            with torch.no_grad():
                model.logit_betas[k] += change
                sides.append(K().item())
        assert found[k].item() == pytest.approx((sides[0] - sides[1]) / 2e-5, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize(("dataset", "C", "P"), [("heartbeat", 20, 1), ("mnist", 1, 64)])
def test_betas_that_are_not_learned(dataset, C, P):
    model = untrained(dataset, 20, C, P)
    assert not model.logit_betas.requires_grad
    assert not model.betas().requires_grad


@pytest.mark.parametrize("dataset", ["swiss_roll", "heart"])
def test_ascent_raises_the_bound_and_moves_the_betas(dataset):
    model, t = untrained(dataset, 10), each_t(10, 900)
    x_0, noise = dpm.draw_data(arguments(dataset, 10), 900, rows(dataset)), torch.randn(900, 2)
    before, optimizer, Ks = model.betas().detach(), torch.optim.Adam(model.parameters(), 0.02), []
    for _ in range(30):  # all that is random stays as it is
        K = dpm.bound(dpm.Gaussian(model.betas()), model, x_0, t, noise)[0].mean()
        optimizer.zero_grad()
        (-K).backward()
        optimizer.step()
        Ks.append(K.item())
    assert Ks[-1] > Ks[10] > Ks[0]
    after = model.betas().detach()
    assert after[0] == before[0] and (after[1:] != before[1:]).all()


@pytest.mark.parametrize(("B", "T"), [(1, 5), (7, 20), (19, 20), (95, 20), (100, 7)])
def test_each_t_is_equally_likely_and_evenly_spread(B, T):
    torch.manual_seed(0)
    n, process = 3000, dpm.Gaussian(1 / torch.arange(T + 1, 1, -1))
    seen = torch.stack([dpm.bound(process, null(2), torch.zeros(B, 1))[1] for _ in range(n)])
    assert seen.shape == (n, B) and seen.min() == 1 and seen.max() == T - 1
    for batch in seen[:50]:
        counts = batch.bincount(minlength=T)[1:]
        assert counts.min() >= B // (T - 1) and counts.max() <= math.ceil(B / (T - 1))
    for position in {0, B - 1}:  # one draw of each batch: these are independent
        counts = seen[:, position].bincount(minlength=T)[1:]
        assert ((counts - n / (T - 1)).abs() < 5 * math.sqrt(n / (T - 1))).all()


# Network


@pytest.mark.parametrize(("dataset", "C", "P"), [("heartbeat", 20, 1), ("mnist", 1, 64), ("mnist", 3, 64)])
@pytest.mark.parametrize("T", [5, 100])
def test_bumps_sum_to_one(dataset, C, P, T):
    basis = untrained(dataset, T, C, P).basis
    assert len(basis) == T and (basis >= 0).all()
    torch.testing.assert_close(basis.sum(dim=1), torch.ones(T))
    assert basis[0].argmax() == 0 and basis[-1].argmax() == basis.shape[1] - 1


def test_points_have_a_read_out_for_every_t():
    assert torch.equal(untrained("swiss_roll", 7).basis, torch.eye(7))


@pytest.mark.parametrize(
    ("dataset", "C", "P"),
    [("swiss_roll", 2, 1), ("heart", 2, 1), ("heartbeat", 20, 1), ("mnist", 1, 64), ("mnist", 3, 64)],
)
@pytest.mark.parametrize("B", [1, 5])
def test_network_shapes(dataset, C, P, B):
    T, D = 20, C * P
    model, Process = untrained(dataset, T, C, P), dpm.Binomial if dataset == "heartbeat" else dpm.Gaussian
    process, t = Process(model.betas()), torch.randint(1, T, (B,))
    x_0 = torch.rand(B, D).round()
    z = model(x_0, t)
    assert z.shape == (B, D if dataset == "heartbeat" else 2 * D) and z.dtype == torch.float32
    assert (z == 0).all()  # before training
    randomise(model)
    assert (model(x_0, t) != 0).any()
    K, same = dpm.bound(process, model, x_0, t)
    assert same is t and K.shape == (B,) and K.isfinite().all()
    K.mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    *_, (_, x) = dpm.p_sample_loop(Process(model.betas().detach()), model, (B, D), seed=0)
    assert x.shape == (B, D) and x.isfinite().all()


@pytest.mark.parametrize("C", [1, 3])
def test_pixels_and_channels_of_an_image_stay_in_place(C):
    P, model = 64, untrained("mnist", 20, C, 64)
    model.bias.data += torch.arange(2 * C)[:, None]
    z = model(torch.randn(2, C * P), torch.tensor([3, 19]))
    expected = torch.arange(2 * C).float().repeat_interleave(P)  # z_mu of channel c at c P + p, then z_sigma
    torch.testing.assert_close(z, expected.expand(2, -1))
    for module in model.modules():  # without dense layers, a pixel reaches a few neighbours
        if isinstance(module, torch.nn.Linear):
            module.weight.data.zero_()
            module.bias.data.zero_()
    randomise(model)
    x, row, column = torch.zeros(1, C, 8, 8), 2, 5
    touched = x.clone()
    touched[:, C - 1, row, column] = 1
    t = torch.tensor([7])
    change = (model(x.flatten(1), t) != model(touched.flatten(1), t)).view(2 * C, 8, 8)
    far = torch.ones(8, 8, dtype=torch.bool)
    far[row - 2 : row + 3, column - 2 : column + 3] = False
    assert change[:, row, column].all() and not change[:, far].any()


@pytest.mark.parametrize(
    ("dataset", "C", "P"), [("swiss_roll", 2, 1), ("heartbeat", 20, 1), ("mnist", 1, 64)]
)
def test_t_and_examples_of_a_batch_do_not_mix(dataset, C, P):
    model, t = randomise(untrained(dataset, 20, C, P)), torch.tensor([1, 19, 7])
    x = torch.rand(3, C * P).round()
    together, apart = model(x, t), torch.cat([model(x[k : k + 1], t[k : k + 1]) for k in range(3)])
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(model(x, t), model(x, t.flip(0)), atol=1e-3)


# Sampling


def some_process(binomial):
    betas = 1 / torch.linspace(8, 2, 8)
    return dpm.Binomial(betas) if binomial else dpm.Gaussian(betas)


def some_network(x_t, t, binomial, last=0.0):
    z = (0.3 * x_t - 0.1 * t[:, None]).repeat(1, 1 if binomial else 2)
    return z + last * (t[:, None] == 0)


@pytest.mark.parametrize("binomial", [False, True])
def test_chains_repeat_and_leave_other_random_numbers_alone(binomial):
    process, model = some_process(binomial), lambda x_t, t: some_network(x_t, t, binomial)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    first, again, other = (list(dpm.p_sample_loop(process, model, (600, 4), seed)) for seed in (5, 5, 6))
    assert torch.equal(torch.rand(3), expected)
    assert [step for step, _ in first] == list(range(8, -1, -1))
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(first, again))
    assert not any(torch.equal(a, b) for (_, a), (_, b) in zip(first, other))


@pytest.mark.parametrize("binomial", [False, True])
def test_last_step_back_is_the_forward_kernel(binomial):
    process = some_process(binomial)
    models = [lambda x_t, t, k=k: some_network(x_t, t, binomial, last=k) for k in (0.0, 9.0)]
    first, second = (list(dpm.p_sample_loop(process, model, (20_000, 2), 0)) for model in models)
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(first, second))  # whatever z is at t = 0
    (_, x_1), (_, x_0) = first[-2:]
    beta, n = process.betas[0].item(), x_0.numel()
    if binomial:
        for x, p in ((1.0, 1 - beta + M * beta), (0.0, M * beta)):
            chosen = x_0[x_1 == x]
            assert chosen.mean().item() == pytest.approx(p, abs=5 * math.sqrt(p * (1 - p) / len(chosen)))
    else:
        rest = x_0 - math.sqrt(1 - beta) * x_1
        assert rest.mean().item() == pytest.approx(0, abs=5 * math.sqrt(beta / n))
        assert rest.var().item() == pytest.approx(beta, rel=5 * math.sqrt(2 / n))
        assert np.corrcoef(rest.flatten(), x_1.flatten())[0, 1] == pytest.approx(0, abs=5 / math.sqrt(n))


@pytest.mark.parametrize("binomial", [False, True])
def test_known_pixels_stay_as_they_are(binomial):
    process, model = some_process(binomial), lambda x_t, t: some_network(x_t, t, binomial)
    x_known, known = torch.rand(5, 6).round() + 0.123 * (not binomial), torch.arange(6) < 2
    seen = list(dpm.p_sample_loop(process, model, (5, 6), 0, x_known, known))
    assert len(seen) == 9
    for _, x in seen:
        assert torch.equal(x[:, :2], x_known[:, :2])
        assert (x[:, 2:] != x_known[:, 2:]).any()
    free = dict(dpm.p_sample_loop(process, model, (5, 6), 0))
    assert torch.equal(seen[0][1][:, 2:], free[8][:, 2:])  # a hole starts as the prior does


def test_chain_of_a_gaussian_ends_in_its_data():
    """z = 0 is exact for N(0, I): each x_t of the chain is N(0, I)."""
    for _, x in dpm.p_sample_loop(some_process(False), null(2), (50_000, 1), seed=0):
        assert x.mean().item() == pytest.approx(0, abs=5 / math.sqrt(50_000))
        assert x.var().item() == pytest.approx(1, rel=5 * math.sqrt(2 / 50_000))


# Data and metrics


@pytest.mark.parametrize("dataset", ["swiss_roll", "heart"])
def test_points_are_standardised(dataset):
    torch.manual_seed(0)
    n = 200_000
    x = dpm.draw_data(arguments(dataset, 40), n, rows(dataset))
    assert x.shape == (n, 2)
    assert x.mean(dim=0).abs().max() < 5 / math.sqrt(n)
    assert x.square().mean().item() == pytest.approx(1, abs=0.01)
    assert not torch.equal(x[:9], dpm.draw_data(arguments(dataset, 40), 9, rows(dataset)))  # fresh every time


def curve(dataset, v):
    """The formulas of the two curves, at v (N,) in [0, 1), in float64."""
    u = 2 * np.pi * v
    if dataset == "heart":
        y = 13 * np.cos(u) - 5 * np.cos(2 * u) - 2 * np.cos(3 * u) - np.cos(4 * u)
        return np.stack((16 * np.sin(u) ** 3, y), axis=1) / 5
    u = 1.5 * np.pi * (1 + 2 * v)
    return np.stack((u * np.cos(u), u * np.sin(u)), axis=1) / 10


@pytest.mark.parametrize("dataset", ["swiss_roll", "heart"])
def test_curves_and_the_distance_of_their_places(dataset):
    places = dpm.CURVE[dataset]
    assert places.shape == (4000, 2)
    np.testing.assert_allclose(places, curve(dataset, (np.arange(4000) + 0.5) / 4000), atol=1e-5)
    apart = (places[1:] - places[:-1]).norm(dim=1).max()
    assert apart < dpm.NOISE[dataset] / 2  # so that 4,000 places and a curve have the same density


def test_heartbeats_are_exact():
    torch.manual_seed(0)
    x = dpm.draw_data(arguments("heartbeat", 40), 5000, rows("heartbeat"))
    assert x.shape == (5000, 20) and ((x == 0) | (x == 1)).all()
    assert (x.sum(dim=1) == 4).all() and torch.equal(x[:, :15], x[:, 5:])  # a pulse in every fifth bin
    assert x.mean().item() == pytest.approx(M)
    phases = x[:, :5].mean(dim=0)
    assert (phases - 0.2).abs().max() < 5 * math.sqrt(0.16 / 5000)


def test_digits_are_standardised_and_keep_their_grey_levels(data_dir):
    train, test = dpm.load_mnist(str(data_dir))
    assert train.shape == (800, 784) and test.shape == (200, 784) and train.dtype == torch.uint8
    torch.manual_seed(0)
    x = dpm.draw_data(arguments("mnist", 40), 3000, train)
    assert abs(x.mean()) < 0.05 and x.square().mean().item() == pytest.approx(1, abs=0.05)
    x = dpm.draw_data(arguments("mnist", 40), 50, train[:1])
    shift, scale = dpm.SCALING["mnist"]
    levels = (x * scale + shift).double()
    inside = levels - train[:1]
    assert inside.min() > -1e-4 and inside.max() < 1 + 1e-4  # a grey level is an interval
    assert inside.mean().item() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("dataset", ["swiss_roll", "heart"])
def test_exact_log_likelihood(dataset, monkeypatch):
    seen, draw_data = [], dpm.draw_data

    def few(args, n, rows):
        seen.append(draw_data(args, min(n, 500), rows))
        return seen[-1]

    monkeypatch.setattr(dpm, "draw_data", few)
    monkeypatch.setattr(dpm, "bound", lambda process, model, x_0: (x_0[:, 0], None))
    torch.manual_seed(0)
    process = dpm.Gaussian(1 / torch.linspace(8, 2, 8))
    metrics = dpm.evaluate(process, null(2), arguments(dataset, 8), rows(dataset), None)
    (shift, scale), std = dpm.SCALING[dataset], dpm.NOISE[dataset]
    v = (torch.arange(80_000, dtype=torch.float64) + 0.5) / 80_000  # 20 times finer
    places, points = curve(dataset, v.numpy()), (seen[-1] * scale + shift).double().numpy()
    log_p = []
    for x in points:
        log_terms = -((x - places) ** 2).sum(axis=1) / (2 * std**2)
        top = log_terms.max()
        log_p.append(top + np.log(np.exp(log_terms - top).mean()) - np.log(2 * np.pi * std**2))
    expected = (np.mean(log_p) + 2 * math.log(scale)) / LN2  # a density over standardised points
    assert metrics["exact log likelihood"] == pytest.approx(expected, abs=0.005)
    L_null = -(math.log(2 * math.pi) + 0.5 * seen[-1].square().sum(dim=1).mean().item()) / LN2
    assert metrics["L_null"] == pytest.approx(L_null, abs=1e-4)


def test_metrics_of_points(roll_metrics):
    args = arguments("swiss_roll", 40)
    assert list(roll_metrics) == ["K", "standard error", "L_null", "K - L_null", "exact log likelihood"]
    assert roll_metrics["L_null"] == pytest.approx(-2.047 * 2, abs=0.03)
    assert roll_metrics["K - L_null"] == pytest.approx(roll_metrics["K"] - roll_metrics["L_null"])
    torch.manual_seed(5)
    model = untrained("swiss_roll", 40)
    process, x_0 = dpm.Gaussian(model.betas().detach()), dpm.draw_data(args, 39 * 500, rows("swiss_roll"))
    K, _ = dpm.bound(process, model, x_0, each_t(40, 39 * 500))
    error = math.hypot(roll_metrics["standard error"], K.std().item() / math.sqrt(len(K)))
    assert K.mean().item() == pytest.approx(roll_metrics["K"], abs=5 * error)


# Pictures and files


def test_a_file_that_cannot_be_finished_leaves_the_earlier_one(tmp_path, capsys):
    path = tmp_path / "file"
    path.write_text("earlier")

    def write(temporary):
        temporary.write_text("half")
        raise OSError("No space left on device")

    with pytest.raises(SystemExit) as stop:
        dpm.save(path, write)
    line = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and line.startswith("dpm_2015.py: error: --output_dir")
    assert str(tmp_path) in line and "No space left" in line
    assert path.read_text() == "earlier"


def test_draw():
    torch.manual_seed(0)
    blue = "#0072B2"
    points = dpm.draw([("a", torch.zeros(4, 2), blue)])
    arrows = dpm.draw([("a", torch.cat((torch.randn(9, 2), torch.ones(9, 2)), dim=1), blue)])
    assert points.dtype == np.uint8 and points.shape == arrows.shape and (points != arrows).any()
    centre = points[points.shape[0] // 2 - 30 : points.shape[0] // 2 + 60, 100:260].reshape(-1, 3)
    assert (np.abs(centre.astype(int) - [0x00, 0x72, 0xB2]).max(axis=1) < 20).any()  # the blue dot
    both = dpm.draw([("a", torch.zeros(4, 2), blue), ("b", dpm.BEATS, blue)])
    assert both.ndim == 3 and both.shape[2] == 3 and both.shape[1] > points.shape[1]
    for n in (1, 7, 60):
        digits = dpm.draw([("a", torch.full((n, 784), -0.42), blue)])
        assert digits.shape[2] == 3 and digits.min() == 0


# Whole runs, tiny


def check_run(out, dataset):
    assert sorted(os.listdir(out)) == FILES  # and no unfinished file
    facts = json.loads((out / "run.json").read_text())
    assert facts["options"]["dataset"] == dataset and facts["options"]["num_timesteps"] == 5
    assert facts["versions"]["torch"] == torch.__version__ and facts["seconds"] > 0
    assert facts["device"] == facts["options"]["device"] and facts["precision"] in ("fp32", "bf16")
    values = np.hstack([np.ravel(value) for value in facts["metrics"].values()])
    assert np.isfinite(values).all()
    for name in ("loss.png", "samples.png", "stills.png"):
        assert imageio.imread(out / name).std() > 0
    frames = imageio.mimread(out / "process.gif", memtest=False)
    assert len(frames) in (11, 12)  # steps 0 to 5, there and back; those in the middle are alike
    return np.load(out / "samples.npy"), facts["metrics"]


def test_swiss_roll_run(roll_run):
    out, printed = roll_run
    samples, metrics = check_run(out, "swiss_roll")
    assert samples.shape == (30, 2) and samples.dtype == np.float32 and np.isfinite(samples).all()
    assert printed.startswith("device: ") and all(name in printed for name in FILES)
    for name, value in metrics.items():
        assert f"{name} {value}" in printed
    assert metrics["K"] < metrics["exact log likelihood"]


def test_heart_run(tmp_path):
    run("--dataset", "heart", "--output_dir", tmp_path / "x" / "y")
    samples, metrics = check_run(tmp_path / "x" / "y", "heart")
    assert samples.shape == (30, 2) and metrics["K"] < metrics["exact log likelihood"]


def test_heartbeat_run(tmp_path):
    run("--dataset", "heartbeat", "--output_dir", tmp_path / "run")
    samples, metrics = check_run(tmp_path / "run", "heartbeat")
    assert samples.shape == (30, 20) and set(np.unique(samples)) <= {0.0, 1.0}
    assert metrics["exact log likelihood"] == pytest.approx(math.log2(1 / 5)) and metrics["K"] < -2.33
    assert metrics["L_null"] == pytest.approx(-14.438, abs=1e-3)
    beats = {tuple(beat) for beat in dpm.BEATS.numpy()}
    share = np.mean([tuple(sample) in beats for sample in samples])
    assert metrics["exact"] == pytest.approx(share)
    (phases,) = [value for value in metrics.values() if isinstance(value, list)]
    assert len(phases) == 5 and sum(phases) == pytest.approx(share)


def test_mnist_run_and_its_checkpoint(data_dir, tmp_path, monkeypatch):
    digits, out = ["--data_dir", data_dir], tmp_path / "run"
    run("--dataset", "mnist", *digits, "--output_dir", out)
    samples, metrics = check_run(out, "mnist")
    assert samples.shape == (30, 28, 28) and samples.dtype == np.uint8
    bits = math.log2(dpm.SCALING["mnist"][1]) - metrics["K"] / 784
    assert metrics["bits per dimension"] == pytest.approx(bits)
    again = tmp_path / "again"
    monkeypatch.setattr(dpm, "evaluate", lambda *parts: {})
    dpm.main(["--checkpoint", *map(str, [out / "model.pt", *digits, "--output_dir", again])])
    assert np.array_equal(np.load(again / "samples.npy"), samples)


def test_same_seed_same_bits(roll_run, tmp_path, no_evaluation):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        run("--seed", seed, "--output_dir", tmp_path / name)
    a, b, c = ((tmp_path / name / "samples.npy").read_bytes() for name in "abc")
    assert a == b and a != c
    assert a != (roll_run[0] / "samples.npy").read_bytes()


def test_checkpoint_needs_no_other_flag(roll_run, tmp_path, monkeypatch, no_evaluation):
    out, _ = roll_run
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    monkeypatch.chdir(tmp_path)
    dpm.main(["--eval_path", str(out / "model.pt")])
    folder = tmp_path / "outputs" / "dpm_2015_swiss_roll_samples"
    names = ["process.gif", "sample.json", "samples.npy", "samples.png", "stills.png"]
    assert sorted(os.listdir(folder)) == names
    assert (folder / "samples.npy").read_bytes() == before["samples.npy"]
    dpm.main(["--checkpoint", str(out / "model.pt"), "--eval_batch_size", "1", "--output_dir", "one"])
    assert np.load(tmp_path / "one" / "samples.npy").shape == (1, 2)
    dpm.main(["--checkpoint", str(out / "model.pt"), "--seed", "9", "--output_dir", "other"])
    assert (tmp_path / "other" / "samples.npy").read_bytes() != before["samples.npy"]
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_checkpoint_never_overwrites_a_training_run(roll_run, capsys):
    out, _ = roll_run
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    line = refusal(capsys, ["--checkpoint", out / "model.pt", "--output_dir", out])
    assert "--output_dir" in line and str(out) in line
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


# Training that stops, and goes on


def stop_at(monkeypatch, name, n, error=KeyboardInterrupt):
    """Raises error at call n of a function of the script."""
    calls, function = [], getattr(dpm, name)

    def counted(*parts):
        calls.append(1)
        if len(calls) == n:
            raise error
        return function(*parts)

    monkeypatch.setattr(dpm, name, counted)


def content(path):
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("n", [2, 8, STEPS])
def test_ctrl_c_ends_training_and_goes_on_to_sample(tmp_path, monkeypatch, no_evaluation, n):
    stop_at(monkeypatch, "bound", n)
    run("--output_dir", tmp_path / "run")
    assert check_run(tmp_path / "run", "swiss_roll")[0].shape == (30, 2)
    assert len(content(tmp_path / "run" / "model.pt")["Ks"]) == n - 1


def test_ctrl_c_before_the_first_step(tmp_path, monkeypatch):
    stop_at(monkeypatch, "bound", 1)
    with pytest.raises(SystemExit) as stop:
        run("--output_dir", tmp_path / "run")
    assert stop.value.code == 130 and not (tmp_path / "run").exists()


# draw_data is called once for the pictures, then once in each step, first of all
@pytest.mark.parametrize(("name", "n"), [("draw_data", 2 + 7), ("bound", 8)])
def test_resumed_training_goes_on_to_the_last_step(tmp_path, monkeypatch, no_evaluation, name, n):
    run("--output_dir", tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_at(patch, name, n)
        run("--output_dir", tmp_path / "part")
    part = content(tmp_path / "part" / "model.pt")
    assert len(part["Ks"]) == 7
    options = ["--resume", tmp_path / "part" / "model.pt", "--output_dir", tmp_path / "rest"]
    dpm.main(list(map(str, options)))
    check_run(tmp_path / "rest", "swiss_roll")
    whole, rest = (content(tmp_path / folder / "model.pt") for folder in ("whole", "rest"))
    assert len(rest["Ks"]) == STEPS and torch.equal(rest["Ks"][:7], part["Ks"])
    if name == "bound":  # stopped within a step, whose random numbers are lost
        return
    assert torch.equal(rest["Ks"], whole["Ks"])
    assert all(torch.equal(rest["model"][key], value) for key, value in whole["model"].items())
    a, b = ((tmp_path / folder / "samples.npy").read_bytes() for folder in ("whole", "rest"))
    assert a == b


def test_training_that_was_killed_can_be_resumed(tmp_path, monkeypatch, no_evaluation):
    run("--output_dir", tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_at(patch, "bound", 10, MemoryError)
        with pytest.raises(MemoryError):
            run("--output_dir", tmp_path / "run")
    assert 0 < len(content(tmp_path / "run" / "model.pt")["Ks"]) < 10  # as at the last pause
    run("--resume", tmp_path / "run" / "model.pt", "--output_dir", tmp_path / "run")
    whole, rest = (content(tmp_path / folder / "model.pt") for folder in ("whole", "run"))
    assert torch.equal(rest["Ks"], whole["Ks"])


def test_resumed_training_stopped_at_once(tmp_path, monkeypatch, no_evaluation):
    path = tmp_path / "run" / "model.pt"
    for name, n in (("bound", 6), ("draw_data", 2)):
        with monkeypatch.context() as patch:
            stop_at(patch, name, n)
            run("--output_dir", tmp_path / "run", *(["--resume", path] if path.exists() else []))
        assert len(content(path)["Ks"]) == 5
    run("--output_dir", tmp_path / "run", "--resume", path)
    assert len(content(path)["Ks"]) == STEPS


@pytest.mark.parametrize("steps", [STEPS, 3])
def test_resume_with_no_step_left(roll_run, tmp_path, capsys, no_evaluation, steps):
    """It is refused, or goes on to sample; it does not end in a traceback."""
    path, out = roll_run[0] / "model.pt", tmp_path / "out"
    options = ["--resume", path, "--num_training_steps", steps, "--output_dir", out]
    try:
        dpm.main(list(map(str, options)))
    except SystemExit as stop:
        line = capsys.readouterr().err
        assert stop.code == 2 and "dpm_2015.py: error: --" in line and not out.exists()
    else:
        assert np.load(out / "samples.npy").shape == (30, 2)


@pytest.mark.parametrize("step", [1, 8])
def test_bound_that_is_not_finite(roll_run, capsys, monkeypatch, tmp_path, step):
    out, calls, bound = tmp_path / "run", [], dpm.bound
    out.mkdir()
    earlier = (roll_run[0] / "model.pt").read_bytes()
    (out / "model.pt").write_bytes(earlier)

    def spoiled(*parts):
        calls.append(1)
        K, t = bound(*parts)
        return K * (math.nan if len(calls) == step else 1), t

    monkeypatch.setattr(dpm, "bound", spoiled)
    line = refusal(capsys, [*TINY, "--output_dir", out])
    assert "--learning_rate" in line and re.search(rf"step {step}\b", line)
    assert os.listdir(out) == ["model.pt"]
    assert all(value.isfinite().all() for value in content(out / "model.pt")["model"].values())
    assert ((out / "model.pt").read_bytes() == earlier) == (step == 1)


def test_learning_rate_that_is_far_too_high(roll_run, capsys, tmp_path):
    out = tmp_path / "run"
    line = refusal(capsys, [*TINY, "--learning_rate", "1e7", "--output_dir", out])
    assert "--learning_rate 10000000" in line
    if out.exists():  # no file holds a network that is of no use
        assert all(value.isfinite().all() for value in content(out / "model.pt")["model"].values())


# Bad input


@pytest.mark.parametrize("name", [name for name in dpm.OPTIONS if name != "seed"])
@pytest.mark.parametrize("value", ["0", "-3", "many"])
def test_numbers_that_make_no_sense(capsys, name, value):
    line = refusal(capsys, [f"--{name}", value])
    assert f"--{name}" in line and value in line


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--dataset", "spiral"),
        ("--num_timesteps", "4"),
        ("--num_timesteps", "10000001"),
        ("--hidden_size", "2.5"),
        ("--learning_rate", "nan"),
        ("--learning_rate", "inf"),
        ("--seed", "-1"),
        ("--seed", str(2**63)),
        ("--device", "abacus"),
        ("--device", "meta"),
        ("--colour", "red"),
    ],
)
def test_values_that_make_no_sense(capsys, flag, value):
    line = refusal(capsys, [flag, value])
    assert flag in line and value in line


def test_missing_device(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    line = refusal(capsys, ["--device", "cuda"])
    assert "--device cuda" in line and "cpu" in line
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert dpm.parse_options([])[0].device == "cpu"


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("flag", ["--checkpoint", "--resume"])
@pytest.mark.parametrize(
    "kind", ["absent", "folder", "empty", "truncated", "text", "other script", "malicious"]
)
def test_bad_checkpoints(roll_run, tmp_path, capsys, flag, kind):
    path, whole = tmp_path / "bad.pt", (roll_run[0] / "model.pt").read_bytes()
    if kind == "folder":
        path.mkdir()
    elif kind == "other script":
        torch.save({"model": {}, "main.py": {"dataset": "heart"}, "stats": {}}, path)
    elif kind == "malicious":
        torch.save({"dpm_2015.py": Evil(str(tmp_path / "pwned")), "model": {}, "optimizer": {}}, path)
    elif kind != "absent":
        path.write_bytes({"empty": b"", "truncated": whole[: len(whole) // 2], "text": b"hello"}[kind])
    line = refusal(capsys, [flag, path, "--output_dir", tmp_path / "out"])
    assert flag in line and str(path) in line
    assert not (tmp_path / "pwned").exists() and not (tmp_path / "out").exists()


def test_checkpoint_beside_a_flag_that_differs(roll_run, capsys):
    path = roll_run[0] / "model.pt"
    for flag, value, there in (
        ("--hidden_size", "99", "16"),
        ("--num_timesteps", "41", "5"),
        ("--dataset", "mnist", "swiss_roll"),
    ):
        line = refusal(capsys, ["--checkpoint", path, flag, value])
        assert f"{flag} {value}" in line and there in line


def test_output_folder_that_cannot_be_written(capsys, tmp_path):
    (tmp_path / "file").write_text("mine")
    line = refusal(capsys, [*TINY, "--output_dir", tmp_path / "file" / "out"])
    assert "--output_dir" in line and str(tmp_path / "file") in line
    assert (tmp_path / "file").read_text() == "mine"


def test_mnist_without_network(capsys, tmp_path, monkeypatch):
    from torchvision.datasets import MNIST

    monkeypatch.setattr(MNIST, "mirrors", ["http://127.0.0.1:9/"])
    options = [*TINY, "--dataset", "mnist", "--data_dir", tmp_path / "data", "--output_dir", tmp_path / "out"]
    line = refusal(capsys, options)
    assert "--data_dir" in line and str(tmp_path / "data/MNIST/raw") in line
    assert not (tmp_path / "out").exists()


def test_damaged_mnist(capsys, tmp_path, data_dir):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for path in (data_dir / "MNIST" / "raw").iterdir():
        (raw / path.name).write_bytes(path.read_bytes()[:1000])
    assert "--data_dir" in refusal(capsys, [*TINY, "--dataset", "mnist", "--data_dir", tmp_path])


# The file itself


def test_help_names_every_default(capsys):
    with pytest.raises(SystemExit) as stop:
        dpm.main(["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    for name, (*values, _) in dpm.OPTIONS.items():
        assert f"--{name}" in printed and all(str(value) in printed for value in values)


@pytest.mark.parametrize("dataset", DATASETS)
def test_defaults_belong_to_the_dataset(dataset):
    args, checkpoint = dpm.parse_options(["--dataset", dataset])
    assert checkpoint is None and args.dataset == dataset and args.output_dir.endswith(dataset)
    column = {"heartbeat": 1, "mnist": 2}.get(dataset, 0)
    for name, values in dpm.OPTIONS.items():
        assert getattr(args, name) == values[column]
    assert dpm.parse_options([])[0].dataset == "swiss_roll"


def test_as_a_notebook(tmp_path, monkeypatch):
    """Cell by cell, where Jupyter's own arguments stand in sys.argv."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "ipykernel", types.ModuleType("ipykernel"))
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel.json"])
    cells = re.split(r"(?m)^# %% ", (ROOT / "dpm_2015.py").read_text())
    assert len(cells) > 8
    scope, tiny = {"__name__": "__main__"}, dict(zip(TINY[::2], TINY[1::2]))
    for cell in cells:
        exec("# " + cell if cell is not cells[0] else cell, scope)  # noqa: S102
        for flag, value in tiny.items() if "OPTIONS" in scope else ():
            scope["OPTIONS"][flag[2:]] = (int(value), *scope["OPTIONS"][flag[2:]][1:])
    assert np.load(tmp_path / "outputs" / "dpm_2015_swiss_roll" / "samples.npy").shape == (30, 2)


def test_no_line_is_too_long():
    assert max(map(len, (ROOT / "dpm_2015.py").read_text().splitlines())) <= 110
