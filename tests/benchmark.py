"""Measure what the README claims, on the machine at hand, and print it as a Markdown table.

python tests/benchmark.py                 10 minutes on 2 CPU cores, with nothing else running
python tests/benchmark.py FOLDER DATA     Parzen window of FOLDER/samples.npy; DATA/MNIST/raw
"""

import json
import math
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torchvision.datasets import MNIST

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import dpm_2015
import main


def whole_runs(script, runs, *options):
    """Return seconds, run.json and samples of whole runs of a script, with seeds 0 to runs - 1."""
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
    """Return mean and range as text."""
    mean, low, high = statistics.mean(values), min(values), max(values)
    return f"{mean:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def sliced_w2(a, b):
    """Return the sliced Wasserstein-2 distance of points (N, 2) and (M, 2), in 128 directions."""
    angles = torch.arange(128) * math.pi / 128
    directions = torch.stack((angles.cos(), angles.sin()))  # (2, 128)
    levels = (torch.arange(1000) + 0.5) / 1000  # of the quantiles to compare
    quantiles_a = (a @ directions).sort(dim=0)[0][(levels * len(a)).long()]  # (1000, 128)
    quantiles_b = (b @ directions).sort(dim=0)[0][(levels * len(b)).long()]
    return (quantiles_a - quantiles_b).square().mean().sqrt().item()


def heart():
    """Yield rows about the default run of main.py."""
    seconds, _, _ = whole_runs("main.py", 3)
    yield "`python main.py`, whole process", f"{spread(seconds, 1)} s"
    curve = main.heart()
    x_0, _, scale = main.standardise(curve)
    _, _, samples = whole_runs("main.py", 5, "--num_samples", "10000")
    distances = [sliced_w2(torch.from_numpy(x) / scale, curve / scale) for x in samples]
    yield "its samples, sliced W2 to the heart", spread(distances, 4)
    torch.manual_seed(0)
    real = [sliced_w2(x_0[torch.randint(len(x_0), (10_000,))], x_0) for _ in range(5)]
    yield "as many random points of the heart", spread(real, 4)


def dpm():
    """Yield rows about the default run of dpm_2015.py."""
    seconds, facts, samples = whole_runs("dpm_2015.py", 3, "--num_samples", "10000")
    yield "`python dpm_2015.py`, 10,000 samples, whole process", f"{spread(seconds, 1)} s"
    yield "its K, bits", spread([run["figures"]["K"] for run in facts], 2)
    rows, test_rows, shift, scale = dpm_2015.load_data("swiss_roll", None)
    u = torch.linspace(1.5 * math.pi, 4.5 * math.pi, 8000)
    curve = (torch.stack((u * u.cos(), u * u.sin()), dim=1) - shift) / scale
    bits = parzen(curve, test_rows, 0.25 / scale)  # the data are this mixture of normal densities
    yield "exact log likelihood of the swiss roll, bits", f"{bits:.2f}"
    samples = [(torch.from_numpy(x) - shift) / scale for x in samples]
    found = [sliced_w2(x, rows) for x in samples]
    yield "its samples, sliced W2 to the swiss roll", spread(found, 4)
    real = [sliced_w2(x, rows) for x in rows.split(10_000)[:8]]
    yield "as many random points of the swiss roll", spread(real, 4)


def parzen(samples, digits, sigma):
    """Return the mean log2 likelihood of digits (M, D) in the mean of N(x, sigma^2 I) over x."""
    distances = torch.cat([torch.cdist(part, samples).square() for part in digits.split(500)])
    log_p = (-distances / (2 * sigma**2)).logsumexp(dim=1) - math.log(len(samples))
    log_p -= digits.shape[1] / 2 * math.log(2 * math.pi * sigma**2)
    return log_p.mean().item() / math.log(2)


def parzen_window(folder, data_dir):
    """As in the paper: pixels in 0..1, all test digits, sigma chosen on training digits."""
    samples = torch.from_numpy(np.load(Path(folder, "samples.npy"))).flatten(1)
    samples = samples.floor().clamp(0, 255) / 255
    digits = [MNIST(data_dir, train).data.flatten(1) / 255 for train in (True, False)]
    sigma = max(np.logspace(-1, 0, 10), key=lambda sigma: parzen(samples, digits[0][:1000], sigma))
    bits = parzen(samples, digits[1], sigma)
    print(f"Parzen window: {bits:.1f} bits, {len(samples)} samples, sigma {sigma:.3f}")


if __name__ == "__main__":
    if len(sys.argv) == 3:
        sys.exit(parzen_window(*sys.argv[1:]))
    print(f"{platform.platform()}, Python {platform.python_version()}, torch {torch.__version__}\n")
    print("| what | mean and range |\n| --- | --- |", flush=True)
    for part in (heart, dpm):
        for what, figure in part():
            print(f"| {what} | {figure} |", flush=True)
