"""Students as plain Hugging Face directories: what can be said in a configuration, and what cannot."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ttmpd
from reports import small_report
from ttmpd.artifact.write import Result
from ttmpd.data.open import open_samples
from ttmpd.models.open import open_model
from ttmpd.models.opened import OpenedModel
from ttmpd.records import Plan, Removal
from ttmpd.repair.sequential import repaired
from ttmpd.surgery.cut import cut
from ttmpd.surgery.find import find_units

hf = pytest.importorskip("transformers")
TEXTS = ["a good film", "a bad book and a long film", "bad"]
Folder = Callable[[str], Path]
REPORT = small_report(input_shape=(9,))


def opened_with(folder: Path, kinds: list[str]) -> tuple[OpenedModel, Any, list[Any]]:
    opened = open_model(f"hf:{folder}")
    samples = open_samples(TEXTS, opened.preprocessing)
    units = find_units(opened.module, samples.batch(slice(0, 2)), kinds).units
    return opened, samples, list(units)


def saved(opened: OpenedModel, student: nn.Module, removals: list[Removal], folder: Path) -> Path:
    plan = Plan(tuple(removals), 0.0, 2.0, 1.0, 1.0)
    return Result(student, plan, REPORT, (), opened).save(folder) / "transformers"


def answers_alike(folder: Path, auto: Any, student: nn.Module) -> Any:
    """The stock model in ``folder``; it answers like the student on real text, padding included."""
    stock = auto.from_pretrained(folder).eval()
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    padded = tokenizer.pad_token is not None
    for texts in [TEXTS] if padded else [[text] for text in TEXTS]:
        tokens = tokenizer(texts, padding=padded, return_tensors="pt")
        wanted = {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}
        with torch.no_grad():
            torch.testing.assert_close(stock(**wanted).logits, student(**wanted).logits, atol=1e-4, rtol=1e-4)
    return stock.config


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "gpt2", "llama"])
def test_whole_layers_gone(text_folder: Folder, tmp_path: Path, name: str) -> None:
    opened, _, units = opened_with(text_folder(name), ["block"])
    removals = [Removal(units[1], "drop"), Removal(units[2], "drop")]
    student = cut(opened.module, removals).eval()
    folder = saved(opened, student, removals, tmp_path / "out")
    config = answers_alike(folder, hf.AutoModelForSequenceClassification, student)
    assert config.num_hidden_layers == 2
    assert f"{type(student).__name__}.from_pretrained" in (tmp_path / "out" / "README.md").read_text()
    assert ttmpd.load(tmp_path / "out") is not None


def test_a_decoder_without_a_layer(text_folder: Folder, tmp_path: Path) -> None:
    opened, _, units = opened_with(text_folder("llama-next"), ["block"])
    removals = [Removal(units[0], "drop")]
    student = cut(opened.module, removals).eval()
    folder = saved(opened, student, removals, tmp_path / "out")
    assert hf.AutoModelForCausalLM.from_pretrained(folder).config.num_hidden_layers == 3


@pytest.mark.parametrize("name", ["bert", "distilbert", "gpt2", "llama"])
def test_all_layers_narrowed_alike(text_folder: Folder, tmp_path: Path, name: str) -> None:
    opened, samples, units = opened_with(text_folder(name), ["block", "neuron"])
    gone = next(unit for unit in units if unit.kind == "block")
    narrowed = [u for u in units if u.kind == "neuron" and not u.path.startswith(f"{gone.path}.")]
    removals = [Removal(gone, "drop")] + [Removal(u, "narrow", tuple(range(1, 17))) for u in narrowed]
    student = repaired(opened.module, removals, samples)
    folder = saved(opened, student, removals, tmp_path / "out")
    config = answers_alike(folder, hf.AutoModelForSequenceClassification, student)
    assert config.num_hidden_layers == 3
    assert 16 in [getattr(config, key, None) for key in ("intermediate_size", "hidden_dim", "n_inner")]


def test_heads_where_their_size_is_a_word_of_its_own(tmp_path: Path, text_folder: Folder) -> None:
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=4,
        intermediate_size=32, pad_token_id=0, num_labels=3, initializer_range=0.3,
    )  # fmt: skip
    hf.AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "llama")
    hf.AutoTokenizer.from_pretrained(text_folder("llama")).save_pretrained(tmp_path / "llama")
    opened, _, units = opened_with(tmp_path / "llama", ["head"])
    removals = [Removal(unit, "narrow", (1,)) for unit in units]  # one group: its key, its value, two queries
    student = cut(opened.module, removals).eval()
    found = answers_alike(
        saved(opened, student, removals, tmp_path / "out"), hf.AutoModelForSequenceClassification, student
    )
    assert (found.num_attention_heads, found.num_key_value_heads, found.head_dim) == (2, 1, 4)
    bert, _, units = opened_with(text_folder("bert"), ["head"])
    removals = [Removal(unit, "narrow", (1,)) for unit in units]  # there the size of a head follows from their number
    assert not saved(bert, cut(bert.module, removals).eval(), removals, tmp_path / "bert").exists()


def test_what_no_configuration_says(text_folder: Folder, tmp_path: Path) -> None:
    opened, samples, units = opened_with(text_folder("bert"), ["block", "neuron"])
    blocks = [unit for unit in units if unit.kind == "block"]
    neurons = [unit for unit in units if unit.kind == "neuron"]
    for number, removals in enumerate(
        (
            [Removal(blocks[1], "linear")],  # a stand-in
            [Removal(neurons[0], "narrow", tuple(range(16)))],  # one layer of four
            [Removal(u, "narrow", tuple(range(8 * (n + 1)))) for n, u in enumerate(neurons[:3])],
        )
    ):
        student = repaired(opened.module, removals, samples)
        assert not saved(opened, student, removals, tmp_path / str(number)).exists()
        assert "transformers.Bert" not in (tmp_path / str(number) / "README.md").read_text()


def test_an_artifact_that_is_replaced_keeps_no_other_student(text_folder: Folder, tmp_path: Path) -> None:
    opened, samples, units = opened_with(text_folder("bert"), ["block"])
    removals = [Removal(units[1], "drop")]
    student = cut(opened.module, removals).eval()
    for _ in range(2):  # over itself, too
        assert saved(opened, student, removals, tmp_path / "out").is_dir()
    removals = [Removal(units[1], "linear")]
    assert not saved(opened, repaired(opened.module, removals, samples), removals, tmp_path / "out").exists()
    assert ttmpd.load(tmp_path / "out") is not None
