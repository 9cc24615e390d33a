"""Text through everything: compress, save, load in a fresh process, evaluate, inspect, bench, adapt."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ttmpd
from reports import small_report
from ttmpd.artifact.read import open_artifact, read_artifact
from ttmpd.artifact.read_report import read_report
from ttmpd.artifact.write import Result
from ttmpd.cli.commands._reporting import TARGET_MISSED
from ttmpd.data.open import by_length, open_samples
from ttmpd.data.tokenization import Tokenization
from ttmpd.distill.one_time import OneTime
from ttmpd.errors import InvalidValueError, SamplesError, UnsupportedError
from ttmpd.models.example import example_batch
from ttmpd.models.macs import count_macs
from ttmpd.models.open import open_model
from ttmpd.models.run import predict, predictions_of
from ttmpd.models.tokens import mask_of
from ttmpd.pipeline.bench import bench
from ttmpd.pipeline.compress import compress
from ttmpd.pipeline.evaluate import evaluate
from ttmpd.pipeline.inspect import inspect
from ttmpd.pipeline.preparation import latency_batch
from ttmpd.pipeline.settings import Settings
from ttmpd.records import Plan, Removal
from ttmpd.repair.sequential import repaired
from ttmpd.surgery.units.block import Block

KINDS = ("bert", "roberta", "distilbert", "gpt2", "llama")
Folder = Callable[[str], Path]
Sentences = Callable[..., list[str]]

TEXTS = ["the film was good", "a dull plot and not very long"]
FRESH = """
import sys, json, torch, ttmpd
from ttmpd.artifact.read import read_artifact
for folder in sys.argv[2:]:
    samples = ttmpd.open_samples(json.loads(sys.argv[1]), read_artifact(folder).preprocessing)
    with torch.no_grad():
        print(json.dumps(ttmpd.load(folder)(samples.batch(slice(None))).logits.tolist()))
"""


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory, sentences: Sentences) -> Path:
    """Sixty sentences with labels."""
    path = tmp_path_factory.mktemp("text") / "data.tsv"
    texts = sentences(60, longest=20)
    path.write_text("label\tsentence\n" + "".join(f"{i % 3}\t{text}\n" for i, text in enumerate(texts)))
    return path


def _compressed(folder: Path, table: Path, output: Path) -> Result:
    given: dict[str, Any] = {"num_samples": 40, "batch_size": 8, "distill": OneTime(steps=4, batch_size=8)}
    opened = open_model(f"hf:{folder}").reading(16)
    given |= {"actions": ("drop", "linear"), "units": ("block",)}
    return compress(opened, table, speedup=1.1, output=output, **given)


@pytest.mark.usefixtures("quick_timing")
@pytest.mark.parametrize("name", KINDS)
def test_from_text_to_an_artifact_and_back(text_folder: Folder, table: Path, tmp_path: Path, name: str) -> None:
    result = _compressed(text_folder(name), table, tmp_path / "out")
    report = result.report
    assert result.plan.removals
    assert type(result.model) is type(open_model(f"hf:{text_folder(name)}").module)
    assert report.samples.tokens.longest <= 16
    assert report.samples.input_shape[0] <= report.samples.tokens.longest
    assert ("longer than 16 tokens, of which the first were read") in dict(report.samples.notes)
    assert len(result.sample_ids) == 40
    assert read_report(tmp_path / "out").samples == report.samples

    opened = open_artifact(tmp_path / "out")
    assert opened.preprocessing == Tokenization(str(text_folder(name)), 0, 16, 39 if name == "roberta" else 40)
    torch.testing.assert_close(_logits(opened.module), _logits(result.model), atol=1e-5, rtol=1e-5)
    found = evaluate(tmp_path / "out", table, table, against=f"hf:{text_folder(name)}")
    assert (found.n_samples, found.n_left_out) == (20, 40)
    assert found.model.accuracy is not None and found.agreement is not None


@pytest.mark.usefixtures("quick_timing")
def test_operations_are_counted_on_what_is_timed(text_folder: Folder, sentences: Sentences) -> None:
    # One sample is far longer than the four on which latency is measured: attention would have another share there.
    texts = [*sentences(20, longest=4), " ".join(sentences(30, longest=4))]
    opened = open_model(f"hf:{text_folder('bert')}").reading(40)
    given: dict[str, Any] = {
        "num_samples": 21,
        "holdout": 0.1,
        "batch_size": 1,
        "distill": OneTime(steps=1, batch_size=8),
    }
    found = compress(opened, texts, macs="0.8x", units="neuron", score="magnitude", **given)
    batch = torch.randint(5, 20, (1, *found.report.samples.input_shape))
    left = count_macs(found.model, batch)[""] / count_macs(opened.module, batch)[""]
    assert left == pytest.approx(found.report.student.macs / found.report.model.macs, rel=1e-3)
    narrowed = [unit for unit in found.report.units if unit.action == "narrow"]
    assert narrowed
    for unit in narrowed:
        left_ms = next(width.ms for width in unit.widths if width.n_kept == unit.n_kept)
        assert unit.saved_ms == pytest.approx(unit.ms - left_ms)
    assert found.met


def _logits(net: nn.Module) -> Tensor:
    samples = open_samples(TEXTS, open_model(net).preprocessing)
    with torch.no_grad():
        return predict(net.eval(), samples.batch(slice(None)))


@pytest.fixture(scope="module")
def artifacts(text_folder: Folder, table: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each kind of model without its second layer, made from ten sentences, without a clock."""
    found = {}
    for name in KINDS:
        opened = open_model(f"hf:{text_folder(name)}").reading(16)
        samples = open_samples(table, opened.preprocessing, num_samples=10)
        removals = (Removal(Block().find(opened.module, samples.batch(slice(0, 2))).units[1], "linear"),)
        report = small_report(input_shape=(11,), batch_size=4)
        student = repaired(opened.module, removals, samples)
        plan, folder = Plan(removals, 0.0, 2.0, 1.0, 1.0), tmp_path_factory.mktemp("artifact") / name
        Result(model=student, plan=plan, opened=opened, sample_ids=samples.ids, report=report).save(folder)
        found[name] = folder
    return found


@pytest.fixture(scope="module")
def artifact(artifacts: dict[str, Path]) -> Path:
    return artifacts["bert"]


def test_artifacts_load_in_a_fresh_process(artifacts: dict[str, Path]) -> None:
    command = [sys.executable, "-c", FRESH, json.dumps(TEXTS), *artifacts.values()]
    fresh = subprocess.run(command, capture_output=True, text=True, check=True)
    answers = [json.loads(line) for line in fresh.stdout.splitlines() if line.startswith("[[")]
    for folder, found in zip(artifacts.values(), answers, strict=True):
        torch.testing.assert_close(torch.tensor(found), _logits(ttmpd.load(folder)), atol=1e-5, rtol=1e-5)


def test_a_loaded_model_says_how_it_reads(artifact: Path, table: Path, text_folder: Folder) -> None:
    net = ttmpd.load(artifact)
    assert mask_of(net) is not None
    by_module, by_folder = evaluate(net, table, table), evaluate(artifact, table, table)
    assert by_module.n_samples == 60  # a plain module does not know which samples it was made of
    assert (by_folder.n_samples, by_folder.n_left_out) == (50, 10)
    assert dict(by_module.notes)["longer than 16 tokens, of which the first were read"] > 0
    hf = pytest.importorskip("transformers")
    stock = hf.BertForSequenceClassification.from_pretrained(text_folder("bert"))
    again = ttmpd.load(artifact, model=stock)
    assert mask_of(again) is not None and mask_of(stock) is None
    assert read_artifact(artifact).preprocessing == open_model(again).preprocessing


def test_accuracy_is_that_of_the_plain_library(text_folder: Folder, table: Path) -> None:
    hf = pytest.importorskip("transformers")
    stock = hf.RobertaForSequenceClassification.from_pretrained(text_folder("roberta")).eval()
    tokenizer = hf.AutoTokenizer.from_pretrained(text_folder("roberta"))
    rows = [line.split("\t") for line in table.read_text().splitlines()[1:]]
    batch = tokenizer([text for _, text in rows], padding=True, truncation=True, max_length=39, return_tensors="pt")
    with torch.no_grad():
        answers = stock(**batch).logits.argmax(-1)
    share = sum(int(a) == int(label) for a, (label, _) in zip(answers, rows, strict=True)) / len(rows)
    found = evaluate(f"hf:{text_folder('roberta')}", table, table, batch_size=7)
    assert found.model.accuracy is not None
    assert found.model.accuracy.share == pytest.approx(share)


def test_models_with_other_tokenizers_are_compared(text_folder: Folder, table: Path, artifact: Path) -> None:
    found = evaluate(artifact, table, table, against=f"hf:{text_folder('gpt2')}")
    assert found.n_left_out == 10  # known by their text, not by their tokens
    assert found.against is not None and found.agreement is not None


def test_latency_is_that_of_the_samples_own_lengths(text_folder: Folder, sentences: Sentences) -> None:
    opened = open_model(f"hf:{text_folder('bert')}")
    texts = ["good film"] * 4 + sentences(4, longest=20)
    samples = open_samples(texts, opened.preprocessing)
    assert samples.inputs.shape[1] > 4
    assert latency_batch(opened.module, samples.subset(range(4)), Settings(batch_size=4)).shape == (4, 4)
    assert latency_batch(opened.module, samples, Settings(batch_size=16)).shape == (16, samples.inputs.shape[1])
    assert example_batch(opened, texts[:4], 6).shape == (6, 4)


def test_latency_is_that_of_the_same_samples_in_any_order(text_folder: Folder, sentences: Sentences) -> None:
    opened = open_model(f"hf:{text_folder('bert')}")
    samples = open_samples(sentences(20, longest=20), opened.preprocessing)
    settings = Settings(batch_size=8)
    found = [latency_batch(opened.module, some, settings) for some in (samples, by_length(samples, 4))]
    assert torch.equal(*found)


def test_passes_are_no_longer_than_they_must_be(text_folder: Folder) -> None:
    opened = open_model(f"hf:{text_folder('distilbert')}")
    samples = open_samples(["good", "bad film", "the " * 20], opened.preprocessing)
    seen: list[int] = []
    handle = opened.module.register_forward_pre_hook(lambda _m, args: seen.append(args[0].shape[1]))
    whole = predictions_of(opened.module, samples, 1)
    handle.remove()
    assert seen == [3, 4, 22]
    torch.testing.assert_close(whole, predictions_of(opened.module, samples, 3), atol=1e-5, rtol=1e-4)


@pytest.mark.usefixtures("quick_timing")
def test_inspect_and_bench_without_text(text_folder: Folder, artifact: Path, table: Path) -> None:
    opened = open_model(f"hf:{text_folder('bert')}")
    found = inspect(opened, timed=False)
    assert found.input_shape == (40,)
    assert [unit.path for unit in found.units if unit.kind == "block"] == [f"bert.encoder.layer.{i}" for i in range(4)]
    assert inspect(opened, ["good", "bad film"], timed=False).input_shape == (4,)
    seen: list[tuple[int, ...]] = []
    forward = type(opened.module).forward

    def noting(self: Any, input_ids: Tensor, **kwargs: Any) -> Any:
        seen.append(tuple(input_ids.shape))
        return forward(self, input_ids, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(opened.module), "forward", noting)
        rows = bench(artifact)
        assert [row.batch_size for row in rows] == [1, 4]
        assert set(seen) == {(1, 11), (4, 11)}  # the width of the batch that was timed when it was made
        seen.clear()
        bench(artifact, batch_sizes=[2], samples=["good", "bad film"])
        assert set(seen) == {(2, 4)}


def test_adapting_a_text_model(text_folder: Folder, table: Path, tmp_path: Path) -> None:
    found = ttmpd.adapt_to(
        f"hf:{text_folder('distilbert')}", table, output=tmp_path / "out", adapt=ttmpd.Tent(), batch_size=8
    )
    assert "trained without labels" in found.report.adaptation.note
    assert evaluate(tmp_path / "out", ["a film", "a book"]).n_samples == 2


@pytest.mark.parametrize("select", ["EL2N", "GraNd", "KCenter", "Reliable", "Forgetting"])
def test_selectors_choose_texts(text_folder: Folder, sentences: Sentences, select: str) -> None:
    opened = open_model(f"hf:{text_folder('llama')}")
    pool = open_samples(sentences(20), opened.preprocessing)
    method = getattr(ttmpd, select)()
    chosen = method.select(opened.module, pool, 5, batch_size=8)
    assert len(set(chosen)) == 5


def test_what_text_cannot_do_says_so(text_folder: Folder, sentences: Sentences) -> None:
    opened = open_model(f"hf:{text_folder('bert')}")
    pool = open_samples(sentences(8), opened.preprocessing)
    with pytest.raises(UnsupportedError, match="text cannot"):
        ttmpd.PUMA().select(opened.module, pool, 2)
    with pytest.raises(UnsupportedError, match="takes text"):
        ttmpd.OnlineService(opened, speedup=1.5)
    with pytest.raises(SamplesError, match="text"):
        compress(opened, torch.zeros(8, 3, 8, 8), speedup=1.5)


@pytest.mark.usefixtures("quick_timing")
def test_the_commands_take_text(
    run: Callable[..., Any], said: Callable[[Any], str], text_folder: Folder, table: Path, tmp_path: Path
) -> None:
    model, out = f"hf:{text_folder('bert')}", tmp_path / "out"
    made = run(
        "compress", "--model", model, "--data", table, "--speedup", 1.1, "--num-samples", 40, "--batch-size", 8,
        "--steps", 2, "--actions", "drop,linear", "--max-length", 16, "--output", out,
    )  # fmt: skip
    assert made.exit_code in (0, TARGET_MISSED), said(made)  # milliseconds are this machine's
    plan = json.loads((out / "plan.json").read_text())
    assert plan["preprocessing"] == {
        "tokenizer": str(text_folder("bert")),
        "padding": 0,
        "max_length": 16,
        "limit": 40,
        "task": "sequence",
    }
    page = (out / "report.html").read_text()
    assert "Tokens per sample" in page and "of which the first were read" in page
    disagreements = json.loads((out / "report.json").read_text())["disagreements"]
    assert all(item["text"] and item["text"] in page for item in disagreements)
    told = run("evaluate", "--model", out, "--data", table, "--labels", table, "--against", model, "--json", out / "e")
    assert told.exit_code == 0 and "accuracy" in said(told) and "40 samples left out" in said(told)
    assert "longer than 16 tokens" in said(told)
    short = run("evaluate", "--model", model, "--data", table, "--max-length", 8)
    assert "longer than 8 tokens" in said(short)
    wrong = run("evaluate", "--model", model, "--data", table, "--max-length", 99)
    assert wrong.exit_code == 1 and "from 4 to 40" in said(wrong)
    found = run("inspect", "--model", model, "--no-time")
    assert found.exit_code == 0 and "bert.encoder.layer.0" in said(found)


def test_a_length_is_part_of_what_a_run_is(text_folder: Folder, table: Path, tmp_path: Path) -> None:
    """Stages of a run with another length are not taken over."""
    from ttmpd.pipeline.run import analyzed

    settings = Settings(num_samples=20, batch_size=8, actions=("drop",))
    opened = open_model(f"hf:{text_folder('bert')}")
    names = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ttmpd.pipeline.run.analyze", lambda *_: None)
        patch.setattr("ttmpd.pipeline.run.Stages", lambda _folder, run, *_: names.append(run))
        for length in (8, 8, 12):
            with analyzed(opened.reading(length), table, settings, tmp_path / str(len(names))):
                pass
    assert names[0] == names[1] != names[2]


def test_a_wrong_length_for_a_model_of_images() -> None:
    with pytest.raises(InvalidValueError, match="takes no text"):
        open_model("ttmpd.demo:demo_model").reading(16)


def test_a_student_from_labelled_text(
    run: Callable[..., Any], said: Callable[[Any], str], text_folder: Folder, table: Path, tmp_path: Path
) -> None:
    student, teacher = (f"hf:{text_folder(name)}" for name in ("bert", "gpt2"))
    told = run(
        "train-student", "--student", student, "--teacher", teacher, "--data", table, "--output", tmp_path / "out",
        "--steps", 4, "--batch-size", 8, "--fraction", 0.5,
    )  # fmt: skip
    assert told.exit_code == 0 and "student, accuracy on 9 held-out samples" in said(told)
    assert open_model(student, weights=tmp_path / "out" / "model.safetensors").preprocessing is not None


# --- real data


def test_the_real_classifier_reads_real_sentences(tmp_path: Path) -> None:
    data = Path(os.environ.get("TTMPD_DATA", Path(__file__).resolve().parents[2] / "../shared/data"))
    if not (data / "minilm_sst2").is_dir():
        pytest.skip(f"no real data at {data}: set TTMPD_DATA")
    lines = (data / "sst2" / "test.tsv").read_text(encoding="utf-8").split("\n")
    (tmp_path / "few.tsv").write_text("\n".join(lines[:121]), encoding="utf-8")
    opened = open_model(f"hf:{data / 'minilm_sst2'}").reading(64)
    assert opened.class_names == ("negative", "positive")
    found = evaluate(opened, tmp_path / "few.tsv", tmp_path / "few.tsv")
    assert found.n_samples == 120
    assert found.model.accuracy is not None and found.model.accuracy.share > 0.8
