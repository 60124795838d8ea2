"""Block diagrams of the neuron: Figures 1 and 2, drawn from a real forward pass.

Every shape on an arrow is read off the operations of that pass (`operations`), and every PE off the neuron that has it;
none is typed. Boxes carry the names of the code. In the drawings themselves lengths are in inches.
"""

import copy
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .attention import STAALIF, PositionEncoding
from .canvas import Canvas
from .plots import PAGE

TILDE = r"$\tilde{\mathrm{X}}$"


class Operation(NamedTuple):
    """Shapes of one operation's tensors."""

    inputs: list[tuple]
    output: tuple


class _Listener(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.modules, self.found = [], {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and not any(out is a for a in args):  # `to` may return x itself
            inputs = [tuple(a.shape) for a in args if isinstance(a, Tensor)]
            self.found.setdefault(".".join([*self.modules, func.__name__]), Operation(inputs, tuple(out.shape)))
        return out


def operations(neuron: torch.nn.Module, x: Tensor) -> dict[str, Operation]:
    """The tensor operations of neuron(x) in order, by module and function: "gc.softmax", "gc.query.conv2d", "sub", ...

    Where an operation happens again, as at every time step, its first call is kept.
    """
    listener, hooks = _Listener(), []
    for name, module in neuron.named_modules():
        if name:
            last = name.rpartition(".")[2]
            hooks.append(module.register_forward_pre_hook(lambda *_, last=last: listener.modules.append(last)))
            hooks.append(module.register_forward_hook(lambda *_: listener.modules.pop() and None, always_call=True))
    try:
        with torch.no_grad(), listener:
            neuron(x)
    finally:
        for hook in hooks:
            hook.remove()
    return listener.found


def size(shape: tuple) -> str:
    """(4, 2, 64, 8, 8) as 4×2×64×8×8."""
    return "×".join(map(str, shape))


def figure1(neuron: STAALIF, x: Tensor) -> Figure:
    """Figure 1: the aggregator (a), the GC block (b), the SA block (c) and TSRD (d) of this neuron on the current x.

    neuron: a STAALIF with all blocks on and PE at its input; x: (T, B, C, H, W). Raises ValueError for another neuron.
    """
    if not isinstance(neuron, STAALIF) or neuron.leaky or None in (neuron.pe_input, neuron.gc, neuron.sa):
        raise ValueError(f"Figure 1 needs a STAALIF with gc, sa and PE at its input, got {neuron}")
    always = copy.deepcopy(neuron).train()
    always.beta = 1.0  # every time step bypasses the aggregator
    full, dropped = operations(copy.deepcopy(neuron).eval(), x), operations(always, x)
    canvas = Canvas(PAGE, 5.75)
    canvas.at = (0.0, 3.55)
    _aggregator(canvas, neuron, full)
    for left, panel, shapes in ((0.05, _global_context, full), (2.5, _step_attention, full), (4.65, _dropout, dropped)):
        canvas.at = (left, 0.0)
        panel(canvas, neuron, shapes)
    return canvas.figure


def _aggregator(c: Canvas, neuron: STAALIF, s: dict[str, Operation]):
    c.text(0.05, 2.1, "(a) STAALIF: the aggregator in a neuron", size=8, ha="left")
    c.area(3.17, 0.12, 3.66, 1.83)
    c.text(3.23, 1.85, "at every time step t", size=6, ha="left")
    pe, gc = c.operator(0.95, 1.5, "+"), c.box(1.95, 1.5, "gc\nGlobalContext (b)", "gc", w=0.86, h=0.34)
    encoding = c.box(0.95, 0.95, "pe_input\nPositionEncoding", "pe", w=0.86, h=0.34)
    c.arrow(encoding.top, pe.bottom)
    c.text(1.01, 1.24, size(s["pe_input.add"].inputs[1]), size=6, ha="left")
    times_n, plus, fire = c.operator(4.1, 1.5, "×"), c.operator(5.2, 1.5, "+"), c.box(6.05, 1.5, "fire", w=0.32)
    for start, end, x, name, shape in (
            ((0.1, 1.5), pe.left, 0.47, "X", s["pe_input.add"].inputs[0]),
            (pe.right, gc.left, 1.25, "X + PE", ()),
            (gc.right, times_n.left, 2.77, TILDE, s["unflatten"].output),
            (times_n.right, plus.left, 3.66, TILDE + "[t]", s["sa.add"].inputs[1]),
            (plus.right, fire.left, 5.58, "U[t]", s["sub"].inputs[0]),
            (fire.right, (6.82, 1.5), 6.52, "S[t]", s["to"].output)):
        c.arrow(start, end)
        c.text(x, 1.6, name)
        c.text(x, 1.4 if x < 5 else 1.3, size(shape), size=6)
    sa, times_m = c.box(4.1, 0.85, "sa\nStepAttention (c)", "sa", w=0.86, h=0.34), c.operator(5.2, 0.85, "×")
    c.arrow((3.32, 1.5), (3.32, 0.92), (3.67, 0.92))
    c.arrow(fire.bottom, (6.05, 0.4), (3.32, 0.4), (3.32, 0.78), (3.67, 0.78))
    c.arrow((5.2, 0.4), times_m.bottom)
    c.dot(3.32, 1.5)
    c.dot(5.2, 0.4)
    c.text(4.1, 0.49, "Hm[t-1]")
    c.text(4.1, 0.3, size(s["sa.add"].inputs[0]), size=6)
    c.text(5.99, 0.7, "Hm[t], for\nthe next step", ha="right")
    c.arrow(sa.top, times_n.bottom)
    c.text(4.16, 1.3, "N = alpha - M", ha="left")
    c.text(4.16, 1.17, size(s["__rsub__"].output), size=6, ha="left")
    c.arrow(sa.right, times_m.left)
    c.text(4.82, 0.95, "M")
    c.text(4.82, 0.75, size(s["sa.mul"].output), size=6)
    c.arrow(times_m.top, plus.bottom)
    T, B, C, H, W = s["pe_input.add"].output
    assert neuron.sa is not None
    maps, hidden = s["gc.key.conv2d"].inputs[0][0], s["gc.relu"].output[1]
    c.text(0.05, 0.35, f"T = {T} time steps, B = {B} images, C = {C} channels,\nH × W = {H} × {W}; (b) sees T × B = "
           f"{maps} maps,\nits query has {hidden} channels; alpha = {neuron.sa.alpha:g}", size=6, ha="left")


def _global_context(c: Canvas, neuron: STAALIF, s: dict[str, Operation]):
    c.text(0, 3.4, "(b) GlobalContext", size=8, ha="left")
    weights = s["gc.matmul"].inputs
    boxes = c.chain(0.45, 2.75, 0.42, [
        ("key", "gc", size(s["gc.key.conv2d"].output)), ("softmax over HW", "plain", size(s["gc.softmax"].output)),
        ("matmul", "plain", size(s["gc.unsqueeze"].output)), ("query", "gc", size(s["gc.query.conv2d"].output)),
        ("norm, ReLU", "gc", size(s["gc.__getitem__"].output)), ("value", "gc", "")], w=0.9)
    c.text(1.75, 3.16, f"X + PE   {size(s['gc.key.conv2d'].inputs[0])}", size=6)
    plus = c.operator(1.75, boxes[-1].y, "+")
    c.arrow((1.75, 3.06), plus.top)
    c.arrow((1.75, 2.96), (0.45, 2.96), boxes[0].top)
    c.dot(1.75, 2.96)
    c.arrow((1.75, boxes[2].y), boxes[2].right)
    c.dot(1.75, boxes[2].y)
    c.text(1.3, boxes[2].y + 0.09, size(weights[0]), size=6)
    c.arrow(boxes[-1].right, plus.left)
    c.text(1.26, boxes[-1].y + 0.09, size(s["gc.value.conv2d"].output), size=6)
    c.arrow(plus.bottom, (1.75, 0.3))
    c.text(1.75, 0.2, TILDE + "   " + size(s["gc.add"].output), size=6)


def _step_attention(c: Canvas, neuron: STAALIF, s: dict[str, Operation]):
    c.text(0, 3.4, "(c) StepAttention", size=8, ha="left")
    hm, x = s["sa.add"].inputs
    plus = c.operator(0.95, 2.83, "+")
    for left, name, shape in ((0.42, "Hm[t-1]", hm), (1.48, TILDE + "[t]", x)):
        c.text(left, 3.16, f"{name}   {size(shape)}", size=6)
        c.arrow((left, 3.06), (left, 2.83), plus.left if left < plus.x else plus.right)
    boxes = c.chain(0.95, 2.37, 0.4, [
        ("mean over H, W", "plain", size(s["sa.mean"].output)), ("squeeze", "sa", size(s["sa.squeeze.conv2d"].output)),
        ("ReLU", "plain", size(s["sa.relu"].output)), ("excite", "sa", size(s["sa.excite.conv2d"].output)),
        ("alpha · sigmoid", "plain", "")])
    c.arrow(plus.bottom, boxes[0].top)
    c.text(1.01, 2.62, size(s["sa.add"].output), size=6, ha="left")
    c.arrow(boxes[-1].bottom, (0.95, 0.3))
    c.text(0.95, 0.2, f"M   {size(s['sa.mul'].output)}", size=6)


def _dropout(c: Canvas, neuron: STAALIF, s: dict[str, Operation]):
    c.text(0, 3.4, "(d) TSRD, training only", size=8, ha="left")
    hm, x = s["add"].inputs
    whole = c.box(0.55, 1.75, "aggregator (a)\npe_input, gc, sa", "ground", w=0.86, h=0.4)
    plus = c.operator(1.9, 1.75, "+")
    for y, name, shape, shift in ((2.9, "Hm[t-1]", hm, -0.04), (2.45, "X[t]", x, 0.04)):
        c.text(1.22, y + 0.1, f"{name}   {size(shape)}", size=6)
        for box in (whole, plus):
            c.arrow((0.0, y), (box.x + shift, y), (box.x + shift, box.top[1] - (0.01 if box is plus else 0)))
        c.dot(whole.x + shift, y)
    pivot = (1.22, 0.75)
    for box, dashes, words, side in ((whole, False, f"1 - beta = {1 - neuron.beta:g}", "right"),
                                     (plus, True, f"beta = {neuron.beta:g}", "left")):
        contact = (box.x, 1.15)
        c.arrow(box.bottom, contact, head=False)
        c.dot(*contact)
        c.arrow(pivot, contact, head=False, dashes=dashes)
        c.text(1.22 + (-0.33 if side == "right" else 0.33), 0.72, words, size=6, ha=side)
    c.dot(*pivot)
    c.arrow(pivot, (1.22, 0.3))
    c.text(1.22, 0.2, f"U[t]   {size(s['sub'].inputs[0])}", size=6)
    c.text(0, 3.16, "one draw a time step, for the whole batch", size=6, ha="left")


def figure2(neurons: dict[str, STAALIF], captions: dict[str, str]) -> Figure:
    """Figure 2: where each of these neurons adds PE, one panel a neuron.

    neurons: label -> STAALIF, at most five; captions: label -> one line under it, may be empty. The places and the
    shapes of PE are those that the neuron has.
    """
    canvas = Canvas(PAGE, 2.65)
    for i, (label, neuron) in enumerate(neurons.items()):
        canvas.at = (i * PAGE / 5, 0.0)
        _places(canvas, neuron, label, captions[label])
    return canvas.figure


def _places(c: Canvas, neuron: STAALIF, label: str, caption: str):
    c.text(0.69, 2.52, f"({label})", size=8)
    blocks = [name for name in ("gc", "sa") if getattr(neuron, name) is not None]
    text = f"aggregator\n{', '.join(blocks)}" if blocks else f"{neuron.decay:g} Hm[t-1]\n+ {neuron.gain:g} X[t]"
    mix, fire = c.box(0.69, 1.35, text, "ground", w=0.94, h=0.34), c.box(0.69, 0.55, "fire", w=0.4)
    for x, name, edge, pe in ((0.48, "Hm[t-1]", 0.17, neuron.pe_membrane), (0.9, "X[t]", 1.21, neuron.pe_input)):
        c.text(x, 2.28, name)
        c.arrow((x, 2.18), (x, mix.top[1]))
        _encoding(c, x, 1.85, edge, pe)
    c.arrow(mix.bottom, fire.top)
    _encoding(c, 0.69, 0.92, 1.21, neuron.pe_output)
    c.arrow(fire.right, (1.3, 0.55))
    c.text(1.1, 0.64, "S[t]")
    encodings = (neuron.pe_membrane, neuron.pe_input, neuron.pe_output)
    shapes = [size(pe.per_step().shape) for pe in encodings if pe is not None]
    c.text(0.69, 0.28, f"PE {' and '.join(shapes)}" if shapes else "no PE", size=5.5 if len(shapes) > 1 else 6)
    c.text(0.69, 0.1, caption, size=6)


def _encoding(c: Canvas, x: float, y: float, edge: float, pe: PositionEncoding | None):
    if pe is not None:
        plus, box = c.operator(x, y, "+"), c.box(edge, y, "PE", "pe", w=0.22, h=0.2)
        c.arrow(*((box.right, plus.left) if edge < x else (box.left, plus.right)))
