"""Freed memory stays in the process: a second large block costs no page faults. It goes back on request."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys, torch
from glowflow.core.allocator import keep_freed_memory
torch.set_num_threads(1)
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.ones(2_000_000) for _ in range(4)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults(), faults()
print(min(faults() for _ in range(3)))
"""

HEAPS = """
import psutil, threading, torch
from glowflow.core.allocator import keep_freed_memory, return_freed_memory
torch.set_num_threads(1)
keep_freed_memory()
over = threading.Event()
def work(done):
    blocks = [torch.ones(500_000) for _ in range(50)]
    del blocks
    done.set()
    over.wait()
def resident():
    return psutil.Process().memory_info().rss
before = resident()
for _ in range(4):
    done = threading.Event()
    threading.Thread(target=work, args=(done,), daemon=True).start()
    done.wait()
kept = resident() - before
return_freed_memory()
print(kept, resident() - before)
over.set()
"""

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc's settings are glibc's")


@glibc
def test_page_faults_disappear() -> None:
    def count(mode: str) -> int:
        # By default glibc adapts its threshold, and what happens depends on the heap's layout: start from a fixed one.
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}
        command = [sys.executable, "-c", FAULTS, mode]
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120, env=environment)
        return int(done.stdout)

    assert count("keep") < 200 < count("default")


@glibc
def test_what_threads_have_freed_goes_back() -> None:
    done = subprocess.run([sys.executable, "-c", HEAPS], check=True, capture_output=True, text=True, timeout=120)
    kept, left = (int(word) / 2**20 for word in done.stdout.split())
    assert left < 50 < 200 < kept, "MiB; each of four threads has used 95"
