"""The command line: every file of ``commands`` is a command. Everything heavy is imported when one runs."""

import pkgutil
from importlib import import_module

import typer

from ttmpd.cli import commands

app = typer.Typer(
    name="ttmpd",
    help="Make a pretrained model faster on this device, adapted to your samples, without labels.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)

ORDER = ("inspect", "compress", "evaluate", "bench", "adapt", "early_exit", "train_student", "serve", "methods", "demo")
"""As a user comes to need them; others follow."""


def _commands() -> list[str]:
    found = [module.name for module in pkgutil.iter_modules(commands.__path__) if not module.name.startswith("_")]
    return sorted(found, key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), name))


for _name in _commands():
    app.command(_name.replace("_", "-"))(import_module(f"ttmpd.cli.commands.{_name}").command)


def main() -> None:
    """What the program ``ttmpd`` runs."""
    app()


if __name__ == "__main__":
    main()
