"""The command line: every file of ``commands`` is a command. Everything heavy is imported when one runs."""

import pkgutil
from importlib import import_module
from importlib.metadata import version
from types import ModuleType
from typing import Annotated

import typer

from ttmpd.cli import commands

app = typer.Typer(
    name="ttmpd",
    help="Make a pretrained model faster on this device, adapted to your samples, without labels.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)


def _modules() -> list[ModuleType]:
    """The commands' files in the order that each states as its ``PLACE``."""
    names = (item.name for item in pkgutil.iter_modules(commands.__path__) if not item.name.startswith("_"))
    return sorted((import_module(f"{commands.__name__}.{name}") for name in names), key=lambda module: module.PLACE)


for _module in _modules():
    app.command(_module.__name__.rpartition(".")[2].replace("_", "-"))(_module.command)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"ttmpd {version('ttmpd')}")
        raise typer.Exit


@app.callback()
def _main(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options of the program itself."""


def main() -> None:
    """What the program ``ttmpd`` runs."""
    app()


if __name__ == "__main__":
    main()
