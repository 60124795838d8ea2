"""The leaky integrate-and-fire (LIF) neuron and its surrogate gradient: section 3.1, eqs. 1-5.

    U[t]  = V_reset + decay (Hm[t-1] - V_reset) + gain X[t]     charge   (eq. 1)
    S[t]  = Theta(U[t] - V_th),  Theta(0) = 1                   fire     (eq. 2)
    Hm[t] = U[t] (1 - S[t]) + V_reset S[t]                      reset    (eq. 3)

X is the input current, U the membrane potential before firing, S the spikes and Hm the membrane potential after the
reset; Hm[0] = V_reset. The formulas are lost in our source of the paper: eq. 2 and what eq. 5 is survive in its words,
eqs. 1, 3 and 4 are the standard ones. Eq. 1 as it is usually written, Hm[t-1] + (X[t] - (Hm[t-1] - V_reset)) / tau, is
decay = 1 - 1/tau and gain = 1/tau (`LIF.from_tau`). The networks use 0.25 and 1, as FSTA-SNN's public code does.

Time is the first axis, and a neuron keeps nothing between calls: there is no state to reset.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from . import fused, fused_lif
from .settings import bounded, real_numbers
from .surrogate import RECTANGLE, Surrogate


class LIF(nn.Module):
    """Plain LIF neuron, eqs. 1-5: current (T, B, ...) in, spikes of the same shape out.

    Every neuron of this package is built as `neuron(channels, T=T, **settings)`; the plain one needs neither.

    decay, gain: the fixed weights of the membrane potential and of the input (FSTA-SNN's 0.25 and 1).
    v_th, v_reset: threshold and reset potential, in the unit of the current; the paper's threshold is 1.
    a: width of the surrogate's rectangle, eq. 5.
    Raises ValueError on decay outside [0, 1], a <= 0, v_th <= v_reset, a number beyond 1e30, and a current
    without a batch or a time step; TypeError on a setting that is no number, and on a surrogate that is no
    `Surrogate`.

    A subclass may bring another `surrogate`, with its settings at the end of `numbers()`, and stays fast; one that
    writes `charge` or `fire` anew is computed as written.
    """

    surrogate: Surrogate = RECTANGLE

    def __init__(self, channels: int | None = None, T: int | None = None, *, decay: float = 0.25, gain: float = 1.0,
                 v_th: float = 1.0, v_reset: float = 0.0, a: float = 1.0):
        super().__init__()
        real_numbers(decay=decay)
        bounded(gain=gain, v_th=v_th, v_reset=v_reset, a=a)
        if not 0 <= decay <= 1:
            raise ValueError(f"decay must be between 0 and 1, got {decay}")
        if not a > 0:
            raise ValueError(f"a, the width of the surrogate gradient, must be above 0, got {a}")
        if not v_th > v_reset:
            raise ValueError(f"v_th must be above v_reset, got v_th={v_th} and v_reset={v_reset}")
        if not isinstance(self.surrogate, Surrogate):
            raise TypeError(f"surrogate must be a staa.Surrogate(gradient), got {type(self.surrogate).__name__}")
        self.decay, self.gain, self.v_th, self.v_reset, self.a = decay, gain, v_th, v_reset, a

    @classmethod
    def from_tau(cls, tau: float, *sizes: int, **settings) -> "LIF":
        """The neuron of eq. 1, with the membrane time constant tau >= 1 in time steps; sizes are channels and T."""
        bounded(tau=tau)
        if not tau >= 1:
            raise ValueError(f"tau must be at least 1 time step, got {tau}")
        return cls(*sizes, decay=1 - 1 / tau, gain=1 / tau, **settings)

    def charge(self, hm: Tensor, x: Tensor) -> Tensor:
        """U[t] from Hm[t-1] and X[t], eq. 1."""
        return self.v_reset + self.decay * (hm - self.v_reset) + self.gain * x

    def fire(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """S[t] and Hm[t] from U[t], eqs. 2 and 3."""
        return self.surrogate.fire(u, *self.numbers()[2:])

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() < 2:
            raise ValueError(f"{type(self).__name__} takes a current (T, B, ...), got one of shape {tuple(x.shape)}")
        if not torch.jit.is_tracing() and not len(x):
            raise ValueError(f"{type(self).__name__} takes at least one time step, got shape {tuple(x.shape)}")
        if self.is_plain() and fused.usable(x, *self.numbers()) and not torch.compiler.is_compiling():
            return fused_lif.lif(x, self.numbers(), self.surrogate)
        hm = torch.zeros_like(x[0], dtype=fused.membrane_type(x)) + self.v_reset
        spikes = []
        for x_t in x.unbind():  # (B, ...), one time step; indexing x[t] would cost a full-size gradient each
            s, hm = self.fire(self.charge(hm, x_t.to(hm.dtype)))
            spikes.append(s)
        return over_time(spikes).to(x.dtype)

    def _load_from_state_dict(self, state, prefix, metadata, *given) -> None:
        """Where parameters are not copied, but put in their places, what is `Computed` goes where they are."""
        super()._load_from_state_dict(state, prefix, metadata, *given)
        if metadata.get("assign_to_params_buffers"):
            device = next((t.device for name, t in state.items() if name.startswith(prefix)), None)
            for module in self.modules():
                if isinstance(module, Computed) and any(b.is_meta for b in module.buffers(recurse=False)):
                    module.to_empty(device=device)

    def numbers(self) -> tuple:
        """decay, gain, threshold and reset, and the surrogate's settings."""
        return self.decay, self.gain, self.v_th, self.v_reset, self.a

    def is_plain(self) -> bool:
        """Whether nobody has changed an equation, so that `fused` computes this neuron."""
        return unchanged(self, EQUATIONS) and type(self.surrogate) is Surrogate

    def extra_repr(self) -> str:
        return f"decay={self.decay}, gain={self.gain}, v_th={self.v_th}, v_reset={self.v_reset}, a={self.a}"


#: As they stand here, whatever a reader puts into the class later.
EQUATIONS: dict[str, Callable] = {"charge": LIF.charge, "fire": LIF.fire}


def unchanged(neuron: nn.Module, equations: dict[str, Callable]) -> bool:
    """Whether these are its methods: neither another class's nor the neuron's own."""
    return all(getattr(type(neuron), name) is equation and name not in neuron.__dict__
               for name, equation in equations.items())


class Computed(nn.Module):
    """A module that `reset_parameters` computes buffers of, which are in no state: once more where a state is loaded,
    since in a network that was built on the meta device nobody has yet."""

    reset_parameters: Callable[[], None]

    def _load_from_state_dict(self, *given) -> None:
        super()._load_from_state_dict(*given)
        if list(self.buffers(recurse=False)):
            self.reset_parameters()


def without_autocast(device: str) -> AbstractContextManager:
    """Autocast switched off; on "meta", which has none, nothing."""
    return nullcontext() if device == "meta" else torch.autocast(device, enabled=False)


def over_time(steps: list[Tensor]) -> Tensor:
    """T tensors (B, ...) as one (T, B, ...); unlike `torch.stack` it keeps the channels-last layout."""
    return torch.cat(steps).unflatten(0, (len(steps), -1))
