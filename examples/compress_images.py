"""Compress a model of images, save it, and load it again: handwritten digits, nothing is downloaded."""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch

import ttmpd
from ttmpd.demo.digits import demo_data

QUICK = {"num_samples": 100, "score": "magnitude", "distill": ttmpd.OneTime(steps=10, views=1)}
"""For a run of seconds; leave this out to let `compress` score and train as it should."""


def main() -> None:
    """Compress, save, load."""
    digits = demo_data().unlabelled  # uint8 images from the place of use; any folder of images will do
    with TemporaryDirectory() as folder:
        fast = Path(folder) / "fast"
        result = ttmpd.compress("ttmpd.demo:demo_model", digits, macs=0.7, output=fast, **QUICK)
        print("target met:", result.met)
        print("agreement with the adapted model:", result.report.agreement.share)
        net = ttmpd.load(fast)  # a plain nn.Module in eval mode
        print("predictions:", tuple(net(torch.rand(2, 1, 8, 8)).shape))


if __name__ == "__main__":
    main()
