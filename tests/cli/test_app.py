"""The program as a whole: its version, its help, and what it says to wrong usage."""

import shlex
import subprocess
import sys

import pytest

import ttmpd
from ttmpd.cli import app

COMMANDS = [module.__name__.rpartition(".")[2] for module in app._modules()]


def test_version(run):
    shown = run("--version")
    assert shown.exit_code == 0
    assert shown.stdout == f"ttmpd {ttmpd.__version__}\n"


def test_help_lists_commands_by_place_and_says_where_to_start(run, said):
    shown = run("--help")
    lines = [line.strip("│ ").split() for line in shown.stdout.splitlines()]
    listed = [line[0] for line in lines if line]
    places = [listed.index(name) for name in ("inspect", "compress", "evaluate", "bench", "adapt", "early-exit")]
    assert places == sorted(places)
    assert "Where to start ttmpd demo" in said(shown)


def test_without_a_command_the_help_is_shown(run, said):
    shown = run()
    assert shown.exit_code == 2
    assert "Where to start" in said(shown)


def test_sections_of_options_stand_in_one_order(run):
    text = run("compress", "--help").stdout
    places = [text.index(f"─ {name} ─") for name in ("Model", "Data", "Target", "Output", "Methods", "Run")]
    assert places == sorted(places)
    assert "12ms|0.6x" in text


@pytest.mark.parametrize("name", COMMANDS)
def test_the_examples_of_a_command_take_options_that_exist(name, run, said):
    examples = next(module.EXAMPLES for module in app._modules() if module.__name__.endswith(f".{name}"))
    text = said(run(name.replace("_", "-"), "--help"))
    for example in examples:
        assert " ".join(example.split()) in text
        program, *arguments = shlex.split(example, comments=True)
        if program == "ttmpd":
            checked = run(*arguments, "--help")  # options are read before the help is shown
            assert checked.exit_code == 0, said(checked)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("compres",), "Did you mean 'compress'?"),
        (("compress", "--speed", "2"), "--speedup"),
        (("inspect",), "Missing option '--model'"),
        (("compress", "--model", "m", "--data", "d", "--speedup", "2", "--latency", "0.5x"), "give exactly one of"),
        (("compress", "--model", "m", "--data", "d", "--output", "o"), "but got none; e.g. --speedup 1.5"),
        (("compress", "--model", "m", "--data", "d", "--speedup", "2"), "give --output DIR"),
        (("early-exit", "--model", "m", "--data", "d", "--output", "o"), "one of --speedup and --latency"),
        (("inspect", "--model", "m", "--json", "/nowhere/x.json"), "must lie in a folder that exists"),
        (("serve", "--model", "m"), "one of --speedup and --latency"),
    ],
)
def test_wrong_usage_says_the_next_step(arguments, words, run, said):
    shown = run(*arguments)
    assert shown.exit_code == 2
    assert words in said(shown)
    assert "--help' for help" in said(shown)


def test_help_loads_no_torch():
    code = "import sys, ttmpd.cli.app; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
