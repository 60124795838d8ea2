"""Freed memory is kept: the same pages come again. Counted by the kernel, in a process of its own."""

import subprocess
import sys

PROGRAM = """
import resource, torch
from staa import memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.ones(10_000_000)  # 40 MB, 9,766 pages of 4 KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = faults()
kept, _ = memory.keep_freed(), faults()
print(kept, before, faults())
"""


def test_large_blocks_are_not_mapped_anew():
    out = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True).stdout
    kept, before, after = out.split()
    assert kept == "True" and int(before) > 4 * 9_000, "glibc maps each of them anew"
    assert int(after) < 1_000
