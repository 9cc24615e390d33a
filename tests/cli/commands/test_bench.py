"""`ttmpd bench` on an artifact of the demo."""

from ttmpd.cli.commands import _reporting


def test_bench(made, quick_timing, run):
    found = run("bench", made[0], "--batch-size", 1, "--batch-size", 8, "--device", "cpu")
    assert found.exit_code == 0
    assert "speedup" in found.stdout
    assert "1 thread" in found.stdout


def test_verbose_shows_where_an_error_came_from(tmp_path, run):
    found = run("bench", tmp_path / "no", "--verbose")
    assert found.exit_code == _reporting.FAILED
    assert "Traceback" in found.stderr
