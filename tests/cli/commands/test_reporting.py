"""How a command ends when something goes wrong."""

import pytest
import torch
import typer

from ttmpd.cli.commands import _reporting


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("cannot hold 3 TiB"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
def test_a_run_that_does_not_fit_in_memory_says_what_to_make_smaller(error, capsys):
    with pytest.raises(typer.Exit) as ended, _reporting.reporting(False):
        raise error
    assert ended.value.exit_code == _reporting.FAILED
    assert "--batch-size" in capsys.readouterr().err


def test_another_error_of_the_program_is_not_hidden():
    with pytest.raises(RuntimeError, match="a fault of the program"), _reporting.reporting(False):
        raise RuntimeError("a fault of the program")
