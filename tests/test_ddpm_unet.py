"""Tests of ddpm_unet.py: formulas against closed forms and oracles; the network; whole runs; bad input."""

import ast
import gzip
import importlib.util
import json
import math
import os
import re
import signal
import subprocess
import sys
import types
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
import pytest
import torch
from PIL import Image

import ddpm_unet as ddpm

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "ddpm_unet.py"
TINY = "--image_size 8 --base_channels 4 --channel_mults 1 2 --num_res_blocks 1 --attention_resolutions 4"
TINY += " --num_timesteps 20 --train_batch_size 4 --num_training_steps 3 --num_samples 4 --sampling_steps 3"
TINY = [*TINY.split(), "--learning_rate", "0.5", "--precision", "fp32", "--device", "cpu"]
FILES = ["data.png", "loss.png", "model.pt", "noisy.png", "process.gif", "run.json", "samples.npy"]
FILES.append("samples.png")
SAMPLERS = ["ddim", "beta", "beta_tilde"]
NUMBERS = [name for name, (default, *_) in ddpm.OPTIONS.items() if not isinstance(default, str)]
MODEL = list(ddpm.OPTIONS)[:8]  # these make the network, and a checkpoint keeps them
LN2 = math.log(2)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """A folder with 800 training digits and 200 test digits of MNIST, as torchvision expects them."""
    raw = tmp_path_factory.mktemp("data") / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for path in (ROOT / "tests" / "mnist").glob("*.gz"):
        (raw / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
    return raw.parent.parent


def write_images(folder, n, channels, size=8):
    """n pictures of noise, 000.png and on."""
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (n, size, size, channels), dtype=np.uint8)
    for k, image in enumerate(pixels.squeeze(3) if channels == 1 else pixels):
        imageio.imwrite(folder / f"{k:03}.png", image)
    return pixels


@pytest.fixture(scope="session")
def grey(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images") / "grey"
    write_images(folder, 12, 1)
    return folder


@pytest.fixture(scope="session")
def colour(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images") / "colour"
    write_images(folder, 12, 3)
    return folder


@pytest.fixture(scope="session")
def grey_run(grey, tmp_path_factory):
    """The folder of a tiny run."""
    out = tmp_path_factory.mktemp("runs") / "grey"
    run("--dataset", grey, "--output_dir", out)
    return out


def run(*options):
    ddpm.main([*TINY, *map(str, options)])


def plain(*options):
    """A run with no other options than these."""
    ddpm.main(["--device", "cpu", *map(str, options)])


DIGITS = [*TINY, "--image_size", "28"]


def arguments(*options):
    return ddpm.parse_options([*TINY, "--dataset", "folder", *map(str, options)])[0]


def refusal(capsys, options):
    """The one line with which ddpm_unet.py refuses these options."""
    with pytest.raises(SystemExit) as stop:
        ddpm.main([str(option) for option in options])
    assert stop.value.code == 2
    lines = re.split(r"[\r\n]+", capsys.readouterr().err.strip())  # with those of a progress bar
    assert not any("Traceback" in line for line in lines)
    (line,) = [line for line in lines if line.startswith("ddpm_unet.py: error: ")]
    return line


def content(path):
    return torch.load(path, weights_only=True)


def contents_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_equal(first, second):
    """Nested dicts and lists of tensors and numbers, the same bit for bit."""
    assert type(first) is type(second)
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second)
    elif isinstance(first, dict):
        assert list(first) == list(second)
        for key in first:
            assert_equal(first[key], second[key])
    elif isinstance(first, list):
        assert len(first) == len(second)
        for one, other in zip(first, second):
            assert_equal(one, other)
    else:
        assert first == second


def randomise(net, scale=0.2):
    """A network like one in training: no layer is 0."""
    torch.manual_seed(1)
    for values in net.parameters():
        values.data += scale * torch.randn_like(values)
    return net


def network(C=1, *options):
    return randomise(ddpm.UNet(arguments(*options), C)).eval().requires_grad_(False)


def alpha_bars(T):
    """alpha_bar (T,) in float64, by the paper's betas, stretched to T steps."""
    betas = [min(1000 / T * (1e-4 + (0.02 - 1e-4) * t / (T - 1)), 0.999) for t in range(T)]
    return torch.tensor(np.cumprod([1 - beta for beta in betas]))


def pairs(schedule, T):
    """alpha_bar at each step of a chain and at the step before, as floats."""
    now = alpha_bars(T)[schedule.timesteps].tolist()
    return list(zip(now, [1.0, *now[:-1]]))


def coefficients(now, before, sampler):
    """a, b and variance of x_{t-1} ~ N(a x_0_hat + b x_t, variance), from two values of alpha_bar."""
    beta = 1 - now / before
    if sampler == "ddim":
        b = math.sqrt((1 - before) / (1 - now))
        return math.sqrt(before) - b * math.sqrt(now), b, 0.0
    a, b = math.sqrt(before) * beta / (1 - now), math.sqrt(1 - beta) * (1 - before) / (1 - now)  # eq. 7
    return a, b, beta if sampler == "beta" else (1 - before) / (1 - now) * beta


def gaussian(T, s):
    """The exact eps for data N(0, s^2)."""
    now = alpha_bars(T)
    slope = ((1 - now).sqrt() / (now * s**2 + 1 - now)).float()
    return lambda x_t, t: slope[t, None] * x_t


def oracle(T, points, weights=None):
    """The exact eps for data that are these points (N, D): a softmax over them."""
    now = alpha_bars(T).float()
    weights = torch.ones(len(points)) if weights is None else weights

    def model(x_t, t):
        signal, noise = now[t, None].sqrt(), (1 - now[t, None]).sqrt()
        distances = (x_t[:, None] - signal[:, None] * points).square().sum(dim=2)
        x_0_hat = (weights.log() - distances / (2 * noise**2)).softmax(dim=1) @ points
        return (x_t - signal * x_0_hat) / noise

    return model


# Network


@pytest.mark.parametrize("C", [1, 3])
@pytest.mark.parametrize("S", [28, 32])
@pytest.mark.parametrize(("B", "ch"), [(1, 4), (3, 5), (2, 2)])
def test_network_shapes(C, S, B, ch):
    options = ["--image_size", S, "--base_channels", ch, "--channel_mults", 1, 2, 2]
    net = network(C, *options, "--attention_resolutions", 7, 8)
    x, t = torch.randn(B, C * S * S), torch.arange(B)
    out = net(x, t)
    assert out.shape == x.shape and out.dtype == torch.float32 and out.isfinite().all()
    assert out.std() > 0
    if B > 1:  # an image has nothing to do with the others in its batch
        torch.testing.assert_close(net(x[1:2], t[1:2]), out[1:2], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("mults", "n", "attention"),
    [([1], 1, [8]), ([1, 2, 3, 1], 1, [1]), ([2, 1], 3, [8, 4]), ([3, 1, 2], 2, [5]), ([1, 1, 1], 1, [8, 2])],
)
def test_every_activation_of_the_way_down_is_used_on_the_way_up(mults, n, attention):
    options = ["--channel_mults", *mults, "--num_res_blocks", n, "--attention_resolutions", *attention]
    net = network(2, *options)
    down, up = [], []
    for layer in net.downs:
        layer.register_forward_hook(lambda layer, given, out: down.append(out))
    blocks = [layer for layer in net.ups if isinstance(layer, ddpm.ResBlock)]
    for layer in blocks:
        layer.register_forward_pre_hook(lambda layer, given: up.append(given[0]))
    assert net(torch.randn(3, 2 * 64), torch.arange(3)).shape == (3, 2 * 64)
    assert len(down) == len(up) == len(blocks) == len(mults) * (n + 1)
    for h, skip in zip(up, reversed(down)):
        assert torch.equal(h[:, -skip.shape[1] :], skip) and h.shape[1] > skip.shape[1]
    assert [h.shape[2] for h in down if h.shape[2] == 8 >> (len(mults) - 1)]
    with_attention = [layer for layer in net.downs if getattr(layer, "qkv", None) is not None]
    assert len(with_attention) == n * sum(8 >> k in attention for k in range(len(mults)))
    assert net.middle[0].qkv is not None and net.middle[1].qkv is None


def test_untrained_network_says_nothing():
    net = ddpm.UNet(arguments("--dropout", 0.3), 3)
    out = net(torch.randn(5, 3 * 64), torch.arange(5))
    assert torch.equal(out, torch.zeros(5, 3 * 64))
    out.square().sum().backward()  # it can learn all the same
    loss = (torch.randn(5, 3 * 64) - net(torch.randn(5, 3 * 64), torch.arange(5))).square().mean()
    loss.backward()
    assert net.last[2].weight.grad.abs().sum() > 0


def test_network_depends_on_x_and_t():
    net = network()
    x = torch.randn(1, 64)
    outs = [net(x, torch.tensor([t])) for t in range(20)]
    assert len({out.numpy().tobytes() for out in outs}) == 20
    assert not torch.equal(net(x + 0.1, torch.tensor([0])), outs[0])


def test_parameters_have_names_not_places():
    net, other = network(), ddpm.UNet(arguments(), 1).eval()
    x, t = torch.randn(3, 64), torch.arange(3)
    other.load_state_dict(dict(reversed(list(net.state_dict().items()))))
    assert torch.equal(net(x, t), other(x, t))


@pytest.mark.parametrize(("ch", "T"), [(8, 1000), (5, 20), (2, 50)])
def test_time_embedding(ch, T):
    net, seen = network(1, "--base_channels", ch, "--num_timesteps", T), []
    net.temb.register_forward_pre_hook(lambda layer, given: seen.append(given[0]))
    net(torch.zeros(3, 64), torch.tensor([0, 7, 19]))
    half = (ch + 1) // 2
    for row, t in zip(seen[0].tolist(), (0, 7, 19)):
        angles = [1000 / T * t / 10_000 ** (k / max(1, half - 1)) for k in range(half)]
        expected = [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
        assert row == pytest.approx(expected[:ch], abs=1e-3)


def test_paper_sized_network():
    """Appendix B: 35.7 million parameters for CIFAR10, 32 groups in each normalisation."""
    options = "--image_size 32 --base_channels 128 --channel_mults 1 2 2 2 --num_res_blocks 2"
    args = arguments(*options.split(), "--attention_resolutions", 16, "--dropout", 0.1)
    with torch.device("meta"):
        net = ddpm.UNet(args, 3)
    assert sum(values.numel() for values in net.parameters()) == pytest.approx(35.7e6, rel=0.005)
    groups = {layer.num_groups for layer in net.modules() if isinstance(layer, torch.nn.GroupNorm)}
    assert groups == {32}


@pytest.mark.parametrize("C", [1, 2, 3, 4, 6, 12, 32, 64, 96, 128, 384])
def test_groups_divide_the_channels(C):
    layer = ddpm.norm(C)
    assert C % layer.num_groups == 0 and (C < 128 or layer.num_groups == 32)
    x = 3 + 2 * torch.randn(5, C, 4, 4)
    groups = layer(x).reshape(5, layer.num_groups, -1)
    torch.testing.assert_close(groups.mean(dim=2), torch.zeros(5, layer.num_groups), rtol=0, atol=1e-5)


def test_residual_block_and_attention_by_hand():
    args, (B, C_in, C, S) = arguments(), (2, 4, 8, 3)
    block = randomise(ddpm.ResBlock(args, C_in, C, True)).eval().requires_grad_(False)
    bare = ddpm.ResBlock(args, C_in, C, False).eval().requires_grad_(False)
    bare.load_state_dict(block.state_dict(), strict=False)
    h, temb = torch.randn(B, C_in, S, S), torch.randn(B, 16)
    silu, functional, weights = (lambda x: x / (1 + (-x).exp())), torch.nn.functional, block.state_dict()

    def layer(name, x, size):
        return functional.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], padding=size // 2)

    def normal(name, x):
        grouped = x.reshape(B, -1, 4, *x.shape[2:])  # 4 channels in a group
        mean = grouped.mean(dim=(2, 3, 4), keepdim=True)
        std = (grouped.var(dim=(2, 3, 4), keepdim=True, correction=0) + 1e-5).sqrt()
        x = ((grouped - mean) / std).reshape(x.shape)
        return x * weights[f"{name}.weight"][:, None, None] + weights[f"{name}.bias"][:, None, None]

    inner = layer("first.2", silu(normal("first.0", h)), 3)
    shift = silu(temb) @ weights["temb.1.weight"].T + weights["temb.1.bias"]
    inner = layer("last.3", silu(normal("last.0", inner + shift[:, :, None, None])), 3)
    expected = layer("shortcut", h, 1) + inner
    torch.testing.assert_close(bare(h, temb), expected, rtol=1e-4, atol=1e-4)
    qkv = layer("qkv.1", normal("qkv.0", expected), 1).reshape(B, 3, C, S * S)
    seen = torch.zeros(B, C, S * S)
    for image in range(B):
        q, k, v = qkv[image]
        for i in range(S * S):
            scores = torch.stack([q[:, i] @ k[:, j] for j in range(S * S)]) / math.sqrt(C)
            seen[image, :, i] = v @ (scores.exp() / scores.exp().sum())
    expected = expected + layer("out", seen.reshape(B, C, S, S), 1)
    torch.testing.assert_close(block(h, temb), expected, rtol=1e-4, atol=1e-4)


def test_bf16_is_close_to_fp32():
    net = network(1, "--precision", "bf16")
    x, t = torch.randn(5, 64), torch.arange(5)
    low = net(x, t)
    net.bf16 = False
    high = net(x, t)
    assert low.dtype == high.dtype == torch.float32
    assert 0 < (low - high).abs().max() < 0.05 * high.abs().max()


# Noise schedule


@pytest.mark.parametrize("T", [20, 21, 50, 200, 1000, 4000])
def test_schedule(T):
    schedule, now = ddpm.make_schedule(T), alpha_bars(T)
    before = torch.cat((torch.ones(1), now[:-1]))
    expected = {
        "betas": 1 - now / before,
        "signal": now.sqrt(),
        "noise_std": (1 - now).sqrt(),
        "signal_prev": before.sqrt(),
        "noise_variance_prev": 1 - before,
        "posterior_variance": (1 - before) / (1 - now) * (1 - now / before),
    }
    assert torch.equal(schedule.timesteps, torch.arange(T))
    assert set(vars(schedule)) == {"timesteps", *expected}
    for name, values in expected.items():
        torch.testing.assert_close(getattr(schedule, name).double(), values, rtol=1e-5, atol=1e-9)
    assert 0 < now[-1] < 1e-3 and 0 < schedule.signal[-1] ** 2 < 1e-3
    assert schedule.posterior_variance[0] == 0
    assert ((schedule.betas > 0) & (schedule.betas < 1)).all()


def test_schedule_is_the_papers_at_1000_steps():
    betas = np.linspace(1e-4, 0.02, 1000)
    schedule = ddpm.make_schedule(1000)
    np.testing.assert_allclose(schedule.betas, betas, rtol=1e-5)
    np.testing.assert_allclose(schedule.signal, np.sqrt(np.cumprod(1 - betas)), rtol=1e-5)


@pytest.mark.parametrize("T", [20, 21, 1000])
@pytest.mark.parametrize("steps", [2, 3, 7, 19, 20, 50, 999, 1000, 5000])
def test_shortened_chain(T, steps):
    chain, full = ddpm.make_schedule(T, steps=steps), ddpm.make_schedule(T)
    n, at = min(T, steps), chain.timesteps
    assert all(len(values) == n for values in vars(chain).values())
    assert at[0] == 0 and at[-1] == T - 1 and (at.diff() > 0).all()
    assert at.diff().max() - at.diff().min() <= 1  # evenly spread
    assert torch.equal(chain.signal, full.signal[at]) and torch.equal(chain.noise_std, full.noise_std[at])
    assert torch.equal(chain.signal_prev[1:], chain.signal[:-1]) and chain.signal_prev[0] == 1
    torch.testing.assert_close(
        chain.signal, chain.signal_prev * (1 - chain.betas).sqrt(), rtol=1e-4, atol=1e-4
    )
    if n == T:
        for name, values in vars(full).items():
            assert torch.equal(getattr(chain, name), values)


def test_chain_of_one_step():
    chain = ddpm.make_schedule(20, steps=1)
    assert chain.timesteps.tolist() == [19] and chain.posterior_variance.tolist() == [0.0]
    *_, (_, x, _) = ddpm.p_sample_loop(gaussian(20, 0.5), chain, (3, 2), 0, "beta_tilde")
    assert x.isfinite().all() and x.abs().max() <= 1


# Forward process


@pytest.mark.parametrize("T", [20, 200])
def test_q_sample_is_t_single_steps(T):
    schedule, t = ddpm.make_schedule(T), torch.arange(T)
    mean, variance = 1.0, 0.0
    one, zero = torch.ones(T, 1), torch.zeros(T, 1)
    means = ddpm.q_sample(schedule, one, t, zero)[:, 0]
    variances = ddpm.q_sample(schedule, zero, t, one)[:, 0] ** 2
    for step, beta in enumerate(schedule.betas.double().tolist()):  # eq. 2, from x_0 = 1
        mean, variance = math.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
        assert means[step].item() == pytest.approx(mean, rel=1e-3, abs=1e-6)
        assert variances[step].item() == pytest.approx(variance, rel=1e-4)


@pytest.mark.parametrize(("T", "steps"), [(20, None), (50, None), (1000, None), (1000, 50), (50, 7)])
def test_q_posterior_is_bayes_rule(T, steps):
    """q(x_{t-1} | x_0) q(x_t | x_{t-1}) as a function of x_{t-1}: a product of two Gaussians."""
    schedule = ddpm.make_schedule(T, steps=steps)
    x_0, x_t = torch.tensor([[0.7, -1.0]]), torch.tensor([[-0.4, 1.3]])
    for step, (now, before) in list(enumerate(pairs(schedule, T)))[1:]:
        found_mean, found = ddpm.q_posterior(schedule, x_0, x_t, torch.tensor([step]))
        alpha = now / before
        precisions = 1 / (1 - before), alpha / (1 - alpha)
        centres = math.sqrt(before) * x_0, x_t / math.sqrt(alpha)
        mean = (precisions[0] * centres[0] + precisions[1] * centres[1]) / sum(precisions)
        torch.testing.assert_close(found_mean, mean, rtol=1e-3, atol=2e-4)
        assert found.shape == (1, 1) and found.item() == pytest.approx(1 / sum(precisions), rel=1e-3)
        a, b, variance = coefficients(now, before, "beta_tilde")  # eq. 7
        torch.testing.assert_close(found_mean, a * x_0 + b * x_t, rtol=1e-3, atol=2e-4)
        assert found.item() == pytest.approx(variance, rel=1e-3)
    mean, variance = ddpm.q_posterior(schedule, x_0, x_t, torch.tensor([0]))
    assert torch.equal(mean, x_0) and variance.item() == 0


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("T", "steps"), [(50, None), (1000, 50)])
def test_q_posterior_keeps_the_marginals(T, steps, eta):
    """x_t of q(x_t | x_0), then this kernel, is q(x_{t-1} | x_0), whatever eta."""
    schedule = ddpm.make_schedule(T, steps=steps)
    one, zero = torch.ones(1, 1), torch.zeros(1, 1)
    for step, (now, before) in enumerate(pairs(schedule, T)):
        t = torch.tensor([step])
        a, variance = (part.item() for part in ddpm.q_posterior(schedule, one, zero, t, eta))
        b = ddpm.q_posterior(schedule, zero, one, t, eta)[0].item()
        assert a + b * math.sqrt(now) == pytest.approx(math.sqrt(before), abs=1e-5)
        assert b**2 * (1 - now) + variance == pytest.approx(1 - before, rel=1e-4, abs=1e-7)
        assert variance == pytest.approx(eta**2 * coefficients(now, before, "beta_tilde")[2], rel=1e-4)


# Loss


def test_loss_is_the_mean_squared_error():
    schedule, t = ddpm.make_schedule(50), torch.tensor([0, 9, 49])
    x_0, eps, guess = torch.randn(3, 3, 5)
    seen = []
    loss = ddpm.loss_simple(lambda x_t, t: seen.append((x_t, t)) or guess, schedule, x_0, t, eps)
    assert loss.shape == (3,)
    for row, step in enumerate(t.tolist()):
        now, found, squares = alpha_bars(50)[step].item(), seen[0][0][row].tolist(), []
        for place in range(5):
            expected = math.sqrt(now) * x_0[row, place].item() + math.sqrt(1 - now) * eps[row, place].item()
            assert found[place] == pytest.approx(expected, abs=1e-5)
            squares.append((eps[row, place] - guess[row, place]).item() ** 2)
        assert loss[row].item() == pytest.approx(sum(squares) / 5, rel=1e-5)
    assert torch.equal(seen[0][1], t)
    assert torch.equal(ddpm.loss_simple(lambda x_t, t: eps, schedule, x_0, t, eps), torch.zeros(3))


def test_oracle_has_the_least_loss():
    points = torch.tensor([[-0.9, 0.5], [0.3, -0.2], [0.8, 0.9]])
    schedule, best = ddpm.make_schedule(50), oracle(50, points)
    torch.manual_seed(0)
    t, eps = torch.randint(50, (9000,)), torch.randn(9000, 2)

    def loss(model):
        return ddpm.loss_simple(model, schedule, points.repeat(3000, 1), t, eps).mean().item()

    others = [loss(lambda x_t, t, factor=factor: factor * best(x_t, t)) for factor in (0.0, 0.9, 1.1)]
    assert 0 < loss(best) < min(others)


# Sampling


POINTS = torch.tensor([[-1.0, -0.5, 0.3], [-0.5, 1.0, -0.2], [0.8, 0.9, 0.0], [0.6, -0.4, -1.0]])
SHARES = torch.tensor([0.1, 0.2, 0.3, 0.4])


@pytest.mark.parametrize(
    ("sampler", "T", "steps", "tolerance"),
    [("beta_tilde", 200, None, 0.0), ("ddim", 1000, 50, 0.02), ("ddim", 20, 50, 0.05)],
)
def test_exact_network_reproduces_the_data(sampler, T, steps, tolerance):
    chain, n = ddpm.make_schedule(T, steps=steps), 3000
    *_, (step, x, _) = ddpm.p_sample_loop(oracle(T, POINTS, SHARES), chain, (n, 3), 0, sampler)
    distance, which = torch.cdist(x, POINTS).min(dim=1)
    assert step == 0 and (distance < 0.05).float().mean() > 0.98
    error = 5 * (SHARES * (1 - SHARES) / n).sqrt() + tolerance
    assert ((which.bincount(minlength=4) / n - SHARES).abs() < error).all()


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(("T", "steps"), [(100, None), (200, 25)])
def test_chain_of_a_gaussian_follows_its_recursion(sampler, T, steps):
    """For x_0 ~ N(0, s^2) the exact x_0_hat is linear in x_t, so the variance of each x_t is known."""
    s, shape, variance = 0.25, (4000, 20), 1.0
    chain = ddpm.make_schedule(T, steps=steps)
    items = ddpm.p_sample_loop(gaussian(T, s), chain, shape, 0, sampler)
    noise, first, known = 6 * math.sqrt(2 / 80_000), None, list(reversed(pairs(chain, T)))
    for (step, x, x_0_hat), (now, before) in zip(items, [*known, (1.0, 1.0)]):
        assert x.var().item() == pytest.approx(variance, rel=noise)
        assert abs(x.mean().item()) < 6 * math.sqrt(variance / 80_000)
        if sampler == "ddim":  # no noise: each x_t is x_T times a number
            first = x if first is None else first
            assert ((x - first * math.sqrt(variance)).abs() < 0.01).float().mean() > 0.999  # but for clipping
        if step == 0:
            break
        guess = s**2 * math.sqrt(now) / (now * s**2 + 1 - now)
        torch.testing.assert_close(x_0_hat, (guess * x).clamp(-1, 1), rtol=1e-3, atol=1e-3)
        a, b, added = coefficients(now, before, sampler)
        variance = (a * guess + b) ** 2 * variance + added * (step > 1)
    assert step == 0 and math.sqrt(variance) == pytest.approx(s, rel=0.15 if steps is None else 0.3)


def test_ddim_with_eta_1_is_the_ancestral_sampler():
    """DDIM's eq. 12 with eq. 16 for sigma, where eps belongs to the clipped x_0_hat."""
    schedule, net = ddpm.make_schedule(20), network()
    torch.manual_seed(0)
    x_t, clipped = 2 * torch.randn(6, 64), 0
    for step, (now, before) in list(enumerate(pairs(schedule, 20)))[1:]:
        t = torch.full((6,), step)
        x_0_hat = (x_t - math.sqrt(1 - now) * net(x_t, t)) / math.sqrt(now)
        clipped += (x_0_hat.abs() > 1).sum().item()
        x_0_hat = x_0_hat.clamp(-1, 1)
        eps = (x_t - math.sqrt(now) * x_0_hat) / math.sqrt(1 - now)
        sigma = math.sqrt((1 - before) / (1 - now)) * math.sqrt(1 - now / before)
        expected = math.sqrt(before) * x_0_hat + math.sqrt(1 - before - sigma**2) * eps
        found_x_0, mean, variance = ddpm.p_reverse(net, schedule, x_t, t, "beta_tilde")
        torch.testing.assert_close(found_x_0, x_0_hat, rtol=0, atol=1e-3)
        torch.testing.assert_close(mean, expected, rtol=1e-3, atol=1e-3)
        assert variance[0].item() == pytest.approx(sigma**2, rel=1e-3)
        ddim, none = ddpm.p_reverse(net, schedule, x_t, t, "ddim")[1:]
        expected = math.sqrt(before) * x_0_hat + math.sqrt(1 - before) * eps
        torch.testing.assert_close(ddim, expected, rtol=1e-3, atol=1e-3)
        assert not none.any()
    assert clipped > 0


def some_model(x_t, t):
    return torch.sin(3 * x_t + t[:, None])


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [None, 6])
def test_sample_loop(sampler, steps):
    chain = ddpm.make_schedule(20, steps=steps)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    first, again, other = (
        list(ddpm.p_sample_loop(some_model, chain, (5, 3), seed, sampler)) for seed in (5, 5, 6)
    )
    assert torch.equal(torch.rand(3), expected)  # other random numbers are left alone
    assert [step for step, *_ in first] == list(range(len(chain.betas), -1, -1))
    assert all(torch.equal(a[k], b[k]) for a, b in zip(first, again) for k in (1, 2))
    assert not torch.equal(first[-1][1], other[-1][1])
    assert all(x_0_hat.abs().max() <= 1 for _, _, x_0_hat in first)
    assert any(x_0_hat.abs().max() == 1 for _, _, x_0_hat in first)
    (one, x_1, x_0_hat), (zero, x_0, same) = first[-2:]
    t = torch.zeros(5, dtype=torch.long)
    mean = ddpm.p_reverse(some_model, chain, x_1, t, sampler)[1]
    assert (one, zero) == (1, 0) and torch.equal(x_0, mean) and torch.equal(x_0, same)  # no noise
    assert torch.equal(x_0, x_0_hat)


def test_samplers_start_from_the_same_noise_and_part():
    chain = ddpm.make_schedule(20)
    loops = [list(ddpm.p_sample_loop(some_model, chain, (40, 30), 3, sampler)) for sampler in SAMPLERS]
    assert all(torch.equal(loop[0][1], loops[0][0][1]) for loop in loops)
    assert len({loop[-1][1].numpy().tobytes() for loop in loops}) == 3
    assert loops[0][0][1].std().item() == pytest.approx(1, abs=0.1)


def test_network_is_called_in_parts():
    chain, sizes = ddpm.make_schedule(100, steps=10), []
    torch.manual_seed(0)
    x, t = torch.randn(600, 2), torch.randint(10, (600,))

    def model(x_t, t):
        sizes.append(len(x_t))
        return some_model(x_t, t)

    x_0_hat = ddpm.p_reverse(model, chain, x, t)[0]
    assert sum(sizes) == 600 and max(sizes) <= 250
    now = alpha_bars(100)[chain.timesteps[t]][:, None].float()
    whole = ((x - (1 - now).sqrt() * some_model(x, chain.timesteps[t])) / now.sqrt()).clamp(-1, 1)
    torch.testing.assert_close(x_0_hat, whole, rtol=1e-3, atol=1e-3)


# Likelihood


def within(values, expected):
    """The mean of values (B,) is as expected, but for chance."""
    error = values.std().item() / math.sqrt(len(values))
    assert values.mean().item() == pytest.approx(expected, abs=5 * error + 1e-3 * abs(expected))
    assert error < 0.05 * abs(expected)


@pytest.mark.parametrize("sampler", ["beta_tilde", "beta"])
@pytest.mark.parametrize(("T", "n"), [(50, 49), (50, 7), (20, 300)])
def test_bound_for_gaussian_data(sampler, T, n):
    """E[L_t] is known: x_0 - x_0_hat has the variance of x_0 given x_t, whatever x_t."""
    s, D = 0.25, 8
    torch.manual_seed(0)
    x_0, expected = s * torch.randn(4000, D), 0.0
    bits = ddpm.bound(gaussian(T, s), ddpm.make_schedule(T), x_0, n, sampler)
    assert bits.shape == (4000, 3)
    for now, before in pairs(ddpm.make_schedule(T), T)[1:]:
        a, _, variance = coefficients(now, before, sampler)
        posterior = coefficients(now, before, "beta_tilde")[2]
        error = s**2 * (1 - now) / (now * s**2 + 1 - now)
        ratio = posterior / variance
        expected += 0.5 * (ratio - 1 - math.log(ratio) + a**2 * error / variance)
    within(bits[:, 1], D * expected / LN2)
    last = alpha_bars(T)[-1].item()
    L_T = 0.5 * (last * (x_0.double().square().sum(dim=1) - D) - D * math.log(1 - last)) / LN2
    torch.testing.assert_close(bits[:, 0].double(), L_T, rtol=0.01, atol=1e-5)


def test_bound_takes_each_t_once():
    seen = []

    def model(x_t, t):
        seen.append(t)
        return x_t

    schedule = ddpm.make_schedule(21)
    ddpm.bound(model, schedule, torch.zeros(100, 2), 20)
    taken = torch.stack(seen)  # (21, B)
    assert torch.equal(taken.sort(dim=0)[0], torch.arange(21)[:, None].expand(21, 100))
    seen.clear()
    ddpm.bound(model, schedule, torch.zeros(200, 2), 5)
    taken = torch.stack(seen[:5]).sort(dim=0)[0]
    assert set(taken.diff(dim=0).flatten().tolist()) == {4}  # evenly spread
    assert set(taken.flatten().tolist()) == set(range(1, 21)) and not seen[5].any()


@pytest.mark.parametrize("T", [20, 1000])
@pytest.mark.parametrize("centre", [-1.0, -0.99, -0.3, 0.0, 0.5, 1.0])
def test_decoder_is_a_distribution_over_levels(T, centre):
    """A network whose x_0_hat is always the same number: the mean of x_0 given x_1."""
    now = alpha_bars(T).float()
    model = lambda x_t, t: (x_t - now[t, None].sqrt() * centre) / (1 - now[t, None]).sqrt()
    levels = torch.arange(256)[:, None] / 127.5 - 1
    p = (2 ** -ddpm.bound(model, ddpm.make_schedule(T), levels, 1)[:, 2].double()).tolist()
    assert sum(p) == pytest.approx(1, abs=1e-3)
    first, second = alpha_bars(T)[:2].tolist()
    std = math.sqrt((1 - first) / (1 - second) * (1 - second / first))
    cdf = lambda x: 0.5 * (1 + math.erf((x - centre) / std / math.sqrt(2)))
    edges = [0.0, *(cdf((2 * k - 256) / 255) for k in range(1, 256)), 1.0]
    assert p == pytest.approx(np.diff(edges).tolist(), abs=3e-4)


@pytest.mark.parametrize("T", [50, 400])
def test_bound_is_above_the_entropy(T):
    """8 images of 4 pixels, each as likely: no code needs less than 3 bits on average."""
    levels = torch.tensor([[0, 0, 0, 0], [0, 0, 0, 85], [85, 0, 170, 0], [255, 255, 255, 255]])
    points = torch.cat((levels, levels.flip(0).flip(1) // 2)) / 127.5 - 1
    points[4:] += torch.tensor([0.25, 0.0, 0.0, 0.0])
    points = ((points + 1) * 127.5).round() / 127.5 - 1
    assert len(points.unique(dim=0)) == 8
    torch.manual_seed(0)
    bits = ddpm.bound(oracle(T, points), ddpm.make_schedule(T), points.repeat(100, 1), T - 1).sum(dim=1)
    error = bits.std().item() / math.sqrt(800)
    assert 3 - 4 * error < bits.mean().item() < (15 if T == 50 else 9) and error < 0.3


def test_bound_does_not_know_ddim():
    schedule, x_0 = ddpm.make_schedule(20), torch.linspace(-1, 1, 60).view(20, 3)
    results = []
    for sampler in SAMPLERS:
        torch.manual_seed(0)
        results.append(ddpm.bound(some_model, schedule, x_0, 6, sampler))
    ddim, beta, beta_tilde = results
    assert torch.equal(ddim, beta_tilde)
    assert (beta[:, 1] != ddim[:, 1]).all() and torch.equal(beta[:, ::2], ddim[:, ::2])


def test_metrics_are_per_pixel_of_the_image_as_it_was(data_dir, colour, tmp_path, monkeypatch):
    monkeypatch.setattr(ddpm, "bound", lambda model, schedule, x_0, *rest: x_0.new_tensor([[2.0, 3.0, 5.0]]))
    monkeypatch.setattr(ddpm, "train", lambda *parts: None)
    digits = ["--data_dir", data_dir, "--nll", 1]
    for name, size, options in (
        ("28", 784, ["--image_size", 28, *digits]),
        ("32", 784, ["--image_size", 32, *digits]),
        ("colour", 192, ["--dataset", colour, "--nll", 1]),
    ):
        run(*options, "--output_dir", tmp_path / name)
        metrics = json.loads((tmp_path / name / "run.json").read_text())["metrics"]
        assert metrics["bits per dimension"] == pytest.approx(10 / size)
        parts = [metrics[part] for part in ("L_T", "L_1 to L_{T-1}", "L_0")]
        assert parts == pytest.approx([2 / size, 3 / size, 5 / size])


# Images


def test_tile():
    levels = torch.arange(256) / 127.5 - 1
    assert np.array_equal(ddpm.tile(levels.view(1, 256), 1, 1).ravel(), np.arange(256))
    x = torch.randn(3, 3, 4, 4).clamp(-1, 1)
    picture = ddpm.tile(x.flatten(1), 3, 2)
    assert picture.shape == (8, 8, 3) and picture.dtype == np.uint8
    for k in range(3):
        row, column = 4 * (k // 2), 4 * (k % 2)
        expected = ((x[k].permute(1, 2, 0) + 1) * 127.5).round()
        assert np.array_equal(picture[row : row + 4, column : column + 4], expected)
    assert (picture[4:, 4:] == 255).all()
    assert ddpm.tile(x[:, 0].flatten(1), 1, 5).shape == (4, 20)
    assert ddpm.tile(torch.full((1, 16), 7.0), 1, 1).max() == 255  # not 7 * 128 modulo 256


@pytest.mark.parametrize("channels", [1, 3])
def test_folder_of_images(tmp_path, channels):
    pixels = write_images(tmp_path / "deep" / "er", 23, channels)
    (tmp_path / "notes.txt").write_text("not an image")
    images, test = ddpm.load_images(arguments("--dataset", tmp_path))
    assert images.dtype == test.dtype == torch.uint8
    pixels = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    here = [k for k in range(23) if k % 10]
    assert torch.equal(test, pixels[[0, 10, 20]]) and torch.equal(images, pixels[here])


def test_one_colour_image_makes_all_of_them_colour(tmp_path):
    write_images(tmp_path, 5, 1)
    image = np.full((8, 8, 3), 7, np.uint8)
    image[3, 3] = 9, 7, 7
    imageio.imwrite(tmp_path / "red.png", image)
    images, test = ddpm.load_images(arguments("--dataset", tmp_path))
    assert images.shape == (5, 3, 8, 8) and test.shape == (1, 3, 8, 8)
    assert torch.equal(images[:-1, 0], images[:-1, 2]) and images[-1, :, 3, 3].tolist() == [9, 7, 7]


def test_images_of_other_sizes_are_scaled_and_cropped(tmp_path):
    wide = np.zeros((16, 48), np.uint8)
    wide[:, 12:36] = 200  # the middle half
    for name, image in (("a", wide), ("b", wide.T), ("c", np.full((4, 4), 50, np.uint8))):
        imageio.imwrite(tmp_path / f"{name}.png", image)
    images, test = ddpm.load_images(arguments("--dataset", tmp_path))
    images = torch.cat((test, images))
    assert images.shape == (3, 1, 8, 8)
    assert (images[:2] == 200).all() and (images[2] == 50).all()


def test_digits(data_dir):
    raw = np.frombuffer((data_dir / "MNIST/raw/t10k-images-idx3-ubyte").read_bytes()[16:], np.uint8)
    raw = raw.reshape(-1, 28, 28)
    for S, edge in ((28, 0), (32, 2)):
        images, test = ddpm.load_images(
            arguments("--dataset", "mnist", "--data_dir", data_dir, "--image_size", S)
        )
        assert images.shape == (800, 1, S, S) and test.shape == (200, 1, S, S)
        assert np.array_equal(test[:, 0, edge : S - edge, edge : S - edge], raw)
        assert test.sum().item() == raw.sum()  # zeros all around


@pytest.mark.parametrize("kind", ["empty", "one", "absent", "file", "no images"])
def test_folder_without_images(capsys, tmp_path, kind):
    folder = tmp_path / "images"
    if kind == "file":
        folder.write_text("no folder")
    elif kind != "absent":
        folder.mkdir()
    if kind == "one":
        write_images(folder, 1, 1)
    if kind == "no images":
        (folder / "notes.txt").write_text("not an image")
    line = refusal(capsys, [*TINY, "--dataset", folder, "--output_dir", tmp_path / "out"])
    assert f"--dataset {folder}" in line and "fewer than 2 images" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["text", "truncated", "empty", "folder"])
def test_broken_image_is_named(capsys, tmp_path, kind):
    folder = tmp_path / "images"
    write_images(folder, 4, 3)
    whole, path = (folder / "001.png").read_bytes(), folder / "0015.png"
    if kind == "folder":
        path.mkdir()
    else:
        path.write_bytes({"text": b"hello", "truncated": whole[: len(whole) // 2], "empty": b""}[kind])
    line = refusal(capsys, [*TINY, "--dataset", folder, "--output_dir", tmp_path / "out"])
    assert str(path) in line and not (tmp_path / "out").exists()


# Training


def trained(steps, grey, out, *options):
    """The content of model.pt after so many steps, and the network before the first one."""
    args = arguments("--dataset", grey, "--num_training_steps", steps, "--output_dir", out, *options)
    images, _ = ddpm.load_images(args)
    torch.manual_seed(args.seed)
    net = ddpm.UNet(args, 1)
    ema = ddpm.UNet(args, 1).eval().requires_grad_(False)
    ema.load_state_dict(net.state_dict())
    start = {name: values.clone() for name, values in net.state_dict().items()}
    ddpm.train(net, ema, images, args, None)
    assert not any(parameter.requires_grad for parameter in ema.parameters())  # no graph behind the average
    return content(Path(out) / "model.pt"), start


@pytest.mark.parametrize("decay", [0.15, 0.999])
def test_moving_average_warms_up(grey, tmp_path, decay):
    average = None
    for steps in (1, 2, 3, 4):  # in 4 steps or less the learning rate does not depend on their number
        found, start = trained(steps, grey, tmp_path, "--ema_decay", decay)
        average = average or start
        keep = min(decay, steps / (9 + steps))  # of (1 + n) / (10 + n), where n counts from 0
        average = {name: keep * average[name] + (1 - keep) * now for name, now in found["model"].items()}
        for name, values in found["ema"].items():
            torch.testing.assert_close(values, average[name], rtol=1e-5, atol=1e-7)
    assert any(not torch.equal(found["ema"][name], now) for name, now in found["model"].items())
    assert any(not torch.equal(start[name], now) for name, now in found["ema"].items())


def test_learning_rate_rises_and_falls(grey, tmp_path, monkeypatch):
    monkeypatch.setattr(ddpm, "loss_simple", lambda model, schedule, x_0, t, eps: cheap_loss(model, x_0))
    for steps, expected in ((3, 3 / 200), (400, 1 / 400)):
        found, _ = trained(steps, grey, tmp_path, "--learning_rate", 0.01)
        assert found["optimizer"]["param_groups"][0]["lr"] == pytest.approx(0.01 * expected)


def cheap_loss(model, x_0):
    return 2 + model.last[2].bias.square().sum() + x_0.mean(dim=1)


def test_seeds_draw_different_batches(grey, tmp_path, monkeypatch):
    seen = []

    def loss(model, schedule, x_0, t, eps):
        seen.append(eps)
        return cheap_loss(model, x_0)

    monkeypatch.setattr(ddpm, "loss_simple", loss)
    for seed in (0, 1, 2**31 - 1):
        trained(2, grey, tmp_path, "--seed", seed)
    assert all(not torch.equal(a, b) for k, a in enumerate(seen) for b in seen[:k]) and len(seen) == 6


@pytest.mark.parametrize(("B", "T"), [(20, 20), (7, 20), (50, 20), (3, 1000)])
def test_batches(grey, tmp_path, monkeypatch, B, T):
    seen = []

    def loss(model, schedule, x_0, t, eps):
        seen.append((x_0, t, eps))
        return cheap_loss(model, x_0)

    monkeypatch.setattr(ddpm, "loss_simple", loss)
    trained(150, grey, tmp_path, "--train_batch_size", B, "--num_timesteps", T)
    images, _ = ddpm.load_images(arguments("--dataset", grey))
    known = {tuple(image) for image in images.flatten(1).tolist()}
    used = {tuple(row) for x_0, *_ in seen for row in ((x_0 + 1) * 127.5).round().int().tolist()}
    assert used == known
    for x_0, t, _ in seen:
        gaps = t.sort()[0].diff(append=t.min()[None] + T)  # on a circle
        assert len(t) == len(x_0) == B and t.min() >= 0 and t.max() < T
        assert gaps.min() >= T // B and gaps.max() <= -(-T // B)
    every = torch.stack([t[0] for _, t, _ in seen])
    assert every.float().mean().item() == pytest.approx((T - 1) / 2, abs=5 * T / math.sqrt(12 * 150))
    assert every.float().std().item() == pytest.approx(T / math.sqrt(12), rel=0.2)
    noise = torch.stack([eps for *_, eps in seen])
    assert noise.mean().abs() < 5 / math.sqrt(noise.numel())
    assert noise.var().item() == pytest.approx(1, abs=5 * math.sqrt(2 / noise.numel()))


def test_training_learns(tmp_path):
    """All images are black: eps is then known from x_t, and the loss falls."""
    (tmp_path / "images").mkdir()
    for k in range(4):
        imageio.imwrite(tmp_path / "images" / f"{k}.png", np.zeros((8, 8), np.uint8))
    options = ["--train_batch_size", 8, "--learning_rate", 0.005, "--base_channels", 8]
    found, _ = trained(100, tmp_path / "images", tmp_path, *options)
    assert len(found["losses"]) == 100
    assert found["losses"][0].item() == pytest.approx(1, abs=0.3)  # the mean of eps^2
    assert found["losses"][-20:].mean() < 0.5


# Whole runs, tiny


def check_run(out, **options):
    """Pictures, numbers and no other file; returns the samples and the metrics."""
    assert sorted(os.listdir(out)) == FILES
    facts = json.loads((out / "run.json").read_text())
    assert set(facts) == {"options", "versions", "device", "precision", "seconds", "metrics"}
    assert set(ddpm.OPTIONS) <= set(facts["options"])
    for name, value in options.items():
        assert facts["options"][name] == value
    assert facts["versions"]["torch"] == torch.__version__ and facts["seconds"] > 0
    assert facts["versions"]["python"] in sys.version and facts["versions"]["numpy"] == np.__version__
    assert facts["device"] == "cpu" and facts["precision"] == "fp32"
    for name in ("data.png", "loss.png", "noisy.png", "samples.png"):
        assert imageio.imread(out / name).std() > 0
    with Image.open(out / "process.gif") as gif:
        durations = []
        for k in range(gif.n_frames):  # those that are alike are one, and last longer
            gif.seek(k)
            durations.append(gif.info["duration"])
    assert len(durations) > 1 and sum(durations) == 100 * (3 + 1 + 30) and durations[-1] >= 3000
    return np.load(out / "samples.npy"), facts["metrics"]


def test_grey_run(grey_run, grey):
    samples, metrics = check_run(grey_run, num_timesteps=20, seed=0, dataset=str(grey), channel_mults=[1, 2])
    assert samples.shape == (4, 8, 8) and samples.dtype == np.uint8 and samples.std() > 0
    assert metrics == {}
    assert imageio.imread(grey_run / "samples.png").shape == (8, 80)
    assert np.array_equal(imageio.imread(grey_run / "samples.png")[:, 8:16], samples[1])
    assert imageio.imread(grey_run / "noisy.png").shape == (80, 80)


def test_colour_run(colour, tmp_path, capsys):
    run("--dataset", colour, "--output_dir", tmp_path / "x" / "y", "--nll", 2, "--nll_terms", 2)
    samples, metrics = check_run(tmp_path / "x" / "y", nll=2)
    assert samples.shape == (4, 8, 8, 3) and samples.dtype == np.uint8
    assert imageio.imread(tmp_path / "x/y/samples.png").shape == (8, 80, 3)
    parts = [metrics[part] for part in ("L_T", "L_1 to L_{T-1}", "L_0")]
    assert metrics["bits per dimension"] == pytest.approx(sum(parts), rel=1e-4)
    assert parts[0] >= 0 and min(parts[1:]) > 0 and metrics["standard error"] > 0
    printed = capsys.readouterr().out
    assert printed.startswith("device: cpu, fp32") and all(name in printed for name in FILES)


@pytest.mark.parametrize("S", [28, 32])
def test_mnist_run(data_dir, tmp_path, S):
    run("--data_dir", data_dir, "--image_size", S, "--output_dir", tmp_path / "run")
    samples, _ = check_run(tmp_path / "run", image_size=S, dataset="mnist")
    assert samples.shape == (4, 28, 28) and samples.dtype == np.uint8
    saved, args = content(tmp_path / "run" / "model.pt"), arguments("--image_size", S)
    net = ddpm.UNet(args, 1).eval().requires_grad_(False)
    net.load_state_dict(saved["ema"])
    *_, (_, x, _) = ddpm.p_sample_loop(net, ddpm.make_schedule(20, steps=3), (4, S * S), 0, "ddim")
    edge = (S - 28) // 2
    middle = x.view(4, S, S)[:, edge : S - edge, edge : S - edge]
    assert np.array_equal(samples, ((middle + 1) * 127.5).round())


@pytest.mark.parametrize(("S", "mults"), [(8, [1]), (16, [1, 2]), (20, [1, 2]), (29, [1]), (27, [1])])
def test_digits_of_sizes_that_they_do_not_have(data_dir, tmp_path, capsys, S, mults):
    out = tmp_path / "run"
    options = ["--data_dir", data_dir, "--image_size", S, "--channel_mults", *mults, "--output_dir", out]
    assert f"--image_size {S}" in refusal(capsys, [*TINY, *options]) and not out.exists()


def test_metrics_of_one_image_are_valid_json(grey, tmp_path):
    run("--dataset", grey, "--nll", 1, "--nll_terms", 2, "--output_dir", tmp_path)
    metrics = json.loads((tmp_path / "run.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert metrics["metrics"]["bits per dimension"] > 0


def test_same_seed_same_bits(grey, grey_run, tmp_path):
    for name, seed in (("a", 0), ("b", 4)):
        run("--seed", seed, "--dataset", grey, "--output_dir", tmp_path / name)
    first, again, other = (
        content(folder / "model.pt") for folder in (grey_run, tmp_path / "a", tmp_path / "b")
    )
    for part in ("model", "ema", "optimizer", "losses"):
        assert_equal(again[part], first[part])
    assert not torch.equal(other["losses"], first["losses"])
    first, again = contents_of(grey_run), contents_of(tmp_path / "a")
    for name in set(FILES) - {"run.json", "model.pt"}:
        assert again[name] == first[name]
    assert first["samples.npy"] != (tmp_path / "b" / "samples.npy").read_bytes()


def test_short_options_and_their_other_names(grey, tmp_path):
    args, _ = ddpm.parse_options(["-e", "7", "-l", "0.01", "-b", "9", "--num_samples", "11"])
    assert (args.num_epochs, args.learning_rate, args.train_batch_size) == (7, 0.01, 9)
    assert args.eval_batch_size == 11 and args.eval_path is None
    assert ddpm.parse_options(["--eval_batch_size", "12"])[0].eval_batch_size == 12
    shape = TINY[: TINY.index("--train_batch_size")]
    rest = ["--num_samples", 1, "--sampling_steps", 1, "--dataset", grey]  # 10 training images
    for name, options, steps in (
        ("epochs", ["-e", 2, "-b", 4], 5),
        ("steps", ["-e", 2, "-b", 4, "--num_training_steps", 1], 1),
    ):
        plain(*shape, *rest, *options, "--output_dir", tmp_path / name)
        assert len(content(tmp_path / name / "model.pt")["losses"]) == steps


def test_sampling_takes_no_data(grey_run, tmp_path, monkeypatch):
    before = contents_of(grey_run)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ddpm, "load_images", lambda args: pytest.fail("reads data"))
    plain("--eval_path", grey_run / "model.pt", "--data_dir", tmp_path / "nowhere")
    folder = tmp_path / "outputs" / "ddpm_unet_grey_samples"
    assert sorted(os.listdir(folder)) == ["process.gif", "sample.json", "samples.npy", "samples.png"]
    assert (folder / "samples.npy").read_bytes() == before["samples.npy"]
    facts = json.loads((folder / "sample.json").read_text())
    assert facts["options"]["eval_batch_size"] == 4 and facts["options"]["channel_mults"] == [1, 2]
    for name, options in (("one", ["--eval_batch_size", 1]), ("beta", ["--sampler", "beta"])):
        plain("--checkpoint", grey_run / "model.pt", "--output_dir", name, *options)
    assert np.load("one/samples.npy").shape == (1, 8, 8)
    assert (tmp_path / "beta" / "samples.npy").read_bytes() != before["samples.npy"]
    assert contents_of(grey_run) == before and not (tmp_path / "nowhere").exists()


def test_likelihood_of_a_checkpoint_reads_the_data(grey_run, tmp_path):
    plain("--checkpoint", grey_run / "model.pt", "--nll", 2, "--nll_terms", 2, "--output_dir", tmp_path)
    metrics = json.loads((tmp_path / "sample.json").read_text())["metrics"]
    assert metrics["bits per dimension"] > 0 and metrics["standard error"] > 0
    assert not (tmp_path / "model.pt").exists() and np.load(tmp_path / "samples.npy").shape == (4, 8, 8)


def test_checkpoint_never_overwrites_a_training_run(grey_run, capsys):
    before = contents_of(grey_run)
    line = refusal(capsys, ["--checkpoint", grey_run / "model.pt", "--output_dir", grey_run])
    assert f"--output_dir {grey_run}" in line
    assert contents_of(grey_run) == before


def test_no_dropout_in_samples(grey, tmp_path):
    run("--dataset", grey, "--dropout", 0.5, "--num_training_steps", 5, "--output_dir", tmp_path / "run")
    plain("--checkpoint", tmp_path / "run" / "model.pt", "--output_dir", tmp_path / "again")
    first = np.load(tmp_path / "run" / "samples.npy")
    assert np.array_equal(first, np.load(tmp_path / "again" / "samples.npy"))
    saved = content(tmp_path / "run" / "model.pt")
    net = ddpm.UNet(arguments("--dropout", 0), 1).requires_grad_(False)  # one that knows of no dropout
    net.load_state_dict(saved["ema"])
    *_, (_, x, _) = ddpm.p_sample_loop(net, ddpm.make_schedule(20, steps=3), (4, 64), 0, "ddim")
    assert np.array_equal(first.reshape(4, 64), ((x + 1) * 127.5).round())


def test_size_and_content_of_a_checkpoint(grey, tmp_path):
    options = ["--base_channels", 32, "--num_training_steps", 1]
    found, start = trained(1, grey, tmp_path, *options)
    weights = 4 * sum(values.numel() for values in start.values())
    assert (tmp_path / "model.pt").stat().st_size <= 4.5 * weights + 100_000
    assert set(found) == {"ddpm_unet.py", "losses", "channels", "model", "ema", "optimizer"}
    assert found["channels"] == 1 and found["ddpm_unet.py"]["base_channels"] == 32
    assert sorted(os.listdir(tmp_path)) == ["loss.png", "model.pt"]


# Training that stops, and goes on


def act_at(monkeypatch, n, act):
    """Does something within training step n."""
    calls, loss_simple = [], ddpm.loss_simple

    def counted(*parts):
        calls.append(1)
        if len(calls) == n:
            act()
        return loss_simple(*parts)

    monkeypatch.setattr(ddpm, "loss_simple", counted)


def ctrl_c():
    signal.raise_signal(signal.SIGINT)


def killed():
    raise MemoryError


@pytest.mark.parametrize(("n", "dropout"), [(1, 0), (3, 0.5), (4, 0)])
def test_resumed_training_is_the_same_bit_for_bit(grey, tmp_path, monkeypatch, n, dropout):
    options = ["--dataset", grey, "--num_training_steps", 5, "--dropout", dropout]
    run(*options, "--output_dir", tmp_path / "whole")
    path = tmp_path / "part" / "model.pt"
    with monkeypatch.context() as patch:
        act_at(patch, n, ctrl_c)  # training ends when the step is done, and the run goes on to sample
        run(*options, "--output_dir", tmp_path / "part")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert check_run(tmp_path / "part")[0].shape == (4, 8, 8)
    part = content(path)
    assert len(part["losses"]) == n
    with monkeypatch.context() as patch:
        act_at(patch, 1, killed)
        with pytest.raises(MemoryError):
            plain("--resume", path)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    assert_equal(content(path), part)
    plain("--resume", path)
    whole, rest = content(tmp_path / "whole" / "model.pt"), content(path)
    for name in ("model", "ema", "optimizer", "losses"):
        assert_equal(rest[name], whole[name])
    a, b = (np.load(tmp_path / folder / "samples.npy") for folder in ("whole", "part"))
    assert np.array_equal(a, b)


def test_resume_with_no_step_left_goes_on_to_sample(grey_run, tmp_path):
    path, before = grey_run / "model.pt", contents_of(grey_run)
    plain("--resume", path, "--output_dir", tmp_path / "out", "--num_samples", 2)
    assert np.array_equal(np.load(tmp_path / "out" / "samples.npy"), np.load(grey_run / "samples.npy")[:2])
    assert contents_of(grey_run) == before


def test_resume_with_more_steps(grey, grey_run, tmp_path):
    options = ["--num_training_steps", 5]
    plain("--resume", grey_run / "model.pt", "--output_dir", tmp_path / "more", *options)
    run("--dataset", grey, "--output_dir", tmp_path / "whole", *options)
    more, whole = (content(tmp_path / name / "model.pt") for name in ("more", "whole"))
    assert len(more["losses"]) == 5
    assert_equal(more["model"], whole["model"])  # so early the learning rate is the same
    assert len(content(grey_run / "model.pt")["losses"]) == 3


def earlier_model(grey_run, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    earlier = (grey_run / "model.pt").read_bytes()
    (out / "model.pt").write_bytes(earlier)
    return out, earlier


def half_a_file(content, path):
    Path(path).write_bytes(b"half")
    raise RuntimeError("PytorchStreamWriter failed writing file data/7: file write failed")


def test_half_a_checkpoint_never_replaces_a_whole_one(grey, grey_run, capsys, monkeypatch, tmp_path):
    out, earlier = earlier_model(grey_run, tmp_path)
    monkeypatch.setattr(torch, "save", half_a_file)
    line = refusal(capsys, [*TINY, "--dataset", grey, "--output_dir", out])
    assert f"--output_dir {out}" in line and "file write failed" in line
    assert (out / "model.pt").read_bytes() == earlier


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
@pytest.mark.parametrize("name", ["model.pt", "samples.npy", "run.json"])
def test_full_disk(grey, grey_run, capsys, tmp_path, name):
    out, earlier = earlier_model(grey_run, tmp_path)
    (out / f".{name}").symlink_to("/dev/full")
    line = refusal(capsys, [*TINY, "--dataset", grey, "--output_dir", out])
    assert f"--output_dir {out}" in line and not (name != "model.pt" and (out / name).exists())
    assert ((out / "model.pt").read_bytes() == earlier) == (name == "model.pt")


def test_file_that_cannot_be_finished_leaves_the_earlier_one(tmp_path, capsys):
    path = tmp_path / "file"
    path.write_text("earlier")

    def write(temporary):
        temporary.write_text("half")
        raise OSError("No space left on device")

    with pytest.raises(SystemExit) as stop:
        ddpm.save(path, write)
    line = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and line.startswith("ddpm_unet.py: error: --output_dir")
    assert str(tmp_path) in line and "No space left" in line
    assert path.read_text() == "earlier"


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("step", [1, 3])
def test_loss_that_is_not_finite(grey, grey_run, capsys, monkeypatch, tmp_path, step, value):
    out, earlier = earlier_model(grey_run, tmp_path)
    calls, loss_simple = [], ddpm.loss_simple

    def spoiled(*parts):
        calls.append(1)
        return loss_simple(*parts) * (value if len(calls) == step else 1)

    monkeypatch.setattr(ddpm, "loss_simple", spoiled)
    line = refusal(capsys, [*TINY, "--dataset", grey, "--output_dir", out])
    assert "--learning_rate 0.5" in line and not (out / "samples.npy").exists()
    assert (out / "model.pt").read_bytes() == earlier


# Two processes


def test_two_processes_are_one(grey, tmp_path):
    """The real script, by torchrun: the mean of the gradients is that of the joint batch, of 5 images."""
    options = [*TINY, "--dataset", str(grey), "--train_batch_size", "5", "--attention_resolutions", "1"]
    options += ["--learning_rate", "0.05"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(SCRIPT), *options, "--output_dir", str(tmp_path / "two")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert "process 0" in done.stdout and "process 1" in done.stdout and "Traceback" not in done.stderr
    assert check_run(tmp_path / "two")[0].shape == (4, 8, 8)
    plain(*options, "--output_dir", tmp_path / "one")
    plain(*options, "--train_batch_size", 4, "--output_dir", tmp_path / "other")
    one, two, other = (content(tmp_path / name / "model.pt") for name in ("one", "two", "other"))
    for state, twin in zip(one["optimizer"]["state"].values(), two["optimizer"]["state"].values()):
        mean = state["exp_avg"]  # of the gradients
        torch.testing.assert_close(twin["exp_avg"], mean, rtol=1e-3, atol=1e-3 * mean.abs().max().item())
    for name, values in one["model"].items():
        torch.testing.assert_close(two["model"][name], values, rtol=0, atol=1e-5)
    assert (other["model"]["last.2.weight"] - one["model"]["last.2.weight"]).abs().max() > 1e-4
    assert list(one["model"]) == list(two["model"])


# Bad input


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", ["-3", "many", str(10**12), "nan"])
def test_numbers_that_make_no_sense(capsys, name, value):
    line = refusal(capsys, [f"--{name}", value])
    assert f"--{name}" in line and value in line


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--image_size", "0"),
        ("--image_size", "3"),
        ("--image_size", "28.5"),
        ("--num_timesteps", "19"),
        ("--base_channels", "1"),
        ("--channel_mults", "0"),
        ("--num_res_blocks", "0"),
        ("--attention_resolutions", "0"),
        ("--dropout", "1"),
        ("--train_batch_size", "0"),
        ("-b", "0"),
        ("--num_epochs", "0"),
        ("-e", "0.5"),
        ("--num_training_steps", "2.5"),
        ("--learning_rate", "0"),
        ("--learning_rate", "inf"),
        ("-l", "11"),
        ("--ema_decay", "1.5"),
        ("--eval_batch_size", "0"),
        ("--num_samples", "0"),
        ("--sampling_steps", "0"),
        ("--nll_terms", "0"),
        ("--seed", str(2**31)),
        ("--seed", "0.5"),
        ("--precision", "fp8"),
        ("--sampler", "euler"),
        ("--device", "abacus"),
        ("--device", "meta"),
        ("--device", "cpu:0"),
        ("--colour", "red"),
    ],
)
def test_values_that_make_no_sense(capsys, flag, value):
    line = refusal(capsys, [flag, value])
    long = {"-b": "--train_batch_size", "-e": "--num_epochs", "-l": "--learning_rate"}
    long["--num_samples"] = "--eval_batch_size"
    assert (flag in line or long[flag] in line) and value in line


def test_levels_that_cannot_halve_the_image(capsys):
    for size, mults, multiple in ((30, [1, 2, 2], 4), (28, [1, 1, 1, 1], 8), (9, [1, 1], 2)):
        line = refusal(capsys, ["--image_size", size, "--channel_mults", *mults])
        assert f"--image_size {size}" in line and "--channel_mults" in line
        assert int(re.search(r"multiple of (\d+)", line)[1]) == multiple
        size = ["--dataset", "folder", "--image_size", str(3 * multiple)]
        works = ddpm.parse_options([*size, "--channel_mults", *map(str, mults)])
        assert works[0].image_size == 3 * multiple


def test_flag_without_its_value(capsys):
    assert "--channel_mults" in refusal(capsys, ["--channel_mults"])
    assert "--resume" in refusal(capsys, ["--resume"])


def test_missing_device(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    line = refusal(capsys, ["--device", "cuda"])
    assert "--device cuda" in line and "cpu" in line
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert "--device mps" in refusal(capsys, ["--device", "mps"])
    assert ddpm.parse_options([])[0].device == "cpu"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert ddpm.parse_options([])[0].device == "cuda:0"
    assert "cuda:2" in refusal(capsys, ["--device", "cuda:2"])


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("flag", ["--checkpoint", "--eval_path", "--resume"])
@pytest.mark.parametrize(
    "kind", ["absent", "folder", "empty", "truncated", "text", "other script", "tensor", "malicious"]
)
def test_bad_checkpoints(grey_run, tmp_path, capsys, flag, kind):
    path, whole = tmp_path / "bad.pt", (grey_run / "model.pt").read_bytes()
    if kind == "folder":
        path.mkdir()
    elif kind == "other script":
        torch.save({"model": {}, "main.py": {"dataset": "heart"}, "stats": {}}, path)
    elif kind == "tensor":
        torch.save(torch.zeros(3), path)
    elif kind == "malicious":
        torch.save({"ddpm_unet.py": Evil(str(tmp_path / "pwned")), "model": {}, "optimizer": {}}, path)
    elif kind != "absent":
        path.write_bytes({"empty": b"", "truncated": whole[: len(whole) // 2], "text": b"hello"}[kind])
    line = refusal(capsys, [flag, path, "--output_dir", tmp_path / "out"])
    assert flag.replace("eval_path", "checkpoint") in line and str(path) in line
    assert not (tmp_path / "pwned").exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize("flag", ["--checkpoint", "--resume"])
@pytest.mark.parametrize(
    ("name", "value", "there"),
    [
        ("dataset", ["mnist"], None),
        ("image_size", [16], "8"),
        ("num_timesteps", [21], "20"),
        ("base_channels", [8], "4"),
        ("channel_mults", [1, 2, 2], "[1, 2]"),
        ("num_res_blocks", [2], "1"),
        ("attention_resolutions", [8], "[4]"),
        ("dropout", [0.1], "0.0"),
    ],
)
def test_checkpoint_beside_a_flag_that_differs(grey, grey_run, capsys, flag, name, value, there):
    line = refusal(capsys, [flag, grey_run / "model.pt", f"--{name}", *value])
    assert name in MODEL and f"--{name} {value if len(value) > 1 else ''}".strip() in line
    assert str(value[0]) in line and (there or str(grey)) in line


def test_checkpoint_beside_flags_that_agree(grey_run):
    """Those that make the network may be given again; others win over what the checkpoint has."""
    options = f"--image_size 8 --channel_mults 1 2 --dropout 0 --seed 5 --checkpoint {grey_run / 'model.pt'}"
    args, checkpoint = ddpm.parse_options(options.split())
    assert args.seed == 5 and args.image_size == 8 and args.sampling_steps == 3
    assert args.precision == "fp32" and len(checkpoint["losses"]) == 3


def test_output_folder_that_cannot_be_written(grey, capsys, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr(ddpm, "train", lambda *parts: pytest.fail("trains"))
    line = refusal(capsys, [*TINY, "--dataset", grey, "--output_dir", tmp_path / "file" / "out"])
    assert "--output_dir" in line and str(tmp_path / "file") in line
    assert (tmp_path / "file").read_text() == "mine"


def test_mnist_without_network(capsys, tmp_path, monkeypatch):
    from torchvision.datasets import MNIST

    monkeypatch.setattr(MNIST, "mirrors", ["http://127.0.0.1:9/"])
    line = refusal(capsys, [*DIGITS, "--data_dir", tmp_path / "data", "--output_dir", tmp_path / "out"])
    assert "--dataset mnist" in line and str(tmp_path / "data/MNIST/raw") in line
    assert not (tmp_path / "out").exists()


def test_damaged_mnist(capsys, tmp_path, data_dir):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for path in (data_dir / "MNIST" / "raw").iterdir():
        (raw / path.name).write_bytes(path.read_bytes()[:1000])
    line = refusal(capsys, [*DIGITS, "--data_dir", tmp_path, "--output_dir", tmp_path / "out"])
    assert str(raw) in line and not (tmp_path / "out").exists()


def test_torchvision_of_another_build(capsys, tmp_path, monkeypatch):
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')"
    )
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    line = refusal(capsys, [*DIGITS, "--output_dir", tmp_path / "out"])
    assert "torchvision::nms" in line and not (tmp_path / "out").exists()


# The file itself


def test_import_does_nothing(capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    random, numbers = torch.get_rng_state(), np.random.get_state()[1].copy()
    spec = importlib.util.spec_from_file_location("another_name", SCRIPT)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert capfd.readouterr() == ("", "") and os.listdir(tmp_path) == []
    assert torch.equal(torch.get_rng_state(), random) and (np.random.get_state()[1] == numbers).all()


def test_file_is_short_and_stands_alone():
    text = SCRIPT.read_text()
    assert len(text.splitlines()) < 400 and max(map(len, text.splitlines())) <= 110
    modules = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            modules |= {name.name.split(".")[0] for name in node.names}
        if isinstance(node, ast.ImportFrom):
            modules.add(node.module.split(".")[0])
    assert "torch" in modules and not modules & {"main", "dpm_2015", "ddpm_unet", "tests"}


def test_help_names_every_default(capsys):
    with pytest.raises(SystemExit) as stop:
        ddpm.main(["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    for name, (default, _, text) in ddpm.OPTIONS.items():
        assert f"--{name}" in printed and f"{text} [{default}]" in printed


def test_as_a_notebook(data_dir, tmp_path, monkeypatch):
    """Cell by cell, where Jupyter's own arguments stand in sys.argv."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(data_dir)
    monkeypatch.setitem(sys.modules, "ipykernel", types.ModuleType("ipykernel"))
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel.json"])
    cells = re.split(r"(?m)^# %% ", SCRIPT.read_text())
    assert len(cells) == 12
    scope, tiny = {"__name__": "__main__"}, vars(arguments("--dataset", "mnist", "--image_size", 28))
    for cell in cells:
        exec("# " + cell if cell is not cells[0] else cell, scope)  # noqa: S102
        for name in scope.get("OPTIONS", ()):
            scope["OPTIONS"][name] = (tiny[name], *scope["OPTIONS"][name][1:])
    assert np.load(tmp_path / "outputs" / "ddpm_unet_mnist" / "samples.npy").shape == (4, 28, 28)
