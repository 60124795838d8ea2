"""The STAA neuron where there is no compiler, or nothing to gain by it: in operators of torch, where possible into
tensors that are there already, and differentiated by hand. What it computes stands in `attention.py`, in the order of
`fused_staa.py`, whose letters these are; this file is tested against it.

What hangs together over time is small, but autograd would note each of its operators at every step, and on that a small
network would spend its time. Here the gradients of the weights are products over all steps and samples at once; and all
that the current's gradient receives through GC and the means is added to it as one product of rank 3.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .fused import first_derivative, membrane_type
from .fused_lif import fire, fire_backward_in_place, reset
from .surrogate import Surrogate


def in_place(x: Tensor, space: int, kept: Tensor | None, numbers: tuple, leaky: bool, surrogate: Surrogate,
             parameters: dict[str, Tensor], anew: bool) -> Tensor:
    """Spikes for the current x as it lies; the rest is as in `fused_staa.equations`. anew: whether x and the parameters
    alone are kept for the backward pass, which then computes everything once more."""
    alpha, decay, gain, *rule = numbers
    leak, decay = (decay, 1.0) if leaky else (1.0, decay)
    total, rest = (alpha, 0.0) if "sa.squeeze.weight" in parameters else (decay + gain, rule[1] * (1 - decay))
    neuron = Neuron(space, kept, alpha, leak, decay, total, rest, (surrogate, *rule))
    return _InPlace.apply(x, neuron, torch.is_grad_enabled() and not anew, tuple(parameters), *parameters.values())


class Neuron(NamedTuple):
    """A neuron's settings. U[t] = p Hm[t-1] + q X[t] + w + p slope with q = total - p and w = total added + rest, where
    p is eq. 12's M, or `decay` where there is no SA; and Hm is handed on leaked."""

    space: int
    kept: Tensor | None
    alpha: float
    leak: float
    decay: float
    total: float
    rest: float
    rule: tuple  # the surrogate, v_th, v_reset and the surrogate's settings

    def weights(self, p: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor]:
        """p and q as they meet the maps: both 1 where TSRD drops the aggregator."""
        q = self.total - p
        if kept is not None:
            p, q = torch.where(kept, p, 1.0), torch.where(kept, q, 1.0)
        return p.unsqueeze(self.space), q.unsqueeze(self.space)

    def hand_on(self, u: Tensor, hm: Tensor) -> Tensor:
        """Hm after the potential u, into hm."""
        surrogate, v_th, v_reset, *_ = self.rule
        reset(hm, u, surrogate, v_th, v_reset)
        if self.leak != 1:
            hm.mul_(self.leak)
            if v_reset:
                hm.add_(v_reset * (1 - self.leak))
        return hm


class _InPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, neuron, keep, names, *values):
        s, state = forward(x, neuron, dict(zip(names, values)), keep)
        ctx.save_for_backward(x, *values, *state.values())
        ctx.neuron, ctx.names, ctx.state = neuron, names, tuple(state)
        return s

    @staticmethod
    @first_derivative
    def backward(ctx, ds):
        x, *saved = ctx.saved_tensors
        parameters, state = dict(zip(ctx.names, saved)), dict(zip(ctx.state, saved[len(ctx.names):]))
        with torch.autocast(x.device.type, enabled=False):  # as it was on the way forward, see `STAALIF`
            state = state or forward(x, ctx.neuron, parameters, keep=True)[1]
            dx, gradients = backward(ds, x, ctx.neuron, parameters, state)
        return dx, None, None, None, *[gradients[name] for name in ctx.names]


def forward(x: Tensor, z: Neuron, parameters: dict[str, Tensor], keep: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Spikes, as x lies, and what the backward pass needs, by name; nothing where it is not to be kept."""
    s, x = torch.empty_like(x), x.to(membrane_type(x))
    T, B, C, state = len(x), x.shape[1], x.shape[-3 - z.space], {}
    surrogate, v_th, v_reset, *_ = z.rule

    added = x.new_zeros(T, B, C)                                                  # X~ - X
    if "pe_input.weight" in parameters:
        added = added + parameters["pe_input.weight"].unsqueeze(1)
    if "gc.key.weight" in parameters:
        key, query, norm, value = ((parameters[f"gc.{name}.weight"], parameters[f"gc.{name}.bias"])
                                   for name in ("key", "query", "norm", "value"))
        y = x if z.space == -2 else x.mT                                          # (T, B, N, C)
        k = ((key[0] @ y.mT).squeeze(-2) + key[1]).softmax(-1)                    # (T, B, N), eq. 7; PE cancels
        context = (k.unsqueeze(-2) @ y).squeeze(-2) + added
        q = F.linear(context, *query)
        normed, mean, scale = torch.native_layer_norm(q, q.shape[-1:], *norm, 1e-5)
        added = added + F.linear(normed.relu_(), *value)                          # eqs. 8, 9
        state = dict(k=k, context=context, q=q, mean=mean, scale=scale, normed=normed)
    seen, w, slope = added, z.total * added + z.rest, -added
    if "pe_membrane.weight" in parameters:
        pe = z.leak * parameters["pe_membrane.weight"].unsqueeze(1)
        seen, slope = seen + pe, slope + pe
    if "pe_output.weight" in parameters:
        w = w + parameters["pe_output.weight"].unsqueeze(1)

    sa = "sa.squeeze.weight" in parameters
    if sa:
        squeeze, excite = ((parameters[f"sa.{name}.weight"], parameters[f"sa.{name}.bias"])
                           for name in ("squeeze", "excite"))
        seen = seen + x.mean(z.space)
    us, hm = torch.empty_like(x if keep else x[:1]), torch.full_like(x[0], v_reset)
    p, hm_mean = torch.full_like(added[0], z.decay), torch.full_like(added[0], v_reset)
    pools, hiddens, ps = [], [], []
    for t, (x_t, s_t) in enumerate(zip(x.unbind(), s.unbind())):
        if sa:                                                                    # (B, C), eq. 12
            pools.append(seen[t] + hm_mean)
            hiddens.append(F.linear(pools[-1], *squeeze).relu_())
            p = F.linear(hiddens[-1], *excite).sigmoid_().mul_(z.alpha)
        ps.append(p)
        w_t, kept = torch.addcmul(w[t], p, slope[t]), None if z.kept is None else z.kept[t]
        if kept is not None:
            w_t = torch.where(kept, w_t, 0.0)
        past, new = z.weights(p, kept)
        u = torch.addcmul(w_t.unsqueeze(z.space), new, x_t, out=us[t if keep else 0])
        if t or v_reset:
            u.addcmul_(past, hm)
        fire(u, s_t, surrogate, v_th)
        if t < T - 1:
            z.hand_on(u, hm)
            hm_mean = hm.mean(z.space) if sa else hm_mean
    if not keep:
        return s, {}
    state |= dict(pool=torch.stack(pools), hidden=torch.stack(hiddens)) if sa else {}
    return s, state | dict(u=us, p=torch.stack(ps), slope=slope)


def backward(ds: Tensor, x: Tensor, z: Neuron, parameters: dict[str, Tensor],
             state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The gradients of x, and of the parameters by their names."""
    dtype, x = x.dtype, x.to(membrane_type(x))
    T, N, us, ps, slope, sa = len(x), x.shape[z.space], state["u"], state["p"], state["slope"], "hidden" in state
    kept = None if z.kept is None else z.kept.view(-1, 1, 1)
    gradients: dict[str, Tensor] = {}

    def weights_of(name: str, dy: Tensor, y: Tensor) -> None:
        gradients[f"{name}.weight"] = dy.flatten(0, 1).mT @ y.flatten(0, 1)
        gradients[f"{name}.bias"] = dy.sum((0, 1))

    dx, dw, dmean = torch.empty_like(x), torch.empty_like(ps), torch.zeros_like(ps)  # dmean: for each position
    p, q = z.weights(ps, kept)
    if sa:
        slope_of_p, awake = ps * (1 - ps / z.alpha), state["hidden"] > 0
        slope_of_p = slope_of_p if kept is None else slope_of_p * kept
        excite, squeeze = parameters["sa.excite.weight"], parameters["sa.squeeze.weight"] / N
        dexcite, dsqueeze = torch.empty_like(ps), torch.empty_like(state["hidden"])
    room, hm, dhm = x.new_empty(3, *x.shape[1:]).unbind()
    for t in reversed(range(T)):
        du = dx[t]
        fire_backward_in_place(us[t], ds[t], dhm if t < T - 1 else None, z.leak, (room, dhm), du, *z.rule)
        torch.sum(du, z.space, out=dw[t])
        if sa:
            hm = z.hand_on(us[t - 1], hm) if t else hm.fill_(z.rule[2])
            dp = torch.sub(hm, x[t], out=room).mul_(du).sum(z.space).addcmul_(slope[t], dw[t])
            torch.mul(dp, slope_of_p[t], out=dexcite[t])
            torch.mul(dexcite[t] @ excite, awake[t], out=dsqueeze[t])
            torch.mm(dsqueeze[t], squeeze, out=dmean[t])
        if t:
            torch.addcmul(dmean[t].unsqueeze(z.space), p[t], du, out=dhm)

    dx.mul_(q)
    dw = dw if kept is None else dw * kept
    dseen, dslope = N * dmean, ps * dw
    dadded = z.total * dw - dslope + dseen
    gradients["pe_membrane.weight"], gradients["pe_output.weight"] = z.leak * (dslope + dseen).sum(1), dw.sum(1)
    if sa:
        weights_of("sa.excite", dexcite, state["hidden"])
        weights_of("sa.squeeze", dsqueeze, state["pool"])
    if "k" in state:
        weights_of("gc.value", dadded, state["normed"])
        dnormed = (dadded @ parameters["gc.value.weight"]) * (state["normed"] > 0)
        dq, gradients["gc.norm.weight"], gradients["gc.norm.bias"] = torch.ops.aten.native_layer_norm_backward(
            dnormed, state["q"], dnormed.shape[-1:], state["mean"], state["scale"], parameters["gc.norm.weight"],
            parameters["gc.norm.bias"], [True, True, True])
        weights_of("gc.query", dq, state["context"])
        dcontext = dq @ parameters["gc.query.weight"]
        k, key, y = state["k"], parameters["gc.key.weight"], x if z.space == -2 else x.mT
        dk = (dcontext.unsqueeze(-2) @ y.mT).squeeze(-2)
        dlogits = k * (dk - (k * dk).sum(-1, keepdim=True))
        gradients["gc.key.weight"] = (dlogits.unsqueeze(-2) @ y).sum((0, 1))
        gradients["gc.key.bias"] = torch.zeros_like(parameters["gc.key.bias"])    # the softmax does not see it
        positions = torch.stack([k, dlogits, torch.ones_like(k)], 2).flatten(0, 1)                    # (T B, 3, N)
        channels = torch.stack([dcontext, key.expand_as(dcontext), dmean], 2).flatten(0, 1)           # (T B, 3, C)
        rows, columns = (positions, channels) if z.space == -2 else (channels, positions)
        dx.flatten(0, 1).baddbmm_(rows.mT, columns)
        dadded = dadded + dcontext
    elif sa:
        dx += dmean.unsqueeze(z.space)
    gradients["pe_input.weight"] = dadded.sum(1)
    return dx.to(dtype), gradients
