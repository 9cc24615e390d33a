"""A method of every kind is added from a user's own module, and no file of the package is edited."""

import json
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import ttmpd
from ttmpd.cli.commands._parsing import choose_methods
from ttmpd.distill.mimic import Mimic
from ttmpd.errors import CheckpointError, UnknownMethodError
from ttmpd.method import from_dict, method_class, names, verb_of
from ttmpd.pipeline.compress import compress
from ttmpd.testing import checks_for
from ttmpd.testing.tiny_models import tiny_model, tiny_samples

MODULE = "toy_methods"
TOYS = '''
    """Toys, as a user would write them."""

    import dataclasses
    from typing import ClassVar

    import torch

    from ttmpd.adapt.base import Adapted, Adapter
    from ttmpd.models.modules import clone
    from ttmpd.records import Score
    from ttmpd.runtimes.base import Runtime
    from ttmpd.score.base import Scorer, scores_by_importance
    from ttmpd.surgery.units.base import WidthUnits
    from ttmpd.surgery.units.channel import Channel
    from ttmpd.tasks.base import Task, as_rows

    CALLS: list[str] = []


    class Halves(WidthUnits):
        """Hidden channels, of which half may go."""

        source: ClassVar[str] = "a toy"
        share: float = 0.5

        def search(self, observation):
            found = Channel(least=2).search(observation)
            halves = [dataclasses.replace(unit, kind=self.name, widths=(unit.n_members // 2,)) for unit in found.units]
            return dataclasses.replace(found, units=tuple(halves))

        def example(self, n=4):
            return Channel().example(n)

        def narrow(self, student, unit, kept):
            Channel().narrow(student, unit, kept)


    class Flat(Scorer):
        """All members alike."""

        source: ClassVar[str] = "a toy"
        scopes = ("width",)
        actions = ("narrow",)
        refit_scope = "removed_only"
        weight: float = 1.0

        def scores(self, job):
            for unit in job.units:
                yield from scores_by_importance(unit, torch.full((unit.n_members,), self.weight))


    class Shift(Adapter):
        """Moves one bias."""

        source: ClassVar[str] = "a toy"

        def adapt(self, teacher, samples, *, batch_size=64, seed=0):
            model = clone(teacher)
            with torch.no_grad():
                model.head.bias += 0.25
            return Adapted(model, "shifted")


    class Counting(Runtime):
        """Counts what it runs."""

        source: ClassVar[str] = "a toy"

        @property
        def version(self):
            return "0.0-toy"

        def prepare(self, module, batch):
            CALLS.append(type(module).__name__)
            return module


    class Signs(Task):
        """Whether each number is positive."""

        source: ClassVar[str] = "a toy"
        same: ClassVar[str] = "the same signs"
        reason_not_to_adapt: ClassVar[str] = "a toy does not learn"

        @classmethod
        def claim(cls, clues):
            return None

        def matrix(self, value, inputs):
            return as_rows(value, self.name)

        def loss(self, student, teacher, temperature=1.0):
            return (student - teacher).square().mean()

        def alike(self, student, teacher):
            return ((student > 0) == (teacher > 0)).all(-1).float()

        def confidence(self, outputs):
            return None

        def metrics(self, outputs, labels):
            return {"signs": float(self.alike(outputs, labels).mean())}
'''


@pytest.fixture
def toys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the module of toys, from which Python imports while the test runs."""
    (tmp_path / f"{MODULE}.py").write_text(textwrap.dedent(TOYS), encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop(MODULE, None)


def toy_net() -> nn.Module:
    return tiny_model(n_blocks=3)


def test_a_unit_kind_a_scorer_an_adapter_and_a_runtime_of_ones_own_make_a_student(toys, quick_timing):
    settings = {
        "units": f"{MODULE}:Halves", "score": f"{MODULE}:Flat", "adapt": f"{MODULE}:Shift",
        "runtime": f"{MODULE}:Counting", "distill": Mimic(steps=2),
    }  # fmt: skip
    net, batch = toy_net(), tiny_samples(4).batch(slice(None))
    result = compress(net, tiny_samples(16), macs=0.8, batch_size=8, output=toys / "out", **settings)
    assert {removal.unit.kind for removal in result.plan.removals} == {f"{MODULE}:Halves"}
    assert result.report.adaptation.note == "shifted"
    assert (result.report.runtime.name, result.report.runtime.version) == (f"{MODULE}:Counting", "0.0-toy")
    assert sys.modules[MODULE].CALLS

    same = ttmpd.load(toys / "out", net)
    assert torch.allclose(same(batch), result.model(batch), atol=1e-5)

    del sys.modules[MODULE]  # as in another process
    with pytest.raises(CheckpointError, match=f"import {MODULE}"):
        ttmpd.load(toys / "out", net)
    assert MODULE not in sys.modules


def test_an_artifact_cannot_make_a_class_of_an_imported_module_run(toys, quick_timing):
    settings = {"units": f"{MODULE}:Halves", "score": f"{MODULE}:Flat", "adapt": "none", "distill": Mimic(steps=2)}
    compress(toy_net(), tiny_samples(16), macs=0.8, batch_size=8, output=toys / "out", **settings)
    plan = toys / "out" / "plan.json"
    for name in ("os:path", "subprocess:Popen", f"{MODULE}:Flat", f"{MODULE}:Nothing", "zipapp:main"):
        text = json.dumps(json.loads(plan.read_text()))
        plan.write_text(text.replace(f'"kind": "{MODULE}:Halves"', f'"kind": "{name}"'))
        with pytest.raises(CheckpointError, match=name.partition(":")[0]):
            ttmpd.load(toys / "out", toy_net())
        plan.write_text(text)
    assert "zipapp" not in sys.modules


@pytest.mark.parametrize(
    ("verb", "name"),
    [("units", "Halves"), ("score", "Flat"), ("adapt", "Shift"), ("runtimes", "Counting"), ("tasks", "Signs")],
)
def test_a_method_of_ones_own_is_named_by_its_place(toys, verb, name):
    cls = method_class(verb, f"{MODULE}:{name}")
    assert verb_of(cls) == verb
    assert cls().name == f"{MODULE}:{name}"
    assert f"{MODULE}:{name}" not in names(verb)
    assert from_dict(verb, json.loads(json.dumps(cls().to_dict()))) == cls()


@pytest.mark.parametrize(("verb", "name"), [("runtimes", "Counting"), ("tasks", "Signs")])
def test_the_checks_of_a_verb_take_a_method_of_ones_own(toys, verb, name):
    method = method_class(verb, f"{MODULE}:{name}")()
    for check in checks_for(verb):
        check(method)


def test_hyper_parameters_of_ones_own_method_are_checked(toys):
    assert method_class("score", f"{MODULE}:Flat")().with_settings(weight="2").weight == 2.0


@pytest.mark.parametrize(
    ("verb", "name", "message"),
    [
        ("score", "toy_missing:Flat", "must be importable, but raised ModuleNotFoundError"),
        ("score", f"{MODULE}:Nothing", "but is no such name"),
        ("adapt", f"{MODULE}:Flat", r"derived from that in ttmpd\.adapt\.base"),
        ("score", f"{MODULE}:Scorer", "must define scores"),
        ("score", f"{MODULE}:CALLS", "must be a class"),
    ],
)
def test_what_is_no_method_of_the_verb_is_refused(toys, verb, name, message):
    with pytest.raises(UnknownMethodError, match=message):
        method_class(verb, name)


def test_the_command_line_takes_ones_own_method(toys):
    methods = choose_methods({"score": f"{MODULE}:Flat", "adapt": "none"}, ["score.weight=2"], None)
    assert methods["score"] == method_class("score", f"{MODULE}:Flat")().with_settings(weight=2.0)
