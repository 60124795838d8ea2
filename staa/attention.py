"""The spatial-temporal attention aggregator inside a LIF neuron: section 3, eqs. 6-14 and TSRD.

    X~[t] = GC(X[t] + PE[t])                                    (eqs. 7-11, 13)
    M[t]  = alpha sigmoid(W_2 ReLU(W_1 avgpool(Hm[t-1] + X~[t])))   (eq. 12)
    U[t]  = M[t] Hm[t-1] + N[t] X~[t],   N[t] = alpha - M[t]    (eqs. 6, 14)

and then the neuron fires and resets as ever (eqs. 2, 3). The formulas are lost in our source of the paper. Its text
gives the blocks and their order; their inner form follows the literature it cites (GCNet for GC, squeeze-and-excitation
for the gate). Four things above all are our reading. GC sees the current X, real numbers, where the text says "spiking
input". SA pools Hm[t-1] and X~[t], where the text says "the spatially aggregated feature input" at two time steps.
N = alpha - M, with a fixed alpha: with the gate at 1/2 and alpha 2 the aggregator starts as the plain addition that
TSRD falls back to. And M weighs all of Hm: `variants` reads it as a potential that has leaked. The blocks say the rest.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import fused, fused_staa
from .neuron import LIF, Computed, over_time, unchanged, without_autocast
from .settings import bounded, real_numbers, switches, unused, whole_numbers

PE_KINDS = ("learned", "fixed")
PE_PLACES = ("input", "membrane", "both", "output")


class PositionEncoding(Computed):
    """PE[t] of eq. 11: one number a time step and channel, added over batch and space; x (T, B, C, H, W).

    kind "learned" starts at zero; "fixed" is the sinusoid of Vaswani et al. over t and c (section 4.3 compares them).
    The shape (T, 1, C, 1, 1) is our reading; it is stored as (T, C), since `Module.to(memory_format=...)` refuses
    parameters of rank 5. Raises ValueError on another T or C.
    """

    def __init__(self, channels: int, T: int, kind: str = "learned"):
        super().__init__()
        if kind not in PE_KINDS:
            raise ValueError(f"pe_kind must be one of {', '.join(PE_KINDS)}, got {kind!r}")
        if kind == "learned":
            self.weight = nn.Parameter(torch.empty(T, channels))
        else:
            self.register_buffer("weight", torch.empty(T, channels), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        learned = isinstance(self.weight, nn.Parameter)
        with torch.no_grad(), torch.device("cpu"):  # also of a meta device's, where computing takes seconds to import
            self.weight.zero_() if learned else self.weight.copy_(sinusoid(*self.weight.shape))

    def extra_repr(self) -> str:
        T, channels = self.weight.shape
        return f"T={T}, channels={channels}, {'learned' if isinstance(self.weight, nn.Parameter) else 'fixed'}"

    def per_step(self) -> Tensor:
        """PE as (T, 1, C, 1, 1)."""
        return self.weight[:, None, :, None, None]

    def forward(self, x: Tensor) -> Tensor:
        T, channels = self.weight.shape
        if (x.shape[0], x.shape[2]) != (T, channels):  # one step, or one channel, would be added to all
            raise ValueError(f"this PositionEncoding takes (T={T}, B, C={channels}, H, W), got {tuple(x.shape)}")
        return x + self.per_step()


def sinusoid(T: int, channels: int) -> Tensor:
    """(T, C): sin(t / 10000^(c/C)) in even channels c, the cosine of the same angle in the odd channel after it."""
    t = torch.arange(T).unsqueeze(1)
    c = torch.arange(channels)
    angle = t * torch.exp(-math.log(10000.0) * (c - c % 2) / channels)
    return torch.where(c % 2 == 0, angle.sin(), angle.cos())


class Pointwise(nn.Conv2d):
    """1x1 convolution. Like `Norm` it computes in the type of x: attention stays float32 where a whole network was made
    bf16. from_zero: it starts at zero."""

    bias: Tensor

    def __init__(self, channels: int, out: int, from_zero: bool = False):
        self.from_zero = from_zero  # Conv2d resets its parameters
        super().__init__(channels, out, 1)

    def reset_parameters(self) -> None:
        super().reset_parameters()  # in any case: a seed's numbers stay those of the other blocks
        if self.from_zero:
            nn.init.zeros_(self.weight)
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


class Norm(nn.LayerNorm):
    """LayerNorm; like `Pointwise`, in the type of x."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class GlobalContext(nn.Module):
    """GC block, eqs. 7-10: x (N, C, H, W) + v, where v (N, C, 1, 1) is the context that attention over space picks.

    r divides the channels of the query (the paper's scaling coefficient, 4); at least two are left [ours], since
    LayerNorm over one number is constant. Raises ValueError on r < 1, TypeError where it is no whole number.
    """

    def __init__(self, channels: int, r: int = 4):
        super().__init__()
        whole_numbers(r=r)
        if r < 1:
            raise ValueError(f"r, the scaling coefficient of GC, must be at least 1, got {r}")
        hidden = max(channels // r, 2)
        self.key = Pointwise(channels, 1)
        self.query = Pointwise(channels, hidden)
        self.norm = Norm(hidden)
        self.value = Pointwise(hidden, channels, from_zero=True)  # as in GCNet: the block starts as the identity

    def forward(self, x: Tensor) -> Tensor:
        k = self.key(x).flatten(2).softmax(-1)                                # (N, 1, HW), eq. 7
        context = x.flatten(2) @ k.transpose(1, 2)                            # (N, C, 1)
        q = self.query(context.unsqueeze(-1)).flatten(1)                      # (N, C/r)
        q = self.norm(q).relu()[..., None, None]                              # (N, C/r, 1, 1), eq. 8
        return x + self.value(q)                                              # eqs. 9, 10


class StepAttention(nn.Module):
    """SA block, eq. 12: M (B, C, 1, 1) in (0, alpha) from Hm[t-1] and X~[t], both (B, C, H, W)."""

    def __init__(self, channels: int, alpha: float = 2.0):
        super().__init__()
        hidden = max(channels // 4, 1)
        self.alpha = alpha
        self.squeeze = Pointwise(channels, hidden)
        # Our reading of "initial speed": M starts at alpha / 2.
        self.excite = Pointwise(hidden, channels, from_zero=True)

    def forward(self, hm: Tensor, x: Tensor) -> Tensor:
        pooled = (hm + x).mean((-2, -1), keepdim=True)
        return self.alpha * self.excite(self.squeeze(pooled).relu()).sigmoid()

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}"


#: What the aggregator is made of, and what each block computes, as it stands here.
BLOCKS: dict[type, Callable] = {block: block.forward for block in (PositionEncoding, GlobalContext, StepAttention,
                                                                   Pointwise, Norm)}


class STAALIF(LIF):
    """LIF neuron with the spatial-temporal attention aggregator: current (T, B, C, H, W) in, spikes out; after a linear
    layer (T, B, C), as one place.

    channels, T: sizes of the axes C and T of the current.
    gc, pe, sa: each block by itself. Without SA the aggregator is the plain LIF's fixed mixing, eq. 1, of the
        attended input; with all blocks off and beta = 0 the neuron is `LIF`.
    r: scaling coefficient of GC. alpha: scaling factor of SA.
    beta: TSRD (section 3.2). In training each time step drops the whole aggregator with this probability, one draw
        for the batch, each layer's own [ours], and adds instead: U[t] = Hm[t-1] + X[t]. Never in evaluation.
    pe_kind: "learned" or "fixed" (section 4.3).
    pe_place: where PE is added (Figure 2; the letters are our reading): "input" before aggregation (c, the paper's
        choice), "membrane" (b), "both" with an encoding each (d), "output" after aggregation (e).
    The remaining settings are those of `LIF`; decay and gain are eq. 1's, which is computed without SA only.
    Raises ValueError on a value that is not allowed, and on a setting of what is off that is not its default; TypeError
    on channels, T or r that is no whole number, and on gc, pe or sa that is no bool.
    """

    leaky = False  # whether Hm leaks before it is mixed or added: see `variants`

    def __init__(self, channels: int, T: int, *, gc: bool = True, pe: bool = True, sa: bool = True, r: int = 4,
                 alpha: float = 2.0, beta: float = 0.1, pe_kind: str = "learned", pe_place: str = "input", **lif):
        super().__init__(**lif)
        whole_numbers(channels=channels, T=T)
        switches(gc=gc, pe=pe, sa=sa)
        if channels < 1 or T < 1:
            raise ValueError(f"channels and T must be at least 1, got channels={channels} and T={T}")
        bounded(alpha=alpha)
        if not alpha > 0:
            raise ValueError(f"alpha, the scaling factor of SA, must be above 0, got {alpha}")
        real_numbers(beta=beta)
        if not 0 <= beta <= 1:
            raise ValueError(f"beta, the probability of TSRD, must be between 0 and 1, got {beta}")
        if pe_place not in PE_PLACES:
            raise ValueError(f"pe_place must be one of {', '.join(PE_PLACES)}, got {pe_place!r}")
        if not gc:
            unused(STAALIF, "the GC block, which is off (gc=False)", r=r)
        if not pe:
            unused(STAALIF, "PE, which is off (pe=False)", pe_kind=pe_kind, pe_place=pe_place)
        if not sa:
            unused(STAALIF, "the SA block, which is off (sa=False)", alpha=alpha)
        else:
            leak = {} if self.leaky else {"decay": self.decay}
            unused(STAALIF, "eq. 1, in whose place SA computes (sa=True)", **leak, gain=self.gain)
        self.channels, self.T, self.beta = channels, T, beta

        def encoding(*places):
            return PositionEncoding(channels, T, pe_kind) if pe and pe_place in places else None

        self.pe_input = encoding("input", "both")
        self.pe_membrane = encoding("membrane", "both")
        self.pe_output = encoding("output")
        self.gc = GlobalContext(channels, r) if gc else None
        self.sa = StepAttention(channels, alpha) if sa else None

    def attend(self, x: Tensor) -> Tensor:
        """X~ = GC(X + PE) for all time steps at once, eqs. 7-11 and 13."""
        if self.pe_input is not None:
            x = self.pe_input(x)
        if self.gc is not None:
            x = self.gc(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        return x

    def carried(self, hm: Tensor) -> Tensor:
        """What SA, and TSRD's addition, take of Hm[t-1]: all of it, or where `leaky` what the leak of eq. 1 leaves."""
        return self.v_reset + self.decay * (hm - self.v_reset) if self.leaky else hm

    def mix(self, hm: Tensor, x: Tensor) -> Tensor:
        """U[t] from Hm[t-1] and X~[t]: eq. 14, or eq. 1 where SA is off."""
        if self.sa is None:
            return self.charge(hm, x)
        hm = self.carried(hm)
        m = self.sa(hm, x)
        return m * hm + (self.sa.alpha - m) * x

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() not in (3, 5) or x.shape[0] != self.T or x.shape[2] != self.channels:
            raise ValueError(f"this STAALIF takes (T={self.T}, B, C={self.channels}, H, W) or (T={self.T}, B, "
                             f"C={self.channels}), got {tuple(x.shape)}")
        if x.dim() == 3:
            return self.forward(x[..., None, None])[..., 0, 0]
        dropped = self.draw(x.device)
        if dropped is None and next(self.children(), None) is None:
            return super().forward(x)
        with without_autocast(x.device.type):  # there is no matrix product that would gain by bf16
            alpha = 0.0 if self.sa is None else self.sa.alpha
            if self.is_plain() and fused.usable(x, alpha, *self.numbers()):
                return self._fused(x, dropped, alpha)
            return self._reference(x.to(fused.membrane_type(x)), dropped).to(x.dtype)

    def draw(self, device: torch.device) -> Tensor | None:
        """TSRD: the time steps (T,) that drop the aggregator, as a mask, or None where none does. There is always a
        mask on a GPU, which draws it itself: it is not waited for, and a CUDA graph does not repeat one choice for
        ever. So there is under torch.func, with fake tensors, and in a network that is traced or compiled as a whole.
        """
        if not (self.training and self.beta):
            return None
        drawn = torch.rand(self.T, device=device) < self.beta
        always = (device.type != "cpu" or type(drawn) is not Tensor or torch.compiler.is_compiling()
                  or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active())
        return drawn if always or drawn.any() else None

    def _reference(self, x: Tensor, dropped: Tensor | None) -> Tensor:
        pe_membrane, pe_output = (None if pe is None else pe(x.new_zeros(self.T, 1, self.channels, 1, 1))
                                  for pe in (self.pe_membrane, self.pe_output))
        attended = self.attend(x)
        hm = torch.full_like(x[0], self.v_reset)
        spikes = []
        for t, (x_t, xa_t) in enumerate(zip(x.unbind(), attended.unbind())):
            u = self.mix(hm if pe_membrane is None else hm + pe_membrane[t], xa_t)
            u = u if pe_output is None else u + pe_output[t]
            if dropped is not None:
                u = torch.where(dropped[t], self.carried(hm) + x_t, u)
            s, hm = self.fire(u)
            spikes.append(s)
        return over_time(spikes)

    def _fused(self, x: Tensor, dropped: Tensor | None, alpha: float) -> Tensor:
        """The same in few passes over memory: see `fused_staa`. The blocks' tensors are asked for by attribute, since
        DataParallel and FSDP put plain ones in the parameters' place."""
        kind, kept = fused.membrane_type(x), None if dropped is None else ~dropped
        parameters = {}
        for block, module in self.named_modules(remove_duplicate=False):
            for name in ("weight", "bias") if block else ():
                if (p := getattr(module, name, None)) is not None:
                    parameters[f"{block}.{name}"] = (p.flatten(1) if p.dim() > 2 else p).to(kind).contiguous()
        return fused_staa.staa(x, parameters, kept, (alpha, *self.numbers()), self.leaky, self.surrogate)

    def is_plain(self) -> bool:
        """As in LIF; and every block is one of BLOCKS, unchanged and without hooks, since the fast path calls none."""
        def is_ours(m: nn.Module) -> bool:
            return (type(m).forward is BLOCKS.get(type(m)) and "forward" not in m.__dict__
                    and getattr(m, "eps", 1e-5) == 1e-5 and not (
                        m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks))

        return super().is_plain() and unchanged(self, EQUATIONS) and all(
            is_ours(m) for child in self.children() for m in child.modules())

    def extra_repr(self) -> str:
        without_eq_1 = self.sa is not None and not self.leaky
        own = f"v_th={self.v_th}, v_reset={self.v_reset}, a={self.a}" if without_eq_1 else super().extra_repr()
        return f"channels={self.channels}, T={self.T}, beta={self.beta}, {own}"


#: As `neuron.EQUATIONS`: of the aggregator.
EQUATIONS: dict[str, Callable] = {"attend": STAALIF.attend, "carried": STAALIF.carried, "mix": STAALIF.mix}
