"""Measures, on the machine at hand, what the README claims, and prints it as a Markdown table.

    python tests/benchmark.py                 10 minutes on 2 CPU cores; nothing else should run beside it
    python tests/benchmark.py FOLDER DATA     Parzen window of FOLDER/samples.npy; DATA has MNIST/raw in it

A time is that of a whole process, from the start of Python to the last file, or a median of repetitions.
"""

import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
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


def whole_runs(script, runs):
    """Seconds, metrics and samples of whole processes of a script, with seeds 0 to runs - 1."""
    found = []
    for seed in range(runs):
        with tempfile.TemporaryDirectory() as out:
            command = [sys.executable, ROOT / script, "--seed", str(seed), "--output_dir", out]
            start = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True, cwd=out)
            seconds = time.perf_counter() - start
            metrics = json.loads(Path(out, "run.json").read_text())["metrics"]
            found.append((seconds, metrics, np.load(Path(out, "samples.npy"))))
    return zip(*found)


def spread(values, digits):
    return f"{statistics.mean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def heart():
    """The default run of main.py, and what its sampler does with the exact eps of the training data."""
    seconds, metrics, _ = whole_runs("main.py", 5)
    yield "`python main.py`, whole process", f"{spread(seconds, 1)} s"
    yield "its samples, sliced W2 to the heart", spread([m["sliced W2"] for m in metrics], 4)
    yield "as many random points of the heart", spread([m["of real points"] for m in metrics], 4)
    args, _ = main.parse_options(["--eval_batch_size", "2000", "--device", "cpu"])
    x_0, _, stats = main.load_data(args)
    schedule = main.make_schedule(args.num_timesteps)
    exact = exact_eps(schedule, x_0[::4])
    *_, (_, x) = main.p_sample_loop(exact, schedule, (2000, 2), seed=0, bounds=stats["bounds"])
    yield "samples of the exact network instead, 2,000", f"{main.sliced_w2(x, x_0):.4f}"


def dpm():
    """The default run of dpm_2015.py."""
    seconds, metrics, samples = whole_runs("dpm_2015.py", 3)
    yield "`python dpm_2015.py`, whole process", f"{spread(seconds, 1)} s"
    yield "its K, bits", spread([m["K"] for m in metrics], 2)
    yield "exact log likelihood, bits", spread([m["exact log likelihood"] for m in metrics], 2)
    args, (shift, scale) = dpm_2015.parse_options(["--device", "cpu"])[0], dpm_2015.SCALING["swiss_roll"]
    torch.manual_seed(0)
    data = [dpm_2015.draw_data(args, n, dpm_2015.CURVE["swiss_roll"]) for n in (10**6, *[10_000] * 8)]
    distances = [main.sliced_w2((torch.from_numpy(x) - shift) / scale, data[0]) for x in samples]
    yield "its samples, sliced W2 to the swiss roll", spread(distances, 4)
    real = [main.sliced_w2(x, data[0]) for x in data[1:]]
    yield "as many random points of the swiss roll", spread(real, 4)


def unet():
    """Speed of ddpm_unet.py with its default network, and share of the machine's matrix product."""
    device = ddpm_unet.parse_options([])[0].device
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        args, _ = ddpm_unet.parse_options(["--precision", precision])
        torch.manual_seed(0)
        net, B = ddpm_unet.UNet(args, 1).to(device), args.train_batch_size
        optimizer = torch.optim.Adam(net.parameters(), fused=True)
        x, t = torch.randn(B, 784, device=device), torch.randint(1000, (B,), device=device)

        def step(net=net, x=x, t=t, optimizer=optimizer):
            optimizer.zero_grad()
            F.mse_loss(net(x, t), x).backward()
            optimizer.step()

        with FlopCounterMode(display=False) as counter:
            step()
        a = torch.randn(2048, 2048, device=device).to(dtype)
        peak = 2 * 2048**3 / median_seconds(lambda a=a: a @ a, 10)
        seconds = median_seconds(step)
        share = counter.get_total_flops() / seconds / peak
        text = f"{B / seconds:.0f} images/s, {share:.0%} of the matrix products' {peak / 1e9:.0f} GFLOPS"
        yield f"U-Net, training in {precision}, batches of {B}", text
    args, _ = ddpm_unet.parse_options([])
    net = ddpm_unet.UNet(args, 1).to(device).eval().requires_grad_(False)
    schedule = ddpm_unet.make_schedule(1000, device, 50)
    for sampler in ("ddim", "beta_tilde"):  # the time goes with the steps
        loop = lambda: list(ddpm_unet.p_sample_loop(net, schedule, (100, 784), 0, sampler))  # noqa: B023
        seconds = median_seconds(loop, 3)
        yield f"U-Net, 100 digits in 50 steps ({sampler}), {args.precision}", f"{seconds:.1f} s"


def parzen(samples, digits, sigma):
    """Mean log likelihood in bits of digits (M, D) in the mean of N(x, sigma^2 I) over samples x (N, D)."""
    distances = torch.cat([torch.cdist(part, samples).square() for part in digits.split(500)])
    log_p = (-distances / (2 * sigma**2)).logsumexp(dim=1) - math.log(len(samples))
    return (log_p - digits.shape[1] / 2 * math.log(2 * math.pi * sigma**2)).mean().item() / math.log(2)


def parzen_window(folder, data_dir):
    """As in the paper: pixels in 0..1, all test digits, sigma of ten values chosen on training digits."""
    samples = torch.from_numpy(np.load(Path(folder, "samples.npy"))).flatten(1) / 255
    train, test = (digits / 255 for digits in dpm_2015.load_mnist(data_dir))
    sigma = max(np.logspace(-1, 0, 10), key=lambda sigma: parzen(samples, train[:1000], sigma))
    bits = parzen(samples, test, sigma)
    print(f"Parzen window: {bits:.1f} bits, {len(samples)} samples, sigma {sigma:.3f}")


if __name__ == "__main__":
    if len(sys.argv) == 3:
        sys.exit(parzen_window(*sys.argv[1:]))
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.processor())
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    print(f"{cpu}, {os.cpu_count()} cores, {gpu}, {versions}\n")
    print("| what | mean and range, or median |\n| --- | --- |", flush=True)
    for part in (unet, heart, dpm):
        for what, figure in part():
            print(f"| {what} | {figure} |", flush=True)
