"""Deep Unsupervised Learning using Nonequilibrium Thermodynamics: the first diffusion model.

T small steps turn data into noise. A network learns to undo them: training raises K, a lower bound
on the mean of log p(data), in bits. The paper of 2015: https://arxiv.org/abs/1503.03585.

    python dpm_2015.py                        swiss roll, in two minutes
    python dpm_2015.py --dataset heartbeat    binary sequences, in five minutes
    python dpm_2015.py --dataset mnist        handwritten digits, in 50 minutes

Steps are t = 1..T, as in the paper: x_0 is data, x_T is noise.
x is (B, D): B examples of D numbers or bits. t is one number, or (B, 1): one for each example.
"""

import json
import math
import signal
import sys
from argparse import ArgumentParser
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import nn
from torch.distributions import Bernoulli, Distribution, Normal, kl_divergence
from tqdm import tqdm


# %% 1. Data
def swiss_roll():
    """Return points (100000, 2) on a spiral, with noise: a curve alone has no density."""
    u = torch.pi * (1.5 + 3 * torch.rand(100_000))
    return torch.stack((u * u.cos(), u * u.sin()), dim=1) + 0.25 * torch.randn(100_000, 2)


POINTS = {"swiss_roll": swiss_roll}  # each has more than 10,000 points
BITS = {"heartbeat": torch.eye(5).repeat(1, 4)}  # 5 examples (5, 20): a pulse in every fifth bit


def load_data(dataset, data_dir):
    """Return training and test examples (N, D), and the shift and scale that undo their scaling."""
    torch.manual_seed(0)  # the same points in every run, on one device
    if dataset in BITS:
        return BITS[dataset], BITS[dataset], 0.0, 1.0
    if dataset in POINTS:
        x = POINTS[dataset]()
        x = x[torch.randperm(len(x))]  # they may be in order; the last are for testing
    else:
        from torchvision.datasets import MNIST

        try:
            x = torch.cat([MNIST(data_dir, train, download=True).data for train in (True, False)])
        except (RuntimeError, ValueError) as error:
            raise SystemExit(f"dpm_2015.py: error: {data_dir}: {error!r:.99}") from error
        x = x.flatten(1) + torch.rand(len(x), 784, device="cpu")  # for a density: 7 becomes 7..8
    shift, scale = x.mean().item(), x.std().item()
    x = (x - shift) / scale  # mean 0, variance 1 overall
    return x[:-10_000], x[-10_000:], shift, scale


# %% 2. Two kinds of diffusion
# q adds noise, and nearly ends in the prior, pure noise: numbers from N(0, 1), or bits of mean m. A
# film of pure noise looks the same backwards: prior(a) q(b | a) = prior(b) q(a | b). There, a step
# back is a step of q. If x_t still holds data, a small step back is nearly one. A network learns
# the difference: z corrects mean and width of a bell curve, or log-odds of a bit (README, 2, 10).
class Gaussian(nn.Module):
    """Gaussian diffusion. One step is q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I)."""

    def __init__(self, T, beta_1, learn_betas):  # beta_1 is not learned: it could shrink to overfit
        super().__init__()
        self.T = T
        self.prior = Normal(0.0, 1.0)  # p(x_T), of one number
        self.sample = Normal.rsample  # draws so that the betas get gradients
        self.z_per_number = 2  # z_mu and z_sigma
        self.register_buffer("fixed_betas", torch.tensor([0.0, beta_1]))  # beta_0 and beta_1
        self.noise_levels = torch.linspace(math.log(beta_1 / (1 - beta_1)), 7, T)  # as log-odds
        noise = self.noise_levels.sigmoid()  # how much of x_t is noise: from beta_1 to 0.999
        betas = (noise[1:] - noise[:-1]) / (1 - noise[:-1])  # this share of the data is lost
        self.logit_betas = nn.Parameter(betas.logit(), requires_grad=learn_betas)

    def q(self, x_s, s, t):  # q(x_t | x_s): the steps s + 1 to t at once
        betas = torch.cat((self.fixed_betas, self.logit_betas.sigmoid()))  # (T + 1,)
        log_alpha_bars = torch.log1p(-betas).cumsum(dim=0)  # alpha_bar_t: all (1 - beta) up to t
        log_alpha = log_alpha_bars[t] - log_alpha_bars[s]  # log((1 - beta_{s+1}) ... (1 - beta_t))
        variance = -torch.expm1(log_alpha)  # 1 - alpha, precise also near 0
        return Normal((log_alpha / 2).exp() * x_s, variance.sqrt())

    def q_posterior(self, x_0, x_t, t):  # q(x_{t-1} | x_t, x_0), for t >= 2
        before = self.q(x_0, 0, t - 1)  # what x_0 tells of x_{t-1}
        beta = self.q(x_t, t - 1, t).variance  # of step t, for any x
        mean_t = x_t / (1 - beta).sqrt()  # what x_t tells: the step, solved for x_{t-1}
        variance_t = beta / (1 - beta)  # the division enlarges the noise, too
        weight = variance_t / (before.variance + variance_t)  # (1 / v_0) / (1 / v_0 + 1 / v_t)
        mean = weight * before.mean + (1 - weight) * mean_t  # Bayes' rule: multiply bell curves
        return Normal(mean, (weight * before.variance).sqrt())  # inverse variances add up

    def p_reverse(self, z, x_t, t):  # p(x_{t-1} | x_t), for z (B, 2 D) from the network
        z_mu, z_sigma = z.chunk(2, dim=1)  # each (B, D): corrections of the mean and of the width
        step = self.q(x_t, t - 1, t)  # one more step of q, from x_t: this is p if z = 0
        mean = step.mean + step.stddev * z_mu  # eq. 65 differs: see the README, part 10
        variance = (step.variance.logit() + z_sigma).sigmoid()  # eq. 64: always within 0..1
        return Normal(mean, variance.sqrt())


class Binomial:
    """Diffusion of bits: a step keeps a bit, or with probability beta_t draws it from the prior."""

    def __init__(self, T, m):
        self.T = T
        self.m = m  # the mean of the data
        self.prior = Bernoulli(m)  # p(x_T), of one bit
        self.sample = Bernoulli.sample
        self.z_per_number = 1
        self.alpha_bars = 1 - torch.arange(T + 1) / T  # as beta_t is 1 / (T - t + 1)
        self.noise_levels = (1 - self.alpha_bars[1:]).logit().clamp(max=8)  # else infinite at T

    def q(self, x_s, s, t):  # q(x_t | x_s): the steps s + 1 to t at once
        alpha = self.alpha_bars[t] / self.alpha_bars[s]  # the probability that a bit is kept
        return Bernoulli(alpha * x_s + (1 - alpha) * self.m)

    def q_posterior(self, x_0, x_t, t):  # q(x_{t-1} | x_t, x_0), for t >= 2
        before = self.q(x_0, 0, t - 1)  # what x_0 tells of x_{t-1}. Logits: log(P(1) / P(0))
        log_q_1 = self.q(1, t - 1, t).log_prob(x_t)  # log q(x_t | x_{t-1} = 1)
        log_q_0 = self.q(0, t - 1, t).log_prob(x_t)
        return Bernoulli(logits=before.logits + log_q_1 - log_q_0)  # Bayes' rule for log-odds

    def p_reverse(self, z, x_t, t):  # p(x_{t-1} | x_t), for z (B, D) from the network
        step = self.q(x_t, t - 1, t)  # one more step of q, from x_t: this is p if z = 0
        return Bernoulli(logits=(step.logits + z).clamp(-15, 15))  # never 0 or 1: KL stays finite


# %% 3. The bound: what training maximises
def bound(model, x_0):
    """Return estimates (B,) of K (eq. 14) in bits, for x_0 (B, D), and the random t (B, 1) used.

    x_1, ..., x_T are to x_0 what the latent variable is in a VAE. As there, by Jensen's inequality,
        E log p(x_0) >= E [log p(x_0, ..., x_T) - log q(x_1, ..., x_T | x_0)] = K.
    Write both from x_T back to x_0: p as p(x_T) times all p(x_{t-1} | x_t), and q as q(x_T | x_0)
    times all q(x_{t-1} | x_t, x_0), t >= 2. Each step of q meets one of p; p(x_0 | x_1) has none:
        K = -sum over t = 2..T of E KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t))
            + E log p(x_T) - E log q(x_T | x_0) + E log p(x_0 | x_1).
    If data have the prior's mean square (bits: its mean), the last three average to the H's below.
    """
    process, T = model.process, model.process.T
    t = torch.randint(2, T + 1, (len(x_0), 1))
    x_t = process.sample(process.q(x_0, 0, t))
    p = process.p_reverse(model(x_t, t), x_t, t)
    q = process.q_posterior(x_0, x_t, t)
    kl = kl_divergence(q, p).sum(dim=1)
    H_end = process.q(x_0, 0, T).entropy().sum(dim=1)  # -E log q(x_T | x_0)
    H_start = process.q(x_0, 0, 1).entropy().sum(dim=1)  # -E log p(x_0 | x_1): log priors cancel
    H_prior = x_0.shape[1] * process.prior.entropy()  # -E log p(x_T). Why: see the README, part 9
    K = -(T - 1) * kl + H_end - H_start - H_prior  # one random t stands for all T - 1
    return K / math.log(2), t


# %% 4. Network (the paper has one for each data set, and eq. 62 and 63 for images alone)
class Model(nn.Module):
    """A diffusion process, and a network that learns to undo it: z = sum_j g_j(t) y_j (eq. 62)."""

    def __init__(self, process, D, hidden_size):
        super().__init__()
        self.process = process
        layers = []  # dense does not see t; conv then gives ten answers y_j, for ten noise levels
        for inputs in (D, hidden_size, hidden_size):
            layers += [nn.Linear(inputs, hidden_size), nn.LayerNorm(hidden_size), nn.GELU()]
        self.dense = nn.Sequential(*layers, nn.Linear(hidden_size, 4 * D))  # 4 for each number
        last = nn.Conv1d(16, 10 * process.z_per_number, 1, bias=False)  # width 1: for each number
        self.conv = nn.Sequential(nn.Conv1d(5, 16, 1), nn.GELU(), last)
        nn.init.zeros_(last.weight)  # so training begins at z = 0
        centres = torch.linspace(process.noise_levels[0], process.noise_levels[-1], 10)
        distances = (process.noise_levels[:, None] - centres) / (centres[1] - centres[0])
        g = (-(distances**2) / 2).softmax(dim=1)  # ten bumps, side by side over the levels (eq. 63)
        self.register_buffer("temporal_basis", g)  # (T, 10): at step t, g_j(t) weights y_j

    def forward(self, x_t, t):
        B, D = x_t.shape
        h = torch.cat((x_t, self.dense(x_t)), dim=1).view(B, 5, D)  # x_t is the first of the 5
        y = self.conv(h).view(B, 10, -1)  # (B, 10, D); with z_sigma, (B, 10, 2 D)
        g = self.temporal_basis[t - 1]  # (B, 1, 10), as t is (B, 1)
        return (g @ y)[:, 0]  # z (B, D), or z_mu and z_sigma (B, 2 D)


# %% 5. Sampling and inpainting
def p_sample(model, x_t, t):
    """Undo step t: draw x_{t-1} (B, D), for x_t (B, D) and one number t."""
    z = model(x_t, torch.full((len(x_t), 1), t))
    z = z * (t > 1)  # in the last step, z = 0: p(x_0 | x_1) is a step of q (eq. 44)
    return model.process.sample(model.process.p_reverse(z, x_t, t))


@torch.no_grad()
def p_sample_loop(model, shape):
    """Draw x of this shape from the prior. Turn it into data. Yield (t, x) for t = T, ..., 0."""
    x = model.process.prior.sample(shape)
    for t in range(model.process.T, 0, -1):
        yield t, x
        x = p_sample(model, x, t)
    yield 0, x


def inpaint(model, x_0, known, passes=10):
    """Return x_0 (B, D) with new values where known (D,) is false: RePaint, arXiv 2201.09865."""
    process = model.process
    x = process.prior.sample(x_0.shape)
    for t in tqdm(range(process.T, 1, -1), "inpainting"):
        for k in range(passes):  # several, so that the new part can adapt to the known one
            if k > 0:
                x = process.sample(process.q(x, t - 1, t))  # from x_{t-1} forward to x_t again
            x = p_sample(model, x, t)
            known_part = process.sample(process.q(x_0, 0, t - 1))  # as noisy as x
            x = torch.where(known, known_part, x)  # the paper of 2015 puts x_0 itself in
    return torch.where(known, x_0, p_sample(model, x, 1))


# %% 6. Training
def train(model, rows, options, path, state):
    """Maximise K (for digits, weighted). state is {}, or what to resume. Return signals."""
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    if state:
        optimizer.load_state_dict(state["optimizer"])
    start = state.get("step", 0)
    end = options["num_training_steps"]
    signals = []  # filled when Ctrl-C (SIGINT) or SIGTERM arrives: then stop early
    for number in (signal.SIGINT, signal.SIGTERM):  # they now wait for the end of a step
        signal.signal(number, lambda signum, frame: signals.append(signum))
    bar = tqdm(range(start, end), "training", end, initial=start)
    for step in bar:
        torch.manual_seed(options["seed"] * 10**9 + step)  # resuming draws the same
        rate = min((step + 1) / 100, 1 - step / end)  # up in 100 steps, then down to 0
        optimizer.param_groups[0]["lr"] = options["learning_rate"] * rate
        x_0 = rows[torch.randint(len(rows), (options["train_batch_size"],))]
        K, t = bound(model, x_0)
        loss = -K / x_0.shape[1]
        if options["dataset"] == "mnist":  # KLs at small t are large: let them count less
            loss = loss * model.process.q(x_0, 0, t).variance[:, 0]  # 1 - alpha_bar_t
        optimizer.zero_grad()
        loss.mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        bar.set_postfix(K=f"{K.mean():.2f} bits", refresh=False)
        if (step + 1) % 250 == 0 or step + 1 == end or signals:
            if not K.isfinite().all():
                sys.exit("dpm_2015.py: error: K is not finite: lower --learning_rate")
            weights = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            with path.with_suffix(".part").open("wb") as file:
                torch.save({"options": options, "step": step + 1, **weights}, file)
            path.with_suffix(".part").replace(path)  # so that model.pt is never half-written
            if signals:
                break
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return signals


# %% 7. Pictures and figures
def draw(title, x, colour="C1"):
    """Return a picture, uint8 (height, width, 3), of points (N, 2), bits or digits (N, D)."""
    canvas = FigureCanvasAgg(Figure(figsize=(4, 4.4), dpi=90))
    axes = canvas.figure.add_axes((0.02, 0, 0.96, 0.9), aspect="equal", xticks=(), yticks=())
    axes.set_title(title, fontsize=16)
    x = x.cpu()
    if x.shape[1] == 2:
        axes.axis((-2.6, 2.6, -2.6, 2.6))
        axes.scatter(*x[:1000].T, s=6, color=colour, linewidths=0)
    elif x.shape[1] == 784:
        grid = x[:25].view(5, 5, 28, 28).transpose(1, 2).reshape(140, 140)
        axes.imshow(grid.numpy(), cmap="gray", vmin=-0.4, vmax=2.8)
    else:
        axes.pcolormesh(x[:12].numpy(), cmap="Blues", edgecolors="lightgrey", linewidth=1)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


@torch.no_grad()
def evaluate(model, test_rows, num_samples, out):
    """Draw samples x, complete 200 half test examples (y), and estimate K for test examples."""
    T, D = model.process.T, test_rows.shape[1]
    frames = []
    for t, x in tqdm(p_sample_loop(model, (num_samples, D)), "sampling", T + 1):
        if t % max(1, T // 40) == 0:
            frames.append(draw(f"{t} steps left", x))
    imageio.mimsave(out / "process.gif", frames + 20 * frames[-1:], duration=100, loop=0)
    imageio.imwrite(out / "samples.png", draw("samples", x))
    x_0 = test_rows[torch.randint(len(test_rows), (200,))]
    known = torch.arange(D) < D / 2
    y = inpaint(model, x_0, known)
    panels = [draw("known", known * x_0, "C0"), draw("completed", y), draw("data", x_0, "C0")]
    imageio.imwrite(out / "inpainting.png", np.hstack(panels))
    batches = torch.randint(len(test_rows), (200, 1000))
    K = torch.cat([bound(model, test_rows[batch])[0] for batch in tqdm(batches, "bound")])
    L_null = model.process.prior.log_prob(test_rows).sum(dim=1).mean().item() / math.log(2)
    figures = {"K": K.mean().item(), "standard error of K": K.std().item() / len(K) ** 0.5}
    return x, y, figures | {"L_null": L_null, "K - L_null": figures["K"] - L_null}  # the gain


# %% 8. Command line, and main, which puts everything together
SAVED = ["dataset", "num_timesteps", "hidden_size"]  # options in model.pt
SAVED += ["train_batch_size", "num_training_steps", "learning_rate", "seed"]
THREADS = torch.get_num_threads()
ABOVE = {"num_timesteps": 1, "num_samples": 24, "seed": -1}  # 25 digits shown; all others above 0


def parse_options(argv):
    """Return the options, and the content of the checkpoint, {} if there is none."""
    device = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    parser = ArgumentParser(usage="dpm_2015.py [options]", description=__doc__.splitlines()[0])
    flag = parser.add_argument

    def option(names, default, help):
        flag(*names.split(), type=type(default), default=default, help=help)

    flag("--dataset", default="swiss_roll", choices=[*POINTS, *BITS, "mnist"], help="what to learn")
    option("--num_timesteps", 40, "number of diffusion steps T")
    option("--hidden_size", 64, "width of the network")
    option("--train_batch_size", 1000, "examples in a training step")
    option("--num_training_steps", 7000, "training steps")
    option("--learning_rate", 1e-2, "of Adam: it rises to this, then falls")
    option("--num_samples --eval_batch_size", 1000, "samples to draw")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--checkpoint", "--eval_path", help="model.pt to draw samples from")
    source.add_argument("--resume", help="model.pt whose training goes on")
    flag("--output_dir", help="for all files [that of --resume, or outputs/dpm_2015_NAME]")
    option("--data_dir", "data", "holds the 4 files of MNIST in MNIST/raw, or will")
    option("--seed", 0, "the same seed and number of threads: same samples")
    flag("--device", choices={device, "cpu"}, default=device, help="where to compute")
    args = parser.parse_args(argv)  # first, to find out the data set and the checkpoint
    if args.dataset in BITS:
        parser.set_defaults(num_timesteps=2000, num_training_steps=8000)
    if args.dataset == "mnist":
        parser.set_defaults(num_timesteps=1000, hidden_size=768)
        parser.set_defaults(train_batch_size=256, num_training_steps=14_000, learning_rate=2e-3)
    path = args.resume if args.checkpoint is None else args.checkpoint
    state = {}
    if path is not None:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            state = {name: state[name] for name in ("options", "step", "model", "optimizer")}
        except Exception as error:
            raise SystemExit(f"dpm_2015.py: error: no DPM in {path}: {error!r:.200}") from error
        parser.set_defaults(**state["options"])
    args = parser.parse_args(argv)  # again: your options win over model.pt, it over defaults
    for name, value in vars(args).items():
        if isinstance(value, (int, float)) and not value > ABOVE.get(name, 0):
            parser.error(f"--{name} {value}: must be above {ABOVE.get(name, 0)}")
    return args, state


def main(argv=None):
    """Train a model or load one, draw samples, and write everything to --output_dir."""
    args, state = parse_options(argv)
    Distribution.set_default_validate_args(False)  # this is faster, and train watches K
    digits = args.dataset == "mnist"
    torch.set_num_threads(THREADS if digits else 1)  # small networks need no more
    print(f"device: {args.device}, {torch.get_num_threads()} CPU threads")
    torch.set_default_device(None if args.device == "cpu" else args.device)  # None: CPU, but faster
    name = args.dataset + ("" if args.checkpoint is None else "_samples")
    folder = f"outputs/dpm_2015_{name}" if args.resume is None else Path(args.resume).parent
    out = Path(args.output_dir or folder)
    if (out / "model.pt").exists() and out / "model.pt" != Path(args.resume or ""):
        sys.exit(f"dpm_2015.py: error: {out} holds a model: --resume it, or change --output_dir")
    rows, test_rows, shift, scale = load_data(args.dataset, args.data_dir)
    rows, test_rows = rows.to(args.device), test_rows.to(args.device)
    torch.manual_seed(args.seed)
    if args.dataset in BITS:
        process = Binomial(args.num_timesteps, m=rows.mean().item())
    else:
        process = Gaussian(args.num_timesteps, 1e-5 if digits else 1e-4, learn_betas=not digits)
    model = Model(process, rows.shape[1], args.hidden_size)
    if state:
        try:
            model.load_state_dict(state["model"])
        except RuntimeError as error:
            sys.exit(f"dpm_2015.py: error: the checkpoint does not fit: {error!r:.200}")
    out.mkdir(parents=True, exist_ok=True)
    if args.checkpoint is None:
        options = {name: getattr(args, name) for name in SAVED}
        signals = train(model, rows, options, out / "model.pt", state)
        if signal.SIGTERM in signals:  # but after Ctrl-C, sample
            sys.exit()
    torch.manual_seed(args.seed)  # so that a checkpoint gives the same samples again
    x, y, figures = evaluate(model, test_rows, args.num_samples, out)
    np.save(out / "samples.npy", (x * scale + shift).cpu())
    np.save(out / "inpainted.npy", (y * scale + shift).cpu())
    figures["bits per dimension"] = math.log2(scale) - figures["K"] / rows.shape[1]  # if unscaled
    facts = {"options": vars(args), "figures": figures, "torch": torch.__version__}
    (out / "run.json").write_text(json.dumps(facts, indent=2))
    print(f"{out}:", ", ".join(f"{name} {value:.3f}" for name, value in figures.items()))


if __name__ == "__main__":
    try:
        main([] if "kernel_launcher" in sys.argv[0] else None)  # a notebook has no options
    except KeyboardInterrupt:
        sys.exit(130)
    except (OSError, MemoryError, torch.OutOfMemoryError) as error:
        sys.exit(f"dpm_2015.py: error: {error}")
