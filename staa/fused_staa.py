"""The STAA neuron in few passes over memory. What it computes stands in `attention.py`; this file says the same in
another order, and is tested against it.

X~ - X does not depend on space, so X~ never comes to be. All that the aggregator does to the current is

    U[t] = p Hm[t-1] + q X[t] + w       with p, q and w a number a sample and channel, (B, C)

and what it has to know of the current are two means over space: the one that GC's attention weighs, and the plain one.
They and their gradient are written by hand: for a GPU and the paper's surrogate in Triton (`fused_staa_gpu.py`), where
with another they are each compiled as a whole; and for a CPU in C (`fused_staa_cpu.py`). In a network that the reader
compiles, they are traced as they stand. For what is small, or where there is no compiler, operators of torch compute
them, differentiated by hand (`fused_staa_in_place.py`). For the backward pass of a large current nothing is kept but
the current (on a GPU by hand, and some numbers a sample and channel); all the rest is computed anew.

Inside, space is one axis, and x lies as in memory: (T, B, HW, C) where the network is channels-last, and (T, B, C, HW)
where not.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import fused
from .fused import (
    constants,
    first_derivative,
    is_channels_last,
    is_large,
    lazy_compile,
    membrane_type,
    shared_memory,
)
from .fused_lif import written_by_hand
from .fused_staa_cpu import in_c, staa_in_c
from .fused_staa_in_place import in_place
from .surrogate import Surrogate

#: Bytes of shared memory that a program on a GPU takes at most, by hand, up to 512 channels and up to 1024.
SHARED, SHARED_WIDE = 101_000, 140_000


def staa(x: Tensor, parameters: dict[str, Tensor], kept: Tensor | None, numbers: tuple, leaky: bool,
         surrogate: Surrogate) -> Tensor:
    """Spikes for the current x (T, B, C, H, W); the rest is as in `equations`."""
    space = axis_of_space(x)
    y, large = as_it_lies(x, space), is_large(x, x.shape[2])
    if torch.compiler.is_compiling():                                             # the reader's own network
        s = equations(y, space, kept, numbers, leaky, surrogate, parameters)
    elif large and is_by_hand(x, surrogate, parameters):
        from .fused_staa_gpu import by_hand  # Triton, which is not everywhere
        s = by_hand(y, space, kept, numbers, leaky, parameters)
    elif in_c(x, surrogate, parameters):
        s = staa_in_c(y, space, kept, numbers, leaky, surrogate, parameters)
    elif large and fused.on_gpu(x) and fused.compiler(x.device.type):
        kept = torch.ones(len(x), dtype=torch.bool, device=x.device) if kept is None else kept  # one graph for both
        s = _Compiled.apply(y, space, kept, numbers, leaky, surrogate, tuple(parameters), *parameters.values())
    else:
        s = in_place(y, space, kept, numbers, leaky, surrogate, parameters, anew=large)
    return as_it_was(s, space, x.shape)


def is_by_hand(x: Tensor, surrogate: Surrogate, parameters: dict[str, Tensor]) -> bool:
    """Whether `fused_staa_gpu` computes x: as the plain neuron, and where some rows of weights fit into registers and
    shared memory. It is handed addresses, so what does not fit together is left to torch, which says so."""
    T, _, C = x.shape[:3]
    widest = max([C, *(2 * len(p) for name, p in parameters.items() if name == "gc.query.bias")])
    fits = all(type(p) in (Tensor, nn.Parameter) and p.device == x.device
               and (not name.startswith("pe") or p.shape == (T, C)) for name, p in parameters.items())
    room = shared_memory(x.device) >= (SHARED if widest <= 512 else SHARED_WIDE)
    return fits and widest <= 1024 and written_by_hand(x, surrogate) and room


def equations(x: Tensor, space: int, kept: Tensor | None, numbers: Sequence, leaky: bool,
              surrogate: Surrogate, parameters: dict[str, Tensor]) -> Tensor:
    """Spikes for the current x as it lies. kept (T,): False where TSRD drops the aggregator. numbers: alpha, then those
    of `LIF`. leaky: as in `STAALIF`. parameters: those of the blocks that are there, by their names in `STAALIF`,
    (T, C), (out, in) or (C,).
    """
    alpha, decay, gain, v_th, v_reset, *settings = numbers
    dtype, x = x.dtype, x.to(membrane_type(x))
    zero = x.new_zeros(len(x), 1, 1)
    pe_input, pe_membrane, pe_output = (parameters[name].unsqueeze(1) if name in parameters else zero for name in
                                        ("pe_input.weight", "pe_membrane.weight", "pe_output.weight"))

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ parameters[f"{name}.weight"].mT + parameters[f"{name}.bias"]

    mean, added = x.mean(space), pe_input                                         # (T, B, C), and so is X~ - X
    if "gc.key.weight" in parameters:
        y = x if space == -2 else x.mT                                            # (T, B, HW, C)
        key, bias = (parameters[f"gc.key.{name}"].expand(*y.shape[:2], -1) for name in ("weight", "bias"))
        k = (weighed(y.mT, key) + bias).softmax(-1)                               # (T, B, HW), eq. 7; PE cancels
        context = weighed(y, k) + pe_input
        q = linear("gc.query", context)
        q = F.layer_norm(q, q.shape[-1:], parameters["gc.norm.weight"], parameters["gc.norm.bias"]).relu()
        added = added + linear("gc.value", q)                                     # eqs. 8, 9
    sa = "sa.squeeze.weight" in parameters
    if leaky:                                                                     # Hm is handed on leaked: see below
        leak, decay, pe_membrane = decay, 1.0, decay * pe_membrane
    total, rest = (alpha, 0.0) if sa else (decay + gain, v_reset * (1 - decay))
    # p (Hm + PE) + (total - p) X~ = p Hm + (total - p) X + total added + p (PE - added)
    seen, w, slope = mean + added + pe_membrane, total * added + pe_output + rest, pe_membrane - added
    hm, hm_mean, spikes = torch.zeros_like(x[0]) + v_reset, v_reset, []
    for t, (x_t, seen_t, w_t, slope_t) in enumerate(zip(x.unbind(), seen.unbind(), w.unbind(), slope.unbind())):
        p = zero[t] + decay
        if sa:                                                                    # (B, C), eq. 12
            p = alpha * linear("sa.excite", linear("sa.squeeze", seen_t + hm_mean).relu()).sigmoid()
        q, w_t = total - p, w_t + p * slope_t
        if kept is not None:
            p, q, w_t = (torch.where(kept[t], n, dropped) for n, dropped in ((p, 1.0), (q, 1.0), (w_t, 0.0)))
        p, q, w_t = p.unsqueeze(space), q.unsqueeze(space), w_t.unsqueeze(space)
        s, hm = surrogate.fire(p * hm + q * x_t + w_t, v_th, v_reset, *settings)
        hm_mean = hm.mean(space)
        if leaky:
            hm, hm_mean = v_reset + leak * (hm - v_reset), v_reset + leak * (hm_mean - v_reset)
        spikes.append(s.to(dtype))
    return torch.stack(spikes)


def weighed(x: Tensor, weights: Tensor) -> Tensor:
    """The sum over n of x (T, B, n, m), weighed by (T, B, n); a matrix product would be compiled by itself."""
    return (x * weights.unsqueeze(-1)).sum(-2)


class _Compiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, space, kept, numbers, leaky, surrogate, names, *values):
        numbers = constants(numbers, membrane_type(x), x.device)
        ctx.save_for_backward(x, *values)
        ctx.how = space, kept, numbers, leaky, surrogate, names
        return _forward(x, *ctx.how, values)

    @staticmethod
    @first_derivative
    def backward(ctx, ds):
        x, *values = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):  # as it was on the way forward, see `STAALIF`
            dx, dvalues = _backward(ds.contiguous(), x, *ctx.how, values)
        return dx, *[None] * 6, *dvalues


@lazy_compile
def _forward(x, space, kept, numbers, leaky, surrogate, names, values):
    return equations(x, space, kept, numbers.unbind(), leaky, surrogate, dict(zip(names, values)))


@lazy_compile
def _backward(ds, x, space, kept, numbers, leaky, surrogate, names, values):
    gradient = torch.func.vjp(lambda x, values: equations(x, space, kept, numbers.unbind(), leaky, surrogate,
                                                          dict(zip(names, values))), x, values)[1]
    return gradient(ds)


# Layout.

def axis_of_space(x: Tensor) -> int:
    """Where it lies in memory: before the channels, or after."""
    return -2 if is_channels_last(x) else -1


def as_it_lies(x: Tensor, space: int) -> Tensor:
    """x (T, B, C, H, W) in the order of memory and contiguous: (T, B, HW, C) or (T, B, C, HW)."""
    return (x.permute(0, 1, 3, 4, 2).flatten(2, 3) if space == -2 else x.flatten(3)).contiguous()


def as_it_was(x: Tensor, space: int, shape: torch.Size) -> Tensor:
    """The inverse of `as_it_lies`."""
    x = x.unflatten(space, shape[3:])
    return x.permute(0, 1, 4, 2, 3) if space == -2 else x
