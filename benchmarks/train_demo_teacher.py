"""Train the teacher of the demo on clean digits and write its weights.

Command:  python benchmarks/train_demo_teacher.py
Time:     one minute on two CPU cores
Expected: 99.6 % on clean unseen digits; src/ttmpd/demo_teacher.safetensors, 1.25 MB. The order of floating-point sums
          depends on the CPU and its number of threads, so that another machine gives slightly different weights.
"""

import argparse
import math
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from ttmpd.demo.digits import WEIGHTS, DigitNet, demo_split, digits, shift

SEED = 0
EPOCHS = 80
BATCH_SIZE = 64
ACCURACY_FLOOR = 0.98


def prepared(pixels: np.ndarray) -> Tensor:
    """(N, 8, 8, 1) uint8 to (N, 1, 8, 8) as the model wants it."""
    cfg = DigitNet.pretrained_cfg
    scaled = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    return (scaled - float(cfg["mean"][0])) / float(cfg["std"][0])


def augmented(batch: Tensor, empty: float) -> Tensor:
    """Each digit rotated, scaled and moved a little; none of what makes the demo's shift."""
    n = len(batch)
    angle = (torch.rand(n) - 0.5) * 2 * math.radians(10)
    scale = 1 + (torch.rand(n) - 0.5) * 0.2
    move = (torch.rand(n, 2) - 0.5) * 2 * 0.15
    cos, sin = angle.cos() * scale, angle.sin() * scale
    theta = torch.stack([torch.stack([cos, -sin, move[:, 0]], 1), torch.stack([sin, cos, move[:, 1]], 1)], 1)
    grid = F.affine_grid(theta, list(batch.shape), align_corners=False)
    return F.grid_sample(batch - empty, grid, align_corners=False) + empty


def train(x: Tensor, y: Tensor) -> DigitNet:
    """A teacher trained with AdamW and a cosine schedule."""
    model = DigitNet().to(memory_format=torch.channels_last).train()
    steps = EPOCHS * (len(x) // BATCH_SIZE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
    loss_of = nn.CrossEntropyLoss(label_smoothing=0.05)
    empty = float(prepared(np.zeros((1, 1, 1, 1), np.uint8)))
    for epoch in range(EPOCHS):
        order = torch.randperm(len(x))
        for index in torch.split(order[: len(x) // BATCH_SIZE * BATCH_SIZE], BATCH_SIZE):
            batch = augmented(x[index], empty).contiguous(memory_format=torch.channels_last)
            loss = loss_of(model(batch), y[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        if epoch % 10 == 9:
            print(f"epoch {epoch + 1:3d}  loss {loss.item():.3f}", flush=True)
    return model.to(memory_format=torch.contiguous_format).eval()


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of right answers."""
    return float((model(x).argmax(1) == y).float().mean())


def main() -> None:
    """Train, round to half precision, check, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=WEIGHTS)
    output = parser.parse_args().output
    torch.manual_seed(SEED)
    pixels, labels = digits()
    rows, *others = demo_split()
    unseen = np.concatenate(others)
    model = train(prepared(pixels[rows]), torch.from_numpy(labels[rows]))
    state = {name: t.half() if t.is_floating_point() else t for name, t in model.state_dict().items()}
    model.load_state_dict(state)
    y = torch.from_numpy(labels[unseen])
    clean = accuracy(model, prepared(pixels[unseen]), y)
    shifted = accuracy(model, prepared(shift(pixels)[unseen]), y)
    print(f"clean {clean:.4f}  shifted {shifted:.4f}  ({len(y)} unseen digits)")
    if clean < ACCURACY_FLOOR:
        raise SystemExit(
            f"accuracy on clean digits must be at least {ACCURACY_FLOOR}, but got {clean:.4f}; nothing written"
        )
    save_file({name: t.contiguous() for name, t in state.items()}, output)
    print(f"wrote {output.name}: {output.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
