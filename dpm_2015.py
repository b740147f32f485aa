"""Deep Unsupervised Learning using Nonequilibrium Thermodynamics: the first diffusion model.

Its forward process turns data into noise in T small steps. A network learns to undo them: training
raises K, a lower bound on the mean log p(data). Paper: https://arxiv.org/abs/1503.03585.

    python dpm_2015.py                        swiss roll, in two minutes
    python dpm_2015.py --dataset heartbeat    binary sequences, in five minutes
    python dpm_2015.py --dataset mnist        handwritten digits, in 45 minutes

Steps are t = 1..T, as in the paper: x_0 is data, x_T is noise.
x is (B, D): B examples of D numbers or bits. t is one number, or (B, 1): one for each example.
"""

import io
import json
import math
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

Distribution.set_default_validate_args(False)  # q(x_0 | x_0) has variance 0


# %% 1. Data
def swiss_roll():
    """Return points (100000, 2) on a spiral, with noise: a curve alone has no density."""
    u = torch.pi * (1.5 + 3 * torch.rand(100_000))
    return torch.stack((u * u.cos(), u * u.sin()), dim=1) + 0.25 * torch.randn(100_000, 2)


POINTS = {"swiss_roll": swiss_roll}  # each function returns far more than 10,000 points
BITS = {"heartbeat": torch.eye(5).repeat(1, 4)}  # 5 examples (5, 20): a pulse in every fifth bit


def load_data(dataset, data_dir):
    """Return training and test examples (N, D), and the shift and scale that undo their scaling."""
    torch.manual_seed(0)  # the same points in every run
    if dataset in BITS:
        x = BITS[dataset].to(torch.get_default_device())
        return x, x, 0.0, 1.0
    if dataset in POINTS:
        x = POINTS[dataset]()
        x = x[torch.randperm(len(x))]  # they may be in order; the last are for testing
    else:
        from torchvision.datasets import MNIST

        try:
            x = torch.cat([MNIST(data_dir, train, download=True).data for train in (True, False)])
        except RuntimeError as error:
            raise SystemExit(f"dpm_2015.py: error: {data_dir}: {error!r:.99}") from error
        x = x.flatten(1) + torch.rand(len(x), 784, device="cpu")  # for a density: 7 becomes 7..8
    shift, scale = x.mean().item(), x.std().item()
    x = ((x - shift) / scale).to(torch.get_default_device())  # mean 0, variance 1 overall
    return x[:-10_000], x[-10_000:], shift, scale


# %% 2. Two kinds of diffusion
# q adds noise. How can p go back, from x_t to x_{t-1}? For pure noise, q is reversible, like a film
# that looks the same backwards: prior(a) q(b | a) = prior(b) q(a | b). So a step back is one more
# step of q. For other data, Bayes' rule multiplies it by q(x_{t-1}) / prior(x_{t-1}). If steps are
# small, this only moves the bell curve (or the odds of a bit), and a network learns how far.
class Gaussian(nn.Module):
    """Gaussian diffusion. One step: q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I)."""

    sample = staticmethod(Normal.rsample)  # sample(q) is q.rsample(): gradients reach the betas
    z_per_x = 2  # a network computes z_mu and z_sigma for each number

    def __init__(self, T, beta_1, learn_betas):
        super().__init__()
        self.T = T
        self.prior = Normal(0.0, 1.0)  # p(x_T), of one number
        # alpha_bar_t = (1 - beta_1) ... (1 - beta_t) is x_0's share of the variance of x_t. Before
        # training, its log-odds, log(share / (1 - share)), fall evenly to -7: alpha_bar_T is 0.001.
        self.log_odds = torch.linspace(math.log(1 / beta_1 - 1), -7, T)  # for t = 1..T
        alpha_bars = self.log_odds.cpu().double().sigmoid()  # sigmoid undoes log-odds
        betas = 1 - alpha_bars[1:] / alpha_bars[:-1]  # beta_2..T
        self.logit_betas = nn.Parameter(betas.logit().to(self.log_odds), requires_grad=learn_betas)
        # The paper keeps beta_1 fixed, to prevent overfitting. beta_0 = 0 makes alpha_bar_0 = 1.
        self.register_buffer("fixed_betas", torch.tensor([0.0, beta_1]))

    def q(self, x, s, t):  # q(x_t | x_s), given x = x_s: t - s steps at once
        betas = torch.cat((self.fixed_betas, self.logit_betas.sigmoid()))  # (T + 1,)
        log_alpha_bars = torch.log1p(-betas).cumsum(dim=0)  # log1p(-b) is log(1 - b)
        log_alpha = log_alpha_bars[t] - log_alpha_bars[s]  # alpha: product of 1 - beta, s + 1..t
        stddev = (-torch.expm1(log_alpha)).sqrt()  # sqrt(1 - alpha), precise also near 0
        return Normal((log_alpha / 2).exp() * x, stddev)

    def q_posterior(self, x_0, x_t, t):  # q(x_{t-1} | x_t, x_0), for t >= 2
        # Bayes' rule: multiply q(x_{t-1} | x_0) and q(x_t | x_{t-1}), both bell curves in x_{t-1}.
        before = self.q(x_0, 0, t - 1)  # what x_0 tells of x_{t-1}
        beta = self.q(x_t, t - 1, t).variance  # the same for any x
        mean_t = x_t / (1 - beta).sqrt()  # what x_t tells of x_{t-1}
        variance_t = beta / (1 - beta)
        weight = variance_t / (before.variance + variance_t)  # inverse variances weight the means
        mean = weight * before.mean + (1 - weight) * mean_t
        return Normal(mean, (weight * before.variance).sqrt())  # inverse variances add up

    def p_reverse(self, z, x_t, t):  # p(x_{t-1} | x_t), where z (B, 2 D) is the network's output
        step = self.q(x_t, t - 1, t)  # one more step of q, now from x_t. If z = 0, p is this step
        z_mu, z_sigma = z.chunk(2, dim=1)
        mu = step.mean + step.stddev * z_mu  # as the authors' code does it; eq. 65 differs
        variance = (step.variance.logit() + z_sigma).sigmoid()  # eq. 64: within 0..1
        return Normal(mu, variance.sqrt())


class Binomial(nn.Module):
    """Diffusion of bits: a step keeps a bit, or with probability beta_t draws it from the prior."""

    sample = staticmethod(Bernoulli.sample)
    z_per_x = 1

    def __init__(self, T, m):
        super().__init__()
        self.T = T
        self.m = m  # the mean of the data
        self.prior = Bernoulli(m)  # p(x_T), of one bit
        self.register_buffer("alpha_bars", 1 - torch.arange(T + 1) / T)  # beta_t = 1 / (T - t + 1)
        self.log_odds = self.alpha_bars[1:].logit().clamp(min=-8)  # not -infinity at T

    def q(self, x, s, t):  # q(x_t | x_s), given x = x_s: t - s steps at once
        alpha = self.alpha_bars[t] / self.alpha_bars[s]  # the probability that a bit is kept
        return Bernoulli(alpha * x + (1 - alpha) * self.m)

    def q_posterior(self, x_0, x_t, t):  # q(x_{t-1} | x_t, x_0), for t >= 2
        # Bayes' rule for odds: P(1) / P(0) given x_0, times q(x_t | 1) / q(x_t | 0). Logs add up.
        before = self.q(x_0, 0, t - 1)
        from_1 = self.q(torch.ones_like(x_t), t - 1, t).log_prob(x_t)
        from_0 = self.q(torch.zeros_like(x_t), t - 1, t).log_prob(x_t)
        return Bernoulli(logits=before.logits + from_1 - from_0)

    def p_reverse(self, z, x_t, t):  # p(x_{t-1} | x_t), where z (B, D) is the network's output
        step = self.q(x_t, t - 1, t)  # one more step of q, now from x_t: this is p if z = 0
        return Bernoulli(logits=(step.logits + z).clamp(-15, 15))  # never 0 or 1: KL stays finite


# %% 3. The bound: what training maximises
def bound(model, x_0):
    """Return estimates (B,) of K (eq. 14) in bits, for x_0 (B, D), and the random t (B, 1) used.

    On average over the data, K = -(all KLs) + H_end - H_start - H_prior is at most log p(x_0). Why?
    E is a mean over q (in 1, given x_0) and data, KL is E log(q / p), and an entropy H is -E log q.
    1. p(x_0) = E p(x_0, ..., x_T) / q(x_1, ..., x_T | x_0). The log of a mean is at least the mean
       of the log (Jensen). So E log p(x_0) is at least
           E log p(x_T) + sum over t = 1..T of E [log p(x_{t-1} | x_t) - log q(x_t | x_{t-1})].
    2. t >= 2: q(x_t | x_{t-1}) = q(x_{t-1} | x_t, x_0) q(x_t | x_0) / q(x_{t-1} | x_0) (Bayes). So
           log p(x_{t-1} | x_t) - log q(x_{t-1} | x_t, x_0)   is left, with mean -KL, and
           -log q(x_t | x_0) + log q(x_{t-1} | x_0)   with mean H(x_t | x_0) - H(x_{t-1} | x_0).
       In the sum over t, the entropies cancel, except for H_end of x_T and -H_start of x_1.
    3. t = 1: p(x_0 | x_1) is a step of q (eq. 44). As q is reversible, what is left is
           log prior(x_0) - log prior(x_1)   with mean 0: E x^2 = 1 (bits: E x = m) for all t.
       For this reason, too, E log p(x_T) = -H_prior. If z = 0, K = E log prior(x_0), called L_null.
    """
    process = model.process
    t = torch.randint(2, process.T + 1, (len(x_0), 1))
    x_t = process.sample(process.q(x_0, 0, t))
    posterior = process.q_posterior(x_0, x_t, t)
    p = process.p_reverse(model(x_t, t), x_t, t)
    kl = kl_divergence(posterior, p).sum(dim=1)
    H_end = process.q(x_0, 0, process.T).entropy().sum(dim=1)  # H(x_T | x_0)
    H_start = process.q(x_0, 0, 1).entropy().sum(dim=1)  # H(x_1 | x_0)
    H_prior = x_0.shape[1] * process.prior.entropy()  # in eq. 14, H_p(x_T)
    K = -(process.T - 1) * kl + H_end - H_start - H_prior  # one random t stands for all T - 1
    return K / math.log(2), t


# %% 4. The network (the paper has one for each data set, and eq. 62 and 63 for images alone)
class Model(nn.Module):
    """A diffusion process, and the network that learns to undo it: z = sum_j g_j(t) y_j(x_t).

    An MLP turns all of x_t into a few features for each of its D numbers. A small network, the same
    for all D, turns a number and its features into 10 outputs y_j for each z. g_j(t) weights them.
    """

    def __init__(self, process, D, H, features=4):
        super().__init__()
        self.process = process
        layers = []
        for inputs in (D, H, H):
            layers += [nn.Linear(inputs, H), nn.LayerNorm(H), nn.GELU()]
        self.dense = nn.Sequential(*layers, nn.Linear(H, D * features))
        self.units = nn.Sequential(nn.Linear(features + 1, 4 * features), nn.GELU())
        self.read_out = nn.Linear(4 * features, 10 * process.z_per_x)
        nn.init.zeros_(self.read_out.weight)  # training begins at z = 0
        nn.init.zeros_(self.read_out.bias)
        # g_j(t), eq. 63: 10 bumps, side by side over log_odds. A table (T, 10); rows sum to 1.
        centres = torch.linspace(process.log_odds[0], process.log_odds[-1], 10)
        distances = (process.log_odds[:, None] - centres) / (centres[1] - centres[0])
        self.register_buffer("temporal_basis", (-(distances**2) / 2).softmax(dim=1))

    def forward(self, x_t, t):
        """Return z (B, D), or z_mu and z_sigma (B, 2 D), for x_t (B, D) and t (B, 1)."""
        B, D = x_t.shape
        h = torch.cat((self.dense(x_t).view(B, D, -1), x_t[:, :, None]), dim=2)  # features, x_t
        y = self.read_out(self.units(h)).view(B, D, -1, 10)  # 10 for each z of each number
        g = self.temporal_basis[t[:, 0] - 1]  # (B, 10)
        z = torch.einsum("bdkj,bj->bdk", y, g)  # eq. 62: z = sum_j g_j(t) y_j
        return z.transpose(1, 2).flatten(1)  # all z_mu, then all z_sigma


# %% 5. Sampling and inpainting
@torch.no_grad()
def p_sample_loop(model, x_0, known, passes):
    """Draw x (B, D) from the prior and turn it into data. Yield (t, x) for t = T, ..., 0.

    Where known (D,) is true, x is x_0 (B, D), as noisy as the rest (the paper keeps it clean).
    Steps are repeated, so that the unknown part can adapt to the known one: arXiv 2201.09865.
    """
    process = model.process
    x = process.prior.sample(x_0.shape)
    yield process.T, x
    for t in range(process.T, 0, -1):
        for k in range(passes if t > 1 else 1):
            if k > 0:
                x = process.sample(process.q(x, t - 1, t))  # noise it again: x_{t-1} to x_t
            z = model(x, torch.full((len(x), 1), t)) * (t > 1)  # p(x_0 | x_1) is q: eq. 44
            x = process.sample(process.p_reverse(z, x, t))  # from x_t to x_{t-1}
            x = torch.where(known, process.sample(process.q(x_0, 0, t - 1)), x)
        yield t - 1, x


# %% 6. Training
def train(model, rows, options, path, state):
    """Maximise K (for digits, weighted) with Adam. state is {}, or what to resume."""
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    if state:
        optimizer.load_state_dict(state["optimizer"])
    steps = range(state.get("step", 0), options["num_training_steps"])
    bar = tqdm(steps, "training", steps.stop, initial=steps.start)
    for step in bar:
        torch.manual_seed(options["seed"] * 10**9 + step)  # resuming draws the same
        rate = min((step + 1) / 100, 1 - step / steps.stop)  # up in 100 steps, then down to 0
        optimizer.param_groups[0]["lr"] = options["learning_rate"] * rate
        x_0 = rows[torch.randint(len(rows), (options["train_batch_size"],))]
        K, t = bound(model, x_0)
        loss = -K / x_0.shape[1]
        if options["dataset"] == "mnist":  # KLs at small t are large: let them count less
            loss = loss * model.process.q(0, 0, t).variance[:, 0]  # 1 - alpha_bar_t, whatever x is
        optimizer.zero_grad()
        loss.mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        bar.set_postfix(K=f"{K.mean().item():.2f} bits", refresh=False)
        if (step + 1) % 500 == 0 or step + 1 == steps.stop:
            if not K.isfinite().all():
                sys.exit("dpm_2015.py: error: K is not finite: lower --learning_rate")
            weights = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            content = io.BytesIO()
            torch.save({"options": options, "step": step + 1, **weights}, content)
            path.with_suffix(".part").write_bytes(content.getvalue())
            path.with_suffix(".part").replace(path)  # so that model.pt is always complete


# %% 7. Pictures and figures
def draw(title, x, colour="C1"):
    """Return a picture, uint8 (height, width, 3), of points (N, 2), bits or digits (N, D)."""
    figure = Figure(figsize=(4, 4.4), dpi=90)
    axes = figure.add_axes((0.02, 0, 0.96, 0.9), aspect="equal", xticks=(), yticks=())
    axes.set_title(title, fontsize=16)
    if x.shape[1] == 2:
        axes.axis((-2.6, 2.6, -2.6, 2.6))
        axes.scatter(*x[:1000].T.cpu(), s=6, color=colour, linewidths=0)
    elif x.shape[1] == 784:
        rows = x[:25].view(5, 5, 28, 28).transpose(1, 2)
        axes.imshow(rows.reshape(140, 140).cpu().numpy(), cmap="gray", vmin=-0.4, vmax=2.8)
    else:
        axes.pcolormesh(x[:12].cpu(), cmap="Blues", edgecolors="lightgrey", linewidth=1)
    pixels, (width, height) = FigureCanvasAgg(figure).print_to_buffer()
    return np.frombuffer(pixels, np.uint8).reshape(height, width, 4)[..., :3]


@torch.no_grad()
def evaluate(model, test_rows, num_samples, out):
    """Draw samples x, complete test examples from their first half (y), and estimate K."""
    T, D = model.process.T, test_rows.shape[1]
    chain = p_sample_loop(model, torch.zeros(num_samples, D), torch.zeros(D).bool(), passes=1)
    frames = []
    for t, x in tqdm(chain, "sampling", T + 1):
        if t % max(1, T // 40) == 0:
            frames.append(draw(f"{t} steps left", x))
    imageio.mimsave(out / "process.gif", frames + 20 * frames[-1:], duration=100, loop=0)
    imageio.imwrite(out / "samples.png", draw("samples", x))
    x_0 = test_rows[torch.randint(len(test_rows), (200,))]
    known = torch.arange(D) < D / 2
    for _, y in tqdm(p_sample_loop(model, x_0, known, passes=10), "inpainting", T + 1):
        pass
    panels = [draw("known", known * x_0, "C0"), draw("completed", y), draw("data", x_0, "C0")]
    imageio.imwrite(out / "inpainting.png", np.hstack(panels))
    batches = torch.randint(len(test_rows), (200, 1000))
    Ks = torch.cat([bound(model, test_rows[batch])[0] for batch in tqdm(batches, "bound")])
    L_null = model.process.prior.log_prob(test_rows).sum(dim=1).mean().item() / math.log(2)
    error = Ks.std().item() / len(Ks) ** 0.5
    return x, y, {"K": Ks.mean().item(), "standard error of K": error, "L_null": L_null}


# %% 8. Command line, and main, which puts everything together
MODEL = ["dataset", "num_timesteps", "hidden_size"]
TRAINING = ["train_batch_size", "num_training_steps", "learning_rate", "seed"]


def parse_options(argv):
    """Return the parsed options and the content of the checkpoint, {} if there is none."""
    device = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    parser = ArgumentParser(usage="dpm_2015.py [options]", description=__doc__.splitlines()[0])
    flag = parser.add_argument
    flag("--dataset", default="swiss_roll", choices=[*POINTS, *BITS, "mnist"], help="what to learn")
    flag("--num_timesteps", type=int, default=40, help="number of diffusion steps T")
    flag("--hidden_size", type=int, default=64, help="width of the network")
    flag("--train_batch_size", type=int, default=1000, help="examples in a training step")
    flag("--num_training_steps", type=int, default=7000, help="training steps")
    flag("--learning_rate", type=float, default=1e-2, help="of Adam, its highest value")
    flag("--num_samples", "--eval_batch_size", type=int, default=1000, help="samples to draw")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--checkpoint", "--eval_path", help="model.pt to draw samples from")
    source.add_argument("--resume", help="model.pt whose training goes on, in its folder")
    flag("--output_dir", help="folder for all files [outputs/dpm_2015_NAME]")
    flag("--data_dir", default="data", help="holds the 4 files of MNIST in MNIST/raw, or will")
    flag("--seed", type=int, default=0, help="the same seed and number of threads: same samples")
    flag("--device", choices=[device, "cpu"], default=device, help="where to compute")
    args = parser.parse_args(argv)  # first, only to find out the data set and the checkpoint
    path = args.resume if args.checkpoint is None else args.checkpoint
    state = {}
    if path is not None:
        try:
            state = torch.load(path, map_location=args.device, weights_only=True)
            state = {name: state[name] for name in ("options", "step", "model", "optimizer")}
        except Exception as error:
            raise SystemExit(f"dpm_2015.py: error: cannot use {path}: {error!r:.200}") from error
    options = state.get("options", {"dataset": args.dataset})
    if options["dataset"] in BITS:
        parser.set_defaults(num_timesteps=2000, num_training_steps=8000)
    if options["dataset"] == "mnist":
        parser.set_defaults(num_timesteps=1000, num_training_steps=14_000)
        parser.set_defaults(hidden_size=768, train_batch_size=256, learning_rate=2e-3)
    parser.set_defaults(**options)
    args = parser.parse_args(argv)  # again: what you give wins over model.pt, that over defaults
    vars(args).update({name: options[name] for name in MODEL if name in options})  # except these
    limits = {"num_timesteps": 1, "num_samples": 24, "seed": -1}  # a picture has 25 samples
    for name, value in vars(args).items():
        if isinstance(value, (int, float)) and not value > limits.get(name, 0):
            parser.error(f"--{name} {value}: must be above {limits.get(name, 0)}")
    return args, state


def main(argv=None):
    """Train a model or load one, draw samples, and write everything to --output_dir."""
    args, state = parse_options(argv)
    digits = args.dataset == "mnist"
    if not digits:
        torch.set_num_threads(1)  # small networks gain nothing from more
    print(f"device: {args.device}, {torch.get_num_threads()} CPU threads")
    torch.set_default_device(None if args.device == "cpu" else args.device)  # None: CPU, but faster
    name = args.dataset + ("" if args.checkpoint is None else "_samples")
    out = Path(args.output_dir or f"outputs/dpm_2015_{name}")
    if args.resume is not None:
        out = Path(args.resume).parent
    elif (out / "model.pt").exists():
        sys.exit(f"dpm_2015.py: error: {out} holds a model: --resume it, or change --output_dir")
    out.mkdir(parents=True, exist_ok=True)
    rows, test_rows, shift, scale = load_data(args.dataset, args.data_dir)
    torch.manual_seed(args.seed)
    if args.dataset in BITS:
        process = Binomial(args.num_timesteps, m=rows.mean().item())
    else:
        process = Gaussian(args.num_timesteps, 1e-5 if digits else 1e-4, learn_betas=not digits)
    model = Model(process, rows.shape[1], args.hidden_size, features=4 if digits else 8)
    if state:
        model.load_state_dict(state["model"])
    if args.checkpoint is None:
        options = {name: getattr(args, name) for name in MODEL + TRAINING}
        try:
            train(model, rows, options, out / "model.pt", state)
        except KeyboardInterrupt:
            print("Training ends early. Next come the samples. --resume goes on from the last save")
    torch.manual_seed(args.seed)  # so that a checkpoint gives the same samples again
    x, y, figures = evaluate(model, test_rows, args.num_samples, out)
    np.save(out / "samples.npy", (x * scale + shift).cpu())
    np.save(out / "inpainted.npy", (y * scale + shift).cpu())
    figures["bits per dimension"] = math.log2(scale) - figures["K"] / rows.shape[1]  # unscaled
    facts = {"options": vars(args), "figures": figures, "torch": torch.__version__}
    (out / "run.json").write_text(json.dumps(facts, indent=2))
    print(f"{out}:", ", ".join(f"{name} {value:.3f}" for name, value in figures.items()))


if __name__ == "__main__":
    try:
        main([] if "ipykernel" in sys.modules else None)  # a notebook has no options
    except KeyboardInterrupt:
        sys.exit(130)
    except (OSError, MemoryError, torch.OutOfMemoryError) as error:
        sys.exit(f"dpm_2015.py: error: {error}")
