"""What a GPU would run, on a machine without one: torch.compile's Triton kernels for an H200, run by Triton's interpreter
on the CPU's tensors.

torch has no setting for this. Of each graph that Inductor gets, the tensors are said to lie on a GPU, what asks the
driver is answered here, and the module that Inductor writes is run with its kernels in the interpreter. Triton has to be
imported with TRITON_INTERPRET=1 in the environment, which conftest.py sees to. Not run are what launches a kernel on a
GPU, with the sizes of its blocks, NVIDIA's own functions, and what Inductor does about arguments that are not aligned.
"""

import contextlib
import math
import types
from unittest import mock

import numpy as np
import torch
import triton
import triton.language as tl
from torch._dynamo.device_interface import CudaInterface
from torch._inductor import scheduler
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.codecache import CacheBase, PyCodeCache
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.fx_passes import fuse_attention
from torch._inductor.fx_passes.joint_graph import UniformValueConstantFolder
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime import triton_helpers, triton_heuristics
from torch._inductor.runtime.hints import DeviceProperties
from torch.fx.node import map_aggregate
from triton.backends.compiler import GPUTarget

GPU = torch.device("cuda", 0)
H200 = types.SimpleNamespace(
    name="NVIDIA H200", major=9, minor=0, multi_processor_count=132, warp_size=32, total_memory=139 * 2 ** 30,
    max_threads_per_multi_processor=2048, max_threads_per_block=1024, regs_per_multiprocessor=65536,
    shared_memory_per_block=49152, shared_memory_per_block_optin=232448, L2_cache_size=50 * 2 ** 20, gcnArchName="")

#: NVIDIA's functions, which the interpreter does not know.
DEVICE = types.SimpleNamespace(exp=lambda x: tl.exp(x), rsqrt=lambda x: tl.rsqrt(x), isnan=lambda x: x != x,
                               isinf=lambda x: tl.abs(x) == float("inf"), tanh=lambda x: 1 - 2 / (1 + tl.exp(2 * x)))

#: The kernels launched since the list was last cleared, one after the other.
launched: list["Kernel"] = []


class Kernel:
    """function: Triton's. meta: what Inductor says of it. elements: those it went over in its last launch."""

    def __init__(self, function, meta: dict):
        self.function, self.meta, self.arguments = function, meta, list(meta["triton_meta"]["signature"])

    def sixteens(self) -> set[str]:
        """Arguments that are known to be a multiple of 16: addresses, strides, sizes."""
        known, = self.meta["triton_meta"]["configs"]
        return {self.arguments[position] for position, in known}

    def run(self, *arguments, stream):
        blocks = {name: 16 for name in self.arguments if name.endswith("BLOCK")}
        sizes = dict(zip((name for name in self.arguments if name not in blocks), arguments))
        grid = [-(-sizes[f"{axis}numel"] // 16) for axis in "xyz" if f"{axis}numel" in sizes]
        self.elements = math.prod(size for name, size in sizes.items() if name.endswith("numel"))
        with np.errstate(all="ignore"):  # lanes that are masked
            self.function[tuple(grid)](*arguments, **blocks)
        launched.append(self)


def backend(graph, inputs):
    """For torch.compile(backend=...)."""
    with (torch._functorch.config.patch(enable_autograd_cache=False),  # it would hand out what the CPU runs
          torch._inductor.config.patch(fx_graph_cache=False)):
        return compile_fx(graph, inputs, inner_compile=compiled)


def compiled(graph, inputs, **settings):
    """Inductor's part: graph, in torch's own operators, as a function of a list of the CPU's tensors."""
    for node in graph.graph.nodes:
        node.meta |= {"val": map_aggregate(node.meta["val"], moved)} if "val" in node.meta else {}
        node.args, node.kwargs = (map_aggregate(a, moved) for a in (node.args, node.kwargs))
    graph.recompile()
    written = []
    with pretended(), mock.patch.object(GraphLowering, "_compile_to_module_lines", lambda _, code: stop(code, written)):
        try:
            compile_fx_inner(graph, [moved(x) for x in inputs], **settings)
        except Exception:
            if not written:
                raise
        module = {}
        exec(written[0], module)
    module |= {"empty_strided_cuda": module["empty_strided_cpu"], "get_raw_stream": lambda device: None}

    def run(arguments: list):
        with pretended():
            return module["call"](arguments)
    run._boxed_call = True
    return run


def stop(code, written: list):
    written.append(code.value)
    raise RuntimeError("written")


def moved(x):
    if isinstance(x, torch.Tensor):
        with x.fake_mode:
            y = torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device=GPU)
            return y.as_strided(x.size(), x.stride(), x.storage_offset())  # which decides about alignment
    return GPU if x == torch.device("cpu") else x


@contextlib.contextmanager
def pretended():
    """A GPU, as far as Inductor asks for one."""
    before = UniformValueConstantFolder._deduce_value

    def on_cpu(self, node):  # constants are computed while compiling
        kwargs, node.kwargs = node.kwargs, {k: torch.device("cpu") if v == GPU else v for k, v in node.kwargs.items()}
        try:
            return before(self, node)
        finally:
            node.kwargs = kwargs

    def kernel(_, name, source, **__):
        return getattr(PyCodeCache.load(source), name)

    def heuristic(**meta):
        return lambda function: Kernel(function, meta)

    driver = types.SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32), get_current_device=lambda: 0)
    answers = {
        torch.cuda: dict(is_available=lambda: True, device_count=lambda: 1, current_device=lambda: 0,
                         get_device_properties=lambda *_: H200, get_device_capability=lambda *_: (9, 0),
                         synchronize=lambda *_: None, set_device=lambda _: None, _lazy_init=lambda: None,
                         get_rng_state=lambda *_: torch.get_rng_state(), set_rng_state=lambda *_: None,
                         _exchange_device=lambda _: 0, _maybe_exchange_device=lambda _: 0,
                         _DeviceGuard=lambda _: contextlib.nullcontext()),
        CudaInterface: dict(get_device_properties=lambda *_: H200, get_compute_capability=lambda *_: 90),
        CudaInterface.Worker: dict(get_device_properties=lambda *_: H200),
        scheduler: dict(has_triton=lambda *_: True),
        triton.runtime.driver: dict(_active=driver),
        fuse_attention: dict(_sfdp_init=lambda *_: None),
        UniformValueConstantFolder: dict(_deduce_value=on_cpu),
        AsyncCompile: dict(triton=kernel),
        triton_helpers: dict(set_driver_to_gpu=lambda: None, libdevice=DEVICE),
        triton_heuristics: dict(pointwise=heuristic, reduction=heuristic, persistent_reduction=heuristic),
    }
    with contextlib.ExitStack() as stack:
        for where, names in answers.items():
            stack.enter_context(mock.patch.multiple(where, **names))
        for cached in (CacheBase.get_system, DeviceProperties.create):  # they will have seen a GPU
            stack.callback(cached.cache_clear)
        yield
