"""Which device a run takes, and how many cores there are."""

import os
import tempfile
from contextlib import ExitStack
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from .settings import TrainingError


def named(device: str | torch.device | None) -> torch.device:
    """The device of this name; without one a GPU where there is one. Without a number it is the GPU that torchrun gives
    this process, or any, see `take`. Raises TrainingError on a name of no such device."""
    try:
        where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except (RuntimeError, TypeError):
        where = None
    if where is None or where.type not in ("cpu", "cuda"):
        raise TrainingError(f"device must be cpu, or cuda where there is a GPU, got {device!r}.")
    if where.type == "cuda":
        if where.index is None and "LOCAL_RANK" in os.environ:
            where = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        if (where.index or 0) >= torch.cuda.device_count():
            raise TrainingError(f"device {where} is not there: torch sees {torch.cuda.device_count()} GPUs.")
    return where


def take(where: torch.device, held: ExitStack) -> torch.device:
    """The device to compute on; of a GPU without a number the first one that is free. It is held, and torch's current
    one, until `held` ends."""
    if where.type == "cuda":
        where = torch.device("cuda", free(held) if where.index is None else where.index)
        held.enter_context(torch.cuda.device(where))
        held.callback(torch.cuda.empty_cache)  # another run may take this GPU next
    return where


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free(held: ExitStack) -> int:
    """The first GPU that no other run of this user here has taken so, and the first of all where there is none."""
    user = getattr(os, "getuid", int)()  # another user's files could not be opened, held or not
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index).uuid  # its number may be another one in another process
        try:
            held.enter_context(FileLock(Path(tempfile.gettempdir()) / f"staa-{user}-{gpu}.lock", timeout=0))
            return index
        except Timeout:
            pass
        except OSError:  # where no file can be written, nobody knows
            break
    return 0
