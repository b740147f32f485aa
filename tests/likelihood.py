"""Bound what MNIST test digits cost as a code, in bits per dimension, with a trained ddpm_unet.py.

    python tests/likelihood.py outputs/ddpm_unet_mnist/model.pt          a minute on two CPU cores

The bound is the paper's eq. 5, with the variances beta_tilde of eq. 7:

    -log2 p(x_0 | label) <= L_T + (L_1 + ... + L_{T-1}) + L_0

The network knows each digit's true label, which would cost 0.004 bits per dimension more.
Images are (B, 1, H, W), in -1..1.
"""

import gzip
import math
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

import torch
from torch.special import log_ndtr
from torchvision.datasets import MNIST
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ddpm_unet


def predict(net, alpha_bars, x_0, labels, t):
    """Draw x_t (eq. 4) for labels and t (B,). Return x_0_hat (eq. 15), clipped as in sampling."""
    alpha_bar = alpha_bars[t].view(-1, 1, 1, 1)
    x_t = ddpm_unet.q_sample(x_0, alpha_bar, torch.randn_like(x_0))
    eps_hat = net(x_t.float(), t, labels)
    x_0_hat = (x_t - (1 - alpha_bar) ** 0.5 * eps_hat) / alpha_bar**0.5
    return x_0_hat.clamp(-1, 1)


def step_nats(net, alpha_bars, x_0, labels, t):
    """Return KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), (B, 1, H, W), for t (B,) in 2..T.

    Both are normal, of variance v = beta_tilde: (difference of means)^2 / 2v is left.
    """
    error = x_0 - predict(net, alpha_bars, x_0, labels, t)
    alpha_bar = alpha_bars[t].view(-1, 1, 1, 1)
    alpha_bar_prev = alpha_bars[t - 1].view(-1, 1, 1, 1)
    # Both means are eq. 7 with the same x_t, which cancels. Their difference is eq. 7 of the error.
    difference, variance = ddpm_unet.q_posterior(error, 0.0, alpha_bar, alpha_bar_prev)
    return difference**2 / (2 * variance)


def decoder_std(alpha_bars):
    """Return the standard deviation of p(x_0 | x_1): that of t = 2, as beta_tilde at t = 1 is 0."""
    _, variance = ddpm_unet.q_posterior(0.0, 0.0, alpha_bars[2].item(), alpha_bars[1].item())
    return variance**0.5


def decoder_nats(x_0, mean, std):
    """Return -log p(x_0 | x_1), eq. 13, as x_0 and mean (B, 1, H, W). x_0 is one of 256 levels.

    A level gets what N(mean, std^2) has within half a level of it; levels 0 and 255 have no end.
    """
    lower = ((x_0 - 1 / 255 - mean) / std).masked_fill(x_0 < -0.999, -math.inf)
    upper = ((x_0 + 1 / 255 - mean) / std).masked_fill(x_0 > 0.999, math.inf)
    mirror = lower + upper > 0  # a cdf near 0 is accurate, and one near 1 is not
    lower, upper = lower.where(~mirror, -upper), upper.where(~mirror, -lower)
    log_ratio = log_ndtr(lower) - log_ndtr(upper)  # ndtr is the cdf of N(0, 1)
    return -log_ndtr(upper) - (-log_ratio.exp()).log1p()


def decoder_floor(x_0, std):
    """Return the bits per dimension that the decoder costs even if its mean is x_0."""
    within = math.erf(0.5 / (2**0.5 * 127.5 * std))  # N(0, std^2), within half a level of 0
    share = (x_0.abs() > 0.999).double().mean().item()  # of the pixels 0 and 255, open to a side
    return -share * math.log2((1 + within) / 2) - (1 - share) * math.log2(within)


@torch.no_grad()
def bound(net, alpha_bars, x_0, labels, terms):
    """Return bits per dimension (B, 3) of x_0 (B, 1, H, W): L_T, L_1 + ... + L_{T-1}, and L_0."""
    last = alpha_bars[-1].item()
    L_T = (last * (x_0**2 - 1) - math.log(1 - last)) / 2  # KL(q(x_T | x_0) || N(0, I))
    count = len(alpha_bars) - 2  # t = 2..T
    first = torch.randint(count, (len(x_0),))
    steps = torch.zeros_like(x_0)
    for k in range(terms):  # some terms of the sum, evenly spread from a random t on
        t = 2 + (first + k * count // terms) % count
        steps += step_nats(net, alpha_bars, x_0, labels, t) * count / terms
    mean = predict(net, alpha_bars, x_0, labels, torch.ones_like(labels))  # by eq. 7, at t = 1
    L_0 = decoder_nats(x_0, mean, decoder_std(alpha_bars))
    nats = torch.stack((L_T, steps, L_0), dim=1)  # (B, 3, 1, H, W)
    return nats.flatten(2).mean(dim=2) / math.log(2)


def load_net(path):
    """Return the averaged network of a checkpoint, in float32, and its alpha_bars (T + 1,)."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    net = ddpm_unet.UNet(**{name: state["options"][name] for name in ddpm_unet.MODEL})
    net.load_state_dict(state["ema"])
    return net, ddpm_unet.make_schedule(state["options"]["num_timesteps"])


def main(argv=None):
    """Bound the cost of test digits, and print it as a Markdown table beside the cost by gzip."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="model.pt of ddpm_unet.py")
    parser.add_argument("--data_dir", default="data", help="holds MNIST/raw, or will")
    parser.add_argument("--num_images", type=int, default=500, help="test digits, at random")
    args = parser.parse_args(argv)
    net, alpha_bars = load_net(args.checkpoint)
    mnist = MNIST(args.data_dir, train=False, download=True)
    torch.manual_seed(0)
    chosen = torch.randperm(len(mnist))[: args.num_images]
    images, labels = mnist.data[chosen, None], mnist.targets[chosen]
    x_0 = images.double() / 127.5 - 1
    batches = tqdm(list(zip(x_0.split(10), labels.split(10))), "10 digits each")
    bits = torch.cat([bound(net, alpha_bars, *batch, 20) for batch in batches])  # (N, 3)
    L_T, steps, L_0 = bits.mean(dim=0).tolist()
    total = bits.sum(dim=1)
    error = total.std().item() / len(total) ** 0.5
    zipped = gzip.compress(images.numpy().tobytes(), compresslevel=9)
    print(f"| {len(images)} digits | bits per dimension |\n| --- | --- |")
    print(f"| L_T | {L_T:.5f} |\n| L_1 + ... + L_{{T-1}} | {steps:.3f} |\n| L_0 | {L_0:.3f} |")
    print(f"| total, ± standard error | {total.mean().item():.3f} ± {error:.3f} |")
    print(f"| floor of L_0 | {decoder_floor(x_0, decoder_std(alpha_bars)):.3f} |")
    print(f"| gzip -9 | {8 * len(zipped) / images.numel():.3f} |")


if __name__ == "__main__":
    main()
