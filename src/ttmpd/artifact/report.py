"""Write a report as ``report.json``, ``report.html`` and a model card; the templates draw, ``sentences`` has words."""

import json
import re
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from ttmpd.artifact import drawing, format, sentences
from ttmpd.artifact.run_report import RunReport
from ttmpd.storage import replacing

REPORT, PAGE, CARD = "report.json", "report.html", "README.md"

_HUB_ID = re.compile(r"(?:timm:|hf:(?=[^/]+/))([\w.-]+(?:/[\w.-]+)?)", re.ASCII)


def write_report(report: RunReport, folder: Path) -> None:
    """Write ``report.json``, ``report.html`` and ``README.md`` into ``folder``, each whole or not at all.

    Args:
        report: what the run measured.
        folder: where to write; made if it is not there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plain = json.dumps(report.to_dict(), indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    for name, text in ((REPORT, plain), (PAGE, render_html(report)), (CARD, render_card(report))):
        with replacing(folder / name) as unfinished:
            unfinished.write_text(text, encoding="utf-8", errors="replace")  # file names may hold other bytes


def render_html(report: RunReport) -> str:
    """One HTML page that loads nothing: styles, drawings and pictures are inside it."""
    return _template("report.html.j2").render(report=report)


def render_card(report: RunReport) -> str:
    """A Hugging Face model card: YAML front matter, what was done, before and after, how to load it."""
    command = Markup(" ".join(report.command.split()))  # in an indented block: verbatim
    return _template("card.md.j2").render(report=report, base_model=_base_model(report.model.id), command=command)


def _base_model(model_id: str) -> str:
    """The model's place on the Hugging Face hub as YAML; "" for a model from elsewhere."""
    match = _HUB_ID.fullmatch(model_id)
    if match is None:
        return ""
    return Markup(json.dumps(match[1] if "/" in match[1] else f"timm/{match[1]}"))


@cache
def _template(name: str) -> Template:
    """A template whose every value is escaped: by autoescape in HTML, by ``_markdown`` in the card."""
    is_html = name.endswith(".html.j2")
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        autoescape=is_html,
        finalize=None if is_html else _markdown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(format=format, words=sentences, drawing=drawing)
    filters = ("milliseconds", "number", "seconds", "count", "percent", "probability", "times", "change", "plural")
    environment.filters.update({name: getattr(format, name) for name in filters} | {"shown": sentences.shown})
    return environment.get_template(name)


def _markdown(value: object) -> object:
    """Text that Markdown and HTML leave as it is; Markup passes."""
    if isinstance(value, Markup):
        return value
    text = " ".join(str(value).split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"[\\`*\[\]|]|(?<!\w)_|_(?!\w)", r"\\\g<0>", text)
