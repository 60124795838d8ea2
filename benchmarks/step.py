"""Where the time of a training step goes on a GPU: python benchmarks/step.py.

ResNet-20, T 4, bf16, with ReLU, LIF and STAA (beta = 0: no TSRD): the step as one CUDA graph, as `staa.run` has it,
the same and SGD, and its kernels launched one by one. Times are the mean of CALLS steps in a row, once; what the GPU
is busy with is seen by the profiler in one step. Writes benchmarks/step-cuda.json, and prints the kernels that take
longest.
"""

import time
from collections import Counter

import torch
from speed import ReLU, autocast, batch, network, training_step
from timing import machine, wait, write
from torch import nn
from torch.profiler import ProfilerActivity, profile

from staa.cuda_graph import Captured

DEVICE = torch.device("cuda")
BATCHES, CALLS = (128, 512), {"one graph": 30, "kernel by kernel": 10}


def captured(net, x, labels):
    """The training step as one CUDA graph, as `staa.run` has it."""
    graph = Captured(net)

    def work(x, labels):
        with autocast(x.device):
            loss = nn.functional.cross_entropy(net(x), labels)
        loss.backward()
        return loss.detach(),

    def case():
        net.zero_grad()
        graph(work, x, labels)
    return case


def mean(work, calls: int) -> float:
    """Milliseconds of one call."""
    wait(DEVICE)
    start = time.perf_counter()
    for _ in range(calls):
        work()
    wait(DEVICE)
    return round(1e3 * (time.perf_counter() - start) / calls, 2)


def is_product(kernel: str) -> bool:
    """Whether it multiplies matrices, for itself or as a part of it; a convolution is an implicit product."""
    return "splitKreduce" in kernel or "gemm" in kernel.lower() and "implicit" not in kernel.lower()


def kernels(step) -> list:
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        step()
        wait(DEVICE)
    return [event for event in seen.events() if event.device_type == torch.autograd.DeviceType.CUDA]


def measure(neuron, size: int, **settings) -> dict:
    net = network(neuron, DEVICE, **settings)
    x, labels = batch(size, DEVICE)
    single, step = training_step(net, x, labels), captured(net, x, labels)
    optimizer = torch.optim.SGD(net.parameters(), 1e-9, 0.9)
    for _ in range(6):
        step()
    optimizer.step()
    calls = CALLS["one graph"]
    found = {"one graph": mean(step, calls), "one graph, and SGD": mean(lambda: (step(), optimizer.step()), calls)}
    if size == BATCHES[0]:
        single()
        found["kernel by kernel"] = mean(single, CALLS["kernel by kernel"])
    launched = kernels(step)
    times: Counter = Counter()
    for event in launched:
        times[event.name] += event.time_range.elapsed_us()
    for name, microseconds in times.most_common(20):
        print(f"  {microseconds:9.0f} us  {name[:120]}")
    products = {name: microseconds for name, microseconds in times.items() if is_product(name)}
    return found | {"kernels": len(launched), "GPU busy": round(sum(times.values()) / 1e3, 2),
                    "matrix products": round(sum(products.values()) / 1e3, 2),
                    "kernels of them": sum(event.name in products for event in launched)}


def main():
    if not torch.cuda.is_available():
        return print("step.py measures a GPU, and there is none.")
    found = {}
    for name, neuron in {"ReLU": ReLU, "LIF": "lif", "STAA": "staa"}.items():
        for size in BATCHES:
            settings = {"beta": 0.0} if neuron == "staa" else {}
            found[f"{name}, batch {size}"] = measure(neuron, size, **settings)
            print(f"{name}, batch {size}", found[f"{name}, batch {size}"])
    write("step", DEVICE, {"machine": machine(DEVICE), "calls": CALLS, "unit": "ms", "steps": found})


if __name__ == "__main__":
    main()
