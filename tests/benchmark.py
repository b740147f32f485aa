"""Measures, on the machine at hand, what the README claims, and prints it as a Markdown table.

    python tests/benchmark.py                 12 minutes on 2 CPU cores, with nothing else running
    python tests/benchmark.py FOLDER DATA     Parzen window of FOLDER/samples.npy; DATA/MNIST/raw

A time is that of a whole process, from the start of Python to the last file, or a median.
"""

import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from figures import exact_eps

import ddpm_unet
import dpm_2015
import main


def median_seconds(work, repetitions=5):
    """Median time of work(), after one call that does not count."""
    work()
    seconds = []
    for _ in range(repetitions):
        start = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def whole_runs(script, runs, *options):
    """Seconds, run.json and samples of whole processes of a script, with seeds 0 to runs - 1."""
    found = []
    for seed in range(runs):
        with tempfile.TemporaryDirectory() as out:
            command = [sys.executable, ROOT / script, "--seed", str(seed), "--output_dir", out]
            start = time.perf_counter()
            subprocess.run([*command, *options], check=True, capture_output=True, cwd=out)
            seconds = time.perf_counter() - start
            facts = json.loads(Path(out, "run.json").read_text())
            found.append((seconds, facts, np.load(Path(out, "samples.npy"))))
    return zip(*found)


def spread(values, digits):
    """Mean and range, as text."""
    mean, low, high = statistics.mean(values), min(values), max(values)
    return f"{mean:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def sliced_w2(a, b):
    """Sliced Wasserstein-2 distance of points (N, 2), (M, 2): rms over directions and quantiles."""
    angles, levels = torch.arange(128) * math.pi / 128, (torch.arange(1000) + 0.5) / 1000
    directions = torch.stack((angles.cos(), angles.sin()))  # (2, 128)
    # two tensors (1000, 128): the quantiles along each direction
    a, b = ((x @ directions).sort(dim=0)[0][(levels * len(x)).long()] for x in (a, b))
    return (a - b).square().mean().sqrt().item()


def heart():
    """The default run of main.py; what its sampler does with the exact eps of the curve."""
    seconds, _, _ = whole_runs("main.py", 3)
    yield "`python main.py`, whole process", f"{spread(seconds, 1)} s"
    N = 10_000
    curve = main.heart()
    x_0, _, scale = main.standardise(curve)
    _, _, samples = whole_runs("main.py", 5, "--num_samples", str(N))
    distances = [sliced_w2(torch.from_numpy(x) / scale, curve / scale) for x in samples]
    yield "its samples, sliced W2 to the heart", spread(distances, 4)
    torch.manual_seed(0)
    real = [sliced_w2(x_0[torch.randint(len(x_0), (N,))], x_0) for _ in range(5)]
    yield "as many random points of the heart", spread(real, 4)
    args, _ = main.parse_options(["--device", "cpu"])
    schedule = main.make_schedule(args.num_timesteps)
    exact = exact_eps(schedule, x_0[::4])
    torch.manual_seed(0)
    *_, (_, x) = main.p_sample_loop(exact, schedule, (N, 2), "eps", x_0.abs().max().item())
    yield "samples of the exact network instead", f"{sliced_w2(x, x_0):.4f}"


def dpm():
    """The default run of dpm_2015.py."""
    seconds, facts, samples = whole_runs("dpm_2015.py", 3, "--num_samples", "10000")
    yield "`python dpm_2015.py`, 10,000 samples, whole process", f"{spread(seconds, 1)} s"
    yield "its K, bits", spread([run["figures"]["K"] for run in facts], 2)
    rows, test_rows, shift, scale = dpm_2015.load_data("swiss_roll", None)
    u = torch.linspace(1.5 * math.pi, 4.5 * math.pi, 8000)
    curve = (torch.stack((u * u.cos(), u * u.sin()), dim=1) - shift) / scale
    bits = parzen(curve, test_rows, 0.25 / scale)  # the data are this mixture of normal densities
    yield "exact log likelihood of the swiss roll, bits", f"{bits:.2f}"
    samples = [(torch.from_numpy(x) - shift) / scale for x in samples]
    yield (
        "its samples, sliced W2 to the swiss roll",
        spread([sliced_w2(x, rows) for x in samples], 4),
    )
    real = [sliced_w2(x, rows) for x in rows.split(10_000)[:8]]
    yield "as many random points of the swiss roll", spread(real, 4)
    distances = [torch.cdist(x, curve).min(dim=1)[0].mean().item() for x in (*samples, test_rows)]
    yield "its samples, mean distance from the curve", spread(distances[:-1], 3)
    yield "as many points of the swiss roll", f"{distances[-1]:.3f}"


def unet():
    """Speed of ddpm_unet.py with its default network, in training and in sampling."""
    args, _ = ddpm_unet.parse_options([])
    torch.set_default_device(args.device)
    torch.manual_seed(0)
    net = ddpm_unet.UNet(1, 10, args.num_timesteps, args.base_channels, args.channel_mults)
    optimizer = torch.optim.Adam(net.parameters())
    alpha_bars = ddpm_unet.make_schedule(args.num_timesteps)
    B = args.train_batch_size
    x_0 = torch.randn(B, 1, 28, 28)
    labels = torch.randint(10, (B,))

    def step():
        optimizer.zero_grad()
        ddpm_unet.loss_simple(net, alpha_bars.float().to(x_0.device), x_0, labels, 10).backward()
        optimizer.step()

    with FlopCounterMode(display=False) as counter:
        step()
    a = torch.randn(2048, 2048)
    peak = 2 * 2048**3 / median_seconds(lambda: a @ a, 10)
    seconds = median_seconds(step)
    share = counter.get_total_flops() / seconds / peak
    speed = f"{B / seconds:.0f} images/s"
    text = f"{speed}, {share:.0%} of the matrix products' {peak / 1e9:.0f} GFLOPS"
    yield f"U-Net, training, batches of {B}", text
    x_T = torch.randn(100, 1, 28, 28)
    labels = torch.arange(100) % 10
    for sampler in ("ddim", "ddpm"):  # the time goes with the number of steps
        chain = (net, alpha_bars, 50, x_T, labels, 0, sampler)  # guidance 0
        seconds = median_seconds(lambda chain=chain: list(ddpm_unet.p_sample_loop(*chain)), 3)
        yield f"U-Net, 100 digits in 50 steps ({sampler})", f"{seconds:.1f} s"
    torch.set_default_device("cpu")


def parzen(samples, digits, sigma):
    """Mean log2 likelihood of digits (M, D) in the mean of N(x, sigma^2 I) over samples x."""
    distances = torch.cat([torch.cdist(part, samples).square() for part in digits.split(500)])
    log_p = (-distances / (2 * sigma**2)).logsumexp(dim=1) - math.log(len(samples))
    return (
        log_p - digits.shape[1] / 2 * math.log(2 * math.pi * sigma**2)
    ).mean().item() / math.log(2)


def parzen_window(folder, data_dir):
    """As in the paper: pixels in 0..1, all test digits, sigma chosen on training digits."""
    from torchvision.datasets import MNIST

    samples = torch.from_numpy(np.load(Path(folder, "samples.npy"))).flatten(1)
    samples = samples.floor().clamp(0, 255) / 255
    digits = [MNIST(data_dir, train).data.flatten(1) / 255 for train in (True, False)]
    sigma = max(np.logspace(-1, 0, 10), key=lambda sigma: parzen(samples, digits[0][:1000], sigma))
    bits = parzen(samples, digits[1], sigma)
    print(f"Parzen window: {bits:.1f} bits, {len(samples)} samples, sigma {sigma:.3f}")


if __name__ == "__main__":
    if len(sys.argv) == 3:
        sys.exit(parzen_window(*sys.argv[1:]))
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", info.read_text()) if info.exists() else []
    cpu = names[0] if names else platform.processor()
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    print(f"{cpu}, {os.cpu_count()} cores, {gpu}, {versions}\n")
    print("| what | mean and range, or median |\n| --- | --- |", flush=True)
    for part in (unet, heart, dpm):
        for what, figure in part():
            print(f"| {what} | {figure} |", flush=True)
