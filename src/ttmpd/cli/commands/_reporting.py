"""What a command says when it goes wrong, and how it ends."""

import contextlib
import logging
import shlex
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from ttmpd.cli import show as display
from ttmpd.errors import BudgetUnreachableError, TTMPDError, cause
from ttmpd.latency.memory import keep_freed_memory

FAILED, TARGET_MISSED, INTERRUPTED = 1, 3, 130
"""Exit codes; wrong usage is 2."""


@contextlib.contextmanager
def reporting(verbose: bool, resumable: Path | None = None) -> Iterator[None]:
    """Errors as short messages with exit codes, progress on a terminal, the log on standard error."""
    keep_freed_memory()
    level = logging.INFO if verbose else logging.WARNING
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("ttmpd").setLevel(level)
    try:
        with display.progress_shown():
            yield
    except TTMPDError as error:
        if verbose:
            traceback.print_exc()
        display.show_error(_title(error), str(error))
        raise typer.Exit(TARGET_MISSED if isinstance(error, BudgetUnreachableError) else FAILED) from None
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        step = "take a smaller --batch-size or fewer --num-samples"
        display.show_error("Out of memory", f"the run must fit in memory, but it does not ({cause(error)}); {step}")
        raise typer.Exit(FAILED) from None
    except KeyboardInterrupt:
        if resumable is None:
            display.show_error("Interrupted", "nothing was written")
        else:
            display.show_error("Interrupted", f"finished stages are kept in {resumable}; continue with:")
            again = command_line() if "--resume" in sys.argv else f"{command_line()} --resume"
            typer.echo(again, err=True)  # whole on a line, to be copied
        raise typer.Exit(INTERRUPTED) from None


def is_out_of_memory(error: BaseException) -> bool:
    """True when Python, numpy or torch, on a CPU or a GPU, found no room for a value."""
    words = ("can't allocate memory", "out of memory")
    return isinstance(error, MemoryError) or any(text in str(error).lower() for text in words)


def _title(error: TTMPDError) -> str:
    words = {
        "InvalidValueError": "Wrong value",
        "UnsupportedError": "Not supported",
        "SamplesError": "No usable samples",
        "BudgetUnreachableError": "Target out of reach",
        "UnknownMethodError": "No such method",
        "MissingPackageError": "Package missing",
        "ModelError": "Model cannot be used",
        "CheckpointError": "Artifact cannot be used",
    }
    return words.get(type(error).__name__, "Error")


def write_result(file: Path | None, result: dict[str, Any]) -> None:
    """Write the result of a command as JSON, where a file was asked for."""
    from ttmpd.storage import disk_guarded, write_json

    if file is not None:
        with disk_guarded(file):
            write_json(file, result)


def show_machine(device: str) -> None:
    """Print the device and what runs on it."""
    from ttmpd.latency.device import choose_device, machine

    display.show_machine(machine(choose_device(device)))


def command_line() -> str:
    """The command as it was typed."""
    return shlex.join(["ttmpd", *sys.argv[1:]])
