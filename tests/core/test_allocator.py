"""Freed memory stays in the process: a second large block costs no page faults."""

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


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc's settings are glibc's")
def test_page_faults_disappear() -> None:
    def count(mode: str) -> int:
        # By default glibc adapts its threshold, and what happens depends on the heap's layout: start from a fixed one.
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}
        command = [sys.executable, "-c", FAULTS, mode]
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120, env=environment)
        return int(done.stdout)

    assert count("keep") < 200 < count("default")
