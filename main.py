"""DDPM with an MLP: Denoising Diffusion Probabilistic Models (arXiv 2006.11239), in one file.

Small steps t = 1..T turn data x_0 into noise x_T. A network learns the way back: to new data.
One x_0 is a point (D = 2 numbers) or a digit (D = 784), never the whole heart. B is the batch size.

    python main.py                          a heart, in half a minute on two cores
    python main.py --dataset points.csv     your own points: two numbers on each line
    python main.py --dataset mnist          handwritten digits, in a quarter of an hour
"""

import json
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import nn
from tqdm import tqdm


# %% 1. Data
def heart():
    """Return 8000 points (8000, 2) on a heart-shaped curve."""
    u = torch.linspace(0, 2 * torch.pi, 8000)
    x = 16 * u.sin() ** 3
    y = 13 * u.cos() - 5 * (2 * u).cos() - 2 * (3 * u).cos() - (4 * u).cos()
    return torch.stack((x, y), dim=1) / 5


def swiss_roll():
    """Return 8000 points (8000, 2) along a spiral, plus noise of standard deviation 0.01."""
    u = torch.linspace(1.5 * torch.pi, 4.5 * torch.pi, 8000)
    curve = torch.stack((u * u.cos(), u * u.sin()), dim=1) / 10
    return curve + 0.01 * torch.randn(8000, 2)


DATASETS = {"heart": heart, "swiss_roll": swiss_roll}  # load_data adds MNIST and files


def standardise(data):
    """Return x_0 = (data - shift) / scale for data (N, D), and this shift and scale."""
    if data.shape[1] == 784:
        shift = scale = torch.tensor(127.5)  # 0..255 becomes -1..1, as in the paper's section 3.3
    else:  # mean 0, average variance 1, like noise. Then all x_t have numbers of the same size.
        shift, scale = data.mean(0), data.var(0).mean().sqrt()
    return (data - shift) / scale, shift, scale


# %% 2. Noise schedule and forward process (sections 2 and 4 of the paper)
def make_schedule(T):
    """Return T and three tables, each (T + 1,) for t = 0..T: betas, signal and noise_std.

    Step t:                     x_t = sqrt(1 - beta_t) * x_{t-1} + sqrt(beta_t) * noise     (eq. 2)
    The steps 1 to t at once:   x_t = signal[t] * x_0 + noise_std[t] * eps                  (eq. 4)
    Each step multiplies x_0 by sqrt(1 - beta): signal is the product of these factors, and its
    square is called alpha_bar. Variances add up, so a step makes s = signal**2 + noise_std**2 into
    (1 - beta) * s + beta. From s = 1 at t = 0, it stays at 1: noise_std**2 is 1 - alpha_bar.
    """
    betas = np.linspace(1e-4, 0.02, T) * 1000 / T  # the sum is 10, so alpha_bar_T is about exp(-10)
    betas = np.append(0, betas.clip(max=0.999))  # beta_0 = 0. If T <= 20, some would reach 1
    alpha_bars = np.cumprod(1 - betas)  # in float64, because 1 - alpha_bar can be tiny
    tables = np.float32([betas, np.sqrt(alpha_bars), np.sqrt(1 - alpha_bars)])
    betas, signal, noise_std = torch.tensor(tables)
    return Namespace(T=T, betas=betas, signal=signal, noise_std=noise_std)


def q_sample(schedule, x_0, t, eps):
    """Return x_t (B, D): x_0 after the steps 1 to t (B,), in one jump; eps is N(0, I) (eq. 4)."""
    return schedule.signal[t, None] * x_0 + schedule.noise_std[t, None] * eps


# %% 3. Network
def sinusoidal_embedding(x, size, scale):
    """Turn each number in x (B,) into fast and slow sines and cosines (B, size)."""
    frequencies = scale * 10_000 ** -torch.linspace(0, 1, size // 2)  # from scale to scale / 10,000
    angles = x[:, None] * frequencies  # (B, size / 2)
    return torch.cat((angles.sin(), angles.cos()), dim=1)


class MLP(nn.Module):
    """A residual MLP that maps x_t (B, D) and t (B,) to a guess (B, D) of eps or of x_0."""

    def __init__(self, data_dim, hidden_size, hidden_layers, embedding_size, num_timesteps):
        super().__init__()
        self.embedding_size = embedding_size
        self.time_scale = 1000 / num_timesteps  # embeds t as if there were the paper's 1000 steps
        x_size = 2 * embedding_size if data_dim == 2 else data_dim  # a point enters as waves
        self.first = nn.Linear(x_size + embedding_size, hidden_size)
        self.blocks = nn.ModuleList()
        for _ in range(hidden_layers):
            block = nn.Sequential(nn.LayerNorm(hidden_size), nn.Linear(hidden_size, hidden_size))
            self.blocks.append(block)
        self.last = nn.Sequential(nn.LayerNorm(hidden_size), nn.Linear(hidden_size, data_dim))

    def forward(self, x_t, t):
        inputs = [x_t]
        if x_t.shape[1] == 2:  # points: waves as short as 2 pi / 25 = 0.25 show fine detail
            inputs = [sinusoidal_embedding(x, self.embedding_size, 25.0) for x in x_t.T]  # x: (B,)
        temb = sinusoidal_embedding(t - 1, self.embedding_size, self.time_scale)  # counts from 0
        h = F.silu(self.first(torch.cat((*inputs, temb), dim=1)))  # (B, hidden_size)
        for block in self.blocks:
            h = h + F.silu(block(h))
        return self.last(h)  # (B, D)


# %% 4. Loss (from a bound on -log p(x_0), as in a VAE: see the README, parts 3 and 4)
def loss_simple(model, schedule, x_0, predict):
    """Return the loss of Algorithm 1 for x_0 (B, D). predict: "eps" (L_simple, eq. 14) or "x_0"."""
    t = torch.randint(1, schedule.T + 1, (len(x_0),))  # Algorithm 1, line 3
    eps = torch.randn_like(x_0)  # line 4
    x_t = q_sample(schedule, x_0, t, eps)
    output = model(x_t, t)
    target = {"eps": eps, "x_0": x_0}[predict]
    return F.mse_loss(output, target)  # line 5. Best output: the mean of all targets that fit x_t


# %% 5. Sampling
def q_posterior(schedule, x_0, x_t, t):
    """Return mean and sigma of q(x_{t-1} | x_t, x_0): the step back, if we knew x_0 (eq. 7)."""
    # Bayes' rule: q(x_{t-1} | x_0) q(x_t | x_{t-1}), scaled. Both are bell curves in x_{t-1},
    # exp(-(x - mean)**2 / 2 / variance). Exponents add: 1 / variance adds, and weights the means.
    beta = schedule.betas[t]  # t is one number
    mean_0 = schedule.signal[t - 1] * x_0  # what x_0 tells of x_{t-1}: eq. 4
    variance_0 = schedule.noise_std[t - 1] ** 2
    mean_t = x_t / (1 - beta) ** 0.5  # what x_t tells of x_{t-1}: eq. 2, solved for it
    variance_t = beta / (1 - beta)  # the division enlarges the noise, too
    weight = variance_t / (variance_0 + variance_t)  # 1/variance_0 / (1/variance_0 + 1/variance_t)
    mean = weight * mean_0 + (1 - weight) * mean_t
    variance = weight * variance_0  # beta_tilde. The paper also tries beta, which is larger
    return mean, variance**0.5


def p_sample(model, schedule, x_t, t, predict, limit):
    """Take a step of Algorithm 2: draw x_{t-1} from q_posterior, with x_0_hat in place of x_0.

    The true step first draws x_0 from q(x_0 | x_t), whose mean is about x_0_hat (section 4).
    q_posterior's mean is linear in x_0: the mean stays right. A small step loses little spread.
    """
    output = model(x_t, torch.full((len(x_t),), t))
    from_eps = (x_t - schedule.noise_std[t] * output) / schedule.signal[t]  # eq. 15, linear in eps
    x_0_hat = {"eps": from_eps, "x_0": output}[predict]
    x_0_hat = x_0_hat.clamp(-limit, limit)  # limit: largest |x_0|. A small signal magnifies errors
    mean, sigma = q_posterior(schedule, x_0_hat, x_t, t)  # for t = 1, sigma is 0
    # Without clamp, this is line 4: (x_t - beta / noise_std * eps) / sqrt(1 - beta) + sigma * z.
    return mean + sigma * torch.randn_like(x_t)


@torch.no_grad()
def p_sample_loop(model, schedule, shape, predict, limit):
    """Run Algorithm 2 for x of this shape. Yield (t, x_t) for t = T, ..., 0."""
    x = torch.randn(shape)  # line 1
    yield schedule.T, x
    for t in range(schedule.T, 0, -1):  # line 2
        x = p_sample(model, schedule, x, t, predict, limit)
        yield t - 1, x


# %% 6. Training
def train(model, schedule, x_0, config, path):
    """Train by Algorithm 1 on x_0 (N, D). Draw the losses at path. Return frames of a GIF."""
    optimizer = torch.optim.Adam(model.parameters(), fused=True)  # the learning rate is set below
    losses = []
    frames = []
    bar = tqdm(total=config.num_epochs * len(x_0), desc="training")  # counts examples
    try:
        for epoch in range(config.num_epochs):
            if epoch in (0, 3, 10, 30, 100):
                frames.append(snapshot(f"after {epoch} epochs", model, schedule, config))
            rate = min((epoch + 1) / 5, 1 - epoch / config.num_epochs)  # rises, then falls
            optimizer.param_groups[0]["lr"] = config.learning_rate * rate
            for indices in torch.randperm(len(x_0)).split(config.train_batch_size):
                loss = loss_simple(model, schedule, x_0[indices], config.predict)
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                bar.update(len(indices))
            losses.append(loss.item())
            bar.set_postfix(loss=f"{loss:.4f}")
            if not loss.isfinite():
                sys.exit("main.py: error: the loss is not finite: lower --learning_rate")
    except KeyboardInterrupt:
        print("Training ends early. Next come the samples.")
    figure = Figure()
    figure.add_subplot(xlabel="epoch", ylabel="loss").plot(losses)
    figure.savefig(path)
    return frames


# %% 7. Pictures and a score
def draw_points(axes, x, colour, data):
    """Draw points x (N, 2) in this colour, over the data."""
    edge = 1.3 * float(data.abs().max())
    axes.axis((-edge, edge, -edge, edge))
    axes.plot(*data[:1000].T.cpu(), ".", color="tab:blue", alpha=0.05)
    axes.plot(*x[:300].T.cpu(), ".", color=colour)


def draw_digits(axes, x):
    """Draw the first 25 of the digits x (N, 784), side by side."""
    from torchvision.utils import make_grid  # here, as it takes 2 s

    grid = make_grid(x[:25].view(-1, 1, 28, 28).cpu(), 5)[0]
    axes.imshow(grid.numpy(), cmap="gray", vmin=-1, vmax=1, interpolation="nearest")


def draw(title, x, colour, data):
    """Return a picture (H, W, 3), uint8, of x: points over the data, or digits."""
    canvas = FigureCanvasAgg(Figure(figsize=(3.6, 4)))
    axes = canvas.figure.add_axes((0, 0, 1, 0.9), frame_on=False, xticks=(), yticks=())
    axes.set_title(title, fontsize=16)  # in the upper tenth
    if x.shape[1] == 2:
        draw_points(axes, x, colour, data)
    else:
        draw_digits(axes, x)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def snapshot(title, model, schedule, config):
    """Return a picture of samples from the network as it is now."""
    for _, x in p_sample_loop(model, schedule, (300, config.dim), config.predict, config.limit):
        pass  # only the last x is drawn
    return draw(title, x, "tab:orange", config.examples)


def animate(model, schedule, config, num_samples, every):
    """Return new samples x (num_samples, D), the frames of a GIF, and their times."""
    steps = [*range(0, schedule.T, every), schedule.T]  # the t to be seen
    eps = torch.randn_like(config.examples)  # the same in all pictures: points can be followed
    frames = []
    for t in steps:
        x_t = q_sample(schedule, config.examples, torch.tensor([t]), eps)
        frames.append(draw(f"adding noise: step {t}", x_t, "tab:blue", config.examples))
    chain = p_sample_loop(model, schedule, (num_samples, config.dim), config.predict, config.limit)
    for t, x in tqdm(chain, "sampling", total=schedule.T + 1):
        if t in steps:
            frames.append(draw(f"removing noise: {t} left", x, "tab:orange", config.examples))
    times = [250 if t <= schedule.T / 4 else 80 for t in steps + steps[::-1]]  # milliseconds
    times[-1] = 3000
    return x, frames, times


def energy_distance(a, b):
    """Return 2 E|a - b| - E|a - a'| - E|b - b'| for samples (N, D), (M, D): near 0 if alike."""
    within = torch.cdist(a, a).mean() + torch.cdist(b, b).mean()
    return float(2 * torch.cdist(a, b).mean() - within)


# %% 8. Files, command line, and main, which puts everything together
def load_data(name, data_dir):
    """Return points (N, 2), or MNIST's training digits (60000, 784) with grey levels 0..255."""
    if name in DATASETS:
        return DATASETS[name]()
    try:
        if name == "mnist":
            from torchvision.datasets import MNIST

            return MNIST(data_dir, download=True).data.flatten(1)
        x = np.load(name) if name.endswith(".npy") else np.loadtxt(name, delimiter=",")
        x = torch.tensor(np.float32(x))
    except Exception as error:
        raise SystemExit(f"main.py: error: --dataset {name}: {error!r:.99}; see --help") from error
    if x.shape[1:] != (2,) or len(x) < 100 or not x.abs().max() / 1e4 < x.std(0).max() < 1e30:
        sys.exit(f"main.py: error: --dataset {name}: need 100 or more rows of 2 numbers that vary")
    return x.repeat(1 + 7999 // len(x), 1)  # so an epoch has at least 8000 examples


def new_config(args):
    """Return x_0 (N, D) to train on, and config: the options, and what we must know of the data."""
    data = load_data(args.dataset, args.data_dir).to(args.device)
    config = Namespace(**vars(args))
    x_0, config.shift, config.scale = standardise(data)
    config.dim = x_0.shape[1]  # D: 2 or 784
    config.sizes = (config.dim, args.hidden_size, args.hidden_layers, args.embedding_size)
    config.limit = x_0.abs().max()  # p_sample keeps x_0_hat within it
    config.examples = x_0[torch.randperm(len(x_0))[:8000]]  # for pictures, and to compare with
    return x_0, config


def save_checkpoint(path, model, config):
    """Save under another name, then rename, so that model.pt is never half-written."""
    checkpoint = {
        "config": vars(config),  # the options, and what new_config adds
        "weights": model.state_dict(),
    }
    with path.with_suffix(".part").open("wb") as file:
        torch.save(checkpoint, file)
    if path.exists():
        path.replace(path.with_name("model.old.pt"))  # of an earlier training
    path.with_suffix(".part").replace(path)


def load_checkpoint(path, device):
    """Return the network and config that save_checkpoint has saved."""
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
        config = Namespace(**checkpoint["config"])
        model = MLP(*config.sizes, config.num_timesteps)
        model.load_state_dict(checkpoint["weights"])
    except Exception as error:
        raise SystemExit(f"main.py: error: no MLP in {path}: {error!r:.200}") from error
    return model, config


def parse_options(argv):
    """Return the options."""
    device = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    parser = ArgumentParser(usage="main.py [options]")
    flag = parser.add_argument

    def option(names, default, help):
        flag(*names.split(), type=type(default), default=default, help=help)

    option("--dataset", "heart", f"{', '.join(DATASETS)}, mnist, or a .npy or .csv file of points")
    option("--num_timesteps", 200, "number of diffusion steps T, from 20 to 1000 or so")
    flag("--predict", choices=["eps", "x_0"], default="eps", help="what the network predicts")
    option("--embedding_size", 32, "how many sines and cosines, an even number")
    option("--hidden_size", 96, "width of the network")
    option("--hidden_layers", 2, "residual blocks")
    option("--train_batch_size", 1000, "examples in a training step")
    option("--num_epochs", 240, "passes over the data")
    option("--learning_rate", 1e-2, "it rises to this, then falls")
    option("--num_samples --eval_batch_size", 2000, "samples to draw")
    option("--show_image_step", 8, "diffusion steps between two frames")
    flag("--checkpoint", "--eval_path", help="model.pt to draw samples from, with its own options")
    flag("--output_dir", help="folder for all files [outputs/NAME]")
    option("--data_dir", "data", "holds the 4 files of MNIST in MNIST/raw, or will")
    option("--seed", 0, "the same seed and number of threads give the same samples")
    flag("--device", choices={device, "cpu"}, default=device, help="where to compute")
    args = parser.parse_args(argv)
    if args.dataset == "mnist":  # an MLP guesses a digit x_0 more easily than noise
        parser.set_defaults(predict="x_0", hidden_size=768, hidden_layers=4, show_image_step=20)
        parser.set_defaults(train_batch_size=256, num_epochs=34, learning_rate=4e-3)
        args = parser.parse_args(argv)  # again, with these defaults
    if args.embedding_size % 2:
        parser.error(f"--embedding_size {args.embedding_size}: must be even")
    for name, value in vars(args).items():
        if isinstance(value, (int, float)) and name != "seed" and not 0 < value <= 10_000:
            parser.error(f"--{name} {value}: must be positive, and at most 10,000")
    return args


def main(argv=None):
    """Train a model or load one, draw samples, and write everything to --output_dir."""
    args = parse_options(argv)
    print(f"device: {args.device}")
    torch.set_default_device(None if args.device == "cpu" else args.device)  # None: CPU, but faster
    torch.manual_seed(args.seed)
    if args.checkpoint is None:
        x_0, config = new_config(args)
        model = MLP(*config.sizes, config.num_timesteps)
    else:
        model, config = load_checkpoint(args.checkpoint, args.device)
    schedule = make_schedule(config.num_timesteps)
    name = Path(config.dataset).stem + ("" if args.checkpoint is None else "_samples")
    out = Path(args.output_dir or f"outputs/{name}")
    out.mkdir(parents=True, exist_ok=True)
    if config.dim == 2:
        torch.set_num_threads(min(2, torch.get_num_threads()))  # small networks need no more
    if args.checkpoint is None:
        frames = train(model, schedule, x_0, config, out / "loss.png")
        save_checkpoint(out / "model.pt", model, config)
        frames += 6 * [snapshot("after training", model, schedule, config)]  # 6: shown longer
        imageio.mimsave(out / "training.gif", frames, duration=400, loop=0)
    torch.manual_seed(args.seed)  # so that a checkpoint gives the same samples again
    x, frames, times = animate(model, schedule, config, args.num_samples, args.show_image_step)
    imageio.mimsave(out / "process.gif", frames, duration=times, loop=0)
    imageio.imwrite(out / "samples.png", draw("samples", x, "tab:orange", config.examples))
    samples = (x * config.scale + config.shift).cpu()
    if config.dim == 784:
        samples = samples.round().byte().view(-1, 28, 28)  # the last x is x_0_hat, clamped
    np.save(out / "samples.npy", samples)
    distance = energy_distance(x, config.examples)
    real = config.examples[torch.randint(len(config.examples), (len(x),))]  # real data, drawn again
    reference = energy_distance(real, config.examples)
    facts = {
        "options": vars(args),  # with --checkpoint, those of the model are in model.pt
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "energy distance": distance,
        "energy distance of real data": reference,
    }
    (out / "run.json").write_text(json.dumps(facts, indent=2))
    print(f"{out}: energy distance to the data {distance:.4f}, of real data {reference:.4f}")


if __name__ == "__main__":
    try:
        main([] if "kernel_launcher" in sys.argv[0] else None)  # a notebook has no options
    except KeyboardInterrupt:
        sys.exit(130)
    except (OSError, MemoryError, torch.OutOfMemoryError) as error:
        sys.exit(f"main.py: error: {error}")
