"""How fast events become frames, and what the cache saves: python benchmarks/events.py [--recordings 200].

Simulates recordings of digits-dvs, bins the same ones by this project, by tonic alone and by SpikingJelly, times a
first and a second pass through the cache, and writes benchmarks/events.json. Times are best of three, on one thread.
"""

import argparse
import json
import os
import tempfile
import timeit
from pathlib import Path

import numpy as np
import torch
from spikingjelly.datasets.utils import integrate_events_by_fixed_frames_number
from timing import machine
from tonic.transforms import ToFrame

from staa import data, frames, records

T, SIZE = 16, 34


def best(work, repeats=3):
    """Seconds of the fastest of several calls."""
    return min(timeit.repeat(work, number=1, repeat=repeats))


def main(count: int):
    torch.set_num_threads(1)
    digits = data.load("digits-dvs", train=True)
    simulated = best(lambda: [digits[i] for i in range(count)], repeats=1)
    recordings = [digits[i][0] for i in range(count)]
    events = sum(map(len, recordings))
    as_dict = [{name: np.ascontiguousarray(e[name]) for name in "txyp"} for e in recordings]

    results = {"simulated recordings a second": count / simulated}
    for by, bins, split in (("count", "n_event_bins", "number"), ("time", "n_time_bins", "time")):
        to_frame = ToFrame(sensor_size=(SIZE, SIZE, 2), **{bins: T})
        makers = {"this project": lambda: [frames.to_frames(e, T, by, SIZE, SIZE) for e in recordings],
                  "tonic": lambda: [to_frame(e) for e in recordings],
                  "SpikingJelly": lambda: [integrate_events_by_fixed_frames_number(e, split, T, SIZE, SIZE)
                                           for e in as_dict]}
        for name, make in makers.items():
            results[f"million events a second by {by}, {name}"] = events / best(make) / 1e6

    with tempfile.TemporaryDirectory() as runs:
        os.environ["STAA_RUNS"] = runs
        cached = frames.Frames(digits, data.fingerprint(digits), T=T, by="count", sensor=SIZE, size=SIZE)
        results["first epoch, recordings a second"] = count / best(lambda: [cached[i] for i in range(count)], repeats=1)
        results["second epoch, recordings a second"] = count / best(lambda: [cached[i] for i in range(count)])
        results["cache, bytes a recording"] = sum(f.stat().st_size for f in cached.folder.iterdir()) / count

    found = {"conditions": {"recordings": count, "events": events, "T": T, "sensor": SIZE, "threads": 1},
             "machine": machine(torch.device("cpu"), "numpy", "tonic", "spikingjelly"),
             "results": {name: float(f"{value:.3g}") for name, value in results.items()}}
    for name, value in found["results"].items():
        print(f"{name:50} {value:>12,g}")
    records.write(Path(__file__).with_suffix(".json"), (json.dumps(found, indent=1) + "\n").encode())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recordings", type=int, default=200)
    main(parser.parse_args().recordings)
