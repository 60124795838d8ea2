"""Measuring several things side by side in one run, and writing what came out with the machine's description."""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch

from staa import memory, records

HERE = Path(__file__).parent


def interleaved(cases: dict[str, Callable], device: torch.device, rounds: int, keep_freed: bool = True,
                calls: int = 10) -> dict[str, list[float]]:
    """Milliseconds of each case, once a round, after two calls to warm up. Noise of the machine meets all alike, and
    so does the memory: on a CPU what is freed is kept from the first `keep_freed` on, as `staa.run` does, for the peers
    as well. On a GPU a call is the mean of several, sent one after the other as in training: the longer of the host's
    time and the GPU's."""
    if keep_freed and device.type == "cpu":
        memory.keep_freed()
    times = {name: [] for name in cases}
    for round in range(-2, rounds):
        for name, work in cases.items():
            together = calls if device.type == "cuda" and round >= 0 else 1
            wait(device)
            start = time.perf_counter()
            for _ in range(together):
                work()
            wait(device)
            if round >= 0:
                times[name].append(1e3 * (time.perf_counter() - start) / together)
    return times


def wait(device: torch.device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def summary(times: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
    return {"median": round(middle, 3), "quartiles": [round(low, 3), round(high, 3)]}


def machine(device: torch.device, *libraries: str) -> dict:
    cpu = Path("/proc/cpuinfo").read_text().splitlines() if os.path.exists("/proc/cpuinfo") else []
    name = next((line.split(":")[1].strip() for line in cpu if line.startswith("model name")), platform.machine())
    found = {"processor": name, "cores": os.cpu_count(), "threads": torch.get_num_threads(),
             "system": platform.system(), "python": platform.python_version()}
    if device.type == "cuda":
        found["device"] = torch.cuda.get_device_name(device)
    return found | {library: version(library) for library in ("torch", "torchvision", *libraries)}


def write(name: str, device: torch.device, found: dict):
    """benchmarks/NAME-cpu.json or -cuda.json, whole or not at all."""
    records.write(HERE / f"{name}-{device.type}.json", (json.dumps(found, indent=1) + "\n").encode())
