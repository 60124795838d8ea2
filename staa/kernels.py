"""What the STAA neuron's kernels on a GPU have in common, in Triton. `fused_staa_gpu.py` launches them, and says how
they hang together; what they compute stands in `attention.py`, in the order of `fused_staa.py`, whose letters these
are.

And: N positions, C channels, H hidden units, r = t B + b an image; D and J are the sizes of a matrix. n, c, j and d
say which of them a program looks at, BN, BC, BJ and BD how many: powers of two, and what is beyond the end is masked.
`last`: whether the channels are the last axis in memory. Images have a row each in tables (T B, width); where a table
is part of a wider one, its rows lie K (or L) numbers apart.
"""

import triton
import triton.language as tl


@triton.jit
def row(numbers, r, c, C):
    """numbers[r, c] (C,), or zero where there are none."""
    out = tl.zeros([c.shape[0]], tl.float32)
    if numbers is not None:
        out = tl.load(numbers + r * C + c, mask=c < C, other=0.0)
    return out


@triton.jit
def place(x, i, j, D, J, rows: tl.constexpr):
    """Addresses of x[i, j], which lie in memory in rows, or in columns; and whether they are there."""
    if rows:
        return x + i[:, None] * J + j[None, :], (i < D)[:, None] & (j < J)[None, :]
    return x + j[None, :] * D + i[:, None], (i < D)[:, None] & (j < J)[None, :]


@triton.jit
def read(x, i, j, D, J, rows: tl.constexpr):
    """x[i, j] of one (D, J), in float32; 0 beyond its end."""
    at, there = place(x, i, j, D, J, rows)
    return tl.load(at, mask=there, other=0.0).to(tl.float32)


@triton.jit
def write(x, y, i, j, D, J, rows: tl.constexpr):
    """x[i, j] = y, in the type of x."""
    at, there = place(x, i, j, D, J, rows)
    tl.store(at, y.to(x.dtype.element_ty), mask=there)


@triton.jit
def fire_backward(u, ds, dhm, v_th, v_reset, a):
    """dU from dS and dHm: eqs. 2, 3 and 5."""
    through = tl.where(tl.abs(u - v_th) <= a / 2, (ds + dhm * (v_reset - u)) / a, 0.0)
    return through + tl.where(u >= v_th, 0.0, dhm)


@triton.jit
def product(x, K, w, r, count, j, D: tl.constexpr, J: tl.constexpr, rows: tl.constexpr, BD: tl.constexpr):
    """x w (BR, BJ) of rows r of x (count, D), which lie K numbers apart, and a matrix w (D, J). By tf32x3: three
    products of tensor cores, which together are about as exact as float32's."""
    out = tl.zeros([r.shape[0], j.shape[0]], tl.float32)
    for start in range(0, D, BD):
        i = start + tl.arange(0, BD)
        y = tl.load(x + r[:, None] * K + i[None, :], mask=(r < count)[:, None] & (i < D)[None, :], other=0.0)
        out = tl.dot(y, read(w, i, j, D, J, rows), out, input_precision="tf32x3")
    return out


@triton.jit
def over_images(x, K, y, out, part, count, images, D: tl.constexpr, J: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
                BJ: tl.constexpr):
    """Into out (D, J) the sum over some images of the products of x (count, D), rows K apart, and y (count, J)."""
    across: tl.constexpr = (J + BJ - 1) // BJ
    i, j = tl.program_id(0) // across * BD + tl.arange(0, BD), tl.program_id(0) % across * BJ + tl.arange(0, BJ)
    sums = tl.zeros([BD, BJ], tl.float32)
    for start in range(0, images, BR):
        r = part * images + start + tl.arange(0, BR)
        a = tl.load(x + r[None, :] * K + i[:, None], mask=(r < count)[None, :] & (i < D)[:, None], other=0.0)
        b = tl.load(y + r[:, None] * J + j[None, :], mask=(r < count)[:, None] & (j < J)[None, :], other=0.0)
        sums = tl.dot(a, b, sums, input_precision="tf32x3")
    tl.store(out + i[:, None] * J + j[None, :], sums, mask=(i < D)[:, None] & (j < J)[None, :])


@triton.jit
def weights(squeeze, excite, query, value, K, pools, squeezed, contexts, queried, out, size, count, images,
            C: tl.constexpr, H: tl.constexpr, Q: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
            BH: tl.constexpr, BQ: tl.constexpr):
    """The gradients of SA's and GC's weights, of some images each: out (., H C + C H + Q C + C Q), `size` numbers."""
    part, which = tl.program_id(1).to(tl.int64), tl.program_id(2)
    out += part * size
    if squeeze is not None:
        if which == 0:
            over_images(squeeze, K, pools, out, part, count, images, H, C, BR, BH, BC)
        if which == 1:
            over_images(excite, K, squeezed, out + H * C, part, count, images, C, H, BR, BC, BH)
        out += 2 * H * C
        which -= 2
    if query is not None:
        if which == 0:
            over_images(query, K, contexts, out, part, count, images, Q, C, BR, BQ, BC)
        if which == 1:
            over_images(value, K, queried, out + Q * C, part, count, images, C, Q, BR, BC, BQ)


@triton.jit
def over_batch(x, out, B, K, BR: tl.constexpr, BJ: tl.constexpr):
    """The sum over samples of x (T, B, K): out (T, K)."""
    t, k = tl.program_id(0).to(tl.int64), tl.program_id(1) * BJ + tl.arange(0, BJ)
    sums = tl.zeros([BR, BJ], tl.float32)
    for start in tl.range(0, B, BR, num_stages=3):
        sums += read(x + t * B * K, (start + tl.arange(0, BR)).to(tl.int64), k, B, K, True)
    tl.store(out + t * K + k, tl.sum(sums, 0), mask=k < K)
