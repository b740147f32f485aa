"""Deep Unsupervised Learning using Nonequilibrium Thermodynamics: the first diffusion model, in one file.

A forward process destroys data in T small steps; a learned reverse process restores them, trained on K, a
lower bound on log p(data) in bits. Sohl-Dickstein et al. 2015, https://arxiv.org/abs/1503.03585.

    python dpm_2015.py                        swiss roll, 80 seconds on 2 CPU cores; heart: the same
    python dpm_2015.py --dataset heartbeat    binary sequences, 6 minutes
    python dpm_2015.py --dataset mnist        digits, 30 minutes; --resume FILE goes on with a stopped run

Index: t = 0..T-1 here is step t + 1 of the paper: x_t is its x^{t+1}. Only x_0 is always the data, its x^0.
Deviations: K has a correction (see bound); mu is x sqrt(1 - beta) + z sqrt(beta), as in the released code:
eq. 65 is not exact at z = 0; bumps g_j(t), first Gaussian betas evenly spaced in log SNR; no denoising.
Heartbeats: m is 0.2, as the paper's figures need (its table: 0.5); z adds to log-odds; bumps in read-outs.
Digits: one pathway, one scale; KL terms weighted by 1 - alpha_bar (K worse, samples better); betas fixed.
"""

# %% 1. Imports
import time

STARTED = time.perf_counter()  # before the imports: a user waits for them as well
import json
import math
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import nn
from torch.distributions import Bernoulli, Distribution, Normal, kl_divergence
from tqdm import tqdm

# %% 2. Options
OPTIONS = {  # the defaults for points, heartbeats and digits, help
    "num_timesteps": (40, 2000, 1000, "T, the number of diffusion steps, 5 or more"),
    "hidden_size": (128, 50, 1024, "radial basis units for points (the paper: 16), or width of the network"),
    "batch_size": (4000, 1000, 256, "examples in a training step, each at a t of its own"),
    "num_training_steps": (4000, 40_000, 20_000, "training steps"),
    "learning_rate": (3e-2, 1e-2, 2e-3, "of Adam at its highest; it rises in 100 steps, then falls to 0"),
    "eval_batch_size": (10_000, 1000, 1000, "samples to draw"),
    "seed": (0, 0, 0, "fixes all that is random"),
}  # next: which of the three defaults, and how many examples a picture shows
DATASETS = {"swiss_roll": (0, 500), "heart": (0, 500), "heartbeat": (1, 40), "mnist": (2, 25)}
Distribution.set_default_validate_args(False)  # to check values is to wait for the device
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#999999"  # data, samples, drift: a colour-blind reader can tell


def fail(message):
    """Bad input ends here: one line that names the flag, the value and the way out; exit status 2."""
    tqdm.write(f"dpm_2015.py: error: {message}", file=sys.stderr)  # on its own line, below a progress bar
    sys.exit(2)


def parse_options(argv=None):
    """The options, complete, and the content of the file that --checkpoint or --resume names, or None."""
    cuda = [f"cuda:{k}" for k in range(torch.cuda.device_count())]
    here = cuda + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    parser = ArgumentParser("dpm_2015.py", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.error, flag = fail, parser.add_argument
    flag("--dataset", choices=tuple(DATASETS), help="what to learn [swiss_roll]")
    for name, (a, b, c, text) in OPTIONS.items():
        flag(f"--{name}", type=type(a), metavar="N", help=f"{text} [points {a}, heartbeats {b}, digits {c}]")
    flag("--eval_path", "--checkpoint", metavar="FILE", help="a model.pt to sample from instead of training")
    flag("--resume", metavar="FILE", help="a model.pt to train on, up to --num_training_steps, in its folder")
    flag("--output_dir", metavar="DIR", help="[outputs/dpm_2015_DATASET; with --checkpoint …_samples]")
    flag("--data_dir", metavar="DIR", default="data", help="holds MNIST/raw, or will after a download [data]")
    flag("--device", default=here[0], help="cuda, mps or cpu [the first that is there]")
    args = parser.parse_args([] if argv is None and "ipykernel" in sys.modules else argv)  # notebook: none
    path = args.eval_path or args.resume
    args.device += ":0" if args.device == "cuda" else ""
    if args.device not in here:
        fail(f"--device {args.device}: not on this machine or not in this build of torch; here: {here}")
    try:
        checkpoint = torch.load(path, args.device, weights_only=True) if path else None  # runs no code of it
        saved = {name: checkpoint["dpm_2015.py"][name] for name in ("dataset", *OPTIONS)} if path else {}
    except Exception as error:  # noqa: BLE001 — a bad file fails in many ways
        fail(f"--checkpoint or --resume {path}: {type(error).__name__}; give a model.pt of dpm_2015.py")
    args.dataset = args.dataset or saved.get("dataset", "swiss_roll")
    for (name, values), least in zip(OPTIONS.items(), (5, 1, 1, 1, 1e-12, 1, 0)):
        if getattr(args, name) is None:
            setattr(args, name, saved.get(name, values[DATASETS[args.dataset][0]]))
        most = 2**63 - 1 if name == "seed" else 10**7
        if not least <= getattr(args, name) <= most:
            fail(f"--{name} {getattr(args, name)}: give a number from {least} to {most}")
    for name in ("dataset", "num_timesteps", "hidden_size"):
        if saved and getattr(args, name) != saved[name]:
            fail(f"--{name} {getattr(args, name)}: {path} has {saved[name]}; leave the flag out")
    folder = f"outputs/dpm_2015_{args.dataset}{'_samples' if args.eval_path else ''}"
    args.output_dir = args.output_dir or (str(Path(args.resume).parent) if args.resume else folder)
    return args, checkpoint


# %% 3. Data — standardised: mean 0 and, on average, variance 1, as the prior N(0, I); bits stay bits
u = 2 * math.pi * (torch.arange(4000) + 0.5) / 4000  # (4000,): data come from these places on a curve
v = 1.5 * (math.pi + u)
heart = torch.complex(16 * u.sin() ** 3, 13 * u.cos() - 5 * (2 * u).cos() - 2 * (3 * u).cos() - (4 * u).cos())
CURVE = {"heart": torch.view_as_real(heart / 5), "swiss_roll": torch.view_as_real(torch.polar(v / 10, v))}
NOISE = {"swiss_roll": 0.025, "heart": 0.05}  # in units of CURVE; without noise a curve has no density
BEATS = (torch.arange(20) % 5 == torch.arange(5)[:, None]).float()  # (5, 20): a pulse in every fifth bin
SCALING = {"heartbeat": (0.0, 1.0), "mnist": (33.82, 78.57)}  # shift and scale; of digits in grey levels
SCALING |= {n: (x.mean(dim=0), (x.var(dim=0).mean() + NOISE[n] ** 2).sqrt()) for n, x in CURVE.items()}


def load_mnist(data_dir):
    """Training digits (60000, 784), test digits (10000, 784), uint8, 0 = background; downloads if need be."""
    try:
        from torchvision.datasets import MNIST

        return [MNIST(data_dir, train=train, download=True).data.flatten(1) for train in (True, False)]
    except Exception as error:  # noqa: BLE001 — no network, a damaged file, a torchvision of another torch
        why = f"--data_dir {data_dir}: no MNIST and no download ({' '.join(str(error).split())[:80]})"
        fail(f"{why}; put its 4 files into {Path(data_dir, 'MNIST/raw')}, or see pytorch.org on torchvision")


def draw_data(args, n, rows):
    """n fresh examples (n, D), standardised: rows (N, D) of CURVE, BEATS or MNIST at random, with noise."""
    x = rows[torch.randint(len(rows), (n,))]
    if args.dataset in NOISE:
        x = x + NOISE[args.dataset] * torch.randn(n, 2)
    elif args.dataset == "mnist":  # a grey level becomes an interval: whole numbers have no density
        x = x + torch.rand(x.shape)
    shift, scale = SCALING[args.dataset]
    return ((x - shift) / scale).to(args.device)


# %% 4. Forward and reverse process — x is (B, D), t is (B,); each kernel is a torch distribution over x
class Gaussian:
    """Gaussian diffusion, prior N(0, I). The betas (T,) may be learned: all is differentiable in them."""

    prior, new_noise = property(lambda self: Normal(0 * self.betas[0], 1.0)), staticmethod(torch.randn)
    sample = staticmethod(lambda kernel, noise: kernel.mean + kernel.stddev * noise)  # gradients reach betas

    def __init__(self, betas):
        log_alpha_bars = torch.log1p(-betas).cumsum(dim=0)  # alpha_bar, as DDPM calls the product of 1 - beta
        self.T, self.betas, self.alpha_bars = len(betas), betas, log_alpha_bars.exp()
        self.variances = -torch.expm1(log_alpha_bars)  # 1 - alpha_bar, exact where that is tiny

    def q_marginal(self, x_0, t):  # q(x_t | x_0): steps 0 to t at once
        return Normal(self.alpha_bars[t, None].sqrt() * x_0, self.variances[t, None].sqrt())

    def q_posterior(self, x_0, x_t, t):  # q(x_{t-1} | x_t, x_0), t >= 1
        beta, part = self.betas[t, None], self.variances[t - 1, None] / self.variances[t, None]
        x_0_factor = self.alpha_bars[t - 1, None].sqrt() * beta / self.variances[t, None]
        return Normal(x_0_factor * x_0 + (1 - beta).sqrt() * part * x_t, (beta * part).sqrt())

    def p_reverse(self, z, x_t, t):  # p(x_{t-1} | x_t): for z = 0 the forward kernel, exact for data N(0, I)
        beta, (z_mu, z_sigma) = self.betas[t, None], z.chunk(2, dim=1)
        mu = (1 - beta).sqrt() * x_t + beta.sqrt() * z_mu  # in place of eq. 65
        return Normal(mu, torch.sigmoid(z_sigma + beta.logit()).sqrt())  # eq. 64: Sigma is a variance


class Binomial(Gaussian):
    """Binomial diffusion, prior Bernoulli(m): with probability beta a bit is drawn anew from the prior."""

    new_noise, m = staticmethod(torch.rand), 0.2  # uniform in [0, 1); m: mean activity of heartbeats
    prior = property(lambda self: Bernoulli(torch.full_like(self.betas[0], self.m)))
    sample = staticmethod(lambda kernel, noise: (noise < kernel.probs).to(noise.dtype))

    def q_marginal(self, x_0, t):  # q(x_t | x_0)
        return Bernoulli(x_0 * self.alpha_bars[t, None] + self.m * self.variances[t, None])

    def q_posterior(self, x_0, x_t, t):  # p_reverse at z = log-odds of q(x_{t-1} | x_0) less the prior's
        return self.p_reverse(self.q_marginal(x_0, t - 1).logits - self.prior.logits, x_t, t)

    def p_reverse(self, z, x_t, t):  # p(x_{t-1} | x_t): for z = 0 the forward kernel, exact for data ~ prior
        logits = (x_t * (1 - self.betas[t, None]) + self.m * self.betas[t, None]).logit() + z
        return Bernoulli(logits=logits.clamp(-15, 15))  # beyond, 1 - p would round to 0 and a KL be infinite


# %% 5. The bound — eq. 13 and 14
def bound(process, model, x_0, t=None, noise=None):
    """K in bits (B,) of x_0 (B, D), an estimate without bias from one x_t for each, and its t (B,) in 1..T-1.

    In the paper's x^0 (data) to x^T, K = E_q log p(x^0, ..., x^T) / q(x^1, ..., x^T | x^0) <= log p(x^0). t
    picks one of its T - 1 KL terms; p(x^0 | x^1), the forward kernel (44), has none. A correction makes it a
    bound for any x^0, by E log prior(x_t) + H_prior = alpha_bar_t (log prior(x^0) + H_prior); its mean is 0
    for data with the moments of the prior, as eq. 14 has it.
    """
    (B, D), T, prior = x_0.shape, process.T, process.prior
    if t is None:  # each t is as likely as any other, but a batch has them evenly spread: K is less noisy
        t = 1 + (torch.randperm(B) * (T - 1) // B + torch.randint(T - 1, (1,))).to(x_0.device) % (T - 1)
    noise = process.new_noise(B, D, device=x_0.device) if noise is None else noise
    x_t = process.sample(process.q_marginal(x_0, t), noise)
    p = process.p_reverse(model(x_t, t), x_t, t)
    kl = kl_divergence(process.q_posterior(x_0, x_t, t), p).sum(dim=1)  # (B,), nats
    H_start, H_end = (process.q_marginal(x_0, 0 * t + k).entropy().sum(dim=1) for k in (0, T - 1))
    H_prior = D * prior.entropy()  # H_p(X^T); H_start is H_q(X^1 | X^0), H_end is H_q(X^T | X^0)
    correction = (process.betas[0] + process.alpha_bars[-1]) * (prior.log_prob(x_0).sum(dim=1) + H_prior)
    return (H_end - H_start - H_prior - (T - 1) * kl + correction) / math.log(2), t


# %% 6. Network — t enters at the read-out alone
class Model(nn.Module):
    """x_t (B, C P), of P pixels, and t (B,) to z (B, C P or twice that), 0 before training; has the betas."""

    def __init__(self, args, C, P, precision="fp32"):
        super().__init__()
        T, H, points, units = args.num_timesteps, args.hidden_size, args.dataset in NOISE, args.hidden_size
        self.bf16, self.dense = precision == "bf16", None
        if args.dataset == "heartbeat":
            alpha_bars = 1 - torch.arange(1, T + 1, dtype=torch.float64) / T  # so beta_t = 1 / (T - t)
            layers = [part for n in (C, H, H) for part in (nn.Linear(n, H), nn.Sigmoid())]
            for layer in layers[::2]:
                layer.weight.data *= 4  # from small weights, sigmoids would hardly tell inputs apart
        else:  # beta_0, 1e-4 or 1e-5, stays fixed, as the mean of K is at most -H_start
            start = math.log(9999 if points else 99_999)
            alpha_bars = torch.linspace(start, -7, T, dtype=torch.float64).sigmoid()
        if points:  # radial basis units: exp(-|x - c|^2 / 2 s^2) / sum = softmax((2 x c - |c|^2) / 2 s^2)
            layers = [nn.Linear(C, H), nn.Softmax(dim=1)]
            w = nn.init.normal_(layers[0].weight.data, std=H / 9)  # centres c from N(0, I), s = 3 / sqrt(H)
            layers[0].bias.data = -4.5 / H * w.square().sum(dim=1)
        if P > 1:  # dense layers see the whole image; convolutions see the detail, and what those say of it
            layers = [(nn.Linear(n, H), nn.LayerNorm(H), nn.GELU()) for n in (C * P, H, H, H)]
            self.dense = nn.Sequential(*sum(layers, ()), nn.Linear(H, 4 * P))
            layers = [(nn.Conv2d(n, 16, 3, padding=1), nn.LeakyReLU(0.05)) for n in (C + 4, 16)]
            layers, units = [nn.Unflatten(1, (C + 4, math.isqrt(P), math.isqrt(P))), *sum(layers, ())], 16
        self.body = nn.Sequential(*layers, nn.Flatten(2) if P > 1 else nn.Unflatten(1, (H, 1)))
        betas = 1 - alpha_bars / torch.cat((torch.ones(1), alpha_bars[:-1]))
        self.register_buffer("beta_0", betas[:1].float())
        self.logit_betas = nn.Parameter(betas[1:].logit().float(), requires_grad=points)  # points learn them
        log_snr = alpha_bars.logit().clamp(min=-8)  # log alpha_bar / (1 - alpha_bar); the last may be -inf
        centres = torch.linspace(log_snr[0], log_snr[-1], 10)
        bumps = (-((log_snr[:, None] - centres) ** 2) / (2 * (centres[1] - centres[0]) ** 2)).softmax(dim=1)
        self.register_buffer("basis", torch.eye(T) if points else bumps.float())  # g_j(t) (T, J), eq. 63
        shape = self.basis.shape[1], C if args.dataset == "heartbeat" else 2 * C
        self.weight, self.bias = (nn.Parameter(torch.zeros(*shape, n)) for n in (units, 1))

    def betas(self):
        return torch.cat((self.beta_0, self.logit_betas.sigmoid()))

    def forward(self, x, t):  # eq. 62: z = sum_j y_j g_j(t), each y_j linear in the units of the body
        weight, bias = (torch.tensordot(self.basis[t], part, 1) for part in (self.weight, self.bias))
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            units = self.body(torch.cat((x, self.dense(x)), dim=1) if self.dense else x)
            return torch.baddbmm(bias, weight, units).flatten(1).to(x.dtype)  # units (B, n, P), z (B, D)


# %% 7. Sampling, and posteriors — section 2.5
@torch.no_grad()
def p_sample_loop(process, model, shape, seed, x_known=None, known=None):
    """Yields (T, x), ..., (0, x): steps of noise left, x (B, D). Where known (D,) is true, x stays x_known:
    inpainting, r of section 2.5 a delta function; approximate, as r acts on all x_t, not only x_0."""
    generator, kernel, x = torch.Generator(process.betas.device).manual_seed(seed), process.prior, None
    for step in range(process.T, -1, -1):
        if step < process.T:  # z in parts that caches can hold; the last step is the forward kernel, eq. 44
            t = torch.full(shape[:1], step, device=generator.device)
            z = torch.cat([model(*part) for part in zip(x.split(500), t.split(500))])
            kernel = process.p_reverse(z * (step > 0), x, t)
        x = process.sample(kernel, process.new_noise(shape, generator=generator, device=generator.device))
        yield step, (x := x if known is None else torch.where(known, x_known, x))


# %% 8. Training
def train(model, Process, args, rows, checkpoint, shape):
    """Ascends K with Adam, to the end or to Ctrl-C; writes model.pt, training.gif and loss.png."""
    Ks, frames, out, steps = [], [], Path(args.output_dir), args.num_training_steps
    optimizer = torch.optim.Adam(model.parameters(), args.learning_rate, fused=True)
    if checkpoint:
        optimizer.load_state_dict(checkpoint["optimizer"])
        torch.set_rng_state(checkpoint["random"].cpu())
        Ks = list(checkpoint["Ks"])
    pauses = {math.ceil(steps * (k / 16) ** 2) for k in range(1, 16)}  # denser at the start

    def pause():
        if not torch.stack(Ks).isfinite().all():  # model.pt stays as it was
            fail(f"--learning_rate {args.learning_rate}: K is not finite before step {len(Ks)}; lower it")
        content = {"dpm_2015.py": vars(args), "model": model.state_dict(), "Ks": torch.stack(Ks)}
        content |= {"optimizer": optimizer.state_dict(), "random": torch.get_rng_state()}  # for --resume
        save(out / "model.pt", lambda path: torch.save(content, path))
        *_, (_, x) = p_sample_loop(Process(model.betas().detach()), model, shape, args.seed)
        frames.append(draw([(f"training step {len(Ks):,}", x, ORANGE)]))

    try:
        for step in (bar := tqdm(range(len(Ks), steps), "training", steps, initial=len(Ks), smoothing=0.05)):
            optimizer.param_groups[0]["lr"] = args.learning_rate * min((step + 1) / 100, 1 - step / steps)
            K, t = bound(process := Process(model.betas()), model, draw_data(args, args.batch_size, rows))
            weight = process.variances[t] if args.dataset == "mnist" else 1.0  # more for large t: shapes
            optimizer.zero_grad()
            (-(weight * K).mean() / shape[1]).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            Ks.append(K.mean().detach())
            if step % 50 == 0:  # to read K is to wait for the device: not at every step
                bar.set_postfix(K=f"{torch.stack(Ks[-100:]).mean():.3f} bits", refresh=False)
            if step + 1 in pauses:
                pause()
    except KeyboardInterrupt:
        tqdm.write("training ended early; next come the samples") if Ks else sys.exit(130)
    pause()
    save(out / "training.gif", imageio.mimsave, frames + frames[-1:] * 12, duration=250, loop=0)
    axes = Figure(layout="constrained").add_subplot(xlabel="training step", ylabel="K in bits")
    axes.plot(torch.stack(Ks).cpu(), ".", color=BLUE, markersize=1)
    save(out / "loss.png", axes.figure.savefig)


# %% 9. Pictures
def draw(panels, dpi=90):
    """Picture (H, W, 3) of panels (title, x (N, D), colour): D = 2 points, 4 arrows, 20 beats, 784 digits."""
    canvas = FigureCanvasAgg(Figure(figsize=(4 * len(panels), 4.35), dpi=dpi))
    canvas.figure.subplots_adjust(0.01, 0.01, 0.99, 0.92, 0.03)
    for axes, (title, x, colour) in zip(canvas.figure.subplots(1, len(panels), squeeze=False)[0], panels):
        axes.set(title=title, frame_on=False, xticks=(), yticks=())
        if x.shape[1] <= 4:
            axes.set(xlim=(-2.8, 2.8), ylim=(-2.8, 2.8))
            plot, look = (axes.quiver, {"width": 0.003}) if x.shape[1] == 4 else (axes.scatter, {"s": 3})
            plot(*x.T.cpu().numpy(), color=colour, **look)
        else:
            n = math.isqrt(len(x)) if x.shape[1] == 784 else 0
            x = x[: n * n].view(n, n, 28, 28).transpose(1, 2).reshape(28 * n, 28 * n) if n else x
            axes.imshow(x.clamp(-0.42, 2.8).cpu().numpy(), cmap="gray", aspect="auto")
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


# %% 10. The whole run
@torch.no_grad()
def evaluate(process, model, args, rows, samples):
    """Means over fresh or test data, in bits: K, its standard error (or less: t is stratified), L_null."""
    parts, (shift, scale) = {"heartbeat": 1000, "mnist": 40}.get(args.dataset, 400), SCALING[args.dataset]
    xs = (draw_data(args, 1000, rows) for _ in tqdm(range(parts), "bound"))
    Ks = torch.cat([bound(process, model, x_0)[0] for x_0 in xs])  # (1000 parts,)
    K, error, x_0 = Ks.mean().item(), Ks.std().item() / len(Ks) ** 0.5, draw_data(args, 10_000, rows)
    L_null = process.prior.log_prob(x_0).sum(dim=1).mean().item() / math.log(2)
    metrics = {"K": K, "standard error": error, "L_null": L_null, "K - L_null": K - L_null}
    if args.dataset == "mnist":
        return metrics | {"bits per dimension": math.log2(scale) - K / x_0.shape[1]}
    if args.dataset == "heartbeat":
        phases = (samples[:, None] == BEATS.to(samples)).all(dim=2).float().mean(dim=0).tolist()  # exact ones
        return metrics | {"exact log likelihood": -math.log2(5), "exact": sum(phases), "each phase": phases}
    kernels = Normal((CURVE[args.dataset] - shift) / scale, NOISE[args.dataset] / scale)  # one for each place
    log_p = kernels.log_prob(x_0[:4000, None].cpu()).sum(dim=2).logsumexp(dim=1) - math.log(len(u))
    return metrics | {"exact log likelihood": log_p.mean().item() / math.log(2)}


def main(argv=None):
    """One run, from options to files; in a notebook main(["--dataset", "mnist"]) stands for a command."""
    args, checkpoint = parse_options(argv)
    device, T, dataset, out = args.device, args.num_timesteps, args.dataset, Path(args.output_dir)
    cpu = getattr(torch.cpu, "get_capabilities", dict)() if device == "cpu" else {}
    quick = cpu.get("avx512_bf16") or device[:4] == "cuda" and torch.cuda.get_device_capability() >= (8, 0)
    precision = "bf16" if dataset == "mnist" and quick else "fp32"  # of the network; the others are small
    print(f"device: {device}, {precision}, {torch.get_num_threads()} CPU threads")
    if args.eval_path and (out / "model.pt").exists():
        fail(f"--output_dir {out}: a training run is there, and stays as it is; name another folder")
    torch.manual_seed(args.seed)
    rows, test_rows = load_mnist(args.data_dir) if dataset == "mnist" else [CURVE.get(dataset, BEATS)] * 2
    data = draw_data(args, DATASETS[dataset][1], test_rows)
    (N, D), Process = data.shape, Binomial if dataset == "heartbeat" else Gaussian
    model = Model(args, *((1, D) if dataset == "mnist" else (D, 1)), precision).to(device)
    model.load_state_dict(checkpoint["model"] if checkpoint else model.state_dict())
    if not args.eval_path:
        train(model, Process, args, rows, checkpoint, data.shape)
    process, frames, known = Process(model.betas().detach()), [], torch.arange(D, device=device) < D / 2
    noise = process.new_noise(N, D, device=device)  # one for all t: the eye can follow
    grid = torch.cartesian_prod(*[torch.linspace(-2.6, 2.6, 20, device=device)] * 2)  # (400, 2)
    chain = p_sample_loop(process, model, (args.eval_batch_size, D), args.seed)
    filled = p_sample_loop(process, model, (N, D), args.seed, data, known)
    for (step, x), (_, y) in tqdm(zip(chain, filled), "sampling", T + 1):
        if step % max(1, T // 20) == 0 or step == T:
            x_t = process.sample(process.q_marginal(data, torch.tensor([step - 1])), noise) if step else data
            panels = [(f"data, step {step} of {T}", x_t, BLUE), (f"samples, step {step}", x[:N], ORANGE)]
            panels += [("first half known", y, ORANGE)]
            if D == 2:
                t = torch.full((len(grid),), max(step - 1, 1), device=device)
                arrows = process.p_reverse(model(grid, t).detach(), grid, t).mean - grid
                panels += [(f"drift f_mu(x, {t[0] + 1}) - x", torch.cat((grid, arrows), dim=1), GREY)]
            frames.append(draw(panels, dpi=60))
    save(out / "process.gif", imageio.mimsave, frames[::-1] + frames + frames[-1:] * 30, duration=100, loop=0)
    save(out / "stills.png", imageio.imwrite, np.vstack([frames[k] for k in (-1, len(frames) // 2, 0)]))
    save(out / "samples.png", imageio.imwrite, draw([("samples", x[: 4 * N], ORANGE)]))
    samples = (x.cpu() * SCALING[dataset][1] + SCALING[dataset][0]).numpy()
    if dataset == "mnist":  # a grey level stands for the interval above it
        samples = np.floor(samples).clip(0, 255).astype(np.uint8).reshape(-1, 28, 28)
    save(out / "samples.npy", np.save, samples)
    metrics = evaluate(process, model, args, test_rows, x)
    versions = {"python": sys.version.split()[0], "torch": torch.__version__, "numpy": np.__version__}
    facts = {"options": vars(args), "versions": versions, "device": device, "precision": precision}
    facts |= {"seconds": round(time.perf_counter() - STARTED, 1), "metrics": metrics}
    save(out / f"{'sample' if args.eval_path else 'run'}.json", Path.write_text, json.dumps(facts, indent=2))
    print(f"{out}:", *sorted(path.name for path in out.iterdir()))
    print(", ".join(f"{name} {value}" for name, value in metrics.items()), f"({facts['seconds']} s)")


if __name__ == "__main__":
    main()
