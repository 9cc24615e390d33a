"""What all tests share: one thread, no network, and tiny models that are built once."""

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner, Result

os.environ["HF_HUB_OFFLINE"] = "1"  # read on import: a name that does not exist is not asked for again and again

from ttmpd.cli import app as cli
from ttmpd.data.samples import Samples
from ttmpd.demo.digits import demo_data
from ttmpd.latency import table as savings
from ttmpd.latency import timing
from ttmpd.records import Unit
from ttmpd.testing.tiny_models import tiny_model, tiny_samples, tiny_units


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def net() -> nn.Module:
    return tiny_model()


@pytest.fixture
def samples() -> Samples:
    return tiny_samples()


@pytest.fixture
def units(net: nn.Module) -> tuple[Unit, ...]:
    return tiny_units(net)


@pytest.fixture
def quick_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rounds of timing, and no least duration."""
    true = timing.interleaved

    def interleaved(candidates: Any, **settings: Any) -> timing.Timings:
        return true(candidates, **settings | {"rounds": 5, "warmup": 1, "min_seconds": 0.0})

    monkeypatch.setattr(savings, "interleaved", interleaved)
    monkeypatch.setattr(timing, "interleaved", interleaved)


@pytest.fixture(scope="session")
def run() -> Callable[..., Result]:
    """The command line in this process; what is no exit is raised."""

    def run(*arguments: object) -> Result:
        found = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
        if found.exception is not None and not isinstance(found.exception, SystemExit):
            raise found.exception
        return found

    return run


@pytest.fixture(scope="session")
def said() -> Callable[[Result], str]:
    """Everything that was printed, without the line breaks and frames that depend on the width."""
    return lambda found: " ".join((found.stdout + found.stderr).replace("│", " ").split())


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits of the place of use with their labels, 150 of them."""
    path = tmp_path_factory.mktemp("data") / "digits.npz"
    found = demo_data()
    np.savez(path, x=found.x[:150], y=found.y[:150])
    return path


WORDS = (
    "the", "a", "film", "book", "story", "plot", "was", "is", "and", "not", "very", "good", "bad", "fine",
    "dull", "long", "short", "old", "new", "one", "two",
)  # fmt: skip


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Hugging Face directories of tiny text models with random weights, each with a tokenizer of ``WORDS``."""
    hf = pytest.importorskip("transformers")
    known: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in known:
            known[name] = tmp_path_factory.mktemp("hf") / name
            with torch.random.fork_rng():
                torch.manual_seed(0)
                save_text_model(hf, name, known[name])
        return known[name]

    return folder


def save_text_model(hf: Any, name: str, folder: Path) -> None:
    """One of bert, roberta, distilbert, gpt2 and llama as a classifier of three classes, in its own ways of padding.

    "NAME-next" answers what follows each token, "NAME-token" a class for each.
    """
    name, _, task = name.partition("-")
    decoder = name in ("gpt2", "llama")
    tokenizer = word_tokenizer(hf, decoder)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    shared = {"vocab_size": len(tokenizer), "num_labels": 3, "pad_token_id": tokenizer.pad_token_id} | ids
    small = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
    config = {
        "bert": lambda: hf.BertConfig(**small, max_position_embeddings=40, **shared),
        "roberta": lambda: hf.RobertaConfig(**small, max_position_embeddings=40, **shared),
        "distilbert": lambda: hf.DistilBertConfig(
            dim=16, n_layers=4, n_heads=2, hidden_dim=32, max_position_embeddings=40, **shared
        ),
        "gpt2": lambda: hf.GPT2Config(n_embd=16, n_layer=4, n_head=2, n_positions=40, **shared),
        "llama": lambda: hf.LlamaConfig(**small, num_key_value_heads=1, max_position_embeddings=40, **shared),
    }[name]()
    config.initializer_range = 0.3  # random layers that do something
    ends = {"": "SequenceClassification", "next": "CausalLM", "token": "TokenClassification"}
    model = getattr(hf, f"AutoModelFor{ends[task]}").from_config(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def word_tokenizer(hf: Any, decoder: bool) -> Any:
    """One token a word; encoders mark both ends and pad with [PAD], decoders only know where a text ends."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    special = ["<|end|>", "[UNK]"] if decoder else ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    built = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*special, *WORDS])}, unk_token="[UNK]"))
    built.normalizer, built.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    if decoder:
        return hf.PreTrainedTokenizerFast(tokenizer_object=built, unk_token="[UNK]", eos_token="<|end|>")
    built.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 2), ("[SEP]", 3)])
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return hf.PreTrainedTokenizerFast(tokenizer_object=built, **names)


@pytest.fixture(scope="session")
def sentences() -> Callable[..., list[str]]:
    """A function that makes different random sentences of ``WORDS``."""

    def make(n: int, seed: int = 0, longest: int = 12) -> list[str]:
        rng = random.Random(seed)
        found: dict[str, None] = {}
        while len(found) < n:
            found[" ".join(rng.choices(WORDS, k=rng.randint(2, longest)))] = None
        return list(found)

    return make
