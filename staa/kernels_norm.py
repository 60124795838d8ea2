"""BN on a GPU where the channels lie last in memory, in Triton: `norm.py` launches it.

x (M, C): M places of all images and time steps. A program looks at BM rows of it at once and at BC channels; sums over
the rows of each of P programs are in part (P, 2, C).
"""

import triton
import triton.language as tl

from .kernels import read, row, write


@triton.jit
def some_rows(start, size, BM: tl.constexpr):
    """BM rows of this program, which has `size`; it begins with start = 0."""
    return tl.program_id(0).to(tl.int64) * size + start + tl.arange(0, BM)


@triton.jit
def two_sums(part, first, second, c, C: tl.constexpr):
    at = part + tl.program_id(0) * 2 * C + c
    tl.store(at, tl.sum(first, 0), mask=c < C)
    tl.store(at + C, tl.sum(second, 0), mask=c < C)


@triton.jit
def over_programs(part, c, P, C: tl.constexpr, BP: tl.constexpr):
    """Both sums of all programs (C,), (C,)."""
    first, second = tl.zeros([BP, c.shape[0]], tl.float32), tl.zeros([BP, c.shape[0]], tl.float32)
    for start in range(0, P, BP):
        p = start + tl.arange(0, BP)
        at, there = p[:, None] * 2 * C + c[None, :], (p < P)[:, None] & (c < C)[None, :]
        first += tl.load(part + at, mask=there, other=0.0)
        second += tl.load(part + at + C, mask=there, other=0.0)
    return tl.sum(first, 0), tl.sum(second, 0)


@triton.jit
def about(x, c, M, C: tl.constexpr, BS: tl.constexpr):
    """About the mean (C,): that of the first BS rows."""
    return tl.sum(read(x, tl.arange(0, BS), c, M, C, True), 0) / tl.minimum(M, BS)


@triton.jit
def moments(x, part, M, size, C: tl.constexpr, BS: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr):
    """Sums of x - `about` and its square: of x itself, far from 0, rounding would take the variance away."""
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    shift = about(x, c, M, C, BS)[None, :]
    first, second = tl.zeros([BM, BC], tl.float32), tl.zeros([BM, BC], tl.float32)
    for start in tl.range(0, size, BM, num_stages=3):
        m = some_rows(start, size, BM)
        y = tl.where((m < M)[:, None], read(x, m, c, M, C, True) - shift, 0.0)
        first += y
        second += y * y
    two_sums(part, first, second, c, C)


@triton.jit
def statistics(x, part, mean, scale, running_mean, running_var, eps, momentum, M, P, C: tl.constexpr, BS: tl.constexpr,
               BP: tl.constexpr, BC: tl.constexpr):
    """The mean and 1 / the standard deviation; and the running statistics, whose variance is the unbiased one."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    first, second = over_programs(part, c, P, C, BP)
    shifted = first / M
    variance = second / M - shifted * shifted
    variance = tl.where(variance < 0, 0.0, variance)  # by rounding; NaN stays
    average = about(x, c, M, C, BS) + shifted
    tl.store(mean + c, average, mask=c < C)
    tl.store(scale + c, tl.rsqrt(variance + eps), mask=c < C)
    was = row(running_mean, 0, c, C)
    tl.store(running_mean + c, was + momentum * (average - was), mask=c < C)
    was = row(running_var, 0, c, C)
    tl.store(running_var + c, was + momentum * (variance * (M / (M - 1)) - was), mask=c < C)


@triton.jit
def normalise(x, y, mean, scale, weight, bias, M, C: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr):
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    m, factor = some_rows(0, BM, BM), row(scale, 0, c, C) * row(weight, 0, c, C)
    z = read(x, m, c, M, C, True) - row(mean, 0, c, C)[None, :]
    write(y, z * factor[None, :] + row(bias, 0, c, C)[None, :], m, c, M, C, True)


@triton.jit
def gradient_moments(x, dy, part, mean, M, size, C: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr):
    """Sums of dy and of dy (x - mean)."""
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    middle = row(mean, 0, c, C)[None, :]
    first, second = tl.zeros([BM, BC], tl.float32), tl.zeros([BM, BC], tl.float32)
    for start in tl.range(0, size, BM, num_stages=3):
        m = some_rows(start, size, BM)
        d = read(dy, m, c, M, C, True)
        first += d
        second += d * (read(x, m, c, M, C, True) - middle)
    two_sums(part, first, second, c, C)


@triton.jit
def parameter_gradients(part, scale, dweight, dbias, P, C: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr):
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    first, second = over_programs(part, c, P, C, BP)
    tl.store(dbias + c, first, mask=c < C)
    tl.store(dweight + c, second * row(scale, 0, c, C), mask=c < C)


@triton.jit
def normalise_backward(x, dy, dx, mean, scale, weight, dweight, dbias, M, C: tl.constexpr, BM: tl.constexpr,
                       BC: tl.constexpr):
    """dx = weight scale (dy - the mean of dy - z the mean of dy z), where z = (x - mean) scale."""
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    m, factor = some_rows(0, BM, BM), row(scale, 0, c, C)
    by_z, by_mean = factor * row(dweight, 0, c, C) / M, row(dbias, 0, c, C) / M
    z = read(x, m, c, M, C, True) - row(mean, 0, c, C)[None, :]
    d = read(dy, m, c, M, C, True) - by_mean[None, :] - z * by_z[None, :]
    write(dx, d * (factor * row(weight, 0, c, C))[None, :], m, c, M, C, True)
