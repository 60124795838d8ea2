"""Compiles the kernels written by hand for an H200, on a machine without one: python h200.py. Types, shapes and
layouts are checked by that, which Triton's interpreter is lenient about. Prints each kernel's name.
"""

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from staa import fused_lif_gpu, fused_staa, fused_staa_gpu, kernels_norm, kernels_pool, norm, pooling
from staa.attention import STAALIF

#: The kernels, by the module that is asked for them.
BY_HAND = {fused_lif_gpu: ("lif", "lif_backward"), kernels_pool: ("pool", "pool_backward"),
           kernels_norm: ("moments", "statistics", "normalise", "gradient_moments", "parameter_gradients",
                          "normalise_backward"),
           fused_staa_gpu: ("context", "query", "steps", "steps_backward", "query_backward", "context_backward",
                            "weights", "over_batch", "wide_steps", "wide_steps_backward")}
TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.bool: "*i1"}


def compiled(kernel, arguments, settings):
    """As a launch would: None and 1 are compiled in, and it is known what 16 divides."""
    options = {"num_warps": 4} | {name: settings.pop(name) for name in ("num_warps", "enable_fp_fusion") if name in settings}
    given = dict(zip(kernel.arg_names, arguments)) | settings
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value, always = given[parameter.name], parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and not always):
            signature[parameter.name], constants[i,] = "constexpr", value
            continue
        kind = TYPES[value.dtype] if isinstance(value, Tensor) else "i32" if isinstance(value, int) else "fp32"
        signature[parameter.name] = kind
        if kind[0] == "*" or kind == "i32" and value % 16 == 0 and not always:
            attributes[i,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


class Launcher:
    def __init__(self, module, name):
        self.name, self.kernel = name, getattr(module, name)

    def launch(self, arguments, settings):
        found = compiled(self.kernel, arguments, settings)
        assert found.asm["cubin"] and found.metadata.shared <= (
            fused_staa.SHARED if settings.get("C", 1) <= 512 else fused_staa.SHARED_WIDE)
        print(self.name)

    def __getitem__(self, grid):
        return lambda *arguments, **settings: self.launch(arguments, settings)


def main():
    for module, names in BY_HAND.items():
        for name in names:
            setattr(module, name, Launcher(module, name))
    for T, dtype in ((1, torch.float32), (4, torch.bfloat16), (18, torch.float32)):
        x = torch.zeros(T, 99, dtype=dtype)
        fused_lif_gpu.forward(x, x, 0.25, 1, 1, 0, 1)
        fused_lif_gpu.backward(x, x, x, 0.25, 1, 1, 0, 1)
    for shape, dtype in (((3, 64, 8, 6), torch.bfloat16), ((2, 5, 4, 4), torch.float32)):
        x = torch.zeros(shape, dtype=dtype).contiguous(memory_format=torch.channels_last)
        y = pooling.AvgPool2d(2)(x)
        pooling.launch(kernels_pool.pool, x, y, 2, y.shape)
        pooling.launch(kernels_pool.pool_backward, y, x, 2, y.shape)
        layer = norm.BatchNorm2d(x.shape[1])
        normalised = norm._Norm.apply(x.requires_grad_(), layer.weight, layer.bias, layer.running_mean, layer.running_var,
                                      layer.eps, layer.momentum)
        normalised.backward(normalised.detach())
    for C, size, T, B, dtype, settings in (
            (64, 32, 2, 3, torch.bfloat16, {}), (96, 7, 3, 3, torch.float32, {"pe_place": "both"}),
            (16, 40, 9, 3, torch.bfloat16, {"sa": False}), (32, 8, 4, 3, torch.float32, {"gc": False}),
            (512, 2, 4, 600, torch.bfloat16, {}), (300, 3, 2, 600, torch.float32, {"pe_place": "both", "r": 2}),
            (1024, 1, 2, 600, torch.float32, {"r": 2})):
        neuron = STAALIF(C, T, **settings)
        x = torch.zeros(1, C, size, size, dtype=dtype).expand(T * B, C, size, size).unflatten(0, (T, B))
        space = -1 if T == 2 else -2
        y = fused_staa.as_it_lies(x, space)
        parameters = {name: p.detach().view(p.shape[:2]) for name, p in neuron.named_parameters()}
        z = fused_staa_gpu.Neuron(y, space, torch.ones(T, dtype=torch.bool), (2.0, *neuron.numbers()), False, parameters)
        _, saved = fused_staa_gpu.forward(y, z)
        fused_staa_gpu.backward(y, y, z, *saved)


if __name__ == "__main__":
    main()
