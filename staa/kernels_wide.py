"""The time steps of the STAA neuron on a GPU where maps are small and channels many: see `kernels_steps.py`.

There SA's weights are more than a sample's current, so a program takes G samples, whose maps it holds whole, and SA's
products are those of matrices. p, w and the pooled input are (G, C), a tile of maps is (G, N, C).
"""

import triton
import triton.language as tl

from .kernels import fire_backward, product, row
from .kernels_steps import keeps, reset, weight_of_x


@triton.jit
def at_channels(numbers, at, there):
    """Those of some samples' channels (G, C), or zero where there are none."""
    out = tl.zeros([at.shape[0], at.shape[1]], tl.float32)
    if numbers is not None:
        out = tl.load(numbers + at, mask=there, other=0.0)
    return out


@triton.jit
def maps(b, n, c, B, N: tl.constexpr, C: tl.constexpr, last: tl.constexpr):
    """Where the maps of samples b lie in a time step, and whether they are there."""
    within = n[:, None] * C + c[None, :] if last else c[None, :] * N + n[:, None]
    there = (b < B)[:, None, None] & ((n < N)[:, None] & (c < C)[None, :])[None, :, :]
    return b[:, None, None] * N * C + within[None, :, :], there


@triton.jit
def sixteen(first, G: tl.constexpr, B):
    """Rows of a product, which has sixteen at least, and which of them are samples: each has 16 / G, of which the first
    counts, and the others are beyond the end."""
    i = tl.arange(0, 16)
    r = first + i // (16 // G)
    return tl.where(i % (16 // G) == 0, r, B)


@triton.jit
def by_sample(y, G: tl.constexpr):
    """(G, J) of y (16, J), whose rows are `sixteen`."""
    return tl.sum(tl.reshape(y, [G, 16 // G, y.shape[1]]), 1)


@triton.jit
def squeeze_of(pools, r, B, w1, b1, squeezed, C: tl.constexpr, H: tl.constexpr, BD: tl.constexpr, BH: tl.constexpr):
    """SA's hidden units (16, H), zero in rows beyond the end; also into squeezed (B, H). pools: (B, C)."""
    j = tl.arange(0, BH)
    there = (r < B)[:, None] & (j < H)[None, :]
    h = product(pools, C, w1, r, B, j, C, H, False, BD) + row(b1, 0, j, H)[None, :]
    h = tl.where(there, tl.maximum(h, 0.0), 0.0)
    tl.store(squeezed + r[:, None] * H + j[None, :], h, mask=there)
    return h


@triton.jit
def wide_steps(x, s, mean, value, ps, ws, pools, squeezed, pe, pe_membrane, pe_output, kept, w1, b1, w2, b2, alpha,
               total, v_th, v_reset, leak, T, B, N: tl.constexpr, C: tl.constexpr, H: tl.constexpr, last: tl.constexpr,
               leaky: tl.constexpr, G: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, BH: tl.constexpr,
               BD: tl.constexpr, BJ: tl.constexpr):
    """Spikes; p, w and the pooled input (T, B, C). squeezed (T, B, H) is to compute in."""
    first = tl.program_id(0).to(tl.int64) * G
    b, n, c = first + tl.arange(0, G), tl.arange(0, BN), tl.arange(0, BC)
    channels, tiles = (b < B)[:, None] & (c < C)[None, :], maps(b, n, c, B, N, C, last)
    r = sixteen(first, G, B)
    hm, hm_mean = tl.zeros([G, BN, BC], tl.float32) + v_reset, tl.zeros([G, BC], tl.float32) + v_reset
    samples = tl.zeros([], tl.int64) + B
    for t in range(0, T):
        step, keep = t * samples, keeps(kept, t)
        at = (step + b)[:, None] * C + c[None, :]
        shift = at_channels(value, at, channels) + row(pe, t, c, C)[None, :]
        membrane = row(pe_membrane, t, c, C)[None, :]
        tl.store(pools + at, at_channels(mean, at, channels) + shift + membrane + hm_mean, mask=channels)
        tl.debug_barrier()  # rows are read by other threads than wrote them
        squeeze_of(pools + step * C, r, B, w1, b1, squeezed + step * H, C, H, BD, BH)
        tl.debug_barrier()
        z = by_sample(product(squeezed + step * H, H, w2, r, B, c, H, C, False, BJ), G) + row(b2, 0, c, C)[None, :]
        p = alpha * tl.sigmoid(z)
        w = tl.where(keep > 0, total * shift + row(pe_output, t, c, C)[None, :] + p * (membrane - shift), 0.0)
        p = tl.where(keep > 0, p, 1.0)
        tl.store(ps + at, p, mask=channels)
        tl.store(ws + at, w, mask=channels)
        hm = wide_potential(hm, x + step * N * C, tiles, p, w, total, keep)
        tl.store(s + step * N * C + tiles[0], tl.where(hm >= v_th, 1.0, 0.0).to(s.dtype.element_ty), mask=tiles[1])
        hm = reset(hm, v_th, v_reset, leak, leaky)
        hm_mean = tl.sum(tl.where(tiles[1], hm, 0.0), 1) / N


@triton.jit
def wide_potential(hm, x, tiles, p, w, total, keep):
    """U[t] (G, N, C)."""
    y = tl.load(x + tiles[0], mask=tiles[1], other=0.0).to(tl.float32)
    return p[:, None, :] * hm + weight_of_x(p, total, keep)[:, None, :] * y + w[:, None, :]


@triton.jit
def wide_steps_backward(ds, x, dx, value, ps, ws, pools, squeezed, dpools, dz_rows, dvalue, dsqueezed, dpe_membrane,
                        dpe_output, pe, pe_membrane, kept, w1, b1, w2, K, alpha, total, v_th, v_reset, leak, a, T, B,
                        N: tl.constexpr, C: tl.constexpr, H: tl.constexpr, last: tl.constexpr, leaky: tl.constexpr,
                        G: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, BH: tl.constexpr, BD: tl.constexpr,
                        BJ: tl.constexpr):
    """As `steps_backward`, which says what goes where: of each step first what follows of the one after it."""
    first = tl.program_id(0).to(tl.int64) * G
    b, n, c, j = first + tl.arange(0, G), tl.arange(0, BN), tl.arange(0, BC), tl.arange(0, BH)
    channels, tiles = (b < B)[:, None] & (c < C)[None, :], maps(b, n, c, B, N, C, last)
    r = sixteen(first, G, B)
    d = tl.zeros([G, BN, BC], tl.float32)
    dp, sum_du = tl.zeros([G, BC], tl.float32), tl.zeros([G, BC], tl.float32)
    samples = tl.zeros([], tl.int64) + B
    for i in range(0, T + 1):
        t = T - 1 - i
        step = t * samples
        by_mean = tl.zeros([G, BC], tl.float32)
        if t + 1 < T:
            after, keep = step + B, keeps(kept, t + 1)
            at, at_row = (after + b)[:, None] * C + c[None, :], (after + b)[:, None] * K + c[None, :]
            dp, sum_du = tl.where(keep > 0, dp, 0.0), tl.where(keep > 0, sum_du, 0.0)
            p = at_channels(ps, at, channels)
            shift = at_channels(value, at, channels) + row(pe, t + 1, c, C)[None, :]
            slope = row(pe_membrane, t + 1, c, C)[None, :] - shift
            tl.store(dz_rows + at_row, (dp + sum_du * slope) * p * (1 - p / alpha), mask=channels)
            tl.debug_barrier()  # rows are read by other threads than wrote them
            h = squeeze_of(pools + after * C, r, B, w1, b1, squeezed + after * H, C, H, BD, BH)
            dh = tl.where(h > 0, product(dz_rows + after * K, K, w2, r, B, j, C, H, True, BD), 0.0)
            tl.store(dsqueezed + (after + r)[:, None] * K + j[None, :], dh, mask=(r < B)[:, None] & (j < H)[None, :])
            tl.debug_barrier()
            dpooled = by_sample(product(dsqueezed + after * K, K, w1, r, B, c, H, C, True, BJ), G)
            tl.store(dpools + at, dpooled, mask=channels)
            tl.store(dvalue + at_row, dpooled + (total - p) * sum_du, mask=channels)
            if dpe_membrane is not None:
                tl.store(dpe_membrane + at_row, dpooled + p * sum_du, mask=channels)
            if dpe_output is not None:
                tl.store(dpe_output + at_row, sum_du, mask=channels)
            by_mean = dpooled / N
        if t >= 0:
            hm = tl.zeros([G, BN, BC], tl.float32) + v_reset
            for before in range(0, t):
                at = (before * samples + b)[:, None] * C + c[None, :]
                hm = wide_potential(hm, x + before * samples * N * C, tiles, at_channels(ps, at, channels),
                                    at_channels(ws, at, channels), total, keeps(kept, before))
                hm = reset(hm, v_th, v_reset, leak, leaky)
            keep, at = keeps(kept, t), (step + b)[:, None] * C + c[None, :]
            p, w = at_channels(ps, at, channels), at_channels(ws, at, channels)
            y = tl.load(x + step * N * C + tiles[0], mask=tiles[1], other=0.0).to(tl.float32)
            ds_t = tl.load(ds + step * N * C + tiles[0], mask=tiles[1], other=0.0).to(tl.float32)
            d += by_mean[:, None, :]
            if leaky:
                d *= leak
            u = wide_potential(hm, x + step * N * C, tiles, p, w, total, keep)
            du = tl.where(tiles[1], fire_backward(u, ds_t, d, v_th, v_reset, a), 0.0)
            dp, sum_du = tl.sum(du * (hm - y), 1), tl.sum(du, 1)
            q = weight_of_x(p, total, keep)
            tl.store(dx + step * N * C + tiles[0], (q[:, None, :] * du).to(dx.dtype.element_ty), mask=tiles[1])
            d = p[:, None, :] * du
