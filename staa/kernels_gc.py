"""The GC block of the STAA neuron on a GPU, eqs. 7 to 9: see `kernels.py`."""

import triton
import triton.language as tl

from .kernels import product, read, row, write


@triton.jit
def context(x, key, pe, mean, contexts, log_denominator, B, N: tl.constexpr, C: tl.constexpr, last: tl.constexpr,
            GC: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr):
    """The mean over space (T, B, C); the context + PE (T, B, C), and the logarithm of its softmax's denominator (T, B).
    Each of the BN positions has a softmax of its own until the end."""
    r, c = tl.program_id(0).to(tl.int64), tl.arange(0, BC)
    total, seen = tl.zeros([BN, BC], tl.float32), tl.zeros([BN, BC], tl.float32)
    maximum, denominator = tl.full([BN], -1e30, tl.float32), tl.zeros([BN], tl.float32)
    weight = row(key, 0, c, C)[None, :]
    for start in tl.range(0, N, BN, num_stages=3):
        n = start + tl.arange(0, BN)
        y = read(x + r * N * C, n, c, N, C, last)
        total += y
        if GC:
            score = tl.where(n < N, tl.sum(y * weight, 1), -1e30)
            higher = tl.maximum(maximum, score)
            shrink, e = tl.exp(maximum - higher), tl.where(n < N, tl.exp(score - higher), 0.0)
            seen, denominator, maximum = seen * shrink[:, None] + y * e[:, None], denominator * shrink + e, higher
    tl.store(mean + r * C + c, tl.sum(total, 0) / N, mask=c < C)
    if GC:
        highest = tl.max(maximum, 0)
        shrink = tl.exp(maximum - highest)
        denominator_all = tl.sum(denominator * shrink, 0)
        seen_all = tl.sum(seen * shrink[:, None], 0) / denominator_all
        tl.store(contexts + r * C + c, seen_all + row(pe, r // B, c, C), mask=c < C)
        tl.store(log_denominator + r, highest + tl.log(denominator_all))


@triton.jit
def context_backward(x, dx, key, pe, contexts, log_denominator, dvalue, dcontext, dmean, dkey, K, B, N: tl.constexpr,
                     C: tl.constexpr, last: tl.constexpr, GC: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr):
    """Adds to dx what comes through the mean and the context; dkey of each image. And dcontext becomes the gradient of
    PE, which is in the context and, as dvalue, beside it."""
    r, c = tl.program_id(0).to(tl.int64), tl.arange(0, BC)
    weight, by_mean = row(key, 0, c, C)[None, :], row(dmean, r, c, C)[None, :] / N
    if GC:
        by_context = tl.load(dcontext + r * K + c, mask=c < C, other=0.0)
        middle = tl.sum(by_context * (row(contexts, r, c, C) - row(pe, r // B, c, C)), 0)  # the mean of dk, by k
        denominator = tl.load(log_denominator + r)
        tl.debug_barrier()  # until every thread has read it
        tl.store(dcontext + r * K + c, by_context + tl.load(dvalue + r * K + c, mask=c < C, other=0.0), mask=c < C)
    sums = tl.zeros([BN, BC], tl.float32)
    for start in range(0, N, BN):
        n = start + tl.arange(0, BN)
        y = read(x + r * N * C, n, c, N, C, last)
        d = read(dx + r * N * C, n, c, N, C, last) + by_mean
        if GC:
            k = tl.exp(tl.where(n < N, tl.sum(y * weight, 1), -1e30) - denominator)
            dscore = k * (tl.sum(y * by_context[None, :], 1) - middle)
            d += k[:, None] * by_context[None, :] + dscore[:, None] * weight
            sums += dscore[:, None] * y
        write(dx + r * N * C, d, n, c, N, C, last)
    if GC:
        tl.store(dkey + r * K + c, tl.sum(sums, 0), mask=c < C)


@triton.jit
def normal_of(q, H: tl.constexpr):
    """q (BR, H), normalised, and the factor."""
    there = (tl.arange(0, q.shape[1]) < H)[None, :]
    q = tl.where(there, q - (tl.sum(q, 1) / H)[:, None], 0.0)
    factor = tl.rsqrt(tl.sum(q * q, 1) / H + 1e-5)[:, None]
    return q * factor, factor


@triton.jit
def columns(x, w, bias, out, L, r, count, D: tl.constexpr, J: tl.constexpr, rows: tl.constexpr, BJ: tl.constexpr):
    """Into rows r of out (count, J), L numbers apart: x w + bias, for x (BR, BD) and a matrix w (D, J)."""
    i = tl.arange(0, x.shape[1])
    for start in range(0, J, BJ):
        j = start + tl.arange(0, BJ)
        y = tl.dot(x, read(w, i, j, D, J, rows), input_precision="tf32x3") + row(bias, 0, j, J)[None, :]
        tl.store(out + r[:, None] * L + j[None, :], y, mask=(r < count)[:, None] & (j < J)[None, :])


@triton.jit
def query(contexts, wq, bq, weight, bias, wv, bv, q, value, count, C: tl.constexpr, H: tl.constexpr, BR: tl.constexpr,
          BD: tl.constexpr, BJ: tl.constexpr, BV: tl.constexpr):
    """The query q (T, B, H) of the contexts, and value = wv ReLU(LN(q)) + bv, (T, B, C); wq (H, C), wv (C, H)."""
    r, j = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR), tl.arange(0, BJ)
    there = (r < count)[:, None] & (j < H)[None, :]
    y = product(contexts, C, wq, r, count, j, C, H, False, BD) + row(bq, 0, j, H)[None, :]
    tl.store(q + r[:, None] * H + j[None, :], y, mask=there)
    y, _ = normal_of(y, H)
    y = tl.maximum(y * row(weight, 0, j, H)[None, :] + row(bias, 0, j, H)[None, :], 0.0)
    columns(y, wv, bv, value, C, r, count, H, C, False, BV)


@triton.jit
def query_backward(dvalue, K, wv, weight, bias, wq, q, out, dq, dweight, dbias, dcontext, count, C: tl.constexpr,
                   H: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr, BJ: tl.constexpr, BV: tl.constexpr):
    """dq (T, B, H) and dcontext from dvalue (T, B, C), and what of it belongs to LN's weight and bias, all in rows K
    apart. out: ReLU(LN(q)) once more."""
    r, j = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR), tl.arange(0, BJ)
    d = product(dvalue, K, wv, r, count, j, C, H, True, BD)
    there = (r < count)[:, None] & (j < H)[None, :]
    normal, factor = normal_of(tl.load(q + r[:, None] * H + j[None, :], mask=there, other=0.0), H)
    slope = row(weight, 0, j, H)[None, :]
    y = tl.maximum(normal * slope + row(bias, 0, j, H)[None, :], 0.0)
    d = tl.where(y > 0, d, 0.0)
    at = r[:, None] * K + j[None, :]
    tl.store(out + r[:, None] * H + j[None, :], y, mask=there)
    tl.store(dweight + at, d * normal, mask=there)
    tl.store(dbias + at, d, mask=there)
    d *= slope
    d = factor * (d - (tl.sum(d, 1) / H)[:, None] - normal * (tl.sum(d * normal, 1) / H)[:, None])
    d = tl.where(there, d, 0.0)
    tl.store(dq + at, d, mask=there)
    columns(d, wq, None, dcontext, K, r, count, H, C, True, BV)
