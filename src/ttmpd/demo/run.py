"""The demo: compress the digits teacher for another scanner, and judge it with labels that compression never saw."""

import dataclasses
from pathlib import Path

from ttmpd.artifact.write import Result
from ttmpd.demo.digits import demo_data
from ttmpd.pipeline.compress import compress
from ttmpd.pipeline.evaluate import Evaluation, evaluate

MODEL = "ttmpd.demo:demo_model"
SPEEDUP, PROMISED = 1.8, 1.5
"""What is asked for, and what must come of it even on a busy machine."""


@dataclasses.dataclass(frozen=True, eq=False)
class DemoOutcome:
    """Result of the demo.

    Args:
        result: of compression.
        shifted: the artifact, loaded again, against the original on held-out digits of the place of use.
        clean: the same on the digits before the shift.
        corruption: the shift in words.
        folder: the artifact.
    """

    result: Result
    shifted: Evaluation
    clean: Evaluation
    corruption: str
    folder: Path

    @property
    def is_fast_enough(self) -> bool:
        """True when the student was measured `PROMISED` times as fast, by the median, as the manual says it is."""
        latency = self.result.report.latency
        return latency is not None and latency.speedup.median >= PROMISED


def run_demo(folder: Path, *, speedup: float = SPEEDUP, seed: int = 0, command: str = "ttmpd demo") -> DemoOutcome:
    """Compress, save, load again and evaluate.

    Args:
        folder: for the artifact.
        speedup: to reach.
        seed: of the run.
        command: recorded in the report.

    Raises:
        MissingPackageError: scikit-learn, which brings the digits, is not installed.
    """
    data = demo_data()
    result = compress(MODEL, data.unlabelled, speedup=speedup, output=folder, seed=seed, command=command)
    shifted, clean = (evaluate(folder, x, data.y.tolist(), against=MODEL) for x in (data.x, data.x_clean))
    return DemoOutcome(result, shifted, clean, data.corruption, folder)
