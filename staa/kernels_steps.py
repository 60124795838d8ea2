"""The time steps of the STAA neuron on a GPU, eqs. 2, 3, 5, 12 and 14: see `kernels.py`.

    U[t] = p Hm[t-1] + q X[t] + w
"""

import triton
import triton.language as tl

from .kernels import fire_backward, read, row, write


@triton.jit
def gate(pooled, w1, b1, w2, b2, alpha, C: tl.constexpr, H: tl.constexpr, BC: tl.constexpr, BJ: tl.constexpr):
    """M (C,) from the pooled input."""
    c = tl.arange(0, BC)
    z = row(b2, 0, c, C)
    for start in range(0, H, BJ):
        j = start + tl.arange(0, BJ)
        squeeze, excite = read(w1, j, c, H, C, True), read(w2, j, c, H, C, True)
        h = tl.maximum(tl.sum(squeeze * pooled[None, :], 1) + row(b1, 0, j, H), 0.0)
        z += tl.sum(excite * h[:, None], 0)
    return alpha * tl.sigmoid(z)


@triton.jit
def gate_backward(dz, pooled, w1, b1, w2, squeezed, dsqueezed, r, writes, K, C: tl.constexpr, H: tl.constexpr,
                  BC: tl.constexpr, BJ: tl.constexpr):
    """The gradient of the pooled input (C,) from that of M's logit; squeezed (T, B, H), and the one before ReLU."""
    c = tl.arange(0, BC)
    dpooled = tl.zeros([BC], tl.float32)
    for start in range(0, H, BJ):
        j = start + tl.arange(0, BJ)
        squeeze, excite = read(w1, j, c, H, C, True), read(w2, j, c, H, C, True)
        h = tl.maximum(tl.sum(squeeze * pooled[None, :], 1) + row(b1, 0, j, H), 0.0)
        dh = tl.where(h > 0, tl.sum(excite * dz[None, :], 1), 0.0)
        dpooled += tl.sum(squeeze * dh[:, None], 0)
        tl.store(squeezed + r * H + j, h, mask=(j < H) & writes)
        tl.store(dsqueezed + r * K + j, dh, mask=(j < H) & writes)
    return dpooled


@triton.jit
def offset(value, pe, t, r, c, C):
    """X~ - X (C,)."""
    return row(value, r, c, C) + row(pe, t, c, C)


@triton.jit
def keeps(kept, t):
    """Above 0 where step t keeps the aggregator, 0 where TSRD drops it."""
    keep = 1.0
    if kept is not None:
        keep = tl.load(kept + t).to(tl.float32)
    return keep


@triton.jit
def weight_of_x(p, total, keep):
    """q: p + q = total, and both are 1 where TSRD drops the aggregator."""
    return tl.where(keep > 0, total - p, 1.0)


@triton.jit
def over_parts(part, c, parts: tl.constexpr, C: tl.constexpr, BP: tl.constexpr):
    """The sum of part (parts, C)."""
    sums = tl.zeros([c.shape[0]], tl.float32)
    for start in range(0, parts, BP):
        sums += tl.sum(read(part, start + tl.arange(0, BP), c, parts, C, True), 0)
    return sums


@triton.jit
def potential(hm, x, p, w, total, keep):
    """U[t] (N, C)."""
    return p[None, :] * hm + weight_of_x(p, total, keep)[None, :] * x + w[None, :]


@triton.jit
def reset(u, v_th, v_reset, leak, leaky: tl.constexpr):
    """Hm[t], leaked where the neuron is `leaky`."""
    hm = tl.where(u >= v_th, v_reset, u)
    return v_reset + leak * (hm - v_reset) if leaky else hm


@triton.jit
def next_hm(hm, t, x, ps, ws, kept, b, n, c, total, v_th, v_reset, leak, B, N: tl.constexpr, C: tl.constexpr,
            last: tl.constexpr, leaky: tl.constexpr):
    """Hm[t] from hm = Hm[t-1]."""
    r = t * B + b
    u = potential(hm, read(x + r * N * C, n, c, N, C, last), row(ps, r, c, C), row(ws, r, c, C), total, keeps(kept, t))
    return reset(u, v_th, v_reset, leak, leaky)


@triton.jit
def before(until, x, ps, ws, kept, b, n, c, total, v_th, v_reset, leak, B, N: tl.constexpr, C: tl.constexpr,
           last: tl.constexpr, leaky: tl.constexpr, unrolled: tl.constexpr):
    """Hm[until - 1], from the start. Where the compiler knows `until`, as `unrolled`, all steps are read at once."""
    hm = tl.zeros([n.shape[0], c.shape[0]], tl.float32) + v_reset
    if unrolled is not None:
        for t in tl.static_range(0, unrolled):
            hm = next_hm(hm, t, x, ps, ws, kept, b, n, c, total, v_th, v_reset, leak, B, N, C, last, leaky)
    else:
        for t in range(0, until):
            hm = next_hm(hm, t, x, ps, ws, kept, b, n, c, total, v_th, v_reset, leak, B, N, C, last, leaky)
    return hm


@triton.jit(do_not_specialize=["start", "stop"])
def steps(x, s, mean, value, ps, ws, pools, part, pe, pe_membrane, pe_output, kept, w1, b1, w2, b2,
          alpha, decay, total, rest, v_th, v_reset, leak, B, start, stop, unrolled: tl.constexpr,
          N: tl.constexpr, C: tl.constexpr, H: tl.constexpr, span: tl.constexpr, parts: tl.constexpr,
          last: tl.constexpr, SA: tl.constexpr, leaky: tl.constexpr, whole: tl.constexpr, BN: tl.constexpr,
          BC: tl.constexpr, BJ: tl.constexpr, BP: tl.constexpr, early: tl.constexpr):
    """Spikes of the steps from start to stop; p, w and the pooled input (T, B, C). Of a map that is not `whole` in one
    program, each goes through `span` positions, and leaves the sums of Hm in part (T, B, parts, C)."""
    if unrolled is not None:
        start, stop = unrolled, unrolled + 1
    b, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    c = tl.arange(0, BC)
    writes = (c < C) & (block == 0)
    hm, hm_mean = tl.zeros([BN, BC], tl.float32) + v_reset, tl.zeros([BC], tl.float32) + v_reset
    if SA and not whole:
        if start > 0:
            hm_mean = over_parts(part + ((start - 1) * B + b) * parts * C, c, parts, C, BP) / N
    for t in range(start, stop):
        r, keep = t * B + b, keeps(kept, t)
        if early:
            y = read(x + r * N * C, tl.arange(0, BN), c, N, C, last)
        shift, membrane = offset(value, pe, t, r, c, C), row(pe_membrane, t, c, C)
        p = tl.zeros([BC], tl.float32) + decay
        if SA:
            pooled = row(mean, r, c, C) + shift + membrane + hm_mean
            p = gate(pooled, w1, b1, w2, b2, alpha, C, H, BC, BJ)
            tl.store(pools + r * C + c, pooled, mask=writes)
        w = tl.where(keep > 0, total * shift + row(pe_output, t, c, C) + rest + p * (membrane - shift), 0.0)
        p = tl.where(keep > 0, p, 1.0)
        tl.store(ps + r * C + c, p, mask=writes)
        tl.store(ws + r * C + c, w, mask=writes)
        sums = tl.zeros([BN, BC], tl.float32)
        for first in range(0, span, BN):
            n = block * span + first + tl.arange(0, BN)
            if not whole:
                hm = before(start, x, ps, ws, kept, b, n, c, total, v_th, v_reset, leak, B, N, C, last, leaky,
                            unrolled)
            if not early:
                y = read(x + r * N * C, n, c, N, C, last)
            u = potential(hm, y, p, w, total, keep)
            write(s + r * N * C, (u >= v_th).to(tl.float32), n, c, N, C, last)
            hm = reset(u, v_th, v_reset, leak, leaky)
            sums += tl.where((n < N)[:, None] & (c < C)[None, :], hm, 0.0)
        if SA:
            hm_sum = tl.sum(sums, 0)
            if whole:
                hm_mean = hm_sum / N
            else:
                tl.store(part + (r * parts + block) * C + c, hm_sum, mask=c < C)


@triton.jit(do_not_specialize=["start", "stop"])
def steps_backward(ds, x, dx, dhm, value, ps, ws, pools, part, squeezed, dpools, dz_rows, dvalue, dsqueezed,
                   dpe_membrane, dpe_output, pe, pe_membrane, kept, w1, b1, w2, K, alpha, total, v_th, v_reset, leak, a,
                   T, B, start, stop, unrolled: tl.constexpr, N: tl.constexpr, C: tl.constexpr, H: tl.constexpr,
                   span: tl.constexpr, parts: tl.constexpr, last: tl.constexpr, SA: tl.constexpr, leaky: tl.constexpr,
                   whole: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, BJ: tl.constexpr, BP: tl.constexpr):
    """The steps from stop - 1 down to start: for each, what follows of the sums over space of the step after it, and
    then dU, and dx = q dU. Between launches dhm, as x[0], is the gradient of Hm, and part (2, T, B, parts, C) the sums.
    dz, dvalue and dpe (T, B, C) and dsqueezed (T, B, H) go into rows K apart; squeezed (T, B, H) and dpools (T, B, C)
    do not."""
    if unrolled is not None:
        start, stop = unrolled, unrolled + 1
    b, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    c = tl.arange(0, BC)
    writes = (c < C) & (block == 0)
    d = tl.zeros([BN, BC], tl.float32)
    dp, sum_du = tl.zeros([BC], tl.float32), tl.zeros([BC], tl.float32)  # sums of dU (Hm - X) and of dU
    for i in range(0, stop - start):
        t = stop - 1 - i
        by_mean = tl.zeros([BC], tl.float32)
        if t + 1 < T:
            r, keep = (t + 1) * B + b, keeps(kept, t + 1)
            if not whole:
                dp = over_parts(part + r * parts * C, c, parts, C, BP)
                sum_du = over_parts(part + (r + T * B) * parts * C, c, parts, C, BP)
            dp, sum_du = tl.where(keep > 0, dp, 0.0), tl.where(keep > 0, sum_du, 0.0)
            p, dpooled = row(ps, r, c, C), tl.zeros([BC], tl.float32)
            if SA:
                slope = row(pe_membrane, t + 1, c, C) - offset(value, pe, t + 1, r, c, C)
                dz = (dp + sum_du * slope) * p * (1 - p / alpha)
                dpooled = gate_backward(dz, row(pools, r, c, C), w1, b1, w2, squeezed, dsqueezed, r, block == 0, K, C,
                                        H, BC, BJ)
                tl.store(dz_rows + r * K + c, dz, mask=writes)
                tl.store(dpools + r * C + c, dpooled, mask=writes)
                by_mean = dpooled / N
            tl.store(dvalue + r * K + c, dpooled + (total - p) * sum_du, mask=writes)
            if dpe_membrane is not None:
                tl.store(dpe_membrane + r * K + c, dpooled + p * sum_du, mask=writes)
            if dpe_output is not None:
                tl.store(dpe_output + r * K + c, sum_du, mask=writes)
        if t >= 0:
            r, keep = t * B + b, keeps(kept, t)
            p, w = row(ps, r, c, C), row(ws, r, c, C)
            dp_tile, du_tile = tl.zeros([BN, BC], tl.float32), tl.zeros([BN, BC], tl.float32)
            for first in range(0, span, BN):
                n = block * span + first + tl.arange(0, BN)
                hm = before(t, x, ps, ws, kept, b, n, c, total, v_th, v_reset, leak, B, N, C, last, leaky, unrolled)
                if not whole:
                    d = tl.zeros([BN, BC], tl.float32)
                    if t + 1 < T:
                        d = read(dhm + b * N * C, n, c, N, C, last)
                y = read(x + r * N * C, n, c, N, C, last)
                ds_t = read(ds + r * N * C, n, c, N, C, last)
                u = potential(hm, y, p, w, total, keep)
                d += by_mean[None, :]
                if leaky:
                    d *= leak
                du = fire_backward(u, ds_t, d, v_th, v_reset, a)
                du = tl.where((n < N)[:, None] & (c < C)[None, :], du, 0.0)
                dp_tile += du * (hm - y)
                du_tile += du
                write(dx + r * N * C, weight_of_x(p, total, keep)[None, :] * du, n, c, N, C, last)
                d = p[None, :] * du
                if not whole:
                    if t > 0:
                        write(dhm + b * N * C, d, n, c, N, C, last)
            dp, sum_du = tl.sum(dp_tile, 0), tl.sum(du_tile, 0)
            if not whole:
                tl.store(part + (r * parts + block) * C + c, dp, mask=c < C)
                tl.store(part + ((r + T * B) * parts + block) * C + c, sum_du, mask=c < C)
