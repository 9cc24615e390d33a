"""The docs say what the code does."""

import csv
from pathlib import Path

from ttmpd.method import listing, markdown

ROOT = Path(__file__).resolve().parent.parent


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
