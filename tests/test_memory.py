"""Freed memory is kept where the C library can do that, and nothing breaks where it cannot."""

import ctypes
import subprocess
import sys

import pytest

from ttmpd import memory

COUNT = """
import resource, sys, torch
from ttmpd.memory import freed_memory, keep_freed_memory
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


@pytest.mark.skipif(sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc")
def test_large_blocks_are_not_mapped_anew():
    found = subprocess.run([sys.executable, "-c", COUNT], capture_output=True, text=True, check=True).stdout.split()
    assert found[2:] == ["True", "kept"]
    assert int(found[1]) < int(found[0]) / 10


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(memory, "_kept", False)
    monkeypatch.setattr(ctypes, "CDLL", lambda _name: object())
    assert not memory.keep_freed_memory()
    assert memory.freed_memory() == "returned"
