"""The docs say what the code does."""

import csv
import re
import shlex
import tomllib
from pathlib import Path

import pytest

from ttmpd.method import listing, markdown

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def links(page: Path) -> set[Path]:
    """The files that a page links to."""
    targets = re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8"))
    return {(page.parent / target).resolve() for target in targets if "://" not in target}


def commands(page: Path) -> list[str]:
    """The lines of a page's blocks that run `ttmpd`, without what stands for something left out."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    shown = [line.removeprefix("$ ").replace("...", "") for line in lines]
    return [line for line in shown if line.startswith("ttmpd ") and not line.startswith("ttmpd.")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_take_options_that_exist(page, run, said):
    for command in commands(page):
        checked = run(*shlex.split(command, comments=True)[1:], "--help")  # options are read before the help is shown
        assert checked.exit_code == 0, f"{command}: {said(checked)}"


def test_every_page_can_be_reached_from_the_readme():
    reached, new = set(), {ROOT / "README.md"}
    while new:
        reached |= new
        new = {page for reader in new for page in links(reader) if page.suffix == ".md"} - reached
    assert set(PAGES) <= reached


def test_the_methods_table_is_up_to_date():
    written = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert written == markdown(listing()), "run: ttmpd methods --markdown > docs/methods.md"


def test_every_linked_page_exists():
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        text = page.read_text(encoding="utf-8")
        for link in [part.split(")")[0] for part in text.split("](")[1:]]:
            target = link.partition("#")[0]
            if target and "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_table_of_families_holds_what_the_benchmark_found():
    text = (ROOT / "docs" / "transformers.md").read_text(encoding="utf-8")
    with (ROOT / "benchmarks" / "results" / "families.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        missed = "" if row["met"] == "True" else ", missed"
        gaps = " | ".join(f"{float(row[name]):.0e}" for name in ("masked_gap", "export_gap", "fresh_gap"))
        units = f"{row['blocks']}, {row['heads']}, {row['neurons']}"
        speedup = f"{float(row['speedup']):.2f}x{missed}"
        assert f"| {row['family']} | {units} | {speedup} | {row['done']} | {gaps} |" in text
    assert len(rows) == 15


def test_the_map_names_every_room_in_its_layer():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rooms = {path.parent.name for path in (ROOT / "src" / "ttmpd").glob("*/__init__.py")}
    assert [room for room in sorted(rooms) if f"`{room}/`" not in text] == []
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    layers = settings["tool"]["importlinter"]["contracts"][0]["layers"]
    present = [sorted(re.findall(r"\w+", re.sub(r"\(\w+\)", "", layer))) for layer in layers]
    stated = [re.findall(r"`(\w+)`", line) for line in re.findall(r"^\d+\. (.*)$", text, flags=re.M)]
    assert present == [sorted(names) for names in stated]
