"""Input that breaks a rule: the message says the rule, the value and the next step, without a traceback."""

from pathlib import Path

import numpy as np
import pytest

from ttmpd.cli.commands import _reporting


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with things that are not what is asked for."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "file").touch()
    (folder / "labels.csv").write_text("file,label\n0,cat\n")
    (folder / "columns.csv").write_text("name,class\n0,1\n")
    np.save(folder / "floats.npy", np.zeros((20, 3, 8, 8), dtype=np.float32))
    np.save(folder / "single.npy", np.zeros((1, 8, 8), dtype=np.uint8))
    (folder / "empty").mkdir()
    (folder / "images").mkdir()
    (folder / "images" / "broken.png").write_bytes(b"no image")
    return folder


COMPRESS = [
    (("--data", "{place}/nowhere"), "does not exist; check the path"),
    (("--data", "{place}/images"), "broken.png: cannot be read as an image"),
    (("--data", "{place}/empty"), "{place}/empty' (it is empty); pass a folder"),
    (("--data", "{place}/single.npy"), "at least"),
    (("--model", "resnet50"), "a model id must be one of timm:NAME"),
    (("--model", "timm:resnet51"), "did you mean"),
    (("--model", "{factory}:broken"), "raised OSError: no network"),
    (("--model", "{factory}:nan", "--data", "{place}/floats.npy"), "NaN or infinity"),
    (("--model", "{factory}:plain", "--data", "{place}/floats.npy"), "none was found"),
    (("--model", "{place}/images"), "not written by ttmpd"),
    (("--weights", "{data}"), "must be a .safetensors file"),
    (("--adapt", "magic"), "adapt must be one of eata, "),
    (("--select", "magic"), "select must be one of eata, el2n, forgetting, grand, kcenter, puma, random"),
    (("--select", "puma", "--set", "select.norm=l7"), "norm must be one of l2, linf"),
    (("--set", "score.nothing=1"), "ttmpd must be one of channels, "),
    (("--set", "score.ridge=much"), "must be a float"),
    (("--set", "ridge=1"), "must be VERB.FIELD=VALUE"),
    (("--units", "blocks"), "units must be some of"),
    (("--actions", "explode"), "actions must be some of drop, linear"),
    (("--time-budget", "soon"), "must be like 90s, 10min or 1h"),
    (("--device", "abacus"), "device must be auto, cpu, cuda or mps"),
    (("--holdout", "2"), "holdout must be from 0 to 0.9"),
    (("--output", "{place}/file"), "is a file"),
    (("--output", "/proc/x"), "must be a folder that can be written"),
]


@pytest.mark.parametrize(("options", "words"), COMPRESS, ids=[" ".join(options) for options, _ in COMPRESS])
def test_compress(options, words, place, factory, data, demo, quick, tmp_path, run, said):
    asked = ("--model", demo, "--data", data, "--speedup", 2, "--output", tmp_path / "o", *quick)
    names = {"place": place, "factory": factory, "data": data}
    shown = run("compress", *asked, *(text.format(**names) for text in options))  # the last of two options counts
    refused(shown, words.format(**names), said)


OTHERS = [
    (("compress", "--model", "{demo}", "--data", "{data}", "--latency", "soon", "--output", "{place}/o"), "12ms"),
    (("compress", "--model", "{demo}", "--data", "{data}", "--targets", "1x", "--output", "{place}/o"), "0x and 1x"),
    (("evaluate", "--model", "{demo}", "--data", "{data}", "--labels", "{place}/labels.csv"), "line 2"),
    (("evaluate", "--model", "{demo}", "--data", "{data}", "--labels", "{place}/columns.csv"), "column"),
    (("evaluate", "--model", "{demo}", "--data", "{data}", "--labels", "{place}/images"), "labels must be a .csv"),
    (("evaluate", "--model", "{place}/no", "--data", "{data}"), "a model id must be one of"),
    (("bench", "{place}/no"), "does not exist"),
    (("inspect", "--model", "{demo}", "--no-time", "--units", "blocks"), "units must be some of"),
]


@pytest.mark.parametrize(("arguments", "words"), OTHERS, ids=[f"{line[0]}: {words}" for line, words in OTHERS])
def test_other_commands(arguments, words, place, data, demo, run, said):
    shown = run(*(text.format(place=place, data=data, demo=demo) for text in arguments))
    refused(shown, words, said)


def refused(shown, words, said):
    assert words in said(shown), f"{words!r} is not in {said(shown)!r}"
    assert shown.exit_code == _reporting.FAILED
    assert "Traceback" not in shown.output
    assert shown.stderr
