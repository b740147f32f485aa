"""DDPM with a U-Net: Denoising Diffusion Probabilistic Models, with the paper's network, in one file.

A forward process turns images into Gaussian noise in T small steps, a U-Net learns to undo one such step, and
undoing all of them turns noise into new images. Ho, Jain and Abbeel 2020, https://arxiv.org/abs/2006.11239.

    python ddpm_unet.py                                     MNIST, 50 minutes on 2 CPU cores
    python ddpm_unet.py --dataset FOLDER --image_size 64    your own images, grey or colour
    python ddpm_unet.py --checkpoint outputs/ddpm_unet_mnist/model.pt --nll 500    samples, bits per dimension

Index: the code counts t = 0..T-1; the paper's t, the "steps left" of sampling, is t + 1, so that 0 is data.
Deviations: a small network by default; betas times 1000 / T, so that x_T is noise for every T; t spread
evenly over a batch, images drawn with replacement; a learning rate that falls to 0; a moving average that
warms up; 50 steps of DDIM (https://arxiv.org/abs/2010.02502), unless --sampler asks for Algorithm 2.
"""

# %% 1. Imports
import time

STARTED = time.perf_counter()  # before the imports: a user waits for them as well
import json
import math
import os
import signal
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import distributed, nn
from torch.distributions import Normal, kl_divergence
from torch.nn.functional import pad, scaled_dot_product_attention
from tqdm import tqdm

# %% 2. Options
RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))  # set by torchrun
CPU = getattr(torch.cpu, "get_capabilities", dict)()
QUICK = torch.cuda.is_bf16_supported(False) if torch.cuda.is_available() else CPU.get("avx512_bf16")
OPTIONS = {  # default; range, choices or (0,): any text; help. A checkpoint fixes the first eight
    "dataset": ("mnist", (0,), "mnist, or a folder of images"),
    "image_size": (28, (4, 4096), "pixels of a side; a folder is scaled to it, mnist padded from 28"),
    "num_timesteps": (1000, (20, 10**5), "T, the number of diffusion steps"),
    "base_channels": (32, (2, 4096), "width of the network at full size; the paper: 128"),
    "channel_mults": ([1, 2, 2], (1, 64), "width at each size, in base_channels; the paper: 1 2 2 2"),
    "num_res_blocks": (2, (1, 64), "residual blocks at each size"),
    "attention_resolutions": ([7, 8], (1, 4096), "sizes with self-attention; the paper: 16"),
    "dropout": (0.0, (0, 0.99), "share of numbers dropped in residual blocks; the paper: 0.1"),
    "train_batch_size": (64, (1, 10**6), "images in a training step, of all processes together"),
    "num_epochs": (8, (1, 10**6), "epochs; each draws as many images as there are"),
    "num_training_steps": (0, (0, 10**9), "training steps; 0: as --num_epochs says"),
    "learning_rate": (2e-3, (1e-12, 10), "of Adam at its highest; it rises in 200 steps, then falls to 0"),
    "ema_decay": (0.999, (0, 1), "decay of the moving average of the weights, which draws the samples"),
    "precision": ("bf16" if QUICK else "fp32", ("bf16", "fp32"), "of the network; bf16 where that is quick"),
    "eval_batch_size": (500, (1, 10**7), "samples to draw"),
    "sampler": ("ddim", ("ddim", "beta", "beta_tilde"), "ddim, or Algorithm 2 with one of its two variances"),
    "sampling_steps": (50, (1, 10**5), "steps that the sampler takes, T at most; the paper: all T"),
    "nll": (0, (0, 10**7), "test images whose bits per dimension to bound; ddim counts as beta_tilde"),
    "nll_terms": (20, (1, 10**5), "values of t to take for each of them"),
    "seed": (0, (0, 2**31 - 1), "fixes all that is random"),
}
SHORT = {"num_epochs": "-e", "learning_rate": "-l", "train_batch_size": "-b"}


def fail(message):
    """Bad input ends here: one line that names the flag, the value and the way out; exit status 2."""
    tqdm.write(f"ddpm_unet.py: error: {message}", file=sys.stderr)  # on its own line, below a progress bar
    sys.exit(2)


def parse_options(argv=None):
    """The options, complete, and the content of the file that --checkpoint or --resume names, or None."""
    cuda = [f"cuda:{k}" for k in range(torch.cuda.device_count())]
    here = cuda + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    parser = ArgumentParser("ddpm_unet.py", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.error, flag = fail, parser.add_argument
    for name, (default, allowed, text) in OPTIONS.items():
        one, many = (default[0], "+") if isinstance(default, list) else (default, None)
        look = {"choices": allowed} if isinstance(allowed[0], str) else {"type": type(one), "metavar": "X"}
        flag(f"--{name}", *SHORT.get(name, "").split(), nargs=many, help=f"{text} [{default}]", **look)
    flag("--num_samples", dest="eval_batch_size", type=int, metavar="N", help="the same as --eval_batch_size")
    flag("--eval_path", "--checkpoint", metavar="FILE", help="a model.pt to sample from instead of training")
    flag("--resume", metavar="FILE", help="a model.pt whose training to go on with, in its folder")
    flag("--output_dir", metavar="DIR", help="[outputs/ddpm_unet_DATASET; with --checkpoint …_samples]")
    flag("--data_dir", metavar="DIR", default="data", help="holds MNIST/raw, or will after a download [data]")
    flag("--device", default=here[0].split(":")[0], help="cuda, mps or cpu [the first that is there]")
    args = parser.parse_args([] if argv is None and "ipykernel" in sys.modules else argv)  # notebook: none
    path = args.eval_path or args.resume
    args.device += ":" + os.environ.get("LOCAL_RANK", "0") if args.device == "cuda" else ""
    if args.device not in here:
        fail(f"--device {args.device}: not on this machine or not in this build of torch; here: {here}")
    try:
        checkpoint = torch.load(path, args.device, weights_only=True) if path else None  # runs no code of it
        saved = {name: checkpoint["ddpm_unet.py"][name] for name in OPTIONS} if path else {}
    except Exception as error:  # noqa: BLE001 — a bad file fails in many ways
        fail(f"--checkpoint or --resume {path}: {type(error).__name__}; give a model.pt of ddpm_unet.py")
    for name, (default, allowed, _) in OPTIONS.items():
        given = getattr(args, name)
        vars(args)[name] = value = saved.get(name, default) if given is None else given
        if not isinstance(value, str) and not allowed[0] <= np.min(value) <= np.max(value) <= allowed[1]:
            fail(f"--{name} {value}: give numbers from {allowed[0]} to {allowed[1]}")
        if name in list(OPTIONS)[:8] and value != saved.get(name, value):
            fail(f"--{name} {value}: {path} has {saved[name]}; leave the flag out")
    S, unit = args.image_size, 2 ** (len(args.channel_mults) - 1)
    if S % unit or args.dataset == "mnist" and (S < 28 or S % 2):
        fail(f"--image_size {S}: --channel_mults need a multiple of {unit}, mnist an even one from 28 on")
    name = f"ddpm_unet_{Path(args.dataset).name}{'_samples' if args.eval_path else ''}"
    args.output_dir = args.output_dir or str(Path(path).parent if args.resume else Path("outputs", name))
    return args, checkpoint


# %% 3. Data — grey levels 0..255; the network sees them as -1..1, the paper's section 3.3
def load_images(args):
    """Training and test images, uint8 (N, C, S, S), C = 1 if all are grey; a tenth of a folder for tests."""
    S, where = args.image_size, args.data_dir
    try:
        from torchvision import datasets
        from torchvision.transforms.functional import center_crop, pil_to_tensor, resize

        if args.dataset == "mnist":
            parts = [datasets.MNIST(where, train, download=True).data[:, None] for train in (True, False)]
            return [pad(images, [(S - 28) // 2] * 4) for images in parts]
        images = []
        for where in sorted(Path(args.dataset).rglob("*")):
            if datasets.folder.is_image_file(where.name):
                images.append(pil_to_tensor(center_crop(resize(datasets.folder.default_loader(where), S), S)))
        if len(images) < 2:
            fail(f"--dataset {args.dataset}: fewer than 2 images; name a folder of image files")
        images = torch.stack(images)
    except Exception as error:  # noqa: BLE001 — no network, a damaged file, a torchvision of another torch
        why = f"--dataset {args.dataset}: {where}: {' '.join(str(error).split())[:80]}"
        fail(f"{why}; mend or remove that file; or put the 4 files of MNIST into {args.data_dir}/MNIST/raw")
    images = images[:, :1] if (images == images[:, :1]).all() else images
    return images[torch.arange(len(images)) % 10 > 0], images[::10]


# %% 4. Noise schedule — the paper's section 4
def make_schedule(T, device="cpu", steps=None):
    """All that depends on t alone, as tensors (T,), or (steps,) for so few of the T steps, with the last."""
    betas = torch.linspace(1e-4, 0.02, T, dtype=torch.float64) * 1000 / T  # the paper's for T = 1000
    betas = betas.clamp(max=0.999)  # at T = 20 the last would be 1 and alpha_bar_T 0: a division by 0
    timesteps = torch.linspace(T - 1, 0, min(steps or T, T), dtype=torch.float64).round().long().flip(0)
    alpha_bars = (1 - betas).cumprod(dim=0)[timesteps]  # most code calls this alphas_cumprod
    alpha_bars_prev = pad(alpha_bars[:-1], (1, 0), value=1.0)
    betas = 1 - alpha_bars / alpha_bars_prev  # the same again, unless steps were left out
    schedule = {
        "betas": betas,
        "signal": alpha_bars.sqrt(),  # eq. 4: x_t = signal x_0 + noise_std eps
        "noise_std": (1 - alpha_bars).sqrt(),
        "signal_prev": alpha_bars_prev.sqrt(),
        "noise_variance_prev": 1 - alpha_bars_prev,
        "posterior_variance": (1 - alpha_bars_prev) / (1 - alpha_bars) * betas,  # eq. 7: beta_tilde
    }
    return Namespace(timesteps=timesteps.to(device), **{k: v.float().to(device) for k, v in schedule.items()})


# %% 5. Forward process, and Algorithm 1 — x is (B, D), D = C S S, t is (B,), betas[t, None] is (B, 1)
def q_sample(schedule, x_0, t, eps):
    """x_t (B, D) of q(x_t | x_0) from noise eps: steps 0 to t at once, eq. 4."""
    return schedule.signal[t, None] * x_0 + schedule.noise_std[t, None] * eps


def q_posterior(schedule, x_0, x_t, t, eta=1.0):
    """Mean (B, D) and variance (B, 1) of q(x_{t-1} | x_t, x_0), eq. 6 and 7, in the form of DDIM's eq. 7. The
    share of noise that is drawn anew is set by eta (1: DDPM, 0: none); eq. 4 holds for every eta."""
    eps = (x_t - schedule.signal[t, None] * x_0) / schedule.noise_std[t, None]
    variance = eta**2 * schedule.posterior_variance[t, None]
    kept = (schedule.noise_variance_prev[t, None] - variance).sqrt()
    return schedule.signal_prev[t, None] * x_0 + kept * eps, variance


def loss_simple(model, schedule, x_0, t, eps):
    """Algorithm 1, line 5 before the gradient, eq. 14 divided by D: squared errors (B,) for x_0 (B, D)."""
    return (eps - model(q_sample(schedule, x_0, t, eps), t)).square().mean(dim=1)


# %% 6. Sampling — Algorithm 2 and DDIM; the model has its gradients off, as ema in main
def p_reverse(model, schedule, x_t, t, sampler="beta_tilde"):
    """x_0_hat (B, D), eq. 15, clipped to the range of data, and mean and variance of p(x_{t-1} | x_t). In a
    shortened schedule, t counts its own steps; the network, 250 images at a time, is told timesteps[t]."""
    eps_hat = torch.cat([model(*part) for part in zip(x_t.split(250), schedule.timesteps[t].split(250))])
    x_0_hat = ((x_t - schedule.noise_std[t, None] * eps_hat) / schedule.signal[t, None]).clamp(-1, 1)
    mean, variance = q_posterior(schedule, x_0_hat, x_t, t, eta=float(sampler != "ddim"))
    return x_0_hat, mean, schedule.betas[t, None] if sampler == "beta" else variance


def p_sample_loop(model, schedule, shape, seed, sampler="beta_tilde"):
    """Yields (steps left, x_t, x_0_hat), from noise to (0, x_0, x_0), each x (B, D): Algorithm 2, line 4 by
    eq. 7 with x_0_hat for x_0, with either variance of the paper; or DDIM: no new noise, eps from x_0_hat."""
    generator = torch.Generator(device := schedule.betas.device).manual_seed(seed)
    x = torch.randn(shape, generator=generator, device=device)
    for step in reversed(range(len(schedule.betas))):
        t = torch.full(shape[:1], step, device=device)
        x_0_hat, mean, variance = p_reverse(model, schedule, x, t, sampler)
        yield step + 1, x, x_0_hat
        x = mean + (step > 0) * variance.sqrt() * torch.randn(shape, generator=generator, device=device)
    yield 0, x, x


# %% 7. Likelihood — eq. 5, and section 3.3 for L_0
def bound(model, schedule, x_0, n, sampler="beta_tilde"):
    """Bits (B, 3) that images x_0 (B, D) cost at most: L_T, the sum of L_t for t = 1..T-1 here, and L_0, with
    the beta_tilde of t = 1, as the authors do: its own is 0. Of the sum, n terms an image from a random t."""
    T, first = len(schedule.betas), torch.randint(len(schedule.betas) - 1, (len(x_0),)).to(x_0.device)
    L_T, L = kl_divergence(Normal(schedule.signal[-1] * x_0, schedule.noise_std[-1]), Normal(0.0, 1.0)), 0
    for k in tqdm(range(n + 1), "bound"):
        t = 1 + (first + k * (T - 1) // n) % (T - 1) if k < n else 0 * first
        x_t = q_sample(schedule, x_0, t, torch.randn_like(x_0))
        _, mean, variance = p_reverse(model, schedule, x_t, t, sampler.replace("ddim", "beta_tilde"))
        p = Normal(mean, torch.where(t[:, None] > 0, variance, schedule.posterior_variance[1]).sqrt())
        if k < n:
            mean, variance = q_posterior(schedule, x_0, x_t, t)
            L = L + kl_divergence(Normal(mean, variance.sqrt()), p) * (T - 1) / n
    upper, lower = (p.cdf(x_0 + s / 255).where(s * x_0 < 0.999, (1 + s) / 2) for s in (1, -1))
    L_0 = -(upper - lower).clamp(min=1e-12).log()  # eq. 13: the first and the last level have no end
    return torch.stack([nats.sum(dim=1) for nats in (L_T, L, L_0)], dim=1) / math.log(2)


# %% 8. Network — appendix B; h is (B, C, H, W), temb is (B, 4 base_channels)
def norm(C):
    """Group norm of h (B, C, H, W): the authors' 32 groups if 128 divides C, else 4 channels or more each."""
    return nn.GroupNorm(math.gcd(32, C, max(1, C // 4)), C)


def conv(C_in, C_out, size=3, stride=1, gain=1.0):
    """A convolution with the authors' first weights, Glorot's times gain: with gain 0 its output is 0."""
    layer = nn.Conv2d(C_in, C_out, size, stride, size // 2)
    nn.init.xavier_uniform_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


class ResBlock(nn.Module):  # h (B, C_in, H, W) to (B, C, H, W), with or without self-attention
    def __init__(self, args, C_in, C, attention):
        super().__init__()
        self.first = nn.Sequential(norm(C_in), nn.SiLU(), conv(C_in, C))
        self.temb = nn.Sequential(nn.SiLU(), nn.Linear(4 * args.base_channels, C))
        self.last = nn.Sequential(norm(C), nn.SiLU(), nn.Dropout(args.dropout), conv(C, C, gain=0))
        self.shortcut = conv(C_in, C, 1) if C_in != C else nn.Identity()
        self.qkv = nn.Sequential(norm(C), conv(C, 3 * C, 1)) if attention else None
        self.out = conv(C, C, 1, gain=0) if attention else None

    def forward(self, h, temb):
        h = self.shortcut(h) + self.last(self.first(h) + self.temb(temb)[:, :, None, None])
        if self.qkv is None:
            return h
        q, k, v = self.qkv(h).flatten(2).transpose(1, 2).chunk(3, dim=2)  # each (B, H W, C)
        seen = scaled_dot_product_attention(q, k, v)  # softmax(q k^T / sqrt(C)) v: all pixels see all
        return h + self.out(seen.transpose(1, 2).reshape(h.shape))


class UNet(nn.Module):  # x_t (B, C S S) and t (B,) to eps_theta(x_t, t) (B, C S S), 0 before training
    def __init__(self, args, C):
        super().__init__()
        S, ch, n = args.image_size, args.base_channels, args.num_res_blocks
        self.shape, self.ch, self.T, self.bf16 = (C, S, S), ch, args.num_timesteps, args.precision == "bf16"
        self.temb = nn.Sequential(nn.Linear(ch, 4 * ch), nn.SiLU(), nn.Linear(4 * ch, 4 * ch))
        levels = [(ch * m, S >> k in args.attention_resolutions) for k, m in enumerate(args.channel_mults)]
        downs, ups, skips, C_in = [conv(C, ch)], [], [ch], ch  # skips: channels that the way up sees again
        for k, (width, attention) in enumerate(levels):
            downs += [conv(C_in, C_in, stride=2)] if k > 0 else []  # halves height and width
            skips += [C_in] * (k > 0) + [width] * n
            for _ in range(n):
                downs.append(ResBlock(args, C_in, width, attention))
                C_in = width
        self.middle = nn.ModuleList(ResBlock(args, C_in, C_in, attention) for attention in (True, False))
        for k, (width, attention) in reversed(list(enumerate(levels))):
            for _ in range(n + 1):
                ups.append(ResBlock(args, C_in + skips.pop(), width, attention))
                C_in = width
            ups += [nn.Sequential(nn.Upsample(scale_factor=2), conv(width, width))] if k > 0 else []
        self.downs, self.ups = nn.ModuleList(downs), nn.ModuleList(ups)
        self.last = nn.Sequential(norm(width), nn.SiLU(), conv(width, C, gain=0))

    def forward(self, x, t):
        frequencies = 1000 / self.T * 10_000 ** -torch.linspace(0, 1, (self.ch + 1) // 2, device=x.device)
        angles = t[:, None] * frequencies  # (B, base_channels / 2); t as if T were 1000
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            temb = self.temb(torch.cat((angles.sin(), angles.cos()), dim=1)[:, : self.ch])
            h, skips = x.view(-1, *self.shape), []
            for layer in self.downs:
                h = layer(h, temb) if isinstance(layer, ResBlock) else layer(h)
                skips.append(h)
            h = self.middle[1](self.middle[0](h, temb), temb)
            for layer in self.ups:
                h = torch.cat((h, skips.pop()), dim=1) if isinstance(layer, ResBlock) else h
                h = layer(h, temb) if isinstance(layer, ResBlock) else layer(h)
            return self.last(h).flatten(1).float()


# %% 9. Training
def train(net, ema, images, args, checkpoint):
    """Trains net and ema, its moving average, to the end or to Ctrl-C; writes model.pt and loss.png."""
    (N, C, *_), B, T, out = images.shape, args.train_batch_size, args.num_timesteps, Path(args.output_dir)
    steps, stop, device = args.num_training_steps or math.ceil(args.num_epochs * N / B), [], args.device
    optimizer = torch.optim.Adam(net.parameters(), args.learning_rate, fused=True)
    model = nn.parallel.DistributedDataParallel(net) if WORLD > 1 else net  # averages the gradients
    schedule, losses = make_schedule(T, device), list(checkpoint["losses"]) if checkpoint else []
    optimizer.load_state_dict(checkpoint["optimizer"] if checkpoint else optimizer.state_dict())
    signal.signal(signal.SIGINT, lambda *_: stop.append(signal.signal(signal.SIGINT, signal.SIG_DFL)))
    for step in (bar := tqdm(range(len(losses), steps), "train", steps, initial=len(losses), disable=RANK)):
        torch.manual_seed((args.seed * 2_654_435_761 + step) % 2**32)  # no state to save: resuming is exact
        optimizer.param_groups[0]["lr"] = args.learning_rate * min((step + 1) / 200, 1 - step / steps)
        t = torch.randperm(B, device=device) * T // B + torch.randint(T, (1,), device=device)  # even mod T
        chosen, eps = torch.randint(N, (B,), device=device), torch.randn(B, images[0].numel(), device=device)
        x_0, t, eps = (part[RANK::WORLD] for part in (images[chosen].flatten(1) / 127.5 - 1, t % T, eps))
        loss = loss_simple(model, schedule, x_0, t, eps).sum() * WORLD / B
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        decay = min(args.ema_decay, (1 + step) / (10 + step))  # ema = decay ema + (1 - decay) net
        torch._foreach_lerp_(list(ema.state_dict().values()), list(net.state_dict().values()), 1 - decay)
        losses.append(loss.detach())
        if step % 50 == 0:  # to read a loss is to wait for the device: not at every step
            bar.set_postfix(loss=f"{torch.stack(losses[-100:]).mean():.4f}", refresh=False)
        last = bool(stop) or step + 1 == steps  # stop: Ctrl-C, once; a second one ends the program
        if RANK == 0 and (last or step % 500 == 499):
            if not torch.stack(losses).isfinite().all():  # model.pt stays as it was
                fail(f"--learning_rate {args.learning_rate}: NaN loss up to step {step + 1}; lower it")
            content = {"ddpm_unet.py": vars(args), "losses": torch.stack(losses), "model": net.state_dict()}
            content |= {"ema": ema.state_dict(), "optimizer": optimizer.state_dict(), "channels": C}
            save(out / "model.pt", lambda path, content: torch.save(content, path), content)
            axes = Figure(layout="constrained").add_subplot(xlabel="step", ylabel="loss", yscale="log")
            axes.plot(content["losses"].cpu(), ".", color="#0072B2", markersize=1)
            save(out / "loss.png", axes.figure.savefig)
        if last:
            break
    signal.signal(signal.SIGINT, signal.default_int_handler)


# %% 10. Pictures and files
def tile(x, C, columns=5):
    """Picture (H, W, C), uint8, of images x (N, C S S) in [-1, 1], so many in a row; (H, W) if C = 1."""
    S = math.isqrt(x.shape[1] // C)
    x = pad(x, (0, 0, 0, -len(x) % columns), value=1.0).view(-1, columns, C, S, S).permute(0, 3, 1, 4, 2)
    return ((x.reshape(-1, columns * S, C).squeeze(2) + 1) * 127.5).round().clamp(0, 255).byte().cpu().numpy()


def save(path, write, *parts, **options):
    """write(another name, *parts, **options), then rename: the file is whole, or what it was before."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary := path.with_name(f".{path.name}"), *parts, **options)
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        fail(f"--output_dir {path.parent}: {error}; name a folder with room that can be written")


# %% 11. The whole run
def main(argv=None):
    """One run, from options to files; in a notebook main(["--nll", "100"]) stands for a command."""
    args, checkpoint = parse_options(argv)
    device, T, S, out = args.device, args.num_timesteps, args.image_size, Path(args.output_dir)
    print(f"device: {device}, {args.precision}, {torch.get_num_threads()} CPU threads, process {RANK}")
    if args.eval_path and (out / "model.pt").exists():
        fail(f"--output_dir {out}: a training run is there, and stays as it is; name another folder")
    distributed.init_process_group() if WORLD > 1 else None
    torch.manual_seed(args.seed)
    wanted = args.nll or not args.eval_path  # without training or --nll there is no need for data
    images, test = (x.to(device) for x in load_images(args)) if wanted else (None, None)
    C = checkpoint["channels"] if checkpoint else images.shape[1]
    net, ema = UNet(args, C).to(device), UNet(args, C).to(device).eval().requires_grad_(False)
    net.load_state_dict(checkpoint["model"] if checkpoint else net.state_dict())
    ema.load_state_dict(checkpoint["ema"] if checkpoint else net.state_dict())
    if wanted and RANK == 0:  # before the training: a folder that cannot be written fails now
        data = test[torch.arange(100) % len(test)].flatten(1).cpu() / 127.5 - 1
        eps, steps = torch.randn_like(data), torch.arange(100) // 10 * (T - 1) // 9
        save(out / "data.png", imageio.imwrite, tile(data[:10], C))
        save(out / "noisy.png", imageio.imwrite, tile(q_sample(make_schedule(T), data, steps, eps), C, 10))
    None if args.eval_path else train(net, ema, images, args, checkpoint)
    sys.exit() if RANK > 0 else None  # the first process goes on alone
    chain = make_schedule(T, device, args.sampling_steps)
    frames, loop = [], p_sample_loop(ema, chain, (args.eval_batch_size, C * S * S), args.seed, args.sampler)
    for step, x, x_0_hat in tqdm(loop, "sampling", len(chain.betas) + 1):
        if step % max(1, len(chain.betas) // 50) == 0 or step == len(chain.betas):  # a grey line between
            frames.append(np.insert(np.hstack([tile(y[:25], C) for y in (x, x_0_hat)]), [5 * S] * 4, 128, 1))
    save(out / "process.gif", imageio.mimsave, frames + frames[-1:] * 30, duration=100, loop=0)
    save(out / "samples.png", imageio.imwrite, tile(x[:100], C, 10))
    edge = (S - 28) // 2 * (args.dataset == "mnist")  # what pads a digit; not counted in bits per dimension
    samples = tile(x, C, 1).reshape(-1, S, S, C)[:, edge : S - edge, edge : S - edge]
    save(out / "samples.npy", np.save, samples if C > 1 else samples[..., 0])
    metrics = {}
    if args.nll:
        x_0 = test[torch.randperm(len(test))[: args.nll]].flatten(1) / 127.5 - 1
        bits = bound(ema, make_schedule(T, device), x_0, args.nll_terms, args.sampler).cpu() / samples[0].size
        total, names = bits.sum(dim=1), ("L_T", "L_1 to L_{T-1}", "L_0")
        metrics = {"bits per dimension": total.mean().item(), **dict(zip(names, bits.mean(dim=0).tolist()))}
        metrics["standard error"] = total.std().item() / len(total) ** 0.5 if len(total) > 1 else None
    versions = {"python": sys.version.split()[0], "torch": torch.__version__, "numpy": np.__version__}
    facts = {"options": vars(args), "versions": versions, "device": device, "precision": args.precision}
    facts |= {"seconds": round(time.perf_counter() - STARTED, 1), "metrics": metrics}
    save(out / f"{'sample' if args.eval_path else 'run'}.json", Path.write_text, json.dumps(facts, indent=2))
    print(f"{out}:", *sorted(path.name for path in out.iterdir()), metrics, f"({facts['seconds']} s)")


if __name__ == "__main__":
    main()
