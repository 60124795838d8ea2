"""What the neurons of a network compute in a forward pass, by the symbols of section 3.

    X    (T, B, C, H, W)  input current                  v     (T, B, C)           what GC adds, eq. 9
    PE   (T, C)           position encoding, eq. 11      M, N  (T, B, C)           weights of eq. 14
    k    (T, B, H, W)     where GC looks, eq. 7          U     (T, B, C, H, W)     potential before firing
    X~   (T, B, C, H, W)  attended current, eq. 13       S, Hm (T, B, C, H, W)     spikes; potential after the reset
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from .attention import STAALIF, GlobalContext, PositionEncoding, StepAttention
from .firing import evaluating, neurons
from .fsta import FSTALIF
from .neuron import LIF

#: A forward hook that gives a module another output: (module, inputs, output) to output.
Hook = Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]


@contextmanager
def traced(network: nn.Module) -> Iterator[dict[str, dict[str, Tensor]]]:
    """Context that keeps what the neurons of a network, or one neuron alone, compute in the last forward pass in it.

        with traced(network) as seen:
            network(images)
        seen["stem.1"]["U"]  # by layer, as `neurons` names it (a neuron alone is ""), and by symbol

    The equations are computed as they stand, not on the fast path, whose rounding may turn a spike where U meets the
    threshold. A symbol that a neuron does not have, whose block is off or is one of your own, is absent; PE is the one
    added to the input, and X~ of FSTA its own. A neuron that is no `LIF` has X and S only, one that ran several times
    its last call, one that did not run is absent. In training the aggregator is kept at the steps that TSRD drops, too.
    Nothing has a gradient. DataParallel's replicas, and what was compiled before, are not seen. All of it, five tensors
    of X's size a layer and some small ones, stays on the network's device as long as `seen` does.
    """
    seen: dict[str, dict[str, Tensor]] = {}
    with ExitStack() as stack:
        for name, neuron in neurons(network).items():
            watch(neuron, partial(seen.__setitem__, name), stack)
        yield seen


def watch(neuron: nn.Module, keep: Callable[[dict[str, Tensor]], None], stack: ExitStack) -> None:
    """Hand keep(symbols) the tensors of each forward pass, until the stack closes."""
    parts: dict[str, list[Tensor]] = {}

    def note(symbol, tensor):
        parts.setdefault(symbol, []).append(tensor.detach())

    def start(module, inputs, named):
        parts.clear()
        note("X", (*inputs, *named.values())[0])

    def end(module, inputs, spikes):
        note("S", spikes)
        keep(symbols(neuron, {symbol: torch.cat(tensors) for symbol, tensors in parts.items()}))

    stack.callback(neuron.register_forward_pre_hook(start, with_kwargs=True).remove)
    if isinstance(neuron, STAALIF):
        blocks: dict[str, nn.Module] = {"M": neuron.sa} if isinstance(neuron.sa, StepAttention) else {}
        if isinstance(neuron.gc, GlobalContext):
            blocks |= {"k": neuron.gc.key, "v": neuron.gc.value}
        for symbol, block in blocks.items():
            listener = block.register_forward_hook(lambda _, inputs, output, symbol=symbol: note(symbol, output))
            stack.callback(listener.remove)
    if isinstance(neuron, LIF):
        def firing(u, fire=neuron.fire):
            s, hm = fire(u)
            note("U", u)
            note("Hm", hm)
            return s, hm

        stack.enter_context(replaced(neuron, "fire", firing))
    if isinstance(neuron, (STAALIF, FSTALIF)):
        def attending(x, attend=neuron.attend):
            attended = attend(x)
            note("X~", attended)
            return attended

        stack.enter_context(replaced(neuron, "attend", attending))
    stack.callback(neuron.register_forward_hook(end).remove)


@contextmanager
def replaced(neuron: nn.Module, method: str, by: Callable) -> Iterator[None]:
    """This one neuron's method is another function inside, which also keeps it off the fast path."""
    own = neuron.__dict__.get(method)
    setattr(neuron, method, by)
    try:
        yield
    finally:
        delattr(neuron, method) if own is None else setattr(neuron, method, own)


def symbols(neuron: nn.Module, parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors shaped as the head of this file has them, from those that came by, one after the other along T."""
    x, found = parts["X"], dict[str, Tensor]()
    for symbol in ("X", "X~", "U", "S", "Hm"):
        if symbol in parts and parts[symbol].numel() == x.numel():  # a neuron of your own may fire otherwise
            found[symbol] = parts[symbol].view(x.shape)
    if "k" in parts:
        scores = parts["k"]  # (T * B, 1, H, W)
        found["k"] = scores.flatten(1).softmax(-1).view(*x.shape[:2], *scores.shape[2:])
    found |= {symbol: parts[symbol].view(x.shape[:3]) for symbol in ("v", "M") if symbol in parts}
    if isinstance(neuron, STAALIF):
        if "M" in found and neuron.sa is not None:
            found["N"] = neuron.sa.alpha - found["M"]
        if neuron.pe_input is not None:
            found["PE"] = neuron.pe_input.weight.detach().clone()
    return found


def effects(network: nn.Module, seen: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, float]]:
    """What hangs on each part of the aggregator: by layer, the share of neurons and time steps at which a spike comes
    or goes where the part does something else, while the current that reaches the layer stays as it is.

    seen: what `traced` has of this network, in evaluation mode. Raises ValueError where that is nothing.
    "PE", "GC", "SA": the part is left out; for SA, M = N = alpha / 2, as at its start. "where GC looks": k is the same
    at every place. "GC, over images", "SA, over images": v, or M, of each step and channel is its mean over these
    images. "PE, over steps", "SA, over steps": PE, or that mean, is its mean over the time steps. A part that is off is
    absent. Such shares do not add up, neither over parts nor over layers.
    """
    if not seen:
        raise ValueError(f"no neuron of this {type(network).__name__} was traced: call the network inside `traced`")
    found: dict[str, dict[str, float]] = {name: {} for name in seen}
    with torch.no_grad(), evaluating(network):
        for name, parts in seen.items():
            neuron = neurons(network)[name]
            for part, hooks in changes(neuron, parts).items():
                handles = [module.register_forward_hook(hook) for module, hook in hooks]
                try:
                    spikes = neuron(parts["X"])
                finally:
                    for handle in handles:
                        handle.remove()
                found[name][part] = float((spikes != parts["S"]).double().mean())
    return found


def changes(neuron: nn.Module, seen: dict[str, Tensor]) -> dict[str, list[tuple[nn.Module, Hook]]]:
    """For each part that the neuron has: its modules, and the hooks that give their output another value."""
    def left_out(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return inputs[0]

    def everywhere(number: float) -> Hook:
        return lambda module, inputs, output: torch.full_like(output, number)

    def over_steps(pe: PositionEncoding) -> tuple[nn.Module, Hook]:
        return pe, lambda module, inputs, output: inputs[0] + pe.per_step().mean(0, keepdim=True)

    def held(mean: Tensor, at_once: int) -> Hook:  # mean (T, 1, C), so many time steps a call
        steps = iter(mean.expand(-1, seen["X"].shape[1], -1)[..., None, None].split(at_once))
        return lambda module, inputs, output: next(steps).flatten(0, 1)

    if not isinstance(neuron, STAALIF):
        return {}
    encodings = [pe for pe in (neuron.pe_input, neuron.pe_membrane, neuron.pe_output) if pe is not None]
    found: dict[str, list[tuple[nn.Module, Hook]]] = {}
    if encodings:
        found |= {"PE": [(pe, left_out) for pe in encodings], "PE, over steps": [over_steps(pe) for pe in encodings]}
    if "k" in seen and neuron.gc is not None:
        mean = seen["v"].mean(1, keepdim=True)
        found |= {"GC": [(neuron.gc, left_out)], "GC, over images": [(neuron.gc.value, held(mean, at_once=len(mean)))],
                  "where GC looks": [(neuron.gc.key, everywhere(0.0))]}
    if "M" in seen and neuron.sa is not None:
        mean = seen["M"].mean(1, keepdim=True)
        means = {"over images": mean, "over steps": mean.mean(0, keepdim=True).expand_as(mean)}
        found |= {f"SA, {what}": [(neuron.sa, held(fixed, at_once=1))] for what, fixed in means.items()}
        found["SA"] = [(neuron.sa, everywhere(neuron.sa.alpha / 2))]
    return found
