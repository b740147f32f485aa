"""Tests of main.py: its mathematics, its training and animation step by step, and small runs."""

import inspect
import json
import re
import sys
from types import SimpleNamespace
from unittest.mock import Mock

import conftest
import figures
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import BAD_CHECKPOINTS, content, digits, error_of, exact_schedule, run_script
from numpy.testing import assert_allclose
from torch.testing import assert_close

import main

TINY = "--num_timesteps 8 --embedding_size 8 --hidden_size 16 --hidden_layers 1 --num_epochs 1 "
TINY += "--num_samples 50 --show_image_step 8 --device cpu"
CENTRES = torch.tensor([[-1.5, -0.5], [-0.5, 1.0], [0.0, -1.0], [0.8, 0.9], [1.2, -0.4]])
both_targets = pytest.mark.parametrize("predict", ["eps", "x_0"])


def best_network(T, data, predict):
    """Return the network with the least loss, if the data are these few points (N, D)."""
    alpha_bars = torch.tensor(exact_schedule(T)[1]).float()

    def network(x_t, t):
        signal = alpha_bars[t, None].sqrt()  # (B, 1)
        noise_std = (1 - alpha_bars[t, None]).sqrt()
        distances = (x_t[:, None] - signal[:, None] * data).square().sum(dim=2)  # (B, N)
        probabilities = (-distances / (2 * noise_std**2)).softmax(dim=1)  # Bayes' rule
        x_0 = probabilities @ data
        return x_0 if predict == "x_0" else (x_t - signal * x_0) / noise_std

    return network


@pytest.mark.parametrize("T", [20, 200, 1000, 4000])
def test_schedule(T):
    """The tables of eq. 4 against eq. 2, one step at a time: mean and variance, from x_0 = 1."""
    betas, _ = exact_schedule(T)
    means, variances = [1.0], [0.0]
    for beta in betas[1:]:
        means.append(np.sqrt(1 - beta) * means[-1])
        variances.append((1 - beta) * variances[-1] + beta)
    schedule = main.make_schedule(T)
    assert_allclose(schedule.betas, betas, rtol=1e-6)
    assert_allclose(schedule.signal, means, rtol=1e-6)
    assert_allclose(schedule.noise_std**2, variances, rtol=1e-6)


@both_targets
def test_loss_is_algorithm_1(predict):
    """The loss of a batch against lines 3 to 5 in float64, with the same t and noise."""
    x_0 = CENTRES.repeat(20, 1)
    network = main.MLP(2, 16, 1, 8, 50)
    torch.manual_seed(0)
    loss = main.loss_simple(network, main.make_schedule(50), x_0, predict)
    torch.manual_seed(0)
    t = torch.randint(1, 51, (100,))
    eps = torch.randn(100, 2)
    alpha_bar = torch.tensor(exact_schedule(50)[1])[t, None]
    x_t = alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * eps
    target = {"eps": eps, "x_0": x_0}[predict]
    expected = (network(x_t.float(), t) - target).square().mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)


@both_targets
@pytest.mark.parametrize("t", [2, 5, 30, 50])
@pytest.mark.parametrize("predicted", [0.7, 9.0, -9.0])
def test_p_sample_is_bayes_rule(monkeypatch, predict, t, predicted):
    """For a guess of x_0, clipped to 1.5, against q(x_{t-1} | x_t, x_0) on a grid of x_{t-1}."""
    noise = torch.tensor([[0.0], [1.0]])
    monkeypatch.setattr(torch, "randn_like", lambda x: noise)
    network = best_network(50, torch.tensor([[predicted]]), predict)
    x_t = torch.full((2, 1), -0.4)
    found = main.p_sample(network, main.make_schedule(50), x_t, t, predict, limit=1.5)

    betas, alpha_bars = exact_schedule(50)
    beta, alpha_bar = betas[t], alpha_bars[t - 1]
    grid = np.arange(-8, 8, 2e-4)
    from_start = (grid - np.sqrt(alpha_bar) * np.clip(predicted, -1.5, 1.5)) ** 2 / (1 - alpha_bar)
    one_step = (-0.4 - np.sqrt(1 - beta) * grid) ** 2 / beta
    weights = np.exp(-(from_start + one_step) / 2)
    mean = np.average(grid, weights=weights)
    variance = np.average((grid - mean) ** 2, weights=weights)
    assert found[0].item() == pytest.approx(mean, abs=1e-4)
    assert (found[1] - found[0]).item() == pytest.approx(np.sqrt(variance), rel=1e-3)


def test_p_sample_loop_is_algorithm_2():
    """Each step against the paper's line 4 in float64, with the same noise and no clipping."""
    network = best_network(50, CENTRES, "eps")
    torch.manual_seed(0)
    chain = main.p_sample_loop(network, main.make_schedule(50), (100, 2), "eps", limit=1e9)
    steps, states = zip(*chain)
    assert steps == tuple(range(50, -1, -1))

    torch.manual_seed(0)
    assert_close(states[0], torch.randn(100, 2))  # line 1
    betas, alpha_bars = exact_schedule(50)
    for t, x_t, x_prev in zip(steps, states, states[1:]):
        eps = network(x_t, torch.full((100,), t))
        mean = x_t - betas[t] / np.sqrt(1 - alpha_bars[t]) * eps
        beta_tilde = (1 - alpha_bars[t - 1]) / (1 - alpha_bars[t]) * betas[t]
        expected = mean / np.sqrt(1 - betas[t]) + np.sqrt(beta_tilde) * torch.randn(100, 2)
        assert_close(x_prev, expected, rtol=1e-4, atol=1e-4)


@both_targets
def test_samples_of_the_best_network_are_the_data(predict):
    """Of 2000 samples, each lies on one of five points, and about 400 on each."""
    torch.manual_seed(0)
    network = best_network(200, CENTRES, predict)
    *_, (_, x) = main.p_sample_loop(network, main.make_schedule(200), (2000, 2), predict, 1.5)
    distances, nearest = torch.cdist(x, CENTRES).min(dim=1)
    assert distances.max() < 0.01
    exact = figures.exact_eps(main.make_schedule(200), CENTRES)
    expected = best_network(200, CENTRES, "eps")(x, torch.full((2000,), 50))
    assert_close(exact(x, torch.full((2000,), 50)), expected, rtol=1e-3, atol=1e-3)
    assert (nearest.bincount() - 400).abs().max() < 90


@pytest.mark.parametrize("D", [2, 784])
def test_network(D):
    """The network against its formula, written out with its own linear layers."""

    def waves(x, scale):
        frequencies = scale * torch.tensor([1, 10_000 ** (-1 / 3), 10_000 ** (-2 / 3), 1e-4])
        angles = x[:, None] * frequencies
        return [angles.sin(), angles.cos()]

    torch.manual_seed(0)
    model = main.MLP(D, 16, 2, 8, 200)
    x_t = torch.randn(3, D)
    t = torch.tensor([1, 8, 200])
    inputs = [*waves(x_t[:, 0], 25.0), *waves(x_t[:, 1], 25.0)] if D == 2 else [x_t]
    inputs += waves(t - 1, 5.0)  # of 200 steps, t is embedded as 5 (t - 1) of 1000
    first, *hidden, last = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    h = F.silu(first(torch.cat(inputs, dim=1)))
    for layer in hidden:
        h = h + F.silu(layer(F.layer_norm(h, (16,))))
    assert_close(model(x_t, t), last(F.layer_norm(h, (16,))), rtol=1e-3, atol=1e-4)


def test_heart_and_swiss_roll():
    """The points against the formulas of the curves. The roll has noise of 0.01 besides."""
    u = np.linspace(0, 2 * np.pi, 8000)
    y = 13 * np.cos(u) - 5 * np.cos(2 * u) - 2 * np.cos(3 * u) - np.cos(4 * u)
    assert_allclose(main.heart().T, [16 / 5 * np.sin(u) ** 3, y / 5], atol=1e-4)
    u = np.linspace(1.5 * np.pi, 4.5 * np.pi, 8000)
    noise = main.swiss_roll().T.numpy() - [u * np.cos(u) / 10, u * np.sin(u) / 10]
    assert_allclose((noise**2).mean(axis=1), 0.01**2, rtol=0.1)


def test_standardised_points():
    """Mean 0, and variance 1 on average. One scale for both coordinates keeps the shape."""
    data = main.load_data("swiss_roll", "no folder")
    x_0, shift, scale = main.standardise(data)
    assert x_0.mean(dim=0).abs().max() < 1e-4
    assert x_0.var(dim=0).mean().item() == pytest.approx(1, rel=1e-4)
    assert_close(x_0.std(dim=0) / x_0[:, 0].std(), data.std(dim=0) / data[:, 0].std())
    assert_close(x_0 * scale + shift, data, rtol=1e-4, atol=1e-4)


def test_training(monkeypatch, tmp_path):
    """The learning rate rises and falls, gradients are clipped, an epoch uses each example once."""
    batches, losses, plots = [], [], []
    steps = []  # the learning rate, and the length of the gradient

    def watched_loss(model, schedule, batch, predict):
        batches.append(batch[:, 0])
        loss = 1000 * model(batch, torch.ones(len(batch))).square().mean()  # a large gradient
        losses.append(loss.item())
        return loss

    def watched_step(optimizer):
        group = optimizer.param_groups[0]
        gradients = [parameter.grad for parameter in group["params"]]
        steps.append((group["lr"], torch.nn.utils.get_total_norm(gradients)))

    monkeypatch.setattr(main, "loss_simple", watched_loss)
    monkeypatch.setattr(torch.optim.Adam, "step", watched_step)
    monkeypatch.setattr("matplotlib.axes.Axes.plot", lambda _, *args, **__: plots.append(args[0]))
    x_0 = torch.randn(50, 2)
    config = SimpleNamespace(predict="eps", limit=2.0, examples=x_0, dim=2)
    config.num_epochs, config.train_batch_size, config.learning_rate = 8, 20, 0.01
    network, path = main.MLP(2, 16, 1, 8, 4), tmp_path / "loss.png"
    pictures = main.train(network, main.make_schedule(4), x_0, config, path)
    rates = [0.002, 0.004, 0.006, 0.00625, 0.005, 0.00375, 0.0025, 0.00125]
    expected = [(rate, 1.0) for rate in np.repeat(rates, 3)]  # batches of 20, 20 and 10 examples
    assert_allclose(steps, expected, rtol=1e-3)
    epochs = torch.cat(batches).view(8, 50)
    assert not torch.equal(epochs[0], epochs[1])
    assert_close(epochs.sort().values, x_0[:, 0].sort().values.expand(8, 50))
    assert len(pictures) == 2  # after 0 and 3 epochs
    assert plots[-1] == losses[2::3] and path.exists()  # of the last batch of each epoch


def test_animation(monkeypatch):
    """What each frame shows, and for how long, against eq. 4 and the network's inputs."""
    states = {}

    def network(x_t, t):
        states[t[0].item()] = x_t
        return x_t / 2

    monkeypatch.setattr(main, "draw", lambda title, x, colour, data: x)
    x_0 = torch.randn(1000, 2)
    config = SimpleNamespace(predict="x_0", limit=0.5, examples=x_0, dim=2)
    states[0], frames, times = main.animate(network, main.make_schedule(20), config, 30, every=3)
    assert_close(states[0], (states[1] / 2).clamp(-0.5, 0.5))  # the last guess, without noise
    signal = np.sqrt(exact_schedule(20)[1])
    noise_std = np.sqrt(1 - signal**2)
    eps = (frames[7] - signal[20] * x_0) / noise_std[20]  # must be the same in all frames
    assert eps.std().item() == pytest.approx(1, rel=0.1)
    for k, t in enumerate([0, 3, 6, 9, 12, 15, 18, 20]):
        x_t = signal[t] * x_0 + noise_std[t] * eps
        assert_close(frames[k], x_t, rtol=0, atol=1e-3)
        assert torch.equal(frames[15 - k], states[t])
    assert times == [250, 250, *[80] * 12, 250, 3000]


def samples_of(folder, *options):
    """Return the samples of a small run of main.py that writes to this folder."""
    run_script("main.py", *TINY.split(), "--output_dir", folder, *options)
    return np.load(folder / "samples.npy")


@pytest.fixture(scope="module")
def heart_dir(tmp_path_factory):
    """The folder of a small training on the heart."""
    folder = tmp_path_factory.mktemp("runs") / "heart"
    samples_of(folder)
    return folder


def test_training_run(heart_dir):
    """Its files, and the energy distance in run.json against its definition."""
    names = {"process.gif", "samples.png", "samples.npy", "run.json"}
    assert set(content(heart_dir)) == names | {"model.pt", "training.gif", "loss.png"}
    assert conftest.gif_milliseconds(heart_dir / "process.gif") == [250, 80, 80, 3000]
    facts = json.loads((heart_dir / "run.json").read_text())
    config = torch.load(heart_dir / "model.pt")["config"]
    x = (torch.from_numpy(np.load(heart_dir / "samples.npy")) - config["shift"]) / config["scale"]
    data = config["examples"]
    distance = (2 * torch.cdist(x, data).mean() - torch.cdist(x, x).mean()).item()
    distance -= torch.cdist(data, data).mean().item()
    assert facts["energy distance"] == pytest.approx(distance, rel=1e-3)
    assert 0 < facts["energy distance of real data"] < distance
    assert config["limit"] == config["examples"].abs().max()


def test_sampling_from_a_checkpoint(heart_dir, tmp_path, monkeypatch):
    """The same seed gives the same samples, another seed others. The training stays untouched."""
    before = content(heart_dir)
    monkeypatch.chdir(tmp_path)
    options = ["--checkpoint", heart_dir / "model.pt", "--num_samples", 50, "--device", "cpu"]
    run_script("main.py", *options)
    after = content(tmp_path / "outputs/heart_samples")
    assert set(after) == {"process.gif", "samples.png", "samples.npy", "run.json"}
    assert after["samples.npy"] == before["samples.npy"]
    other = samples_of(tmp_path / "other", *options, "--seed", 1)
    assert not np.array_equal(other, np.load(heart_dir / "samples.npy"))
    assert content(heart_dir) == before


def test_own_points_and_seeds(tmp_path, monkeypatch):
    """.csv and .npy give the same samples, another seed another model; the earlier one is kept."""
    monkeypatch.chdir(tmp_path)
    points = np.random.default_rng(0).normal((50, -30), (9, 5), (200, 2))
    np.savetxt("points.csv", points, delimiter=",")
    np.save("points.npy", points)
    csv = samples_of(tmp_path / "csv", "--dataset", "points.csv", "--seed", 3)
    npy = samples_of(tmp_path / "npy", "--dataset", "points.npy", "--seed", 3)
    assert np.array_equal(csv, npy)
    assert_allclose(csv.mean(axis=0), (50, -30), atol=9)  # in units of the file
    samples_of(tmp_path / "npy", "--dataset", "points.npy", "--seed", 4)
    old, new = (torch.load(path)["weights"] for path in tmp_path.glob("npy/model*.pt"))
    assert not torch.equal(old["first.weight"], new["first.weight"])


def test_digits(mnist_dir, tmp_path):
    """Training sees levels of -1 (black) to 1, samples are grey levels; and the defaults."""
    x_0, _, _ = main.standardise(main.load_data("mnist", mnist_dir))
    assert_close(x_0, digits("train")[0].flatten(1) / 127.5 - 1)
    samples = samples_of(tmp_path, "--dataset", "mnist", "--data_dir", mnist_dir)
    assert (samples.shape, samples.dtype) == ((50, 28, 28), np.uint8)
    assert samples.max() > 200
    options = main.parse_options(["--dataset", "mnist", "--hidden_layers", "5"])
    assert (options.predict, options.hidden_size, options.hidden_layers) == ("x_0", 768, 5)


def test_ctrl_c_ends_the_training(tmp_path, monkeypatch, capsys):
    """What Ctrl-C raises, in the first step of training. The samples follow."""
    monkeypatch.setattr(torch.optim.Adam, "step", Mock(side_effect=KeyboardInterrupt))
    assert samples_of(tmp_path).shape == (50, 2)
    assert "ends early" in capsys.readouterr().out


def test_as_a_notebook(tmp_path, monkeypatch):
    """The cells run in order, with the options that Jupyter leaves in sys.argv."""
    source = inspect.getsource(main)
    for old, new in [(" 240,", " 1,"), (" 200,", " 8,"), ("default=device", "default='cpu'")]:
        source = source.replace(old, new)  # a small run
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel.json"])
    scope = {"__name__": "__main__"}
    for cell in re.split("\n(?=# %%)", source):
        exec(cell, scope)  # noqa: S102
    assert np.load("outputs/heart/samples.npy").shape == (2000, 2)


BAD_FILES = {
    "letters.csv": "a,b\n" * 100,
    "columns.csv": "1,2,3\n" * 100 + "3,2,1\n",
    "few.csv": "1,2\n" + "2,1\n" * 98,
    "same.csv": "1,2\n" * 100,
    "nan.csv": "1,2\n" * 100 + "nan,1\n",
    "far.csv": "5e6,1\n5e6,2\n" * 50,
}
BAD = [f"--dataset {name}" for name in [*BAD_FILES, "mnist", "missing.npy"]]
BAD += [f"--checkpoint {name}.pt" for name in BAD_CHECKPOINTS]
BAD += ["--num_epochs 0", "--num_epochs 10001", "--learning_rate nan", "--predict noise"]
BAD += ["--embedding_size 7", "--output_dir file"]


@pytest.mark.parametrize("options", BAD)
def test_bad_input(options, heart_dir, tmp_path, capsys):
    """One line names the option or its value, and nothing is written."""
    conftest.write_bad_checkpoints(tmp_path, heart_dir / "model.pt", "weights")
    for name, text in BAD_FILES.items():
        (tmp_path / name).write_text(text)
    flag, value = options.split()
    line = error_of("main.py", [*TINY.split(), flag, value], tmp_path, capsys)
    assert flag in line or value in line
    assert not (tmp_path / "pwned").exists()  # made by code in evil.pt
