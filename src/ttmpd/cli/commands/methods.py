"""``ttmpd methods``: what can be chosen, and what can be set."""

from collections.abc import Mapping, Sequence
from typing import Annotated

import typer
from rich.markup import escape

from ttmpd.cli import show as display
from ttmpd.cli.commands._reporting import reporting
from ttmpd.method import Parameter

PLACE = 90
EXAMPLES = (
    "ttmpd methods",
    "ttmpd methods score",
    "ttmpd methods distill one_time",
)


def command(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[VERB] [NAME]", help="A verb, a method's name, or both, e.g. `distill one_time`."),
    ] = None,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="As a page of the docs.")] = False,
) -> None:
    """List the methods, or every setting of one: what `--set VERB.FIELD=VALUE` takes."""
    with reporting(False):
        from ttmpd.method import listing, markdown, matching, parameters

        if as_markdown:
            typer.echo(markdown(listing()), nl=False)
            return
        rows = matching(names or [])
        _show(rows)
        for row in rows if names else []:
            _show_parameters(row, parameters(row["verb"], row["name"]))


def _show(rows: Sequence[Mapping[str, str]]) -> None:
    """Every method of every verb."""
    table = display.new_table("verb", "name", "what", "needs", "source")
    last = ""
    for row in rows:
        if last and row["verb"] != last:
            table.add_section()
        last = row["verb"]
        table.add_row(*(escape(row[key]) for key in ("verb", "name", "what", "needs", "source")))
    display.out().print(table)


def _show_parameters(row: Mapping[str, str], parameters: Sequence[Parameter]) -> None:
    """The settings of one method."""
    console, key = display.out(), f"{row['verb']}.{row['name']}"
    if not parameters:
        console.print(f"{escape(key)} has no settings.")
        return
    table = display.new_table("--set", "type", "default", "what", title=f"Settings of {escape(key)}")
    for item in parameters:
        table.add_row(*map(escape, (f"{row['verb']}.{item.name}", item.type, item.default, item.description)))
    console.print(table)
