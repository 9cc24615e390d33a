"""`ttmpd methods`: what can be chosen, and what can be set."""

from ttmpd.cli.commands import _reporting
from ttmpd.method import VERBS, names


def test_methods_are_read_from_the_files(run):
    found = run("methods")
    assert found.exit_code == 0
    for verb in VERBS:
        for name in names(verb):
            assert any(f" {verb} " in line and f" {name} " in line for line in found.stdout.splitlines()), name


def test_methods_lists_the_settings_of_one(run, said):
    text = said(run("methods", "distill", "one_time"))
    for words in ("Settings of distill.one_time", "distill.steps", "400", "distill.views", "Fixed views per sample"):
        assert words in text
    assert "has no settings" in said(run("methods", "adapt", "none"))
    refused = run("methods", "adaptation")
    assert refused.exit_code == _reporting.FAILED
    assert "VERB, NAME or VERB NAME" in said(refused)
