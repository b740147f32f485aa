"""Tests of main.py: mathematics against closed forms, quadrature and an oracle; files; bad input."""

import gzip
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
import pytest
import torch

import main

ROOT = Path(__file__).resolve().parent.parent
TINY = "--num_epochs 1 --num_timesteps 20 --embedding_size 8 --hidden_size 16 --hidden_layers 1"
POINTS = [*TINY.split(), "--show_image_step", "5", "--train_batch_size", "4000", "--eval_batch_size", "300"]
DIGITS = [*TINY.split(), "--show_image_step", "5", "--dataset", "mnist", "--eval_batch_size", "12"]
CENTRES = torch.tensor([[-1.5, -0.5], [-0.5, 1.0], [0.0, -1.0], [0.8, 0.9], [1.2, -0.4]])


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """A folder with 800 training digits and 200 test digits of MNIST, as torchvision expects them."""
    raw = tmp_path_factory.mktemp("data") / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for path in (ROOT / "tests" / "mnist").glob("*.gz"):
        (raw / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
    return raw.parent.parent


@pytest.fixture(scope="session")
def heart_run(tmp_path_factory):
    """The folder of a tiny run of the real script, and what it printed."""
    out = tmp_path_factory.mktemp("heart") / "run"
    return out, script([*POINTS, "--output_dir", str(out)])


def script(options, cwd=None):
    """Runs main.py as a user does; returns its standard output."""
    command = [sys.executable, str(ROOT / "main.py"), *map(str, options)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def refusal(capsys, options):
    """The one line with which main.py refuses these options."""
    with pytest.raises(SystemExit) as stop:
        main.main([str(option) for option in options])
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().split("\n")
    assert lines[-1].startswith("main.py: error: ")
    assert "Traceback" not in "".join(lines)
    return lines[-1]


def options(*more):
    return main.parse_options([*POINTS, *more])[0]


def oracle(schedule, points, predicts):
    """The best prediction for data that are these points (N, D), all as likely: a softmax over them."""

    def model(x_t, t):
        signal, noise = schedule.signal[t, None], schedule.noise_std[t, None]
        distances = (x_t[:, None] - signal[:, None] * points).square().sum(dim=2)  # (B, N)
        x_0_hat = (-distances / (2 * noise**2)).softmax(dim=1) @ points
        return x_0_hat if predicts == "x_0" else (x_t - signal * x_0_hat) / noise

    model.predicts = predicts
    return model


# Noise schedule


@pytest.mark.parametrize("T", [20, 21, 50, 100, 200, 250, 1000, 4000])
def test_schedule_ends_in_noise(T):
    schedule = main.make_schedule(T)
    assert all(len(values) == T and values.isfinite().all() for values in vars(schedule).values())
    assert ((schedule.betas > 0) & (schedule.betas < 1)).all()
    assert (schedule.signal.diff() < 0).all()
    assert 0 < schedule.signal[-1].double() ** 2 < 1e-3
    assert schedule.posterior_variance[0] == 0


def test_schedule_is_the_papers_at_1000_steps():
    betas = np.linspace(1e-4, 0.02, 1000)
    schedule = main.make_schedule(1000)
    np.testing.assert_allclose(schedule.betas, betas, rtol=1e-6)
    np.testing.assert_allclose(schedule.signal, np.sqrt(np.cumprod(1 - betas)), rtol=1e-6)


# Forward process


@pytest.mark.parametrize("T", [20, 200])
def test_q_sample_is_t_single_steps(T):
    schedule, t = main.make_schedule(T), torch.arange(T)
    mean, variance = 1.0, 0.0
    one, zero = torch.ones(T, 1), torch.zeros(T, 1)
    means = main.q_sample(schedule, one, t, zero)[:, 0]
    variances = main.q_sample(schedule, zero, t, one)[:, 0] ** 2
    for step, beta in enumerate(schedule.betas.double().tolist()):  # eq. 2, from x_0 = 1
        mean, variance = math.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
        assert means[step].item() == pytest.approx(mean, rel=1e-3, abs=1e-6)
        assert variances[step].item() == pytest.approx(variance, rel=1e-4)


@pytest.mark.parametrize("t", [1, 5, 30, 48, 49])
def test_q_posterior_is_bayes_rule(t):
    schedule = main.make_schedule(50)
    x_0, x_t, x = 0.7, -0.4, torch.linspace(-8, 8, 400_001, dtype=torch.float64)
    beta, alpha_bar = schedule.betas[t].double(), schedule.signal[t - 1].double() ** 2
    log_density = -((x - alpha_bar.sqrt() * x_0) ** 2) / (2 * (1 - alpha_bar))  # q(x_{t-1} | x_0)
    log_density = log_density - (x_t - (1 - beta).sqrt() * x) ** 2 / (2 * beta)  # q(x_t | x_{t-1})
    weights = log_density.softmax(dim=0)
    mean = (weights * x).sum()
    variance = (weights * (x - mean) ** 2).sum()
    one = torch.ones(1, 1)
    found_mean, found_variance = main.q_posterior(schedule, x_0 * one, x_t * one, torch.tensor([t]))
    assert found_mean.item() == pytest.approx(mean.item(), abs=1e-4)
    assert found_variance.item() == pytest.approx(variance.item(), rel=1e-3)


# Reverse process


@pytest.mark.parametrize("predicts", ["eps", "x_0"])
def test_predict_inverts_q_sample(predicts):
    schedule, t = main.make_schedule(100), torch.arange(100)
    x_0, eps = torch.randn(2, 100, 3, generator=torch.Generator().manual_seed(0))
    model = {"eps": lambda x_t, t: eps, "x_0": lambda x_t, t: x_0}[predicts]
    model.predicts = predicts
    eps_hat, x_0_hat = main.predict_both(model, schedule, main.q_sample(schedule, x_0, t, eps), t)
    torch.testing.assert_close(eps_hat, eps, rtol=0, atol=1e-3)
    torch.testing.assert_close(x_0_hat, x_0, rtol=0, atol=1e-3)


def test_reverse_chain_of_a_gaussian_follows_its_recursion():
    """For x_0 ~ N(m, s^2) the exact eps is linear in x_t, so the chain's mean and variance are known."""
    T, m, s, n = 50, 0.8, 0.5, 200_000
    schedule = main.make_schedule(T)

    def model(x_t, t):
        signal, noise = schedule.signal[t, None], schedule.noise_std[t, None]
        return noise * (x_t - signal * m) / (signal**2 * s**2 + noise**2)

    model.predicts = "eps"
    mean, variance = 0.0, 1.0
    chain = main.p_sample_loop(model, schedule, (n, 1), seed=0)
    next(chain)
    for step, x in chain:  # from x_{step + 1} to x_step; the index of that transition is step
        beta, alpha_bar = schedule.betas[step].item(), schedule.signal[step].item() ** 2
        before = schedule.signal[step - 1].item() ** 2 if step else 1.0
        slope = (1 - alpha_bar) / (alpha_bar * s**2 + 1 - alpha_bar)  # of sqrt(1 - alpha_bar) eps
        factor = (1 - beta * slope / (1 - alpha_bar)) / math.sqrt(1 - beta)  # Algorithm 2, line 4
        shift = beta * slope * math.sqrt(alpha_bar) * m / (1 - alpha_bar) / math.sqrt(1 - beta)
        mean = factor * mean + shift
        variance = factor**2 * variance + beta * (1 - before) / (1 - alpha_bar)
        assert x.mean().item() == pytest.approx(mean, abs=6 / math.sqrt(n) * math.sqrt(variance))
        assert x.var().item() == pytest.approx(variance, rel=6 * math.sqrt(2 / n) + 1e-3)
    assert mean == pytest.approx(m, abs=1e-3) and math.sqrt(variance) == pytest.approx(
        s, rel=0.15
    )  # T is small


@pytest.mark.parametrize("predicts", ["eps", "x_0"])
@pytest.mark.parametrize("clip", [False, True])
def test_sampler_with_the_optimal_network_reproduces_the_data(predicts, clip):
    schedule, n = main.make_schedule(200), 3000
    bounds = {"bounds": (CENTRES.amin(dim=0), CENTRES.amax(dim=0))} if clip else {}
    *_, (step, x) = main.p_sample_loop(oracle(schedule, CENTRES, predicts), schedule, (n, 2), 0, **bounds)
    distance, which = torch.cdist(x, CENTRES).min(dim=1)
    share = which.bincount(minlength=5) / n
    assert step == 0 and distance.max() < 0.01
    assert (share - 0.2).abs().max() < 5 * math.sqrt(0.2 * 0.8 / n)


def test_score_is_the_gradient_of_the_log_density():
    schedule, t = main.make_schedule(100), torch.full((50,), 40)
    x = torch.randn(50, 2, generator=torch.Generator().manual_seed(1)).requires_grad_()
    signal, noise = schedule.signal[40], schedule.noise_std[40]
    mixture = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(torch.ones(5)),
        torch.distributions.Independent(torch.distributions.Normal(signal * CENTRES, noise), 1),
    )
    (gradient,) = torch.autograd.grad(mixture.log_prob(x).sum(), x)
    eps_hat, _ = main.predict_both(oracle(schedule, CENTRES, "eps"), schedule, x.detach(), t)
    torch.testing.assert_close(-eps_hat / schedule.noise_std[t, None], gradient, rtol=1e-3, atol=1e-3)


def test_sampling_repeats_and_leaves_other_random_numbers_alone():
    schedule, model = main.make_schedule(20), main.MLP(options(), 2)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    first, second, other = (
        list(main.p_sample_loop(model, schedule, (4, 2), seed))[-1][1] for seed in (5, 5, 6)
    )
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(first, second) and not torch.equal(first, other)


def test_clamp_bounds_the_samples():
    schedule, model = main.make_schedule(20), main.MLP(options(), 2)
    bounds = (torch.tensor([-0.1, -0.2]), torch.tensor([0.1, 0.3]))
    *_, (_, x) = main.p_sample_loop(model, schedule, (100, 2), 0, bounds)
    assert (x >= bounds[0] - 1e-6).all() and (x <= bounds[1] + 1e-6).all()


# Loss


@pytest.mark.parametrize("predicts", ["eps", "x_0"])
def test_oracle_loss_is_a_floor(predicts):
    schedule, x_0 = main.make_schedule(50), CENTRES.repeat(4000, 1)[torch.randperm(20_000)]
    best = oracle(schedule, CENTRES, predicts)
    others = [main.MLP(options("--predict", predicts, "--num_timesteps", "50"), 2)]
    for factor in (0.0, 0.9, 1.1):
        others.append(lambda x_t, t, factor=factor: factor * best(x_t, t))
        others[-1].predicts = predicts

    def loss(model):
        torch.manual_seed(0)
        with torch.no_grad():
            return main.loss_simple(model, schedule, x_0).item()

    assert 0 < loss(best) < min(map(loss, others))


@pytest.mark.parametrize(("B", "T"), [(1, 20), (7, 20), (64, 20), (64, 50)])
def test_every_t_is_as_likely(monkeypatch, B, T):
    seen = []
    monkeypatch.setattr(main, "q_sample", lambda schedule, x_0, t, eps: seen.append(t) or x_0)
    model = lambda x_t, t: x_t
    model.predicts = "eps"
    schedule = main.make_schedule(T)
    torch.manual_seed(0)
    for _ in range(4000):
        main.loss_simple(model, schedule, torch.zeros(B, 2))
    for position in (0, -1):  # one draw of each batch: these are independent
        counts = torch.stack(seen)[:, position].bincount(minlength=T)
        assert len(counts) == T
        assert ((counts - 4000 / T).abs() < 5 * math.sqrt(4000 / T)).all()
    assert all(t.bincount().max() <= math.ceil(B / T) for t in seen[:100])


# Network


@pytest.mark.parametrize("D", [2, 784])
@pytest.mark.parametrize("B", [1, 3])
def test_network_shapes(D, B):
    model = main.MLP(options(), D)
    out = model(torch.randn(B, D), torch.arange(B))
    assert out.shape == (B, D) and out.dtype == torch.float32


def test_bf16_is_close_to_fp32():
    torch.manual_seed(0)
    model = main.MLP(options("--predict", "x_0"), 784, "bf16")
    x, t = torch.randn(5, 784), torch.arange(5)
    low = model(x, t)
    model.bf16 = False
    assert low.dtype == torch.float32
    assert 0 < (low - model(x, t)).abs().max() < 0.05


@pytest.mark.parametrize("size", [1, 2, 7, 32])
def test_embedding(size):
    x = torch.tensor([0.0, 0.3, -2.0])
    found, pairs = main.embed(x, size, 25.0), (size + 1) // 2
    assert found.shape == (3, size)
    for k in range(size):
        i = k if k < pairs else k - pairs
        frequency = 25.0 * 10_000 ** -(i / max(pairs - 1, 1))
        expected = [(math.sin if k < pairs else math.cos)(frequency * v) for v in x.tolist()]
        assert found[:, k].tolist() == pytest.approx(expected, abs=1e-4)


def test_embedding_tells_all_steps_apart():
    found = main.embed(torch.arange(4000), 32, 1000 / 4000)
    assert len(found.unique(dim=0)) == 4000


# Data, distance, files


def test_heart_and_roll():
    v = torch.linspace(0, 1, 1001)[:-1]
    u = 2 * np.pi * v.double().numpy()
    y = 13 * np.cos(u) - 5 * np.cos(2 * u) - 2 * np.cos(3 * u) - np.cos(4 * u)
    expected = np.stack((16 * np.sin(u) ** 3, y), axis=1) / 5
    np.testing.assert_allclose(main.curve("heart", v), expected, atol=1e-5)
    torch.manual_seed(0)
    roll = main.curve("swiss_roll", v.repeat(20)).double()
    u = 1.5 * math.pi * (1 + 2 * v.repeat(20).double())
    error = roll - torch.stack((u * u.cos(), u * u.sin()), dim=1) / 10
    assert error.std().item() == pytest.approx(0.01, rel=0.03) and error.mean().abs() < 3e-4


@pytest.mark.parametrize("name", ["heart", "swiss_roll"])
def test_data_are_standardised(name):
    x_0, real, stats = main.load_data(options("--dataset", name))
    assert x_0.mean(dim=0).abs().max() < 1e-5
    assert x_0.square().sum(dim=1).mean().item() == pytest.approx(2, rel=1e-3)  # as for N(0, I)
    assert real.shape == (300, 2)
    v = (torch.arange(8000) + 0.5) / 8000
    torch.testing.assert_close(x_0 * stats["scale"] + stats["shift"], main.curve(name, v), atol=0.08, rtol=0)
    assert torch.equal(stats["bounds"][0], x_0.min(dim=0)[0]) and torch.equal(
        stats["bounds"][1], x_0.max(dim=0)[0]
    )


def test_mnist_data(data_dir):
    x_0, test, stats = main.load_data(
        main.parse_options(["--dataset", "mnist", "--data_dir", str(data_dir)])[0]
    )
    assert x_0.shape == (800, 784) and test.shape == (200, 784)
    assert x_0.min() == -1 and x_0.max() == 1
    raw = np.frombuffer((data_dir / "MNIST/raw/t10k-images-idx3-ubyte").read_bytes()[16:], np.uint8)
    assert np.array_equal((test * stats["scale"] + stats["shift"]).round().numpy().ravel(), raw)


def test_sliced_w2_of_a_shift_and_of_a_scaling():
    x = torch.randn(20_000, 2, generator=torch.Generator().manual_seed(0))
    assert main.sliced_w2(x, x) == 0
    shifted = main.sliced_w2(x, x + torch.tensor([3.0, 4.0]))
    assert shifted == pytest.approx(5 / math.sqrt(2), rel=1e-4)  # the mean of cos^2 is 1/2
    assert main.sliced_w2(2 * x, 3 * x) == pytest.approx(1, rel=0.03)  # between N(0, 4 I) and N(0, 9 I)


def test_a_file_that_cannot_be_finished_leaves_the_earlier_one(tmp_path):
    path = tmp_path / "file"
    path.write_text("earlier")

    def write(temporary):
        temporary.write_text("half")
        raise ValueError

    with pytest.raises(ValueError):
        main.save(path, write)
    assert path.read_text() == "earlier"


def test_draw():
    schedule, model = main.make_schedule(20), main.MLP(options(), 2)
    points = main.draw("title", torch.zeros(4, 2), main.BLUE)
    field = main.draw("title", torch.zeros(4, 2), main.BLUE, (model, schedule, 20))
    assert points.dtype == np.uint8 and points.shape == field.shape and (points != field).any()
    centre = points[points.shape[0] // 2 - 30 : points.shape[0] // 2 + 60, 100:260].reshape(-1, 3)
    assert (
        np.abs(centre.astype(int) - [0x00, 0x72, 0xB2]).max(axis=1) < 20
    ).any()  # the blue dot at the origin
    for n in (1, 7):
        digits = main.draw("title", torch.full((n, 784), -1.0), main.BLUE)
        assert digits.shape[2] == 3 and digits.min() == 0


# The real script, tiny


def test_heart_run(heart_run):
    out, printed = heart_run
    assert printed.split("\n")[0].startswith("device: ")
    names = ["loss.png", "model.pt", "process.gif", "run.json", "samples.npy", "samples.png", "training.gif"]
    assert sorted(os.listdir(out)) == names and all(name in printed for name in names)
    samples = np.load(out / "samples.npy")
    assert samples.shape == (300, 2) and samples.dtype == np.float32 and np.isfinite(samples).all()
    facts = json.loads((out / "run.json").read_text())
    assert facts["options"]["num_timesteps"] == 20 and facts["options"]["seed"] == 0
    assert facts["versions"]["torch"] == torch.__version__ and facts["seconds"] > 0 and facts["device"]
    for name, value in facts["metrics"].items():
        assert f"{name} {value:.4f}" in printed
    frames = imageio.mimread(out / "process.gif", memtest=False)
    assert len(frames) == 10  # steps 0, 5, 10, 15, 20, there and back
    with imageio.get_reader(out / "process.gif") as reader:
        durations = [reader.get_meta_data(k)["duration"] for k in range(10)]
    assert durations == [60] * 9 + [51 * 60]  # milliseconds: the last one stays for 3 seconds
    for name in ("process.gif", "training.gif"):
        assert b"NETSCAPE2.0\x03\x01\x00\x00" in (out / name).read_bytes()  # 0: loops for ever
    assert (out / "process.gif").stat().st_size < 3_000_000
    for name in ("loss.png", "samples.png"):
        assert imageio.imread(out / name).std() > 0


def test_same_seed_same_bits(heart_run, tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        main.main([*POINTS, "--seed", str(seed), "--output_dir", str(tmp_path / name)])
    a, b, c = ((tmp_path / name / "samples.npy").read_bytes() for name in "abc")
    assert a == b and a != c
    default = np.load(heart_run[0] / "samples.npy")
    assert not np.array_equal(np.load(tmp_path / "a" / "samples.npy"), default)


def test_swiss_roll_run(tmp_path):
    main.main([*POINTS, "--dataset", "swiss_roll", "--output_dir", str(tmp_path / "x" / "y")])
    assert np.load(tmp_path / "x" / "y" / "samples.npy").shape == (300, 2)


def test_mnist_run_and_its_checkpoint(data_dir, tmp_path):
    out = tmp_path / "run"
    printed = script([*DIGITS, "--data_dir", data_dir, "--output_dir", out])
    samples = np.load(out / "samples.npy")
    assert samples.shape == (12, 28, 28) and samples.dtype == np.uint8
    assert "loss on test digits" in printed and len(imageio.mimread(out / "process.gif")) == 10
    again = tmp_path / "again"  # no data_dir: to sample takes no data
    main.main(
        [
            "--checkpoint",
            str(out / "model.pt"),
            "--output_dir",
            str(again),
            "--data_dir",
            str(tmp_path / "no"),
        ]
    )
    assert np.array_equal(np.load(again / "samples.npy"), samples)
    assert len(imageio.mimread(again / "process.gif")) == 5 and not (tmp_path / "no").exists()


def test_seed_command_word_for_word(data_dir, tmp_path, monkeypatch):
    """The MNIST command of the seed parses and makes the network it names; to run it takes hours."""
    command = (
        "--learning_rate 1e-3 --dataset mnist --train_batch_size 128 --eval_batch_size 10 --num_epochs 200 "
        "--num_timesteps 1000 --embedding_size 100 --hidden_size 2048 --hidden_layers 5 --show_image_step 50"
    )
    args, checkpoint = main.parse_options(command.split())
    assert checkpoint is None and args.learning_rate == 1e-3 and args.eval_batch_size == 10
    assert sum(p.numel() for p in main.MLP(args, 784).parameters()) == pytest.approx(24.4e6, rel=0.01)


def test_checkpoint_needs_no_other_flag(heart_run, tmp_path, monkeypatch):
    out, _ = heart_run
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    monkeypatch.chdir(tmp_path)
    main.main(["--eval_path", str(out / "model.pt")])
    folder = tmp_path / "outputs" / "heart_samples"
    assert sorted(os.listdir(folder)) == ["process.gif", "sample.json", "samples.npy", "samples.png"]
    main.main(["--checkpoint", str(out / "model.pt"), "--num_samples", "1", "--output_dir", "one"])
    assert np.load(tmp_path / "one" / "samples.npy").shape == (1, 2)
    main.main(["--checkpoint", str(out / "model.pt"), "--eval_batch_size", "300", "--output_dir", "same"])
    assert (tmp_path / "same" / "samples.npy").read_bytes() == before["samples.npy"]
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_checkpoint_never_overwrites_a_training_run(heart_run, capsys):
    out, _ = heart_run
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    line = refusal(capsys, ["--checkpoint", out / "model.pt", "--output_dir", out])
    assert "--output_dir" in line and str(out) in line
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_ctrl_c_ends_training_and_goes_on_to_sample(tmp_path):
    out = tmp_path / "run"
    command = [
        sys.executable,
        str(ROOT / "main.py"),
        *POINTS,
        "--num_epochs",
        "1000000",
        "--output_dir",
        str(out),
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    seen = b""
    while b"loss=" not in seen:  # the progress bar, with the loss and the time left
        seen += os.read(process.stderr.fileno(), 4096)
    assert re.search(rb"\d+/2000000 \[", seen)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert b"ended early" in printed and np.load(out / "samples.npy").shape == (300, 2)
    assert (out / "training.gif").exists() and (out / "run.json").exists()


def test_as_a_notebook(tmp_path, monkeypatch):
    """Cell by cell, where Jupyter's own arguments stand in sys.argv."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "ipykernel", types.ModuleType("ipykernel"))
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel.json"])
    cells = re.split(r"(?m)^# %% ", (ROOT / "main.py").read_text())
    assert len(cells) == 12
    scope = {"__name__": "__main__"}
    for cell in cells:
        exec("# " + cell if cell is not cells[0] else cell, scope)  # noqa: S102
        if (
            "OPTIONS" in scope and scope["OPTIONS"]["num_epochs"][0] > 1
        ):  # the options' cell: make the run tiny
            tiny = dict(zip(TINY.split()[::2], TINY.split()[1::2]))
            for flag, value in {**tiny, "--eval_batch_size": "50", "--show_image_step": "5"}.items():
                _, digits, text = scope["OPTIONS"][flag[2:]]
                scope["OPTIONS"][flag[2:]] = (int(value), digits, text)
    assert np.load(tmp_path / "outputs" / "heart" / "samples.npy").shape == (50, 2)


def test_help_names_every_default(capsys):
    with pytest.raises(SystemExit) as stop:
        main.main(["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    for name, (points, digits, text) in main.OPTIONS.items():
        assert f"--{name}" in printed and f"{text} [points {points}, digits {digits}]" in printed


# Bad input


@pytest.mark.parametrize("name", [name for name in main.OPTIONS if name not in ("predict", "seed")])
@pytest.mark.parametrize("value", ["0", "-3", "many"])
def test_numbers_that_make_no_sense(capsys, name, value):
    line = refusal(capsys, [f"--{name}", value])
    assert f"--{name}" in line and value in line


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--dataset", "spiral"),
        ("--predict", "v"),
        ("--num_timesteps", "19"),
        ("--num_epochs", "2.5"),
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


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize(
    "kind", ["absent", "folder", "empty", "truncated", "text", "other script", "malicious"]
)
def test_bad_checkpoints(heart_run, tmp_path, capsys, kind):
    path, whole = tmp_path / "bad.pt", (heart_run[0] / "model.pt").read_bytes()
    if kind == "folder":
        path.mkdir()
    elif kind == "other script":
        torch.save({"model": {}, "dpm_2015.py": {"dataset": "heart"}}, path)
    elif kind == "malicious":
        torch.save({"main.py": Evil(str(tmp_path / "pwned")), "model": {}, "stats": {}}, path)
    elif kind != "absent":
        path.write_bytes({"empty": b"", "truncated": whole[: len(whole) // 2], "text": b"hello"}[kind])
    line = refusal(capsys, ["--checkpoint", path, "--output_dir", tmp_path / "out"])
    assert "--checkpoint" in line and str(path) in line
    assert not (tmp_path / "pwned").exists() and not (tmp_path / "out").exists()


def test_checkpoint_beside_a_flag_that_differs(heart_run, capsys):
    line = refusal(capsys, ["--checkpoint", heart_run[0] / "model.pt", "--hidden_size", "99"])
    assert "--hidden_size 99" in line and "16" in line
    line = refusal(capsys, ["--checkpoint", heart_run[0] / "model.pt", "--dataset", "mnist"])
    assert "--dataset mnist" in line and "heart" in line


def test_output_folder_that_cannot_be_written(capsys, tmp_path):
    (tmp_path / "file").write_text("mine")
    line = refusal(capsys, [*POINTS, "--output_dir", tmp_path / "file" / "out"])
    assert "--output_dir" in line and str(tmp_path / "file") in line
    assert (tmp_path / "file").read_text() == "mine"


def test_mnist_without_network(capsys, tmp_path, monkeypatch):
    from torchvision.datasets import MNIST

    monkeypatch.setattr(MNIST, "mirrors", ["http://127.0.0.1:9/"])
    line = refusal(capsys, [*DIGITS, "--data_dir", tmp_path / "data", "--output_dir", tmp_path / "out"])
    assert (
        "--data_dir" in line
        and "train-images-idx3-ubyte" in line
        and str(tmp_path / "data/MNIST/raw") in line
    )
    assert not (tmp_path / "out").exists()


def test_damaged_mnist(capsys, tmp_path, data_dir):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for path in (data_dir / "MNIST" / "raw").iterdir():
        (raw / path.name).write_bytes(path.read_bytes()[:1000])
    assert "--data_dir" in refusal(capsys, [*DIGITS, "--data_dir", tmp_path])


def test_torchvision_of_another_build(capsys, tmp_path, monkeypatch):
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')"
    )
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    line = refusal(capsys, [*DIGITS, "--output_dir", tmp_path / "out"])
    assert "torchvision::nms" in line and "pytorch.org" in line


@pytest.mark.parametrize("step", [1, 30])
def test_loss_that_is_not_finite(heart_run, capsys, monkeypatch, tmp_path, step):
    out, calls, loss_simple = tmp_path / "run", [], main.loss_simple
    out.mkdir()
    earlier = (heart_run[0] / "model.pt").read_bytes()
    (out / "model.pt").write_bytes(earlier)

    def loss(*args):
        calls.append(1)
        return loss_simple(*args) * (math.nan if len(calls) == step else 1)

    monkeypatch.setattr(main, "loss_simple", loss)
    line = refusal(capsys, [*POINTS, "--train_batch_size", "100", "--output_dir", out])
    assert "--learning_rate" in line and re.search(rf"step {step}\b", line)
    assert os.listdir(out) == ["model.pt"]
    weights = torch.load(out / "model.pt", weights_only=True)["model"].values()
    assert all(value.isfinite().all() for value in weights)
    assert ((out / "model.pt").read_bytes() == earlier) == (step == 1)
