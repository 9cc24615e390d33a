"""``ttmpd.early_exit``: from a model to an artifact that loads, evaluates, and says what was done."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import ttmpd
from reports import small_report
from ttmpd import adapt_to, bench, compress, evaluate, inspect, load
from ttmpd.adapt.none import NoAdaptation
from ttmpd.artifact.read import open_artifact, read_artifact
from ttmpd.artifact.write import Result
from ttmpd.data.open import open_samples
from ttmpd.early_exit.right_tool import RightTool
from ttmpd.errors import CheckpointError, InvalidValueError, SamplesError, UnsupportedError
from ttmpd.latency import exits as _latency
from ttmpd.latency.timing import Timings
from ttmpd.models.open import open_model
from ttmpd.pipeline import exit_choice as _choice
from ttmpd.records import Plan, Removal
from ttmpd.repair.sequential import repaired
from ttmpd.surgery.exits.model import EarlyExitModel
from ttmpd.testing.tiny_models import assert_untouched, tiny_model, tiny_samples, tiny_units

QUICK = RightTool(steps=3, views=1, prune=False)
PLAIN = RightTool(steps=3, views=1, prune=False, by_time=False)


@pytest.fixture(autouse=True)
def steady(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is measured: 10 ms for the model, 3 ms to the first exit and 4 more to each further one."""

    def exit_ms(_original, model, _samples, _batch_size) -> tuple[float, tuple[float, ...]]:
        return 10.0, tuple(3.0 + 4 * number for number in range(len(model.heads) + 1))

    def mean_timings(_original, _model, _samples, depths, *_) -> Timings:
        mean = float((3.0 + 4 * depths).mean())
        return Timings({"original": (10.0, 10.0), "compressed": (mean, mean)})

    monkeypatch.setattr(_choice, "exit_ms", exit_ms)
    monkeypatch.setattr(_choice, "mean_timings", mean_timings)
    monkeypatch.setattr(_latency, "mean_timings", mean_timings)


@pytest.fixture
def images() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return 2 * torch.randn(60, 3, 1, 1, generator=generator) + torch.randn(60, 3, 8, 8, generator=generator)


@torch.no_grad()
def answers(net: nn.Module, batch: Tensor) -> Tensor:
    return net(batch)


def test_from_model_to_artifact_and_back(images, tmp_path):
    net = tiny_model()
    with assert_untouched(net):
        found = ttmpd.add_early_exits(net, images, speedup=1.5, method=QUICK, output=tmp_path / "out")
    assert found.met
    assert isinstance(found.model, EarlyExitModel) and not found.model.training
    assert found.report.target.budget_ms == pytest.approx(10 / 1.5)
    again = load(tmp_path / "out", model=net)
    assert isinstance(again, EarlyExitModel)
    assert again.threshold == found.model.threshold <= 1
    assert torch.equal(answers(again, images), answers(found.model, images))
    again.threshold = 1.01
    assert torch.equal(answers(again, images), answers(tiny_model(), images))
    artifact = read_artifact(tmp_path / "out")
    assert (len(artifact.removals), len(artifact.sample_ids), artifact.batch_size) == (0, 60, 1)


def test_the_report_adds_up(images):
    found = ttmpd.add_early_exits(tiny_model(), images, latency="0.6x", method=QUICK, command="the command")
    report = found.report
    exits = report.exits
    shares = [exit.share for exit in exits.exits] + [exits.end_share]
    assert sum(shares) == pytest.approx(1)
    mean = sum(share * (3 + 4 * number) for number, share in enumerate(shares))
    assert report.latency.compressed.median_ms == pytest.approx(mean) == pytest.approx(exits.predicted_ms)
    assert mean <= report.target.budget_ms == pytest.approx(6)
    assert (report.samples.n_fit, report.samples.n_held_out, exits.n_samples) == (51, 9, 60)
    assert report.methods["early_exit"].settings["steps"] == QUICK.steps and len(report.methods) == 1
    assert report.student.parameters > report.model.parameters
    assert (report.command, exits.labelled) == ("the command", False)
    assert report.kind == "exits" and report.student.macs is None


def test_later_exits_must_be_surer(images, tmp_path):
    found = ttmpd.add_early_exits(tiny_model(), images, speedup=1.5, method=QUICK, output=tmp_path)
    # Leaving at the second exit saves 4 of the 8 ms that leaving at the first does: half the doubt is allowed.
    assert found.model.spec.saved_shares == (1.0, 0.5)
    first, second = (exit.threshold for exit in found.report.exits.exits)
    assert first == found.model.threshold < 1
    assert 1 - second == pytest.approx((1 - first) / 2)
    assert load(tmp_path, model=tiny_model()).spec == found.model.spec
    plain = ttmpd.add_early_exits(tiny_model(), images, speedup=1.5, method=PLAIN)
    assert {exit.threshold for exit in plain.report.exits.exits} == {plain.model.threshold}


def test_exits_that_cost_more_than_they_bring_are_taken_off(images, tmp_path, monkeypatch):
    def mean_timings(_original, model, _samples, depths, *_) -> Timings:
        assert len(model.heads) == 1
        mean = float((6.6 + 4 * depths).mean())
        return Timings({"original": (10.0,), "compressed": (mean,)})

    monkeypatch.setattr(_choice, "prune_exits", lambda *_: (1,))
    monkeypatch.setattr(_choice, "mean_timings", mean_timings)
    method, net = RightTool(steps=3, views=1), tiny_model()
    found = ttmpd.add_early_exits(net, images, latency="0.9x", method=method, output=tmp_path)
    assert [place.path for place in found.model.spec.exits] == ["blocks.1"]
    exits = found.report.exits
    assert [exit.path for exit in exits.exits] == ["blocks.1"]
    # One of two exits is gone, and with it the 0.4 ms that an exit costs at most.
    assert (exits.exits[0].ms, exits.end_ms) == pytest.approx((6.6, 10.6))
    assert "1 of them are worth their time" in exits.note
    again = load(tmp_path, model=net)
    assert torch.equal(answers(again, images), answers(found.model, images))


def test_the_report_draws_exits(images, tmp_path):
    ttmpd.add_early_exits(tiny_model(), images, speedup=1.5, method=QUICK, output=tmp_path)
    page, card = ((tmp_path / name).read_text() for name in ("report.html", "README.md"))
    assert "with early exits</h1>" in page
    assert "Exits, in the order of the network" in page
    assert 'aria-label="Agreement with the whole model over mean milliseconds"' in page
    assert "Samples may leave behind 2 blocks" in page and "Samples may leave behind 2 blocks" in card
    assert "| blocks.1 |" in card and "net.threshold" in card and "No labels were used" in card
    assert "compressed</h1>" not in page and "Nothing was removed" not in page


def test_labels_are_found_by_row_and_told(images, tmp_path):
    labels = [number % 4 for number in range(60)]
    found = ttmpd.add_early_exits(tiny_model(), images, speedup=1.2, method=QUICK, labels=labels, output=tmp_path)
    assert found.report.exits.labelled
    assert "Labels were learned from" in (tmp_path / "README.md").read_text()
    assert "no labels" not in (tmp_path / "report.html").read_text().split("What other thresholds")[0]
    with pytest.raises(SamplesError, match="a label for every sample"):
        ttmpd.add_early_exits(tiny_model(), images, speedup=1.2, method=QUICK, labels=labels[:9])


def test_exits_on_top_of_a_pruned_student(images, tmp_path):
    net, samples = tiny_model(n_blocks=5), tiny_samples(16)
    units = tiny_units(net)
    removals = (Removal(units[1], "drop"), Removal(units[2], "linear"))
    student, plan = repaired(net, removals, samples), Plan(removals, 0.1, 10.0, 6.0, 6.0)
    Result(model=student, plan=plan, opened=open_model(net), sample_ids=("old",), report=small_report()).save(
        tmp_path / "pruned"
    )
    (tmp_path / "nets.py").write_text(
        "from ttmpd.testing.tiny_models import tiny_model\ndef net(): return tiny_model(n_blocks=5)"
    )
    opened = open_artifact(tmp_path / "pruned", f"{tmp_path}/nets.py:net")
    found = ttmpd.add_early_exits(opened, images, speedup=1.1, method=QUICK, output=tmp_path / "both")
    assert [place.path for place in found.model.spec.exits] == ["blocks.0", "blocks.3"]
    again = load(tmp_path / "both", model=net)
    assert torch.equal(answers(again, images), answers(found.model, images))
    again.threshold = 2.0
    assert torch.equal(answers(again, images), answers(student, images))
    artifact = read_artifact(tmp_path / "both")
    assert [removal.action for removal in artifact.removals] == ["drop", "linear"]
    assert "old" in artifact.sample_ids


def test_evaluation_and_bench_take_the_artifact(images, tmp_path):
    net = tiny_model()
    used = ttmpd.add_early_exits(net, images[:40], speedup=1.5, method=QUICK, output=tmp_path)
    again = open_artifact(tmp_path, _factory(tmp_path))
    found = evaluate(again, images, [0] * 60, against=net, batch_size=7)
    assert (found.n_samples, found.n_left_out) == (20, 40)
    alike = (answers(used.model, images[40:]).argmax(-1) == answers(net, images[40:]).argmax(-1)).float().mean()
    assert found.agreement is not None
    assert found.agreement.share == pytest.approx(float(alike))
    rows = bench(tmp_path, _factory(tmp_path), samples=images, batch_sizes=(1,))
    depths = used.model.depths(images[40:])
    assert rows[0].compressed.median_ms == pytest.approx(float((3.0 + 4 * depths).mean()))
    with pytest.raises(InvalidValueError, match="samples must be given"):
        bench(tmp_path, _factory(tmp_path))
    with pytest.raises(SamplesError, match="all 40 were used"):
        bench(tmp_path, _factory(tmp_path), samples=images[:40])


def _factory(folder: Path) -> str:
    (folder / "nets.py").write_text("from ttmpd.testing.tiny_models import tiny_model\ndef net(): return tiny_model()")
    return f"{folder}/nets.py:net"


def test_a_rebuildable_model_comes_back_in_a_fresh_process(tmp_path):
    from ttmpd.demo.digits import demo_data

    data = demo_data().x[:80]
    found = ttmpd.add_early_exits("ttmpd.demo:demo_model", data, speedup=1.3, method=QUICK, output=tmp_path / "out")
    batch = open_samples(data[:9], found.opened.preprocessing).batch(slice(None))
    torch.save((batch, answers(found.model, batch)), tmp_path / "xy.pt")
    code = (
        "import torch, ttmpd\n"
        f"x, y = torch.load({str(tmp_path / 'xy.pt')!r}, weights_only=True)\n"
        f"net = ttmpd.load({str(tmp_path / 'out')!r})\n"
        "assert type(net).__name__ == 'EarlyExitModel' and net.threshold <= 1\n"
        "assert torch.allclose(net(x), y, rtol=0, atol=1e-5)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


# ------------------------------------------------------------------------------------------------------ what goes wrong


def test_exits_come_last(images):
    exiting = ttmpd.add_early_exits(tiny_model(), images, speedup=1.5, method=QUICK).model
    for run in (
        lambda: ttmpd.add_early_exits(exiting, images, speedup=1.5),
        lambda: compress(exiting, images, speedup=1.5),
        lambda: adapt_to(exiting, images, adapt=NoAdaptation()),
        lambda: inspect(exiting, images),
    ):
        with pytest.raises(UnsupportedError, match="exits come last"):
            run()


def test_bad_input_is_refused_before_any_work(images, tmp_path):
    (tmp_path / "file").touch()
    cases = [
        ({"speedup": 2.0, "latency": "5ms"}, "exactly one target"),
        ({}, "exactly one target"),
        ({"speedup": 0.5}, "greater than 1"),
        ({"speedup": 2.0, "output": tmp_path / "file"}, "is a file"),
        ({"speedup": 2.0, "score": 3}, "must be one of num_samples, holdout"),
    ]
    for settings, message in cases:
        with pytest.raises(InvalidValueError, match=message):
            ttmpd.add_early_exits(tiny_model(), images, **settings)


def test_a_missed_target_is_told(images, monkeypatch):
    slow = Timings({"original": (10.0,), "compressed": (9.0,)})
    monkeypatch.setattr(_choice, "mean_timings", lambda *_: slow)
    with pytest.raises(ttmpd.BudgetUnreachableError):  # ever lower thresholds, and none is fast enough
        ttmpd.add_early_exits(tiny_model(), images, speedup=2.0, method=QUICK)
    monkeypatch.setattr(_choice, "_ATTEMPTS", 1)
    found = ttmpd.add_early_exits(tiny_model(), images, speedup=2.0, method=QUICK)
    assert not found.met
    assert found.report.target.met is False


def test_without_held_out_samples_nothing_is_said_of_agreement(images):
    found = ttmpd.add_early_exits(tiny_model(), images, speedup=1.5, method=QUICK, holdout=0.0)
    assert found.report.agreement is None
    assert found.report.exits.n_samples == 60


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda plan: plan["early_exit"].pop("threshold"), "no 'threshold'"),
        (lambda plan: plan["early_exit"]["exits"][0].update(pool="sum"), "one of the pools"),
        (lambda plan: plan["early_exit"]["exits"].reverse(), "in their order"),
        (lambda plan: plan["early_exit"]["exits"][0].update(n_features=7), "exits of .* must fit"),
        (lambda plan: plan.update(early_exit=None), "must fit the given TinyNet"),
        (lambda plan: plan["early_exit"].update(followers=["elsewhere"]), "read blocks of the model"),
        (
            lambda plan: plan["early_exit"].update(blocks=["blocks.0", "blocks.1", "x"], followers=["x"]),
            "exits of .* must fit",
        ),
    ],
)
def test_a_broken_artifact_is_told(images, tmp_path, change, message):
    net = tiny_model()
    ttmpd.add_early_exits(net, images, speedup=1.5, method=QUICK, output=tmp_path)
    plan = json.loads((tmp_path / "plan.json").read_text())
    change(plan)
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path, model=net)


def test_artifacts_without_exits_are_as_they_were(tmp_path):
    net = tiny_model()
    Result(model=net, plan=Plan((), 0.0, 1.0, 1.0, 1.0), opened=open_model(net), sample_ids=(), report=small_report()
    ).save(tmp_path)  # fmt: skip
    assert "early_exit" not in json.loads((tmp_path / "plan.json").read_text())
    assert read_artifact(tmp_path).exits is None
    assert type(load(tmp_path, model=net)) is type(net)
