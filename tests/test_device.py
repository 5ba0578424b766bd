"""What is freed stays at hand: a CPU's training step takes its memory without asking the system for it."""

import os
import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys, torch
from etude.memory import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()

def step():
    tensors = [torch.ones(6 * 2**20) for _ in range(3)]  # 24 MiB each: 18,432 pages in all
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
before = faults()
step()
print(faults() - before)
"""


def faults(how, **environment):
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    run = [sys.executable, "-c", FAULTS, how]
    return int(subprocess.run(run, env=plain | environment, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told")
def test_freed_memory_is_kept():
    assert faults("kept") < 100
    given_back = {"MALLOC_MMAP_THRESHOLD_": "131072"}  # what somebody has set stays
    assert faults("kept", **given_back) > 100
