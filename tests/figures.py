"""Draw the figures of the README from models that the scripts trained, and from tests/models.

python main.py
python tests/figures.py               a minute after that; into images/
python tests/figures.py experiments   trains the heart 15 times with something changed, and draws it
"""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
import torch
from matplotlib.figure import Figure
from torch.distributions import Normal

ROOT = Path(__file__).resolve().parent.parent
IMAGES = ROOT / "images"
sys.path.insert(0, str(ROOT))
import likelihood

import ddpm_unet
import main

BLUE, ORANGE, GREY = "tab:blue", "tab:orange", "tab:gray"
NO_TICKS = {"xticks": (), "yticks": (), "aspect": "equal"}


def new_figure(rows, columns, height):
    """Return a figure with axes (rows, columns)."""
    figure = Figure(figsize=(10, height), dpi=90, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def exact_eps(schedule, points):
    """Return the best network for a finite data set: E[eps | x_t], a softmax over its points."""

    def model(x_t, t):
        signal, noise_std = schedule.signal[t[0]], schedule.noise_std[t[0]]
        weights = (-(torch.cdist(x_t, signal * points) ** 2) / (2 * noise_std**2)).softmax(dim=1)
        return (x_t - signal * weights @ points) / noise_std

    return model


def strip(schedule, x_0, network, limit):
    """Draw the heart at six noise levels: above, noise is added; below, it is removed."""
    T = schedule.T
    shown = [0, T // 20, T // 8, T // 4, T // 2, T]
    chain = main.p_sample_loop(network, schedule, (1500, 2), "eps", limit)
    samples = {step: x for step, x in chain if step in shown}
    x = x_0[torch.randint(len(x_0), (1500,))]
    eps = torch.randn(1500, 2)
    figure, (above, below) = new_figure(2, 6, height=3.7)
    for k, step in enumerate(shown):
        x_t = main.q_sample(schedule, x, torch.tensor([step]), eps)
        above[k].scatter(*x_t.T, s=2, color=BLUE, linewidths=0)
        above[k].set_title(f"{step} of {T} steps", fontsize=11)
        below[k].scatter(*samples[step].T, s=2, color=ORANGE, linewidths=0)
        for axes in (above[k], below[k]):
            axes.set(xlim=(-3.2, 3.2), ylim=(-3.2, 3.2), **NO_TICKS)
    above[0].set_ylabel("data", fontsize=11)
    below[0].set_ylabel("samples", fontsize=11)
    figure.savefig(IMAGES / "figure_strip.png")


def guess(schedule, x_0):
    """Draw which data a noisy point may come from, and their average, at four steps."""
    figure, (panels,) = new_figure(1, 4, height=2.9)
    x_t = torch.tensor([[1.35, 0.3]])  # divided by signal
    for axes, step in zip(panels, (100, 50, 20, 10)):
        distances = torch.cdist(x_t, x_0) * schedule.signal[step] / schedule.noise_std[step]
        probability = (-(distances**2) / 2).softmax(dim=1)
        likely = x_0[probability[0].multinomial(400, replacement=True)]
        axes.scatter(*x_0[::8].T, s=2, color=BLUE, alpha=0.3, linewidths=0)
        axes.scatter(*likely.T, s=14, color=BLUE, alpha=0.5, linewidths=0)
        axes.plot(*x_t.T, "kx", markersize=9, markeredgewidth=2)
        axes.plot(*(probability @ x_0).T, "*", color=ORANGE, markersize=16)
        axes.set(title=f"step {step} of {schedule.T}", xlim=(-2, 2), ylim=(-2, 2), **NO_TICKS)
    figure.savefig(IMAGES / "figure_guess.png")


def step_back(schedule):
    """Draw where 0.5 after 100 steps was before: clues, then nearly and exactly. Data: -1 and 1."""
    figure, (panels,) = new_figure(1, 3, height=2.9)
    x = torch.linspace(-2, 2, 400)[:, None]
    alpha_bar = schedule.signal[100] ** 2
    alpha = alpha_bar / schedule.signal[99] ** 2
    x_0_hat = torch.tanh(alpha_bar**0.5 * 0.5 / (1 - alpha_bar))
    origin = Normal(schedule.signal[99] * x_0_hat, schedule.noise_std[99])
    step = Normal(0.5 / alpha**0.5, ((1 - alpha) / alpha) ** 0.5)
    panels[0].plot(x, origin.log_prob(x).exp(), color=BLUE, lw=2, label="the origin")
    panels[0].plot(x, step.log_prob(x).exp(), color=GREY, lw=2, label="the step")
    x_0 = torch.tensor([-1, 1])
    for axes, t in zip(panels[1:], (99, 20)):
        before = schedule.signal[t] ** 2
        means, variance = ddpm_unet.q_posterior(x_0, 0.5, alpha_bar, before)
        mean, _ = ddpm_unet.q_posterior(x_0_hat, 0.5, alpha_bar, before)
        exact = Normal(means, variance**0.5).log_prob(x).exp() @ (1 + x_0 * x_0_hat) / 2
        bell = Normal(mean, variance**0.5).log_prob(x).exp()
        axes.plot(x, exact, ":", color="black", lw=4, label="exact")
        axes.plot(x, bell, color=ORANGE, lw=2, label="bell curve")
    for axes, title in zip(panels, ("the two clues", "one step back", "80 steps back")):
        axes.set(title=title, yticks=(), ylim=(0, None))
        axes.legend()
    figure.savefig(IMAGES / "figure_step_back.png")


def floor(schedule, x_0, network, exact):
    """Draw the squared error of eps at every fourth step, of the network and the exact model."""
    steps = range(1, schedule.T + 1, 4)
    figure, ((axes,),) = new_figure(1, 1, height=3.2)
    looks = ((network, "o", ORANGE, "the network"), (exact, "-", BLUE, "the least possible"))
    for model, style, colour, name in looks:
        torch.manual_seed(0)  # the same draws for both
        losses = []
        for step in steps:
            x, eps = x_0[torch.randint(len(x_0), (2000,))], torch.randn(2000, 2)
            t = torch.full((2000,), step)
            x_t = main.q_sample(schedule, x, t, eps)
            losses.append((eps - model(x_t, t)).square().mean())
        axes.plot(steps, losses, style, color=colour, ms=4, label=name)
    axes.set(xlabel="noise steps", ylabel="squared error of eps, per number")
    axes.legend()
    figure.savefig(IMAGES / "figure_floor.png")


def scores(schedule, x_0, network, exact):
    """Draw arrows where noisy points are, at three steps: the score times the noise's variance."""
    side = torch.linspace(-2.6, 2.6, 24)
    grid = torch.cartesian_prod(side, side)  # (576, 2)
    figure, rows = new_figure(2, 3, height=6.8)
    looks = ((exact, GREY, "exact"), (network, ORANGE, "the network"))
    for row, (model, colour, name) in zip(rows, looks):
        torch.manual_seed(0)  # the same points in both
        row[0].set_ylabel(name, fontsize=12)
        for axes, step in zip(row, (10, 20, 60)):
            noise_std = schedule.noise_std[step]
            x_t = main.q_sample(schedule, x_0[::4], torch.tensor([step]), torch.randn(2000, 2))
            near = grid[torch.cdist(grid, x_t).min(dim=1)[0] < 2 * noise_std]
            arrows = -model(near, torch.full((len(near),), step)) * noise_std
            axes.scatter(*x_t.T, s=2, color=BLUE, alpha=0.3, linewidths=0)
            axes.quiver(*near.T, *arrows.T, color=colour, width=0.004, angles="xy", scale=25)
            axes.set(xlim=(-2.8, 2.8), ylim=(-2.8, 2.8), **NO_TICKS)
            axes.set_title(f"step {step} of {schedule.T}", fontsize=12)
    figure.savefig(IMAGES / "figure_score.png")


def digit_rows(rows, names, file, titles=()):
    """Draw rows of digits (n, 1, 28, 28) with a name each, and titles over the first row."""
    figure, axes = new_figure(len(rows), 1, height=0.85 * len(rows) + 0.3)
    for ax, row, name in zip(axes[:, 0], rows, names):
        ax.imshow(ddpm_unet.tile(row, len(row)))
        ax.set(**NO_TICKS)
        ax.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=12)
    axes[0, 0].set_xticks([30 * k + 16 for k in range(len(titles))], titles, fontsize=12)
    axes[0, 0].xaxis.tick_top()
    figure.savefig(IMAGES / f"figure_{file}.png")


def unet_samples(net, alpha_bars, count, steps, sampler):
    """Return digits (count, 1, 28, 28) with labels in turn; the same x_T for each sampler."""
    torch.manual_seed(0)
    x_T = torch.randn(count, 1, 28, 28)
    labels = torch.arange(count) % 10
    for _, x, _ in ddpm_unet.p_sample_loop(net, alpha_bars, steps, x_T, labels, 0.5, sampler):
        pass
    return x


def unet(net, alpha_bars):
    """Draw one x_T through several samplers, and what the network sees in a digit at each t."""
    samplers = [("ddim", 10), ("ddim", 50), ("ddim", 250), ("ddpm", 250)]
    rows = [unet_samples(net, alpha_bars, 12, steps, sampler) for sampler, steps in samplers]
    digit_rows(rows, [f"{sampler}, {steps} steps" for sampler, steps in samplers], "samplers")
    drawn = unet_samples(net, alpha_bars, 25, 50, "ddim").flatten(1)
    file = ROOT / "tests" / "mnist" / "t10k-images-idx3-ubyte.gz"
    pixels = np.frombuffer(gzip.decompress(file.read_bytes()), np.uint8, offset=16)
    real = torch.tensor(pixels[: 25 * 784] / 127.5 - 1).float().view(25, 784)
    pictures = (("ddpm_unet_digits", "ddpm_unet.py", drawn), ("real_digits", "real digits", real))
    for name, title, digits in pictures:
        imageio.imwrite(IMAGES / f"{name}.png", main.draw(title, digits, "", digits))
    t = torch.linspace(1, len(alpha_bars) - 1, 12).long()
    torch.manual_seed(0)
    alpha_bar = alpha_bars[t].float().view(-1, 1, 1, 1)
    x_t = ddpm_unet.q_sample(real[0].view(1, 1, 28, 28), alpha_bar, torch.randn(12, 1, 28, 28))
    eps_hat = net(x_t, t, torch.full((12,), net.no_label))
    x_0_hat = (x_t - (1 - alpha_bar) ** 0.5 * eps_hat) / alpha_bar**0.5
    digit_rows([x_t, x_0_hat.clamp(-1, 1)], ["x_t at step", "x_0_hat"], "sees", t.tolist())


# Each experiment: a title, options of main.py, and what to write in place of what in its source
RAW = {"2 * embedding_size if data_dim == 2 else ": "", "if x_t.shape[1] == 2": "if False"}
EXPERIMENTS = [
    ("T = 200: the default", "", {}),
    ("no fresh noise", "", {"return mean + sigma * torch.randn_like(x_t)": "return mean"}),
    ("the network not told t", "", {"sinusoidal_embedding(t - 1,": "sinusoidal_embedding(0 * t,"}),
    ("T = 20", "--num_timesteps 20", {}),
    ("T = 50", "--num_timesteps 50", {}),
    ("raw coordinates", "", RAW),
    ("predict x_0", "--predict x_0", {}),
    ("width 16", "--hidden_size 16", {}),
    ("T = 1000", "--num_timesteps 1000", {}),
    ("width 32", "--hidden_size 32", {}),
    ("x_T is not noise", "", {"0.02, T) * 1000 / T": "0.02, T)"}),
    ("beta for beta tilde", "", {"variance = weight * variance_0": "variance = beta * (t > 1)"}),
    ("learning rate 0.005", "--learning_rate 5e-3", {}),
    ("learning rate 0.02", "--learning_rate 2e-2", {}),
    ("learning rate 0.1", "--learning_rate 1e-1", {}),
]


def experiments(name, chosen):
    """Train the heart for each of 8 experiments, unless that is done, and draw all samples."""
    figure, panels = new_figure(2, 4, height=5.7)
    for (title, options, changes), axes in zip(chosen, panels.flat):
        out = ROOT / "outputs" / "experiments" / title.replace(" ", "_").replace(":", "")
        source = (ROOT / "main.py").read_text()
        for old, new in changes.items():
            source = source.replace(old, new)
        if not (out / "run.json").exists():
            out.mkdir(parents=True, exist_ok=True)
            (out / "changed.py").write_text(source)
            options = ["--output_dir", out, "--num_samples", "10000", *options.split()]
            subprocess.run([sys.executable, out / "changed.py", *options], check=True)
        distance = json.loads((out / "run.json").read_text())["energy distance"]
        axes.scatter(*np.load(out / "samples.npy")[:1000].T, s=2, color=ORANGE, linewidths=0)
        axes.set(xlim=(-4.2, 4.2), ylim=(-4.2, 4.2), **NO_TICKS)
        axes.set_title(f"{title}\n{distance:.4f}", fontsize=11)
    figure.savefig(IMAGES / f"figure_{name}.png")


@torch.no_grad()
def all_but_experiments(outputs):
    """Draw the figures of the models in outputs/heart and tests/models."""
    torch.manual_seed(0)
    network, config = main.load_checkpoint(outputs / "heart" / "model.pt", "cpu")
    schedule = main.make_schedule(config.num_timesteps)
    x_0, _, _ = main.standardise(main.heart())
    exact = exact_eps(schedule, x_0[::4])
    guess(schedule, x_0)
    step_back(schedule)
    strip(schedule, x_0, network, config.limit)
    floor(schedule, x_0, network, exact)
    scores(schedule, x_0, network, exact)
    unet(*likelihood.load_net(ROOT / "tests" / "models" / "ddpm_unet_mnist.pt"))


if __name__ == "__main__":
    if sys.argv[1:] == ["experiments"]:
        experiments("experiments", EXPERIMENTS[:8])
        experiments("little", [EXPERIMENTS[0], *EXPERIMENTS[8:]])
    else:
        all_but_experiments(Path("outputs"))
