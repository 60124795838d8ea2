"""All that the STAA neuron does to maps, eqs. 2, 3, 5, 7 and 14, there and back: by operators of torch, where possible
into tensors that are there already, or in C. See `fused_staa_steps.py`, whose letters these are. Maps of one time step
are (B, N, C) or (B, C, N), with N places in space."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from . import fused_cpu
from .fused import cdiv
from .fused_lif import fire, fire_backward_in_place, reset

#: Where nothing is asked for.
NOTHING = torch.empty(0)


class InPlace(NamedTuple):
    """A neuron's settings, and what it does to maps. U[t] = p Hm[t-1] + q X[t] + w + p slope with q = total - p and
    w = total added + rest, where p is eq. 12's M, or `decay` where there is no SA; and Hm is handed on leaked."""

    space: int
    kept: Tensor | None
    alpha: float
    sa: bool
    leak: float
    decay: float
    total: float
    rest: float
    rule: tuple  # the surrogate, v_th, v_reset and the surrogate's settings

    def weights(self, p: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor]:
        """p and q as they meet the maps: both 1 where TSRD drops the aggregator."""
        q = self.total - p
        if kept is not None:
            p, q = torch.where(kept, p, 1.0), torch.where(kept, q, 1.0)
        return p.unsqueeze(self.space), q.unsqueeze(self.space)

    def look(self, x: Tensor, key: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """GC's attention k (T, B, N), eq. 7, in which PE cancels; and of the current x its mean (T, B, C) that k
        weighs, and the plain one."""
        y = x if self.space == -2 else x.mT                                       # (T, B, N, C)
        k = (weighed(y.mT, key.expand(*x.shape[:2], -1)) + bias).softmax(-1)
        return k, weighed(y, k), x.mean(self.space)

    def look_backward(self, x: Tensor, k: Tensor, key: Tensor, dcontext: Tensor, dmean: Tensor, q: Tensor,
                      du: Tensor) -> Tensor:
        """The gradient of the key (1, C); and that of x in the place of du."""
        y = x if self.space == -2 else x.mT
        dk = weighed(y.mT, dcontext)
        dlogits = k * (dk - (k * dk).sum(-1, keepdim=True))
        positions = torch.stack([k, dlogits, torch.ones_like(k)], 2)              # (T, B, 3, N)
        channels = torch.stack([dcontext, key.expand_as(dcontext), dmean], 2)     # (T, B, 3, C)
        rows, columns = (positions, channels) if self.space == -2 else (channels, positions)
        for du_t, rows_t, columns_t in maps(du.mul_(q), rows, columns):
            du_t.baddbmm_(rows_t.mT, columns_t)
        return weighed(y, dlogits).sum((0, 1)).unsqueeze(0)

    def step(self, x: Tensor, hm: Tensor, weights: tuple[Tensor, Tensor, Tensor], u: Tensor, s: Tensor | None,
             after: Tensor, first: bool, last: bool) -> Tensor:
        """From X[t], Hm[t-1] and (p, q, w) to Hm[t], into `after`, and for SA its mean over space (B, C). s: for S[t];
        where it is None, u is for U[t]. After the last step there may be neither of the two."""
        surrogate, v_th, v_reset, *_ = self.rule
        p, q, w = weights
        torch.addcmul(w, q, x, out=u)
        if v_reset or not first:
            u.addcmul_(p, hm)
        if s is not None:
            fire(u, s, surrogate, v_th)
        if not last:
            self.hand_on(u, after)
        return after.mean(self.space) if self.sa and not last else NOTHING

    def step_backward(self, u: Tensor, before: Tensor, x: Tensor, ds: Tensor, later: tuple[Tensor, Tensor, Tensor],
                      du: Tensor, room: Tensor, first: bool, last: bool) -> tuple[Tensor, Tensor]:
        """From U[t], U[t-1], X[t] and dS[t] to dU[t], its sum over space (B, C) and, for SA, that of its product with
        Hm[t-1] - X[t]. later: dU[t+1] and, a number a sample and channel, p then and what reaches Hm[t] through its
        mean. room: a map to compute in."""
        dlater, p, dmean = later
        dhm = None if last else torch.addcmul(dmean, p, dlater, out=du)
        fire_backward_in_place(u, ds, dhm, self.leak, (room, du), du, *self.rule)
        dw = du.sum(self.space)
        if not self.sa:
            return dw, NOTHING
        hm = room.fill_(self.rule[2]) if first else self.hand_on(before, room)
        return dw, hm.sub_(x).mul_(du).sum(self.space)

    def hand_on(self, u: Tensor, hm: Tensor) -> Tensor:
        """Hm after the potential u, into hm."""
        surrogate, v_th, v_reset, *_ = self.rule
        reset(hm, u, surrogate, v_th, v_reset)
        if self.leak != 1:
            hm.mul_(self.leak)
            if v_reset:
                hm.add_(v_reset * (1 - self.leak))
        return hm


def maps(*tensors: Tensor) -> Iterable:
    """Tensors (T, B, ...) as (T B, ...), or step by step where torch would have to copy them, since they are of some
    samples only."""
    whole = all(x.stride(0) == x.shape[1] * x.stride(1) for x in tensors)
    return [[x.flatten(0, 1) for x in tensors]] if whole else zip(*tensors)


def weighed(x: Tensor, weights: Tensor) -> Tensor:
    """The sum over n of x (T, B, n, m), weighed by (T, B, n)."""
    return torch.cat([w @ y for w, y in maps(weights.unsqueeze(-2), x)]).view(*x.shape[:2], -1)


class InC(InPlace):
    """The same by hand, with the paper's surrogate: see `fused_cpu`."""

    def look(self, x, key, bias) -> tuple[Tensor, Tensor, Tensor]:
        key = key + x.new_zeros(x.shape[-3 - self.space])  # torch says so if it is of another size or device
        k = x.new_empty(*x.shape[:2], x.shape[self.space])
        context, mean = x.new_empty(2, *x.shape[:2], key.shape[-1])
        self.call("look", (), (x, key, k, context, mean), x.flatten(0, 1))
        return k, context, mean

    def look_backward(self, x, k, key, dcontext, dmean, q, du) -> Tensor:
        dlogits, dkey = torch.empty_like(k), torch.empty_like(dcontext)
        self.call("look_backward", (), (x, k, key, dcontext, dmean, q, du, dlogits, dkey), x.flatten(0, 1))
        return dkey.sum((0, 1)).unsqueeze(0)

    def step(self, x, hm, weights, u, s, after, first, last) -> Tensor:
        out = u if s is None or s.dtype != u.dtype else s
        mean, = self.sums("step", (s is None,), (x, hm, *weights, out, after), x, 1)
        if s is not None and s is not out:
            s.copy_(out)
        return mean / x.shape[self.space]

    def step_backward(self, u, before, x, ds, later, du, room, first, last) -> tuple[Tensor, Tensor]:
        ds = ds.to(x.dtype).contiguous()
        dw, dp = self.sums("step_backward", (first, last), (u, before, x, ds, *later, du), x, 2)
        return dw, dp

    def sums(self, name: str, flags: tuple, tensors: tuple[Tensor, ...], x: Tensor, n: int) -> Tensor:
        """The n sums over space (n, B, C) of a function of fused_cpu.c, which gives them in parts."""
        B, C, N = len(x), x.shape[-3 - self.space], x.shape[self.space]
        last = self.space == -2
        parts = cdiv(N, fused_cpu.ROWS if last else fused_cpu.SOME)
        sums = x.new_empty((n, B, parts, C) if last else (n, B, C, parts))
        self.call(name, flags, (*tensors, *sums), x)
        return sums.sum(self.space)

    def call(self, name: str, flags: tuple, tensors: tuple[Tensor, ...], x: Tensor) -> None:
        sizes = len(x), x.shape[self.space], x.shape[-3 - self.space]
        _, v_th, v_reset, a = self.rule
        rule = v_th, v_reset, self.leak, v_reset * (1 - self.leak), a / 2, 1 / a
        fused_cpu.call(name, (self.space == -2, *flags), tensors, sizes, rule)
