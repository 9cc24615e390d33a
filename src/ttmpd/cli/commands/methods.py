"""What can be chosen."""

from typing import Annotated

import typer

from ttmpd.cli import show as display
from ttmpd.cli.commands._reporting import reporting


def command(
    as_markdown: Annotated[bool, typer.Option("--markdown", help="As a page of the docs.")] = False,
) -> None:
    """List every method of every verb, read from the files."""
    with reporting(False):
        from ttmpd.method import listing, markdown

        if as_markdown:
            typer.echo(markdown(listing()), nl=False)
        else:
            display.show_methods(listing())
