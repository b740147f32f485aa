"""Tests of likelihood.py: closed forms for normal data, each level of the decoder, whole runs."""

import gzip
import math
import runpy
import sys
from pathlib import Path

import likelihood
import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

import ddpm_unet

HERE = Path(__file__).resolve().parent
LEVELS = torch.arange(256).double() / 127.5 - 1


def closed_form(T):
    """The paper's alpha_bars, and what eq. 7 says from t = 1 on: coefficients of x_0, variances."""
    betas = np.minimum(np.linspace(1e-4, 0.02, T) * 1000 / T, 0.999)
    now, before = np.cumprod(1 - betas)[1:], np.cumprod(1 - betas)[:-1]
    variances = (1 - before) / (1 - now) * betas[1:]
    return np.cumprod(1 - betas), np.sqrt(before) * betas[1:] / (1 - now), variances


@pytest.mark.parametrize(("T", "terms"), [(50, 49), (50, 7), (20, 40)])
def test_bound_of_normal_data(T, terms):
    """For x_0 ~ N(0, s^2) the best network is linear, and x_0 - x_0_hat ~ N(0, left)."""
    (alpha_bars, coefs, variances), s = closed_form(T), 0.25
    slopes = np.sqrt(1 - alpha_bars) / (alpha_bars * s**2 + 1 - alpha_bars)
    net = lambda x_t, t, labels: x_t * (torch.tensor(slopes)[t] * labels).view(-1, 1, 1, 1)
    torch.manual_seed(0)
    labels, x_0 = torch.ones(3000).long(), s * torch.randn(3000, 1, 4, 4).double()
    bits = likelihood.bound(net, ddpm_unet.make_schedule(T), x_0, labels, terms)
    q = Normal(alpha_bars[-1] ** 0.5 * x_0, (1 - alpha_bars[-1]) ** 0.5)
    L_T = kl_divergence(q, Normal(0.0, 1.0)).flatten(1).mean(dim=1) / math.log(2)
    torch.testing.assert_close(bits[:, 0], L_T)
    left = s**2 * np.sqrt(1 - alpha_bars) * slopes
    steps = (coefs**2 * left[1:] / variances).sum() / math.log(4)
    miss, root = np.linspace(0, 8, 4000) * left[0] ** 0.5, (2 * variances[0]) ** 0.5
    mass = [(math.erfc((x - 1 / 255) / root) - math.erfc((x + 1 / 255) / root)) / 2 for x in miss]
    L_0 = np.average(-np.log2(mass), weights=np.exp(-(miss**2) / (2 * left[0])))
    chance = bits.std(dim=0).numpy() / 3000**0.5  # 3 % of the means, or less
    assert (abs(bits.mean(dim=0).numpy() - (L_T.mean(), steps, L_0)) < 4 * chance).all()


@pytest.mark.parametrize(("terms", "gaps"), [(29, {1}), (5, {5, 6})])
def test_terms_are_spread_evenly(terms, gaps):
    """For x_0_hat clipped to -1, and x_0 = 0, the difference of two means is the factor of x_0."""
    seen, x_0 = [], torch.zeros(300, 1, 2, 2).double()
    net = lambda x_t, t, labels: seen.append(t) or 1e6 + x_t
    bits = likelihood.bound(net, ddpm_unet.make_schedule(30), x_0, torch.zeros(300).long(), terms)
    taken = torch.stack(seen[:-1]).sort(dim=0)[0]  # the last is for L_0
    assert taken.shape == (terms, 300) and not seen[-1].any()
    assert {*taken.diff(dim=0).flatten().tolist()} == gaps  # so, for 29 terms, each t once
    assert taken.unique().tolist() == list(range(1, 30))
    _, coefs, variances = closed_form(30)
    expected = (coefs**2 / variances)[taken - 1].mean(axis=0) * 29 / math.log(4)
    np.testing.assert_allclose(bits[:, 1], expected)


@pytest.mark.parametrize(("T", "mean"), [(20, 0.5), *((1000, k) for k in (-1, -0.99, 0, 0.3, 1))])
def test_decoder_is_a_distribution_over_levels(T, mean):
    std = likelihood.decoder_std(ddpm_unet.make_schedule(T))
    nats = likelihood.decoder_nats(LEVELS, torch.full_like(LEVELS, mean), std)
    below = [math.erfc((mean - k / 127.5 + 1) / std / 2**0.5) / 2 for k in np.arange(0.5, 255)]
    assert std**2 == pytest.approx(closed_form(T)[2][0]) and nats.isfinite().all()
    assert (-nats).exp().tolist() == pytest.approx(np.diff([0, *below, 1]).tolist(), abs=1e-9)
    assert (-nats).exp().sum().item() == pytest.approx(1)
    costs = likelihood.decoder_nats(LEVELS, LEVELS, std) / math.log(2)  # with a perfect mean
    assert likelihood.decoder_floor(LEVELS, std) == pytest.approx(costs.mean().item())
    assert T == 20 or costs[[0, 9]].tolist() == pytest.approx([0.51, 1.31], abs=0.005)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Write 200 test digits, a random network and bad files. Return a call of the whole script."""
    monkeypatch.chdir(tmp_path)
    for folder, size in (Path("MNIST/raw"), None), (Path("cut/MNIST/raw"), 100):
        folder.mkdir(parents=True)
        for path in (HERE / "mnist").glob("*.gz"):
            (folder / path.stem).write_bytes(gzip.decompress(path.read_bytes())[:size])
    options = dict(zip(ddpm_unet.MODEL, (1, 10, 30, 8, [1, 2])))
    ema = {name: x.half() for name, x in ddpm_unet.UNet(**options).state_dict().items()}
    state = {"options": options, "step": 1, "net": {}, "ema": ema, "optimizer": {}}
    torch.save(state, "model.pt")
    torch.save({**state, "ema": {}}, "ema.pt")
    torch.save({**state, "options": {}}, "options.pt")
    start = lambda: runpy.run_path(str(HERE / "likelihood.py"), run_name="__main__")
    return lambda line: monkeypatch.setattr(sys, "argv", ["", *line.split()]) or start()


def test_whole_run(run, capsys):
    run("model.pt --data_dir . --num_images 200 --terms 3")
    rows = [row.strip("| ").split(" | ") for row in capsys.readouterr().out.splitlines()]
    L_T, steps, L_0, floor, zipped = (float(rows[k][1]) for k in (2, 3, 4, 6, 7))
    total, error = map(float, rows[5][1].split(" ± "))
    assert total == pytest.approx(L_T + steps + L_0, abs=2e-3) and 0 < error < total / 2
    raw, labels = (path.read_bytes() for path in sorted(Path("MNIST/raw").glob("t10k*")))
    assert zipped == pytest.approx(len(gzip.compress(raw, 9)) / len(raw) * 8, rel=0.02)
    assert 0.51 < floor < 2 and floor < L_0 and rows[6][0] == "floor of L_0"
    labels = {raw[16 + 784 * k :][:784]: labels[8 + k] for k in range(200)}
    images, found = likelihood.load_digits(".", 50)
    assert [labels[image.numpy().tobytes()] for image in images] == found.tolist()


BAD = "missing.pt ema.pt options.pt --data_dir=missing --data_dir=cut --num_images=201"


@pytest.mark.parametrize("option", [*BAD.split(), "--num_images=1", "--terms=0"])
def test_bad_input(option, run):
    with pytest.raises(SystemExit) as stop:
        run(f"--data_dir . {option}" + " model.pt" * option.startswith("-"))
    message = stop.value.code  # sys.exit prints it, and the exit status is 1
    assert ".py: error: " in message and "\n" not in message
    assert option.split("=")[0] in message
