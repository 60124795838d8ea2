"""Where the time of a training step goes on a GPU: python benchmarks/step.py.

ResNet-20, T 4, bf16, with ReLU, LIF and STAA (beta = 0: no TSRD): the step as one CUDA graph, as `staa.run` has it,
the same and SGD, and its kernels launched one by one, these of STAA's equations as they stand too. The cases take
turns; what the GPU is busy with is seen by the profiler in one step. Writes benchmarks/step-cuda.json, and prints the
kernels that take longest.
"""

import argparse
from collections import Counter

import torch
from speed import ReLU, autocast, batch, kept, network, reference, training_step
from timing import interleaved, machine, summary, wait, write
from torch import nn
from torch.profiler import ProfilerActivity, profile

from staa.cuda_graph import Captured

DEVICE = torch.device("cuda")
BATCHES, KEPT = (128, 512), 32  # images; of a step, and of the one whose memory is looked at
NEURONS = {"ReLU": (ReLU, {}), "LIF": ("lif", {}), "STAA": ("staa", {"beta": 0.0})}


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


def kernels(step) -> list:
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        step()
        wait(DEVICE)
    return [event for event in seen.events() if event.device_type == torch.autograd.DeviceType.CUDA]


def profiled(step) -> dict:
    """What the GPU is busy with, in milliseconds."""
    launched, times = kernels(step), Counter()
    for event in launched:
        times[event.name] += event.time_range.elapsed_us()
    for name, microseconds in times.most_common(20):
        print(f"  {microseconds:9.0f} us  {name[:120]}")
    return {"kernels": len(launched), "GPU busy": round(sum(times.values()) / 1e3, 2)}


def with_sgd(step, net):
    optimizer = torch.optim.SGD(net.parameters(), 1e-9, 0.9)
    return lambda: (step(), optimizer.step())


def medians(cases, rounds: int, calls: int) -> dict:
    return {name: summary(times) for name, times in interleaved(cases, DEVICE, rounds, calls=calls).items()}


def measure(size: int, rounds: int) -> tuple[dict, dict]:
    nets = {name: network(neuron, DEVICE, **settings) for name, (neuron, settings) in NEURONS.items()}
    x, labels = batch(size, DEVICE)
    graphs = {name: captured(net, x, labels) for name, net in nets.items()}
    for step in graphs.values():  # the fourth call captures
        for _ in range(4):
            step()
    found = {"one graph": medians(graphs, rounds, 5)}
    found["one graph, and SGD"] = medians({name: with_sgd(graphs[name], net) for name, net in nets.items()}, rounds, 5)
    busy = {name: profiled(step) for name, step in graphs.items()}
    if size == BATCHES[0]:
        single = {name: training_step(net, x, labels) for name, net in nets.items()}
        single["STAA, reference"] = reference(single["STAA"])
        found["kernel by kernel"] = medians(single, max(rounds // 2, 2), 2)
    return found, busy


def memory() -> dict:
    """MiB that a forward pass keeps for the backward pass."""
    x, _ = batch(KEPT, DEVICE)
    nets = {name: network(neuron, DEVICE, **settings) for name, (neuron, settings) in NEURONS.items()}
    found = {name: round(kept(net, x)) for name, net in nets.items()}
    with reference:
        return found | {"STAA, reference": round(kept(nets["STAA"], x))}


def main(rounds: int):
    if not torch.cuda.is_available():
        return print("step.py measures a GPU, and there is none.")
    found = {"machine": machine(DEVICE), "rounds": rounds, "unit": "ms", "steps": {}, "profiled": {}}
    for size in BATCHES:
        found["steps"][size], found["profiled"][size] = measure(size, rounds)
        print(size, found["steps"][size], found["profiled"][size])
    found["MiB kept for the backward pass"] = memory()
    write("step", DEVICE, found)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=10)
    main(parser.parse_args().rounds)
