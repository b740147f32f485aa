"""Tests of ddpm_unet.py.

The mathematics is compared with the papers' formulas in float64, with Bayes' rule, and with the
exact best network, which is known where the data are a few images or a normal distribution.
Training and pictures are watched while they run. The script itself runs as a user runs it, tiny,
on good and on bad input: mostly inside this process, to save the seconds that torch needs to start.
"""

import gzip
import json
import os
import runpy
import signal
import subprocess
import sys
from contextlib import nullcontext
from copy import deepcopy
from itertools import count, pairwise
from math import sqrt
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch import nn
from torchvision.datasets import MNIST

import ddpm_unet as ddpm

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parent.parent
TINY = "--num_timesteps 20 --base_channels 8 --channel_mults 1 2 --num_epochs 1"
TINY = f"{TINY} --num_samples 12 --sampling_steps 4 --device cpu".split()
SAMPLES = {"process.gif", "run.json", "samples.npy", "samples.png"}
SAMPLERS = pytest.mark.parametrize("sampler", ["ddim", "ddpm"])


@pytest.fixture(autouse=True)
def signals(monkeypatch):
    """Give each test the usual reaction to signals back, and no network."""
    monkeypatch.setattr(ddpm, "SIGNALS", [])
    monkeypatch.setattr(MNIST, "mirrors", ["http://127.0.0.1:9/"])
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


# %% Schedule and forward process
def closed_form(T):
    """Return the betas and alpha_bars in float64; for T = 1000 they are the paper's."""
    betas = np.minimum(np.linspace(1e-4, 0.02, T) * 1000 / T, 0.999)
    return betas, np.cumprod(1 - betas)


@pytest.mark.parametrize("T", [1, 2, 8, 20, 50, 200, 1000, 4000])
def test_schedule_and_q_sample(T):
    alpha_bars, (betas, exact) = ddpm.make_schedule(T), closed_form(T)
    np.testing.assert_allclose(alpha_bars, exact, rtol=1e-9)
    assert (alpha_bars > 0).all() and (T < 20 or alpha_bars[-1] < 1e-4)  # x_T is noise
    mean, variance = 1.0, 0.0
    for t, beta in enumerate(betas):  # eq. 2, one step at a time: mean and variance, from x_0 = 1
        mean, variance = sqrt(1 - beta) * mean, (1 - beta) * variance + beta
        assert ddpm.q_sample(1.0, alpha_bars[t], 0.0).item() == pytest.approx(mean)
        assert ddpm.q_sample(0.0, alpha_bars[t], 1.0).item() ** 2 == pytest.approx(variance)


@pytest.mark.parametrize("jump", [1, 2, 7, 30])
@pytest.mark.parametrize("t", [30, 31, 60, 99])
def test_q_posterior_is_bayes_rule(t, jump):
    """It is the product of q(x_s | x_0) and q(x_t | x_s), for s = t - jump: also a Gaussian."""
    alpha_bars, x_0, x_t = closed_form(100)[1], torch.tensor([0.7, -0.2]), torch.tensor([-0.4, 2.0])
    earlier, alpha = alpha_bars[t - jump], alpha_bars[t] / alpha_bars[t - jump]
    precision = 1 / (1 - earlier) + alpha / (1 - alpha)
    weighted = sqrt(earlier) * x_0 / (1 - earlier) + sqrt(alpha) * x_t / (1 - alpha)
    mean, variance = ddpm.q_posterior(x_0, x_t, alpha_bars[t], earlier)
    torch.testing.assert_close(mean, weighted / precision)
    assert variance == pytest.approx(1 / precision)


# %% Loss
def best_network(data, T, factor=1.0):
    """Return the exact best network for data (N, C, H, W), each as likely and without labels."""
    alpha_bars = torch.tensor(closed_form(T)[1]).float()

    def net(x_t, t, labels):
        alpha_bar = alpha_bars[t].view(-1, 1, 1, 1)
        distances = (x_t[:, None] - alpha_bar.sqrt()[:, None] * data).square().sum((2, 3, 4))
        weights = (-distances / (2 * (1 - alpha_bar[:, 0, 0]))).softmax(dim=1)
        x_0_hat = torch.einsum("bn,nchw->bchw", weights, data)
        return factor * (x_t - alpha_bar.sqrt() * x_0_hat) / (1 - alpha_bar).sqrt()

    net.no_label = 10
    return net


POINTS = torch.tensor([[-0.9, -0.5, 0.1, 0.8], [0.9, 0.3, -0.6, -1.0]]).view(2, 1, 2, 2)


def test_loss_by_hand():
    """The noise follows from what the network gets, and with it all that Algorithm 1 asks for."""
    n, T, seen = 20_000, 10, []
    model = lambda *inputs: seen.extend(inputs) or 0.3 * inputs[0]
    torch.manual_seed(0)
    x_0, given = torch.rand(n, 1, 1, 2, dtype=torch.float64), torch.arange(n) % 7
    loss = ddpm.loss_simple(model, ddpm.make_schedule(T), x_0, given, 7)
    x_t, t, labels = seen
    alpha_bar = torch.tensor(closed_form(T)[1])[t].view(-1, 1, 1, 1)
    eps = (x_t - alpha_bar.sqrt() * x_0) / (1 - alpha_bar).sqrt()
    assert loss.item() == pytest.approx((0.3 * x_t - eps).square().mean().item())
    assert abs(eps.mean()) < 0.03 and abs(eps.std() - 1) < 0.03
    assert abs((eps[..., 0] * eps[..., 1]).mean()) < 0.03  # another noise for each pixel
    counts, dropped = t.bincount(minlength=T), labels == 7
    assert len(counts) == T and ((counts - n / T) ** 2 / (n / T)).sum() < 30  # chi-square
    assert abs(dropped.double().mean() - 0.1) < 0.01 and (labels == given)[~dropped].all()


def test_the_best_network_has_the_least_loss():
    def loss(data, factor):
        torch.manual_seed(0)
        net, x_0 = best_network(data, 50, factor), data.repeat(1000, 1, 1, 1)
        return ddpm.loss_simple(net, ddpm.make_schedule(50).float(), x_0, torch.zeros(len(x_0)), 0)

    assert 0 < loss(POINTS, 1) < min(loss(POINTS, factor) for factor in (-1, 0, 0.9, 1.1))
    assert loss(POINTS[:1], 1) < 1e-6  # there is nothing to guess


# %% Sampling
@SAMPLERS
@pytest.mark.parametrize("guidance", [0.0, 1.5])
@pytest.mark.parametrize("num_steps", [1, 2, 7, 50])
def test_p_sample_loop(monkeypatch, sampler, guidance, num_steps):
    monkeypatch.setattr(torch, "randn_like", lambda x: torch.full_like(x, 0.7))
    calls, labels, x = [], torch.tensor([3, 0]), torch.randn(2, 1, 4, 4)

    def net(x_t, t, labels):
        calls.append((x_t, t.tolist(), labels.tolist()))
        return 0.5 * x_t + 0.1 * labels.view(-1, 1, 1, 1)

    net.no_label, options = 10, (num_steps, x, labels, guidance, sampler)
    chain = [*ddpm.p_sample_loop(net, ddpm.make_schedule(50), *options)]
    assert [k for k, _, _ in chain] == [*range(num_steps, -1, -1)] and chain[0][1] is x
    visited = np.linspace(49, 0, num_steps).round().astype(int)[::-1]
    alpha_bars = [1.0, *closed_form(50)[1][visited]]
    for (k, x_t, x_0_hat), (_, x_earlier, _) in pairwise(chain):
        for wanted in [[3, 0], [10, 10]][: 1 + (guidance > 0)]:  # labels, then none
            seen, *others = calls.pop(0)
            assert torch.equal(seen, x_t) and others == [2 * [visited[k - 1]], wanted]
        a, b, shift = alpha_bars[k], alpha_bars[k - 1], labels.view(2, 1, 1, 1) - 10
        eps = 0.5 * x_t + 0.1 * (10 + (1 + guidance) * shift)
        expected = (x_t - sqrt(1 - a) * eps) / sqrt(a)  # eq. 15
        assert k < num_steps or (expected.abs() > 1).any()
        torch.testing.assert_close(x_0_hat, expected.clamp(-1, 1))
        eps = (x_t - sqrt(a) * x_0_hat) / sqrt(1 - a)
        expected = sqrt(b) * x_0_hat + sqrt(1 - b) * eps  # arXiv 2010.02502, eq. 12, sigma = 0
        if sampler == "ddpm":  # Algorithm 2, line 4; sigma^2 is beta_tilde, 0 in the last step
            sigma = sqrt((1 - b) / (1 - a) * (1 - a / b))
            expected = (x_t - (1 - a / b) / sqrt(1 - a) * eps) / sqrt(a / b) + sigma * 0.7
        torch.testing.assert_close(x_earlier, expected, rtol=1e-4, atol=1e-5)
    assert chain[-1][1] is chain[-1][2] and not calls


@SAMPLERS
@pytest.mark.parametrize("num_steps", [10, 50, 200])
def test_samples_of_the_best_network_are_the_data(sampler, num_steps):
    torch.manual_seed(0)
    net, x, labels = best_network(POINTS, 200), torch.randn(450, 1, 2, 2), torch.zeros(450).long()
    schedule = ddpm.make_schedule(200)
    *_, (_, x, _) = ddpm.p_sample_loop(net, schedule, num_steps, x, labels, 0.0, sampler)
    distances, nearest = torch.cdist(x.flatten(1), POINTS.flatten(1)).min(dim=1)
    assert distances.max() < 0.01 and abs(nearest.sum() - 225) < 60


# %% Network
def small_unet(levels=2, channels=1, T=20):
    """Return a network for 3 classes, whose weights are all random, none zero."""
    torch.manual_seed(1)
    net = ddpm.UNet(channels, 3, T, 16, [1, 2, 4][:levels])
    for weight in net.parameters():
        nn.init.normal_(weight, std=0.2)
    return net


@pytest.mark.parametrize("size", [16, 28, 30, 32])
@pytest.mark.parametrize(("channels", "levels", "T"), [(1, 3, 1000), (3, 2, 20), (3, 1, 4000)])
def test_network(size, channels, levels, T):
    """Shapes; all inputs matter, time as if T were 1000; and every weight has a gradient."""
    net, x_t, seen = small_unet(levels, channels, T), torch.randn(2, channels, size, size), []
    t, labels = torch.tensor([3, 19]), torch.tensor([0, 3])  # 3 is no_label
    net.temb.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    found = net(x_t, t, labels)
    assert found.shape == x_t.shape and net.no_label == 3
    for inputs in ((x_t + 1, t, labels), (x_t, t - 1, labels), (x_t, t, labels.flip(0))):
        assert ((net(*inputs) - found).abs().amax(dim=(1, 2, 3)) > 1e-4).all()
    angles = np.outer(t * 1000 / T, 10_000 ** (-np.arange(32) / 31))  # as in the Transformer
    expected = np.concatenate((np.sin(angles), np.cos(angles)), axis=1)
    np.testing.assert_allclose(seen[0], expected, rtol=0, atol=1e-3)
    with torch.no_grad():  # many images go through the network a hundred at a time
        many = net(*(part.repeat_interleave(60, dim=0) for part in (x_t, t, labels)))
    torch.testing.assert_close(many[::60], found.detach(), rtol=1e-3, atol=1e-4)
    found.square().sum().backward()
    for name, weight in net.named_parameters():
        assert weight.grad.abs().sum() > 0, name
    assert (ddpm.ResBlock(8, 8, 8).conv_2[-1].weight == 0).all()  # training starts at the shortcut


@pytest.mark.parametrize("level", [0, 1])
def test_skip_connections(level):
    """Each block on the way up gets what its partner on the way down gave, and uses it."""
    net, seen, C = small_unet(levels=3), [], 16 * 2**level
    x, keep = (torch.randn(1, 1, 14, 14), torch.tensor([3]), torch.tensor([1])), torch.ones(3 * C)
    found, keep[2 * C :] = net(*x), 0
    net.downs[level].register_forward_hook(lambda module, _, output: seen.append(output))

    def without_skip(module, inputs):
        seen.append(inputs[0])
        return inputs[0] * keep.view(1, -1, 1, 1), inputs[1]

    net.ups[level].register_forward_pre_hook(without_skip)
    assert (net(*x) - found).abs().max() > 1e-3 and torch.equal(seen[1][:, 2 * C :], seen[0])


# %% Images
def squares(*colours):
    """Return an image of four squares, 16 x 16 pixels in all."""
    array = np.array(colours, np.uint8).reshape(2, 2, 3)
    return Image.fromarray(array.repeat(8, axis=0).repeat(8, axis=1))


COLOURS = (250, 10, 20), (30, 220, 40), (20, 60, 240), (90, 90, 0)
GREYS = (0, 0, 0), (80, 80, 80), (160, 160, 160), (255, 255, 255)
PALE = (255, 255, 255), *COLOURS[1:]  # the first square is transparent, and becomes white
PICTURE, GREY, CLEAR = (squares(*colours) for colours in (COLOURS, GREYS, COLOURS))
CLEAR.putalpha(squares((0, 0, 0), *3 * [(255, 255, 255)]).convert("L"))
PALETTE, GREY_16 = PICTURE.quantize(4), np.array(GREY.convert("L"), np.uint16) * 256 + 77
TURNED, UPRIGHT = PICTURE.transpose(Image.Transpose.ROTATE_90), Image.Exif()
UPRIGHT[0x0112] = 6  # turn it by 90 degrees clockwise to see it as it was
JPEG = {"quality": 95, "subsampling": 0}
FILES = [  # name, image, options of the format, the four colours to see
    ("grey.png", GREY.convert("L"), {}, GREYS),
    ("colour.png", PICTURE, {}, COLOURS),
    ("photo.JPG", PICTURE, JPEG, COLOURS),
    ("palette.png", PALETTE, {}, COLOURS),
    ("transparent_palette.png", PALETTE, {"transparency": PALETTE.getpixel((0, 0))}, PALE),
    ("transparent.png", CLEAR, {}, PALE),
    ("16_bit.png", Image.fromarray(GREY_16), {}, GREYS),
    ("ink.tif", PICTURE.convert("CMYK"), {}, COLOURS),
    ("turned.jpeg", TURNED, {**JPEG, "exif": UPRIGHT}, COLOURS),
    ("wide.bmp", ImageOps.pad(PICTURE, (80, 32), color="pink"), {}, COLOURS),
    ("größe 数.png", PICTURE, {}, COLOURS),
]


@pytest.mark.parametrize(("name", "image", "options", "colours"), FILES, ids=[f[0] for f in FILES])
def test_read_image(tmp_path, name, image, options, colours):
    image.save(tmp_path / name, **options)
    found = ddpm.read_image(str(tmp_path / name), 16)
    seen = found[:, 4::8, 4::8].permute(1, 2, 0).reshape(4, 3)
    np.testing.assert_allclose(seen, colours, rtol=0, atol=4)


def test_folders_of_images(tmp_path):
    """Subfolders are classes, in the order of their names; a flat folder is one class."""
    for name in ("b/x.png", "a/y.png", "a/deep/z.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        GREY.save(tmp_path / name)
    for folder, labels in ((tmp_path, [0, 0, 1]), (tmp_path / "b", [0])):
        images, found = ddpm.load_images(str(folder), "", 8)
        assert images.shape == (len(labels), 1, 8, 8) and found.tolist() == labels  # grey
    PICTURE.save(tmp_path / "b" / "colour.png")
    assert ddpm.load_images(str(tmp_path), "", 8)[0].shape == (4, 3, 8, 8)


def real(name):
    """Return the digits of a file and their labels: 800 of "train" or 200 of "t10k"."""
    files = [
        ROOT / f"tests/mnist/{name}-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1")
    ]
    images, labels = (torch.tensor([*gzip.decompress(file.read_bytes())]) for file in files)
    return images[16:].view(-1, 1, 28, 28).byte(), labels[8:]


# %% Training
IMAGES, LABELS = (torch.arange(384) * 37 % 251).view(6, 1, 8, 8), torch.arange(6) // 2


def train(path, first, seed):
    """Train a small network for 8 or 9 steps, from step first on, and return its average."""
    net = small_unet()
    ema, adam = deepcopy(net).requires_grad_(False), torch.optim.Adam(net.parameters(), 0.01)
    options = {"num_timesteps": 20, "learning_rate": 0.01, "train_batch_size": 4, "seed": seed}
    options["num_epochs"] = 6 + first * 4 // 6  # batches of 4 from 6 images
    state = {"step": first, "optimizer": adam.state_dict()}
    ddpm.train(net, ema, IMAGES, LABELS, options, path / "model.pt", state)
    return ema


@pytest.mark.parametrize("first", [0, 10**6])
def test_training(monkeypatch, tmp_path, first):
    """Batches, scaled and with their labels; clipped gradients; and the moving average."""
    norms, weights, batches, drawn = [], [], [], set()
    loss_simple, adam_step = ddpm.loss_simple, torch.optim.Adam.step

    def watched_loss(model, alpha_bars, x_0, labels, no_label):
        batches.append((x_0, labels))
        assert len(batches) <= 18  # or it would never end
        np.testing.assert_allclose(alpha_bars, closed_form(20)[1], rtol=1e-5)
        return 1000 * loss_simple(model, alpha_bars, x_0, labels, no_label)  # large gradients

    def watched_step(adam):
        parameters = adam.param_groups[0]["params"]
        norms.append(torch.cat([p.grad.flatten() for p in parameters]).norm().item())
        adam_step(adam)
        weights.append(parameters[0].detach().clone())

    monkeypatch.setattr(ddpm, "loss_simple", watched_loss)
    monkeypatch.setattr(torch.optim.Adam, "step", watched_step)
    average, ema = next(small_unet().parameters()).detach(), train(tmp_path, first, seed=0)
    assert len(norms) >= 8 and norms == pytest.approx([1] * len(norms), rel=1e-3)
    for step, weight in enumerate(weights, first):
        decay = 0.9995 if first else (1 + step) / (10 + step)
        average = decay * average + (1 - decay) * weight
    torch.testing.assert_close(next(ema.parameters()), average, rtol=1e-5, atol=1e-6)
    train(tmp_path, first, seed=1)
    for x_0, labels in batches:
        found = (x_0[:, None] * 127.5 + 127.5 - IMAGES).abs().amax(dim=(2, 3, 4)).min(dim=1)
        assert (found.values < 0.01).all() and torch.equal(LABELS[found.indices], labels)
        drawn.add((*found.indices.tolist(),))
    assert len(drawn) == len(batches)  # all differ, as the seeds do


# %% Whole runs
def run(out, *options):
    """Run the whole of ddpm_unet.py, tiny, in this process."""
    ddpm.main([*map(str, [*TINY, *options, "--output_dir", out])])


def weights_of(path):
    state = torch.load(path, weights_only=True)
    return [state["net"], state["ema"], state["optimizer"]["state"]]


@pytest.fixture(scope="session")
def colour(tmp_path_factory):
    """Options for a folder of 6 colour images in 3 classes, and a folder trained for 9 steps."""
    folder = tmp_path_factory.mktemp("colour")
    for k in range(6):
        (folder / "images" / "rgb"[k // 2]).mkdir(exist_ok=True, parents=True)
        PICTURE.rotate(60 * k).save(folder / "images" / "rgb"[k // 2] / f"{k}.png")
    options = f"--dataset {folder}/images --image_size 8 -b 4 -e 6 --seed 5".split()
    run(folder / "run", *options)
    return options, folder / "run"


@pytest.fixture(scope="session")
def grey(tmp_path_factory):
    """The folder of a training run of 8 steps on the digits, which lie beside it."""
    folder = tmp_path_factory.mktemp("grey")
    (folder / "MNIST" / "raw").mkdir(parents=True)
    for path in (ROOT / "tests/mnist").glob("*.gz"):
        (folder / "MNIST/raw" / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
    run(folder / "run", "--data_dir", folder, "-b", 100, "--guidance", 0.5)
    return folder / "run"


def test_training_run(grey, colour, tmp_path):
    torch.testing.assert_close(ddpm.load_images("mnist", grey.parent, 28), real("train"))
    for out, (n, S, *C) in ((grey, (12, 28)), (colour[1], (12, 8, 3))):
        assert {*os.listdir(out)} == SAMPLES | {"model.pt"}
        samples, picture = np.load(out / "samples.npy"), np.array(Image.open(out / "samples.png"))
        assert samples.shape == (n, S, S, *C) and samples.dtype == np.uint8 and samples.std() > 5
        assert picture.shape == (2 * (S + 2) + 2, 10 * (S + 2) + 2, 3)  # two rows
        first = picture[2 : S + 2, 2 : S + 2]
        assert (first == samples[0].reshape(S, S, -1)).all()
        with Image.open(out / "process.gif") as gif:
            times = [gif.seek(k) or gif.info["duration"] for k in range(gif.n_frames)]
            assert gif.size == (2 * (5 * (S + 2) + 2), 3 * (S + 2) + 2)  # x_t beside x_0_hat
            assert sum(times) == 100 * (5 + 30) and gif.info["loop"] == 0  # stays, then again
            last = np.array(gif.convert("RGB"))[2 : S + 2, 2 : S + 2].astype(int)
            assert abs(last - first).max() < 60  # it has but 256 colours
    assert ddpm.to_bytes(torch.tensor([-9.0, -1.0, 0.999, 9.0])).tolist() == [0, 0, 255, 255]
    for seed in (6, 7):  # one step changes little, so these are the initial weights
        run(tmp_path / str(seed), *colour[0], "-e", 1, "--seed", seed)
    a, b = (weights_of(tmp_path / name / "model.pt")[0]["first.weight"] for name in "67")
    assert (a - b).abs().max() > 0.05
    assert json.loads((out / "run.json").read_text())["options"]["num_classes"] == 3
    assert torch.load(out / "model.pt", weights_only=True)["step"] == 9


def test_sampling_needs_only_the_checkpoint(grey, tmp_path, monkeypatch):
    """It draws with the averaged weights, in a folder of its own, the same for the same seed."""
    seen, forward = [], ddpm.UNet.forward
    watched = lambda net, x, t, labels: seen.append(labels.tolist()) or forward(net, x, t, labels)
    monkeypatch.setattr(ddpm.UNet, "forward", watched)
    before = {path.name: path.read_bytes() for path in grey.iterdir()}
    state = torch.load(grey / "model.pt")
    state["net"] = {name: weight * 0 for name, weight in state["net"].items()}
    monkeypatch.chdir(tmp_path)
    torch.save(state, "copy.pt")
    ddpm.main([*TINY, "--checkpoint", "copy.pt", "--guidance", "0.5"])
    out = Path("outputs/ddpm_unet_mnist_samples")
    assert {*os.listdir(out)} == SAMPLES and {*os.listdir()} == {"copy.pt", "outputs"}
    assert (out / "samples.npy").read_bytes() == before["samples.npy"]
    variants = [
        "--seed 0",
        "--seed 1",
        "--guidance 5",
        "--sampler ddpm",
        "--sampling_steps 3 --guidance 0",
    ]
    for options in variants:
        run(options, "--checkpoint", grey / "model.pt", *options.split())
    assert len({Path(options, "samples.npy").read_bytes() for options in variants}) == 5
    run("label", "--checkpoint", grey / "model.pt", "--guidance", 0, "--label", 7, 2)
    assert seen[-5] == [*range(10), 0, 1] and seen[-4:] == 4 * [6 * [7, 2]]  # one call in each step
    assert {path.name: path.read_bytes() for path in grey.iterdir()} == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_early_end_and_resume(colour, tmp_path, monkeypatch, number):
    """A resumed training is the same as one in one go, bit for bit."""
    (options, whole), steps, loss_simple = colour, [], ddpm.loss_simple

    def interrupted(*args):
        steps.append(len(steps))
        if len(steps) == 4:
            signal.raise_signal(number)
        return loss_simple(*args)

    monkeypatch.setattr(ddpm, "loss_simple", interrupted)
    with pytest.raises(SystemExit) if number == signal.SIGTERM else nullcontext():
        run(tmp_path, *options)
    samples = SAMPLES if number == signal.SIGINT else set()  # Ctrl-C goes on to the samples
    assert {*os.listdir(tmp_path)} == {"model.pt"} | samples
    assert len(steps) == torch.load(tmp_path / "model.pt")["step"] == 4
    ddpm.SIGNALS.clear()
    ddpm.main([*TINY[-6:], "--resume", str(tmp_path / "model.pt"), "-e", "6"])
    results = (weights_of(folder / "model.pt") for folder in (tmp_path, whole))
    torch.testing.assert_close(*results, rtol=0, atol=0)
    assert (tmp_path / "samples.npy").read_bytes() == (whole / "samples.npy").read_bytes()


def test_two_processes_are_one_with_both_halves(colour, tmp_path, monkeypatch):
    """Its gradients, which Adam averages in exp_avg, are those of the mean of two losses."""
    options, images, labels = colour[0], *ddpm.load_images(str(colour[0][1]), "", 8)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [sys.executable, *torchrun, ROOT / "ddpm_unet.py", *TINY, *options, "-e", 2]
    command = [*map(str, [*command, "--output_dir", tmp_path / "two"])]
    together, loss_simple, seeds = subprocess.Popen(command), ddpm.loss_simple, count(10**10)

    def both_halves(net, alpha_bars, _, __, no_label):
        loss = 0.0
        for _ in range(2):
            torch.manual_seed(next(seeds))
            batch = torch.randint(6, (2,))
            x_0, y = images[batch] / 127.5 - 1, labels[batch]
            loss += loss_simple(net, alpha_bars, x_0, y, no_label) / 2
        return loss

    monkeypatch.setattr(ddpm, "loss_simple", both_halves)
    run(tmp_path / "one", *options, "-e", 2)
    assert together.wait(600) == 0 and {*os.listdir(tmp_path / "two")} == SAMPLES | {"model.pt"}
    one, two = (weights_of(tmp_path / name / "model.pt")[2] for name in ("one", "two"))
    for a, b in zip(one.values(), two.values()):
        torch.testing.assert_close(a["exp_avg"], b["exp_avg"], rtol=1e-3, atol=1e-4)


# %% Command line
COUNTS = ["image_size", "num_timesteps", "train_batch_size", "num_epochs", "num_samples"]
BAD = [(f"--{flag} {value}", f"--{flag}") for flag in COUNTS for value in (0, -2, "many")]
FLAGS = ["sampling_steps", "base_channels", "learning_rate", "sampler", "device", "colour"]
BAD += [(f"--{flag} 0", f"--{flag}") for flag in FLAGS]
BAD += [(f"--{flag} x", f"--{flag}") for flag in ("seed", "label", "channel_mults", "guidance")]
NANS = ["--learning_rate 1e30", "--resume model.pt -e 9 -l 1e30"]
NAMES = ["missing.pt", "empty.pt", "text.pt", "truncated.pt", "other.pt", "list.pt", "evil.pt", ""]
SOURCES = [f"{flag} {name}" for flag in ("--checkpoint", "--resume") for name in NAMES]
BAD += [(options, "cannot use " + options.split(" ")[1] + ": ") for options in SOURCES]
FILES = ["--output_dir file", "--output_dir file/out", "--dataset file", "--dataset missing"]
BAD += [(options, options.split()[1]) for options in FILES]
BAD += [(options, "the loss is not finite: lower --learning_rate") for options in NANS]
BAD += [
    ("--checkpoint model.pt --resume model.pt", "--resume: not allowed with"),
    ("--checkpoint model.pt --base_channels 16", "size mismatch for"),
    ("--checkpoint model.pt --label -1", "--label: choose from 0 to 2"),
    ("--checkpoint model.pt --label 3", "--label: choose from 0 to 2"),
    ("--checkpoint model.pt --output_dir .", "holds a model"),
    ("--output_dir .", "holds a model"),
    ("--dataset damaged", "cannot read damaged/./b.png: "),
    ("--dataset none", "no valid file"),
    ("--dataset mnist --data_dir .", "downloading"),
]


@pytest.fixture(scope="session")
def bad_files(colour, tmp_path_factory):
    """A folder with files that ddpm_unet.py must refuse."""
    folder, state = tmp_path_factory.mktemp("bad"), torch.load(colour[1] / "model.pt")
    evil = type("Evil", (), {"__reduce__": lambda self: (os.mkdir, ("pwned",))})()
    for name in ("damaged", "none"):
        (folder / name).mkdir()
    contents = {"model": state, "other": {"model": 1}, "list": [1], "evil": {**state, "net": evil}}
    for name, content in contents.items():
        torch.save(content, folder / f"{name}.pt")
    PICTURE.save(folder / "damaged/a.png")
    for name, source in (("truncated.pt", "model.pt"), ("damaged/b.png", "damaged/a.png")):
        (folder / name).write_bytes((folder / source).read_bytes()[:60])
    for name, text in (("empty.pt", ""), ("text.pt", "hello"), ("file", "mine")):
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize(("options", "words"), BAD)
def test_bad_input(options, words, bad_files, colour, tmp_path, monkeypatch, capsys):
    """One line names what is wrong, and no file changes."""
    monkeypatch.chdir(bad_files)
    before = {path: path.stat().st_mtime_ns for path in bad_files.rglob("*") if path.is_file()}
    command = [*TINY, *map(str, colour[0])]
    command += [] if "output_dir" in options else ["--output_dir", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["ddpm_unet.py", *command, *options.split(" ")])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "ddpm_unet.py"), run_name="__main__")
    # argparse prints its message itself, and exits with 2. Ours goes to sys.exit, which prints it.
    line = capsys.readouterr().err.splitlines()[-1] if stop.value.code == 2 else stop.value.code
    assert line.startswith("ddpm_unet.py: error: ") and "\n" not in line and words in line
    assert before == {p: p.stat().st_mtime_ns for p in bad_files.rglob("*") if p.is_file()}
    assert not (bad_files / "pwned").exists() and not (tmp_path / "out" / "model.pt").exists()


# %% The model in the box
BOX = ROOT / "tests" / "models" / "ddpm_unet_mnist.pt"
BOXED = pytest.mark.skipif(not BOX.exists(), reason="tests/models/ddpm_unet_mnist.pt is missing")
LOSSES = {10: (0.05, 0.6), 100: (0.02, 0.12), 500: (0.002, 0.02), 900: (0.0, 0.006)}


@BOXED
def test_samples_of_the_boxed_model_show_their_labels(tmp_path):
    """The nearest of 1,000 real digits mostly has the label that we asked for."""
    options = ["--checkpoint", BOX, "--sampling_steps", 20, "--device", "cpu"]
    ddpm.main([*map(str, [*options, "--output_dir", tmp_path])])
    samples = torch.tensor(np.load(tmp_path / "samples.npy")).flatten(1).float()
    images, labels = map(torch.cat, zip(real("train"), real("t10k")))
    nearest = torch.cdist(samples, images.flatten(1).float()).argmin(dim=1)
    assert (labels[nearest] == torch.arange(100) % 10).float().mean() > 0.75


@BOXED
@pytest.mark.parametrize("t", LOSSES)
def test_loss_of_the_boxed_model(t):
    state, alpha_bar = torch.load(BOX, weights_only=True), closed_form(1000)[1][t]
    net = ddpm.UNet(**{name: state["options"][name] for name in ddpm.MODEL})
    net.load_state_dict(state["ema"])
    torch.manual_seed(t)
    x_0, labels = (part[:100] for part in real("t10k"))
    eps = torch.randn(x_0.shape)
    x_t = sqrt(alpha_bar) * (x_0 / 127.5 - 1) + sqrt(1 - alpha_bar) * eps
    with torch.no_grad():
        loss = (net(x_t, torch.full((100,), t), labels) - eps).square().mean()
    assert LOSSES[t][0] < loss < LOSSES[t][1]
