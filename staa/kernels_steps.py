"""The time steps of the STAA neuron on a GPU, eqs. 2, 3, 5, 12 and 14: see `kernels.py`.

    U[t] = p Hm[t-1] + q X[t] + w
"""

import triton
import triton.language as tl

from .kernels import read, row, write


@triton.jit
def gate(pool, w1, b1, w2, b2, alpha, C: tl.constexpr, H: tl.constexpr, BC: tl.constexpr, BJ: tl.constexpr):
    """M (C,) from the pooled input."""
    c = tl.arange(0, BC)
    z = row(b2, 0, c, C)
    for start in range(0, H, BJ):
        j = start + tl.arange(0, BJ)
        squeeze, excite = read(w1, j, c, H, C, True), read(w2, j, c, H, C, True)
        h = tl.maximum(tl.sum(squeeze * pool[None, :], 1) + row(b1, 0, j, H), 0.0)
        z += tl.sum(excite * h[:, None], 0)
    return alpha * tl.sigmoid(z)


@triton.jit
def gate_backward(dz, pool, w1, b1, w2, hidden, dhidden, r, writes, K, C: tl.constexpr, H: tl.constexpr,
                  BC: tl.constexpr, BJ: tl.constexpr):
    """The gradient of the pooled input (C,) from that of M's logit; hidden (T, B, H), and its gradient before ReLU."""
    c = tl.arange(0, BC)
    dpool = tl.zeros([BC], tl.float32)
    for start in range(0, H, BJ):
        j = start + tl.arange(0, BJ)
        squeeze, excite = read(w1, j, c, H, C, True), read(w2, j, c, H, C, True)
        h = tl.maximum(tl.sum(squeeze * pool[None, :], 1) + row(b1, 0, j, H), 0.0)
        dh = tl.where(h > 0, tl.sum(excite * dz[None, :], 1), 0.0)
        dpool += tl.sum(squeeze * dh[:, None], 0)
        tl.store(hidden + r * H + j, h, mask=(j < H) & writes)
        tl.store(dhidden + r * K + j, dh, mask=(j < H) & writes)
    return dpool


@triton.jit
def offset(added, pe, t, r, c, C):
    """X~ - X (C,)."""
    return row(added, r, c, C) + row(pe, t, c, C)


@triton.jit
def keeps(kept, t):
    """1 where step t keeps the aggregator, 0 where TSRD drops it."""
    keep = 1.0
    if kept is not None:
        keep = tl.load(kept + t).to(tl.float32)
    return keep


@triton.jit
def weight_of_x(p, total, keep):
    """q: p + q = total, and both are 1 where TSRD drops the aggregator."""
    return (total - p) * keep + (1 - keep)


@triton.jit
def potential(hm, x, p, w, total, keep):
    return p[None, :] * hm + weight_of_x(p, total, keep)[None, :] * x + w[None, :]


@triton.jit
def reset(u, v_th, v_reset, leak, leaky: tl.constexpr):
    """Hm[t], leaked where the neuron is `leaky`."""
    hm = tl.where(u >= v_th, v_reset, u)
    return v_reset + leak * (hm - v_reset) if leaky else hm


@triton.jit
def next_hm(hm, t, x, ps, ws, kept, b, n, c, total, v_th, v_reset, leak, B, N: tl.constexpr, C: tl.constexpr,
            last: tl.constexpr, leaky: tl.constexpr):
    r = t * B + b
    u = potential(hm, read(x + r * N * C, n, c, N, C, last), row(ps, r, c, C), row(ws, r, c, C), total, keeps(kept, t))
    return reset(u, v_th, v_reset, leak, leaky)


@triton.jit
def before(until, x, ps, ws, kept, b, n, c, total, v_th, v_reset, leak, B, N: tl.constexpr, C: tl.constexpr,
           last: tl.constexpr, leaky: tl.constexpr, unroll: tl.constexpr):
    """Hm[until - 1], from the start. Unrolled, it reads all steps at once."""
    hm = tl.zeros([n.shape[0], c.shape[0]], tl.float32) + v_reset
    if unroll:
        for t in tl.static_range(0, until):
            hm = next_hm(hm, t, x, ps, ws, kept, b, n, c, total, v_th, v_reset, leak, B, N, C, last, leaky)
    else:
        for t in range(0, until):
            hm = next_hm(hm, t, x, ps, ws, kept, b, n, c, total, v_th, v_reset, leak, B, N, C, last, leaky)
    return hm


@triton.jit
def steps(x, s, mean, added, ps, ws, pool, part, pe, pe_membrane, pe_output, kept, w1, b1, w2, b2,
          alpha, decay, total, rest, v_th, v_reset, leak, B, start: tl.constexpr, stop: tl.constexpr,
          N: tl.constexpr, C: tl.constexpr, H: tl.constexpr, span: tl.constexpr, parts: tl.constexpr,
          last: tl.constexpr, SA: tl.constexpr, leaky: tl.constexpr, whole: tl.constexpr, BN: tl.constexpr,
          BC: tl.constexpr, BJ: tl.constexpr, BP: tl.constexpr):
    """Spikes of the steps from start to stop; p, w and the pooled input (T, B, C). Of a map that is not `whole` in one
    program, each goes through `span` positions, and leaves the sums of Hm in part (T, B, parts, C)."""
    b, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    c = tl.arange(0, BC)
    writes = (c < C) & (block == 0)
    hm, hm_mean = tl.zeros([BN, BC], tl.float32) + v_reset, tl.zeros([BC], tl.float32) + v_reset
    if SA and start > 0:
        hm_mean = tl.sum(read(part + ((start - 1) * B + b) * parts * C, tl.arange(0, BP), c, parts, C, True), 0) / N
    for t in range(start, stop):
        r, keep = t * B + b, keeps(kept, t)
        shift, membrane = offset(added, pe, t, r, c, C), row(pe_membrane, t, c, C)
        p = tl.zeros([BC], tl.float32) + decay
        if SA:
            seen = row(mean, r, c, C) + shift + membrane + hm_mean
            p = gate(seen, w1, b1, w2, b2, alpha, C, H, BC, BJ)
            tl.store(pool + r * C + c, seen, mask=writes)
        w = (total * shift + row(pe_output, t, c, C) + rest + p * (membrane - shift)) * keep
        p = p * keep + (1 - keep)
        tl.store(ps + r * C + c, p, mask=writes)
        tl.store(ws + r * C + c, w, mask=writes)
        sums = tl.zeros([BN, BC], tl.float32)
        for first in range(0, span, BN):
            n = block * span + first + tl.arange(0, BN)
            if not whole:
                hm = before(start, x, ps, ws, kept, b, n, c, total, v_th, v_reset, leak, B, N, C, last, leaky, True)
            u = potential(hm, read(x + r * N * C, n, c, N, C, last), p, w, total, keep)
            write(s + r * N * C, (u >= v_th).to(tl.float32), n, c, N, C, last)
            hm = reset(u, v_th, v_reset, leak, leaky)
            sums += tl.where((n < N)[:, None] & (c < C)[None, :], hm, 0.0)
        if SA:
            hm_sum = tl.sum(sums, 0)
            if whole:
                hm_mean = hm_sum / N
            else:
                tl.store(part + (r * parts + block) * C + c, hm_sum, mask=c < C)


@triton.jit
def steps_backward(ds, x, dx, dhm, added, ps, ws, pool, part, hidden, dpool, dz_out, dadded, dhidden, dpe_membrane,
                   dpe_output, pe, pe_membrane, kept, w1, b1, w2, K, alpha, total, v_th, v_reset, leak, a, T, B,
                   start: tl.constexpr, stop: tl.constexpr, N: tl.constexpr, C: tl.constexpr, H: tl.constexpr,
                   span: tl.constexpr, parts: tl.constexpr, last: tl.constexpr, SA: tl.constexpr, leaky: tl.constexpr,
                   whole: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, BJ: tl.constexpr, BP: tl.constexpr):
    """The steps from stop - 1 down to start: for each, what follows of the sums over space of the step after it, and
    then dU, and dx = q dU. Between launches dhm is the gradient of Hm, and part (2, T, B, parts, C) the sums."""
    b, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    c = tl.arange(0, BC)
    writes = (c < C) & (block == 0)
    d = tl.zeros([BN, BC], tl.float32)
    by_p, by_one = tl.zeros([BC], tl.float32), tl.zeros([BC], tl.float32)  # sums of dU (Hm - X) and of dU
    for i in range(0, stop - start):
        t = stop - 1 - i
        spread = tl.zeros([BC], tl.float32)
        if t + 1 < T:
            r, keep = (t + 1) * B + b, keeps(kept, t + 1)
            if not whole:
                k = tl.arange(0, BP)
                by_p = tl.sum(read(part + r * parts * C, k, c, parts, C, True), 0)
                by_one = tl.sum(read(part + (r + T * B) * parts * C, k, c, parts, C, True), 0)
            by_one *= keep
            p, dseen = row(ps, r, c, C), tl.zeros([BC], tl.float32)
            if SA:
                slope = row(pe_membrane, t + 1, c, C) - offset(added, pe, t + 1, r, c, C)
                dz = (by_p * keep + by_one * slope) * p * (1 - p / alpha)
                dseen = gate_backward(dz, row(pool, r, c, C), w1, b1, w2, hidden, dhidden, r, block == 0, K, C, H, BC,
                                      BJ)
                tl.store(dz_out + r * K + c, dz, mask=writes)
                tl.store(dpool + r * C + c, dseen, mask=writes)
                spread = dseen / N
            tl.store(dadded + r * K + c, dseen + (total - p) * by_one, mask=writes)
            if dpe_membrane is not None:
                tl.store(dpe_membrane + r * K + c, dseen + p * by_one, mask=writes)
            if dpe_output is not None:
                tl.store(dpe_output + r * K + c, by_one, mask=writes)
        if t >= 0:
            r, keep = t * B + b, keeps(kept, t)
            p, w = row(ps, r, c, C), row(ws, r, c, C)
            sums_p, sums_one = tl.zeros([BN, BC], tl.float32), tl.zeros([BN, BC], tl.float32)
            for first in range(0, span, BN):
                n = block * span + first + tl.arange(0, BN)
                hm = before(t if whole else start, x, ps, ws, kept, b, n, c, total, v_th, v_reset, leak, B, N, C, last,
                            leaky, not whole)
                if not whole:
                    d = tl.zeros([BN, BC], tl.float32)
                    if t + 1 < T:
                        d = read(dhm + b * N * C, n, c, N, C, last)
                y = read(x + r * N * C, n, c, N, C, last)
                ds_t = read(ds + r * N * C, n, c, N, C, last)
                u = potential(hm, y, p, w, total, keep)
                d += spread[None, :]
                if leaky:
                    d *= leak
                du = tl.where(tl.abs(u - v_th) <= a / 2, (ds_t + d * (v_reset - u)) / a, 0.0)  # eq. 5
                du = tl.where((n < N)[:, None] & (c < C)[None, :], du + tl.where(u >= v_th, 0.0, d), 0.0)
                sums_p += du * (hm - y)
                sums_one += du
                write(dx + r * N * C, weight_of_x(p, total, keep)[None, :] * du, n, c, N, C, last)
                d = p[None, :] * du
                if not whole:
                    write(dhm + b * N * C, d, n, c, N, C, last)
            by_p, by_one = tl.sum(sums_p, 0), tl.sum(sums_one, 0)
            if not whole:
                tl.store(part + (r * parts + block) * C + c, by_p, mask=c < C)
                tl.store(part + ((r + T * B) * parts + block) * C + c, by_one, mask=c < C)
