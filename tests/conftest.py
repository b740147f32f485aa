"""What the tests of the scripts share: real digits, files to refuse, and how to run a script."""

import gzip
import os
import runpy
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import MNIST

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parent.parent
BAD_CHECKPOINTS = ["missing", "empty", "text", "truncated", "other", "list", "evil"]


def digits(name):
    """Return real digits, uint8 (N, 1, 28, 28), and labels (N,): 800 of "train", 200 of "t10k"."""
    files = [f"{name}-images-idx3-ubyte.gz", f"{name}-labels-idx1-ubyte.gz"]
    images, labels = (gzip.decompress((ROOT / "tests/mnist" / file).read_bytes()) for file in files)
    images = torch.tensor([*images[16:]], dtype=torch.uint8)  # after the file's header
    return images.view(-1, 1, 28, 28), torch.tensor([*labels[8:]])


@pytest.fixture(scope="session")
def mnist_dir(tmp_path_factory):
    """A folder for --data_dir, with the digits of tests/mnist as torchvision wants them."""
    raw = tmp_path_factory.mktemp("data") / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for path in (ROOT / "tests/mnist").glob("*.gz"):
        (raw / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
    return raw.parent.parent


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    monkeypatch.setattr(MNIST, "mirrors", ["http://127.0.0.1:9/"])


def exact_schedule(T):
    """Return betas and alpha_bars (T + 1,) in float64, for t = 0..T. T = 1000 is the DDPM paper."""
    betas = np.append(0, np.minimum(np.linspace(1e-4, 0.02, T) * 1000 / T, 0.999))
    return betas, np.cumprod(1 - betas)


def content(folder):
    """Return the bytes of each file in a folder and below it, by name."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def gif_milliseconds(path):
    """Return how long each frame of a GIF is shown. It must begin again at its end."""
    with Image.open(path) as gif:
        assert gif.info["loop"] == 0
        return [gif.seek(k) or gif.info["duration"] for k in range(gif.n_frames)]


def write_bad_checkpoints(folder, model, weights):
    """Copy model.pt into a folder, beside files to refuse. In odd.pt are none, in evil.pt code."""
    state = torch.load(model, weights_only=True)
    evil = type("Evil", (), {"__reduce__": lambda self: (os.mkdir, ("pwned",))})()
    odd = {**state, weights: {}}
    contents = {"model": state, "copy": state, "odd": odd, "other": {"step": 1}, "list": [1]}
    for name, value in {**contents, "evil": {**state, weights: evil}}.items():
        torch.save(value, folder / f"{name}.pt")
    (folder / "truncated.pt").write_bytes(model.read_bytes()[:9999])
    (folder / "empty.pt").write_text("")
    (folder / "text.pt").write_text("hello")
    (folder / "file").write_text("a file, where a folder is asked for")


def run_script(script, *options):
    """Run a script in this process as python would, from its first line to its last."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *map(str, options)])
        runpy.run_path(str(ROOT / script), run_name="__main__")


def interrupt(monkeypatch, script, loss, number):
    """Send a signal to this process in the fourth step of training, before the loss."""
    steps = iter(range(9))

    def interrupted(*args):
        if next(steps, None) == 3:
            assert callable(signal.getsignal(number))  # or SIGTERM would end pytest
            signal.raise_signal(number)
        return loss(*args)

    monkeypatch.setattr(script, loss.__name__, interrupted)


def error_of(script, options, folder, capsys):
    """Return the one line with which a script refuses its options. No file in folder may change."""
    before = content(folder)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.chdir(folder)
        run_script(script, *options)
    # argparse prints its message itself, and exits with 2. Ours goes to sys.exit, which prints it.
    line = capsys.readouterr().err.splitlines()[-1] if stop.value.code == 2 else stop.value.code
    assert line.startswith(f"{Path(script).name}: error: ")
    assert "\n" not in line
    assert content(folder) == before
    return line
