"""Models that answer each token: decoders and token classifiers, from their answers to artifacts and evaluation."""

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import ttmpd
from ttmpd.artifact.read import read_artifact
from ttmpd.data.open import open_samples
from ttmpd.data.tokenization import Tokenization
from ttmpd.distill.base import FitContext
from ttmpd.distill.one_time import OneTime
from ttmpd.errors import ModelError, UnsupportedError
from ttmpd.models.modules import clone
from ttmpd.models.open import open_model
from ttmpd.models.run import predict, predictions_of
from ttmpd.models.taps import Tap, find_feature_tap, tapped
from ttmpd.models.tokens import (
    PaddingMask,
    mask_of,
    mask_padding,
    predicted_token_mask,
    prediction_offsets,
)
from ttmpd.pipeline.compress import compress
from ttmpd.pipeline.evaluate import evaluate
from ttmpd.score.ttmpd import TTMPD
from ttmpd.select.random import Random
from ttmpd.students.run import run_student
from ttmpd.surgery.units.block import Block

KINDS = ("gpt2-next", "llama-next", "bert-token")
HEADS = {"gpt2-next": "lm_head", "llama-next": "lm_head", "bert-token": "classifier"}
Folder = Callable[[str], Path]
Sentences = Callable[..., list[str]]


@pytest.mark.parametrize("name", KINDS)
def test_the_task_is_that_of_the_config(text_folder: Folder, name: str) -> None:
    opened = open_model(f"hf:{text_folder(name)}")
    assert isinstance(opened.preprocessing, Tokenization)
    assert opened.preprocessing.task == name.partition("-")[2]
    assert opened.class_names == (() if name.endswith("next") else ("LABEL_0", "LABEL_1", "LABEL_2"))
    kept = open_model(f"hf:{text_folder(name)}", pretrained=False)
    assert type(kept.module) is type(opened.module) and mask_of(kept.module) == mask_of(opened.module)


@pytest.mark.parametrize("name", KINDS)
def test_answers_are_those_of_the_tokens_that_are_there(text_folder: Folder, sentences: Sentences, name: str) -> None:
    opened = open_model(f"hf:{text_folder(name)}")
    samples = open_samples(sentences(5), opened.preprocessing)
    batch = samples.batch(slice(None))
    kept = samples.token_mask(batch)
    assert kept is not None
    with torch.no_grad():
        logits = predict(opened.module, batch)
        whole = opened.module(batch, attention_mask=kept.long()).logits
        wider = predict(opened.module, F.pad(batch, (0, 7), value=0))
    assert torch.equal(logits, whole[kept])
    torch.testing.assert_close(wider, logits, atol=1e-5, rtol=1e-4)
    assert torch.equal(predictions_of(opened.module, samples, 2).shape[0] * torch.ones(()), kept.sum().float())
    tap = find_feature_tap(opened.module, batch)
    assert tap == Tap(HEADS[name], "input", "each")
    with torch.no_grad(), tapped(opened.module, {"f": tap}) as seen:
        predict(opened.module, batch)
    torch.testing.assert_close(opened.module.get_submodule(HEADS[name])(seen["f"]), logits)


def test_of_large_vocabularies_only_some_tokens_count() -> None:
    net = torch.nn.Linear(2, 2)
    net.register_forward_pre_hook(PaddingMask(0, 3), with_kwargs=True)
    batch = torch.tensor([[5, 6, 7, 8, 9, 5, 6], [5, 6, 0, 0, 0, 0, 0], [5, 6, 7, 0, 0, 0, 0], [0] * 7])
    found = predicted_token_mask(net, batch)
    assert found is not None
    assert found.sum(1).tolist() == [3, 2, 3, 0]
    assert found[0].nonzero().flatten().tolist() == [2, 4, 6]
    assert prediction_offsets(net, batch).tolist() == [0, 3, 5, 8, 8]
    assert torch.equal(predicted_token_mask(net, F.pad(batch, (0, 4)))[:, :7], found)  # type: ignore[index]
    assert predicted_token_mask(net, torch.zeros(2, 2)) is None
    assert prediction_offsets(torch.nn.Linear(2, 2), torch.zeros(2, 2)).tolist() == [0, 1, 2]


def test_how_many_tokens_count_hangs_on_the_vocabulary(text_folder: Folder) -> None:
    net = open_model(f"hf:{text_folder('gpt2-next')}").module
    n_small = mask_of(net)
    assert n_small is not None and n_small.n_answers > 10_000
    net.config.vocab_size = 50_000
    mask_padding(net, Tokenization("a", 0, task="next"))
    n_large = mask_of(net)
    assert n_large is not None and n_large.n_answers == 20


@pytest.mark.parametrize("name", KINDS)
def test_scores_do_not_depend_on_padding(text_folder: Folder, sentences: Sentences, name: str) -> None:
    opened = open_model(f"hf:{text_folder(name)}")
    samples = open_samples(sentences(12), opened.preprocessing)
    wider = dataclasses.replace(samples, inputs=F.pad(samples.inputs, (0, 6), value=0))
    found: list[Tensor] = []
    for one in (samples, wider):
        units = Block().find(opened.module, one.batch(slice(0, 2))).units
        found.append(torch.tensor([s.harm for s in TTMPD().score(opened.module, units, one, batch_size=5)]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-2, atol=1e-4)
    assert bool((found[0] > 0).all())


@pytest.mark.parametrize("name", KINDS)
def test_every_token_is_distilled(text_folder: Folder, sentences: Sentences, tmp_path: Path, name: str) -> None:
    opened = open_model(f"hf:{text_folder(name)}")
    samples, held = (
        open_samples(sentences(14), opened.preprocessing),
        open_samples(sentences(5, 1), opened.preprocessing),
    )
    teacher = opened.module
    student = Block().cut(teacher, [Block().find(teacher, samples.batch(slice(0, 2))).units[1]]).eval()
    method, work = OneTime(steps=40, batch_size=4, lr_without_norm=3e-3), FitContext(folder=tmp_path, batch_size=5)
    targets = method.prepare(teacher, samples, held, work)
    n_tokens = int(samples.token_mask(samples.inputs).sum())  # type: ignore[union-attr]
    assert targets.features is not None
    assert targets.features.shape == (1, n_tokens, 16)
    assert targets.logits.shape[:2] == (1, n_tokens)
    torch.testing.assert_close(targets.logits[0], predictions_of(teacher, samples, 3), atol=1e-5, rtol=1e-4)
    before = _divergence(targets.held_out, predictions_of(student, held, 5))
    fit = method.fit(student, samples, held, targets, work)
    assert fit.steps == 40 and not fit.rolled_back
    assert _divergence(targets.held_out, predictions_of(student, held, 5)) < 0.8 * before


def _divergence(teacher: Tensor, student: Tensor) -> float:
    return float(F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="batchmean", log_target=True))


def test_the_loss_compares_each_token_with_its_own_answer(
    text_folder: Folder, sentences: Sentences, tmp_path: Path
) -> None:
    """A student that is the teacher has no loss, whatever samples a step takes in whatever order."""
    opened = open_model(f"hf:{text_folder('llama-next')}")
    samples = open_samples(sentences(11), opened.preprocessing)
    method, work = OneTime(steps=6, batch_size=4, train_norm=False), FitContext(folder=tmp_path, batch_size=3)
    targets = method.prepare(opened.module, samples, samples, work)
    fit = method.fit(clone(opened.module), samples, samples, targets, work)
    assert max(fit.losses) < 1e-4


@pytest.mark.usefixtures("quick_timing")
@pytest.mark.parametrize("name", ["llama-next", "bert-token"])
def test_from_text_to_an_artifact_and_back(
    text_folder: Folder, sentences: Sentences, tmp_path: Path, name: str
) -> None:
    path = tmp_path / "data.txt"
    path.write_text("\n".join(sentences(50)))
    model = f"hf:{text_folder(name)}"
    settings: dict[str, Any] = {"num_samples": 30, "batch_size": 8, "actions": ("drop", "linear"), "units": ("block",)}
    method = OneTime(steps=4, batch_size=8)
    result = compress(model, path, speedup=1.1, output=tmp_path / "out", distill=method, **settings)
    report = result.report
    assert report.task.each == "token"
    assert report.agreement.n > report.samples.n_held_out
    assert report.disagreements == () and report.held_out.names == ()
    assert "held-out tokens" in (tmp_path / "out" / "report.html").read_text()
    loaded = ttmpd.load(tmp_path / "out")
    samples = open_samples(path, read_artifact(tmp_path / "out").preprocessing)
    torch.testing.assert_close(
        predictions_of(loaded, samples, 8), predictions_of(result.model, samples, 8), atol=1e-5, rtol=1e-4
    )
    found = evaluate(tmp_path / "out", path, against=model)
    assert (found.n_left_out, found.each) == (30, "token")
    assert found.agreement is not None
    assert (found.model.loss is None) == (name == "bert-token")
    with pytest.raises(UnsupportedError, match="leave them out"):
        evaluate(tmp_path / "out", path, [0] * 50)


def test_a_decoder_is_measured_by_the_next_token(text_folder: Folder, sentences: Sentences) -> None:
    hf = pytest.importorskip("transformers")
    texts = sentences(6)
    stock = hf.GPT2LMHeadModel.from_pretrained(text_folder("gpt2-next")).eval()
    tokenizer = hf.AutoTokenizer.from_pretrained(text_folder("gpt2-next"))
    total, n, right = 0.0, 0, 0
    for text in texts:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            logits = stock(ids).logits[0, :-1]
        total += float(F.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        right, n = right + int((logits.argmax(-1) == ids[0, 1:]).sum()), n + len(logits)
    found = evaluate(f"hf:{text_folder('gpt2-next')}", texts, batch_size=4)
    assert found.n_samples == n
    assert found.model.loss == pytest.approx(total / n, rel=1e-4)
    assert found.model.accuracy is not None and found.model.accuracy.share == pytest.approx(right / n)


def test_what_needs_one_answer_per_sample_says_so(text_folder: Folder, sentences: Sentences, tmp_path: Path) -> None:
    opened = open_model(f"hf:{text_folder('bert-token')}")
    pool = open_samples(sentences(12), opened.preprocessing)
    with pytest.raises(UnsupportedError, match="use random"):
        ttmpd.EL2N().select(opened.module, pool, 5)
    assert len(Random().select(opened.module, pool, 5)) == 5
    with pytest.raises(UnsupportedError, match="use norm"):
        ttmpd.Tent().adapt(opened.module, pool)
    path = tmp_path / "data.tsv"
    path.write_text("label\ttext\n" + "".join(f"0\t{text}\n" for text in sentences(12)))
    with pytest.raises(UnsupportedError, match="one class per sample"):
        run_student(opened, str(path), path, tmp_path / "out")
    with pytest.raises(UnsupportedError, match="same tokens"):
        evaluate(opened, sentences(3), against=f"hf:{text_folder('gpt2-next')}")


def test_a_model_without_a_tokenizer_takes_ids(text_folder: Folder, tmp_path: Path) -> None:
    hf = pytest.importorskip("transformers")
    hf.LlamaForCausalLM.from_pretrained(text_folder("llama-next")).save_pretrained(tmp_path / "bare")
    opened = open_model(f"hf:{tmp_path / 'bare'}")
    assert opened.preprocessing == Tokenization("", 0, 40, 40, "next")
    rows = [[5, 6, 7, 8], [9, 10], [11, 12, 13]]
    for name, content in (
        ("ids.json", json.dumps(rows)),
        ("ids.jsonl", "\n".join(map(json.dumps, rows))),
        ("named.jsonl", "\n".join(json.dumps({"input_ids": row}) for row in rows)),
    ):
        (tmp_path / name).write_text(content)
        assert open_samples(tmp_path / name, opened.preprocessing).ids == open_samples(rows, opened.preprocessing).ids
    assert evaluate(opened, tmp_path / "ids.json").n_samples == 6
    assert Tokenization("", 0).text_of(torch.tensor([5, 6, 0])) == "5 6"
    with pytest.raises(ModelError, match="token ids"):
        open_samples(["a film"], opened.preprocessing)


def test_shortened_decoders_still_generate(text_folder: Folder) -> None:
    opened = open_model(f"hf:{text_folder('llama-next')}")
    ids = torch.tensor([[5, 6, 7]])
    units = Block().find(opened.module, ids.repeat(2, 1)).units
    for gone in (units[:1], units[1:2], units[2:]):
        student = Block().cut(opened.module, list(gone)).eval()
        with torch.no_grad():
            found = student.generate(ids, max_new_tokens=5, do_sample=False, use_cache=True)
            row = ids
            while row.shape[1] < found.shape[1]:
                row = torch.cat([row, student(row).logits[:, -1:].argmax(-1)], 1)
        assert found.shape[1] > 4  # what comes behind the end of a text is left out
        assert found.tolist() == row.tolist()


# --- real data


def test_the_real_decoder_has_its_loss() -> None:
    data = Path(os.environ.get("TTMPD_DATA", Path(__file__).resolve().parents[2] / "../shared/data"))
    if not (data / "stories260k").is_dir():
        pytest.skip(f"no real data at {data}: set TTMPD_DATA")
    opened = open_model(f"hf:{data / 'stories260k'}").reading(512)
    found = evaluate(opened, data / "stories260k" / "stories_ids.json")
    assert found.model.loss == pytest.approx(1.2664, abs=1e-3)
