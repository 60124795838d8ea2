"""Neurons and networks under what PyTorch offers a module: other types, torch.func, tracing, export."""

import copy
import pickle

import pytest
import torch

import staa
from staa import fused
from staa.attention import STAALIF
from staa.networks import NEURONS

SETTINGS = [dict(), dict(gc=False), dict(pe=False), dict(sa=False), dict(pe_place="both"), dict(gc=False, sa=False)]


def shaken(module):
    """All parameters away from their start, where half of them have no effect."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return module


@pytest.fixture(params=[True, False], ids=["fast", "reference"])
def fast(request, monkeypatch):
    monkeypatch.setattr(fused, "enabled", request.param)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("settings", SETTINGS)
def test_weights_of_low_precision_are_float32_weights_that_were_rounded(dtype, settings, fast):
    neuron = shaken(STAALIF(8, 3, beta=0.0, **settings)).to(dtype)
    rounded = STAALIF(8, 3, beta=0.0, **settings)
    rounded.load_state_dict(neuron.state_dict())
    x = (2 * torch.randn(3, 2, 8, 4, 4)).to(dtype)
    spikes, expected = neuron(x), rounded(x)
    assert spikes.dtype == dtype and torch.equal(spikes, expected) and spikes.any()
    cotangent = torch.randn(x.shape).to(dtype)
    spikes.backward(cotangent)
    expected.backward(cotangent)
    for (name, p), q in zip(neuron.named_parameters(), rounded.parameters()):
        if q.grad is not None and name != "gc.key.bias":  # which cancels in the softmax
            assert p.grad.dtype == dtype
            few_roundings = 4 * torch.finfo(dtype).eps * q.grad.abs().max().item()  # the reference adds T gradients
            torch.testing.assert_close(p.grad.float(), q.grad, rtol=0, atol=few_roundings, msg=name)


@pytest.mark.parametrize("neuron", sorted(NEURONS))
def test_a_whole_network_of_low_precision_trains(neuron):
    network = shaken(staa.build("vgg13", neuron=neuron, num_classes=10, T=2, width=1 / 16)).bfloat16().train()
    logits = network(torch.rand(4, 3, 32, 32).bfloat16())
    logits.square().sum().backward()
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    assert logits.dtype == torch.bfloat16 and all(g.dtype == torch.bfloat16 and g.isfinite().all() for g in gradients)
    assert sum(bool(g.any()) for g in gradients) > len(gradients) / 2


@pytest.mark.parametrize("name", sorted(NEURONS))
def test_gradients_per_sample_are_those_of_one_sample_at_a_time(name):
    neuron = shaken(NEURONS[name](8, T=3)).eval()
    readout = torch.nn.Parameter(torch.ones(()))  # the plain neurons have no parameters of their own
    x, cotangent = 2 * torch.randn(5, 3, 8, 4, 4), torch.randn(3, 1, 8, 4, 4)

    def loss(parameters, x_b):
        own = {n: p for n, p in parameters.items() if n != "scale"}
        return (torch.func.functional_call(neuron, own, (parameters["scale"] * x_b[:, None],)) * cotangent).sum()

    parameters = {"scale": readout} | dict(neuron.named_parameters())
    detached = {n: p.detach() for n, p in parameters.items()}
    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(detached, x)
    for b, x_b in enumerate(x):
        gradients = torch.autograd.grad(loss(parameters, x_b), list(parameters.values()), allow_unused=True)
        assert gradients[0] != 0
        for n, expected in zip(parameters, gradients):
            if expected is not None:
                torch.testing.assert_close(per_sample[n][b], expected, rtol=1e-4, atol=1e-4, msg=n)


def test_parameters_that_are_handed_in_count(fast):
    """As meta-learning does it: plain tensors in the parameters' place."""
    neuron, other = STAALIF(8, 3).eval(), shaken(STAALIF(8, 3)).eval()
    x = 2 * torch.randn(3, 2, 8, 4, 4)
    handed_in = {n: p.detach() for n, p in other.named_parameters()}
    spikes = torch.func.functional_call(neuron, handed_in, (x,))
    assert torch.equal(spikes, other(x)) and not torch.equal(spikes, neuron(x))


@pytest.mark.parametrize("settings", SETTINGS + [dict(pe_kind="fixed", pe_place="output")])
def test_plain_tensors_in_the_parameters_place_count(settings, fast):
    """As DataParallel and FSDP do it: attributes, which are no parameters of the module."""
    neuron, x = shaken(STAALIF(8, 3, **settings)).eval(), 2 * torch.randn(3, 2, 8, 4, 4)
    expected, own = neuron(x), dict(neuron.named_parameters())
    for name, p in own.items():
        place, _, last = name.rpartition(".")
        module = neuron.get_submodule(place)
        delattr(module, last)
        setattr(module, last, p * 1)
    spikes = neuron(x)
    assert torch.equal(spikes, expected) and spikes.any() and not dict(neuron.named_parameters())
    spikes.sum().backward()
    assert all(p.grad is not None for p in own.values())


def test_a_block_in_two_places_counts_in_both(fast):
    neuron, x = shaken(STAALIF(8, 3, pe_place="both")).eval(), 2 * torch.randn(3, 2, 8, 4, 4)
    apart, neuron.pe_membrane = neuron(x), neuron.pe_input
    two = STAALIF(8, 3, pe_place="both").eval()
    two.load_state_dict(neuron.state_dict())
    assert torch.equal(neuron(x), two(x)) and not torch.equal(two(x), apart)


def test_a_block_whose_forward_is_replaced_counts(fast):
    neuron, x = shaken(STAALIF(8, 3)).eval(), 2 * torch.randn(3, 2, 8, 4, 4)
    without, before = copy.deepcopy(neuron), neuron(x)
    without.gc = torch.nn.Identity()
    neuron.gc.forward = lambda x: x
    assert torch.equal(neuron(x), without(x)) and not torch.equal(neuron(x), before)


@pytest.mark.parametrize("order", ["children first", "parents first"])
@pytest.mark.parametrize("make", [lambda: STAALIF(8, 3), lambda: STAALIF(8, 3, pe_kind="fixed", pe_place="both"),
                                  lambda: NEURONS["fsta"](8, 3), lambda: NEURONS["fsta"](8, 3, spatial=False)])
def test_parameters_can_be_reset(make, order):
    """After `to_empty`, as large models are built, and as anybody starts anew."""
    neuron, fresh = make().to_empty(device="cpu"), make()
    for tensor in (*neuron.parameters(), *neuron.buffers()):
        tensor.data.fill_(torch.nan)
    torch.manual_seed(5)
    modules = list(neuron.modules())
    for module in modules if order == "parents first" else modules[::-1]:
        getattr(module, "reset_parameters", lambda: None)()
    named = {**dict(neuron.named_parameters()), **dict(neuron.named_buffers())}
    for name, tensor in (*fresh.named_parameters(), *fresh.named_buffers()):
        assert named[name].isfinite().all(), name
        number = tensor.dim() == 0 or tensor.numel() > 1 and tensor.unique().numel() == 1
        if number or name in dict(fresh.named_buffers()):  # what does not start at random
            assert torch.equal(named[name], tensor), name


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("neuron", sorted(NEURONS))
def test_what_was_traced_can_be_saved_and_trained(neuron, tmp_path):
    network = shaken(staa.build("vgg13", neuron=neuron, T=2, width=1 / 16)).eval()
    layer = shaken(NEURONS[neuron](8, T=3)).double().eval()
    for module, shape in (network, (2, 2, 3, 32, 32)), (layer, (2, 3, 2, 8, 5, 5)):
        x, other = 2 * torch.rand(shape, dtype=next(module.parameters(), torch.zeros((), dtype=torch.float64)).dtype)
        torch.jit.trace(module, x).save(tmp_path / "traced.pt")
        again = torch.jit.load(tmp_path / "traced.pt")
        assert torch.equal(again(other), module(other)) and other.any()
    gradients = []
    for module in (layer, again):
        current = other.clone().requires_grad_()
        module(current).cumsum(0).square().sum().backward()
        gradients.append([current.grad, *(p.grad for p in module.parameters())])
    for ours, traced in zip(*gradients, strict=True):
        torch.testing.assert_close(traced, ours)
    assert gradients[0][0].any()


@pytest.mark.parametrize("name", sorted(NEURONS))
def test_a_neuron_in_another_default_type_or_on_another_default_device(name, fast):
    x = 2 * torch.randn(3, 2, 8, 4, 4, dtype=torch.float64)
    torch.set_default_dtype(torch.float64)
    try:
        assert NEURONS[name](8, T=3)(x).dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        settings = {"beta": 0.5} if name == "staa" else {}
        assert NEURONS[name](8, T=3, **settings)(torch.empty(3, 2, 8, 4, 4)).shape == x.shape


def test_a_reset_potential_can_be_learned():
    class Learned(staa.LIF):
        def __init__(self):
            super().__init__(v_reset=-0.4)
            self.v_reset = torch.nn.Parameter(torch.tensor(-0.4))

    learned, x = Learned(), 2 * torch.randn(3, 2, 8)
    spikes = learned(x)
    assert torch.equal(spikes, staa.LIF(v_reset=-0.4)(x))
    spikes.sum().backward()
    assert learned.v_reset.grad != 0


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("neuron", sorted(NEURONS))
def test_traced_and_exported_networks_give_the_same_logits(neuron):
    network = shaken(staa.build("resnet20", neuron=neuron, num_classes=10, T=2, width=1 / 16)).eval()
    x, other = torch.rand(2, 3, 3, 16, 16)
    logits = network(other)
    assert logits.std() > 0
    torch.testing.assert_close(torch.jit.trace(network, x)(other), logits)
    exported = torch.export.export(network, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},)).module()
    torch.testing.assert_close(exported(other), logits)
    torch.testing.assert_close(exported(torch.cat([other, other])), torch.cat([logits, logits]))


def test_a_network_in_training_is_exported_for_any_batch():
    """Without bounds: no layer asks how large a batch is."""
    network = staa.build("resnet20", "lif", T=2, width=1 / 16).train()
    exported = torch.export.export(network, (torch.rand(2, 3, 16, 16),),
                                   dynamic_shapes=({0: torch.export.Dim("batch", min=2)},)).module()
    x, other = torch.rand(5, 3, 16, 16), copy.deepcopy(network)
    torch.testing.assert_close(exported(x), other(x))


@pytest.mark.parametrize("neuron", [staa.LIF(), STAALIF(8, 3, beta=0.0), STAALIF(8, 3, sa=False, beta=0.0)])
def test_a_second_derivative_is_right_or_refused(neuron, monkeypatch):
    x = (2 * torch.randn(3, 2, 8, 4, 4)).requires_grad_()

    def twice():
        rate = neuron(x).mean(0)
        (first,) = torch.autograd.grad(rate.square().sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    with pytest.raises(RuntimeError, match="second derivatives need the reference: set staa.fused.enabled = False"):
        twice()
    monkeypatch.setattr(fused, "enabled", False)
    assert twice().abs().sum() > 0


@pytest.mark.parametrize("name", ["staa", "fsta"])
def test_after_a_linear_layer_there_is_one_place(name, fast):
    neuron, x = shaken(NEURONS[name](8, T=3)).eval(), 2 * torch.randn(3, 5, 8)
    assert torch.equal(neuron(x), neuron(x[..., None, None])[..., 0, 0]) and neuron(x).any()
    with pytest.raises(ValueError, match=r"takes \(T=3, B, C.*\) or \(T=3, B, C.*\), got \(3, 5, 8, 1\)"):
        neuron(x[..., None])


def test_per_sample_gradients_in_training_drop_steps_per_sample():
    neuron, x = shaken(STAALIF(8, 3, beta=0.5)).train(), 2 * torch.randn(3, 8, 4, 4).expand(20, -1, -1, -1, -1)
    rates = torch.func.vmap(lambda x: neuron(x[:, None]).mean(), randomness="different")(x)
    assert len(rates.unique()) > 2, "the same sample meets other draws"
    assert len(torch.func.vmap(lambda x: neuron(x[:, None]).mean(), randomness="same")(x).unique()) == 1


def test_a_fake_tensor_leaves_nothing_behind(monkeypatch):
    """As a memory estimator brings it: what is cached of it would meet the real ones."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    monkeypatch.setattr(fused, "WORTH_COMPILING", 0)
    neuron = staa.LIF(decay=0.123)
    with FakeTensorMode():
        assert neuron(torch.ones(3, 2, 4)).shape == (3, 2, 4)
    assert type(fused.constants(neuron.numbers(), torch.float32, torch.device("cpu"))) is torch.Tensor


def test_a_network_of_somebodys_local_neuron_can_be_pickled():
    network = staa.build("vgg13", lambda channels, T: torch.nn.ReLU(), width=1 / 16).eval()
    x = torch.rand(1, 3, 32, 32)
    assert torch.equal(pickle.loads(pickle.dumps(network))(x), network(x))


def test_there_is_room_for_many_time_steps_among_what_is_compiled(monkeypatch):
    """Each T is compiled for by itself, and beyond torch's limit of eight a function runs as slowly as it stands."""
    if fused.compiler("cpu"):
        monkeypatch.setattr(fused, "WORTH_COMPILING", 0)
        staa.LIF()(torch.randn(2, 3, 4, requires_grad=True))  # the first current in this process, or a later one
        assert torch._dynamo.config.recompile_limit >= 64


def test_a_network_built_without_memory_and_given_its_weights_is_the_same(fast):
    """The DCT and fixed PE are no parameters, and not in the state: there they are memory that nobody has set."""
    x = torch.rand(2, 3, 32, 32)
    for neuron, settings in [*((name, {}) for name in sorted(NEURONS)), ("staa", {"pe_kind": "fixed"})]:
        network = shaken(staa.build("vgg13", neuron=neuron, T=2, width=1 / 16, **settings)).eval()
        for assign in (True, False):
            with torch.device("meta"):
                again = staa.build("vgg13", neuron=neuron, T=2, width=1 / 16, **settings).eval()
            if not assign:
                again.to_empty(device="cpu")
            again.load_state_dict(network.state_dict(), assign=assign)
            assert torch.equal(again(x), network(x)) and network(x).std() > 0
        with torch.device("meta"):  # where loading happens to take place does not matter
            again.load_state_dict(network.state_dict())
        assert torch.equal(again(x), network(x))


@pytest.mark.parametrize("make", [lambda: STAALIF(8, 3, pe_kind="fixed"), lambda: staa.FSTALIF(8, 3)])
def test_what_is_computed_goes_where_the_parameters_are_put(make):
    """Another device than the CPU and "meta" there is not everywhere, so `to_empty` is asked which."""
    with torch.device("meta"):
        neuron = make()
    class Elsewhere(torch.nn.Parameter):
        device = "elsewhere"
    computed = [m for m in neuron.modules() if isinstance(m, staa.neuron.Computed) and list(m.buffers(recurse=False))]
    asked = []
    computed[0].to_empty = lambda device: asked.append(device)
    staa.LIF._load_from_state_dict(neuron, {"a.b": Elsewhere(torch.ones(1))}, "a.", {"assign_to_params_buffers": True}, False, [], [], [])
    assert len(computed) == 1 and asked == ["elsewhere"]


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_what_was_traced_in_training_still_drops_steps_at_random():
    neuron, x = shaken(STAALIF(8, 3, beta=0.5)), 2 * torch.randn(3, 2, 8, 4, 4)
    for seed in range(6):
        torch.manual_seed(seed)
        traced = torch.jit.trace(neuron, x, check_trace=False)
        assert len({traced(x).sum().item() for _ in range(20)}) > 2


@pytest.mark.parametrize("place", ["membrane", "output", "both"])
def test_an_encoding_is_called_wherever_it_is_added(place, fast):
    """So that hooks, pruning and another module in its place count."""
    neuron, x = shaken(STAALIF(8, 3, beta=0.0, pe_place=place)), 2 * torch.randn(3, 2, 8, 4, 4)
    plain, called = neuron(x), []
    for name in ("pe_input", "pe_membrane", "pe_output"):
        if getattr(neuron, name) is not None:
            getattr(neuron, name).register_forward_hook(lambda *_, name=name: called.append(name))
    assert torch.equal(neuron(x), plain)
    assert called == {"membrane": ["pe_membrane"], "output": ["pe_output"], "both": ["pe_membrane", "pe_input"]}[place]
    last = called[0]
    setattr(neuron, last, torch.nn.Identity())
    without = shaken(STAALIF(8, 3, beta=0.0, pe_place=place))
    without.load_state_dict(neuron.state_dict(), strict=False)
    torch.nn.init.zeros_(getattr(without, last).weight)
    assert torch.equal(neuron(x), without(x)) and not torch.equal(without(x), plain)


@pytest.mark.parametrize("name", sorted(NEURONS))
def test_make_fx_traces_a_neuron_with_its_parameters(name):
    from torch.fx.experimental.proxy_tensor import make_fx

    neuron, x = shaken(NEURONS[name](8, T=3)).eval(), 2 * torch.randn(3, 2, 8, 4, 4)

    def gradient(parameters, x):
        x = x.detach().requires_grad_()
        return torch.autograd.grad(torch.func.functional_call(neuron, parameters, (x,)).cumsum(0).square().sum(), x)[0]
    parameters = dict(neuron.named_parameters())
    torch.testing.assert_close(make_fx(gradient)(parameters, x)(parameters, x), gradient(parameters, x))
    assert gradient(parameters, x).any()


@pytest.mark.parametrize("kind, name", [*((STAALIF, name) for name in ("gc", "pe", "sa")),
                                        *((staa.fsta.FSTALIF, name) for name in ("temporal", "spatial"))])
def test_a_switch_that_is_text_is_refused(kind, name):
    with pytest.raises(TypeError, match=f"^{name} must be True or False, got 'no'$"):
        kind(8, 3, **{name: "no"})
