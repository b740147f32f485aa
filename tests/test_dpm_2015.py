"""Tests of dpm_2015.py: its bound and sampling, on data whose answers are known, and small runs."""

import json
import signal
from contextlib import suppress
from itertools import islice
from math import e, log, log2, pi
from types import SimpleNamespace

import conftest
import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from torch import nn
from torch.distributions import Bernoulli, Normal
from torch.testing import assert_close
from tqdm import tqdm

import dpm_2015 as dpm

TINY = ["--num_timesteps", 5, "--hidden_size", 16, "--num_training_steps", 6, "--device", "cpu"]
FILES = {"process.gif", "run.json", "samples.npy", "samples.png", "inpainted.npy", "inpainting.png"}
BEATS = torch.eye(5).repeat(1, 4)
WORDS = torch.cartesian_prod(*4 * [torch.arange(2)]).double()  # (16, 4): 0000, 0001, ..., 1111
EVERY_T = torch.arange(2, 9)[:, None]  # of the processes below, where T = 8


@pytest.fixture
def float64():
    """While a test with this fixture runs, numbers have 16 digits. Its draws never change."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(params=["Gaussian", "Binomial"])
def process(request, float64):
    """Each of the two processes in turn, with 8 steps."""
    if request.param == "Gaussian":
        return dpm.Gaussian(8, 0.01, learn_betas=True)
    return dpm.Binomial(8, 0.2)


def as_model(process, z):
    """Return z, a function of x_t and t, as a model: it needs no weights, only its process."""
    z.process = process
    return z


def bound_at(process, z, x_0, t, sample):
    """Return K (B,) for the t (B, 1), the z, and the way to draw x_t that a test wants."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randint", lambda *_: t)
        patch.setattr(process, "sample", sample)
        return dpm.bound(as_model(process, lambda *_: z), x_0)[0]


# %% The bound and its two processes
def probabilities(means):
    """Return how likely each of the 16 words is (N, 16), for the means (N, 4) of its bits."""
    return Bernoulli(means[:, None]).log_prob(WORDS).sum(dim=2).exp()


def test_bound_is_the_sum_over_all_chains_of_four_bits(float64):
    """For a random network and random data, of which eq. 14 needs only that their mean is m."""
    data = torch.randn(16).softmax(dim=0)  # the probability of each x_0
    m = (data @ WORDS).mean().item()
    z = 2 * torch.randn(5, 16, 4)
    z[1] = 0  # eq. 44
    process = dpm.Binomial(4, m)
    number = torch.arange(16)
    x_0, t, x_t = torch.cartesian_prod(number, number[2:5], number).T
    K = bound_at(process, z[t, x_t], WORDS[x_0], t[:, None], lambda q: WORDS[x_t])
    K = K.view(16, 3, 16)  # from x_0, for t = 2, 3, 4, to x_t
    q_x_t = data.diag()  # q(x_0, x_t), now for t = 0
    mean_K = exact = 0
    for t in range(1, 5):
        beta = 1 / (5 - t)
        step = (1 - beta) * WORDS + beta * m  # for each bit: how likely it is 1 after the step
        odds = step / (1 - step) * z[t].exp()
        q = probabilities(step)  # from x_{t-1}, rows, to x_t, columns
        p = probabilities(odds / (1 + odds))  # from x_t, rows, to x_{t-1}, columns
        gain = (p.T / q).log()
        exact += (q_x_t @ (q * gain)).sum()
        q_x_t = q_x_t @ q
        if t > 1:
            mean_K += (q_x_t * K[:, t - 2]).sum() / 3
    exact += q_x_t.sum(dim=0) @ probabilities(torch.full((1, 4), m))[0].log()
    assert_close(mean_K, exact / log(2))
    assert process.p_reverse(-1e3, WORDS, 2).probs.min() > 1e-7  # so that KL stays finite


def test_bound_of_noise(float64):
    """For data from N(0, 1) and z = 0, nothing is lost: K is the mean of log p(x_0)."""
    process = dpm.Gaussian(40, 0.1, learn_betas=True)
    signs = torch.tensor([-1.0, 1.0])  # quadrature with two nodes, exact as K is quadratic
    x_0, eps, t = torch.cartesian_prod(signs, signs, torch.arange(2.0, 41.0)).T[:, :, None]
    K = bound_at(process, torch.zeros(1, 2), x_0, t.long(), lambda q: q.mean + q.stddev * eps)
    assert abs(K.mean() + log2(2 * pi * e) / 2) < 1e-9  # the entropy of N(0, 1)


def test_what_z_changes(float64):
    """It shifts means and multiplies odds (eq. 64). K gains (T - 1) E log(p / q), here by draws."""
    process = dpm.Gaussian(8, 0.01, learn_betas=True)
    x_0, x_t, z_mu, z_sigma = torch.randn(4, 7, 3)
    z = torch.cat((z_mu, z_sigma), dim=1)
    step = process.q(x_t, EVERY_T - 1, EVERY_T)
    odds = step.variance / (1 - step.variance) * z_sigma.exp()
    variance = odds / (1 + odds)
    p = Normal(step.mean + step.stddev * z_mu, variance.sqrt())
    found = process.p_reverse(z, x_t, EVERY_T)
    assert_close(found.mean, p.mean)
    assert_close(found.variance, p.variance)
    K = bound_at(process, z, x_0, EVERY_T, lambda q: x_t)
    K_null = bound_at(process, 0 * z, x_0, EVERY_T, lambda q: x_t)
    x = process.q_posterior(x_0, x_t, EVERY_T).sample((40_000,))
    gain = 7 * (p.log_prob(x) - step.log_prob(x)).sum(dim=2) / log(2)
    assert ((gain.mean(dim=0) - (K - K_null)).abs() < 4 * gain.std(dim=0) / 200).all()


def test_gradient_of_the_betas(float64):
    """It equals finite differences of K, with the same noise each time."""
    process = dpm.Gaussian(6, 0.01, learn_betas=True)
    model = as_model(process, lambda x_t, t: x_t.repeat(1, 2))
    x_0 = torch.randn(50, 2)

    def K(logit_betas):  # those of the process itself: gradcheck nudges them in place
        torch.manual_seed(0)
        return dpm.bound(model, x_0)[0]

    assert torch.autograd.gradcheck(K, process.logit_betas)


def test_schedule_in_float32():
    """The log-odds of 1 - alpha_bar rise evenly to 7, and tiny variances keep their digits."""
    process = dpm.Gaussian(1000, 1e-5, learn_betas=False)
    betas = np.append(1e-5, process.logit_betas.double().sigmoid())
    alpha_bars = np.cumprod(1 - betas)
    log_odds = np.log((1 - alpha_bars) / alpha_bars)
    assert_allclose(log_odds, np.linspace(log(1e-5), 7, 1000), atol=0.01)
    t = torch.arange(1, 1001)
    assert_allclose(process.q(0, t - 1, t).variance, betas, rtol=1e-3)


# %% Sampling and inpainting
@pytest.fixture
def predictable(process):
    """A model of any kind, with mean + variance in place of each draw."""
    process.sample = lambda q: q.mean + q.variance
    return as_model(process, lambda x_t, t: (x_t.flip(1) - 0.2 * t).repeat(1, process.z_per_number))


def test_p_sample_loop(process, predictable):
    """It begins with x_T from the prior, and takes all steps back, down to t = 0."""
    chain = list(dpm.p_sample_loop(predictable, (5000, 4)))
    assert [t for t, _ in chain] == list(range(8, -1, -1))
    x = chain[0][1]
    assert abs(x.std() - process.prior.stddev) < 0.03
    for t, found in chain[1:]:
        z = predictable(x, t + 1) * (t > 0)  # 0 in the last step: eq. 44
        x = process.sample(process.p_reverse(z, x, t + 1))
        assert_close(found, x)


def test_inpaint_is_algorithm_1_of_repaint(process, predictable):
    """Its line 5, then 7, then (for all but the last pass) 9. The known part ends as it is."""
    known = torch.arange(4) < 2
    x_0 = torch.rand(5000, 4).round()
    torch.manual_seed(0)
    found = dpm.inpaint(predictable, x_0, known)
    torch.manual_seed(0)
    x = process.prior.sample((5000, 4))
    for t in range(8, 0, -1):
        for u in range(1, 11) if t > 1 else (10,):
            x = dpm.p_sample(predictable, x, t)
            known_part = x_0 if t == 1 else process.sample(process.q(x_0, 0, t - 1))
            x[:, known] = known_part[:, known]
            if u < 10:
                x = process.sample(process.q(x, t - 1, t))
    assert_close(found, x)
    assert torch.equal(found[:, known], x_0[:, known])


def test_best_network_for_heartbeats():
    """Its K is known. Its samples are heartbeats, and it completes a half of one."""
    process = dpm.Binomial(100, 0.2)
    beats = BEATS[:, None]  # (5, 1, 20)

    def network(x_t, t):
        log_q = process.q(beats, 0, t).log_prob(x_t).sum(dim=2)
        share = log_q.softmax(dim=0)  # q(x_0 | x_t): how likely each of the 5 beats is
        posteriors = process.q_posterior(beats, x_t, t)
        p = (share[:, :, None] * posteriors.probs).sum(dim=0)
        return p.logit(eps=1e-7) - process.q(x_t, t - 1, t).logits

    torch.manual_seed(0)
    model = as_model(process, network)
    K, _ = dpm.bound(model, BEATS.repeat(10_000, 1))
    assert abs(K.mean() + 2.975) < 0.07
    x_0 = BEATS.repeat(100, 1)
    _, x = list(dpm.p_sample_loop(model, x_0.shape))[-1]
    shares = (x[:, None] == BEATS).all(dim=2).float().mean(dim=0)  # of each of the 5 beats
    assert shares.sum() > 0.85
    assert shares.min() > 0.12
    first_half = torch.arange(20) < 10
    x = dpm.inpaint(model, x_0, first_half, passes=2)
    assert (x == x_0).all(dim=1).float().mean() > 0.9


# %% Network, data and training
def test_network(process):
    """Training begins at z = 0, trains all weights, and z of a number sees its own features."""
    model = dpm.Model(process, 6, 16)
    x_t = torch.rand(7, 6).round()
    assert (model(x_t, EVERY_T) == 0).all()
    nn.init.normal_(model.conv[-1].weight)
    z = model(x_t, EVERY_T)
    assert (model(x_t + torch.eye(6)[5], EVERY_T) != z).all()  # each z depends on all of x_t
    dpm.bound(model, x_t)[0].sum().backward()
    assert all(weight.grad.any() for weight in model.parameters())
    model.dense[-1].bias.data[1::6] += 1  # the 4 features of the second number
    changed = (model(x_t, EVERY_T) != z).any(dim=0).nonzero().flatten()
    assert changed.tolist() == [1, 7][: process.z_per_number]


def test_z_is_a_mixture_of_bumps(process):
    """Eq. 62, where ten bumps in t are spaced evenly in the log-odds of alpha_bar, and sum to 1."""
    model = dpm.Model(process, 2, 16)
    nn.init.zeros_(model.conv[0].weight)
    units = nn.functional.gelu(model.conv[0].bias)  # the same for all x_t, and so are the y_j:
    y = nn.init.normal_(model.conv[-1].weight)[:, :, 0] @ units
    t = torch.arange(1, 9)
    log_odds = -t  # they fall evenly; how fast does not matter
    if process.z_per_number == 1:
        log_odds = (8 / t - 1).log().clamp(min=-8)
    places = 9 * (log_odds - log_odds[0]) / (log_odds[7] - log_odds[0])
    distances = places[:, None] - torch.arange(10)
    bumps = (-(distances**2) / 2).exp()
    z = bumps @ y.view(10, -1) / bumps.sum(dim=1, keepdim=True)
    found = model(torch.randn(8, 2), t[:, None])
    assert_close(found, z.repeat_interleave(2, dim=1), rtol=0, atol=1e-6)


def test_swiss_roll_and_heartbeats():
    """Points have mean 0, variance 1, and noise of 0.25 across a spiral. Bits stay as they are."""
    rows, test_rows, shift, scale = dpm.load_data("swiss_roll", "")
    assert len(rows) == 90_000 and len(test_rows) == 10_000
    assert abs(rows.mean()) < 0.01 and abs(rows.std() - 1) < 0.01
    x, y = (rows * scale + shift).T
    across = torch.hypot(x, y) - torch.atan2(y, x)  # on the spiral: a multiple of 2 pi
    noise = (across + pi) % (2 * pi) - pi
    assert abs(noise.std() - 0.25) < 0.005
    assert torch.equal(dpm.load_data("heartbeat", "")[0], BEATS)


@pytest.mark.parametrize("dataset", ["swiss_roll", "mnist"])
def test_training(monkeypatch, tmp_path, dataset):
    """Watch t, Adam's rate, a clipped gradient, and the weight of K: 1 - alpha_bar_t for digits."""
    rates, seen = [], []
    bound = dpm.bound

    def watched_bound(model, x_0):
        K, t = bound(model, x_0)
        K.retain_grad()
        seen.append((K, t[:, 0]))
        return 1000 * K, t  # makes all gradients large

    def watched_step(adam):
        rates.append(adam.param_groups[0]["lr"])

    monkeypatch.setattr(dpm, "bound", watched_bound)
    monkeypatch.setattr(torch.optim.Adam, "step", watched_step)
    process = dpm.Gaussian(5, 0.01, learn_betas=True)
    model = dpm.Model(process, 3, 8)
    options = {"dataset": dataset, "train_batch_size": 4, "num_training_steps": 30}
    for seed in (0, 1):
        options.update(seed=seed, learning_rate=0.01)
        dpm.train(model, torch.randn(500, 3), options, tmp_path / "model.pt", {})
    step = np.arange(30)
    expected = 0.01 * np.minimum((step + 1) / 100, 1 - step / 30)
    assert rates == pytest.approx([*expected, *expected])
    assert abs(nn.utils.get_total_norm([w.grad for w in model.parameters()]) - 1) < 1e-3
    t = torch.stack([t for _, t in seen])
    alpha_bars = (-process.noise_levels).sigmoid() if dataset == "mnist" else torch.zeros(5)
    expected = -1000 * (1 - alpha_bars[t - 1]) / (4 * 3)
    assert_close(torch.stack([K.grad for K, _ in seen]), expected)
    assert len(t.unique(dim=0)) > 40  # each step of each seed draws anew
    assert t.unique().tolist() == [2, 3, 4, 5]


# %% Whole runs, and bad input
def run(*options):
    """Run all of dpm_2015.py on the CPU, in this process, with only 9 batches for K."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dpm, "tqdm", lambda steps, *_, **__: tqdm(islice(steps, 9)))
        dpm.main([*map(str, options), "--device", "cpu"])


def results(folder):
    """Return the samples, the completed examples, the figures of run.json, and the checkpoint."""
    arrays = [np.load(folder / f"{name}.npy") for name in ("samples", "inpainted")]
    figures = json.loads((folder / "run.json").read_text())["figures"]
    return *arrays, figures, torch.load(folder / "model.pt", weights_only=True)


@pytest.fixture(scope="session")
def roll(tmp_path_factory):
    """The folder of a whole run on the swiss roll."""
    out = tmp_path_factory.mktemp("roll") / "run"
    conftest.run_script("dpm_2015.py", *TINY, "--output_dir", out)
    return out


def test_training_run(roll):
    """Files, figures and units of a whole run; the betas are learned, but not beta_1."""
    samples, _, figures, state = results(roll)
    scale = dpm.load_data("swiss_roll", "")[3]
    assert set(conftest.content(roll)) == FILES | {"model.pt"}
    options = state["options"]
    assert options["train_batch_size"] == 1000 and options["learning_rate"] == 0.01
    assert options["num_timesteps"] == 5 and state["step"] == 6
    assert samples.shape == (1000, 2)
    assert samples.std() == pytest.approx(scale, rel=0.2)
    assert figures["L_null"] == pytest.approx(-log2(2 * pi * e), abs=0.02)
    assert figures["K - L_null"] == figures["K"] - figures["L_null"] == pytest.approx(0, abs=0.1)
    assert 0.005 < figures["standard error of K"] < 0.05  # about 10 / sqrt(200,000)
    assert figures["bits per dimension"] == pytest.approx(log2(scale) - figures["K"] / 2)
    start = dpm.Gaussian(5, 1e-4, learn_betas=True)
    assert (state["model"]["process.logit_betas"] != start.logit_betas).all()
    assert torch.equal(state["model"]["process.fixed_betas"], start.fixed_betas)
    assert sum(conftest.gif_milliseconds(roll / "process.gif")) == 100 * (6 + 20)


def test_seeds_and_checkpoints(roll, tmp_path, monkeypatch):
    """A checkpoint gives the same samples, in another folder; another seed gives other ones."""
    monkeypatch.chdir(tmp_path)
    before = conftest.content(roll)
    run("--checkpoint", roll / "model.pt")
    run("--checkpoint", roll / "model.pt", "--seed", 1, "--output_dir", "other")
    same = conftest.content(tmp_path / "outputs/dpm_2015_swiss_roll_samples")
    other = conftest.content(tmp_path / "other")
    assert set(same) == set(other) == FILES and conftest.content(roll) == before
    for name in ("samples.npy", "inpainted.npy"):
        assert same[name] == before[name] != other[name]


@pytest.mark.parametrize(("number", "more"), [(signal.SIGTERM, set()), (signal.SIGINT, FILES)])
def test_early_end_and_resume(roll, tmp_path, monkeypatch, number, more):
    """A signal ends training; Ctrl-C draws samples, too. Resumed, all is bit for bit the same."""
    state = torch.load(roll / "model.pt", weights_only=True)
    state["step"] = 247  # as if it had come that far: step 250 saves the weights, too
    state["options"]["num_training_steps"] = 253
    torch.save(state, path := tmp_path / "model.pt")
    conftest.interrupt(monkeypatch, dpm, dpm.bound, number)
    with suppress(SystemExit):
        run("--resume", path)
    assert torch.load(path, weights_only=True)["step"] == 251
    assert set(conftest.content(tmp_path)) == {"model.pt"} | more
    assert signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)
    run("--resume", path)
    resumed = path.read_bytes()
    torch.save(state, path)
    run("--resume", path)
    assert path.read_bytes() == resumed


def test_heartbeats(tmp_path):
    """Samples are bits, known halves are those of heartbeats, and L_null is for 4 ones in 20."""
    run(*TINY, "--dataset", "heartbeat", "--output_dir", tmp_path)
    samples, completed, figures, _ = results(tmp_path)
    assert np.unique(samples).tolist() == [0, 1]
    assert len(np.unique(completed[:, :10], axis=0)) == 5
    assert figures["L_null"] == pytest.approx(4 * log2(0.2) + 16 * log2(0.8), abs=1e-3)


def test_digits(monkeypatch, tmp_path):
    """A grey level of 7 becomes 7..8. Test digits are completed, and the betas are not learned."""
    train = conftest.digits("train")[0][:, 0]
    test = conftest.digits("t10k")[0][:, 0].repeat(50, 1, 1)
    parts = {True: SimpleNamespace(data=train), False: SimpleNamespace(data=test)}
    monkeypatch.setattr("torchvision.datasets.MNIST", lambda _, train, download: parts[train])
    *rows, shift, scale = dpm.load_data("mnist", "")
    levels = torch.cat((train, test)).flatten(1)
    noise = torch.cat(rows) * scale + shift - levels
    assert -1e-3 < noise.min() and noise.max() < 1.001
    assert abs(noise.std() - 12**-0.5) < 0.003
    run(*TINY, "--dataset", "mnist", "--num_timesteps", 2, "--output_dir", tmp_path)
    _, completed, _, state = results(tmp_path)
    halves = torch.tensor(completed[:, :392])
    nearest = torch.cdist(halves, levels[:1000, :392] + 0.5).argmin(dim=1)
    assert nearest.min() >= 800  # a test digit
    assert state["options"]["learning_rate"] == 0.002
    betas = dpm.Gaussian(2, 1e-5, learn_betas=False).logit_betas
    assert torch.equal(state["model"]["process.logit_betas"], betas)


NUMBERS = ["--hidden_size 0", "--num_timesteps 1", "--num_samples 24", "--learning_rate nan"]
BAD = [
    *((option, f"{option}: must be above ") for option in [*NUMBERS, "--seed -1"]),
    *((f"--checkpoint {name}.pt", f"no DPM in {name}.pt: ") for name in conftest.BAD_CHECKPOINTS),
    *((options, "holds a model") for options in ["--output_dir .", "--resume copy.pt"]),
    *((f"--checkpoint {name}", "does not fit") for name in ["model.pt --hidden_size 9", "odd.pt"]),
    ("--resume model.pt --num_training_steps 9 --learning_rate 1e30", "K is not finite: lower"),
    ("--output_dir file", "file"),
    ("--dataset mnist", "Error downloading"),
]


@pytest.mark.parametrize(("options", "words"), BAD)
def test_bad_input(options, words, roll, tmp_path, capsys):
    """One line names what is wrong. No file changes, and no code in a checkpoint runs."""
    conftest.write_bad_checkpoints(tmp_path, roll / "model.pt", "model")
    assert words in conftest.error_of("dpm_2015.py", [*TINY, *options.split()], tmp_path, capsys)
    assert not (tmp_path / "pwned").exists()
