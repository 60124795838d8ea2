"""benchmarks/README.md out of the newest measurements: python benchmarks/report.py."""

import json
import statistics

from speed import BATCH, reached, rows
from timing import HERE

from staa import records

PEERS = ("copy", "SpikingJelly", "snnTorch", "norse", "LIF, reference", "LIF, no compiler", "LIF", "STAA, reference",
         "STAA", "FSTA's LIF, reference", "FSTA's LIF", "STAtten's LIF, reference", "STAtten's LIF")
TEXT = """# How fast it is

`make bench` measures what is on this page and writes it anew (but for "Runs on a GPU", which are records). Every ratio
comes from one run in which the cases take turns, and is one of medians; a row that misses its goal is shown as it is.
By itself the C library of a Linux hands freed memory back to the system, and that is how a peer's user meets it: where
a row says so, nothing is changed. Elsewhere on a CPU freed memory is kept (`staa.memory.keep_freed`), as `staa.run`
does, for the peers as well, which gain most by it. None of it is a test: what the tests hold is that nothing but the
current is kept for the backward pass (by the STAA neuron on a GPU, some numbers an image and channel as well), and that
each neuron compiles without a graph break.
"""


def table(head, lines) -> str:
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in [head, ["---"] * len(head), *lines])


def described(found) -> str:
    m = found["machine"]
    commit = f", commit {m['commit']}" if m.get("commit") else ""
    return f"{m.get('device', m['processor'])}, {m['threads']} threads, torch {m['torch']}{commit}"


def on_a_gpu(found) -> str:
    return " on a GPU" if kind(found) == "cuda" else ""


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
    text = (f"## {'Neurons and networks' if 'network' in found else 'Neurons'}{on_a_gpu(found)}\n\n{described(found)}, "
            f"{found['rounds']} rounds.\n\n{goals}\n\n"
            "One neuron, forward and backward, (T, B, C, H, W), float32 where no type is said:\n\n"
            f"{table(['current', 'neuron', 'median, ms', 'quartiles'], times)}\n")
    if "network" not in found:
        return f"{text}\nThe networks, which `speed.py` measures last, are missing: see the next section.\n"
    steps = [(name, ms(t['median']), f"{ms(t['quartiles'][0])} to {ms(t['quartiles'][1])}",
              found["MiB kept for the backward pass"].get(name, "")) for name, t in found["network"].items()]
    return (f"{text}\nResNet-20, and STAtten's transformer, T 4, batch {BATCH[kind(found)]}, training step unless it "
            f"says inference:\n\n{table(['neurons', 'median, ms', 'quartiles', 'MiB kept'], steps)}\n")


def step(found) -> str:
    steps, kept = found["steps"], found["MiB kept for the backward pass"]

    def ratio(size, above, below, what="one graph"):
        return steps[size][what][above]["median"] / steps[size][what][below]["median"]

    measured = []
    for size in steps:
        measured += [(f"batch {size}: LIF over ReLU", ratio(size, "LIF", "ReLU"), "<= 1.25"),
                     (f"batch {size}: STAA over LIF", ratio(size, "STAA", "LIF"), "<= 1.5")]
        for neuron, goal in (("STAA", ">= 20000"), ("LIF", "")):
            rate = 1e3 * int(size) / steps[size]["one graph, and SGD"][neuron]["median"]
            measured.append((f"batch {size}: images a second with {neuron} and SGD, without loading", rate, goal))
    single = "kernel by kernel"
    equations = steps["128"][single]["STAA, reference"]["median"]
    measured += [("batch 128, kernel by kernel: STAA's equations as they stand over ours",
                  ratio("128", "STAA, reference", "STAA", single), ">= 3"),
                 ("batch 128: STAA's equations, which are not captured, kernel by kernel, over ours as one graph",
                  equations / steps["128"]["one graph"]["STAA"]["median"], ""),
                 ("batch 32: MiB kept for the backward pass with STAA, over that of its equations",
                  kept["STAA"] / kept["STAA, reference"], "<= 0.53")]
    own = [ms(cases["one graph"]["STAA"]["median"] - cases["one graph"]["LIF"]["median"]) for cases in steps.values()]
    goals = [(what, f"{value:,.0f}" if value > 100 else f"{value:.2f}", goal,
              "" if not goal else "met" if reached(value, goal) else "**missed**") for what, value, goal in measured]
    times = [(size, name, what, ms(t["median"]), f"{ms(t['quartiles'][0])} to {ms(t['quartiles'][1])}")
             for size, cases in steps.items() for what, nets in cases.items() for name, t in nets.items()]
    busy = [(size, name, t["kernels"], ms(t["GPU busy"]))
            for size, nets in found["profiled"].items() for name, t in nets.items()]
    return f"""## A training step on a GPU

ResNet-20, T 4, bf16, no TSRD, milliseconds. On a GPU `staa.run` captures the gradients of a batch as one CUDA graph
(`staa.cuda_graph`); the kernels of LIF and STAA are written by hand, and, of the ReLU network as well, those of the
average pooling and of large maps' BN.
{described(found)}, {found["rounds"]} rounds; kernel by kernel, {found["rounds"] // 2}.

{table(["quantity, of one graph where nothing else is said", "measured", "goal", ""], goals)}

Of a step as one graph the STAA neurons take {" and ".join(own)} ms more than LIF's, at batch {" and ".join(steps)}.
Kernel by kernel, at batch 128, LIF takes {ratio("128", "LIF", "ReLU", single):.2f} times as long as ReLU, and STAA
{ratio("128", "STAA", "LIF", single):.2f} times as long as LIF: that way the goals are missed.

{table(["batch", "neurons", "step", "median, ms", "quartiles"], times)}

What the GPU is busy with in one step as a graph, under the profiler:

{table(["batch", "neurons", "kernels", "busy, ms"], busy)}
"""


def training() -> str:
    """Of the records of full-width networks."""
    wide = (run for run in records.vouched() if run.config["width"] == 1 and "NVIDIA" in run.provenance["device"])
    runs = sorted(wide, key=lambda run: run.config["neuron"])
    same = [{name: value for name, value in run.config.items() if not name.startswith("neuron")} for run in runs]
    assert all(config == same[0] for config in same), "the section describes one training"
    lines = []
    for run in runs:
        c, made = run.config, run.provenance
        late = statistics.median(made["seconds_per_epoch"][-10:])
        lines.append((c["neuron"].upper(), f"{run.accuracy:.2f}", f"{made['seconds']:.0f}", f"{late:.2f}",
                      made["device"], made["software"]["torch"].partition("+")[0], made["commit"][:7]))
    twins = [(twin["neuron"].upper(), *(f"{epoch[kind]:.{digits}f}" for kind, digits in
                                        (("train_loss", 3), ("train_accuracy", 1)) for epoch in (
                                            next(run for run in runs if run.config["neuron"] == twin["neuron"])
                                            .outcome["epochs"][0], twin["after epoch 1"])))
             for twin in json.loads((HERE / "twin.json").read_text())]
    c = runs[0].config
    return f"""## Runs on a GPU

ResNet-20, T {c["T"]}, full width, {runs[0].outcome["train_images"]:,} images of CIFAR-10, batch {c["batch_size"]},
{c["precision"]}, augmentation {c["augment"]}, {c["epochs"]} epochs with a warm-up of {c["warmup_epochs"]}, seed
{c["seed"]}, by `staa.train`. An epoch is the median of the last ten, the evaluation of
{runs[0].outcome["test_images"]:,} images included; other programs ran beside LIF's first half.

{table(["neurons", "accuracy, %", "the run, s", "an epoch, s", "GPU", "torch", "commit"], lines)}

To check the GPU, the first epoch of both was trained on a CPU too, in float32 (`twin.json`); mean loss and accuracy in
training:

{table(["neurons", "loss, GPU", "loss, CPU", "accuracy, GPU", "accuracy, CPU"], twins)}

94 % was not reached in these epochs; more were not tried.
"""


def scaling(found) -> str:
    def against_spikingjelly(name):
        ratios = [n[name]["median"] / n["SpikingJelly"]["median"] for axis in ("T", "batch", "width")
                  for n in found[axis].values()]
        return f"{min(ratios):.2f} to {max(ratios):.2f}"

    return (f"## Scaling{on_a_gpu(found)}\n\nResNet-20 at width 1/4, T 4, batch 16, one of the three changed at a "
            f"time; medians, on logarithmic axes. {described(found)}. SpikingJelly's time is that of its LIF neuron: "
            f"ours takes {against_spikingjelly('LIF')} of it, and the network with STAA in every neuron "
            f"{against_spikingjelly('STAA')}.\n\n"
            f"![Training step and memory against T, batch and width](scaling-{kind(found)}.png)\n")


def loader(found) -> str:
    lines = [(augment, ms(t['load']['median']), ms(t['step']['median']),
              f"{100 * t['load']['median'] / t['step']['median']:.1f} %")
             for augment, t in found["share of a step"].items()]
    here = ", here on the CPU" if kind(found) == "cpu" else ""
    rates = [(augment, f"{rate:,}") for augment, rate in found["images a second from the device's memory"].items()]
    return (f"## Loading{on_a_gpu(found)}\n\nA batch of {found['batch']} CIFAR images against a training step of STAA "
            f"ResNet-20 on it, without worker processes. {described(found)}.\n\n"
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
    parts_of = {"speed": speed, "step": step, "scaling": scaling, "loader": loader}
    sections = {f"{name}-{device}": section for device in ("cpu", "cuda") for name, section in parts_of.items()}
    for name, section in (sections | {"events": events}).items():
        if (path := HERE / f"{name}.json").exists():
            parts.append(section(json.loads(path.read_text())))
        if name == "step-cuda":
            parts.append(training())
    missing = [f"`{name}.py`" for name in ("speed", "step", "scaling", "loader")
               if not (HERE / f"{name}-cuda.json").exists()]
    parts.append(f"""## Not measured on a GPU yet

{", ".join([*missing, "anything on several GPUs"])}. What a GPU would compute is tested without one: the kernels that
torch.compile writes for an H200, and those written by hand, run in Triton's interpreter, on a CPU.
""")
    records.write(HERE / "README.md", "\n".join(parts).encode())


if __name__ == "__main__":
    main()
