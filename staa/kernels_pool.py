"""Average pooling on a GPU where the channels lie last in memory, in Triton: `pooling.py` launches it.

The windows of K x K are side by side, so W = w K, and an image's H = h K: p counts the places of the result, (B, h, w).
"""

import triton
import triton.language as tl


@triton.jit
def addresses(P, w: tl.constexpr, C: tl.constexpr, K: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr):
    """This program's places in the result and the first ones of their windows, both (BP, BC), and which are there."""
    p, c = tl.program_id(0).to(tl.int64) * BP + tl.arange(0, BP), tl.program_id(1) * BC + tl.arange(0, BC)
    first = (p // w * K * w + p % w) * K
    return p[:, None] * C + c[None, :], first[:, None] * C + c[None, :], (p < P)[:, None] & (c < C)[None, :]


@triton.jit
def pool(x, out, P, w: tl.constexpr, C: tl.constexpr, K: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr):
    """The mean of each window: x (B, H, W, C), out (B, h, w, C)."""
    at, first, there = addresses(P, w, C, K, BP, BC)
    sums = tl.zeros([BP, BC], tl.float32)
    for i in tl.static_range(K):
        for j in tl.static_range(K):
            sums += tl.load(x + first + (i * w * K + j) * C, mask=there, other=0.0).to(tl.float32)
    tl.store(out + at, (sums / (K * K)).to(out.dtype.element_ty), mask=there)


@triton.jit
def pool_backward(dout, dx, P, w: tl.constexpr, C: tl.constexpr, K: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr):
    """The gradient of x, dx (B, H, W, C), from that of the means."""
    at, first, there = addresses(P, w, C, K, BP, BC)
    d = (tl.load(dout + at, mask=there, other=0.0).to(tl.float32) / (K * K)).to(dx.dtype.element_ty)
    for i in tl.static_range(K):
        for j in tl.static_range(K):
            tl.store(dx + first + (i * w * K + j) * C, d, mask=there)
