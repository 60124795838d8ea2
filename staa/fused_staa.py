"""The STAA neuron in few passes over memory. What it computes stands in `attention.py`; this file only computes it
faster, and is tested against it.

X~ - X does not depend on space, so X~ never comes to be. All that the aggregator does to the current is

    U[t] = p Hm[t-1] + q X[t] + w       with p, q and w a number a sample and channel, (B, C)

and what it has to know of the current are two means over space: the one that GC's attention weighs, and the plain one.
So there are two functions, differentiated by hand, `pooled` and `mixed`; what lies between them is small, (T, B, C),
and autograd's. Kept for the backward pass are the current, the attention's weights and small tensors; the membrane
potential is computed anew.

Both take and return (T, B, C, H, W). Inside, space is one axis, and x lies as in memory: (T, B, HW, C) where the
network is channels-last, and (T, B, C, HW) where not.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .fused import (
    compiles,
    constants,
    empty_beside,
    first_derivative,
    is_channels_last,
    lazy_compile,
    membrane_type,
)
from .fused_lif import fire, fire_backward, fire_backward_in_place, reset
from .surrogate import Surrogate


def pooled(x: Tensor, key: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x itself, and its two means over space, (T, B, C): the one that GC's attention weighs, and the plain one.

    key (C,), bias (1,): of the attention, eq. 7. `mixed` takes x from here: so its gradient comes by, to be added to.
    """
    return _Pooled.apply(x, key, bias)


class _Pooled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, key, bias):
        space = axis_of_space(x)
        y = by_position(as_it_lies(x, space), space).to(membrane_type(x))         # (N, HW, C), N = T B
        k = (y @ key).softmax(-1)                                                 # (N, HW), eq. 7
        weights = torch.stack([k, torch.full_like(k, 1 / k.shape[1])], 1)         # (N, 2, HW)
        ctx.save_for_backward(x, key, weights)
        context, mean = (weights @ y).unflatten(0, x.shape[:2]).unbind(2)
        return x, context, mean

    @staticmethod
    @first_derivative
    def backward(ctx, dx, dcontext, dmean):
        """Adds to dx in place. What reaches a position is the sum of three outer products: of the context, of the mean
        and of the logits."""
        x, key, weights = ctx.saved_tensors
        space = axis_of_space(x)
        dx = as_it_lies(dx, space)
        y, dy = by_position(as_it_lies(x, space), space).to(key.dtype), by_position(dx, space)
        grad = torch.stack([dcontext, dmean], 2).flatten(0, 1)                    # (N, 2, C)
        k, dk = weights[:, :1], grad[:, :1] @ y.mT                                # (N, 1, HW)
        dlogits = k * (dk - (k * dk).sum(-1, keepdim=True))
        here = torch.cat([weights, dlogits], 1)                                   # (N, 3, HW)
        there = torch.cat([grad, key.expand(len(grad), 1, -1)], 1)                # (N, 3, C)
        dy.baddbmm_(here.mT.to(dy.dtype), there.to(dy.dtype))
        dkey, dbias = (dlogits @ y).sum((0, 1)), torch.zeros_like(key[:1])        # a bias cancels in the softmax
        return as_it_was(dx, space, x.shape), dkey, dbias


def mixed(x: Tensor, seen: Tensor, w: Tensor, slope: Tensor, gate: Sequence[Tensor], alpha: float,
          fixed: Sequence[tuple[float, float] | None], numbers: tuple, surrogate: Surrogate) -> Tensor:
    """Spikes for the current x (T, B, C, H, W), where U[t] = p Hm[t-1] + q X[t] + w[t] + p slope[t].

    gate: SA's weights and biases W_1 (C/r, C), b_1, W_2 (C, C/r) and b_2, from which q = alpha - p and
    p = alpha sigmoid(W_2 ReLU(W_1 (Hm[t-1]'s mean over space + seen[t]))), eqs. 12 and 14. fixed: p and q of the steps
    without a gate, None for the others. seen, w, slope: (T, B, C). numbers: threshold, reset and surrogate's settings.
    """
    return _Mixed.apply(x, seen, w, slope, alpha, fixed, numbers, surrogate, *gate)


class _Mixed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, seen, w, slope, alpha, fixed, numbers, surrogate, *gate):
        space, compiled, v_reset = axis_of_space(x), compiles(x), numbers[1]
        y, w = as_it_lies(x, space), w.clone()
        p, q, z = torch.empty_like(w), torch.empty_like(w), torch.zeros_like(w)   # (T, B, C); z: what the gate sees
        h = w.new_zeros(*w.shape[:2], len(gate[0]) if gate else 0)                # (T, B, C/r), its hidden layer
        hm, s = torch.full_like(y[0], v_reset, dtype=w.dtype), empty_beside(y)
        for t, (y_t, s_t, p_t, q_t, w_t) in enumerate(zip(*(n.unbind() for n in (y, s, p, q, w)))):
            if fixed[t]:
                for n, value in zip((p_t, q_t), fixed[t]):
                    n.fill_(value)
            else:
                w1, b1, w2, b2 = gate
                torch.add(seen[t], hm.mean(space) if t else v_reset, out=z[t])
                hidden = torch.addmm(b1, z[t], w1.T).relu_()
                h[t].copy_(hidden)  # counters of operations do not know `out`
                torch.mul(torch.addmm(b2, hidden, w2.T).sigmoid_(), alpha, out=p_t)
                torch.sub(alpha, p_t, out=q_t)
            w_t.addcmul_(p_t, slope[t])
            _step(compiled, hm, y_t, *(n.unsqueeze(space) for n in (p_t, q_t, w_t)), s_t, surrogate, numbers)
        ctx.save_for_backward(x, p, q, w, slope, z, h, *gate)
        ctx.alpha, ctx.fixed, ctx.numbers, ctx.surrogate = alpha, fixed, numbers, surrogate
        return as_it_was(s, space, x.shape)

    @staticmethod
    @first_derivative
    def backward(ctx, ds):
        x, p, q, w, slope, z, h, *gate = ctx.saved_tensors
        space, compiled, numbers, surrogate = axis_of_space(x), compiles(x), ctx.numbers, ctx.surrogate
        y, ds = as_it_lies(x, space), as_it_lies(ds, space)
        dx, hm = empty_beside(y, ds), torch.empty_like(y, dtype=w.dtype)
        hm[0] = numbers[1]                                                        # Hm[t-1] at t
        steps = [n.unbind() for n in (hm, y, *(n.unsqueeze(space) for n in (p, q, w)))]
        if len(hm) > 1:
            _membranes(compiled, *steps, surrogate, numbers)
        big = list(zip(*steps))
        dhm, dmean = torch.zeros_like(hm[0]), torch.zeros_like(p[0])
        dw, da, dz, dh = (torch.zeros_like(n) for n in (w, w, z, h))
        dp_da = p * q / ctx.alpha                                                 # a: W_2's output
        for t, (now, ds_t, dx_t) in reversed(list(enumerate(zip(big, ds.unbind(), dx.unbind())))):
            spread = (dmean / y.shape[space]).unsqueeze(space)                    # over the positions whose mean it is
            dp, dq, dw_t = _step_backward(compiled, dhm, ds_t, spread, *now, dx_t, space, surrogate, numbers)
            dw[t].copy_(dw_t)
            if not ctx.fixed[t]:
                w1, _, w2, _ = gate
                torch.mul((dp - dq).addcmul_(dw_t, slope[t]), dp_da[t], out=da[t])
                dhidden = torch.mul(da[t] @ w2, h[t] > 0, out=dh[t])
                dz[t].copy_(dhidden @ w1)
            dmean = dz[t]
        dgate = [n for d, seen in ((dh, z), (da, h)) for n in (d.flatten(0, 1).T @ seen.flatten(0, 1), d.sum((0, 1)))]
        return as_it_was(dx, space, x.shape), dz, dw, dw * p, *[None] * 4, *(dgate if gate else [])


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


def by_position(x: Tensor, space: int) -> Tensor:
    """(T B, HW, C) of x as it lies, a view."""
    return x.flatten(0, 1) if space == -2 else x.flatten(0, 1).mT


# One time step: (B, HW, C) or (B, C, HW); p, q, w and dmean have one number there for all of space.

def one_pass(in_place: Callable, **options) -> Callable:
    """A function of tensors, the surrogate and the neuron's numbers (threshold, reset, the surrogate's settings),
    called as function(compiled, ...): compiled, or by its counterpart, `in_place`. options: Inductor's."""
    def decorated(function: Callable) -> Callable:
        fast = lazy_compile(function, **options)

        def either(compiled: bool, hm: Tensor | Sequence[Tensor], *args):
            *others, numbers = args
            if compiled:
                one = hm if isinstance(hm, Tensor) else hm[0]
                return fast(hm, *others, constants(numbers, one.dtype, one.device))
            return in_place(hm, *others, *numbers)
        return either
    return decorated


def potential(hm: Tensor, x: Tensor, p: Tensor, q: Tensor, w: Tensor, out: Tensor | None = None) -> Tensor:
    return torch.addcmul(w, p, hm, out=out).addcmul_(q, x.to(hm.dtype))


def _step_in_place(hm, x, p, q, w, s, surrogate, v_th, v_reset, *_):
    u = potential(hm, x, p, q, w)
    fire(u, s, surrogate, v_th)
    reset(hm, u, surrogate, v_th, v_reset)


def _membranes_in_place(hm, x, p, q, w, surrogate, v_th, v_reset, *_):
    for *step, after in zip(hm, x, p, q, w, hm[1:]):
        reset(after, potential(*step), surrogate, v_th, v_reset)


def _step_backward_in_place(dhm, ds, dmean, hm, x, p, q, w, dx, space, *rule):
    dhm += dmean
    u, room, du = potential(hm, x, p, q, w), torch.empty_like(hm), torch.empty_like(hm)
    fire_backward_in_place(u, ds.to(u.dtype), dhm, 1.0, (room, dhm), du, *rule)
    sums = [torch.mul(du, factor, out=room).sum(space) for factor in (hm, x)] + [du.sum(space)]
    torch.mul(du, q, out=dx)
    torch.mul(du, p, out=dhm)
    return sums


# U reads five tensors. Without the option Inductor would write it to memory first.
@one_pass(_step_in_place, realize_reads_threshold=16)
def _step(hm, x, p, q, w, s, surrogate, numbers):
    """S[t] into s; Hm[t] takes the place of Hm[t-1]."""
    v_th, v_reset, *_ = numbers.unbind()
    u = p * hm + q * x + w
    fired = surrogate.fires(u - v_th)
    s.copy_(fired)
    hm.copy_(torch.where(fired, v_reset, u))


@one_pass(_membranes_in_place)
def _membranes(hm, x, p, q, w, surrogate, numbers):  # lists of steps
    """Hm[t-1] at t into hm, but for the first, which is there."""
    v_th, v_reset, *_ = numbers.unbind()
    before = v_reset
    for x_t, p_t, q_t, w_t, after in zip(x, p, q, w, hm[1:]):
        u = p_t * before + q_t * x_t + w_t
        before = torch.where(surrogate.fires(u - v_th), v_reset, u)
        after.copy_(before)


@one_pass(_step_backward_in_place)
def _step_backward(dhm, ds, dmean, hm, x, p, q, w, dx, space: int, surrogate, numbers):
    """dp, dq, dw (B, C); dX[t] into dx; dHm[t-1], but for what comes by its mean, takes the place of dHm[t]."""
    du = fire_backward(p * hm + q * x + w, ds, dhm + dmean, surrogate, *numbers.unbind())
    dx.copy_(q * du)
    sums = [d.sum(space) for d in (du * hm, du * x, du)]
    dhm.copy_(p * du)
    return sums
