import base64
import io
import json
import math
import random
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ttmpd.artifact import report
from ttmpd.artifact.report import render_card, render_html, write_report
from ttmpd.latency.timing import Timings
from ttmpd.pipeline import report_data as found
from ttmpd.records import Plan

EVIL = "<script>alert(1)</script>"
KINDS = ("BasicBlock", "Bottleneck")
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
VOID = {"meta", "img", "br"}


def picture(rng: random.Random) -> str:
    image = Image.new("RGB", (8, 8))
    tint = [rng.randrange(256) for _ in range(3)]
    image.putdata([tuple(min(255, c // 2 + rng.randrange(110)) for c in tint) for _ in range(64)])
    file = io.BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def units(rng: random.Random, n: int) -> list[dict[str, Any]]:
    found = []
    for i in range(n):
        drop = rng.expovariate(3.0) + 0.02
        found.append({
            "id": f"{'' if i % 5 else 'mlp:'}layer{1 + 4 * i // n}.{i % 6}", "module": KINDS[i % 2],
            "shape": [16 * 2 ** (4 * i // n), 32, 32], "parameters": 4672 * 2 ** (4 * i // n), "macs": 4718592,
            "ms": 2 + 4 * rng.random(), "linear_ms": 0.4, "action": "keep",
            "harm_drop": drop, "harm_linear": drop * rng.uniform(0.3, 0.95),
            "parts": {"damage": 2 * drop, "repaired_damage": drop},
        })  # fmt: skip
    for unit in sorted(found, key=lambda u: u["harm_linear"])[: n // 3]:
        unit["action"] = rng.choice(("drop", "linear"))
    return found


def rich(n_units: int = 24) -> dict[str, Any]:
    """Everything a run may tell."""
    rng = random.Random(0)
    rounds = {
        "original_ms": [rng.gauss(107.8, 2) for _ in range(30)],
        "compressed_ms": [rng.gauss(58.9, 1) for _ in range(30)],
    }
    teacher = [rng.randrange(10) for _ in range(75)]
    student = [t if rng.random() < 0.84 else rng.randrange(10) for t in teacher]
    held_out = {
        "names": [f"{i}.png" for i in range(75)], "teacher": teacher, "student": student,
        "teacher_confidence": [min(0.999, rng.betavariate(6, 1.5)) for _ in teacher],
        "student_confidence": [min(0.999, rng.betavariate(5, 2)) for _ in teacher],
    }  # fmt: skip
    parted = [
        {"name": f"{i}.png", "png": picture(rng) if i % 7 else "", "teacher": t, "student": s,
         **{f"{who}_confidence": held_out[f"{who}_confidence"][i] for who in ("teacher", "student")}}
        for i, (t, s) in enumerate(zip(teacher, student, strict=True)) if t != s
    ]  # fmt: skip
    steps = range(0, 201, 20)
    checks = [
        [s, round((56 + 8 * (1 - math.exp(-s / 50)) + rng.random()) / 75, 3), 0.9 * math.exp(-s / 60) + 0.3]
        for s in steps
    ]
    return {
        "format": 1, "ttmpd": "0.1.0", "created": "2026-03-02T10:11:12Z", "seed": 0,
        "command": "ttmpd compress --model timm:resnet50.a1_in1k --data photos --speedup 1.8 --output small",
        "model": {"id": "timm:resnet50.a1_in1k", "class": "ResNet", "rebuildable": True,
                  "parameters": 25557032, "macs": 4089184256},
        "student": {"parameters": 15180116, "macs": 2321057792},
        "machine": {"device": "AMD EPYC", "type": "cpu", "threads": 2, "torch": "2.15.0", "batch_size": 64},
        "settings": {"speedup": 1.8, "budget": None, "held_out": 0.15, "amp": False, "time_budget_s": 120,
                     "kinds": ["block", "mlp"]},
        "methods": {
            "adapt": {"name": "norm", "prior": 256}, "score": {"name": "ttmpd", "ridge": 1e-3, "batch_size": 64},
            "plan": {"name": "knapsack", "max_front": 20000},
            "distill": {"name": "one_time", "steps": 200, "lr": 0.02, "n_views": 4},
        },
        "samples": {"n_fit": 425, "n_held_out": 75,
                    "skipped": [["a.jpg", "cannot be read"], ["notes.txt", "is no image"]]},
        "adapt": {"note": "normalisation statistics mixed, 40% from 425 samples", "facts": {"weight": 0.4}},
        "units": units(rng, n_units),
        "refused": [*([f"layer{i}.0", "changes the shape of its input"] for i in (2, 3, 4)),
                    ["stem.pool", "holds no parameters"]],
        "target": {"asked": "speedup 1.8", "budget_ms": 59.9, "met": True},
        "attempts": [{"predicted_ms": p, "measured_ms": m} for p, m in ((59.0, 62.4), (57.9, 60.6), (57.2, 58.9))],
        "front": [{"target": t / 20, "predicted_ms": 5.39 * t, "harm": 0.0125 * (20 - t) ** 1.8, "n_removed": 20 - t}
                  for t in range(7, 20)],
        "latency": {
            **rounds, "original": {"median_ms": 107.8, "low_ms": 106.4, "high_ms": 109.3, "n_rounds": 30},
            "compressed": {"median_ms": 58.9, "low_ms": 58.1, "high_ms": 59.7, "n_rounds": 30},
            "speedup": {"median": 1.83, "low": 1.8, "high": 1.86}, "predicted_ms": 57.2,
        },
        "agreement": {"share": 0.84, "low": 0.741, "high": 0.906, "n": 75},
        "agreement_repaired": {"share": 0.747, "low": 0.638, "high": 0.831, "n": 75},
        "held_out": held_out, "class_names": list(CLASSES), "parted": parted,
        "fit": {"steps": 200, "stopped": "finished", "rolled_back": False, "best_step": 180, "start_weight": 0.25,
                "losses": [check[2] * 1.1 for check in checks[1:]], "checks": checks},
        "seconds": {"adapt": 2.1, "find": 0.2, "timing": 4.0, "score": 7.0, "plan": 1.0, "repair": 2.0, "prepare": 3.0,
                    "distill": 40.2, "measure": 4.1},
    }  # fmt: skip


class Reader(HTMLParser):
    """Collects tags, what they would load, and whether every tag is closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.places: list[str] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.places += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in ("tr", "td", "th", "p"):  # HTML lets these be closed by what follows
            while self.open[-1] != tag and self.open[-1] in ("tr", "td", "th", "p"):
                self.open.pop()
        assert self.open.pop() == tag


def without(facts: Any) -> Iterator[tuple[str, Any]]:
    """The facts with one value after the other set to None, at any depth; of a list, its first item stands for all."""
    for key, value in facts.items() if isinstance(facts, dict) else enumerate(facts[:1]):
        inner = without(value) if isinstance(value, (dict, list)) else ()
        for name, other in (("", None), *inner):
            yield f"{key}.{name}", {**facts, key: other} if isinstance(facts, dict) else [other, *facts[1:]]


def test_the_page_says_it_all() -> None:
    page = render_html(rich())
    text = " ".join(re.sub(r"<[^>]*>", " ", page.partition("<body>")[2]).split())
    for words in (
        "1.83x as fast", "107.8 ms → 58.9 ms per batch of 64", "1.80x to 1.86x", "84.0 %", "25.6 M → 15.2 M", "−40.6 %",
        "95 % interval 74.1 % to 90.6 %", "This is agreement with the teacher, not accuracy.", "63.6 s", "truck",
        "The target, speedup 1.8, is met", "8 of 24 removable units were removed", "attempt 3",
        "changes the shape of its input layer2.0, layer3.0, layer4.0", "a.jpg cannot be read", "time_budget_s",
        "max_front", "ttmpd compress --model", "normalisation statistics mixed", "chosen, predicted 57.2 ms",
        "step 180 were kept, mixed with 25 % of the start",
    ):  # fmt: skip
        assert words in text, words


@pytest.mark.parametrize("facts", [rich(), rich(60), {}], ids=["rich", "long", "nothing"])
def test_the_page_is_whole_and_loads_nothing(facts: dict[str, Any]) -> None:
    page = render_html(facts)
    reader = Reader(page)
    assert reader.open == []
    assert not re.search(r"https?://|@import|url\(", page)
    assert not reader.tags & {"script", "link", "iframe", "object", "embed"}
    assert all(place.startswith("data:image/png;base64,") for place in reader.places)
    assert "nan" not in re.findall(r'(?:x|y|cx|cy|width|height|points)="([^"]*)"', page)


@pytest.mark.parametrize(("name", "facts"), [pytest.param(*case, id=case[0]) for case in without(rich(4))])
def test_anything_may_be_absent(name: str, facts: dict[str, Any]) -> None:
    assert "not accuracy" in render_html(facts)
    assert "not accuracy" in render_card(facts)


def test_an_empty_plan_says_that_nothing_was_removed() -> None:
    facts = {**rich(), "units": [{**unit, "action": "keep"} for unit in rich()["units"]]}
    assert "Nothing was removed." in render_html(facts)
    assert "| Removed |" not in render_card(facts)


@pytest.mark.parametrize(("met", "words"), [(True, "is met"), (False, "is missed"), (None, "was not checked")])
def test_the_target_in_words(met: bool | None, words: str) -> None:
    facts = {**rich(), "target": {"asked": "speedup 1.8", "budget_ms": 59.9, "met": met}}
    assert words in render_html(facts)
    assert words in render_card(facts)


@pytest.mark.parametrize(("slower", "noisy"), [(1.1, False), (1.5, True)])
def test_timings_of_a_busy_machine_say_so(slower: float, noisy: bool) -> None:
    rounds = Timings({"original": (20.0, 20.0, 20.0 * slower, 20.0 * slower), "compressed": (10.0,) * 4})
    latency = found._latency(rounds, Plan((), 0.0, 20.0, 10.0, 10.0))
    assert bool(latency["noise"]) == noisy
    assert ("The rounds differ much" in render_html({**rich(), "latency": latency})) == noisy


@pytest.mark.parametrize(("before_ms", "moved"), [((), False), ((9.2,), False), ((8.0,), True), ((12.0,), True)])
def test_a_speedup_that_is_not_the_one_of_the_plan_says_so(before_ms: tuple[float, ...], moved: bool) -> None:
    rounds = Timings({"original": (20.0,) * 4, "compressed": (10.0,) * 4})
    latency = found._latency(rounds, Plan((), 0.0, 20.0, 10.0, 10.0), before_ms)
    assert ("not the one that the plan was chosen for" in latency["noise"]) == moved
    assert ("not the one that the plan was chosen for" in render_html({**rich(), "latency": latency})) == moved


def test_names_are_never_markup() -> None:
    facts = rich()
    facts["parted"][0]["name"] = facts["units"][0]["id"] = facts["command"] = facts["model"]["id"] = EVIL
    facts["units"][0]["action"] = "drop"
    facts["parted"][1]["png"] = '"><script>alert(1)</script>'
    facts["samples"]["skipped"].append([EVIL, EVIL])
    facts["refused"].append([EVIL, EVIL])
    facts["class_names"] = [EVIL] * 10
    facts["settings"][EVIL] = {"a": EVIL}
    facts["methods"][EVIL] = {EVIL: EVIL}
    page = render_html(facts)
    assert "script" not in Reader(page).tags
    assert "&lt;script&gt;" in page
    text = render_card(facts).replace(f"    {EVIL}", "")  # the command is in a code block
    assert EVIL not in text
    assert "base_model" not in text


def test_a_name_does_not_break_the_cards_table() -> None:
    facts = rich()
    facts["units"][0] |= {"id": "a|b\n# c `d` __e__", "action": "drop"}
    assert "| a\\|b # c \\`d\\`" in render_card(facts)


def test_report_json_is_strict(tmp_path: Path) -> None:
    facts = rich()
    facts["latency"]["predicted_ms"] = math.nan
    facts["seconds"]["plan"] = math.inf
    facts["parted"][0]["name"] = "half\udcff.png"  # what listing a folder gives for bytes that are no characters
    facts["settings"]["kinds"] = ("block",)
    write_report(facts, tmp_path / "new" / "folder")
    text = (tmp_path / "new" / "folder" / "report.json").read_text(encoding="utf-8")
    known = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert known["latency"]["predicted_ms"] is None
    assert known["seconds"]["plan"] is None
    assert known["settings"]["kinds"] == ["block"]
    assert known["units"] == facts["units"]
    assert text.startswith('{\n "format": 1')


def test_files_are_written_whole_and_nothing_else_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_report(rich(), tmp_path)
    names = ["README.md", "report.html", "report.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    before = (tmp_path / "report.html").read_text()

    def full(self: Path, *_: Any, **__: Any) -> int:
        self.touch()
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="no space"):
        write_report({}, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert (tmp_path / "report.html").read_text() == before


def test_the_card() -> None:
    card = render_card(rich())
    front = card.split("---\n")[1]
    assert front.splitlines()[0] == "library_name: ttmpd"
    assert "tags:\n- ttmpd\n" in front
    assert 'base_model: "timm/resnet50.a1_in1k"' in front
    assert "| Parameters | 25.6 M | 15.2 M | −40.6 % |" in card
    assert 'net = ttmpd.load("path/to/this/folder")' in card
    assert "Agreement is not accuracy" in card
    assert "\n    ttmpd compress --model timm:resnet50.a1_in1k" in card


def test_a_model_that_cannot_be_rebuilt_is_passed_to_load() -> None:
    facts = rich()
    facts["model"] |= {"rebuildable": False, "id": None}
    card = render_card(facts)
    assert 'ttmpd.load("path/to/this/folder", model=net)' in card
    assert "# ResNet, compressed with ttmpd" in card


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("timm:resnet50", '"timm/resnet50"'), ("hf:org/net-1", '"org/net-1"'), ("timm:org/net", '"org/net"'),
        ("hf:/home/net", None), ("torchvision:resnet34", None), ("net.py:make", None), ("hf:a/b\nlicense: x", None),
    ],
)  # fmt: skip
def test_base_model_names_a_place_on_the_hub(model: str, name: str | None) -> None:
    found = re.search(r"^base_model: (.*)$", render_card({"model": {"id": model}}), re.MULTILINE)
    assert (found and found[1]) == name


@pytest.mark.parametrize("values", [[], [5.0], [0.0, 0.0], [1e-7, 3e-7], [-2.0, 1e6], [None, 3.0]])
@pytest.mark.parametrize("zero", [False, True])
def test_a_scale_holds_its_values(values: list[float | None], zero: bool) -> None:
    x = report._scale(values, 10, 110, zero=zero)
    assert all(10 <= x(value) <= 110 for value in values if value is not None)
    assert 2 <= len(x.ticks) <= 12
    assert all(10 <= x(value) <= 110 for value, _ in x.ticks)


def test_curves_fit_their_steps() -> None:
    curves = report._fit_info(
        {"fit": {"steps": 20, "losses": [3.0, 2.0], "checks": [[0, 0.5, 4.0], [10, 0.6, None], [20, 0.7, 3.0]]}}
    )
    assert curves["training loss"] == [(10, 3.0), (20, 2.0)]
    assert curves["held-out loss"] == [(0, 4.0), (20, 3.0)]
    unchecked = report._fit_info({"fit": {"steps": 20, "losses": [3.0, 2.0]}})
    assert unchecked["training loss"] == [(10.0, 3.0), (20.0, 2.0)]


def test_of_many_classes_those_that_change_most_are_shown() -> None:
    info = report._classes_info({"held_out": {"teacher": [*range(100), 7, 7, 7], "student": [*range(100), 3, 3, 3]}})
    assert [row[0] for row in info["rows"][:2]] == ["class 7", "class 3"]
    assert len(info["rows"]) == 20
    assert info["n_hidden"] == 80


def test_confidence_of_one_is_in_the_last_bin() -> None:
    assert report._confidence_info({"held_out": {"teacher_confidence": [0.0, 0.55, 1.0]}}) == {
        "teacher": [1, 0, 0, 0, 0, 1, 0, 0, 0, 1]
    }
