"""Make the small model in the box from the checkpoint of a training.

    python tests/models/make.py outputs/ddpm_unet_mnist/model.pt

It keeps the averaged weights alone, in bf16: enough to draw samples, not to resume the training.
"""

import sys
from pathlib import Path

import torch

state = torch.load(sys.argv[1], map_location="cpu", weights_only=True)
ema = {name: weight.bfloat16() for name, weight in state["ema"].items()}
small = {
    "options": state["options"],
    "step": state["step"],
    "net": ema,
    "ema": ema,
    "optimizer": {},
}
torch.save(small, Path(__file__).with_name("ddpm_unet_mnist.pt"))
