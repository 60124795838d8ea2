"""What the C library does with freed memory decides a CPU's training speed.

A step of training frees its large tensors and asks for as many again. By default glibc hands each block above 32 MB
back to the system at once, and the next tensor is mapped and zeroed anew, page by page, which takes several times as
long as the arithmetic of a neuron. `keep_freed` tells it to keep what was freed; the process then stays as large as it
once was.
"""

import ctypes
import functools
import os

#: From glibc's malloc.h, and the largest value that `mallopt` takes: blocks and free memory of up to 2 GiB are kept.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, MOST = -1, -3, 2 ** 31 - 1


@functools.cache
def keep_freed() -> bool:
    """Keep freed memory in this process from now on; False where the C library has no such setting. `staa.run` calls it
    before it trains on a CPU."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    return bool(mallopt and mallopt(M_MMAP_THRESHOLD, MOST) and mallopt(M_TRIM_THRESHOLD, MOST))
