"""Whether loading starves training: python benchmarks/loader.py.

On a CPU: the time of one batch from the loader against one training step of STAA ResNet-20 on it, without workers.
On a GPU, and with --device cpu for comparison: images a second from the loader that keeps CIFAR in the device's memory.
Images are noise in CIFAR's form. Writes benchmarks/loader-cpu.json or -cuda.json.
"""

import argparse
import time

import numpy as np
import torch
from speed import network, training_step
from timing import interleaved, machine, summary, wait, write
from torchvision.transforms import v2

from staa import data, resident

BATCH, COUNT = 128, 8192


class Noise:
    data = np.random.default_rng(0).integers(0, 256, (COUNT, 32, 32, 3), dtype=np.uint8)
    targets = [i % 10 for i in range(COUNT)]

    def __len__(self):
        return COUNT

    def __getitem__(self, i):
        return v2.functional.to_pil_image(self.data[i]), self.targets[i]


def view(augment):
    return data.View(Noise(), range(COUNT), data.transform("cifar10", 32, augment))


def endless(augment):
    while True:
        yield from data.batches(view(augment), BATCH, shuffle=True)


def share(device, rounds) -> dict:
    """Loading one batch, and a step on it, in milliseconds."""
    found, net = {}, network("staa", device)
    for augment in ("standard", "autoaugment"):
        batches = endless(augment)
        x, labels = next(batches)
        step = training_step(net, x.to(device, memory_format=torch.channels_last), labels.to(device))
        times = interleaved({"load": lambda batches=batches: next(batches), "step": step}, device, rounds)
        found[augment] = {name: summary(t) for name, t in times.items()}
        part = found[augment]["load"]["median"] / found[augment]["step"]["median"]
        print(augment, f"loading is {part:.1%} of a step")
    return found


def on_device(device) -> dict:
    """Images a second of whole epochs."""
    found, images = {}, resident.Images(view("none"), "cifar10", device)
    for augment in resident.AUGMENTATIONS:
        rates = []
        for epoch in range(4):
            wait(device)
            start = time.perf_counter()
            for _ in resident.Batches(images, BATCH, augment, shuffle=True, seed=0, epoch=epoch):
                pass
            wait(device)
            rates.append(COUNT / (time.perf_counter() - start))
        found[augment] = round(max(rates[1:]))
        print(augment, f"{found[augment]:,} images a second from the device's memory")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    write("loader", device, {"machine": machine(device), "batch": BATCH, "unit": "ms",
                             "share of a step": share(device, arguments.rounds),
                             "images a second from the device's memory": on_device(device)})
