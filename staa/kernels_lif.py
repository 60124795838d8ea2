"""The plain LIF neuron on a GPU, in Triton: eqs. 1-3 and 5, as in `neuron.py`. `fused_lif_gpu.py` launches it."""

import triton
import triton.language as tl

from .kernels import fire_backward


@triton.jit
def some_neurons(N, BN: tl.constexpr):
    """Those of this program, and whether they are there."""
    n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    return n, n < N


@triton.jit
def at_step(x, t: tl.constexpr, N):
    """The row of step t of x (T, N), which may have more elements than 32 bits count."""
    return x + tl.full([], t, tl.int64) * N


@triton.jit
def step(hm, x, n, there, decay, gain, v_th, v_reset):
    """U[t] and Hm[t] from Hm[t-1], eqs. 1-3; x is the current's row of step t."""
    u = v_reset + decay * (hm - v_reset) + gain * tl.load(x + n, mask=there, other=0.0).to(tl.float32)
    return u, tl.where(u >= v_th, v_reset, u)


@triton.jit
def lif(x, s, decay, gain, v_th, v_reset, N, T: tl.constexpr, BN: tl.constexpr):
    """Spikes s for the current x, both (T, N)."""
    n, there = some_neurons(N, BN)
    hm = tl.zeros([BN], tl.float32) + v_reset
    for t in tl.static_range(T):
        u, hm = step(hm, at_step(x, t, N), n, there, decay, gain, v_th, v_reset)
        tl.store(at_step(s, t, N) + n, tl.where(u >= v_th, 1.0, 0.0).to(s.dtype.element_ty), mask=there)


@triton.jit
def lif_backward(x, ds, dx, decay, gain, v_th, v_reset, a, N, T: tl.constexpr, BN: tl.constexpr, HELD: tl.constexpr):
    """The gradient dx of the current from that of the spikes, ds; all (T, N). The potentials are computed anew: those
    of HELD steps at a time, from the Hm that these begin with, the last ones first."""
    n, there = some_neurons(N, BN)
    hm = tl.zeros([BN], tl.float32) + v_reset
    begin = (hm,)
    for t in tl.static_range((T - 1) // HELD * HELD):
        _, hm = step(hm, at_step(x, t, N), n, there, decay, gain, v_th, v_reset)
        if t % HELD == HELD - 1:
            begin = begin + (hm,)
    dhm = tl.zeros([BN], tl.float32)
    for part in tl.static_range(len(begin) - 1, -1, -1):
        hm, us = begin[part], ()
        for t in tl.static_range(part * HELD, part * HELD + HELD):
            if t < T:
                u, hm = step(hm, at_step(x, t, N), n, there, decay, gain, v_th, v_reset)
                us = us + (u,)
        for i in tl.static_range(len(us) - 1, -1, -1):
            t = part * HELD + i
            ds_t = tl.load(at_step(ds, t, N) + n, mask=there, other=0.0).to(tl.float32)
            du = fire_backward(us[i], ds_t, dhm, v_th, v_reset, a)
            tl.store(at_step(dx, t, N) + n, (gain * du).to(dx.dtype.element_ty), mask=there)
            dhm = decay * du
