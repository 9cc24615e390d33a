"""`ttmpd serve`: what it refuses before it serves; the server itself is tested in tests/serving."""

import socket

from ttmpd.cli.commands import _reporting


def test_an_address_in_use_is_refused(demo, run, said):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        shown = run("serve", "--model", demo, "--speedup", 1.5, "--port", port)
    assert shown.exit_code == _reporting.FAILED
    assert f"127.0.0.1 port {port} cannot be used (Address already in use); choose another --port" in said(shown)


def test_an_address_of_another_machine_is_refused(demo, run, said):
    shown = run("serve", "--model", demo, "--speedup", 1.5, "--host", "192.0.2.1")
    assert shown.exit_code == _reporting.FAILED
    assert "choose another --port or --host" in said(shown)


def test_a_speedup_below_one_is_refused(demo, run, said):
    shown = run("serve", "--model", demo, "--speedup", 0.5)
    assert shown.exit_code == _reporting.FAILED
    assert "speedup must be greater than 1" in said(shown)
