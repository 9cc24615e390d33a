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


def test_the_state_names_what_the_environment_sets(monkeypatch):
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.tcache_count=0:glibc.rtld.nns=1")
    monkeypatch.setattr(memory, "_keeping", True)
    assert memory.freed_memory() == "kept, glibc.malloc.tcache_count=0"


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.setattr(memory, "_keeping", False)
    monkeypatch.setattr(ctypes, "CDLL", lambda _name: object())
    assert not memory.keep_freed_memory()
    assert memory.freed_memory() == "returned"
