"""The STAA neuron step by step, and differentiated by hand. What it computes stands in `attention.py`, in the order of
`fused_staa.py`, whose letters these are; this file is tested against it. What is done to the maps, in C or by operators
of torch, stands in `fused_staa_maps.py`: the rest is small.

Autograd would note each of its operators at every step, and on that a small network would spend its time. Here the
gradients of the weights are products over all steps and samples at once.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .fused import first_derivative, membrane_type
from .fused_lif import SLICE
from .fused_staa_maps import InC, InPlace
from .surrogate import Surrogate


def step_by_step(x: Tensor, space: int, kept: Tensor | None, numbers: tuple, leaky: bool, surrogate: Surrogate,
                 parameters: dict[str, Tensor], large: bool, in_c: bool) -> Tensor:
    """Spikes for the current x as it lies; the rest is as in `fused_staa.equations`. large: whether x and the
    parameters alone are kept for the backward pass, which then computes everything once more. in_c: whether maps are
    computed in C; else those of a large current some samples after others, so that they lie in the cache."""
    alpha, decay, gain, *rule = numbers
    leak, decay = (decay, 1.0) if leaky else (1.0, decay)
    sa = "sa.squeeze.weight" in parameters
    total, rest = (alpha, 0.0) if sa else (decay + gain, rule[1] * (1 - decay))
    neuron = (InC if in_c else InPlace)(space, kept, alpha, sa, leak, decay, total, rest, (surrogate, *rule))
    keep = torch.is_grad_enabled() and not large
    sliced = large and not in_c and x.device.type == "cpu"
    return _StepByStep.apply(x, neuron, keep, sliced, tuple(parameters), *parameters.values())


class _StepByStep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, z, keep, sliced, names, *values):
        s, state = torch.empty_like(x), {}
        for part in slices(x, sliced):
            state = forward(x[:, part], s[:, part], z, dict(zip(names, values)), keep)
        ctx.save_for_backward(x, *values, *state.values())
        ctx.neuron, ctx.sliced, ctx.names, ctx.state = z, sliced, names, tuple(state)
        return s

    @staticmethod
    @first_derivative
    def backward(ctx, ds):
        x, *saved = ctx.saved_tensors
        parameters, state = dict(zip(ctx.names, saved)), dict(zip(ctx.state, saved[len(ctx.names):]))
        gradients: dict[str, Tensor] = {}
        dx = torch.empty_like(x)
        with torch.autocast(x.device.type, enabled=False):  # as it was on the way forward, see `STAALIF`
            for part in slices(x, ctx.sliced):
                again = state or forward(x[:, part], None, ctx.neuron, parameters, keep=True)
                found = backward(ds[:, part], x[:, part], dx[:, part], ctx.neuron, parameters, again)
                gradients = {name: gradients[name] + found[name] for name in ctx.names} if gradients else found
        return dx, None, None, None, None, *[gradients[name] for name in ctx.names]


def slices(x: Tensor, sliced: bool) -> list[slice]:
    """Of the samples of x (T, B, ...): all, or so many at once that a step's maps lie in the cache."""
    size = max(SLICE // x[0, 0].numel(), 1) if sliced else x.shape[1]
    return [slice(start, start + size) for start in range(0, x.shape[1], size)]


def forward(x: Tensor, s: Tensor | None, z: InPlace, parameters: dict[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Spikes into s, as x lies, unless it is None; and what the backward pass needs, by name, if that is to be kept."""
    x = x.to(membrane_type(x))
    T, B, C, state = len(x), x.shape[1], x.shape[-3 - z.space], {}
    v_reset = z.rule[2]

    added = x.new_zeros(T, B, C)                                                  # X~ - X
    if "pe_input.weight" in parameters:
        added = added + parameters["pe_input.weight"].unsqueeze(1)
    if "gc.key.weight" in parameters:
        key, query, norm, value = ((parameters[f"gc.{name}.weight"], parameters[f"gc.{name}.bias"])
                                   for name in ("key", "query", "norm", "value"))
        k, context, mean = z.look(x, *key)
        context = context + added
        q = F.linear(context, *query)
        normed, center, scale = torch.native_layer_norm(q, q.shape[-1:], *norm, 1e-5)
        added = added + F.linear(normed.relu_(), *value)                          # eqs. 8, 9
        state = dict(k=k, context=context, q=q, center=center, scale=scale, normed=normed)
    seen, w, slope = added, z.total * added + z.rest, -added
    if "pe_membrane.weight" in parameters:
        pe = z.leak * parameters["pe_membrane.weight"].unsqueeze(1)
        seen, slope = seen + pe, slope + pe
    if "pe_output.weight" in parameters:
        w = w + parameters["pe_output.weight"].unsqueeze(1)

    if z.sa:
        squeeze, excite = ((parameters[f"sa.{name}.weight"], parameters[f"sa.{name}.bias"])
                           for name in ("squeeze", "excite"))
        seen = seen + (mean if "k" in state else x.mean(z.space))
    us, hm, after = x.new_empty(T if keep else 1, *x.shape[1:]), torch.full_like(x[0], v_reset), torch.empty_like(x[0])
    p, hm_mean = torch.full_like(added[0], z.decay), torch.full_like(added[0], v_reset)
    pools, hiddens, ps = [], [], []
    for t in range(T):
        if z.sa:                                                                  # (B, C), eq. 12
            pools.append(seen[t] + hm_mean)
            hiddens.append(F.linear(pools[-1], *squeeze).relu_())
            p = F.linear(hiddens[-1], *excite).sigmoid_().mul_(z.alpha)
        ps.append(p)
        w_t, kept = torch.addcmul(w[t], p, slope[t]), None if z.kept is None else z.kept[t]
        if kept is not None:
            w_t = torch.where(kept, w_t, 0.0)
        hm_mean = z.step(x[t], hm, (*z.weights(p, kept), w_t.unsqueeze(z.space)), us[t if keep else 0],
                         None if s is None else s[t], after, first=t == 0, last=t == T - 1)
        hm, after = after, hm
    if not keep:
        return {}
    state |= dict(pool=torch.stack(pools), hidden=torch.stack(hiddens)) if z.sa else {}
    return state | dict(u=us, p=torch.stack(ps), slope=slope)


def backward(ds: Tensor, x: Tensor, dx: Tensor, z: InPlace, parameters: dict[str, Tensor],
             state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradient of x, into dx, and those of the parameters, by their names."""
    x = x.to(membrane_type(x))
    T, N, us, ps, slope = len(x), x.shape[z.space], state["u"], state["p"], state["slope"]
    kept = None if z.kept is None else z.kept.view(-1, 1, 1)
    gradients: dict[str, Tensor] = {}

    def weights_of(name: str, dy: Tensor, y: Tensor) -> None:
        gradients[f"{name}.weight"] = dy.flatten(0, 1).mT @ y.flatten(0, 1)
        gradients[f"{name}.bias"] = dy.sum((0, 1))

    du = dx if dx.dtype == x.dtype else torch.empty_like(x)
    dws, dmean = [], torch.zeros_like(ps)                                         # dmean: for each position
    p, q = z.weights(ps, kept)
    if z.sa:
        slope_of_p, awake = ps * (1 - ps / z.alpha), state["hidden"] > 0
        slope_of_p = slope_of_p if kept is None else slope_of_p * kept
        excite, squeeze = parameters["sa.excite.weight"], parameters["sa.squeeze.weight"] / N
        dexcite, dsqueeze = torch.empty_like(ps), torch.empty_like(state["hidden"])
    room, later = torch.empty_like(x[0]), (x[0], ps[0], ps[0])                    # after the last step there is none
    for t in reversed(range(T)):
        dw_t, dp = z.step_backward(us[t], us[t - 1], x[t], ds[t], later, du[t], room, first=t == 0, last=t == T - 1)
        dws.append(dw_t)
        if z.sa:
            dp.addcmul_(slope[t], dw_t)
            torch.mul(dp, slope_of_p[t], out=dexcite[t])
            torch.mul(dexcite[t] @ excite, awake[t], out=dsqueeze[t])
            torch.mm(dsqueeze[t], squeeze, out=dmean[t])
        later = du[t], p[t], dmean[t].unsqueeze(z.space)

    dw = torch.stack(dws[::-1])
    dw = dw if kept is None else dw * kept
    dseen, dslope = N * dmean, ps * dw
    dadded = z.total * dw - dslope + dseen
    gradients["pe_membrane.weight"], gradients["pe_output.weight"] = z.leak * (dslope + dseen).sum(1), dw.sum(1)
    if z.sa:
        weights_of("sa.excite", dexcite, state["hidden"])
        weights_of("sa.squeeze", dsqueeze, state["pool"])
    if "k" in state:
        weights_of("gc.value", dadded, state["normed"])
        dnormed = (dadded @ parameters["gc.value.weight"]) * (state["normed"] > 0)
        dq, gradients["gc.norm.weight"], gradients["gc.norm.bias"] = torch.ops.aten.native_layer_norm_backward(
            dnormed, state["q"], dnormed.shape[-1:], state["center"], state["scale"], parameters["gc.norm.weight"],
            parameters["gc.norm.bias"], [True, True, True])
        weights_of("gc.query", dq, state["context"])
        dcontext = dq @ parameters["gc.query.weight"]
        gradients["gc.key.weight"] = z.look_backward(x, state["k"], parameters["gc.key.weight"], dcontext, dmean, q, du)
        gradients["gc.key.bias"] = torch.zeros_like(parameters["gc.key.bias"])    # the softmax does not see it
        dadded = dadded + dcontext
    else:
        du.mul_(q)
        if z.sa:
            du += dmean.unsqueeze(z.space)
    gradients["pe_input.weight"] = dadded.sum(1)
    if du is not dx:
        dx.copy_(du)
    return gradients
