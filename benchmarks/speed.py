"""Neurons and networks against their peers, in one run: python benchmarks/speed.py [--device cuda] [--rounds 30].

Each LIF neuron is the same one: decay 0.25, threshold 1, hard reset to 0; that it gives the same spikes is checked
before anything is timed. Surrogates are rectangular, but for norse, which has none, and for SpikingJelly on a GPU,
whose kernels know the triangular one. The siblings' neurons, which are others, stand beside their own equations. The
current is channels-last, as inside a network. Where it was cut off, the next call goes on.
"""

import argparse
import hashlib
import json
from pathlib import Path
from unittest import mock

import torch
from timing import HERE, interleaved, machine, summary, write
from torch import nn

import staa
from staa import fused, fused_staa_cpu, records
from staa.attention import STAALIF
from staa.fsta import FSTALIF
from staa.neuron import LIF, over_time
from staa.statten import STAttenLIF
from staa.surrogate import rectangle

#: Currents (T, B, C, H, W); on a GPU larger ones, or their time is that of the Python around them. Of many time steps a
#: GPU computes LIF only: what is compiled of the others takes minutes.
SHAPES = {"cpu": [(4, 32, 64, 32, 32), (16, 8, 64, 32, 32)], "cuda": [(4, 2048, 64, 32, 32), (16, 512, 64, 32, 32)]}
TYPES = {"cpu": [torch.float32], "cuda": [torch.float32, torch.bfloat16]}
BATCH = {"cpu": 32, "cuda": 128}  # of the networks
#: What is measured so far; the next call goes on from there.
PART = HERE / "speed.part"
#: Marks the section of a current where the C library hands freed memory back to the system, as it does by itself.
HANDED_BACK = ", freed memory handed back"
#: `reference(work)` runs a case as the equations stand.
reference = mock.patch.object(fused, "enabled", False)


def no_compiler(work):
    """The case without any compiler."""
    for module, name in ((fused, "compiler"), (fused, "triton_works"), (fused_staa_cpu, "available")):
        work = mock.patch.object(module, name, lambda *device: False)(work)
    return work


class ReLU(nn.ReLU):
    def __init__(self, channels, T):
        super().__init__()


class SpikingJelly(nn.Module):
    def __init__(self, channels, T, device):
        super().__init__()
        self.run = spikingjelly(device)

    def forward(self, x):
        return self.run(x)


def spikingjelly(device):
    from spikingjelly.activation_based import functional, surrogate

    kind = (surrogate.PiecewiseQuadratic if device.type == "cuda" else surrogate.Rect)(alpha=1.0)

    def forward(x):  # of a bf16 current its module keeps the potential in bf16, for which it has no kernel
        v = torch.zeros_like(x[0], dtype=torch.float32)
        return functional.lif_multi_step(x, v, tau=4 / 3, decay_input=False, surrogate_function=kind)[0]
    return forward


def snntorch(device):
    import snntorch

    layer = snntorch.Leaky(beta=0.25, threshold=1.0, reset_mechanism="zero", reset_delay=False, spike_grad=rectangle)
    layer.to(device)

    def forward(x):
        membrane, spikes = torch.zeros_like(x[0]), []
        for x_t in x.unbind():
            s, membrane = layer(x_t, membrane)
            spikes.append(s)
        return over_time(spikes)
    return forward


def norse(device):
    from norse.torch import LIFBoxCell, LIFBoxParameters

    cell = LIFBoxCell(p=LIFBoxParameters(tau_mem_inv=torch.tensor(750.0), v_th=torch.tensor(1.0)), dt=0.001).to(device)

    def forward(x):
        state, spikes = None, []
        for x_t in (x / 0.75).unbind():  # its input is weighted by dt / tau
            s, state = cell(x_t, state)
            spikes.append(s)
        return over_time(spikes)
    return forward


def current(shape, device, dtype):
    x = torch.randn(shape[0] * shape[1], *shape[2:], generator=torch.Generator().manual_seed(0))
    return x.to(device, dtype).contiguous(memory_format=torch.channels_last).unflatten(0, shape[:2])


def both_ways(layer, x, gradient):
    def case():
        layer(x.detach().requires_grad_()).backward(gradient)
    return case


def neurons(shape, dtype, keep_freed, device, rounds) -> dict:
    """Forward and backward of one neuron."""
    x, gradient = current(shape, device, dtype), current(shape, device, dtype)
    lif = LIF()
    layers = {"SpikingJelly": spikingjelly(device), "snnTorch": snntorch(device), "norse": norse(device)}
    if dtype == torch.bfloat16:  # snnTorch and norse keep the potential in it: other spikes
        layers = {"SpikingJelly": layers["SpikingJelly"]}
    for name, layer in layers.items():
        different, most = (layer(x) != lif(x)).float().mean().item(), 1e-5 if dtype == torch.float32 else 1e-2
        assert different < most, f"{name} is another neuron: {100 * different:.3f} % of the spikes differ"
    room = torch.empty_like(x)
    cases = {"copy": lambda: room.copy_(x)}
    cases |= {name: both_ways(layer, x, gradient) for name, layer in layers.items()}
    plain = both_ways(lif, x, gradient)
    cases |= {"LIF": plain, "LIF, no compiler": no_compiler(plain), "LIF, reference": reference(plain)}
    if device.type == "cpu" or shape == SHAPES["cuda"][0]:
        for name, other in {"STAA": STAALIF(shape[2], shape[0], beta=0.0).to(device),
                            "FSTA's LIF": FSTALIF(shape[2], shape[0], temporal=False, spatial=False, slope=3.0),
                            "STAtten's LIF": STAttenLIF()}.items():
            work = both_ways(other, x, gradient)
            cases |= {name: work, f"{name}, reference": reference(work)}
            if name == "STAA":
                cases[f"{name}, no compiler"] = no_compiler(work)
    return {name: summary(t) for name, t in interleaved(cases, device, rounds, keep_freed).items()}


def network(neuron, device, T=4, width=1.0, name="resnet20", **settings):
    if neuron is SpikingJelly:
        settings = {"device": device}
    net = staa.build(name, neuron, T=T, width=width, **settings)
    return net.to(device, memory_format=torch.channels_last)


def batch(size, device):
    images = torch.randn(size, 3, 32, 32).to(device, memory_format=torch.channels_last)
    return images, torch.randint(10, (size,)).to(device)


def autocast(device):
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def training_step(net, x, labels):
    def case():
        net.zero_grad()
        with autocast(x.device):
            loss = nn.functional.cross_entropy(net(x), labels)
        loss.backward()
    return case


def inference(net, x):
    def case():
        with torch.no_grad(), autocast(x.device):
            net(x)
    return case


def kept(net, x) -> float:
    """MiB that a forward pass keeps for the backward pass."""
    seen = {}

    def pack(tensor):
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast(x.device):
        net(x)
    return sum(seen.values()) / 2 ** 20


def networks(device, rounds) -> tuple[dict, dict]:
    """A training step of ResNet-20, T 4, or of STAtten's transformer, in milliseconds, and the MiB that it keeps for
    the backward pass."""
    x, labels = batch(BATCH[device.type], device)
    nets = {"ReLU": network(ReLU, device), "SpikingJelly": network(SpikingJelly, device),
            "LIF": network("lif", device), "STAA": network("staa", device, beta=0.0), "FSTA": network("fsta", device),
            "STAtten-2-256": network("statten", device, name="statten-2-256")}
    own = ("LIF", "STAA", "FSTA", "STAtten-2-256")
    cases = {name: training_step(net, x, labels) for name, net in nets.items()}
    cases |= {f"{name}, reference": reference(training_step(nets[name], x, labels)) for name in own}
    cases |= {f"{name}, inference": inference(net, x) for name, net in nets.items()}
    memory = {name: kept(net, x) for name, net in nets.items()}
    with reference:
        memory |= {f"{name}, reference": kept(nets[name], x) for name in own}
    # Python launches hundreds of kernels in each: fewer calls are long enough.
    return ({name: summary(t) for name, t in interleaved(cases, device, rounds, calls=4).items()},
            {name: round(mib) for name, mib in memory.items()})


def write_part(found: dict):
    records.write(PART, json.dumps(found).encode())


def code() -> str:
    """Of the files that measure and that are measured."""
    files = sorted([*Path(staa.__file__).parent.glob("*.py"), *HERE.glob("*.py")])
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]


def begun(about) -> dict:
    """What an earlier call under the same conditions measured before it was ended."""
    found = json.loads(PART.read_text()) if PART.exists() else {}
    return found if about.items() <= found.items() else about


def rows(found: dict) -> list[tuple[str, float, str, bool]]:
    """(what, measured, goal, whether it is met)."""
    handed_back = [section for section in found if section.endswith(HANDED_BACK)]
    first, second, *bf16 = [section for section in found if section.startswith("(") and section not in handed_back]
    step, device = "ResNet-20, training step", "cuda" if "device" in found["machine"] else "cpu"

    def ratio(section, above, below):
        return found[section][above]["median"] / found[section][below]["median"]

    lines = [  # what, measured, goal on a CPU, goal on a GPU
        *((f"LIF {section}: SpikingJelly's time over ours", ratio(section, "SpikingJelly", "LIF"), ">= 8", "")
          for section in handed_back),
        (f"LIF {first}: SpikingJelly's time over ours", ratio(first, "SpikingJelly", "LIF"), ">= 8", ">= 1.2"),
        (f"LIF {second}: SpikingJelly's time over ours", ratio(second, "SpikingJelly", "LIF"), ">= 5", ""),
        *((f"LIF {section}: SpikingJelly's time over ours", ratio(section, "SpikingJelly", "LIF"), "", ">= 1.5")
          for section in bf16),
        (f"LIF {first} without a compiler: SpikingJelly's time over ours",
         ratio(first, "SpikingJelly", "LIF, no compiler"), ">= 4", ""),
        # 20 bytes a neuron-step are the least, which is 2.5 copies; on a GPU 1.3 times that.
        (f"LIF {first}: our time over that of one copy", ratio(first, "LIF", "copy"), "<= 4", "<= 3.25"),
        (f"STAA {first}: the equations as they stand over ours", ratio(first, "STAA, reference", "STAA"), ">= 4", "")]
    if "STAA, no compiler" in found[first]:
        lines.append((f"STAA {first} without a compiler: the equations as they stand over ours",
                      ratio(first, "STAA, reference", "STAA, no compiler"), "", ""))
    if "network" in found:  # measured last
        kept = found["MiB kept for the backward pass"]
        lines += [
            (f"{step}: LIF over ReLU", ratio("network", "LIF", "ReLU"), "<= 1.1", "<= 1.25"),
            (f"{step}: SpikingJelly over ReLU", ratio("network", "SpikingJelly", "ReLU"), "", ""),
            (f"{step}: STAA over LIF", ratio("network", "STAA", "LIF"), "<= 1.2", "<= 1.5"),
            (f"{step}: STAA's equations as they stand over ours", ratio("network", "STAA, reference", "STAA"), "",
             ">= 3"),
            (f"{step}: FSTA over LIF", ratio("network", "FSTA", "LIF"), "", ""),
            ("STAtten-2-256, training step: its equations as they stand over ours",
             ratio("network", "STAtten-2-256, reference", "STAtten-2-256"), "", ""),
            (f"{step} with STAA: images a second", 1e3 * BATCH[device] / found["network"]["STAA"]["median"],
             "", ">= 20000"),
            ("ResNet-20 with STAA: MiB kept for the backward pass", kept["STAA"], "<= 700", ""),
            ("ResNet-20 with STAA: the same over that of its equations as they stand",
             kept["STAA"] / kept["STAA, reference"], "", "<= 0.53")]
    checked = [(what, value, goals[device == "cuda"]) for what, value, *goals in lines]
    return [(what, value, goal, not goal or reached(value, goal)) for what, value, goal in checked]


def reached(value: float, goal: str) -> bool:
    """goal: ">= 8" or "<= 4"."""
    return value >= float(goal[3:]) if goal[0] == ">" else value <= float(goal[3:])


def main(device: torch.device, rounds: int):
    found = begun({"machine": machine(device, "spikingjelly", "snntorch", "norse"), "code": code(),
                   "rounds": rounds, "unit": "ms"})
    sections = [(f"{shape}{' bfloat16' if dtype == torch.bfloat16 else ''}", shape, dtype, True)
                for dtype in TYPES[device.type] for shape in SHAPES[device.type]]
    if device.type == "cpu":  # first, since `keep_freed` holds for the rest of the process
        shape = SHAPES["cpu"][0]
        sections.insert(0, (f"{shape}{HANDED_BACK}", shape, torch.float32, False))
    for section, *how in sections:
        if section not in found:
            found[section] = neurons(*how, device, rounds)
            write_part(found)
    if "network" not in found:
        write("speed", device, found)
        found["network"], found["MiB kept for the backward pass"] = networks(device, max(rounds // 2, 3))
        write_part(found)
    for section in [name for name in found if name.startswith("(")] + ["network"]:
        print(f"\n{section}")
        for name, t in found[section].items():
            print(f"  {name:22} {t['median']:10.2f} ms  [{t['quartiles'][0]:.2f}, {t['quartiles'][1]:.2f}]")
    print()
    for what, value, goal, met in rows(found):
        print(f"  {what:75} {value:8.2f}  {goal:>7}  {'' if not goal else 'met' if met else 'missed'}")
    write("speed", device, found)
    PART.unlink(missing_ok=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=30)
    arguments = parser.parse_args()
    main(torch.device(arguments.device), arguments.rounds)
