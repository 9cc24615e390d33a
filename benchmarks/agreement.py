"""By which parts of a network can its calibration be judged without labels? Behind EATA-C's temperature.

    python benchmarks/agreement.py               # about five minutes on one core

Images of CIFAR-10-JPEG that no other table reports on, as they are and shifted once more. `norm` adapts to 500 of them;
parts of the network are made in several ways, temperatures fitted on the same 500 to how often parts agree with the
whole, and the calibration error is that on 2,000 others. "median" is the median of the temperatures of the parts,
"all" one temperature for all parts at once; "batch" and "held" say which statistics parts use.
Writes results/agreement.csv.
"""

import argparse
import functools
import random
import statistics
from typing import Any

import numpy as np
import torch

from common import DATA, cached, cifar, require_data, with_earlier, write_csv
from ttmpd.adapt._learner import answers_by_batch
from ttmpd.adapt.eata_c import drawn
from ttmpd.adapt.norm import Norm
from ttmpd.data.corruptions import corrupted
from ttmpd.data.open import open_samples
from ttmpd.models.modules import clone, to_fast_format
from ttmpd.models.open import open_model
from ttmpd.models.run import predictions_of
from ttmpd.quality.calibration import calibration_error, fit_temperature
from ttmpd.records import Unit
from ttmpd.surgery.masks import skipped
from ttmpd.surgery.units.block import Block

SHIFTS = ("none", "gaussian_noise", "defocus_blur", "pixelate", "snow", "elastic_transform", "contrast")
N_FIT, N_TEST, SEED, SHIFT_SEED = 500, 2000, 0, 7
BEHIND = 2500
"""Images that other tables report on come first in the same order."""


def parts_of(units: tuple[Unit, ...]) -> dict[str, list[tuple[Unit, ...]]]:
    """The units that each part lacks, by how parts are made."""
    one = random.Random(SEED).sample(units, min(8, len(units)))
    parts: dict[str, list[tuple[Unit, ...]]] = {"one block": [(unit,) for unit in one]}
    return parts | {f"skip {share}": [drawn(units, share, SEED, i) for i in range(6)] for share in (0.1, 0.2)}


def rows_of(model: str, shift: str) -> list[dict[str, Any]]:
    """All ways for one model and shift."""
    pixels, labels = cifar()
    order = np.random.default_rng(SEED).permutation(len(pixels))[BEHIND : BEHIND + N_FIT + N_TEST]
    pixels, truth = pixels[order], torch.from_numpy(labels[order])[N_FIT:]
    pixels = pixels if shift == "none" else corrupted(pixels, shift, 5, SHIFT_SEED)
    opened = open_model(f"{DATA / 'zoo.py'}:{model}")
    few, test = (open_samples(part, opened.preprocessing) for part in (pixels[:N_FIT], pixels[N_FIT:]))
    net = Norm().adapt(to_fast_format(clone(opened.module).eval()), few).model
    whole, wanted = predictions_of(net, few, 250), predictions_of(net, test, 250)
    known = {"model": model, "shift": shift, "accuracy": percent((wanted.argmax(-1) == truth).double().mean())}
    rows = [known | {"parts": "none", "ece": percent(calibration_error(wanted, truth))}]
    for name, parts in parts_of(Block().find(net, few.batch(slice(0, 2))).units).items():
        for batch, answered in ((True, answers_by_batch), (False, predictions_of)):
            answers = []
            for left_out in parts:
                with skipped(net, left_out):
                    answers.append(answered(net, few, 64).argmax(-1))
            alike = torch.cat(answers) == whole.argmax(-1).repeat(len(parts))
            temperatures = {
                "median": statistics.median(fit_temperature(whole, one) for one in answers),
                "all": fit_temperature(whole.repeat(len(parts), 1), torch.cat(answers)),
            }
            facts = {
                "parts": name,
                "statistics": "batch" if batch else "held",
                "agreement": percent(alike.double().mean()),
            }
            for of, temperature in temperatures.items():
                error = calibration_error(wanted / max(1.0, temperature), truth)
                rows.append(known | facts | {"of": of, "temperature": round(temperature, 2), "ece": percent(error)})
    return rows


def percent(value: float | torch.Tensor) -> float:
    return round(100 * float(value), 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=("resnet20",))
    parser.add_argument("--shift", nargs="+", choices=SHIFTS, default=SHIFTS)
    args = parser.parse_args()
    require_data("zoo.py", "cifar10_jpeg/test.npz")
    rows = []
    for model in args.model:
        for shift in args.shift:
            rows += cached(f"agreement/{model}-{shift}", functools.partial(rows_of, model, shift), stamped=True)
            print(*(row for row in rows if row["shift"] == shift), sep="\n", flush=True)
    print(write_csv("agreement.csv", with_earlier("agreement.csv", rows, ("model", "shift"))))


if __name__ == "__main__":
    main()
