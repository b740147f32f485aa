"""Draws the figures of the README from models that the scripts trained, and from tests/models.

python main.py && python dpm_2015.py
python tests/figures.py               a minute after that; into images/
python tests/figures.py FOLDER        the same from the models in FOLDER, instead of outputs
python tests/figures.py experiments   trains the heart 13 times with something changed, and draws it
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

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import ddpm_unet
import dpm_2015
import main

BLUE, ORANGE, GREEN, GREY = "tab:blue", "tab:orange", "tab:green", "tab:gray"
OUT = ROOT / "images"


def load(script, path):
    """The options and the content of a model.pt."""
    args, content = script.parse_options(["--checkpoint", str(path), "--device", "cpu"])
    return args, content


def panels(n, height=3.2, **options):
    """A figure with n axes in a row."""
    figure = Figure(figsize=(10, height), dpi=90, layout="constrained")
    return figure, figure.subplots(1, n, squeeze=False, **options)[0]


def schedules(roll):
    """How much of the data is left at each step, and the signal-to-noise ratio, in each script."""
    process = dpm_2015.Gaussian(roll["options"]["num_timesteps"], 1e-4, learn_betas=True)
    names = {name.removeprefix("process."): x for name, x in roll["model"].items()}
    process.load_state_dict(names, strict=False)
    t = torch.arange(1, process.T + 1)
    learned = 1 - process.q(0, 0, t).variance.detach()
    heartbeat = dpm_2015.Binomial(2000, 0.2).alpha_bars[1:]
    curves = [
        ("main.py, T = 200", main.make_schedule(200).signal ** 2, BLUE, "-"),
        ("ddpm_unet.py, T = 1000", ddpm_unet.make_schedule(1000), ORANGE, "--"),
        ("dpm_2015.py, swiss roll, learned, T = 40", learned, GREEN, "-"),
        ("dpm_2015.py, heartbeat, T = 2000", heartbeat, GREY, "-"),
    ]
    figure, (left, right) = panels(2)
    for name, alpha_bars, colour, style in curves:
        place = torch.arange(1, len(alpha_bars) + 1) / len(alpha_bars)
        left.plot(place, alpha_bars, style, color=colour, label=name)
        right.plot(place, alpha_bars / (1 - alpha_bars), style, color=colour)
    left.set(xlabel="t / T", ylabel="alpha_bar")
    right.set(xlabel="t / T", ylabel="signal-to-noise ratio", yscale="log")
    figure.legend(loc="outside upper center", ncols=2, fontsize=11)
    figure.savefig(OUT / "figure_schedules.png")


def exact_eps(schedule, points):
    """The best network for a finite data set: E[eps | x_t], a softmax over its points."""

    def model(x_t, t):
        signal, noise_std = schedule.signal[t[0]], schedule.noise_std[t[0]]
        weights = (-(torch.cdist(x_t, signal * points) ** 2) / (2 * noise_std**2)).softmax(dim=1)
        return (x_t - signal * weights @ points) / noise_std

    return model


@torch.no_grad()
def heart(args, content):
    """Loss of the network at each t and the least possible; its score and the exact one."""
    x_0, _, _ = main.standardise(main.heart())
    schedule = main.make_schedule(args.num_timesteps)
    sizes = (args.hidden_size, args.hidden_layers, args.embedding_size, args.num_timesteps)
    network = main.MLP(2, *sizes)
    network.load_state_dict(content["weights"])
    exact = exact_eps(schedule, x_0[::4])
    strip(schedule, x_0, network, content["limit"])
    floor(schedule, x_0, network, exact)
    scores(schedule, network, exact, x_0)


def strip(schedule, x_0, network, limit):
    """The heart at six noise levels: above, noise is added; below, it is removed."""
    T = len(schedule.betas)
    shown = [0, T // 20, T // 8, T // 4, T // 2, T]
    chain = main.p_sample_loop(network, schedule, (600, 2), "eps", limit)
    reverse = {step: x for step, x in chain if step in shown}
    x, eps = x_0[torch.randint(len(x_0), (600,))], torch.randn(600, 2)
    figure = Figure(figsize=(10, 3.7), dpi=90, layout="constrained")
    for row, colour in zip(figure.subplots(2, 6), (BLUE, ORANGE)):
        for axes, step in zip(row, shown):
            points = reverse[step]
            if colour == BLUE:
                points = main.q_sample(schedule, x, torch.tensor([step - 1]), eps) if step else x
                axes.set_title(f"{step} of {T} steps", fontsize=11)
            axes.scatter(*points.T, s=3, color=colour, linewidths=0)
            axes.set(xlim=(-3.2, 3.2), ylim=(-3.2, 3.2), xticks=(), yticks=(), aspect="equal")
        row[0].set_ylabel("data" if colour == BLUE else "samples", fontsize=11)
    figure.savefig(OUT / "figure_strip.png")


def floor(schedule, x_0, network, exact):
    """Squared error of eps at every fourth step, of the network and of the exact model."""
    steps = range(0, len(schedule.betas), 4)
    found = {"the network": [], "the least possible": []}
    for step in steps:
        t = torch.full((2000,), step)
        x, eps = x_0[torch.randint(len(x_0), (2000,))], torch.randn(2000, 2)
        x_t = main.q_sample(schedule, x, t, eps)
        for model, losses in zip((network, exact), found.values()):
            losses.append((eps - model(x_t, t)).square().mean())
    figure, (axes,) = panels(1)
    for (name, losses), look in zip(found.items(), ("o", "-")):
        colour = ORANGE if look == "o" else BLUE
        axes.plot([step + 1 for step in steps], losses, look, color=colour, ms=4, label=name)
    axes.set(xlabel="noise steps", ylabel="squared error of eps, per number")
    axes.legend()
    figure.savefig(OUT / "figure_floor.png")


def scores(schedule, network, exact, x_0):
    """Arrows where noisy points are, at three steps: the score times the variance of the noise."""
    side = torch.linspace(-2.6, 2.6, 24)
    points = torch.cartesian_prod(side, side)  # (576, 2)
    look = {"width": 0.004, "angles": "xy", "scale_units": "xy", "scale": 4}
    figure = Figure(figsize=(10, 6.8), dpi=90, layout="constrained")
    for row, model, name in zip(figure.subplots(2, 3), (exact, network), ("exact", "the network")):
        row[0].set_ylabel(name, fontsize=12)
        for axes, step in zip(row, (10, 20, 60)):
            x_t = main.q_sample(schedule, x_0[::4], torch.tensor([step - 1]), torch.randn(2000, 2))
            axes.scatter(*x_t.T, s=2, color=BLUE, alpha=0.3, linewidths=0)
            noise_std = schedule.noise_std[step - 1]
            near = points[torch.cdist(points, x_t).min(dim=1)[0] < 2 * noise_std]
            move = -model(near, torch.full((len(near),), step - 1)) * noise_std
            axes.quiver(*near.T, *move.T, color=GREY if model is exact else ORANGE, **look)
            axes.set(xlim=(-2.8, 2.8), ylim=(-2.8, 2.8), xticks=(), yticks=(), aspect="equal")
            axes.set_title(f"step {step} of {len(schedule.betas)}", fontsize=12)
    figure.savefig(OUT / "figure_score.png")


@torch.no_grad()
def unet(content):
    """One x_T through several samplers; and what the network sees in a digit at each t."""
    options = content["options"]
    net = ddpm_unet.UNet(**{name: options[name] for name in ddpm_unet.MODEL})
    net.load_state_dict(content["ema"])
    alpha_bars = ddpm_unet.make_schedule(options["num_timesteps"])
    labels = torch.arange(12) % 10
    rows, names = [], []
    for sampler, steps in (("ddim", 10), ("ddim", 50), ("ddim", 250), ("ddpm", 250)):
        torch.manual_seed(3)
        x_T = torch.randn(12, 1, 28, 28)
        chain = ddpm_unet.p_sample_loop(net, alpha_bars, steps, x_T, labels, 0.5, sampler)
        rows.append(list(chain)[-1][1])
        names.append(f"{sampler}, {steps} steps")
    grid(rows, names, "figure_samplers.png")
    torch.manual_seed(0)
    x_T = torch.randn(25, 1, 28, 28)
    chain = ddpm_unet.p_sample_loop(net, alpha_bars, 50, x_T, torch.arange(25) % 10, 0.5, "ddim")
    x = list(chain)[-1][1].flatten(1)
    imageio.imwrite(OUT / "ddpm_unet_digits.png", main.draw("ddpm_unet.py", x, "", x))
    path = ROOT / "tests" / "mnist" / "t10k-images-idx3-ubyte.gz"
    images = torch.frombuffer(bytearray(gzip.decompress(path.read_bytes())), dtype=torch.uint8)
    digits = images[16 : 16 + 25 * 784].view(25, 784) / 127.5 - 1  # after 16 bytes of header
    imageio.imwrite(OUT / "real_digits.png", main.draw("real digits", digits, "", digits))
    digit = digits[0].view(28, 28)
    t = torch.linspace(0, len(alpha_bars) - 1, 12).long()
    torch.manual_seed(0)
    eps = torch.randn(12, 1, 28, 28)
    alpha_bar = alpha_bars[t].float().view(-1, 1, 1, 1)
    x_t = ddpm_unet.q_sample(digit.expand(12, 1, -1, -1), alpha_bar, eps)
    eps_hat = net(x_t, t, torch.full((12,), net.no_label))
    x_0_hat = (x_t - (1 - alpha_bar) ** 0.5 * eps_hat) / alpha_bar**0.5
    titles = [str(step + 1) for step in t.tolist()]
    grid([x_t, x_0_hat.clamp(-1, 1)], ["x_t at step", "x_0_hat"], "figure_sees.png", titles)


def grid(rows, names, path, titles=()):
    """Rows of digits (n, 1, 28, 28) with a name each."""
    figure = Figure(figsize=(10, 0.85 * len(rows) + 0.3), dpi=90, layout="constrained")
    for axes, row, name in zip(figure.subplots(len(rows), 1, squeeze=False)[:, 0], rows, names):
        axes.imshow(ddpm_unet.tile(row, len(row)))
        axes.set(yticks=(), xticks=())
        axes.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=12)
    if titles:
        first = figure.axes[0]
        first.set_xticks([30 * k + 16 for k in range(len(titles))], titles, fontsize=12)
        first.xaxis.tick_top()
    figure.savefig(OUT / path)


# Each experiment: a title, options of main.py, and what to write in place of what in its source
SINES = (
    "        if x_t.shape[1] == 2:  # points: waves as short as 2 pi / 25 = 0.25 show fine detail\n"
    "            inputs = [sinusoidal_embedding(x, self.embedding_size, 25.0) for x in x_t.T]"
    "  # x: (B,)\n"
)
EXPERIMENTS = [
    ("T = 20", "--num_timesteps 20", {}),
    ("T = 50", "--num_timesteps 50", {}),
    ("T = 200: the default", "", {}),
    ("T = 1000", "--num_timesteps 1000", {}),
    ("x_T is not noise", "", {"0.02, T) * 1000 / T": "0.02, T)"}),
    (
        "raw coordinates",
        "",
        {"2 * embedding_size if data_dim == 2 else data_dim": "data_dim", SINES: ""},
    ),
    ("predict x_0", "--predict x_0", {}),
    (
        "beta for beta tilde",
        "",
        {"sigma = beta**0.5 * noise_std_before / noise_std": "sigma = beta**0.5 * (t > 0)"},
    ),
    ("width 16", "--hidden_size 16", {}),
    ("width 32", "--hidden_size 32", {}),
    ("learning rate 0.005", "--learning_rate 5e-3", {}),
    ("learning rate 0.02", "--learning_rate 2e-2", {}),
    ("learning rate 0.1", "--learning_rate 1e-1", {}),
]


def experiments(folder):
    """Train the heart once for each experiment, unless that is done, and draw all samples."""
    figure = Figure(figsize=(10, 6.9), dpi=90, layout="constrained")
    panels = figure.subplots(3, 5).flat
    for (title, options, changes), axes in zip(EXPERIMENTS, panels):
        out = folder / title.replace(" ", "_").replace(":", "")
        source = (ROOT / "main.py").read_text()
        for old, new in changes.items():
            assert source.count(old) == 1, f"main.py has changed: {old}"
            source = source.replace(old, new)
        if not (out / "run.json").exists():
            out.mkdir(parents=True, exist_ok=True)
            (out / "changed.py").write_text(source)
            command = [sys.executable, out / "changed.py", "--output_dir", out, *options.split()]
            subprocess.run([*command, "--num_samples", "10000"], check=True)
        distance = json.loads((out / "run.json").read_text())["energy distance"]
        axes.scatter(*np.load(out / "samples.npy")[:1000].T, s=2, color=ORANGE, linewidths=0)
        axes.set(xlim=(-5, 5), ylim=(-5, 5), xticks=(), yticks=(), aspect="equal")
        axes.set_title(f"{title}\n{distance:.4f}", fontsize=11)
    for axes in panels:
        axes.axis("off")
    figure.savefig(OUT / "figure_experiments.png")


if __name__ == "__main__":
    if sys.argv[1:] == ["experiments"]:
        sys.exit(experiments(ROOT / "outputs" / "experiments"))
    outputs = Path(sys.argv[1] if len(sys.argv) > 1 else "outputs")
    torch.manual_seed(0)
    path = outputs / "dpm_2015_swiss_roll" / "model.pt"
    schedules(torch.load(path, map_location="cpu", weights_only=True))
    heart(*load(main, outputs / "heart" / "model.pt"))
    path = ROOT / "tests" / "models" / "ddpm_unet_mnist.pt"
    unet(torch.load(path, map_location="cpu", weights_only=True))
