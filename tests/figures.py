"""Draws the figures of the README from models that the scripts trained with their defaults.

python main.py && python dpm_2015.py && python ddpm_unet.py
python tests/figures.py               a minute after that; into images/
python tests/figures.py FOLDER        the same from the models in FOLDER, instead of outputs
"""

import gzip
import sys
from pathlib import Path

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


def schedules(roll_betas):
    """How much of the data is left at each step, and the signal-to-noise ratio, in each script."""
    learned = dpm_2015.Gaussian(roll_betas).alpha_bars
    heartbeat = 1 - torch.arange(1, 2001) / 2000
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
    figure.legend(loc="outside upper center", ncols=4, fontsize=8)
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
    floor(schedule, x_0, network, exact)
    scores(schedule, network, exact)


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
    for (name, losses), colour in zip(found.items(), (ORANGE, BLUE)):
        axes.plot([step + 1 for step in steps], losses, color=colour, label=name)
    axes.set(xlabel="noise steps", ylabel="squared error of eps, per number")
    axes.legend()
    figure.savefig(OUT / "figure_floor.png")


def scores(schedule, network, exact):
    """Arrows at a grid of points, at three steps: the score times the variance of the noise."""
    side = torch.linspace(-2.6, 2.6, 20)
    points = torch.cartesian_prod(side, side)  # (400, 2)
    look = {"width": 0.003, "angles": "xy", "scale_units": "xy", "scale": 5}
    figure, row = panels(3, height=3.6)
    for axes, step in zip(row, (10, 40, 100)):
        t = torch.full((len(points),), step - 1)
        for model, colour in ((exact, BLUE), (network, ORANGE)):
            move = -model(points, t) * schedule.noise_std[t, None]
            axes.quiver(*points.T, *move.T, color=colour, **look)
        title = f"step {step} of {len(schedule.betas)}"
        axes.set(title=title, xticks=(), yticks=(), aspect="equal")
    figure.savefig(OUT / "figure_score.png")


@torch.no_grad()
def roll(args, content):
    """K over training, the best K for the betas that were learned, and the exact log likelihood."""
    model = dpm_2015.Model(args, 2, 1)
    model.load_state_dict(content["model"])
    betas = model.double().betas()
    (shift, scale), alpha_bars = dpm_2015.SCALING["swiss_roll"], (1 - betas).cumprod(dim=0)
    places = ((dpm_2015.CURVE["swiss_roll"][::4] - shift) / scale).double()
    s2 = float(dpm_2015.NOISE["swiss_roll"] / scale) ** 2

    def best(x_t, t):
        # q(x_0) is a mixture along the curve: mean and variance of x_{t-1} given x_t
        beta, before = betas[t[0]], alpha_bars[t[0] - 1]
        U = before * s2 + 1 - before
        V = (1 - beta) * U + beta
        signal, keep = before.sqrt() * places, (1 - beta).sqrt()
        weights = (torch.cdist(x_t, keep * signal) ** 2 / (-2 * V)).softmax(dim=1)
        first, second, gain = weights @ signal, weights @ signal**2, keep * U / V
        mean = (1 - gain * keep) * first + gain * x_t
        variance = U * beta / V + (1 - gain * keep) ** 2 * (second - first**2).clamp(min=0)
        z_sigma = variance.clamp(max=1 - 1e-6).logit() - beta.logit()
        return torch.cat(((mean - keep * x_t) / beta.sqrt(), z_sigma), dim=1)

    process = dpm_2015.Gaussian(betas)
    pairs = []  # K of the best and of the network, from the same x_0 and noise
    for t in range(1, args.num_timesteps):
        x_0 = dpm_2015.draw_data(args, 8000, dpm_2015.CURVE["swiss_roll"]).double()
        draws = x_0, torch.full((8000,), t), torch.randn_like(x_0)
        pairs.append([dpm_2015.bound(process, z, *draws)[0] for z in (best, model)])
    Ks = torch.tensor([[K.mean() for K in pair] for pair in pairs]).mean(dim=0)
    gaps = torch.stack([K - of_network for K, of_network in pairs])
    error = gaps.var(dim=1).mean().div(gaps.numel()).sqrt()
    gap = f"gap {gaps.mean():.3f} +- {error:.3f} bits"
    print(f"swiss roll, K: best {Ks[0]:.3f}, network {Ks[1]:.3f}, {gap}")
    process = dpm_2015.Gaussian(betas.float())
    exact = dpm_2015.evaluate(process, model.float(), args, dpm_2015.CURVE["swiss_roll"], None)
    training = content["Ks"][: len(content["Ks"]) // 20 * 20].view(-1, 20).mean(dim=1)
    figure, (axes,) = panels(1)
    steps = torch.arange(len(training)) * 20 + 10
    axes.plot(steps, training, color=ORANGE, label="K in training, means of 20 steps")
    axes.axhline(Ks[0], color=BLUE, linestyle="--", label="best K for the learned betas")
    axes.axhline(exact["exact log likelihood"], color=GREY, label="exact log likelihood")
    axes.set(xlabel="training step", ylabel="bits", ylim=(-4.2, 0))
    axes.legend()
    figure.savefig(OUT / "figure_K.png")


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
    path = ROOT / "tests" / "mnist" / "t10k-images-idx3-ubyte.gz"
    images = torch.frombuffer(bytearray(gzip.decompress(path.read_bytes())), dtype=torch.uint8)
    digit = images[16 : 16 + 784].view(28, 28) / 127.5 - 1  # the first, after 16 bytes of header
    t = torch.linspace(0, len(alpha_bars) - 1, 12).long()
    torch.manual_seed(0)
    eps = torch.randn(12, 1, 28, 28)
    alpha_bar = alpha_bars[t].float().view(-1, 1, 1, 1)
    x_t = ddpm_unet.q_sample(digit.expand(12, 1, -1, -1), alpha_bar, eps)
    eps_hat = net(x_t, t, torch.full((12,), net.no_label))
    x_0_hat = (x_t - (1 - alpha_bar) ** 0.5 * eps_hat) / alpha_bar**0.5
    titles = [f"step {step + 1}" for step in t.tolist()]
    grid([x_t, x_0_hat.clamp(-1, 1)], ["x_t", "x_0_hat"], "figure_sees.png", titles)


def grid(rows, names, path, titles=()):
    """Rows of digits (n, 1, 28, 28) with a name each."""
    figure = Figure(figsize=(10, 0.85 * len(rows) + 0.3), dpi=90, layout="constrained")
    for axes, row, name in zip(figure.subplots(len(rows), 1, squeeze=False)[:, 0], rows, names):
        axes.imshow(ddpm_unet.tile(row, len(row)))
        axes.set(yticks=(), xticks=())
        axes.set_ylabel(name, rotation=0, ha="right", va="center")
    if titles:
        first = figure.axes[0]
        first.set_xticks([30 * k + 16 for k in range(len(titles))], titles, fontsize=8)
        first.xaxis.tick_top()
    figure.savefig(OUT / path)


if __name__ == "__main__":
    outputs = Path(sys.argv[1] if len(sys.argv) > 1 else "outputs")
    roll_args, roll_content = load(dpm_2015, outputs / "dpm_2015_swiss_roll" / "model.pt")
    model = dpm_2015.Model(roll_args, 2, 1)
    model.load_state_dict(roll_content["model"])
    torch.manual_seed(0)
    schedules(model.betas().detach())
    heart(*load(main, outputs / "heart" / "model.pt"))
    roll(roll_args, roll_content)
    path = outputs / "ddpm_unet_mnist" / "model.pt"
    unet(torch.load(path, map_location="cpu", weights_only=True))
