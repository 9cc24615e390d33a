import dataclasses
import json
import math
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from reports import SMALL, small_report
from rich_report import of_student, rich, with_exits
from ttmpd.artifact.measurements import TargetReport
from ttmpd.artifact.report import render_card, render_html, write_report
from ttmpd.artifact.run_report import MethodReport, ModelReport, RunReport

EVIL = "<script>alert(1)</script>"
VOID = {"meta", "img", "br"}
EVERY_KIND = {
    "rich": rich(),
    "long": rich(60),
    "small": SMALL,
    "adapted": small_report(kind="adapted"),
    "exits": with_exits(),
    "student": of_student(),
}


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


def text_of(page: str) -> str:
    return " ".join(re.sub(r"<[^>]*>", " ", page.partition("<body>")[2]).split())


def bare(report: RunReport) -> Iterator[tuple[str, RunReport]]:
    """The report without one after the other of the things that it need not say."""
    for field in dataclasses.fields(report):
        if field.default is not dataclasses.MISSING:
            yield field.name, dataclasses.replace(report, **{field.name: field.default})
        elif field.default_factory is not dataclasses.MISSING:
            yield field.name, dataclasses.replace(report, **{field.name: field.default_factory()})


def test_the_page_says_it_all() -> None:
    text = text_of(render_html(rich()))
    for words in (
        "1.83x as fast", "107.8 ms → 58.9 ms per batch of 64", "1.80x to 1.86x", "84.0 %", "25.6 M → 15.2 M", "−40.6 %",
        "95 % interval 74.1 % to 90.6 %", "This is agreement with the adapted model, not accuracy.", "63.6 s", "truck",
        "The target, speedup 1.8, is met", "8 of 24 removable units were removed or narrowed", "attempt 3",
        "narrowed to 4 of 6", "changes the shape of its input layer2.0, layer3.0, layer4.0", "a.jpg cannot be read",
        "max_front", "ttmpd compress --model", "normalisation statistics mixed", "chosen, predicted 57.2 ms",
        "the weights of step 180 were kept, averaged with the start, which counts 25.0 %", "75 held-out samples",
        "Task: classification, detected from the model", "Agreement means the same class.",
        "AMD EPYC (cpu), 2 threads, batches of 64, runtime onnx 1.24.1", "multiplied by 0.62",
        "Without changing a prediction, 28 batch norms folded made it 1.19x as fast.",
        "made on another device: timings are made anew",
    ):  # fmt: skip
        assert words in text, words


def test_the_card_says_what_the_page_says() -> None:
    card = render_card(rich())
    for words in ("is met: measured 1.83x as fast", "AMD EPYC (cpu), 2 threads, batches of 64, runtime onnx 1.24.1",
                  "Task: classification, detected from the model", "made on another device"):  # fmt: skip
        assert words in card, words


def test_one_of_a_thing_is_not_many() -> None:
    small = dataclasses.replace(SMALL, machine=dataclasses.replace(SMALL.machine, threads=1))
    for text in (text_of(render_html(small)), render_card(small)):
        assert "1 thread" in text and not re.search(r"\b1 (threads|samples|steps|rounds)\b", text)


@pytest.mark.parametrize("name", EVERY_KIND)
def test_the_page_is_whole_and_loads_nothing(name: str) -> None:
    page = render_html(EVERY_KIND[name])
    reader = Reader(page)
    assert reader.open == []
    assert not re.search(r"https?://|@import|url\(", page)
    assert not reader.tags & {"script", "link", "iframe", "object", "embed"}
    assert all(place.startswith("data:image/png;base64,") for place in reader.places)
    assert "nan" not in re.findall(r'(?:x|y|cx|cy|width|height|points)="([^"]*)"', page)
    assert "None" not in text_of(page)


@pytest.mark.parametrize(
    ("name", "report"),
    [(f"{kind} without {name}", report) for kind in ("rich", "exits", "student")
     for name, report in bare(EVERY_KIND[kind]) if not (kind == "exits" and name == "latency")],
)  # fmt: skip
def test_what_a_run_need_not_say_may_be_absent(name: str, report: RunReport) -> None:
    assert Reader(render_html(report)).open == [], name
    assert "How to load" in render_card(report)


def test_exits_in_the_report() -> None:
    text, card = text_of(render_html(with_exits())), render_card(with_exits())
    for words in ("with early exits", "Samples may leave behind 2 blocks", "at least 0.92 to 0.96", "the end"):
        assert words in text and words in card, words
    assert "Without exits" in text and "no labels" not in text.partition("Before and after")[0]
    assert "Labels were learned from, too" in card


def test_a_student_in_the_report() -> None:
    text, card = text_of(render_html(of_student())), render_card(of_student())
    for words in (
        "trained as a student", "Trained for 200 steps on 3 of 120 labelled samples, chosen by random",
        "with the predictions of hf:org/big at a weight of 0.75", "90.0 % (80.0 % to 95.0 %)",
    ):  # fmt: skip
        assert words in text and words in card, words
    assert "Agreement" not in text.partition("Training")[0]
    assert "ttmpd evaluate --model path/to/this/folder --source FILE.py:factory --data DATA" in card


def test_an_empty_plan_says_that_nothing_was_removed() -> None:
    units = tuple(dataclasses.replace(unit, action="keep") for unit in rich().units)
    report = dataclasses.replace(rich(), units=units)
    assert "Nothing was removed." in render_html(report)
    assert "| Removed |" not in render_card(report)


@pytest.mark.parametrize(
    ("met", "within", "words"), [(True, False, "is met:"), (True, True, "is met within"), (False, False, "is missed")]
)
def test_the_target_in_words(met: bool, within: bool, words: str) -> None:
    report = dataclasses.replace(rich(), target=TargetReport("speedup 1.8", met, within, 59.9, 0.3))
    assert words in render_html(report)
    assert words in render_card(report)


def test_names_are_never_markup() -> None:
    report = rich()
    units = (dataclasses.replace(report.units[0], id=EVIL, action="drop"), *report.units[1:])
    first, second, *others = report.disagreements
    report = dataclasses.replace(
        report,
        command=EVIL,
        model=dataclasses.replace(report.model, id=EVIL),
        units=units,
        disagreements=(
            dataclasses.replace(first, name=EVIL, text=EVIL, png=""),
            dataclasses.replace(second, png='"><script>alert(1)</script>'),
            *others,
        ),
        samples=dataclasses.replace(report.samples, skipped=((EVIL, EVIL),)),
        not_removable=((EVIL, EVIL),),
        class_names=(EVIL,) * 10,
        settings={EVIL: {"a": EVIL}},
        methods={EVIL: MethodReport(EVIL, {EVIL: EVIL})},
    )
    page = render_html(report)
    assert "script" not in Reader(page).tags
    assert "&lt;script&gt;" in page
    text = render_card(report).replace(f"    {EVIL}", "")  # the command is in a code block
    assert EVIL not in text
    assert "base_model" not in text


def test_a_name_does_not_break_the_cards_table() -> None:
    report = rich()
    unit = dataclasses.replace(report.units[0], id="a|b\n# c `d` __e__", action="drop")
    assert "| a\\|b # c \\`d\\`" in render_card(dataclasses.replace(report, units=(unit, *report.units[1:])))


def test_report_json_is_strict(tmp_path: Path) -> None:
    report = rich()
    assert report.latency is not None
    report = dataclasses.replace(
        report,
        latency=dataclasses.replace(report.latency, predicted_ms=math.nan),
        seconds={"plan": math.inf},
        # What listing a folder gives for bytes that are no characters.
        disagreements=(dataclasses.replace(report.disagreements[0], name="half\udcff.png"),),
        settings={"units": ("block",)},
    )
    write_report(report, tmp_path / "new" / "folder")
    text = (tmp_path / "new" / "folder" / "report.json").read_text(encoding="utf-8")
    plain = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert plain["latency"]["predicted_ms"] is None
    assert plain["seconds"]["plan"] is None
    assert plain["settings"]["units"] == ["block"]
    assert plain["disagreements"][0]["name"] == "half?.png"
    assert text.startswith('{\n "format": 2')


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
        write_report(SMALL, tmp_path)
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
    assert "transformers.ResNetForImageClassification.from_pretrained" in card


def test_a_model_that_cannot_be_rebuilt_is_passed_to_load() -> None:
    card = render_card(dataclasses.replace(rich(), model=ModelReport("", "ResNet", False, 1, 1)))
    assert 'ttmpd.load("path/to/this/folder", model=net)' in card
    assert "# ResNet, compressed by ttmpd" in card


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("timm:resnet50", '"timm/resnet50"'), ("hf:org/net-1", '"org/net-1"'), ("timm:org/net", '"org/net"'),
        ("hf:/home/net", None), ("torchvision:resnet34", None), ("net.py:make", None), ("hf:a/b\nlicense: x", None),
    ],
)  # fmt: skip
def test_base_model_names_a_place_on_the_hub(model: str, name: str | None) -> None:
    card = render_card(small_report(model=ModelReport(model, "Net", False, 1, 1)))
    match = re.search(r"^base_model: (.*)$", card, re.MULTILINE)
    assert (match and match[1]) == name
