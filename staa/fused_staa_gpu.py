"""The STAA neuron on a GPU, its kernels written by hand. What it computes stands in `attention.py`, in the order of
`fused_staa.py`; this file says the same kernel by kernel (`kernels*.py`), and is tested against it.

Compiled, those equations are a hundred kernels, nearly all of them shorter than the GPU needs to begin one, since what
hangs together over time is only a number a sample and channel. Here they are some fifteen:

    context               one program an image: GC's attention over space, and the plain mean (eqs. 7, 8)
    query                 GC's query, norm and value, some images a program (eqs. 8, 9)
    steps                 one sample a program: SA, the potential and the spikes, step by step (eqs. 12, 14, 2, 3)
    steps_backward, query_backward, context_backward; weights and over_batch for the parameters' gradients

Where SA's weights are more than a sample's current, and there are many samples, a program takes several: `wide_steps`.
Where a map does not fit into the registers of one program, several share it, and each time step is launched by itself:
the mean over the whole map has to be known before the next one. What the steps before left of the potential is computed
anew. Sums over images are the same in every run: there is no atomic operation. In bf16 the current's gradient is
rounded twice, once before what comes through the means is added.
"""

import functools

import torch
from torch import Tensor

from .fused import cdiv, first_derivative, next_power_of_2, on
from .kernels import over_batch, weights
from .kernels_gc import context, context_backward, query, query_backward
from .kernels_steps import steps, steps_backward
from .kernels_wide import wide_steps, wide_steps_backward

#: Elements of a current that one program holds, step by step; where a map has more, those of the part that a program
#: goes through, and of a tile of it. And of a tile of `context`. (These and the following were chosen on an H200.)
WHOLE, PART, TILE, IMAGE_TILE = 16384, 32768, 4096, 2048
#: Elements of SA's weights that one program loads at once. From WIDE channels on they are more than its current: the
#: forward pass loads twice as many then, with more threads.
WEIGHTS, WIDE = 8192, 512
#: From EARLY channels on, the forward pass reads a step's current before it computes the gate.
EARLY = 128
#: From MANY channels on, where maps are small, a program takes SEVERAL samples, if so many PROGRAMS are left.
MANY, SEVERAL, PROGRAMS = 256, 4, 64
#: Time steps up to which a kernel is compiled for each: it takes long, and the longer the more steps are before.
UNROLLED = 8
#: Images whose products are summed by one program, and the most parts that are summed afterwards.
IMAGES, PARTS = 64, 8


def by_hand(x: Tensor, space: int, kept: Tensor | None, numbers: tuple, leaky: bool,
            parameters: dict[str, Tensor]) -> Tensor:
    """Spikes for the current x as it lies; the rest is as in `fused_staa.equations`. For the backward pass x is kept
    itself; of each image and channel five numbers, of each image C / r and one more; and the weights."""
    return _ByHand.apply(x, space, kept, numbers, leaky, tuple(parameters), *parameters.values())


class _ByHand(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, space, kept, numbers, leaky, names, *values):
        with on(x.device):
            s, saved = forward(x, Neuron(x, space, kept, numbers, leaky, dict(zip(names, values))))
        ctx.save_for_backward(x, *saved, *values)
        ctx.how = space, kept, numbers, leaky, names
        return s

    @staticmethod
    @first_derivative
    def backward(ctx, ds):
        space, kept, numbers, leaky, names = ctx.how
        x, *saved = ctx.saved_tensors
        saved, values = saved[:-len(names) or None], saved[len(saved) - len(names):]
        with on(x.device):
            neuron = Neuron(x, space, kept, numbers, leaky, dict(zip(names, values)))
            dx, gradients = backward(ds.contiguous(), x, neuron, *saved)
        return dx, *[None] * 5, *[gradients[name] for name in names]


class Neuron:
    """A neuron's settings and parameters as the kernels take them, and what they are launched with, for a current x
    (T, B, N, C) or (T, B, C, N); N is space."""

    def __init__(self, x: Tensor, space: int, kept: Tensor | None, numbers: tuple, leaky: bool,
                 parameters: dict[str, Tensor]):
        self.p, self.kept, self.device = parameters, kept, x.device
        last = space == -2
        T, B, N, C = x.shape if last else (*x.shape[:2], x.shape[3], x.shape[2])
        self.T, self.B, self.images, self.C = T, B, T * B, C
        self.SA, self.GC = (f"{block}.bias" in parameters for block in ("sa.squeeze", "gc.query"))
        self.H = len(parameters["sa.squeeze.bias"]) if self.SA else 1
        self.Q = len(parameters["gc.query.bias"]) if self.GC else 1

        self.alpha, decay, gain, self.v_th, self.v_reset, self.a = numbers
        self.leak: float = decay if leaky else 1.0
        self.decay: float = 1.0 if leaky else decay
        self.total = self.alpha if self.SA else self.decay + gain
        self.rest = 0.0 if self.SA else self.v_reset * (1 - self.decay)
        self.pe, self.pe_membrane, self.pe_output = (
            parameters.get(f"pe_{place}.weight") for place in ("input", "membrane", "output"))
        if self.pe_membrane is not None:  # it is added before Hm leaks
            self.pe_membrane = self.leak * self.pe_membrane

        sizes = launch_sizes(B, N, C, self.H, self.Q, last=last, SA=self.SA, GC=self.GC, leaky=leaky)
        self.whole, self.parts, self.maps, self.steps, self.steps_backward, self.queries, self.wide = sizes

    def new(self, *shape: int) -> Tensor:
        """An empty tensor in float32."""
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def launches(self) -> list[tuple[int, int, int | None]]:
        """The time steps of each launch, from the first up to the second; and how many the compiler is to know."""
        if self.whole:
            return [(0, self.T, None)]
        return [(t, t + 1, t if self.T <= UNROLLED else None) for t in range(self.T)]

    def launches_backward(self) -> list[tuple[int, int, int | None]]:
        """The same; a launch begins with what follows of the step after its last one, and of step 0 that is left."""
        if self.whole:
            return [(-1, self.T, None)]
        return [*reversed(self.launches()), (-1, 0, -1 if self.T <= UNROLLED else None)]


@functools.cache
def launch_sizes(B: int, N: int, C: int, H: int, Q: int, *, last: bool, SA: bool, GC: bool, leaky: bool) -> tuple:
    """Whether a map fits into one program, and else how many share it; then what is compiled into GC's kernels over
    maps, into the steps there and back, into GC's query, and into the steps of several samples, if a program takes
    several."""
    BC, everywhere, units = map(next_power_of_2, (C, N, H))
    whole = everywhere * BC <= WHOLE
    BN = everywhere if whole else max(TILE // BC, 1)
    span = BN if whole else max(PART // BC, BN)
    parts = cdiv(N, span)
    common = dict(last=last, SA=SA, leaky=leaky, whole=whole, N=N, C=C, H=H, span=span, parts=parts, BN=BN, BC=BC,
                  BP=min(next_power_of_2(parts), max(TILE // BC, 1)))
    BJ = max(WEIGHTS // BC, 1)
    back = common | dict(BJ=min(BJ, units), num_warps=warps(BN * BC // 2048))
    there = back if BC < WIDE else common | dict(BJ=min(2 * BJ, units), num_warps=16)
    there = there | dict(early=whole and BC >= EARLY)
    maps = dict(last=last, GC=GC, N=N, C=C, BN=min(everywhere, max(IMAGE_TILE // BC, 1)), BC=BC,
                num_warps=1 if N * C < WHOLE else 2)
    BQ = max(next_power_of_2(Q), 16)
    queries = dict(C=C, H=Q, BR=16, BD=max(min(BC, 8192 // BQ, 64), 16), BJ=BQ,
                   BV=max(min(8192 // BQ, 64), 16), num_warps=warps(BQ // 16))
    G = SEVERAL if whole and SA and BC >= MANY and B >= SEVERAL * PROGRAMS and SEVERAL * BN * BC <= WHOLE else 0
    wide = dict(last=last, leaky=leaky, N=N, C=C, H=H, G=G, BN=BN, BC=BC, BH=max(units, 16),
                BD=max(min(8192 // max(units, 16), 64), 16), BJ=max(8192 // BC, 16), num_warps=8)
    return whole, parts, maps, there, back, queries, wide if G else None


def warps(wanted: int) -> int:
    return min(max(wanted, 4), 16)


def forward(x: Tensor, z: Neuron) -> tuple[Tensor, tuple]:
    """Spikes, as x lies, and what the backward pass needs."""
    pools, ps, ws, mean, contexts, log_denominator = *(z.new(z.images, z.C) for _ in range(5)), z.new(z.images)
    q = value = excite = None
    if z.GC or z.SA:
        context[(z.images,)](x, z.p.get("gc.key.weight"), z.pe, mean, contexts, log_denominator, z.B, **z.maps)
    if z.GC:
        q, value = z.new(z.images, z.Q), z.new(z.images, z.C)
        query[(cdiv(z.images, 16),)](
            contexts, z.p["gc.query.weight"], z.p["gc.query.bias"], z.p["gc.norm.weight"], z.p["gc.norm.bias"],
            z.p["gc.value.weight"], z.p["gc.value.bias"], q, value, z.images, **z.queries)
    s = torch.empty_like(x)
    if z.wide:
        wide_steps[(cdiv(z.B, z.wide["G"]),)](
            x, s, mean, value, ps, ws, pools, z.new(z.images, z.H), z.pe, z.pe_membrane, z.pe_output, z.kept,
            z.p["sa.squeeze.weight"], z.p["sa.squeeze.bias"], z.p["sa.excite.weight"], z.p["sa.excite.bias"], z.alpha,
            z.total, z.v_th, z.v_reset, z.leak, z.T, z.B, **z.wide)
        return s, (pools, ps, ws, contexts, log_denominator, q, value, None)
    if z.SA:
        excite = z.p["sa.excite.weight"].mT.contiguous()
    part = z.new(z.T, z.B, z.parts, z.C) if not z.whole else None
    for start, stop, unrolled in z.launches():
        steps[(z.B, z.parts)](
            x, s, mean, value, ps, ws, pools, part, z.pe, z.pe_membrane, z.pe_output, z.kept,
            z.p.get("sa.squeeze.weight"), z.p.get("sa.squeeze.bias"), excite, z.p.get("sa.excite.bias"), z.alpha,
            z.decay, z.total, z.rest, z.v_th, z.v_reset, z.leak, z.B, start, stop, unrolled, **z.steps)
    return s, (pools, ps, ws, contexts, log_denominator, q, value, excite)


def backward(ds: Tensor, x: Tensor, z: Neuron, pools, ps, ws, contexts, log_denominator, q, value,
             excite) -> tuple[Tensor, dict[str, Tensor]]:
    """The gradients of x, and of the parameters by their names."""
    # What is summed over images lies side by side, one row an image.
    widths = {"excite": z.C, "value": z.C, "squeeze": z.H}
    if z.GC:
        widths |= {"context": z.C, "key": z.C, "query": z.Q, "norm": z.Q, "norm bias": z.Q}
    widths |= {place: z.C for place in ("membrane", "output") if f"pe_{place}.weight" in z.p}
    rows = z.new(z.images, sum(widths.values()))
    K, of = rows.shape[1], dict(zip(widths, rows.split(list(widths.values()), 1)))

    dx, squeezed, dpools = torch.empty_like(x), z.new(z.images, z.H), z.new(z.images, z.C) if z.SA else None
    dhm, part = (None, None) if z.whole else (z.new(*x.shape[1:]), z.new(2, z.T, z.B, z.parts, z.C))
    if z.wide:
        wide_steps_backward[(cdiv(z.B, z.wide["G"]),)](
            ds, x, dx, value, ps, ws, pools, squeezed, dpools, of["excite"], of["value"], of["squeeze"],
            of.get("membrane"), of.get("output"), z.pe, z.pe_membrane, z.kept, z.p["sa.squeeze.weight"],
            z.p["sa.squeeze.bias"], z.p["sa.excite.weight"], K, z.alpha, z.total, z.v_th, z.v_reset, z.leak, z.a, z.T,
            z.B, **z.wide)
    else:
        for start, stop, unrolled in z.launches_backward():
            steps_backward[(z.B, z.parts if stop else 1)](
                ds, x, dx, dhm, value, ps, ws, pools, part, squeezed, dpools, of["excite"], of["value"], of["squeeze"],
                of.get("membrane"), of.get("output"), z.pe, z.pe_membrane, z.kept, z.p.get("sa.squeeze.weight"),
                z.p.get("sa.squeeze.bias"), excite, K, z.alpha, z.total, z.v_th, z.v_reset, z.leak, z.a, z.T, z.B,
                start, stop, unrolled, **z.steps_backward)
    queried = None
    if z.GC:
        queried = z.new(z.images, z.Q)
        query_backward[(cdiv(z.images, 16),)](
            of["value"], K, z.p["gc.value.weight"], z.p["gc.norm.weight"], z.p["gc.norm.bias"], z.p["gc.query.weight"],
            q, queried, of["query"], of["norm"], of["norm bias"], of["context"], z.images, **z.queries)
    if z.GC or z.SA:
        context_backward[(z.images,)](x, dx, z.p.get("gc.key.weight"), z.pe, contexts, log_denominator, of["value"],
                                      of.get("context"), dpools, of.get("key"), K, z.B, **z.maps)

    gradients = weight_gradients(z, of, K, pools, squeezed, contexts, queried)
    sums = z.new(z.T, K)
    over_batch[(z.T, cdiv(K, 32))](rows, sums, z.B, K, BR=64, BJ=32)
    by_step = dict(zip(widths, sums.split(list(widths.values()), 1)))
    total = dict(zip(widths, sums.sum(0).split(list(widths.values()))))
    if z.SA:
        gradients |= {"sa.squeeze.bias": total["squeeze"], "sa.excite.bias": total["excite"]}
    if z.GC:
        gradients |= {"gc.key.weight": total["key"][None], "gc.key.bias": torch.zeros_like(z.p["gc.key.bias"]),
                      "gc.query.bias": total["query"], "gc.value.bias": total["value"],
                      "gc.norm.weight": total["norm"], "gc.norm.bias": total["norm bias"]}
    gradients["pe_input.weight"] = by_step["context" if z.GC else "value"]
    gradients |= {f"pe_{place}.weight": scale * by_step[place]
                  for place, scale in (("membrane", z.leak), ("output", 1.0)) if place in by_step}
    return dx, gradients


def blocks(**sizes: int) -> dict[str, int]:
    """As many as there are, from 16, the least of a product, to 64."""
    return {name: min(max(next_power_of_2(size), 16), 64) for name, size in sizes.items()}


def weight_gradients(z: Neuron, of: dict[str, Tensor], K: int, pools, squeezed, contexts, queried) -> dict[str, Tensor]:
    """Those of SA's and GC's weights, by their names: of some images each, and then the sum of these."""
    shapes = {"sa.squeeze": (z.H, z.C), "sa.excite": (z.C, z.H)} if z.SA else {}
    if z.GC:
        shapes |= {"gc.query": (z.Q, z.C), "gc.value": (z.C, z.Q)}
    if not shapes:
        return {}
    areas = [D * J for D, J in shapes.values()]
    images = max(IMAGES, next_power_of_2(cdiv(z.images, PARTS)))
    sums, size = z.new(cdiv(z.images, images), sum(areas)), blocks(BC=z.C, BH=z.H, BQ=z.Q)
    most = cdiv(z.C, size["BC"]) * max(cdiv(z.H, size["BH"]), cdiv(z.Q, size["BQ"]))
    weights[(most, len(sums), len(shapes))](
        of["squeeze"] if z.SA else None, of["excite"], of.get("query"), of["value"], K, pools, squeezed, contexts,
        queried, sums, sums.shape[1], z.images, images, C=z.C, H=z.H, Q=z.Q, BR=32, **size)
    return {f"{name}.weight": w.view(shape) for (name, shape), w in zip(shapes.items(), sums.sum(0).split(areas))}
