"""Text as ids: tokenizers, padding, the mask hook; answers and fits never depend on the padding that follows."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from text_models import KINDS, Folder, opened_text_model
from ttmpd.data.open import open_samples
from ttmpd.data.preprocessing import preparation_from
from ttmpd.data.tokenization import Tokenization
from ttmpd.errors import InvalidValueError, ModelError, SamplesError
from ttmpd.models.config import preprocessing_of, set_padding
from ttmpd.models.open import open_model
from ttmpd.models.run import predict
from ttmpd.models.tokens import mask_of

# --- the record


def test_a_tokenization_survives_a_round_trip() -> None:
    given = Tokenization("org/name", 3, 64, 512, "token")
    assert preparation_from(json.loads(json.dumps(given.to_dict()))) == given
    assert Tokenization.from_dict({"tokenizer": "a", "padding": 0, "other": 1}) == Tokenization("a", 0)


@pytest.mark.parametrize(
    ("data", "word"),
    [
        ({"tokenizer": "a", "padding": 0, "task": "translation"}, "task must be one of sequence, token, next"),
        ({"tokenizer": "a", "padding": -1}, "padding must be"),
        ({"tokenizer": "a", "padding": 0, "max_length": 3}, "max_length"),
        ({"tokenizer": "a", "padding": 0, "max_length": 65, "limit": 64}, "from 4 to 64"),
        ({"tokenizer": "a"}, "id of its padding"),
        ({"tokenizer": "a", "padding": None}, "id of its padding"),
    ],
)
def test_a_tokenization_checks_itself(data: dict[str, Any], word: str) -> None:
    with pytest.raises(InvalidValueError, match=word):
        Tokenization.from_dict(data)


def test_texts_become_ids_and_text_again(text_folder: Folder) -> None:
    how = opened_text_model(text_folder, "bert").preprocessing
    assert isinstance(how, Tokenization)
    how = dataclasses.replace(how, max_length=5)
    (short, cut), (exact, exact_cut), (long, long_cut) = how.encode(
        ["the FILM", "the film was", "the film was not dull"]
    )
    assert (len(short), len(exact), len(long)) == (4, 5, 5)
    assert (cut, exact_cut, long_cut) == (False, False, True)
    assert (int(long[0]), int(long[-1])) == (2, 3)  # [CLS] and [SEP] stay where a text is cut
    assert how.text_of(F.pad(short, (0, 3), value=0)) == "the film"
    assert how.encode([]) == []


# --- opening


@pytest.mark.parametrize("name", KINDS)
def test_text_models_open_with_their_tokenizer(text_folder: Folder, name: str) -> None:
    opened = opened_text_model(text_folder, name)
    limit = 39 if name == "roberta" else 40  # its positions count from behind the padding's
    assert opened.preprocessing == Tokenization(str(text_folder(name)), 0, limit, limit)
    assert opened.rebuildable
    assert opened.class_names == ("LABEL_0", "LABEL_1", "LABEL_2")
    assert mask_of(opened.module) is not None
    assert mask_of(open_model(opened.id, pretrained=False).module) is not None
    assert not opened.module.training
    with torch.no_grad():  # parts of such a call may be run again: nothing is kept for a next one
        answer = opened.module(torch.tensor([[5, 6, 7]]))
    assert not any(hasattr(value, "get_seq_length") for value in answer.values())
    longest = torch.full((2, limit), 5)
    assert predict(opened.module, longest).shape == (2, 3)


def test_a_model_stays_the_one_of_its_library(text_folder: Folder, tmp_path: Path) -> None:
    hf = pytest.importorskip("transformers")
    opened = opened_text_model(text_folder, "bert")
    stock = hf.BertForSequenceClassification.from_pretrained(text_folder("bert"))
    assert type(opened.module) is type(stock)
    assert opened.module.state_dict().keys() == stock.state_dict().keys()
    opened.module.save_pretrained(tmp_path / "again")
    again = hf.BertForSequenceClassification.from_pretrained(tmp_path / "again").eval()
    ids = torch.tensor([[2, 6, 7, 3]])
    logits = again(ids, attention_mask=torch.ones_like(ids)).logits
    torch.testing.assert_close(logits, predict(opened.module, ids), atol=1e-6, rtol=1e-5)  # masked attention may round


def test_a_module_without_a_tokenizer_takes_token_ids(text_folder: Folder) -> None:
    hf = pytest.importorskip("transformers")
    stock = hf.BertForSequenceClassification.from_pretrained(text_folder("bert")).eval()
    ids = torch.tensor([[2, 6, 7, 3], [2, 5, 3, 0]])
    with pytest.raises(SamplesError, match="int64"):  # numbers, as far as anybody knows
        open_samples(ids, open_model(stock).preprocessing)
    stock.pretrained_cfg = {"tokenizer": "", "padding": 0, "max_length": 8}
    opened = open_model(stock)
    samples = open_samples(ids, opened.preprocessing)
    wanted = stock(ids, attention_mask=(ids != 0).long()).logits
    torch.testing.assert_close(predict(opened.module, samples.batch(slice(None))), wanted, atol=1e-5, rtol=1e-4)
    with pytest.raises(ModelError, match="or give token ids"):
        open_samples(["a film"], opened.preprocessing)


def test_half_precision_becomes_single(text_folder: Folder, tmp_path: Path) -> None:
    hf = pytest.importorskip("transformers")
    hf.AutoModelForSequenceClassification.from_pretrained(text_folder("bert")).half().save_pretrained(tmp_path)
    hf.AutoTokenizer.from_pretrained(text_folder("bert")).save_pretrained(tmp_path)
    assert {p.dtype for p in open_model(f"hf:{tmp_path}").module.parameters()} == {torch.float32}


def test_a_length_can_be_asked_for(text_folder: Folder) -> None:
    opened = opened_text_model(text_folder, "bert")
    shorter = opened.reading(16)
    assert shorter.preprocessing == dataclasses.replace(opened.preprocessing, max_length=16)  # type: ignore[type-var]
    assert preprocessing_of(shorter.module) == opened.preprocessing  # the module is the user's
    assert opened.reading(None) is opened
    with pytest.raises(InvalidValueError, match="from 4 to 40"):
        opened.reading(41)
    with pytest.raises(InvalidValueError, match="takes no text"):
        open_model(nn.Linear(2, 2)).reading(16)


def test_tokenizers_that_cannot_be_used_are_refused(text_folder: Folder, tmp_path: Path) -> None:
    hf = pytest.importorskip("transformers")
    for name, files, word in (
        ("broken", {"tokenizer.json": "{"}, "cannot be loaded"),
        ("wordless", {"tokenizer_config.json": '{"tokenizer_class": "BertTokenizer"}'}, "knows no words"),
    ):
        hf.AutoModelForSequenceClassification.from_pretrained(text_folder("bert")).save_pretrained(tmp_path / name)
        for file, content in files.items():
            (tmp_path / name / file).write_text(content)
        with pytest.raises(ModelError, match=rf"must hold a tokenizer.*{word}.*tokenizer\.json"):
            open_model(f"hf:{tmp_path / name}")


def test_a_body_without_a_head_is_refused(text_folder: Folder, tmp_path: Path) -> None:
    hf = pytest.importorskip("transformers")
    hf.AutoModel.from_pretrained(text_folder("bert")).save_pretrained(tmp_path)
    hf.AutoTokenizer.from_pretrained(text_folder("bert")).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"missing.*classifier"):
        open_model(f"hf:{tmp_path}")


def test_a_tokenizer_without_any_end_is_refused(text_folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    class Bare:
        pad_token_id = eos_token_id = None

    class Config:
        pad_token_id, eos_token_id, vocab_size = -1, None, 10

    monkeypatch.setattr("ttmpd.models.config.load_tokenizer", lambda _place: Bare())
    with pytest.raises(ModelError, match="pad_token"):
        set_padding(Config(), "place")
    monkeypatch.setattr(Bare, "pad_token_id", 10)  # no row of the embedding
    monkeypatch.setattr(Bare, "eos_token_id", 9)
    config = Config()
    set_padding(config, "place")
    assert config.pad_token_id == 9


def test_a_module_of_ones_own_says_how_it_wants_text(text_folder: Folder) -> None:
    hf = pytest.importorskip("transformers")
    net = hf.BertForSequenceClassification.from_pretrained(text_folder("bert"))
    net.pretrained_cfg = {"tokenizer": str(text_folder("bert")), "max_length": 16}
    opened = open_model(net)
    assert opened.preprocessing == Tokenization(str(text_folder("bert")), 0, 16, 40)
    assert mask_of(opened.module) is not None
    assert mask_of(net) is None
    assert open_model(opened.module).module is opened.module
