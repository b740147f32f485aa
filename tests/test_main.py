"""Tests of main.py.

The mathematics is compared with closed forms in float64, with Bayes' rule on a grid, and with the
exact best network, which is known where the data are a few points or a normal distribution.
Training and pictures are watched while they run. The script itself runs as a user runs it, tiny,
on good and on bad input: mostly inside this process, to save the seconds that torch needs to start.
"""

import contextlib
import gzip
import io
import json
import os
import re
import runpy
import signal
import subprocess
import sys
from itertools import chain
from math import cos, sin, sqrt
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import main

ROOT = Path(__file__).resolve().parent.parent
SMALL = "--num_timesteps 8 --embedding_size 8 --hidden_size 16 --hidden_layers 1 --num_epochs 1"
TINY = f"{SMALL} --show_image_step 8 --num_samples 50 --device cpu".split()
CENTRES = torch.tensor([[-1.5, -0.5], [-0.5, 1.0], [0.0, -1.0], [0.8, 0.9], [1.2, -0.4]])
BOTH = pytest.mark.parametrize("predict", ["eps", "x_0"])


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """A folder with 800 training digits of MNIST, as torchvision wants them, and 200 points."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "MNIST" / "raw").mkdir(parents=True)
    for path in (ROOT / "tests" / "mnist").glob("*.gz"):
        (folder / "MNIST/raw" / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
    points = np.random.default_rng(0).normal((5, -3), 7, (200, 2))
    np.savetxt(folder / "points.csv", points, delimiter=",")
    np.save(folder / "points.npy", points)
    return folder


def start(*options, **keywords):
    """Start main.py in a process of its own."""
    command = [str(part) for part in (sys.executable, ROOT / "main.py", *options)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **keywords)


def run(*options):
    """Run main.py from its first line to its last in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["main.py", *map(str, options)])
        runpy.run_path(str(ROOT / "main.py"), run_name="__main__")


def refusal(*options):
    """Return the one line with which main.py refuses these options."""
    with contextlib.redirect_stderr(io.StringIO()) as errors, pytest.raises(SystemExit) as stop:
        run(*options)
    # argparse prints its message itself, and exits with 2. Ours goes to sys.exit, which prints it.
    line = errors.getvalue().splitlines()[-1] if stop.value.code == 2 else stop.value.code
    assert line.startswith("main.py: error: ") and "\n" not in line
    return line


def closed_form(T):
    """Return betas, alpha_bars, and the standard deviations of steps back, in float64."""
    betas = np.minimum(np.linspace(1e-4, 0.02, T) * 1000 / T, 0.999)
    alpha_bars = np.cumprod(1 - betas)
    before = np.append(1.0, alpha_bars[:-1])
    return betas, alpha_bars, np.sqrt(betas * (1 - before) / (1 - alpha_bars))  # below eq. 7


def best_network(T, data, predict):
    """Return the exact best prediction for data (N, D), each as likely: an average of them."""
    alpha_bars = torch.tensor(closed_form(T)[1]).float()

    def model(x_t, t):
        signal, noise_std = alpha_bars[t, None].sqrt(), (1 - alpha_bars[t, None]).sqrt()
        distances = (x_t[:, None] - signal[:, None] * data).square().sum(dim=2)  # (B, N)
        x_0_hat = (-distances / (2 * noise_std**2)).softmax(dim=1) @ data
        return x_0_hat if predict == "x_0" else (x_t - signal * x_0_hat) / noise_std

    return model


# Schedule and forward process


@pytest.mark.parametrize("T", [20, 50, 200, 1000, 4000])
def test_schedule(T):
    betas, alpha_bars, posterior_std = closed_form(T)  # for T = 1000, these are the paper's
    expected = {"betas": betas, "signal": np.sqrt(alpha_bars)}
    expected |= {"noise_std": np.sqrt(1 - alpha_bars), "posterior_std": posterior_std}
    schedule = vars(main.make_schedule(T))
    assert schedule.keys() == expected.keys()
    for name, values in expected.items():  # 1e-6: float32 would lose digits at small t
        np.testing.assert_allclose(schedule[name], values, rtol=1e-6, err_msg=name)
    assert schedule["signal"][-1] < 0.01  # x_T is noise


@pytest.mark.parametrize("T", [20, 200])
def test_q_sample_equals_single_steps(T):
    schedule, zeros, ones = main.make_schedule(T), torch.zeros(T, 1), torch.ones(T, 1)
    means = main.q_sample(schedule, ones, torch.arange(T), zeros)  # of x_t, from x_0 = 1
    variances = main.q_sample(schedule, zeros, torch.arange(T), ones) ** 2
    mean, variance = 1.0, 0.0
    for step, beta in enumerate(closed_form(T)[0]):  # eq. 2
        mean, variance = sqrt(1 - beta) * mean, (1 - beta) * variance + beta
        assert means[step].item() == pytest.approx(mean, rel=1e-4)
        assert variances[step].item() == pytest.approx(variance, rel=1e-4)


# Reverse process


@BOTH
@pytest.mark.parametrize("step", [0, 1, 5, 30, 49])
@pytest.mark.parametrize(("predicted", "used"), [(0.7, 0.7), (9.0, 1.5), (-9.0, -1.5)])
def test_p_sample_is_bayes_rule(monkeypatch, predict, step, predicted, used):
    """With a network that predicts one x_0, clipped to 1.5, it is q(x_{t-1} | x_t, x_0)."""
    model, x_t = best_network(50, torch.tensor([[predicted]]), predict), torch.full((2, 1), -0.4)
    monkeypatch.setattr(torch, "randn_like", lambda x: torch.tensor([[0.0], [1.0]]))
    found, one_up = main.p_sample(model, main.make_schedule(50), x_t, step, predict, 1.5).flatten()
    if step == 0:
        assert found.item() == pytest.approx(used, abs=1e-4) and one_up == found
        return
    beta, before, x = closed_form(50)[0][step], closed_form(50)[1][step - 1], np.arange(-8, 8, 2e-4)
    log_density = -((x - sqrt(before) * used) ** 2) / (1 - before) / 2  # q(x_{t-1} | x_0)
    log_density -= (-0.4 - sqrt(1 - beta) * x) ** 2 / beta / 2  # q(x_t | x_{t-1})
    weights = np.exp(log_density - log_density.max())
    mean, second = (np.average(values, weights=weights) for values in (x, x**2))
    assert found.item() == pytest.approx(mean, abs=1e-4)
    assert (one_up - found).item() == pytest.approx(sqrt(second - mean**2), rel=1e-3)


def test_p_sample_loop_is_algorithm_2_as_printed(monkeypatch):
    """For x_0 ~ N(m, s^2) the best eps is linear, so mean and variance follow from line 4 too."""
    T, m, s, n, calls, noises, randn_like = 50, 0.8, 0.5, 50_000, [], [], torch.randn_like
    betas, alpha_bars, sigmas = (values.tolist() for values in closed_form(T))

    def eps_hat(x, t):
        a = alpha_bars[t]
        return sqrt(1 - a) * (x - sqrt(a) * m) / (a * s**2 + 1 - a)

    def line_4(x, t, z):
        mean = (x - betas[t] / sqrt(1 - alpha_bars[t]) * eps_hat(x, t)) / sqrt(1 - betas[t])
        return mean + sigmas[t] * z

    def model(x_t, t):
        calls.append(t.unique().tolist())
        return eps_hat(x_t, t[0])

    monkeypatch.setattr(torch, "randn_like", lambda x: noises.append(randn_like(x)) or noises[-1])
    torch.manual_seed(0)
    states = list(main.p_sample_loop(model, main.make_schedule(T), (n, 1), "eps", 1e9))
    assert [step for step, _ in states] == list(range(T, -1, -1))
    assert calls == [[step] for step in range(T - 1, -1, -1)]
    x, mean, variance = states[0][1], 0.0, 1.0
    for (step, x_next), z in zip([(T, x), *states[1:]], [None, *noises], strict=True):
        if step < T:
            torch.testing.assert_close(x_next, line_4(x, step, z), rtol=1e-4, atol=1e-4)
            slope = line_4(1, step, 0) - line_4(0, step, 0)
            mean, variance = line_4(mean, step, 0), slope**2 * variance + sigmas[step] ** 2
        x = x_next
        assert x.mean().item() == pytest.approx(mean, abs=6 * sqrt(variance / n))
        assert x.var().item() == pytest.approx(variance, rel=6 * sqrt(2 / n))
    assert mean == pytest.approx(m, abs=1e-3)


@BOTH
def test_sampling_with_the_best_network_gives_the_data(predict):
    torch.manual_seed(0)
    model, schedule = best_network(200, CENTRES, predict), main.make_schedule(200)
    *_, (_, x) = main.p_sample_loop(model, schedule, (2000, 2), predict, 1.5)
    distances, nearest = torch.cdist(x, CENTRES).min(dim=1)
    assert distances.max() < 0.01 and (nearest.bincount(minlength=5) - 400).abs().max() < 90


# Loss


@BOTH
def test_the_best_network_has_the_lowest_loss(predict):
    def loss(model, data):
        torch.manual_seed(0)
        x_0 = data.repeat(1000, 1)
        return main.loss_simple(model, main.make_schedule(50), x_0, predict).item()

    best, one_point = best_network(50, CENTRES, predict), CENTRES[:1]
    for factor in (0, 0.9, 1.1):
        other = lambda x_t, t, factor=factor: factor * best(x_t, t)
        assert 0 < loss(best, CENTRES) < loss(other, CENTRES)
    assert loss(best_network(50, one_point, predict), one_point) < 1e-6  # nothing left to guess


def test_loss_draws_every_t_and_fresh_noise():
    T, n, seen = 10, 20_000, []
    torch.manual_seed(0)
    for _ in range(2):
        model = lambda *inputs: seen.append(inputs) or inputs[0]
        main.loss_simple(model, main.make_schedule(T), torch.zeros(n, 2), "eps")
    (x_t, t), (x_t_again, _) = seen
    counts = t.bincount(minlength=T)
    assert len(counts) == T and ((counts - n / T) ** 2 / (n / T)).sum() < 30  # chi-square
    eps = x_t / torch.tensor(1 - closed_form(T)[1]).float().sqrt()[t, None]
    assert eps.mean(dim=0).abs().max() < 0.04 and (eps.std(dim=0) - 1).abs().max() < 0.04
    assert abs((eps[1:] * eps[:-1]).mean()) < 0.04 and not torch.equal(x_t, x_t_again)


@pytest.mark.parametrize("name", ["loss_simple", "p_sample"])
def test_unknown_prediction_is_an_error(name):
    schedule, x, model = main.make_schedule(20), torch.zeros(1, 2), lambda x_t, t: x_t
    options = {"loss_simple": (x, "v"), "p_sample": (x, 3, "v", 1.0)}[name]
    with pytest.raises(KeyError):
        getattr(main, name)(model, schedule, *options)


# Network


@pytest.mark.parametrize("D", [2, 784])
@pytest.mark.parametrize("B", [1, 3])
def test_network(D, B):
    """The network against the same sums, written out from its weights."""

    def embedding(x, size, scale):
        waves = [scale * 10_000 ** -(k / (size // 2 - 1)) for k in range(size // 2)]
        return torch.tensor([[f(v * w) for f in (sin, cos) for w in waves] for v in x.tolist()])

    torch.manual_seed(0)
    model, x_t, t = main.MLP(D, 16, 2, 8, 200), torch.randn(B, D), torch.arange(B) + 50
    found = main.sinusoidal_embedding(x_t[:, 0], 32, 25.0)
    torch.testing.assert_close(found, embedding(x_t[:, 0], 32, 25.0), rtol=0, atol=1e-5)
    inputs = [embedding(x, 8, 25.0) for x in x_t.T] if D == 2 else [x_t]
    inputs.append(embedding(t * 5, 8, 1.0))  # T = 200 is embedded as if it were 1000
    first, *hidden, last = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    silu, norm = torch.nn.functional.silu, torch.nn.LayerNorm(16)
    h = silu(first(torch.cat(inputs, dim=1)))
    for linear in hidden:
        h = h + silu(linear(norm(h)))
    assert model(x_t, t).shape == (B, D) and len(hidden) == 2
    torch.testing.assert_close(model(x_t, t), last(norm(h)), rtol=1e-3, atol=1e-4)


# Data and energy distance


def test_heart_and_swiss_roll():
    u = 2 * np.pi * np.arange(8000) / 8000
    y = 13 * np.cos(u) - 5 * np.cos(2 * u) - 2 * np.cos(3 * u) - np.cos(4 * u)
    heart = np.stack((16 * np.sin(u) ** 3, y), axis=1) / 5
    np.testing.assert_allclose(main.heart(), heart, atol=1e-4)
    u = np.linspace(1.5 * np.pi, 4.5 * np.pi, 8000)
    noise = main.swiss_roll().numpy() - np.stack((u * np.cos(u), u * np.sin(u)), axis=1) / 10
    np.testing.assert_allclose(noise.std(axis=0), 0.01, rtol=0.05)
    assert abs(noise.mean(axis=0)).max() < 6e-4


@pytest.mark.parametrize("name", ["heart", "swiss_roll", "mnist"])
def test_standardise(name, files):
    data = main.load_data(name, files) * (1 if name == "mnist" else 3)
    x_0, shift, scale = main.standardise(data)
    torch.testing.assert_close(x_0 * scale + shift, data, rtol=1e-4, atol=1e-4)
    if name == "mnist":
        raw = (files / "MNIST/raw/train-images-idx3-ubyte").read_bytes()[16:]
        np.testing.assert_array_equal(data.numpy().ravel(), np.frombuffer(raw, np.uint8))
        assert x_0.shape == (800, 784) and x_0.min() == -1 and x_0.max() == 1
    else:
        assert x_0.mean(dim=0).abs().max() < 1e-4
        assert x_0.square().sum(dim=1).mean().item() == pytest.approx(2, rel=1e-3)  # as N(0, I)


def test_energy_distance():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(7, 3)), rng.normal(1, 2, size=(5, 3))
    mean = lambda a, b: np.mean([sqrt(((x - y) ** 2).sum()) for x in a for y in b])
    found = main.energy_distance(torch.tensor(a), torch.tensor(b))
    assert found == pytest.approx(2 * mean(a, b) - mean(a, a) - mean(b, b))
    assert main.energy_distance(CENTRES, CENTRES) == pytest.approx(0, abs=1e-6)
    assert main.energy_distance(torch.zeros(4, 2), torch.tensor([[3.0, 4.0]])) == 10  # 5 apart


# Training


def test_training(monkeypatch, tmp_path):
    """The learning rate falls, gradients are clipped, every example is used once an epoch."""
    rates, norms, batches, loss_simple = [], [], [], main.loss_simple
    adam_step, torch_model = torch.optim.Adam.step, main.MLP(2, 16, 1, 8, 4)

    def watched_loss(model, schedule, x_0, predict):
        batches.append(x_0[:, 0].tolist())
        return 1000 * loss_simple(model, schedule, x_0, predict)  # makes all gradients large

    def watched_step(self, *args, **keywords):
        gradients = [p.grad.flatten() for p in torch_model.parameters()]
        rates.append(self.param_groups[0]["lr"])
        norms.append(torch.cat(gradients).norm().item())
        return adam_step(self, *args, **keywords)

    monkeypatch.setattr(main, "loss_simple", watched_loss)
    monkeypatch.setattr(torch.optim.Adam, "step", watched_step)
    x_0 = torch.randn(50, 2)
    config = {"predict": "eps", "limit": 2.0, "examples": x_0}
    main.train(torch_model, main.make_schedule(4), x_0, config, tmp_path, 4, 20, 0.01)
    assert rates == pytest.approx(np.repeat([0.01, 0.0075, 0.005, 0.0025], 3))  # 20 + 20 + 10
    assert norms == pytest.approx([1] * 12, rel=1e-3)
    epochs = [list(chain(*batches[k : k + 3])) for k in range(0, 12, 3)]
    assert [sorted(epoch) for epoch in epochs] == [sorted(x_0[:, 0].tolist())] * 4
    assert epochs[0] != epochs[1] and sorted(os.listdir(tmp_path)) == ["model.pt", "training.gif"]


@pytest.mark.parametrize("broken", ["write_bytes", "replace"])
def test_a_failing_write_leaves_the_earlier_model(monkeypatch, tmp_path, broken):
    (tmp_path / "model.pt").write_text("earlier")

    def fail(self, *args):
        self.touch()
        raise OSError("no space left")

    monkeypatch.setattr(Path, broken, fail)
    with pytest.raises(OSError, match="no space left"):
        main.save_checkpoint(tmp_path / "model.pt", torch.nn.Linear(1, 1), {})
    assert [path.read_text() for path in tmp_path.iterdir()] == ["earlier"]


# Pictures


def test_animation(monkeypatch, tmp_path):
    """Titles, the noise that each frame shows, and the time that each frame stays."""
    T, frames, states, p_sample_loop = 20, [], {}, main.p_sample_loop

    def watched_draw(title, x, colour, data):
        frames.append((title, x))
        return np.full((8, 8, 3), 8 * len(frames), np.uint8)

    def watched_loop(*args):
        for step, states[step] in p_sample_loop(*args):
            yield step, states[step]

    monkeypatch.setattr(main, "draw", watched_draw)
    monkeypatch.setattr(main, "p_sample_loop", watched_loop)
    x_0, model = torch.randn(1000, 2), main.MLP(2, 16, 1, 8, T)
    config = {"predict": "eps", "limit": 2.0, "examples": x_0}
    x = main.animate(model, main.make_schedule(T), config, tmp_path, 30, 3)

    steps, noises = [0, 3, 6, 9, 12, 15, 18, 20], []
    titles = [f"adding noise: step {k}" for k in steps[1:]]
    titles += [f"removing noise: {k} left" for k in steps[::-1]]
    assert [title for title, _ in frames] == ["data", *titles]
    assert torch.equal(frames[0][1], x_0) and torch.equal(x, states[0]) and x.shape == (30, 2)
    for k, (_, x_t) in zip(steps[1:], frames[1:8], strict=True):
        alpha_bar = closed_form(T)[1][k - 1]  # after k steps
        noises.append((x_t - sqrt(alpha_bar) * x_0) / sqrt(1 - alpha_bar))
        torch.testing.assert_close(noises[-1], noises[0], rtol=0, atol=1e-3)  # the same noise
    assert abs(noises[0].std() - 1) < 0.1
    assert all(torch.equal(states[k], x) for k, (_, x) in zip(steps[::-1], frames[8:], strict=True))

    with Image.open(tmp_path / "process.gif") as gif:
        durations = [gif.seek(k) or gif.info["duration"] for k in range(gif.n_frames)]
        assert gif.info["loop"] == 0  # for ever
    assert durations == [250, 250, *[50] * 12, 250, 3000]
    assert (np.array(Image.open(tmp_path / "samples.png")) == 8 * 16).all()  # the last frame
    steps = range(0, 200, 5)  # by default, most time on the way back goes to little noise
    assert 250 * sum(k <= 50 for k in steps) > 50 * sum(k > 50 for k in steps)


def test_draw():
    data = torch.tensor([[-1.0, -1.0], [1.0, 1.0]])
    picture = main.draw("title", torch.tensor([[0.5, 0.5]]), "tab:orange", data)
    assert picture.shape == (396, 360, 3) and picture.dtype == np.uint8
    rows, columns = np.nonzero((abs(picture.astype(int) - (255, 127, 14)) < 20).all(axis=2))
    assert 230 < columns.mean() < 270 and 126 < rows.mean() < 166  # right of the middle, and above
    digits = torch.tensor([1.0] + [-1.0] * 25)[:, None].expand(26, 784)
    picture = main.draw("title", digits, "tab:orange", digits)
    assert (picture[60:80, 30:50] == 255).all() and (picture[350:370, 310:330] == 0).all()


# The script


@pytest.fixture(scope="session")
def heart_run(tmp_path_factory):
    """The folder of a run with default options but for the sizes, and the lines it printed."""
    out = tmp_path_factory.mktemp("heart") / "run"
    process = start(*SMALL.split(), "--output_dir", out)
    printed, errors = process.communicate(timeout=100)
    assert process.returncode == 0, errors
    return out, printed.decode().splitlines()


def test_run(heart_run):
    out, lines = heart_run
    names = ["model.pt", "process.gif", "run.json", "samples.npy", "samples.png", "training.gif"]
    assert sorted(os.listdir(out)) == names
    facts = json.loads((out / "run.json").read_text())
    distance, best = facts["energy distance"], facts["energy distance of real data"]
    assert facts["options"].items() >= {"dataset": "heart", "num_timesteps": 8, "seed": 0}.items()
    assert facts["torch"] == torch.__version__ and facts["seconds"] > 0
    assert lines[0] == f"device: {facts['options']['device']}, 1 CPU threads"
    assert lines[-1].endswith(f"to the data {distance:.4f}, of real data {best:.4f}")
    samples = torch.from_numpy(np.load(out / "samples.npy"))
    assert samples.shape == (2000, 2) and samples.dtype == torch.float32
    model, heart = main.load_checkpoint(out / "model.pt", "cpu"), main.heart()
    x = (samples - model["shift"]) / model["scale"]  # back to the units of the network
    x_0 = (heart - heart.mean(dim=0)) / heart.var(dim=0).mean().sqrt()
    assert main.energy_distance(x, x_0) == pytest.approx(distance, rel=0.02)
    assert 0.0002 < best < 0.02 and best < distance


def test_sampling_needs_only_the_checkpoint(heart_run, tmp_path):
    out, _ = heart_run
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    errors = start("--checkpoint", out / "model.pt", cwd=tmp_path).communicate(timeout=100)[1]
    folder = tmp_path / "outputs" / "heart_samples"
    assert (folder / "samples.npy").read_bytes() == before["samples.npy"], errors  # the same seed
    names = ["process.gif", "run.json", "samples.npy", "samples.png"]
    assert sorted(os.listdir(folder)) == names
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.parametrize("name", ["swiss_roll", "mnist"])
def test_other_data(name, files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(*TINY, "--dataset", name, "--data_dir", files)
    samples = np.load(f"outputs/{name}/samples.npy")
    expected = ((50, 28, 28), np.uint8) if name == "mnist" else ((50, 2), np.float32)
    assert (samples.shape, samples.dtype) == expected and samples.std() > 0


def test_own_points_and_the_seed(files, tmp_path):
    def result(name, seed, folder):
        out = tmp_path / folder
        run(*TINY, "--dataset", files / name, "--seed", seed, "--output_dir", out)
        weights = main.load_checkpoint(out / "model.pt", "cpu")["weights"]
        return np.load(out / "samples.npy"), torch.cat([w.flatten() for w in weights.values()])

    (x, weights), (x_again, weights_again) = (
        result("points.csv", 3, "a"),
        result("points.npy", 3, "b"),
    )
    model = (tmp_path / "b" / "model.pt").read_bytes()
    x_other, weights_other = result("points.npy", 4, "b")
    assert np.array_equal(x, x_again) and torch.equal(weights, weights_again)
    assert not np.array_equal(x, x_other) and not torch.equal(weights, weights_other)
    assert abs(x.mean(axis=0) - (5, -3)).max() < 5 and 2 < x.std() < 20  # in the units of the file
    assert (tmp_path / "b" / "model.old.pt").read_bytes() == model  # of the run before
    options = ["--checkpoint", tmp_path / "a/model.pt", "--seed", 4, "--output_dir", tmp_path / "c"]
    run(*TINY, *options)
    assert not np.array_equal(np.load(tmp_path / "c" / "samples.npy"), x)


def test_how_processes_end(files, tmp_path):
    """Ctrl-C ends the training early; the samples follow. An error is one line."""
    failing = start("--dataset", "spiral", cwd=tmp_path)
    options = ["--num_epochs", 1_000_000, "--dataset", files / "points.csv"]
    process, seen = start(*TINY, *options, "--output_dir", tmp_path), b""
    while b"loss=" not in seen:  # the progress bar
        seen += (more := os.read(process.stderr.fileno(), 4096))
        assert more, seen
    process.send_signal(signal.SIGINT)
    printed, errors = process.communicate(timeout=100)
    assert process.returncode == 0 and b"ends early" in printed, errors
    assert np.load(tmp_path / "samples.npy").shape == (50, 2)
    assert (tmp_path / "model.pt").exists() and (tmp_path / "training.gif").exists()
    errors = failing.communicate(timeout=100)[1].decode()
    assert errors.startswith("main.py: error: --dataset spiral: ") and errors.count("\n") == 1
    assert failing.returncode == 1 and not (tmp_path / "outputs").exists()


def test_as_a_notebook(tmp_path, monkeypatch):
    """Cell after cell, with the options that Jupyter leaves in sys.argv."""
    source = (ROOT / "main.py").read_text().replace("8000", "300")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "ipykernel", sys)
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel.json"])
    for flag, value in zip(TINY[::2], TINY[1::2], strict=True):  # these become the defaults
        value = value if value.isdigit() else f'"{value}"'
        source, found = re.subn(rf'("{flag}".*default=)\w+', rf"\g<1>{value}", source)
        assert found == 1
    scope = {"__name__": "__main__"}
    for cell in re.split(r"(?m)^(?=# %%)", source):
        exec(cell, scope)  # noqa: S102
    assert np.load("outputs/heart/samples.npy").shape == (50, 2)


def test_options_of_digits():
    """Their defaults, and the first command of this project, word for word."""
    command = (
        "--learning_rate 1e-3 --dataset mnist --train_batch_size 128 --eval_batch_size 10"
        " --num_epochs 200 --num_timesteps 1000 --embedding_size 100 --hidden_size 2048"
        " --hidden_layers 5 --show_image_step 50"
    )
    args, _ = main.parse_options(command.split())
    assert all(str(getattr(args, k)) == v for k, v in re.findall(r"--(\w+) ([a-z\d]+) ", command))
    sizes = (args.hidden_size, args.hidden_layers, args.embedding_size, args.num_timesteps)
    parameters = sum(p.numel() for p in main.MLP(784, *sizes).parameters())
    assert round(parameters / 1e6, 1) == 24.4 and args.learning_rate == 0.001
    points, digits = (vars(main.parse_options(["--dataset", k])[0]) for k in ("heart", "mnist"))
    assert digits == {**points, "dataset": "mnist", **main.DIGITS}
    assert (points["predict"], digits["predict"], args.predict) == ("eps", "x_0", "x_0")


# Bad input


class Evil:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


@pytest.fixture(scope="module")
def bad_files(heart_run, files, tmp_path_factory):
    """A folder with files that main.py must refuse."""
    folder, whole = tmp_path_factory.mktemp("bad"), (heart_run[0] / "model.pt").read_bytes()
    model = torch.load(io.BytesIO(whole), weights_only=True)
    contents = {
        "empty.csv": "",
        "letters.csv": "a,b\n" * 100,
        "columns.csv": "1,2,3\n" * 100,
        "nan.csv": "1,2\n2,1\n" * 100 + "nan,1\n",
        "few.csv": "1,2\n" * 50 + "2,1\n" * 49,
        "same.csv": "3,3\n" * 100,
        "empty.npy": "",
        "empty.pt": "",
        "text.pt": "hello",
        "file": "mine",
    }
    for name, text in contents.items():
        (folder / name).write_text(text)
    (folder / "truncated.pt").write_bytes(whole[: len(whole) // 2])
    torch.save({"model": {}, "dpm_2015.py": {"dataset": "heart"}}, folder / "other_script.pt")
    torch.save({**model, "scale": Evil()}, folder / "evil.pt")
    torch.save({k: v for k, v in model.items() if k != "scale"}, folder / "no_scale.pt")
    np.save(folder / "points.npy", np.load(files / "points.npy"))
    return folder


COUNTS = "num_timesteps embedding_size hidden_size hidden_layers train_batch_size num_epochs"
BAD = [f"--{name} {v}" for name in COUNTS.split() for v in ("0", "-2", "1000002", "many", "2.5")]
BAD += [f"--learning_rate {value}" for value in ("0", "-1", "nan", "inf", "fast")]
BAD += ["--eval_batch_size 0", "--show_image_step 0", "--threads 0", "--seed x", "--colour red"]
BAD += ["--embedding_size 7", "--predict v", "--device abacus"]
POINTS = "spiral missing.csv missing.npy empty.csv letters.csv columns.csv nan.csv few.csv same.csv"
BAD += [f"--dataset {name}" for name in [*POINTS.split(), "empty.npy", "file", "mnist"]]
MODELS = "missing.pt text.pt empty.pt other_script.pt evil.pt no_scale.pt . truncated.pt"
BAD += [f"--checkpoint {name}" for name in ["", *MODELS.split()]]
BAD += [f"--dataset points.npy --output_dir {name}" for name in ("file", "file/out")]


@pytest.mark.filterwarnings("ignore:loadtxt")
@pytest.mark.parametrize("options", BAD)
def test_bad_input(options, bad_files, monkeypatch):
    """One line names what is wrong, and nothing is written."""
    from torchvision.datasets import MNIST

    monkeypatch.setattr(MNIST, "mirrors", ["http://127.0.0.1:9/"])
    monkeypatch.chdir(bad_files)
    before = {path.name for path in bad_files.iterdir()}
    line = refusal(*TINY, *options.split(" "))
    assert options.split(" ")[-1].split("/")[0] in line
    if options in ("--dataset spiral", "--dataset missing.csv"):
        assert "heart, swiss_roll, a .npy or .csv" in line
    if options == "--dataset mnist":  # there is no network
        assert "{train,t10k}-{images-idx3,labels-idx1}-ubyte into DATA_DIR/MNIST/raw" in line
    assert {path.name for path in bad_files.iterdir()} - before <= {"data"}
    assert (bad_files / "file").read_text() == "mine"
