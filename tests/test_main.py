"""Tests of main.py.

The mathematics is compared with closed forms in float64, with Bayes' rule on a grid, and with the
exact best network, which is known where the data are a few points or a normal distribution.
Training and pictures are watched while they run. The script itself runs as a user runs it, tiny,
on good and on bad input: mostly inside this process, to save the seconds that torch needs to start.
"""

import gzip
import json
import os
import re
import runpy
import signal
import subprocess
import sys
from math import cos, sin, sqrt
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import main

torch.set_num_threads(1)
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


def closed_form(T):
    """Return the schedule, and alpha_bars, in float64; for T = 1000 it is the paper's."""
    betas = np.minimum(np.linspace(1e-4, 0.02, T) * 1000 / T, 0.999)
    alpha_bars = np.cumprod(1 - betas)
    signal, noise_std = np.sqrt(alpha_bars), np.sqrt(1 - alpha_bars)
    posterior_std = np.sqrt(betas * np.append(0.0, 1 - alpha_bars[:-1]) / (1 - alpha_bars))  # eq. 7
    coef_x_0 = np.append(1.0, signal[:-1]) * betas / (1 - alpha_bars)
    coef_x_t = posterior_std**2 / betas * np.sqrt(1 - betas)
    return SimpleNamespace(**locals())


def best_network(T, data, predict):
    """Return the exact best prediction for data (N, D), each as likely: an average of them."""
    alpha_bars = torch.tensor(closed_form(T).alpha_bars).float()

    def model(x_t, t):
        signal, noise_std = alpha_bars[t, None].sqrt(), (1 - alpha_bars[t, None]).sqrt()
        distances = (x_t[:, None] - signal[:, None] * data).square().sum(dim=2)  # (B, N)
        x_0_hat = (-distances / (2 * noise_std**2)).softmax(dim=1) @ data
        return x_0_hat if predict == "x_0" else (x_t - signal * x_0_hat) / noise_std

    return model


@pytest.mark.parametrize("T", [20, 50, 200, 1000, 4000])
def test_schedule_and_q_sample(T):
    schedule, exact, t = main.make_schedule(T), closed_form(T), torch.arange(T)
    for name, values in vars(schedule).items():  # float32 would lose digits at small t
        np.testing.assert_allclose(values, vars(exact)[name], rtol=1e-6, err_msg=name)
    assert schedule.signal[-1] < 0.01  # x_T is noise
    zeros, ones, expected = torch.zeros(T, 1), torch.ones(T, 1), [(1.0, 0.0)]
    for beta in exact.betas:  # eq. 2, one step at a time: mean and variance of x_t, from x_0 = 1
        mean, variance = expected[-1]
        expected.append((sqrt(1 - beta) * mean, (1 - beta) * variance + beta))
    found = [main.q_sample(schedule, ones, t, zeros), main.q_sample(schedule, zeros, t, ones) ** 2]
    np.testing.assert_allclose(torch.cat(found, dim=1), expected[1:], rtol=1e-4)


@BOTH
@pytest.mark.parametrize("step", [0, 1, 5, 30, 49])
@pytest.mark.parametrize(("predicted", "used"), [(0.7, 0.7), (9.0, 1.5), (-9.0, -1.5)])
def test_p_sample_is_bayes_rule(monkeypatch, predict, step, predicted, used):
    """With a network that predicts one x_0, clipped to 1.5, it is q(x_{t-1} | x_t, x_0)."""
    model, x_t = best_network(50, torch.tensor([[predicted]]), predict), torch.full((2, 1), -0.4)
    monkeypatch.setattr(torch, "randn_like", lambda x: torch.tensor([[0.0], [1.0]]))
    found, one_up = main.p_sample(model, main.make_schedule(50), x_t, step, predict, 1.5).flatten()
    mean, std = used, 0.0
    if step > 0:
        exact, x = closed_form(50), np.arange(-8, 8, 2e-4)
        beta, alpha_bar = exact.betas[step], exact.alpha_bars[step - 1]
        log_density = -((x - sqrt(alpha_bar) * used) ** 2) / (1 - alpha_bar)  # q(x_{t-1} | x_0)
        log_density -= (-0.4 - sqrt(1 - beta) * x) ** 2 / beta  # q(x_t | x_{t-1})
        weights = np.exp((log_density - log_density.max()) / 2)
        mean = np.average(x, weights=weights)
        std = sqrt(np.average((x - mean) ** 2, weights=weights))
    assert found.item() == pytest.approx(mean, abs=1e-4)
    assert (one_up - found).item() == pytest.approx(std, rel=1e-3)


def test_p_sample_loop_is_algorithm_2_as_printed(monkeypatch):
    """For x_0 ~ N(m, s^2) the best eps is linear, so mean and variance follow from line 4 too."""
    T, m, s, n, exact = 50, 0.8, 0.5, 50_000, closed_form(50)
    calls, noises, mean, variance, randn_like = [], [], 0.0, 1.0, torch.randn_like

    def best_eps(x, t):
        calls.append(t)
        variance = exact.alpha_bars[t] * s**2 + 1 - exact.alpha_bars[t]
        return exact.noise_std[t] * (x - exact.signal[t] * m) / variance

    def line_4(x, t):
        eps_term = exact.betas[t] / sqrt(1 - exact.alpha_bars[t]) * best_eps(x, t)
        return (x - eps_term) / sqrt(1 - exact.betas[t])

    monkeypatch.setattr(torch, "randn_like", lambda x: noises.append(randn_like(x)) or noises[-1])
    torch.manual_seed(0)
    model = lambda x_t, t: best_eps(x_t, t.unique().item())
    steps, states = zip(*main.p_sample_loop(model, main.make_schedule(T), (n, 1), "eps", 1e9))
    assert steps == tuple(range(T, -1, -1)) and calls == list(steps[1:])
    for t, x_t, x, z in zip(steps[1:], states, states[1:], noises):
        std, slope = exact.posterior_std[t], line_4(1, t) - line_4(0, t)
        torch.testing.assert_close(x, line_4(x_t, t) + std * z, rtol=1e-4, atol=1e-4)
        mean, variance = line_4(mean, t), slope**2 * variance + std**2
        assert x.mean().item() == pytest.approx(mean, abs=6 * sqrt(variance / n))
        assert x.var().item() == pytest.approx(variance, rel=6 * sqrt(2 / n))
    assert mean == pytest.approx(m, abs=1e-3)


@BOTH
def test_the_best_network(predict):
    """Its samples are the data, and its loss is the lowest."""

    def loss(model, data):
        torch.manual_seed(0)
        return main.loss_simple(model, schedule, data.repeat(1000, 1), predict).item()

    best, schedule, one = best_network(200, CENTRES, predict), main.make_schedule(200), CENTRES[:1]
    for factor in (0, 0.9, 1.1):
        other = lambda x_t, t, factor=factor: factor * best(x_t, t)
        assert 0 < loss(best, CENTRES) < loss(other, CENTRES)
    assert loss(best_network(200, one, predict), one) < 1e-6  # there is nothing to guess
    *_, (_, x) = main.p_sample_loop(best, schedule, (2000, 2), predict, 1.5)
    distances, nearest = torch.cdist(x, CENTRES).min(dim=1)
    assert distances.max() < 0.01 and (nearest.bincount(minlength=5) - 400).abs().max() < 90


def test_loss_draws_every_t_and_fresh_noise():
    n, schedule, seen = 20_000, main.make_schedule(10), []
    torch.manual_seed(0)
    for _ in range(2):
        main.loss_simple(lambda *x: seen.append(x) or x[0], schedule, torch.zeros(n, 2), "eps")
    (x_t, t), (x_t_again, _) = seen
    counts, eps = t.bincount(minlength=10), x_t / torch.tensor(closed_form(10).noise_std)[t, None]
    assert len(counts) == 10 and ((counts - n / 10) ** 2 / (n / 10)).sum() < 30  # chi-square
    assert eps.mean(dim=0).abs().max() < 0.04 and (eps.std(dim=0) - 1).abs().max() < 0.04
    assert abs((eps[1:] * eps[:-1]).mean()) < 0.04 and not torch.equal(x_t, x_t_again)
    for name, options in (("loss_simple", ["v"]), ("p_sample", [3, "v", 1.0])):
        with pytest.raises(KeyError):  # there is no prediction of v
            getattr(main, name)(lambda x, t: x, schedule, torch.zeros(1, 2), *options)


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
    assert model(x_t, t).shape == (B, D)
    torch.testing.assert_close(model(x_t, t), last(norm(h)), rtol=1e-3, atol=1e-4)


def test_heart_and_swiss_roll():
    u, v = np.linspace(0, 2 * np.pi, 8000), np.linspace(1.5 * np.pi, 4.5 * np.pi, 8000)
    y = 13 * np.cos(u) - 5 * np.cos(2 * u) - 2 * np.cos(3 * u) - np.cos(4 * u)
    np.testing.assert_allclose(main.heart().T, [16 / 5 * np.sin(u) ** 3, y / 5], atol=1e-4)
    noise = main.swiss_roll().numpy().T - np.stack((v * np.cos(v), v * np.sin(v))) / 10
    assert abs(noise.std(axis=1) - 0.01).max() < 5e-4 and abs(noise.mean(axis=1)).max() < 6e-4


@pytest.mark.parametrize("name", ["heart", "swiss_roll", "points.csv", "mnist"])
def test_standardise(name, files):
    data = main.load_data(str(files / name) if "." in name else name, files)
    x_0, shift, scale = main.standardise(data)
    torch.testing.assert_close(x_0 * scale + shift, data, rtol=1e-4, atol=1e-4)
    if name == "mnist":
        raw = (files / "MNIST/raw/train-images-idx3-ubyte").read_bytes()[16:]
        np.testing.assert_array_equal(data.flatten(), np.frombuffer(raw, np.uint8))
        assert x_0.shape == (800, 784) and x_0.min() == -1 and x_0.max() == 1
    else:
        assert len(x_0) >= 8000 and x_0.mean(dim=0).abs().max() < 1e-4
        assert x_0.square().sum(dim=1).mean().item() == pytest.approx(2, rel=1e-3)  # as N(0, I)


def test_energy_distance():
    a, b = np.random.default_rng(0).normal(size=(2, 5, 3))
    mean = lambda a, b: np.mean([sqrt(((x - y) ** 2).sum()) for x in a for y in b])
    found = main.energy_distance(torch.tensor(a), torch.tensor(b))
    assert found == pytest.approx(2 * mean(a, b) - mean(a, a) - mean(b, b))
    assert main.energy_distance(CENTRES, CENTRES) == pytest.approx(0, abs=1e-6)
    assert main.energy_distance(torch.zeros(4, 2), torch.tensor([[3.0, 4.0]])) == 10  # 5 apart


def test_training(monkeypatch, tmp_path):
    """The learning rate rises and falls, gradients are clipped, an epoch uses each example once."""
    rates, norms, batches, model, x_0 = [], [], [], main.MLP(2, 16, 1, 8, 4), torch.randn(50, 2)
    loss_simple, adam_step = main.loss_simple, torch.optim.Adam.step

    def watched_loss(model, schedule, batch, predict):
        batches.append(batch[:, 0].tolist())
        return 1000 * loss_simple(model, schedule, batch, predict)  # makes all gradients large

    def watched_step(adam):
        rates.append(adam.param_groups[0]["lr"])
        norms.append(torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item())
        adam_step(adam)

    monkeypatch.setattr(main, "loss_simple", watched_loss)
    monkeypatch.setattr(torch.optim.Adam, "step", watched_step)
    config = {"predict": "eps", "limit": 2.0, "examples": x_0}
    main.train(model, main.make_schedule(4), x_0, config, tmp_path, 8, 20, 0.01)
    expected = [0.002, 0.004, 0.006, 0.00625, 0.005, 0.00375, 0.0025, 0.00125]
    assert rates == pytest.approx(np.repeat(expected, 3))  # batches of 20, 20 and 10 examples
    assert norms == pytest.approx([1] * 24, rel=1e-3)
    epochs = [batches[k] + batches[k + 1] + batches[k + 2] for k in range(0, 24, 3)]
    assert all(sorted(epoch) == sorted(x_0[:, 0].tolist()) for epoch in epochs)
    assert epochs[0] != epochs[1] and sorted(os.listdir(tmp_path)) == ["model.pt", "training.gif"]


def test_a_failing_write_leaves_the_earlier_model(monkeypatch, tmp_path):
    (tmp_path / "model.pt").write_text("earlier")
    monkeypatch.setattr(torch, "save", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main.save_checkpoint(tmp_path / "model.pt", torch.nn.Linear(1, 1), {})
    assert (tmp_path / "model.pt").read_text() == "earlier"


def test_animation(monkeypatch, tmp_path):
    """Titles, the noise that each frame shows, and the time that each frame stays."""
    frames, states, exact, x_0 = [], {}, closed_form(20), torch.randn(1000, 2)

    def watched_draw(title, x, colour, data):
        frames.append((title, x))
        return np.full((8, 8, 3), 8 * len(frames), np.uint8)

    monkeypatch.setattr(main, "draw", watched_draw)
    model = lambda x_t, t: states.update({t[0].item() + 1: x_t}) or x_t / 2
    config, schedule = {"predict": "eps", "limit": 2.0, "examples": x_0}, main.make_schedule(20)
    states[0] = main.animate(model, schedule, config, tmp_path, 30, 3)
    steps, (titles, shown) = [0, 3, 6, 9, 12, 15, 18, 20], zip(*frames)
    assert titles[:8] == ("data", *(f"adding noise: step {k}" for k in steps[1:]))
    assert titles[8:] == tuple(f"removing noise: {k} left" for k in steps[::-1])
    for k, x_t in zip(steps[1:], shown[1:8]):  # the same eps in all; k steps end with t = k - 1
        eps = (x_t - exact.signal[k - 1] * x_0) / exact.noise_std[k - 1]
        torch.testing.assert_close(eps, (shown[7] - exact.signal[19] * x_0), rtol=0, atol=1e-3)
    assert torch.equal(shown[0], x_0) and abs(eps.std() - 1) < 0.1 and len(states[0]) == 30
    assert all(torch.equal(states[k], x) for k, x in zip(steps[::-1], shown[8:]))
    with Image.open(tmp_path / "process.gif") as gif:
        durations = [gif.seek(k) or gif.info["duration"] for k in range(gif.n_frames)]
        assert gif.info["loop"] == 0  # for ever
    assert durations == [250, 250, *[50] * 12, 250, 3000]
    assert (np.array(Image.open(tmp_path / "samples.png")) == 8 * 16).all()  # the last frame


def test_draw():
    picture = main.draw("title", torch.tensor([[0.5, 0.5]]), "tab:orange", torch.eye(2))
    assert picture.shape == (396, 360, 3) and picture.dtype == np.uint8
    rows, columns = np.nonzero((abs(picture.astype(int) - (255, 127, 14)) < 20).all(axis=2))
    assert 230 < columns.mean() < 270 and 126 < rows.mean() < 166  # right of the middle, and above
    digits = torch.tensor([1.0] + [-1.0] * 25)[:, None].expand(26, 784)
    picture = main.draw("title", digits, "tab:orange", digits)
    assert (picture[60:80, 30:50] == 255).all() and (picture[350:370, 310:330] == 0).all()


def start(*options, **keywords):
    """Start main.py in a process of its own."""
    command, pipe = map(str, (sys.executable, ROOT / "main.py", *options)), subprocess.PIPE
    keywords["env"] = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(list(command), stdout=pipe, stderr=pipe, **keywords)


def run(*options):
    """Run main.py from its first line to its last in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["main.py", *map(str, options)])
        runpy.run_path(str(ROOT / "main.py"), run_name="__main__")


@pytest.fixture(scope="session")
def heart_run(tmp_path_factory):
    """The folder of a run with default options but for the sizes, and the lines it printed."""
    out = tmp_path_factory.mktemp("heart") / "run"
    printed, errors = start(*SMALL.split(), "--output_dir", out).communicate(timeout=100)
    return out, printed.decode().splitlines() or errors


def test_training_run(heart_run):
    out, lines = heart_run
    facts = json.loads((out / "run.json").read_text())
    distance, best = facts["energy distance"], facts["energy distance of real data"]
    assert facts["options"].items() >= {"dataset": "heart", "num_timesteps": 8, "seed": 0}.items()
    assert facts["torch"] == torch.__version__ and facts["seconds"] > 0
    assert lines[0] == f"device: {facts['options']['device']}, 1 CPU threads"
    assert lines[-1].endswith(f"to the data {distance:.4f}, of real data {best:.4f}")
    samples, heart = torch.from_numpy(np.load(out / "samples.npy")), main.heart()
    assert samples.shape == (2000, 2) and samples.dtype == torch.float32
    a, b = ((x - heart.mean(dim=0)) / heart.var(dim=0).mean().sqrt() for x in (samples, heart))
    assert main.energy_distance(a, b) == pytest.approx(distance, rel=0.02)
    assert 0.0002 < best < 0.02 and best < distance


def test_sampling_needs_only_the_checkpoint(heart_run, tmp_path):
    before = {path.name: path.read_bytes() for path in heart_run[0].iterdir()}
    process = start("--checkpoint", heart_run[0] / "model.pt", cwd=tmp_path)
    errors, folder = process.communicate(timeout=100)[1], tmp_path / "outputs" / "heart_samples"
    assert (folder / "samples.npy").read_bytes() == before["samples.npy"], errors  # the same seed
    names = {"process.gif", "run.json", "samples.npy", "samples.png"}
    assert {*os.listdir(folder)} == names and {*before} == names | {"model.pt", "training.gif"}
    assert {path.name: path.read_bytes() for path in heart_run[0].iterdir()} == before


def test_datasets_and_seeds(files, tmp_path):
    def result(folder, seed, *options):
        run(*TINY, "--seed", seed, "--output_dir", tmp_path / folder, *options)
        return np.load(tmp_path / folder / "samples.npy")

    samples = result("a", 3, "--dataset", files / "points.csv")
    assert samples.shape == (50, 2) and abs(samples).max() > 10  # in the units of the file
    assert np.array_equal(result("b", 3, "--dataset", files / "points.npy"), samples)
    earlier = (tmp_path / "b/model.pt").read_bytes()
    assert not np.array_equal(result("b", 4, "--dataset", files / "points.npy"), samples)
    assert (tmp_path / "b/model.old.pt").read_bytes() == earlier
    models = [torch.load(tmp_path / folder / "model.pt")["weights"] for folder in "ab"]
    assert not torch.equal(*(weights["last.1.weight"] for weights in models))
    assert not np.array_equal(result("c", 4, "--checkpoint", tmp_path / "a/model.pt"), samples)
    assert result("d", 3, "--dataset", "swiss_roll").shape == (50, 2)
    digits = result("e", 3, "--dataset", "mnist", "--data_dir", files)
    assert digits.shape == (50, 28, 28) and digits.dtype == np.uint8 and digits.std() > 0


def test_how_processes_end(files, tmp_path):
    """Ctrl-C ends the training early; the samples follow. An error is one line."""
    failing = start("--dataset", "spiral", cwd=tmp_path)
    options = ["--num_epochs", 1_000_000, "--dataset", files / "points.csv"]
    process = start(*TINY, *options, "--output_dir", tmp_path)
    while b"loss=" not in (seen := os.read(process.stderr.fileno(), 4096)):  # the progress bar
        assert seen
    process.send_signal(signal.SIGINT)
    printed, errors = process.communicate(timeout=100)
    assert process.returncode == 0 and b"ends early" in printed, errors
    assert np.load(tmp_path / "samples.npy").shape == (50, 2)
    errors = failing.communicate(timeout=100)[1].decode()
    assert errors.startswith("main.py: error: --dataset spiral: ") and errors.count("\n") == 1
    assert failing.returncode == 1 and not (tmp_path / "outputs").exists()


def test_as_a_notebook(tmp_path, monkeypatch):
    """Cell after cell, with the options that Jupyter leaves in sys.argv."""
    source, scope = (ROOT / "main.py").read_text().replace("8000", "300"), {"__name__": "__main__"}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "ipykernel", sys)
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel.json"])
    for flag, value in zip(TINY[::2], TINY[1::2]):  # these become the defaults
        value = value if value.isdigit() else f'"{value}"'
        source, found = re.subn(rf'("{flag}".*default=)\w+', rf"\g<1>{value}", source)
        assert found == 1
    for cell in re.split(r"(?m)^(?=# %%)", source):
        exec(cell, scope)  # noqa: S102
    assert np.load("outputs/heart/samples.npy").shape == (50, 2)


def test_options_of_digits():
    """Their defaults, and the first command of this project, word for word."""
    command = """--learning_rate 1e-3 --dataset mnist --train_batch_size 128 --eval_batch_size 10
        --num_epochs 200 --num_timesteps 1000 --embedding_size 100 --hidden_size 2048
        --hidden_layers 5 --show_image_step 50"""
    args, _ = main.parse_options(command.split())
    assert (args.eval_batch_size, args.num_epochs, args.learning_rate) == (10, 200, 0.001)
    sizes = (args.hidden_size, args.hidden_layers, args.embedding_size, args.num_timesteps)
    assert round(sum(p.numel() for p in main.MLP(784, *sizes).parameters()) / 1e6, 1) == 24.4
    digits, _ = main.parse_options(["--dataset", "mnist"])
    assert (digits.predict, digits.hidden_size, digits.num_epochs) == ("x_0", 768, 34)


TEXTS = {"empty.csv": "", "empty.npy": "", "empty.pt": "", "text.pt": "hello", "file": "mine"}
TEXTS |= {"letters.csv": "a,b\n" * 100, "columns.csv": "1,2,3\n" * 100, "same.csv": "1,2\n" * 100}
TEXTS |= {"few.csv": "1,2\n" + "2,1\n" * 98, "nan.csv": "1,2\n" * 100 + "nan,1\n"}
COUNTS = "num_timesteps embedding_size hidden_size hidden_layers train_batch_size num_epochs"
BAD = [f"--{name} {v}" for name in COUNTS.split() for v in ("0", "-2", "1000002", "many", "2.5")]
BAD += [f"--learning_rate {value}" for value in ("0", "-1", "nan", "inf", "fast")]
BAD += ["--eval_batch_size 0", "--show_image_step 0", "--seed x", "--colour red"]
BAD += ["--embedding_size 7", "--predict v", "--device abacus"]
BAD += [f"--dataset {name}" for name in [*TEXTS, "spiral", "missing.csv", "missing.npy", "mnist"]]
BAD += [f"--checkpoint {k}.pt" for k in ("missing", "text", "empty", "other", "evil", "no_scale")]
BAD += ["--checkpoint truncated.pt", "--checkpoint .", "--checkpoint "]
BAD += ["--output_dir file", "--output_dir file/out"]


@pytest.fixture(scope="session")
def bad_files(heart_run, tmp_path_factory):
    """A folder with files that main.py must refuse."""
    folder, model = tmp_path_factory.mktemp("bad"), torch.load(heart_run[0] / "model.pt")
    for name, text in TEXTS.items():
        (folder / name).write_text(text)
    (folder / "truncated.pt").write_bytes((heart_run[0] / "model.pt").read_bytes()[:9999])
    torch.save({"model": {}, "dpm_2015.py": {"dataset": "heart"}}, folder / "other.pt")
    evil = type("Evil", (), {"__reduce__": lambda self: (os.mkdir, ("pwned",))})()
    torch.save({**model, "scale": evil}, folder / "evil.pt")
    torch.save({k: v for k, v in model.items() if k != "scale"}, folder / "no_scale.pt")
    return folder


@pytest.mark.filterwarnings("ignore:loadtxt")
@pytest.mark.parametrize("options", BAD)
def test_bad_input(options, bad_files, monkeypatch, capsys):
    """One line names what is wrong, and nothing is written."""
    from torchvision.datasets import MNIST

    monkeypatch.setattr(MNIST, "mirrors", ["http://127.0.0.1:9/"])  # no network
    monkeypatch.chdir(bad_files)
    (name, value), before = options.split(" "), {*os.listdir(), "data"}
    with pytest.raises(SystemExit) as stop:
        run(*TINY, name, value)
    # argparse prints its message itself, and exits with 2. Ours goes to sys.exit, which prints it.
    line = capsys.readouterr().err.splitlines()[-1] if stop.value.code == 2 else stop.value.code
    assert line.startswith("main.py: error: ") and "\n" not in line
    assert value.split("/")[0] in line or (value == "7" and name in line)
    if options in ("--dataset spiral", "--dataset missing.csv", "--dataset mnist"):
        assert "heart, swiss_roll, a .npy or .csv" in line
        assert "{train,t10k}-{images-idx3,labels-idx1}-ubyte into DATA_DIR/MNIST/raw" in line
    assert {*os.listdir(), "data"} == before and Path("file").read_text() == "mine"
