"""DDPM with an MLP: Denoising Diffusion Probabilistic Models, from data to samples, in one file.

A forward process turns data into Gaussian noise in T small steps, a network learns to undo one such step, and
undoing all of them turns noise into new data. Ho, Jain and Abbeel 2020, https://arxiv.org/abs/2006.11239.
The data: points of a heart or a swiss roll (the network sees one point, never the picture), or MNIST.

    python main.py                                                   heart, 20 seconds on 2 CPU cores
    python main.py --dataset mnist                                   digits, 6 minutes on 2 CPU cores
    python main.py --checkpoint outputs/heart/model.pt --seed 1      more samples of a trained model

Index: the code counts t = 0..T-1; the paper's t is the code's t + 1. Pictures count noise steps: 0 is data.
Deviations from the paper: an MLP for the U-Net; no moving average of its weights (it gained nothing); betas
times 1000 / T, so that x_T is noise for every T; t evenly spread in a batch; gradients clipped; a learning
rate that falls to 0; x_0_hat clipped to the range of the data; on MNIST the network predicts x_0, not eps.
"""

# %% 1. Imports
import time

STARTED = time.perf_counter()  # before the imports: a user waits for them as well

import json
import math
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import nn
from tqdm import tqdm

# %% 2. Options
OPTIONS = {  # the default for points, the default for digits, help; the first five make the model
    "num_timesteps": (200, 250, "T, the number of diffusion steps, 20 or more"),
    "predict": ("eps", "x_0", "what the network predicts, eps or x_0"),
    "embedding_size": (32, 128, "sines and cosines that stand for t, and for each coordinate of a point"),
    "hidden_size": (96, 1024, "width of the network"),
    "hidden_layers": (2, 4, "residual blocks in the network"),
    "train_batch_size": (1000, 256, "examples in a training step"),
    "num_epochs": (300, 45, "passes over the training data"),
    "learning_rate": (1e-2, 4e-3, "of Adam at its highest; it rises in 100 steps, then falls to 0"),
    "eval_batch_size": (10_000, 2000, "samples to draw"),
    "show_image_step": (5, 10, "diffusion steps from one frame of process.gif to the next"),
    "seed": (0, 0, "fixes all that is random"),
}


def fail(message):
    """Bad input ends here: one line that names the flag, the value and the way out; exit status 2."""
    tqdm.write(f"main.py: error: {message}", file=sys.stderr)  # on its own line, below a progress bar
    sys.exit(2)


def parse_options(argv=None):
    """The options, complete, and the content of the file that --checkpoint names, or None."""
    cuda = [f"cuda:{k}" for k in range(torch.cuda.device_count())]
    here = cuda + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    parser = ArgumentParser("main.py", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.error, flag = fail, parser.add_argument
    flag("--dataset", choices=("heart", "swiss_roll", "mnist"), help="what to learn [heart]")
    for name, (points, digits, text) in OPTIONS.items():
        alias = ["--num_samples"] if name == "eval_batch_size" else []
        kind = {"choices": ("eps", "x_0")} if name == "predict" else {"type": type(points), "metavar": "N"}
        flag(f"--{name}", *alias, help=f"{text} [points {points}, digits {digits}]", **kind)
    flag("--eval_path", "--checkpoint", metavar="FILE", help="a model.pt to sample from instead of training")
    flag("--output_dir", metavar="DIR", help="[outputs/DATASET; with --checkpoint outputs/DATASET_samples]")
    flag("--data_dir", metavar="DIR", default="data", help="holds MNIST/raw, or will after a download [data]")
    flag("--device", default=here[0], help="cuda, mps or cpu [the first that is there]")
    args = parser.parse_args([] if argv is None and "ipykernel" in sys.modules else argv)  # notebook: none
    path = args.eval_path
    args.device += ":0" if args.device == "cuda" else ""
    if args.device not in here:
        fail(f"--device {args.device}: not on this machine or not in this build of torch; here: {here}")
    try:
        checkpoint = torch.load(path, args.device, weights_only=True) if path else None  # runs no code of it
        saved = {name: checkpoint["main.py"][name] for name in ("dataset", *OPTIONS)} if path else {}
    except Exception as error:  # noqa: BLE001 — a bad file fails in many ways
        fail(f"--checkpoint {path}: {type(error).__name__}; give a model.pt of main.py")
    args.dataset = args.dataset or saved.get("dataset", "heart")
    for name, (points, digits, _) in OPTIONS.items():
        if getattr(args, name) is None:
            setattr(args, name, saved.get(name, digits if args.dataset == "mnist" else points))
    for name, value in vars(args).items():
        least = {"num_timesteps": 20, "learning_rate": 1e-12, "seed": 0}.get(name, 1)
        most = 2**63 - 1 if name == "seed" else 10**7
        if isinstance(value, (int, float)) and not least <= value <= most:
            fail(f"--{name} {value}: give a number from {least} to {most}")
        if name in ("dataset", *OPTIONS)[:6] and value != saved.get(name, value):
            fail(f"--{name} {value}: {path} has {saved[name]}; leave the flag out")
    args.output_dir = args.output_dir or f"outputs/{args.dataset}{'_samples' if path else ''}"
    return args, checkpoint


# %% 3. Data
def curve(dataset, v):
    """Points (N, 2) of the heart, or of the swiss roll plus noise of 0.01, at parameters v (N,) in [0, 1)."""
    if dataset == "heart":
        u = 2 * math.pi * v
        y = 13 * u.cos() - 5 * (2 * u).cos() - 2 * (3 * u).cos() - (4 * u).cos()
        return torch.stack((16 * u.sin() ** 3, y), dim=1) / 5
    u = 1.5 * math.pi * (1 + 2 * v)
    return torch.stack((u * u.cos(), u * u.sin()), dim=1) / 10 + 0.01 * torch.randn(len(v), 2).to(v)


def load_mnist(data_dir):
    """Training digits (60000, 784), test digits (10000, 784), uint8, 0 = background; downloads if need be."""
    try:
        from torchvision.datasets import MNIST
    except Exception as error:  # noqa: BLE001 — say, a CPU torch beside a CUDA torchvision
        why = f"torchvision does not work with torch {torch.__version__} ({str(error).splitlines()[0]})"
        fail(f"{why}: install both anew, together, as https://pytorch.org/get-started/locally says")
    try:
        return [MNIST(data_dir, train=train, download=True).data.flatten(1) for train in (True, False)]
    except Exception as error:  # noqa: BLE001 — no network, no permission, a damaged file
        why = f"--data_dir {data_dir}: no MNIST, and no download ({' '.join(str(error).split())[:80]})"
        files = [f"{a}-{b}-ubyte" for a in ("train", "t10k") for b in ("images-idx3", "labels-idx1")]
        fail(f"{why}; put {', '.join(files)} into {Path(data_dir, 'MNIST', 'raw')}")


def load_data(args, checkpoint=None):
    """Training data (N, D), other real data (M, D), both standardised, and stats, the constants for that."""
    if args.dataset == "mnist" and checkpoint:  # sampling needs no digits
        return torch.empty(0, 784, device=args.device), None, checkpoint["stats"]
    if args.dataset == "mnist":
        x_0, real = (digits.to(args.device).float() for digits in load_mnist(args.data_dir))
        shift = scale = torch.tensor(127.5, device=args.device)  # to [-1, 1], the paper's section 3.3
    else:
        v = (torch.arange(8000, device=args.device) + 0.5) / 8000  # evenly: random ones would leave gaps
        x_0, real = curve(args.dataset, v), curve(args.dataset, torch.rand(args.eval_batch_size).to(v))
        shift, scale = x_0.mean(dim=0), x_0.var(dim=0).mean().sqrt()  # to mean 0 and, on average, variance 1
    low, high = (x_0.amin(dim=0) - shift) / scale, (x_0.amax(dim=0) - shift) / scale
    stats = checkpoint["stats"] if checkpoint else {"shift": shift, "scale": scale, "bounds": (low, high)}
    return (x_0 - stats["shift"]) / stats["scale"], (real - stats["shift"]) / stats["scale"], stats


# %% 4. Noise schedule — the paper's section 4
def make_schedule(T, device="cpu"):
    """All that depends on t alone, as tensors (T,): computed in float64, cast to float32 at the end."""
    betas = torch.linspace(1e-4, 0.02, T, dtype=torch.float64) * 1000 / T  # the paper's for T = 1000
    betas = betas.clamp(max=0.999)  # at T = 20 the last would be 1, signal 0: predict_both divides by it
    alpha_bars = (1 - betas).cumprod(dim=0)  # most code calls this alphas_cumprod, and 1 - betas alphas
    alpha_bars_prev = F.pad(alpha_bars[:-1], (1, 0), value=1.0)
    schedule = {
        "betas": betas,
        "signal": alpha_bars.sqrt(),  # eq. 4: x_t = signal x_0 + noise_std eps
        "noise_std": (1 - alpha_bars).sqrt(),
        "posterior_x_0": alpha_bars_prev.sqrt() * betas / (1 - alpha_bars),  # eq. 7: the factor of x_0
        "posterior_x_t": (1 - betas).sqrt() * (1 - alpha_bars_prev) / (1 - alpha_bars),  # and that of x_t
        "posterior_variance": (1 - alpha_bars_prev) / (1 - alpha_bars) * betas,  # eq. 7: beta_tilde
    }
    return Namespace(**{name: values.float().to(device) for name, values in schedule.items()})


# %% 5. Forward process — x_0, x_t, eps are (B, D), t is (B,), so schedule.signal[t, None] is (B, 1)
def q_sample(schedule, x_0, t, eps):
    """x_t (B, D) of q(x_t | x_0) from noise eps: steps 0 to t at once, eq. 4."""
    return schedule.signal[t, None] * x_0 + schedule.noise_std[t, None] * eps


def q_posterior(schedule, x_0, x_t, t):
    """Mean (B, D) and variance (B, 1) of q(x_{t-1} | x_t, x_0), eq. 6 and 7."""
    mean = schedule.posterior_x_0[t, None] * x_0 + schedule.posterior_x_t[t, None] * x_t
    return mean, schedule.posterior_variance[t, None]


# %% 6. Network
def embed(x, size, scale):
    """Numbers (B,) to sines and cosines (B, size), in which an MLP sees fine detail (arXiv 2006.10739)."""
    frequencies = scale * 10_000 ** -torch.linspace(0, 1, (size + 1) // 2, device=x.device)
    angles = x[:, None] * frequencies  # (B, size / 2)
    return torch.cat((angles.sin(), angles.cos()), dim=1)[:, :size]


class MLP(nn.Module):
    """x_t (B, D) and t (B,) to eps_theta(x_t, t) (B, D) or, if it predicts x_0, to x_theta(x_t, t) (B, D)."""

    def __init__(self, args, D, precision="fp32"):
        super().__init__()
        self.predicts, self.size, self.T = args.predict, args.embedding_size, args.num_timesteps
        self.bf16, H, n = precision == "bf16", args.hidden_size, args.hidden_layers
        self.first = nn.Linear((2 * self.size if D == 2 else D) + self.size, H)
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(H), nn.Linear(H, H)) for _ in range(n))
        self.last = nn.Sequential(nn.LayerNorm(H), nn.Linear(H, D))

    def forward(self, x_t, t):
        x = torch.cat([embed(c, self.size, 25.0) for c in x_t.T], dim=1) if x_t.shape[1] == 2 else x_t
        x = torch.cat((x, embed(t, self.size, 1000 / self.T)), dim=1)  # any T spans what the paper's 1000 do
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            h = F.gelu(self.first(x))  # (B, hidden_size)
            for block in self.blocks:
                h = h + F.gelu(block(h))
            return self.last(h).float()  # (B, D)


def predict_both(model, schedule, x_t, t):
    """eps_hat and x_0_hat, both (B, D), from a network that gives one of them: eq. 4 gives the other."""
    signal, noise_std, output = schedule.signal[t, None], schedule.noise_std[t, None], model(x_t, t)
    if model.predicts == "eps":
        return output, (x_t - noise_std * output) / signal
    return (x_t - signal * output) / noise_std, output


# %% 7. Loss — Algorithm 1
def loss_simple(model, schedule, x_0):
    """Algorithm 1, lines 3 to 5 before the gradient, eq. 14: a scalar for standardised data x_0 (B, D).

    To predict eps, a network must carry noise through its hidden layers: easy for the 2 numbers of a point,
    not for the 784 of a digit, whose x_0 is easier, as digits fill little of that space. The losses differ by
    the signal-to-noise ratio: |eps - eps_hat|^2 = alpha_bar_t / (1 - alpha_bar_t) |x_0 - x_0_hat|^2.
    """
    B, T, device = len(x_0), len(schedule.betas), x_0.device
    # Any t is as likely as any other, but those of a batch are evenly spread: the loss is much less noisy.
    t = (torch.randperm(B, device=device) * T // B + torch.randint(T, (1,), device=device)) % T
    eps = torch.randn_like(x_0)
    eps_hat, x_0_hat = predict_both(model, schedule, q_sample(schedule, x_0, t, eps), t)
    return F.mse_loss(eps_hat, eps) if model.predicts == "eps" else F.mse_loss(x_0_hat, x_0)


# %% 8. Sampling — Algorithm 2
@torch.no_grad()
def p_sample_loop(model, schedule, shape, seed, bounds=(-math.inf, math.inf)):
    """Algorithm 2: yields (T, x_T), ..., (0, x_0), each x (B, D). Line 4 as eq. 7 of x_0_hat."""
    device, T = schedule.betas.device, len(schedule.betas)
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn(shape, generator=generator, device=device)
    yield T, x
    for step in reversed(range(T)):
        t = torch.full(shape[:1], step, device=device)
        _, x_0_hat = predict_both(model, schedule, x, t)
        # clamped to the range of the data: at large t a small error of eps_hat would throw x_0_hat far out
        mean, variance = q_posterior(schedule, x_0_hat.clamp(*bounds), x, t)
        z = torch.randn(shape, generator=generator, device=device)
        x = mean + variance.sqrt() * z  # beta_tilde, one of the paper's two choices, is 0 at t = 0: no noise
        yield step, x  # step counts the noise steps that are left in x: its t is step - 1


# %% 9. Training
def train(model, schedule, x_0, stats, args):
    """Trains the model, to the end or to Ctrl-C; writes model.pt, training.gif and loss.png."""
    losses, frames, out, size = [], [], Path(args.output_dir), args.train_batch_size
    batches = (b for _ in range(args.num_epochs) for b in torch.randperm(len(x_0)).to(x_0.device).split(size))
    steps = args.num_epochs * math.ceil(len(x_0) / size)
    optimizer = torch.optim.Adam(model.parameters(), args.learning_rate, fused=True)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / 100, 1 - step / steps))
    pauses = {math.ceil(steps * (k / 16) ** 2) for k in range(1, 16)}  # denser at the start

    def pause():
        ok = torch.stack(losses).isfinite().cpu()
        if not ok.all():  # model.pt stays as it was
            bar.close()
            fail(f"--learning_rate {args.learning_rate}: NaN loss at step {ok.int().argmin() + 1}; lower it")
        content = {"main.py": vars(args), "model": model.state_dict(), "stats": stats}
        save(out / "model.pt", lambda path: torch.save(content, path))
        *_, (_, x) = p_sample_loop(model, schedule, SHOWN[x_0.shape[1]], args.seed, stats["bounds"])
        frames.append(draw(f"training step {len(losses):,}", x, ORANGE))

    try:
        for batch in (bar := tqdm(batches, "training", steps, smoothing=0.05)):
            loss = loss_simple(model, schedule, x_0[batch])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            rate.step()
            losses.append(loss.detach())
            if len(losses) % 50 == 1:  # to read a loss is to wait for the device: not at every step
                bar.set_postfix(loss=f"{torch.stack(losses[-100:]).mean():.4f}", refresh=False)
            if len(losses) in pauses:
                pause()
    except KeyboardInterrupt:
        tqdm.write("training ended early; next come the samples") if losses else sys.exit(130)
    pause()
    save(out / "training.gif", imageio.mimsave, frames + frames[-1:] * 12, duration=250, loop=0)
    axes = Figure(layout="constrained").add_subplot(xlabel="training step", ylabel="loss", yscale="log")
    axes.plot(torch.stack(losses).cpu(), ".", color=BLUE, markersize=1)
    save(out / "loss.png", axes.figure.savefig)


# %% 10. Pictures
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#999999"  # data, samples, score: a colour-blind reader can tell
SHOWN = {2: (500, 2), 784: (20, 784)}  # points or digits in a frame, and their size
GRID = torch.cartesian_prod(torch.linspace(-2.6, 2.6, 20), torch.linspace(-2.6, 2.6, 20))  # (400, 2)


@torch.no_grad()
def draw(title, x, colour, seen_by=(), columns=5):
    """uint8 picture (H, W, 3) of points or digits x (N, D), and what seen_by, (model, schedule, step), sees:
    beside digits x_0_hat; behind points the score on GRID, grad log q(x_t) = -eps_hat / noise_std."""
    height = 4 if x.shape[1] == 2 else 4 * math.ceil(len(x) / columns) / columns / (2 if seen_by else 1)
    canvas = FigureCanvasAgg(Figure(figsize=(4, height + 0.35), dpi=90))
    axes = canvas.figure.add_axes((0, 0, 1, height / (height + 0.35)), title=title)
    axes.set_axis_off()
    if seen_by:
        model, schedule, step = seen_by
        query = GRID.to(x.device) if x.shape[1] == 2 else x
        t = torch.full((len(query),), max(step - 1, 0), device=x.device)
        eps_hat, x_0_hat = predict_both(model, schedule, query, t)
    if x.shape[1] == 2:
        if seen_by:
            axes.quiver(*GRID.T, *(-eps_hat / schedule.noise_std[t, None]).T.cpu(), color=GREY, width=0.003)
        axes.plot(*x.T.cpu(), "o", color=colour, markersize=2.5, markeredgewidth=0)
        axes.set(xlim=(-2.8, 2.8), ylim=(-2.8, 2.8))
    else:
        parts = (x, x_0_hat) if seen_by else (x,)
        blocks = [F.pad(part, (0, 0, 0, -len(x) % columns), value=1.0) for part in parts]  # whole rows
        rows = torch.cat([block.view(-1, columns, 28, 28) for block in blocks], dim=1).transpose(1, 2)
        axes.imshow(rows.flatten(2).flatten(0, 1).cpu().numpy(), cmap="gray", vmin=-1, vmax=1)
        axes.axvline(28 * columns - 0.5, color=ORANGE if seen_by else "none")  # between the halves
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def save(path, write, *parts, **options):
    """write(another name, *parts, **options), then rename: the file is whole, or what it was before."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary := path.with_name(f".{path.name}"), *parts, **options)
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        fail(f"--output_dir {path.parent}: {error}; name a folder with room that can be written")


# %% 11. The whole run
def sliced_w2(a, b):
    """Sliced Wasserstein-2 distance of points (N, 2) and (M, 2): rms over directions and quantiles."""
    angles, levels = torch.arange(128) * math.pi / 128, (torch.arange(1000) + 0.5) / 1000
    directions = torch.stack((angles.cos(), angles.sin()))  # (2, 128)
    a, b = ((x.cpu() @ directions).sort(dim=0)[0][(levels * len(x)).long()] for x in (a, b))  # (1000, 128)
    return (a - b).square().mean().sqrt().item()


def main(argv=None):
    """One run, from options to files; in a notebook main(["--dataset", "mnist"]) stands for a command."""
    args, checkpoint = parse_options(argv)
    device, T, digits, out = args.device, args.num_timesteps, args.dataset == "mnist", Path(args.output_dir)
    cpu = getattr(torch.cpu, "get_capabilities", dict)() if device == "cpu" else {}
    quick = cpu.get("avx512_bf16") or device[:4] == "cuda" and torch.cuda.get_device_capability() >= (8, 0)
    precision = "bf16" if digits and quick else "fp32"  # of the network; that of points is small
    print(f"device: {device}, {precision}, {torch.get_num_threads()} CPU threads")
    if checkpoint and (out / "model.pt").exists():
        fail(f"--output_dir {out}: a training run is there, and stays as it is; name another folder")
    torch.manual_seed(args.seed)
    x_0, real, stats = load_data(args, checkpoint)
    save(out / ".probe", Path.touch)  # better to fail now than after the training
    (out / ".probe").unlink()
    shown, D = SHOWN[x_0.shape[1]]
    schedule, model = make_schedule(T, device), MLP(args, D, precision).to(device)
    model.load_state_dict(checkpoint["model"]) if checkpoint else train(model, schedule, x_0, stats, args)
    data, forward, reverse = x_0[torch.randperm(len(x_0))[: min(shown, args.eval_batch_size)]], [], []
    eps = torch.randn_like(data)  # one for all t: the eye can follow a point
    chain = p_sample_loop(model, schedule, (args.eval_batch_size, D), args.seed, stats["bounds"])
    for step, x in tqdm(chain, "sampling", T + 1):
        if step % args.show_image_step == 0 or step == T:
            seen_by = (model, schedule, step)
            reverse.append(draw(f"noise to data: step {step} of {T}", x[:shown], ORANGE, seen_by))
            if len(data):
                x_t = q_sample(schedule, data, torch.tensor([step - 1]), eps) if step else data
                forward.insert(0, draw(f"data to noise: step {step} of {T}", x_t, BLUE, digits and seen_by))
    frames = forward + reverse + reverse[-1:] * 50  # the last one stays for 3 seconds
    save(out / "process.gif", imageio.mimsave, frames, duration=60, loop=0)
    save(out / "samples.png", imageio.imwrite, draw("samples", x[: 5 * shown], ORANGE, columns=10))
    samples = (x * stats["scale"] + stats["shift"]).cpu().numpy()
    samples = samples.round().clip(0, 255).astype(np.uint8).reshape(-1, 28, 28) if digits else samples
    save(out / "samples.npy", np.save, samples)
    metrics = {} if digits else {"sliced W2": sliced_w2(x, x_0), "of real points": sliced_w2(real, x_0)}
    if digits and not checkpoint:
        with torch.no_grad():
            parts = {"loss on test digits": real, "on training digits": x_0[: len(real)]}
            metrics = {name: loss_simple(model, schedule, part).item() for name, part in parts.items()}
    versions = {"python": sys.version.split()[0], "torch": torch.__version__, "numpy": np.__version__}
    facts = {"options": vars(args), "versions": versions, "device": device, "precision": precision}
    facts |= {"seconds": round(time.perf_counter() - STARTED, 1), "metrics": metrics}
    save(out / f"{'sample' if args.eval_path else 'run'}.json", Path.write_text, json.dumps(facts, indent=2))
    print(f"{out}:", *sorted(path.name for path in out.iterdir()))
    print(", ".join(f"{name} {value:.4f}" for name, value in metrics.items()), f"({facts['seconds']} s)")


if __name__ == "__main__":
    main()
