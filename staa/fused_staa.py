"""The STAA neuron in few passes over memory. What it computes stands in `attention.py`; this file only computes it
faster, and is tested against it.

X~ - X does not depend on space, so X~ never comes to be. All that the aggregator does to the current is

    U[t] = p Hm[t-1] + q X[t] + w       with p, q and w a number a sample and channel, (B, C)

and what it has to know of the current are two means over space: the one that GC's attention weighs, and the plain one.
The big tensors are worked through by hand in here, forward and backward; the small ones between them, (B, C), are left
to autograd, on a tape for each time step. Kept for the backward pass are the current, the attention's weights and the
tapes; the membrane potential is computed anew.

Below, x is (T, B, H, W, C) where the network is channels-last, and (T, B, C, H, W) where not.
"""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .fused import (
    compiles,
    constants,
    fire_backward,
    fire_backward_in_place,
    is_channels_last,
    lazy_compile,
    membrane_type,
    reset,
)


def aggregated(x: Tensor, key: Tensor, bias: Tensor, added: Callable, mixing: Callable, parameters: Sequence[Tensor],
               numbers: tuple) -> Tensor:
    """Spikes of a STAA neuron for the current x (T, B, C, H, W).

    key (C,), bias (1,): of GC's attention over space. added(context) is X~ - X, (T, B, C), for the context that this
    attention picks, (T, B, C). mixing(t, hm, x, added) is p, q and w of one step, (B, C), from Hm's mean over space,
    X's and what is added, (B, C). Both are differentiated by autograd, and `parameters` are what they use; numbers:
    v_th, v_reset, a.
    """
    last = is_channels_last(x)
    y = x.permute(0, 1, 3, 4, 2) if last else x.contiguous()
    spikes = _Aggregated.apply(y, key, bias, added, mixing, numbers, last, *parameters)
    return spikes.permute(0, 1, 4, 2, 3) if last else spikes


class _Aggregated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, key, bias, added, mixing, numbers, last, *parameters):
        dtype, space, compiled = membrane_type(x), (1, 2) if last else (2, 3), compiles(x)
        positions = by_position(x, last).to(dtype)                                  # (N, HW, C), N = T B
        k = (positions @ key).softmax(-1)                                           # (N, HW), eq. 7
        weights = torch.stack([k, torch.full_like(k, 1 / k.shape[1])], 1)           # (N, 2, HW)
        context, mean = (weights @ positions).unflatten(0, x.shape[:2]).unbind(2)   # (T, B, C)
        first, tapes = Tape(added, context), []
        hm, s = torch.full_like(x[0], numbers[1], dtype=dtype), torch.empty_like(x)
        for t in range(len(x)):
            tapes.append(Tape(functools.partial(mixing, t), hm.mean(space), mean[t], first.out[0][t]))
            _step(compiled, hm, x[t], *wide(tapes[-1].out, last), s[t], numbers)
        ctx.save_for_backward(x, key, weights)
        ctx.parameters = parameters  # themselves: a tape knows them by identity
        ctx.numbers, ctx.last, ctx.first, ctx.tapes = numbers, last, first, tapes
        return s

    @staticmethod
    @once_differentiable
    def backward(ctx, ds):
        x, key, weights = ctx.saved_tensors
        last, parameters, compiled = ctx.last, ctx.parameters, compiles(x)
        mixed = [wide(tape.out, last) for tape in ctx.tapes]
        hm = torch.empty_like(x, dtype=weights.dtype)  # Hm[t-1] at t
        hm[0] = ctx.numbers[1]
        for t in range(len(x) - 1):
            _membrane(compiled, hm[t], x[t], *mixed[t], hm[t + 1], ctx.numbers)
        ds, dx, dparameters = ds.contiguous(), torch.empty_like(x), [None] * len(parameters)
        dhm, dmean_hm = torch.zeros_like(hm[0]), torch.zeros_like(ctx.tapes[0].out[0])
        dmean: list[Tensor] = []
        dadded: list[Tensor] = []
        for t in reversed(range(len(x))):
            spread = dmean_hm / weights.shape[-1]  # over the positions whose mean it is
            dpqw = _step_backward(compiled, dhm, ds[t], *wide([spread], last), hm[t], x[t], *mixed[t], dx[t], last,
                                  ctx.numbers)
            (dmean_hm, dm, da), dparameters = ctx.tapes[t].backward(dpqw, parameters, dparameters)
            dmean.insert(0, dm)
            dadded.insert(0, da)
        (dcontext,), dparameters = ctx.first.backward([torch.stack(dadded)], parameters, dparameters)
        both = torch.stack([dcontext, torch.stack(dmean)], 2).flatten(0, 1)        # (N, 2, C)
        dkey = context_backward(by_position(x, last), key, weights, both, by_position(dx, last))
        return dx, dkey, torch.zeros_like(key[:1]), *[None] * 4, *dparameters      # a bias cancels in the softmax


class Tape:
    """A small differentiable function of detached inputs, run now and differentiated later."""

    def __init__(self, function: Callable, *inputs: Tensor):
        with torch.enable_grad():
            self.inputs = [x.detach().requires_grad_() for x in inputs]
            out = function(*self.inputs)
        self.graph = [out] if isinstance(out, Tensor) else list(out)
        self.out = [y.detach() for y in self.graph]

    def backward(self, grads, parameters, so_far) -> tuple[list[Tensor], list[Tensor | None]]:
        """The gradients of the inputs, and those of the parameters added to `so_far`; None where there is none."""
        used = [(y, grad) for y, grad in zip(self.graph, grads) if y.requires_grad]
        if not used:
            return [torch.zeros_like(x) for x in self.inputs], so_far
        outputs, grads = zip(*used)
        wanted = [*self.inputs, *(p for p in parameters if p.requires_grad)]
        found = iter(torch.autograd.grad(outputs, wanted, grads, retain_graph=True, allow_unused=True))
        inputs = [torch.zeros_like(x) if g is None else g for x, g in zip(self.inputs, found)]
        own = [next(found) if p.requires_grad else None for p in parameters]
        return inputs, [new if old is None else old if new is None else old + new for old, new in zip(so_far, own)]


def by_position(x: Tensor, last: bool) -> Tensor:
    """(T B, HW, C), a view."""
    return x.flatten(0, 1).flatten(1, 2) if last else x.flatten(0, 1).flatten(2).mT


def wide(numbers: list[Tensor], last: bool) -> list[Tensor]:
    """(B, C) over space."""
    return [n[:, None, None] if last else n[..., None, None] for n in numbers]


def context_backward(x: Tensor, key: Tensor, weights: Tensor, grad: Tensor, dx: Tensor) -> Tensor:
    """Add the gradient of weights @ x, (N, 2, C), to dx; the gradient of key. x, dx: (N, HW, C).

    What reaches a position is the sum of three outer products: of the context, of the mean and of the logits.
    """
    y, k = x.to(key.dtype), weights[:, :1]
    dk = grad[:, :1] @ y.mT                                             # (N, 1, HW)
    dlogits = k * (dk - (k * dk).sum(-1, keepdim=True))
    here = torch.cat([weights, dlogits], 1)                             # (N, 3, HW)
    there = torch.cat([grad, key.expand(len(grad), 1, -1)], 1)          # (N, 3, C)
    dx.baddbmm_(here.mT.to(dx.dtype), there.to(dx.dtype))
    return (dlogits @ y).sum((0, 1))


def one_pass(in_place: Callable, **options) -> Callable:
    """A function of tensors and the neuron's numbers (v_th, v_reset, a), called as function(compiled, ...): compiled,
    or by its counterpart, `in_place`. options: Inductor's."""
    def decorated(function: Callable) -> Callable:
        fast = lazy_compile(function, **options)

        def either(compiled: bool, hm: Tensor, *args):
            *tensors, numbers = args
            if compiled:
                return fast(hm, *tensors, constants(numbers, hm.dtype, hm.device))
            return in_place(hm, *tensors, *numbers)
        return either
    return decorated


def potential(hm: Tensor, x: Tensor, p: Tensor, q: Tensor, w: Tensor, out: Tensor | None = None) -> Tensor:
    return torch.addcmul(w, p, hm, out=out).addcmul_(q, x.to(hm.dtype))


def _step_in_place(hm, x, p, q, w, s, v_th, v_reset, a):
    u = potential(hm, x, p, q, w)
    torch.ge(u, v_th, out=s)
    reset(hm, u, v_th, v_reset)


def _membrane_in_place(hm, x, p, q, w, out, v_th, v_reset, a):
    u = potential(hm, x, p, q, w)
    reset(out, u, v_th, v_reset)


def _step_backward_in_place(dhm, ds, dmean, hm, x, p, q, w, dx, last, v_th, v_reset, a):
    space = (1, 2) if last else (2, 3)
    dhm += dmean
    u, room = potential(hm, x, p, q, w), torch.empty_like(hm)
    fire_backward_in_place(u, ds.to(u.dtype), dhm, 1.0, v_th, v_reset, a, (room, dhm), du := torch.empty_like(hm))
    sums = [torch.mul(du, factor, out=room).sum(space) for factor in (hm, x)] + [du.sum(space)]
    torch.mul(du, q, out=dx)
    torch.mul(du, p, out=dhm)
    return sums


# U reads five tensors. Without the option Inductor would write it to memory first.
@one_pass(_step_in_place, realize_reads_threshold=16)
def _step(hm, x, p, q, w, s, settings):
    """S[t] into s; Hm[t] takes the place of Hm[t-1]."""
    v_th, v_reset, a = settings.unbind()
    u = p * hm + q * x + w
    fired = u - v_th >= 0
    s.copy_(fired)
    hm.copy_(torch.where(fired, v_reset, u))


@one_pass(_membrane_in_place)
def _membrane(hm, x, p, q, w, out, settings):
    """Hm[t] into out."""
    v_th, v_reset, a = settings.unbind()
    u = p * hm + q * x + w
    out.copy_(torch.where(u - v_th >= 0, v_reset, u))


@one_pass(_step_backward_in_place)
def _step_backward(dhm, ds, dmean, hm, x, p, q, w, dx, last: bool, settings):
    """dp, dq, dw (B, C); dX[t] into dx; dHm[t-1], but for what comes by its mean, takes the place of dHm[t]."""
    v_th, v_reset, a = settings.unbind()
    space = (1, 2) if last else (2, 3)
    du = fire_backward(p * hm + q * x + w, ds, dhm + dmean, v_th, v_reset, a)
    dx.copy_(q * du)
    sums = [d.sum(space) for d in (du * hm, du * x, du)]
    dhm.copy_(p * du)
    return sums
