"""DDPM with a U-Net: Denoising Diffusion Probabilistic Models (arXiv 2006.11239), in one file.

T small steps turn an image x_0 into noise; after t of them it is x_t. A U-Net learns to guess the
noise in x_t. With its guesses, we go back from pure noise to a new image, in many steps.

    python ddpm_unet.py                                     MNIST, in 45 minutes on two cores
    python ddpm_unet.py --checkpoint tests/models/ddpm_unet_mnist.pt --label 7   sevens, right now
    python ddpm_unet.py --dataset FOLDER --image_size 64    your own images, grey or colour
    torchrun --nproc_per_node=4 ddpm_unet.py                MNIST, on four GPUs

x is (B, C, H, W): B images with C = 1 (grey) or 3 channels. In x_0, pixels are from -1 to 1.
Steps are t = 1..T, as in the paper: x_0 is data, x_T is noise. torch makes tensors on --device.
"""

import json
import os
import signal
import sys
from argparse import ArgumentParser
from copy import deepcopy
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import distributed, nn
from torchvision import datasets, transforms, utils
from tqdm import tqdm

RANK = int(os.environ.get("RANK", "0"))  # torchrun starts WORLD_SIZE processes and numbers them
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", "1"))


# %% 1. Noise schedule and forward process
def make_schedule(T):
    """Return alpha_bars (T + 1,) for t = 0..T: products of the first t factors alpha = 1 - beta."""
    # Step t is x_t = sqrt(alpha) * x_{t-1} + sqrt(1 - alpha) * noise (eq. 2): variance 1 stays 1.
    # So t steps scale x_0 by sqrt(alpha_bar), and add noise of variance 1 - alpha_bar in all.
    betas = np.linspace(1e-4, 0.02, T) * 1000 / T  # sum: 10. So alpha_bar_T is about exp(-10)
    betas = betas.clip(max=0.999)  # if T is 20 or less, some betas are too large
    return torch.from_numpy(np.cumprod(np.append(1, 1 - betas)))  # in other code alphas_cumprod


def q_sample(x_0, alpha_bar, eps):
    """Return x_t: x_0 after the steps 1 to t, in one jump; eps is from N(0, I) (eq. 4)."""
    return alpha_bar**0.5 * x_0 + (1 - alpha_bar) ** 0.5 * eps


def q_posterior(x_0, x_t, alpha_bar, alpha_bar_prev):
    """Return mean and variance of q(x_{t-1} | x_t, x_0): the step back, if we knew x_0 (eq. 7)."""
    # Bayes' rule: q(x_{t-1} | x_0) q(x_t | x_{t-1}), scaled. Both are bell curves in x_{t-1},
    # exp(-(x - mean)**2 / 2 / variance). Exponents add: 1 / variance adds, and weights the means.
    alpha = alpha_bar / alpha_bar_prev  # alpha_t, or, if sampling skips steps, a product of alphas
    mean_0 = alpha_bar_prev**0.5 * x_0  # what x_0 tells of x_{t-1}: eq. 4
    variance_0 = 1 - alpha_bar_prev
    mean_t = x_t / alpha**0.5  # what x_t tells of x_{t-1}: eq. 2, solved for it
    variance_t = (1 - alpha) / alpha  # the division enlarges the noise, too
    weight = variance_t / (variance_0 + variance_t)  # 1/variance_0 / (1/variance_0 + 1/variance_t)
    return weight * mean_0 + (1 - weight) * mean_t, weight * variance_0  # 1 / sum of inverses


# %% 2. Network: a small version of the paper's U-Net (appendix B)
def conv(C_in, C):
    """Return group norm, SiLU, 3x3 convolution: (B, C_in, H, W) to (B, C, H, W), C features."""
    return nn.Sequential(nn.GroupNorm(8, C_in), nn.SiLU(), nn.Conv2d(C_in, C, 3, padding=1))


class ResBlock(nn.Module):
    """Map h (B, C_in, H, W) to (B, C, H, W). temb (B, E) is a vector made from t and label."""

    def __init__(self, C_in, C, E):
        super().__init__()
        self.conv_1 = conv(C_in, C)
        self.project = nn.Linear(E, C)
        self.conv_2 = conv(C, C)
        self.shortcut = nn.Conv2d(C_in, C, 1)
        nn.init.zeros_(self.conv_2[-1].weight)  # so training starts close to the shortcut

    def forward(self, h, temb):
        y = self.conv_1(h) + self.project(temb)[:, :, None, None]  # adds one number to each channel
        return self.shortcut(h) + self.conv_2(y)


class UNet(nn.Module):
    """Return eps_hat: the noise guessed in x_t (B, channels, H, W), given t (B,), labels (B,)."""

    def __init__(self, channels, num_classes, num_timesteps, base_channels, channel_mults):
        super().__init__()
        E = 4 * base_channels  # width of temb, the embedding of t and label
        widths = [base_channels * mult for mult in channel_mults]  # such as 24, 48, 96
        pairs = list(zip([widths[0], *widths], widths))  # (24, 24), (24, 48), (48, 96)
        # Fast waves tell close t apart, slow ones distant t. 1000 / T makes any T look like 1000.
        self.frequencies = 1000 / num_timesteps * 10_000 ** -torch.linspace(0, 1, E // 2)
        self.time_mlp = nn.Sequential(nn.Linear(E, E), nn.SiLU(), nn.Linear(E, E))
        self.no_label = num_classes  # the label that stands for none
        self.label_embedding = nn.Embedding(num_classes + 1, E)
        self.first = nn.Conv2d(channels, widths[0], 3, padding=1)
        self.downs = nn.ModuleList()
        for C_in, C in pairs[:-1]:  # each output is also kept for the way up: a skip
            self.downs.append(ResBlock(C_in, C, E))
        self.middle_1 = ResBlock(*pairs[-1], E)
        self.attention = nn.MultiheadAttention(widths[-1], num_heads=1, batch_first=True)
        self.middle_2 = ResBlock(widths[-1], widths[-1], E)
        self.ups = nn.ModuleList()
        for C_skip, C_below in reversed(pairs[1:]):  # (48, 96), (24, 48); first, 96 + 48 to 48
            self.ups.append(ResBlock(C_below + C_skip, C_skip, E))
        self.last = conv(widths[0], channels)

    def forward(self, x_t, t, labels):
        angles = (t[:, None] - 1) * self.frequencies  # (B, E / 2), for 0..T-1 as in other code
        temb = self.time_mlp(torch.cat((angles.sin(), angles.cos()), dim=1))
        temb = F.silu(temb + self.label_embedding(labels))  # (B, E)
        h = self.first(x_t)  # (B, widths[0], H, W)
        skips = []
        for block in self.downs:
            h = block(h, temb)
            skips.append(h)
            h = F.avg_pool2d(h, 2, ceil_mode=True)  # half of H and W, rounded up
        h = self.middle_1(h, temb)
        pixels = F.group_norm(h, 8).flatten(2).mT  # (B, H W, C): each attends to all
        attended, _ = self.attention(pixels, pixels, pixels)
        h = self.middle_2(h + attended.mT.reshape(h.shape), temb)
        for block in self.ups:
            skip = skips.pop()
            h = F.interpolate(h, skip.shape[2:])  # to the height and width of skip
            h = block(torch.cat((h, skip), dim=1), temb)
        return self.last(h)  # (B, channels, H, W)


# %% 3. Loss
# If we know the noise in x_t, we know x_0 (eq. 4), and so the step back: the network guesses noise.
# The paper derives this loss from a bound on -log p(x_0), as in a VAE, but drops a factor that
# depends on t (eq. 12): see the README, parts 3 and 4.
def loss_simple(model, alpha_bars, x_0, labels, no_label):
    """Return the loss of Algorithm 1 for images x_0 and their labels (B,): L_simple (eq. 14)."""
    t = torch.randint(1, len(alpha_bars), (len(x_0),))  # Algorithm 1, line 3
    eps = torch.randn_like(x_0)  # line 4
    x_t = q_sample(x_0, alpha_bars[t].view(-1, 1, 1, 1), eps)
    dropped = torch.rand(len(x_0)) < 0.1  # one in ten is trained without label, for guidance
    eps_hat = model(x_t, t, labels.masked_fill(dropped, no_label))
    return F.mse_loss(eps_hat, eps)  # line 5


# %% 4. Sampling
# Eq. 4 turns eps_hat into x_0_hat. Least squares teaches means, so x_0_hat is about the mean of
# all x_0 that fit x_t (without guidance). The true step draws one of these x_0 for q_posterior.
# With x_0_hat in its place, x_{t-1} has the same mean, as mean_0 is linear in x_0. It lacks the
# variance weight**2 * alpha_bar_prev * Var(x_0 | x_t), which is little if the step is small.
@torch.no_grad()
def p_sample_loop(net, alpha_bars, num_steps, x, labels, guidance, sampler):
    """Turn noise x into images, in num_steps of the T steps. Yield (steps left, x_t, x_0_hat)."""
    steps = np.linspace(0, len(alpha_bars) - 1, num_steps + 1).round().astype(int)
    take_step = {"ddim": ddim_step, "ddpm": p_sample}[sampler]
    for k in range(num_steps, 0, -1):
        alpha_bar = alpha_bars[steps[k]].item()  # k steps are left, and t is steps[k]
        alpha_bar_prev = alpha_bars[steps[k - 1]].item()  # at the t we go to: we call it t - 1
        t = torch.full_like(labels, steps[k])
        eps_hat = net(x, t, labels)
        if guidance != 0:  # go further in the direction of the label: arXiv 2207.12598, eq. 6
            eps_hat_without = net(x, t, torch.full_like(t, net.no_label))
            eps_hat = eps_hat + guidance * (eps_hat - eps_hat_without)
        x_0_hat = (x - (1 - alpha_bar) ** 0.5 * eps_hat) / alpha_bar**0.5  # eq. 15
        x_0_hat = x_0_hat.clamp(-1, 1)  # as in the authors' code: the division magnifies errors
        yield k, x, x_0_hat
        x = take_step(x_0_hat, x, alpha_bar, alpha_bar_prev)
    yield 0, x, x  # finished


def p_sample(x_0_hat, x_t, alpha_bar, alpha_bar_prev):
    """Take a step of Algorithm 2: draw x_{t-1} from q_posterior, with x_0_hat in place of x_0."""
    mean, variance = q_posterior(x_0_hat, x_t, alpha_bar, alpha_bar_prev)
    return mean + variance**0.5 * torch.randn_like(x_t)  # variance is 0 in the last step


def ddim_step(x_0_hat, x_t, alpha_bar, alpha_bar_prev):
    """Take a step of DDIM, without fresh noise: arXiv 2010.02502, eq. 12, with sigma = 0."""
    # With the true x_0 and eps, this is eq. 4 at t - 1, with the same noise. Ours are only means:
    # so we take small steps, and guess again. Why the samples are right: see the README, part 7.
    eps_hat = (x_t - alpha_bar**0.5 * x_0_hat) / (1 - alpha_bar) ** 0.5  # again, after the clamp
    return q_sample(x_0_hat, alpha_bar_prev, eps_hat)


# %% 5. Training
def train(net, ema, images, labels, options, path, state):
    """Train net by Algorithm 1. Average it in ema. state: {}, or what to resume. Return signals."""
    model = nn.parallel.DistributedDataParallel(net) if WORLD_SIZE > 1 else net
    alpha_bars = make_schedule(options["num_timesteps"]).float().to(images.device)
    optimizer = torch.optim.Adam(net.parameters(), options["learning_rate"])
    if state.get("optimizer"):  # it is empty in tests/models/ddpm_unet_mnist.pt
        optimizer.load_state_dict(state["optimizer"])
        optimizer.param_groups[0]["lr"] = options["learning_rate"]  # not that of the checkpoint
    start = state.get("step", 0)
    end = max(1, options["num_epochs"] * len(images) // options["train_batch_size"])
    B = max(1, options["train_batch_size"] // WORLD_SIZE)  # the share of this process
    signals = []  # filled when Ctrl-C (SIGINT) or SIGTERM arrives: then stop early
    for number in (signal.SIGINT, signal.SIGTERM):  # they now wait for the end of a step
        signal.signal(number, lambda signum, frame: signals.append(signum))
    bar = tqdm(range(start, end), "training", end, initial=start, disable=RANK > 0)
    for step in bar:
        torch.manual_seed((options["seed"] * 10**9 + step) * WORLD_SIZE + RANK)  # same if resumed
        indices = torch.randint(len(images), (B,))
        x_0 = images[indices] / 127.5 - 1  # from 0..255 to -1..1, as in the paper's section 3.3
        loss = loss_simple(model, alpha_bars, x_0, labels[indices], net.no_label)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        decay = min(0.9995, (1 + step) / (10 + step))  # a short memory at the beginning
        for average, weight in zip(ema.parameters(), net.parameters()):
            average.lerp_(weight.detach(), 1 - decay)
        bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
        stop = torch.tensor(len(signals))
        if WORLD_SIZE > 1:
            distributed.all_reduce(stop)  # adds up all processes: they stop after the same step
        if RANK == 0 and ((step + 1) % 200 == 0 or step + 1 == end or stop > 0):
            if not loss.isfinite():
                sys.exit("ddpm_unet.py: error: the loss is not finite: lower --learning_rate")
            weights = {"net": net.state_dict(), "ema": ema.state_dict()}
            weights["optimizer"] = optimizer.state_dict()
            with path.with_suffix(".part").open("wb") as file:
                torch.save({"options": options, "step": step + 1, **weights}, file)
            path.with_suffix(".part").replace(path)  # so that model.pt is never half-written
        if stop > 0:
            break
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return signals


# %% 6. Data
def read_image(path, size):
    """Return the central square of an image file, as you would see it: uint8 (3, size, size)."""
    image = ImageOps.exif_transpose(Image.open(path))  # turned upright
    if image.mode.startswith("I"):  # 16-bit grey
        image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
    image = image.convert("RGBA")  # also from palettes and CMYK; below, transparent becomes white
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    pixels = np.array(ImageOps.fit(image, (size, size)))  # the central square, then resized
    return torch.from_numpy(pixels).permute(2, 0, 1)


def load_images(dataset, data_dir, size):
    """Return images, uint8 (N, C, size, size), and labels (N,): subfolders are classes, if any."""
    if dataset == "mnist":
        try:
            mnist = datasets.MNIST(data_dir, download=True)
        except (RuntimeError, ValueError) as error:
            raise SystemExit(f"ddpm_unet.py: error: {data_dir}: {error!r:.99}") from error
        return transforms.functional.resize(mnist.data[:, None], [size, size]), mnist.targets
    classes = sorted(p.name for p in Path(dataset).iterdir() if p.is_dir() and p.name[0] != ".")
    numbers = {name: number for number, name in enumerate(classes or ["."])}  # ".": no subfolders
    files = datasets.folder.make_dataset(dataset, numbers, datasets.folder.IMG_EXTENSIONS)
    images = []
    for path, _ in tqdm(files, "reading"):  # pairs of path and class number
        try:
            images.append(read_image(path, size))
        except Exception as error:
            raise SystemExit(f"ddpm_unet.py: error: cannot read {path}: {error!r:.99}") from error
    images = torch.stack(images)
    if (images == images[:, :1]).all():  # red = green = blue
        images = images[:, :1]
    return images, torch.tensor([number for _, number in files])


# %% 7. Pictures
def tile(x, columns, scale=1):
    """Return one picture (H, W, 3), uint8, of images x (B, C, S, S) in -1..1, enlarged by scale."""
    grid = utils.make_grid(F.interpolate(x.cpu(), scale_factor=scale), columns, pad_value=-1)
    return ((grid.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()


def sample(net, args, out):
    """Draw images of the labels in turn. Save them, and a GIF: x_t on the left, x_0_hat right."""
    torch.manual_seed(args.seed)  # so that a checkpoint gives the same samples again
    noise = torch.randn(args.num_samples, args.channels, args.image_size, args.image_size)
    all_labels = torch.tensor(args.label).repeat(len(noise))[: len(noise)]  # in turn
    alpha_bars = make_schedule(args.num_timesteps)
    num_steps = min(args.sampling_steps, args.num_timesteps)
    frames, images = [], []
    for x, labels in zip(noise.split(100), all_labels.split(100)):  # 100 at a time: less memory
        chain = p_sample_loop(net, alpha_bars, num_steps, x, labels, args.guidance, args.sampler)
        for steps_left, x_t, x_0_hat in tqdm(chain, "sampling", num_steps + 1):
            if len(images) == 0 and steps_left % max(1, num_steps // 50) == 0:  # of the first 100
                frames.append(np.hstack((tile(x_t[:25], 5), tile(x_0_hat[:25], 5))))
        images.append(x_t)  # the last x_t is finished
    images = torch.cat(images)
    imageio.mimsave(out / "process.gif", frames + 30 * frames[-1:], duration=100, loop=0)
    imageio.imwrite(out / "samples.png", tile(images[:100], 10, scale=2))
    pixels = ((images + 1) * 127.5).round().byte().cpu()  # finished images are within -1..1
    np.save(out / "samples.npy", pixels.permute(0, 2, 3, 1).squeeze(3))


# %% 8. Command line, and main, which puts everything together
MODEL = ["channels", "num_classes", "num_timesteps", "base_channels", "channel_mults"]
TRAINING = ["dataset", "image_size", "train_batch_size", "num_epochs", "learning_rate", "seed"]


def parse_options(argv):
    """Return the parsed options and the content of the checkpoint, {} if there is none."""
    device = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    parser = ArgumentParser(usage="ddpm_unet.py [options]", description=__doc__.splitlines()[0])
    flag = parser.add_argument

    def option(names, default, help):
        flag(*names.split(), type=type(default), default=default, help=help)

    option("--dataset", "mnist", "mnist, or a folder of images; its folders are classes")
    option("--image_size", 28, "pixels on each side")
    option("--num_timesteps", 1000, "number of diffusion steps T")
    flag("--base_channels", type=int, default=24, choices=[16, 24, 32, 64, 128], help="width")
    flag("--channel_mults", type=int, nargs="+", default=[1, 2, 4], help="width at each size")
    option("--train_batch_size -b", 32, "images in a training step")
    option("--num_epochs -e", 5, "passes over the data, on average")
    option("--learning_rate -l", 1e-3, "of Adam")
    option("--num_samples --eval_batch_size", 100, "images to draw")
    flag("--label", type=int, nargs="+", help="the classes to draw in turn [all]")
    option("--guidance", 0.5, "above 0: clearer classes, less variety")
    flag("--sampler", choices=["ddim", "ddpm"], default="ddim", help="ddpm adds fresh noise")
    option("--sampling_steps", 50, "fewer are quicker, T at most")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--checkpoint", "--eval_path", help="model.pt to draw samples from")
    source.add_argument("--resume", help="model.pt whose training goes on")
    flag("--output_dir", help="for all files [that of --resume, or outputs/ddpm_unet_NAME]")
    option("--data_dir", "data", "holds the 4 files of MNIST in MNIST/raw, or will")
    option("--seed", 0, "the same seed and number of threads: same samples")
    flag("--device", choices={device, "cpu"}, default=device, help="where to compute")
    args = parser.parse_args(argv)  # first, only to find the checkpoint
    path = args.resume if args.checkpoint is None else args.checkpoint
    state = {}
    if path is not None:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            state = {name: state[name] for name in ("options", "step", "net", "ema", "optimizer")}
            parser.set_defaults(**state["options"])  # and channels and num_classes
        except Exception as error:
            raise SystemExit(f"ddpm_unet.py: error: no U-Net in {path}: {error!r:.200}") from error
    args = parser.parse_args(argv)  # again: what you do not give comes from the checkpoint
    for name, value in vars(args).items():
        if name not in ("seed", "guidance") and isinstance(value, (int, float)) and not value > 0:
            parser.error(f"--{name} {value}: must be positive")
    return args, state


def main(argv=None):
    """Train a model or load one, draw samples, and write everything to --output_dir."""
    args, state = parse_options(argv)
    torch.set_default_device(args.device)  # of new tensors, but not of those from numpy
    if WORLD_SIZE > 1:
        if args.device != "cpu":
            torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
        distributed.init_process_group("gloo" if args.device == "cpu" else None)  # None: of the GPU
    torch.manual_seed(args.seed)
    name = Path(args.dataset).name + ("" if args.checkpoint is None else "_samples")
    folder = f"outputs/ddpm_unet_{name}" if args.resume is None else Path(args.resume).parent
    out = Path(args.output_dir or folder)
    if (out / "model.pt").exists() and out / "model.pt" != Path(args.resume or ""):
        sys.exit(f"ddpm_unet.py: error: {out} holds a model: --resume it, or change --output_dir")
    print(f"device: {args.device}, {torch.get_num_threads()} CPU threads, files in {out}")
    if args.checkpoint is None:
        images, labels = load_images(args.dataset, args.data_dir, args.image_size)
        images, labels = images.to(args.device), labels.to(args.device)
        args.channels, args.num_classes = images.shape[1], labels.max().item() + 1
    args.label = args.label or [*range(args.num_classes)]
    if min(args.label) < 0 or max(args.label) >= args.num_classes:
        sys.exit(f"ddpm_unet.py: error: --label: choose from 0 to {args.num_classes - 1}")
    options = {name: getattr(args, name) for name in MODEL + TRAINING}
    if state and any(options[name] != state["options"][name] for name in MODEL):
        sys.exit(f"ddpm_unet.py: error: the checkpoint does not fit {', '.join(MODEL)}")
    net = UNet(**{name: options[name] for name in MODEL})
    ema = deepcopy(net).requires_grad_(False)  # an average of the weights, which draws better
    if state:
        try:
            net.load_state_dict(state["net"])
            ema.load_state_dict(state["ema"])
        except RuntimeError as error:
            sys.exit(f"ddpm_unet.py: error: the checkpoint does not fit: {error!r:.200}")
    out.mkdir(parents=True, exist_ok=True)
    if args.checkpoint is None:
        signals = train(net, ema, images, labels, options, out / "model.pt", state)
        if WORLD_SIZE > 1:
            distributed.destroy_process_group()  # else its threads can crash a process that ends
        if RANK > 0 or signal.SIGTERM in signals:  # Ctrl-C goes on to sample
            sys.exit()
        some = images[:: 1 + len(images) // 100]  # up to a hundred, evenly spread
        imageio.imwrite(out / "data.png", tile(some / 127.5 - 1, 10, scale=2))
    sample(ema, args, out)
    facts = {"options": vars(args), "threads": torch.get_num_threads(), "torch": torch.__version__}
    (out / "run.json").write_text(json.dumps(facts, indent=2))


if __name__ == "__main__":
    try:
        main([] if "kernel_launcher" in sys.argv[0] else None)  # a notebook has no options
    except KeyboardInterrupt:
        sys.exit(130)
    except (OSError, MemoryError, torch.OutOfMemoryError) as error:
        sys.exit(f"ddpm_unet.py: error: {error}")
