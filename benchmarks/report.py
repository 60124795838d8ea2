"""benchmarks/README.md out of the newest measurements: python benchmarks/report.py."""

import json

from speed import BATCH, rows
from timing import HERE

from staa import records

PEERS = ("copy", "SpikingJelly", "snnTorch", "norse", "LIF, reference", "LIF, no compiler", "LIF", "STAA, reference",
         "STAA", "FSTA's LIF, reference", "FSTA's LIF", "STAtten's LIF, reference", "STAtten's LIF")
TEXT = """# How fast it is

`make bench` measures everything on this page and writes it anew. Every ratio comes from one run in which the cases
take turns, and is one of medians; a row that misses its goal is shown as it is. By itself the C library of a Linux
hands freed memory back to the system, and that is how a peer's user meets it: where a row says so, nothing is changed.
Elsewhere on a CPU freed memory is kept (`staa.memory.keep_freed`), as `staa.run` does, for the peers as well, which
gain most by it. None of it is a test: what the tests hold is that nothing but the current is kept for the backward
pass, and that each neuron compiles without a graph break.
"""


def table(head, lines) -> str:
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in [head, ["---"] * len(head), *lines])


def described(found) -> str:
    m = found["machine"]
    return f"{m.get('device', m['processor'])}, {m['threads']} threads, torch {m['torch']}"


def ms(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def kind(found) -> str:
    return "cuda" if "device" in found["machine"] else "cpu"


def speed(found) -> str:
    goals = table(["quantity", "measured", "goal", ""],
                  [(what, f"{value:.2f}", goal, "" if not goal else "met" if met else "**missed**")
                   for what, value, goal, met in rows(found)])
    times = []
    for shape in (key for key in found if key.startswith("(")):
        times += [(shape, name, f"{t['median']:.2f}", f"{t['quartiles'][0]:.2f} to {t['quartiles'][1]:.2f}")
                  for name in PEERS if (t := found[shape].get(name))]
    steps = [(name, ms(t['median']), f"{ms(t['quartiles'][0])} to {ms(t['quartiles'][1])}",
              found["MiB kept for the backward pass"].get(name, "")) for name, t in found["network"].items()]
    return (f"## Neurons and networks\n\n{described(found)}, {found['rounds']} rounds.\n\n{goals}\n\n"
            "One neuron, forward and backward, (T, B, C, H, W), float32 where no type is said:\n\n"
            f"{table(['current', 'neuron', 'median, ms', 'quartiles'], times)}\n\n"
            f"ResNet-20, and STAtten's transformer, T 4, batch {BATCH[kind(found)]}, training step unless it says "
            "inference:\n\n"
            f"{table(['neurons', 'median, ms', 'quartiles', 'MiB kept'], steps)}\n")


def scaling(found) -> str:
    def against_spikingjelly(name):
        ratios = [n[name]["median"] / n["SpikingJelly"]["median"] for axis in ("T", "batch", "width")
                  for n in found[axis].values()]
        return f"{min(ratios):.2f} to {max(ratios):.2f}"

    return (f"## Scaling\n\nResNet-20 at width 1/4, T 4, batch 16, one of the three changed at a time; medians, on "
            f"logarithmic axes. {described(found)}. SpikingJelly's time is that of its LIF neuron: ours takes "
            f"{against_spikingjelly('LIF')} of it, and the network with STAA in every neuron "
            f"{against_spikingjelly('STAA')}.\n\n"
            f"![Training step and memory against T, batch and width](scaling-{kind(found)}.png)\n")


def loader(found) -> str:
    lines = [(augment, ms(t['load']['median']), ms(t['step']['median']),
              f"{100 * t['load']['median'] / t['step']['median']:.1f} %")
             for augment, t in found["share of a step"].items()]
    here = ", here on the CPU" if kind(found) == "cpu" else ""
    rates = [(augment, f"{rate:,}") for augment, rate in found["images a second from the device's memory"].items()]
    return (f"## Loading\n\nA batch of {found['batch']} CIFAR images against a training step of STAA ResNet-20 on it, "
            f"without worker processes. {described(found)}.\n\n"
            f"{table(['augmentation', 'loading, ms', 'step, ms', 'share'], lines)}\n\n"
            f"The loader of a GPU, which keeps the images in the device's memory{here}:\n\n"
            f"{table(['augmentation', 'images a second'], rates)}\n")


def events(found) -> str:
    c = found["conditions"]
    return (f"## Events\n\n{c['recordings']} simulated recordings, {c['events']:,} events, into {c['T']} frames of "
            f"{c['sensor']} x {c['sensor']}, {c['threads']} thread.\n\n"
            f"{table(['quantity', 'measured'], [(k, f'{v:,g}') for k, v in found['results'].items()])}\n")


def main():
    parts = [TEXT]
    sections = {f"{name}-{device}": section for device in ("cpu", "cuda")
                for name, section in (("speed", speed), ("scaling", scaling), ("loader", loader))}
    for name, section in (sections | {"events": events}).items():
        if (path := HERE / f"{name}.json").exists():
            parts.append(section(json.loads(path.read_text())))
    if not list(HERE.glob("*-cuda.json")):
        parts.append("## GPU\n\nNothing is measured on a GPU yet: `python benchmarks/speed.py --device cuda`, and the "
                     "same of `scaling.py` and `loader.py`.\nWhat a GPU would compute is tested without one: the "
                     "kernels that torch.compile writes for an H200 run in Triton's\ninterpreter, on a CPU.\n")
    records.write(HERE / "README.md", "\n".join(parts).encode())


if __name__ == "__main__":
    main()
