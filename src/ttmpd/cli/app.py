"""The command line: every file of ``commands`` is a command. Everything heavy is imported when one runs."""

import pkgutil
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version
from types import ModuleType
from typing import Annotated

import typer
from rich.markup import escape

from ttmpd.cli import commands

START = (
    "ttmpd demo                     a whole run on handwritten digits, nothing is downloaded",
    "ttmpd inspect --model ID       what can be removed from your model",
    "ttmpd compress --help          the main command, with examples; so does every command",
)


def _lines(title: str, lines: Sequence[str]) -> str:
    """Text for the end of ``--help``; an empty line between two keeps them apart there."""
    return "\n\n".join((f"[bold]{title}[/bold]", *(escape(line) for line in lines)))


app = typer.Typer(
    name="ttmpd",
    help="Make a pretrained model faster on this device, adapted to your samples, without labels.",
    epilog=_lines("Where to start", START),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)


def _modules() -> list[ModuleType]:
    """The commands' files in the order that each states as its ``PLACE``."""
    names = (item.name for item in pkgutil.iter_modules(commands.__path__) if not item.name.startswith("_"))
    return sorted((import_module(f"{commands.__name__}.{name}") for name in names), key=lambda module: module.PLACE)


for _module in _modules():
    _name = _module.__name__.rpartition(".")[2].replace("_", "-")
    app.command(_name, epilog=_lines("Examples", _module.EXAMPLES))(_module.command)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"ttmpd {version('ttmpd')}")
        raise typer.Exit


@app.callback()
def _main(
    _version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, metavar="", help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Options of the program itself."""


def main() -> None:
    """What the program ``ttmpd`` runs."""
    app()


if __name__ == "__main__":
    main()
