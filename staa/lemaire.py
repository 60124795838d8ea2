"""Energy with memory traffic and addressing: Lemaire et al., "An Analytical Estimation of Spiking Neural Networks
Energy Efficiency", ICONIP 2022 (arXiv 2210.13107), applied to a `staa.energy.Measurement`.

The model: 45 nm, 32-bit integers, every number in SRAM, and no reuse: a multiply-add of real numbers reads its input
and its weight from memory, a spike is read from its queue, and each weight that it meets is read together with the
membrane potential that it is added to, which is written back. Every neuron's potential is also read and written once a
time step for leak, reset and firing. An access costs the more, the larger the memory (`pj_per_access`).

Its formulas are taken as SpikingJelly 2 and Qualia, by the authors' laboratory, implement them: one spike meets N_out
weights of a linear layer, where eq. 2.4 in print has N_in N_out.

What the model does not know is ours: a folded BN is one bias per output; a layer of real numbers outside a neuron
adds to potentials uncharged, as in SpikingJelly (Qualia charges it); the attention's layers write their outputs to a
memory of their own, the context product writes X~, and the mixing by M and N takes the place of the leak. Memories
above 1 MB cost what 1 MB costs, though the weights of a wide network would lie in DRAM, where an access costs more:
that favours both networks alike.
"""

from .energy import ELEMENTWISE, Measurement, Operation

PJ_PER_ADD, PJ_PER_MULTIPLY = 0.1, 3.1                      # 32-bit integers
SRAM = [(0, 0.0), (8, 10.0), (32, 20.0), (1024, 100.0)]     # kB, pJ an access of 32 bits; between them a straight line
QUEUE = 1000                                                # spikes that a layer's queue holds
WORD = 4                                                    # bytes
PARTS = ("operations", "addressing", "inputs and outputs", "weights", "potentials")


def pj_per_access(words: float) -> float:
    """pJ of one access of 32 bits to a memory that holds so many."""
    kb = min(words * WORD / 1024, SRAM[-1][0])
    (x0, y0), (x1, y1) = next(pair for pair in zip(SRAM, SRAM[1:]) if kb <= pair[1][0])
    return y0 + (y1 - y0) * (kb - x0) / (x1 - x0)


def energy(found: Measurement) -> dict[str, float]:
    """mJ of one image, by PARTS. A network without spikes is the model's formal network: no potentials, and every layer
    writes its output."""
    total = dict.fromkeys(PARTS, 0.0)
    for op in found.operations:
        for part, pj in (spiking if op.binary else formal)(op, found).items():
            total[part] += pj * 1e-9
    mixed = {op.name for op in found.operations if op.what == "mixing by M and N"}
    for name, rates in found.rates.items():
        units, spikes = found.units[name], found.units[name] * sum(rates)
        leaks = 0 if name in mixed else units * found.T
        total["operations"] += (macs(leaks) + adds(spikes)) * 1e-9  # the reset is an addition a spike
        total["potentials"] += 2 * units * found.T * pj_per_access(units) * 1e-9
        total["inputs and outputs"] += spikes * pj_per_access(QUEUE) * 1e-9
    return total


def advantage(network: Measurement, twin: Measurement) -> tuple[float, float]:
    """Energy of the ANN twin over the network's own: by operations alone (section 4.5), and by this model."""
    return twin.millijoules / network.millijoules, sum(energy(twin).values()) / sum(energy(network).values())


def break_even(network: Measurement, twin: Measurement) -> float:
    """The firing rate of all neurons at which this model gives both the same energy, which is linear in the rate.
    Below 0 where the network takes more than its twin even in silence."""
    silent, always, goal = (sum(energy(found).values()) for found in (network.at_rate(0), network.at_rate(1), twin))
    return (goal - silent) / (always - silent)


def spiking(op: Operation, found: Measurement) -> dict[str, float]:
    """pJ of a layer that sees spikes."""
    met = op.spikes * op.fan_out
    two_axes = op.what == "convolution"  # two multiplications place a spike in a map, none in a vector
    biases = op.outputs * bool(op.biases)
    return {"operations": adds(op.spikes * op.sums + biases), "addressing": adds(met) + macs(2 * op.spikes * two_axes),
            "inputs and outputs": op.spikes * pj_per_access(QUEUE),
            "weights": (met + biases) * pj_per_access(op.coefficients + op.biases),
            "potentials": 2 * met * pj_per_access(op.outputs / found.T)}


def formal(op: Operation, found: Measurement) -> dict[str, float]:
    """pJ of a layer that sees real numbers."""
    once = op.what in ("linear", *ELEMENTWISE)  # each input is read once, not once a multiply-add
    reads = op.inputs if once else op.multiply_adds
    biases = op.outputs * bool(op.biases)
    writes = 0 if op.what == "mixing by M and N" or found.rates and not op.in_neuron else op.outputs
    read, write = (pj_per_access(numbers / found.T) for numbers in (op.inputs, op.outputs))
    indices = op.inputs + op.outputs + op.fan_out * found.T * (op.what == "convolution")
    return {"operations": macs(op.multiply_adds) + adds(biases), "addressing": adds(indices),
            "inputs and outputs": reads * read + writes * write,
            "weights": (op.multiply_adds + biases) * pj_per_access(op.coefficients + op.biases)}


def adds(count: float) -> float:
    return count * PJ_PER_ADD


def macs(count: float) -> float:
    return count * (PJ_PER_MULTIPLY + PJ_PER_ADD)
