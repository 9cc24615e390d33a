"""Freed memory is kept where the C library can do that, and nothing breaks where it cannot."""

import ctypes
import subprocess
import sys

import pytest

from ttmpd.latency import memory

COUNT = """
import resource, sys, torch
from ttmpd.latency.memory import freed_memory, keep_freed_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.zeros(16, 1024, 1024).add_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
first = faults()
kept = keep_freed_memory()
faults()
print(first, faults(), kept, freed_memory())
"""


RELEASE = """
import resource, torch
from ttmpd.latency.memory import keep_freed_memory, release_freed_memory
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() >> 20
def use():
    torch.zeros(64, 1024, 1024).add_(1)
    return resident()
keep_freed_memory()
kept = use()
release_freed_memory()
print(kept - resident())
"""
RESTART = """
import os, sys
from ttmpd.latency.memory import restart_without_small_block_cache
number = os.getpid()
if len(sys.argv) > 2:
    assert number == int(sys.argv[2])  # the same process
else:
    sys.orig_argv.append(str(number))
restart_without_small_block_cache()
print(os.environ["GLIBC_TUNABLES"], *sys.argv[1:2])
"""
on_glibc = pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc"
)


def printed(code: str, *arguments: str) -> list[str]:
    found = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    return found.stdout.split()


@on_glibc
def test_large_blocks_are_not_mapped_anew():
    found = printed(COUNT)
    assert found[2:] == ["True", "kept"]
    assert int(found[1]) < int(found[0]) / 10


@on_glibc
def test_kept_memory_can_be_handed_back():
    assert int(printed(RELEASE)[0]) > 200  # of 256 MiB


@on_glibc
@pytest.mark.parametrize("given", ["", "glibc.malloc.mxfast=0"])
def test_the_program_starts_anew_once_with_its_arguments(monkeypatch, given):
    monkeypatch.setenv("GLIBC_TUNABLES", given)
    wanted = "glibc.malloc.tcache_count=0"
    assert printed(RESTART, "one") == [f"{given}:{wanted}" if given else wanted, "one"]


def test_what_the_user_set_is_left_alone(monkeypatch):
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.tcache_count=3")
    monkeypatch.setattr(memory.os, "execv", lambda *_: pytest.fail("started anew"))
    memory.restart_without_small_block_cache()


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setenv("GLIBC_TUNABLES", "")
    monkeypatch.setattr(memory.os, "execv", lambda *_: pytest.fail("started anew"))
    monkeypatch.setattr(memory, "_kept", False)
    monkeypatch.setattr(ctypes, "CDLL", lambda _name: object())
    memory.restart_without_small_block_cache()
    assert not memory.keep_freed_memory()
    assert memory.freed_memory() == "returned"
