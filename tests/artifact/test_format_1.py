"""An artifact of format 1, written by 0.1.0, answers as it did then.

``format_1/`` was made on the digits of the demo by ``compress("ttmpd.demo:demo_model", ..., speedup=3.0)``, 10 steps:
blocks dropped and replaced, channels narrowed, batch norms folded. ``outputs.safetensors`` holds eight inputs and what
the student answered.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file

import ttmpd
from ttmpd.artifact.read import open_artifact, read_artifact
from ttmpd.artifact.write import Result
from ttmpd.records import Plan

FOLDER = Path(__file__).parent / "format_1"


def test_it_answers_as_it_did():
    saved = load_file(FOLDER / "outputs.safetensors")
    with torch.no_grad():
        outputs = ttmpd.load(FOLDER)(saved["inputs"])
    torch.testing.assert_close(outputs, saved["outputs"], rtol=1e-4, atol=1e-4)
    assert float(saved["outputs"].abs().max()) > 1


def test_compressed_again_it_is_of_format_2_and_answers_the_same(tmp_path):
    opened = open_artifact(FOLDER)
    result = Result(opened.module, Plan((), 0.0, 0.0, 0.0, 0.0), {}, (), opened)
    result.save(tmp_path / "again")
    assert read_artifact(tmp_path / "again").folded == opened.folded
    inputs = load_file(FOLDER / "outputs.safetensors")["inputs"]
    with torch.no_grad():
        assert torch.equal(ttmpd.load(tmp_path / "again")(inputs), opened.module(inputs))
