"""Tests of ddpm_unet.py: its mathematics, training, small runs, and the model in tests/models."""

import json
import signal
import subprocess
import sys
from contextlib import suppress
from math import sqrt

import conftest
import numpy as np
import pytest
import torch
from conftest import BAD_CHECKPOINTS, ROOT, content, digits, error_of, exact_schedule
from numpy.testing import assert_allclose
from PIL import Image, ImageOps
from torch import nn
from torch.testing import assert_close

import ddpm_unet as ddpm

TINY = "--num_timesteps 20 --base_channels 16 --channel_mults 1 2 --image_size 8"
TINY = f"{TINY} -b 4 -e 6 --seed 5 --device cpu".split()
SAMPLES = {"process.gif", "run.json", "samples.npy", "samples.png"}
ALL = SAMPLES | {"data.png", "model.pt"}
BOX = ROOT / "tests/models/ddpm_unet_mnist.pt"


@pytest.mark.parametrize("T", [8, 20, 1000])
def test_schedule_and_q_sample(T):
    """q_sample jumps to where the single steps of eq. 2 lead: the same mean and variance."""
    betas, alpha_bars = exact_schedule(T)
    assert_allclose(ddpm.make_schedule(T), alpha_bars, rtol=1e-9)
    mean = 1.0  # of x_t, from x_0 = 1
    variance = 0.0
    for beta, alpha_bar in zip(betas, alpha_bars):
        mean = sqrt(1 - beta) * mean
        variance = (1 - beta) * variance + beta
        assert ddpm.q_sample(1.0, alpha_bar, 0.0) == pytest.approx(mean)
        assert ddpm.q_sample(0.0, alpha_bar, 1.0) ** 2 == pytest.approx(variance)


def test_loss_is_algorithm_1():
    """From what the network gets follows the noise, and from that the loss, as printed."""
    seen = []

    def model(x_t, t, labels):
        seen.append((x_t, t, labels))
        return 0.3 * x_t

    torch.manual_seed(0)
    x_0 = torch.rand(20_000, 1, 1, 2, dtype=torch.float64)
    given = torch.arange(20_000) % 7
    loss = ddpm.loss_simple(model, ddpm.make_schedule(10), x_0, given, 7)
    x_t, t, labels = seen[0]
    alpha_bar = torch.tensor(exact_schedule(10)[1])[t].view(-1, 1, 1, 1)
    eps = (x_t - alpha_bar.sqrt() * x_0) / (1 - alpha_bar).sqrt()
    assert_close(loss, (0.3 * x_t - eps).square().mean())
    covariance = eps.flatten(1).T.cov()  # of the two pixels
    assert_close(covariance, torch.eye(2).double(), rtol=0, atol=0.03)
    assert (t.bincount() > 1800).tolist() == [False] + 10 * [True]  # all t are as likely
    dropped = labels == 7
    assert dropped.double().mean() == pytest.approx(0.1, abs=0.01)
    assert torch.equal(labels[~dropped], given[~dropped])


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
@pytest.mark.parametrize("guidance", [0.0, 1.5])
@pytest.mark.parametrize("num_steps", [1, 7, 50])
def test_p_sample_loop(monkeypatch, num_steps, guidance, sampler):
    """Each step is eq. 12 of DDIM or line 4 of Algorithm 2, with the guided and clamped eps."""
    monkeypatch.setattr(torch, "randn_like", torch.ones_like)
    torch.manual_seed(0)
    noise = torch.randn(2, 1, 4, 4)
    labels = torch.tensor([3, 0])

    def net(x_t, t, labels):
        return 0.5 * x_t + (0.01 * t + 0.1 * labels).view(-1, 1, 1, 1)

    net.no_label = 10
    schedule = ddpm.make_schedule(50)
    loop = ddpm.p_sample_loop(net, schedule, num_steps, noise, labels, guidance, sampler)
    steps_left, x, x_0_hat = zip(*loop)
    assert steps_left == (*range(num_steps, -1, -1),)
    assert x[0] is noise and x[-1] is x_0_hat[-1]
    visited = np.linspace(50, 0, num_steps + 1).round().astype(int)
    _, alpha_bars = exact_schedule(50)
    for k, t in enumerate(visited[:-1]):
        a, b = alpha_bars[visited[k : k + 2]]
        eps = net(x[k], t, labels)
        eps = eps + guidance * (eps - net(x[k], t, torch.tensor(10)))
        clamped = ((x[k] - sqrt(1 - a) * eps) / sqrt(a)).clamp(-1, 1)  # eq. 15
        assert_close(x_0_hat[k], clamped)
        eps = (x[k] - sqrt(a) * clamped) / sqrt(1 - a)
        expected = sqrt(b) * clamped + sqrt(1 - b) * eps  # arXiv 2010.02502, eq. 12, sigma = 0
        if sampler == "ddpm":
            alpha = a / b
            sigma = sqrt((1 - b) / (1 - a) * (1 - alpha))  # 0 in the last step
            expected = (x[k] - (1 - alpha) / sqrt(1 - a) * eps) / sqrt(alpha) + sigma
        assert_close(x[k + 1], expected, rtol=1e-4, atol=1e-5)


def small_unet(channels, levels, T):
    """Return a network for 3 classes, whose weights are all random, none zero."""
    torch.manual_seed(1)
    net = ddpm.UNet(channels, 3, T, 16, [1, 2, 4][:levels])
    for weight in net.parameters():
        nn.init.normal_(weight, std=0.2)
    return net


@pytest.mark.parametrize(("channels", "levels", "T"), [(1, 3, 1000), (3, 1, 20)])
def test_network(channels, levels, T):
    """All inputs matter. Time enters as in the Transformer, as if T were 1000."""
    net = small_unet(channels, levels, T)
    x_t = torch.randn(2, channels, 11, 12)
    t = torch.tensor([4, 20])
    labels = torch.tensor([0, net.no_label])
    seen = []
    net.time_mlp.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    found = net(x_t, t, labels)
    assert found.shape == x_t.shape
    angles = np.outer((t - 1) * 1000 / T, 10_000 ** (-np.arange(32) / 31))
    assert_allclose(seen[0], np.hstack((np.sin(angles), np.cos(angles))), rtol=0, atol=1e-3)
    for inputs in ((x_t + 1, t, labels), (x_t, t - 1, labels), (x_t, t, labels.flip(0))):
        change = (net(*inputs) - found).abs()
        assert change.amax(dim=(1, 2, 3)).min() > 1e-4
    assert not ddpm.ResBlock(8, 8, 8).conv_2[-1].weight.any()  # training starts at the shortcut


COLOURS = np.uint8([(250, 10, 20), (30, 220, 40), (20, 60, 240), (90, 90, 0)])
SQUARES = COLOURS.reshape(2, 2, 3).repeat(8, axis=0).repeat(8, axis=1)  # (16, 16, 3)
PICTURE = Image.fromarray(SQUARES)
GREYS = COLOURS[:, [0, 0, 0]]
GREY = Image.fromarray(SQUARES[:, :, 0])
PALE = [(255, 255, 255), *COLOURS[1:]]  # the first square is transparent, and becomes white
PALETTE = PICTURE.quantize(4)
UPRIGHT = Image.Exif()
UPRIGHT[0x0112] = 6  # turn it by 90 degrees clockwise to see it as it was


@pytest.mark.parametrize(
    ("name", "image", "options", "colours"),
    [
        ("grey.png", GREY, {}, GREYS),
        ("16_bit.png", Image.fromarray(np.array(GREY, np.uint16) * 256 + 77), {}, GREYS),
        ("transparent_palette.png", PALETTE, {"transparency": PALETTE.getpixel((0, 0))}, PALE),
        ("ink.tif", PICTURE.convert("CMYK"), {}, COLOURS),
        ("turned.JPG", PICTURE.rotate(90), {"exif": UPRIGHT, "quality": 95}, COLOURS),
        ("wide 数.bmp", ImageOps.pad(PICTURE, (80, 32), color="pink"), {}, COLOURS),
    ],
)
def test_read_image(tmp_path, name, image, options, colours):
    """The four squares come back from a file of each kind."""
    image.save(tmp_path / name, **options)
    found = ddpm.read_image(str(tmp_path / name), 16)
    seen = found[:, 4::8, 4::8].flatten(1).T  # (4, 3): the middle of each square
    assert_allclose(seen, colours, rtol=0, atol=4)


def test_load_images(tmp_path, mnist_dir):
    """Subfolders are classes, in the order of their names; a flat folder is one class."""
    for name in ("b/x.png", "a/y.png", "a/deep/z.png", ".hidden/z.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        GREY.save(tmp_path / name)
    for folder, expected in ((tmp_path, [0, 0, 1]), (tmp_path / "b", [0])):
        images, labels = ddpm.load_images(folder, "", 8)
        assert images.shape == (len(expected), 1, 8, 8)  # grey: one channel
        assert labels.tolist() == expected
    PICTURE.save(tmp_path / "b" / "colour.png")
    assert ddpm.load_images(tmp_path, "", 8)[0].shape == (4, 3, 8, 8)
    assert_close(ddpm.load_images("mnist", mnist_dir, 28), digits("train"))
    assert ddpm.load_images("mnist", mnist_dir, 32)[0].shape[1:] == (1, 32, 32)


@pytest.mark.parametrize(("first", "saves"), [(0, [8]), (10**6 - 4, [10**6, 10**6 + 4])])
def test_training(monkeypatch, tmp_path, first, saves):
    """Gradients are clipped, ema averages; each 200th step and the last one are saved."""
    images = torch.arange(8).view(8, 1, 1, 1).expand(8, 1, 8, 8)  # image k has the grey k
    labels = torch.arange(8) // 3
    net = small_unet(1, 2, 20)
    ema = small_unet(1, 2, 20).requires_grad_(False)
    average = next(net.parameters()).detach().clone()
    loss_simple = ddpm.loss_simple
    adam_step = torch.optim.Adam.step
    decays = []
    saved = []

    def watched_loss(model, alpha_bars, x_0, y, no_label):
        assert_allclose(alpha_bars, exact_schedule(20)[1], rtol=1e-5)
        indices = ((x_0[:, 0, 0, 0] + 1) * 127.5).round().long()
        assert_close(x_0, images[indices] / 127.5 - 1)
        assert torch.equal(y, labels[indices])
        return 1000 * loss_simple(model, alpha_bars, x_0, y, no_label)  # large gradients

    def watched_step(adam):
        group = adam.param_groups[0]
        gradients = torch.cat([weight.grad.flatten() for weight in group["params"]])
        assert gradients.norm() == pytest.approx(1, rel=1e-3)
        assert group["lr"] == 0.01
        adam_step(adam)
        step = first + len(decays)
        decays.append(min(0.9995, (1 + step) / (10 + step)))
        average.lerp_(group["params"][0].detach(), 1 - decays[-1])

    monkeypatch.setattr(ddpm, "loss_simple", watched_loss)
    monkeypatch.setattr(torch.optim.Adam, "step", watched_step)
    monkeypatch.setattr(torch, "save", lambda parts, file: saved.append(parts["step"]))
    options = {"num_timesteps": 20, "learning_rate": 0.01, "train_batch_size": 4, "seed": 0}
    options["num_epochs"] = first // 2 + 4  # of 2 steps: 8 steps more
    state = {"step": first, "optimizer": torch.optim.Adam(net.parameters(), lr=0.5).state_dict()}
    ddpm.train(net, ema, images, labels, options, tmp_path / "model.pt", state)
    assert_close(next(ema.parameters()), average, rtol=1e-5, atol=1e-6)
    assert len(decays) == 8 and saved == saves


def run(out, *options):
    """Run the whole of ddpm_unet.py, tiny, in this process."""
    ddpm.main([*map(str, [*TINY, *options, "--output_dir", out])])


def load(folder):
    """Return what the training in a folder has saved."""
    return torch.load(folder / "model.pt", weights_only=True)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder with 6 colour images of 3 classes, and a run of 9 training steps on them."""
    folder = tmp_path_factory.mktemp("colour")
    for k in range(6):
        path = folder / "images" / "rgb"[k // 2] / f"{k}.png"
        path.parent.mkdir(exist_ok=True, parents=True)
        PICTURE.rotate(60 * k).save(path)
    run(folder / "run", "--dataset", folder / "images")
    return folder


def test_files_of_a_run(trained):
    """samples.png shows the samples, 10 in a row, and the GIF ends with them."""
    out = trained / "run"
    assert set(content(out)) == ALL
    assert load(out)["step"] == 9
    assert json.loads((out / "run.json").read_text())["options"]["num_classes"] == 3
    samples = np.load(out / "samples.npy")
    picture = np.array(Image.open(out / "samples.png"))
    assert_allclose(picture[56:72:2, 128:144:2], samples[37])  # 16 x 16 pixels, then 2 black ones
    assert sum(conftest.gif_milliseconds(out / "process.gif")) == 100 * (21 + 30)  # it stays
    with Image.open(out / "process.gif") as gif:
        gif.seek(gif.n_frames - 1)
        last = np.array(gif.convert("RGB")).astype(int)
    assert last.shape == (52, 104, 3)  # 5 x 5 images of x_t, beside x_0_hat
    assert abs(last[2:10, 2:10] - samples[0]).max() < 60  # it has but 256 colours
    levels = torch.tensor([-9.0, -1.0, 0.999, 9.0]).view(1, 1, 1, 4)
    assert ddpm.tile(levels, 1)[0, :, 0].tolist() == [0, 0, 255, 255]


def test_sampling_needs_only_the_checkpoint(trained, tmp_path, monkeypatch):
    """It draws with the averaged weights, in a folder of its own, the same for the same seed."""
    state = load(trained / "run")
    for weight in state["net"].values():
        weight.zero_()
    monkeypatch.chdir(tmp_path)
    torch.save(state, "copy.pt")
    ddpm.main(["--checkpoint=copy.pt", "--device=cpu", "--guidance=0.5", "--sampler=ddim"])
    drawn = content(tmp_path / "outputs/ddpm_unet_images_samples")
    assert set(drawn) == SAMPLES
    assert drawn["samples.npy"] == content(trained)["run/samples.npy"]
    different = {drawn["samples.npy"]}
    changes = "--seed 1, --guidance 5, --sampler ddpm, --sampling_steps 3, --label 2"
    for change in changes.split(", "):
        run(tmp_path / change, "--checkpoint", trained / "run/model.pt", *change.split())
        different.add(content(tmp_path / change)["samples.npy"])
    assert len(different) == 6
    run(tmp_path / "more", "--checkpoint", "copy.pt", "--num_samples", 130)  # 100, then 30
    assert_close(np.load(tmp_path / "more/samples.npy")[:100], np.load(trained / "run/samples.npy"))
    assert content(tmp_path / "more")["process.gif"] == drawn["process.gif"]


@pytest.mark.parametrize(("number", "more"), [(signal.SIGTERM, set()), (signal.SIGINT, ALL)])
def test_early_end_and_resume(trained, tmp_path, monkeypatch, number, more):
    """A signal ends training; Ctrl-C draws samples, too. Resumed, all is bit for bit the same."""
    conftest.interrupt(monkeypatch, ddpm, ddpm.loss_simple, number)
    with suppress(SystemExit):
        run(tmp_path, "--dataset", trained / "images")
    assert set(content(tmp_path)) == {"model.pt"} | more
    assert load(tmp_path)["step"] == 4
    assert signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)
    ddpm.main(["--resume", str(tmp_path / "model.pt"), "--device", "cpu"])
    for entry in ("step", "net", "ema", "optimizer"):
        assert_close(load(tmp_path)[entry], load(trained / "run")[entry], rtol=0, atol=0)
    assert content(tmp_path)["samples.npy"] == content(trained)["run/samples.npy"]


def test_two_processes_are_one_with_both_halves(trained, tmp_path, monkeypatch):
    """Gradients, which Adam averages in exp_avg, are those of the mean of two processes' losses."""
    options = ["--dataset", trained / "images", "-e", 2, "--num_samples", 1]  # 3 steps
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [sys.executable, *torchrun, ROOT / "ddpm_unet.py", *TINY, *options]
    subprocess.run([*map(str, command), "--output_dir", tmp_path / "two"], check=True)
    images, labels = ddpm.load_images(trained / "images", "", 8)
    loss_simple = ddpm.loss_simple
    seeds = iter(range(10**10, 10**10 + 6))

    def both_halves(net, alpha_bars, x_0, y, no_label):
        losses = []
        for _ in range(2):
            torch.manual_seed(next(seeds))
            batch = torch.randint(6, (2,))
            x_0 = images[batch] / 127.5 - 1
            losses.append(loss_simple(net, alpha_bars, x_0, labels[batch], no_label))
        return sum(losses) / 2

    monkeypatch.setattr(ddpm, "loss_simple", both_halves)
    run(tmp_path / "one", *options)
    assert set(content(tmp_path / "two")) == ALL
    one = load(tmp_path / "one")["optimizer"]["state"]
    two = load(tmp_path / "two")["optimizer"]["state"]
    for number, weight in one.items():
        assert_close(two[number]["exp_avg"], weight["exp_avg"], rtol=1e-3, atol=1e-4)


BAD = [
    *((f"--{flag} 0", f"--{flag}") for flag in ["image_size", "num_epochs", "learning_rate"]),
    *((f"--checkpoint {name}.pt", f"no U-Net in {name}.pt: ") for name in BAD_CHECKPOINTS),
    ("--checkpoint model.pt --resume model.pt", "--resume: not allowed with"),
    ("--checkpoint model.pt --base_channels 24", "does not fit channels"),
    ("--checkpoint model.pt --num_timesteps 30", "does not fit channels"),
    ("--checkpoint odd.pt", "does not fit: RuntimeError"),
    ("--label 0 3", "--label: choose from 0 to 2"),  # before training
    *((options, "holds a model") for options in ["--output_dir .", "--resume copy.pt"]),
    ("--output_dir file/out", "file"),
    ("--dataset missing", "missing"),
    ("--dataset damaged", "cannot read damaged"),
    ("--dataset mnist --data_dir .", "Error downloading"),
    ("--learning_rate 1e30 --output_dir damaged", "the loss is not finite"),
]


@pytest.mark.parametrize(("options", "words"), BAD)
def test_bad_input(options, words, trained, tmp_path, monkeypatch, capsys):
    """One line names what is wrong. No file changes, and no code in a checkpoint runs."""
    monkeypatch.setattr(signal, "signal", lambda *args: None)  # Ctrl-C still ends pytest
    conftest.write_bad_checkpoints(tmp_path, trained / "run/model.pt", "net")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/b.png").write_text("this is not an image")
    command = [*TINY, "--dataset", trained / "images", *options.split()]
    assert words in error_of("ddpm_unet.py", command, tmp_path, capsys)
    assert not (tmp_path / "outputs").exists() and not (tmp_path / "pwned").exists()


def test_samples_of_the_boxed_model_show_their_labels(tmp_path):
    """The nearest of 800 real digits mostly has the label that we asked for."""
    options = ["--num_samples", 40, "--sampling_steps", 10, "--output_dir", tmp_path]
    conftest.run_script("ddpm_unet.py", "--checkpoint", BOX, "--device", "cpu", *options)
    samples = torch.tensor(np.load(tmp_path / "samples.npy"))
    images, labels = digits("train")
    distances = torch.cdist(samples.flatten(1).float(), images.flatten(1).float())
    recognised = labels[distances.argmin(dim=1)] == torch.arange(40) % 10
    assert recognised.float().mean() > 0.8


def test_loss_of_the_boxed_model():
    """Trained with the default options, it guesses the noise in digits that it has not seen."""
    state = torch.load(BOX, weights_only=True)
    options = state["options"]
    defaults = vars(ddpm.parse_options([])[0])
    assert {**defaults, **options} == {**options, **defaults}  # equal where both have a name
    net = ddpm.UNet(**{name: options[name] for name in ddpm.MODEL})
    net.load_state_dict(state["ema"])
    images, labels = digits("t10k")
    alpha_bars = ddpm.make_schedule(1000).float()
    torch.manual_seed(0)  # the loss depends on t and eps, which are drawn
    with torch.no_grad():
        loss = ddpm.loss_simple(net, alpha_bars, images / 127.5 - 1, labels, 10)
    assert loss == pytest.approx(0.021349, rel=3e-4)
