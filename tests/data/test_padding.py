"""Padding changes no features, fits, scores or training of text models."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from text_models import KINDS, Folder, opened_text_model
from ttmpd.data.open import open_samples
from ttmpd.data.samples import Samples
from ttmpd.data.tokenization import Tokenization, token_mask, trim_padding
from ttmpd.distill.base import FitContext
from ttmpd.distill.one_time import OneTime
from ttmpd.errors import InvalidValueError
from ttmpd.models.modules import clone
from ttmpd.models.run import predict
from ttmpd.models.taps import Tap, find_feature_tap, find_output_layer, read_taps, tapped
from ttmpd.models.tokens import PaddingMask, mask_of, mask_padding, random_ids
from ttmpd.records import ACTIONS, Removal
from ttmpd.repair.linear import ReplacementFit
from ttmpd.repair.positions import sample_positions
from ttmpd.repair.sequential import repaired
from ttmpd.score.base import ScoringInputs
from ttmpd.score.ttmpd import TTMPD, fit_replacements
from ttmpd.surgery.units.block import Block

ENCODERS = KINDS[:3]
Sentences = Callable[..., list[str]]


def _widened(samples: Samples, by: int = 9) -> Samples:
    """The same samples with more padding."""
    assert samples.padding is not None
    return dataclasses.replace(samples, inputs=F.pad(samples.inputs, (0, by), value=samples.padding))


# --- padding


@pytest.mark.parametrize("name", KINDS)
def test_answers_do_not_depend_on_padding(text_folder: Folder, sentences: Sentences, name: str) -> None:
    opened = opened_text_model(text_folder, name)
    samples = open_samples(sentences(6), opened.preprocessing)
    batch = samples.batch(slice(None))
    assert batch.dtype == torch.int64
    with torch.no_grad():
        wanted = predict(opened.module, batch)
        wider = predict(opened.module, _widened(samples).batch(slice(None)))
        alone = torch.cat([predict(opened.module, trim_padding(row[None], samples.padding)) for row in batch])
    torch.testing.assert_close(wider, wanted, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(alone, wanted, atol=1e-5, rtol=1e-4)
    assert float(wanted.std(0).max()) > 1e-3  # answers differ, or the above would say nothing


def test_a_mask_of_the_caller_wins(text_folder: Folder) -> None:
    net = opened_text_model(text_folder, "bert").module
    ids, all_ones = torch.tensor([[2, 6, 3, 0, 0]]), torch.ones(1, 5, dtype=torch.long)
    with torch.no_grad():
        own = predict(net, ids)
        by_name = net(input_ids=ids).logits
        explicit, positional = net(ids, attention_mask=all_ones).logits, net(ids, all_ones).logits
        masked = net(ids, attention_mask=(ids != 0).long()).logits
    assert torch.equal(own, by_name) and torch.equal(own, masked)
    assert torch.equal(explicit, positional)
    assert not torch.allclose(own, explicit, atol=1e-4)


def test_the_mask_survives_copies_and_comes_once(text_folder: Folder) -> None:
    net = clone(opened_text_model(text_folder, "gpt2").module)
    assert [hook for hook in net._forward_pre_hooks.values() if isinstance(hook, PaddingMask)] == [
        PaddingMask(0, caches=True)
    ]
    mask_padding(net, Tokenization("a", 1))
    assert list(net._forward_pre_hooks.values()) == [PaddingMask(1, caches=True)]
    assert len(net._forward_pre_hooks_with_kwargs) == 1
    plain = mask_padding(nn.Linear(2, 2), Tokenization("a", 0))  # takes no mask
    assert mask_of(plain) is None


def test_kept_and_trimmed() -> None:
    batch = torch.tensor([[5, 0, 6, 0, 0], [7, 0, 0, 0, 0]])
    kept = token_mask(batch, 0)
    assert kept is not None and kept.sum().item() == 3
    assert token_mask(batch, None) is None
    assert trim_padding(batch, 0).tolist() == [[5, 0, 6], [7, 0, 0]]
    assert trim_padding(batch, None) is batch
    assert trim_padding(torch.zeros(2, 3, dtype=torch.long), 0).shape == (2, 1)
    samples = Samples(batch, ("a", "b"), padding=0)
    assert samples.is_text and not samples.is_image
    assert torch.equal(samples.token_mask(batch), kept)  # type: ignore[arg-type]
    assert samples.first(1).padding == samples.subset([1]).padding == 0
    with pytest.raises(InvalidValueError, match="int64"):
        Samples(torch.zeros(2, 3), ("a", "b"), padding=0)


def test_random_ids_are_tokens_and_no_padding(text_folder: Folder) -> None:
    opened = opened_text_model(text_folder, "bert")
    assert isinstance(opened.preprocessing, Tokenization)
    ids = random_ids(opened.module, opened.preprocessing, (50, 9))
    assert ids.shape == (50, 9) and bool((ids != 0).all()) and int(ids.max()) < opened.module.config.vocab_size


# --- features and fits


@pytest.mark.parametrize("name", KINDS)
def test_features_are_what_the_head_reads(text_folder: Folder, sentences: Sentences, name: str) -> None:
    opened = opened_text_model(text_folder, name)
    batch = open_samples(sentences(5), opened.preprocessing).batch(slice(None))
    tap = find_feature_tap(opened.module, batch)
    head = find_output_layer(opened.module, batch)
    assert head == {"roberta": "classifier.out_proj", "gpt2": "score", "llama": "score"}.get(name, "classifier")
    assert tap == Tap(head, "input", "all" if name in ENCODERS else "last")
    with torch.no_grad(), tapped(opened.module, {"f": tap}) as seen:
        logits = predict(opened.module, batch)
        assert seen["f"].shape == (5, 16)
        layer = opened.module.get_submodule(head)
        torch.testing.assert_close(layer(seen["f"]), logits)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_sensitivities_do_not_depend_on_padding(text_folder: Folder, sentences: Sentences, name: str) -> None:
    opened = opened_text_model(text_folder, name)
    samples = open_samples(sentences(8), opened.preprocessing)
    found = []
    for one in (samples, _widened(samples)):
        units = Block().find(opened.module, one.batch(slice(0, 2))).units
        sampled = sample_positions(opened.module, units, one, 0.9, limit=5)
        n_rows = [len(one) * len(sampled.positions(unit, one.inputs)) for unit in units]
        weights = [sampled.row_weights(unit, one.inputs, n) for unit, n in zip(units, n_rows, strict=True)]
        found.append((units, sampled, weights))
    (units, sampled, weights), (wide_units, wide, wide_weights) = found
    kept = samples.token_mask(samples.inputs)
    assert kept is not None
    width = samples.inputs.shape[1]
    for number, unit in enumerate(units):
        torch.testing.assert_close(
            wide.position_weights[unit.id][:width], sampled.position_weights[unit.id], rtol=1e-3, atol=1e-5
        )
        assert not wide.position_weights[unit.id][width:].any()
        assert torch.equal(wide.chosen[unit.id], sampled.chosen[unit.id])
        assert sampled.n_rows(unit) == wide.n_rows(wide_units[number]) == int((weights[number] > 0).sum())
        torch.testing.assert_close(wide_weights[number], weights[number], rtol=1e-3, atol=1e-5)
        # Over the tokens that are there the weights of a whole pass have mean one.
        whole = dataclasses.replace(sampled, chosen={unit.id: torch.arange(width)})
        everywhere = whole.row_weights(unit, samples.inputs, len(samples) * width)
        assert float(everywhere.sum() / kept.sum()) == pytest.approx(1.0, rel=1e-4)
        assert not everywhere.view(len(samples), width)[~kept].any()


@pytest.mark.parametrize("name", KINDS)
def test_fits_do_not_depend_on_padding(text_folder: Folder, sentences: Sentences, name: str) -> None:
    opened = opened_text_model(text_folder, name)
    samples = open_samples(sentences(24), opened.preprocessing)
    maps, answers = [], []
    for one in (samples, _widened(samples)):
        units = Block().find(opened.module, one.batch(slice(0, 2))).units
        maps.append(fit_replacements(ScoringInputs(opened.module, units, one, ACTIONS, 8, 0), one, 1e-3, 0.9))
        student = repaired(opened.module, [Removal(units[1], "linear"), Removal(units[2], "linear")], one, batch_size=8)
        with torch.no_grad():
            answers.append(predict(student, samples.batch(slice(None))))
    for unit, linear in maps[0].items():
        torch.testing.assert_close(maps[1][unit].weight, linear.weight, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(answers[1], answers[0], atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_passes_are_as_long_as_the_texts_in_them(text_folder: Folder, sentences: Sentences, name: str) -> None:
    opened = opened_text_model(text_folder, name)
    few = open_samples(sentences(12), opened.preprocessing)
    assert few.padding is not None
    inputs = few.inputs.clone()
    inputs[4:, 6:] = few.padding  # one batch of long texts and two of short ones
    samples, seen = dataclasses.replace(few, inputs=inputs), list[tuple[int, ...]]()
    units = Block().find(opened.module, samples.batch(slice(0, 2))).units
    opened.module.get_submodule(units[0].path).register_forward_pre_hook(lambda _m, args: seen.append(args[0].shape))
    list(TTMPD(max_samples=12, tail_samples=12).score(opened.module, units, samples, batch_size=4))
    repaired(opened.module, [Removal(units[1], "linear")], samples, batch_size=4)
    longest = trim_padding(inputs[:4], few.padding).shape[1]
    assert {shape[1] for shape in seen if shape[0] == 4} == {longest, 6} and longest > 6


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_a_batch_without_any_of_the_chosen_tokens_takes_no_part(
    text_folder: Folder, sentences: Sentences, name: str
) -> None:
    opened = opened_text_model(text_folder, name)
    samples = open_samples(sentences(12), opened.preprocessing)
    units = Block().find(opened.module, samples.batch(slice(0, 2))).units
    seen = list[int]()

    def the_last(site: Any, *_args: Any, **_kwargs: Any) -> Tensor:
        return torch.tensor([math.prod(site.shape[:-1]) - 1])  # a token that only the longest text has

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("ttmpd.repair.positions.choose_positions", the_last)
        patched.setattr("ttmpd.repair.sequential.refit", lambda _s, site, given, _r: seen.append(len(given.x)) or None)
        repaired(opened.module, [Removal(units[1], "linear")], samples, batch_size=1)
    longest = int((samples.inputs[:, -1] != samples.padding).sum())
    assert longest < len(samples)
    assert longest in seen and set(seen) <= {longest, len(samples)}  # the layers that read pooled tokens have all


def test_a_fit_is_that_of_the_tokens_that_are_there(text_folder: Folder, sentences: Sentences) -> None:
    opened = opened_text_model(text_folder, "bert")
    samples = open_samples(sentences(30), opened.preprocessing)
    batch = samples.batch(slice(None))
    unit = Block().find(opened.module, batch[:2]).units[1]
    inputs = ScoringInputs(opened.module, [unit], samples, ACTIONS, 8, 0)
    found = fit_replacements(inputs, samples, 1e-3, 0.0)[unit.id]
    with torch.no_grad():
        seen = read_taps(opened.module, batch, {"x": Tap(unit.path, "input"), "y": Tap(unit.path, "output")})
    there, everywhere = (ReplacementFit(unit.channels) for _ in range(2))
    there.add(seen["x"][batch != 0], seen["y"][batch != 0])
    everywhere.add(seen["x"].flatten(0, 1), seen["y"].flatten(0, 1))
    torch.testing.assert_close(found.weight, there.solve(1e-3).weight, atol=1e-3, rtol=1e-3)
    assert not torch.allclose(found.weight, everywhere.solve(1e-3).weight, atol=1e-2)


def test_scores_do_not_depend_on_padding(text_folder: Folder, sentences: Sentences) -> None:
    opened = opened_text_model(text_folder, "gpt2")
    samples = open_samples(sentences(16), opened.preprocessing)
    found: list[Tensor] = []
    for one in (samples, _widened(samples)):
        units = Block().find(opened.module, one.batch(slice(0, 2))).units
        found.append(torch.tensor([s.harm for s in TTMPD().score(opened.module, units, one, batch_size=8)]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-2, atol=1e-4)
    assert bool((found[0] > 0).all())


def test_distillation_takes_one_view_and_pooled_features(
    text_folder: Folder, sentences: Sentences, tmp_path: Path
) -> None:
    opened = opened_text_model(text_folder, "llama")
    samples = open_samples(sentences(16), opened.preprocessing)
    teacher = opened.module
    unit = Block().find(teacher, samples.batch(slice(0, 2))).units[1]
    student = Block().cut(teacher, [unit])
    method, work = OneTime(steps=30, batch_size=8, lr_without_norm=3e-3), FitContext(folder=tmp_path)
    targets = method.prepare(teacher, samples, samples, work)
    assert targets.features is not None
    assert targets.features.shape == (1, 16, 16)  # one view, 16 samples, 16 channels
    before = predict(student.eval(), samples.batch(slice(None))).detach()
    fit = method.fit(student, samples, samples, targets, work)
    after = predict(student, samples.batch(slice(None))).detach()
    wanted = targets.held_out
    assert fit.steps == 30 and not fit.rolled_back
    assert float((after - wanted).square().mean()) < float((before - wanted).square().mean())
