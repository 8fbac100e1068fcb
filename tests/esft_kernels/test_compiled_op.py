"""The custom operator that torch.compile sees: as transparent as expert_mlp itself, and a faithful fake."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode

from esft_kernels import compiled_op as opaque
from esft_kernels.activation import Activation
from esft_kernels.backend import Needs
from esft_kernels.backends import cpu, reference
from esft_kernels.compiled_op import routed_mlp
from esft_kernels.pools import ExpertWeights
from esft_kernels.routing import expert_order, route
from tests.esft_kernels.layers import (
    ACTIVATIONS,
    TOLERANCE,
    Layer,
    assert_close,
    make_layer,
    watch_calls,
    written_out,
)

TENSORS = ("x", "weights", "gate_up", "down", "gate_up_bias", "down_bias")


def leaves(layer: Layer, wanted: tuple[str, ...] = TENSORS):
    """The layer's pools and inputs as leaves, and those of them that are ``wanted`` and so require a gradient."""
    pools = layer.pools
    found = [layer.x_TD.clone(), layer.weights_TK.clone(), *pools.trained.tensors()]
    found = [t if t is None else t.detach().requires_grad_(n in wanted) for n, t in zip(TENSORS, found, strict=True)]
    position = torch.argsort(torch.tensor(expert_order(layer.trained, pools.num_experts)))
    pools = replace(pools, trained=ExpertWeights(*found[2:]))
    return found[0], found[1], pools, position, [t for t in found if t is not None and t.requires_grad]


def settings(layer: Layer, backend: str = "reference", elsewhere: bool = True) -> tuple:
    a = layer.activation
    return a.kind, a.gated, a.slope, a.limit, a.up_offset, layer.interleaved, layer.format, backend, elsewhere


def operands(layer: Layer, keep: str, wanted: tuple[str, ...] = TENSORS, **changes) -> tuple:
    """What the operator is called with."""
    x, weights, pools, position, _ = leaves(layer, wanted)
    *frozen, gate_up_bias, down_bias = pools.frozen.tensors()
    tensors = (*pools.trained.tensors(), frozen, gate_up_bias, down_bias)
    return x, layer.ids_TK, weights, position, None, *tensors, *settings(layer, **changes), keep


def gradients(layer: Layer) -> tuple:
    """Those of x, the routing weights and the trained pool, by the reference."""
    pools, routing, needs = layer.pools, layer.routing, Needs(x=True, weights=True, trained=True)
    _, h = reference.forward(layer.x_TD, layer.weights_TK, pools, routing, routing.num_rows)
    grads = reference.backward(layer.grad_out_TD, layer.x_TD, h, layer.weights_TK, pools, routing, needs)
    return grads.x_TD, grads.weights_TK, *grads.trained.tensors()


def small(**kwargs) -> Layer:
    return make_layer(**{"tokens": 5, "hidden": 8, "intermediate": 6, "dtype": torch.float32, **kwargs})


def pretend_compiling(monkeypatch, compiling: bool) -> None:
    """What ``routed_mlp`` is told of being compiled. The real function is left alone: the compiler looks at it."""
    pretended = SimpleNamespace(**vars(torch))
    pretended.compiler = SimpleNamespace(is_compiling=lambda: compiling)
    monkeypatch.setattr(opaque, "torch", pretended)


@pytest.fixture
def traced(monkeypatch):
    """``routed_mlp`` takes the way that it takes in a compiled graph, without a compiler."""
    pretend_compiling(monkeypatch, True)


@pytest.fixture
def calls(monkeypatch) -> dict[str, list[tuple]]:
    """The arguments that the reference backend's functions were called with."""
    return watch_calls(monkeypatch, reference)


@pytest.mark.parametrize("name", ["relu2", "gelu_tanh"])
def test_every_setting_of_the_activation_reaches_the_operator(name: str, traced):
    layer = small(activation=ACTIVATIONS[name], elsewhere=True)
    x, weights, pools, position, wanted = leaves(layer)
    out = routed_mlp(x, layer.ids_TK, weights, position, pools, "reference", elsewhere=True)
    full, h = reference.forward(layer.x_TD, layer.weights_TK, layer.pools, layer.routing, layer.routing.num_rows)
    assert torch.equal(out, full)
    assert h.shape[1] == layer.activation.width * 6
    assert all(g.shape == t.shape for g, t in zip(torch.autograd.grad(out.sum(), wanted), wanted, strict=True))


ROWS = [
    (("x",), "none", "all"),
    (("weights",), "none", "all"),
    (TENSORS, "none", "all"),
    (TENSORS, "frozen", "prefix"),
    (("x",), "frozen", "prefix"),
    (("weights",), "frozen", "prefix"),
    *((((name,), "none", "prefix")) for name in TENSORS[2:]),
    (("down",), "frozen", "prefix"),
    ((), "none", "none"),
    ((), "frozen", "none"),
]


@pytest.mark.parametrize(("wanted", "recompute", "keep"), ROWS, ids=str)
def test_as_many_rows_of_h_are_kept_as_the_backward_reads(wanted, recompute, keep, traced, calls):
    layer = small(biased=any("bias" in name for name in wanted))
    routing = layer.routing
    x, weights, pools, position, _ = leaves(layer, wanted)
    args = (x, layer.ids_TK, weights, position, pools, "reference", recompute)
    out = routed_mlp(*args)
    assert out.requires_grad == bool(wanted)
    with torch.no_grad():
        assert torch.equal(routed_mlp(*args), out)
    rows = {"all": routing.num_rows, "prefix": routing.prefix_rows(), "none": 0}[keep]
    assert 0 < routing.prefix_rows() < routing.num_rows
    assert [seen[-1] for seen in calls["forward"]] == [rows, 0]


@pytest.mark.parametrize("compiling", [False, True])
def test_all_rows_are_kept_unless_told_otherwise(compiling, monkeypatch, calls):
    pretend_compiling(monkeypatch, compiling)
    layer = small()
    x, weights, pools, position, _ = leaves(layer)
    routed_mlp(x, layer.ids_TK, weights, position, pools, "reference")
    assert calls["forward"][0][-1] == layer.routing.num_rows


@pytest.mark.parametrize("wanted", [TENSORS, *((name,) for name in TENSORS)], ids=str)
@pytest.mark.parametrize("keep", ["all", "prefix"])
def test_every_tensor_gets_its_gradient_whichever_others_do(wanted, keep, calls):
    layer = small(biased=True)
    arguments = operands(layer, keep, wanted)
    out = torch.ops.esft.routed_mlp(*arguments)[0]
    places = [place for place in (0, 2, 5, 6, 7, 8) if arguments[place].requires_grad]
    grads = torch.autograd.grad(out, [arguments[place] for place in places], layer.grad_out_TD)

    (_, _, h, _, _, _, needs), routing = calls["backward"][0], layer.routing
    assert needs == Needs("x" in wanted, "weights" in wanted, any(name in wanted for name in TENSORS[2:]))
    assert len(calls["rebuild"]) == (needs.all_rows and keep == "prefix")
    assert h.shape[0] == (routing.num_rows if needs.all_rows or keep == "all" else routing.prefix_rows())
    expected = dict(zip(TENSORS, gradients(layer), strict=True))
    for name, grad in zip(wanted, grads, strict=True):
        assert torch.equal(grad, expected[name]), name


@pytest.mark.parametrize("keep", ["all", "prefix", "none"])
def test_h_and_the_routing_come_with_the_output(keep):
    layer = small(elsewhere=True)
    routing = layer.routing
    rows = {"all": routing.rows_here(), "prefix": routing.prefix_rows(), "none": 0}[keep]
    assert routing.rows_here() < routing.num_rows
    found = torch.ops.esft.routed_mlp(*operands(layer, keep))
    expected = (
        *reference.forward(layer.x_TD, layer.weights_TK, layer.pools, routing, rows),
        *list(vars(routing).values())[:4],
    )
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine, theirs)


def shifted(tensor: torch.Tensor) -> torch.Tensor:
    """The same values from an address that no vector load can start from."""
    return torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:].view_as(tensor).copy_(tensor)


def transposed(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.mT.contiguous().mT


@pytest.mark.parametrize("moved", [shifted, transposed])
def test_the_backend_gets_contiguous_inputs_at_even_addresses(moved, calls):
    layer = small(dtype=torch.bfloat16)
    x, index, weights, *rest = operands(layer, "all", wanted=())
    x, weights = moved(x).requires_grad_(), moved(weights).requires_grad_()
    out = torch.ops.esft.routed_mlp(x, index, weights, *rest)[0]
    torch.autograd.grad(out, (x, weights), moved(layer.grad_out_TD))
    forward, backward = calls["forward"][0], calls["backward"][0]
    expected = (layer.x_TD, layer.weights_TK, layer.grad_out_TD, layer.x_TD, layer.weights_TK)
    for seen, value in zip((*forward[:2], *backward[:2], backward[3]), expected, strict=True):
        assert seen.is_contiguous() and seen.data_ptr() % 16 == 0 and torch.equal(seen, value)


def test_the_backend_asked_for_computes_forward_and_backward(monkeypatch, calls, traced):
    layer, seen = small(), watch_calls(monkeypatch, cpu)
    x, weights, pools, position, _ = leaves(layer)
    routed_mlp(x, layer.ids_TK, weights, position, pools, "cpu", "frozen").sum().backward()
    assert [len(made) for made in seen.values()] == [1, 1, 1]
    routed_mlp(x, layer.ids_TK, weights, position, pools).sum().backward()
    assert [len(made) for made in seen.values()] == [2, 1, 2]  # the CPU's own, where none is named
    assert not any(calls.values())


@pytest.mark.parametrize("compiling", [False, True])
def test_experts_elsewhere_are_allowed_only_where_they_are_announced(compiling, monkeypatch):
    pretend_compiling(monkeypatch, compiling)
    layer = small(elsewhere=True)
    x, weights, pools, position, _ = leaves(layer)
    out = routed_mlp(x, layer.ids_TK, weights, position, pools, "reference", elsewhere=True)
    expected, _ = reference.forward(layer.x_TD, layer.weights_TK, layer.pools, layer.routing, 0)
    assert torch.equal(out, expected)
    with pytest.raises(ValueError, match=r"top_k_index\[0, 0\] is 6, not an expert in 0..5"):
        routed_mlp(x, layer.ids_TK, weights, position, pools, "reference")


def test_outside_of_a_graph_bad_arguments_are_named():
    layer = small()
    x, weights, pools, position, _ = leaves(layer)
    for message, arguments in {
        "x must have shape": (x[:, 1:], layer.ids_TK, weights, position, pools),
        "backend must be one of .* got 'gpu'": (x, layer.ids_TK, weights, position, pools, "gpu"),
        "recompute must be one of .* got 'some'": (x, layer.ids_TK, weights, position, pools, "cpu", "some"),
    }.items():
        with pytest.raises(ValueError, match=message):
            routed_mlp(*arguments)


ADAPTERS = ((4, 1), (), (1, 3))  # the experts of three; two have the same one


def side_by_side(layer: Layer):
    """Weights of the adapters' experts, and the arguments of ``routed_mlp`` for a batch of all of them and the base."""
    experts, own = len(layer.down_EDF), []
    weights = (layer.gate_up_EGD, layer.down_EDF, layer.gate_up_bias_EG, layer.down_bias_ED)
    position = torch.arange(experts).repeat(1 + len(ADAPTERS), 1) + sum(map(len, ADAPTERS))
    for number, ids in enumerate(ADAPTERS, 1):
        position[number, list(ids)] = torch.arange(len(ids)) + sum(len(o[0]) for o in own)
        own.append([None if t is None else t[list(ids)] + 0.3 * torch.randn_like(t[list(ids)]) for t in weights])
    stacks = (None if parts[0] is None else torch.cat(parts) for parts in zip(*own, strict=True))
    trained = ExpertWeights(*(None if t is None else t.requires_grad_() for t in stacks))
    pools = replace(replace(layer, trained=[]).pools, trained=trained)
    return own, pools, position, torch.randperm(len(layer.ids_TK)) % (1 + len(ADAPTERS))


def alone(layer: Layer, ids: tuple[int, ...], own: list, rows: torch.Tensor) -> Layer:
    """The layer of one adapter, with its own rows of the batch."""
    names, changed = ("gate_up_EGD", "down_EDF", "gate_up_bias_EG", "down_bias_ED"), {}
    for name, weights in zip(names, own, strict=True):
        if weights is not None:
            changed[name] = getattr(layer, name).clone()
            changed[name][list(ids)] = weights.detach()
    batch = {name: getattr(layer, name)[rows] for name in ("x_TD", "grad_out_TD", "ids_TK", "weights_TK")}
    return replace(layer, trained=list(ids), **changed, **batch)


@pytest.mark.parametrize("recompute", ["none", "frozen"])
@pytest.mark.parametrize(
    ("backend", "settings"),
    [
        ("reference", {}), ("reference", {"format": "int8"}), ("cpu", {"biased": True}), ("cpu", {"format": "nf4"}),
        ("cpu_packed", {}), ("triton", {"biased": True}), ("triton", {"format": "int8"}),
    ],
)  # fmt: skip
def test_rows_of_several_adapters_are_those_of_each_alone(backend, settings, recompute):
    layer = make_layer(**{"tokens": 14, "hidden": 24, "intermediate": 16, "dtype": torch.float32, **settings})
    own, pools, position, adapter_T = side_by_side(layer)
    x, weights = layer.x_TD.clone().requires_grad_(), layer.weights_TK.clone().requires_grad_()
    out = routed_mlp(x, layer.ids_TK, weights, position, pools, backend, recompute, adapter_T=adapter_T)
    wanted = [x, weights, *(t for t in pools.trained.tensors() if t is not None)]
    found = [out, *torch.autograd.grad(out, wanted, layer.grad_out_TD)]
    first = 0
    for number, ids in enumerate(((), *ADAPTERS)):
        rows = adapter_T == number
        mine = own[number - 1] if number else [None] * 4
        one = written_out(alone(layer, ids, mine, rows)).to(torch.float64)
        _, h = reference.forward(one.x_TD, one.weights_TK, one.pools, one.routing, one.routing.num_rows)
        full, _ = reference.forward(one.x_TD, one.weights_TK, one.pools, one.routing, 0)
        needs = Needs(x=True, weights=True, trained=True)
        grads = reference.backward(one.grad_out_TD, one.x_TD, h, one.weights_TK, one.pools, one.routing, needs)
        for mixed, expected in zip(found[:3], (full, grads.x_TD, grads.weights_TK), strict=True):
            assert_close(mixed[rows], expected, TOLERANCE[torch.float32])
        own_grads = [g for g in grads.trained.tensors() if g is not None]
        for mixed, expected in zip(found[3:], own_grads, strict=True):
            assert_close(mixed[first : first + len(ids)], expected, TOLERANCE[torch.float32])
        first += len(ids)
    assert all(g.shape[0] == first for g in found[3:])


def test_adapters_are_one_more_argument_of_the_traced_operator(traced):
    layer = small(tokens=9)
    _, pools, position, adapter_T = side_by_side(layer)
    arguments = (layer.x_TD, layer.ids_TK, layer.weights_TK, position, pools, "reference")
    out = routed_mlp(*arguments, adapter_T=adapter_T)
    routing = route(layer.ids_TK, position, pools.num_trained, False, pools.num_experts, adapter_T)
    expected, _ = reference.forward(layer.x_TD, layer.weights_TK, pools, routing, 0)
    assert torch.equal(out, expected)
    (grad,) = torch.autograd.grad(out.sum(), pools.trained.down_EDF)
    assert grad.shape == (4, 8, 6) and grad.count_nonzero()
    *frozen, gate_up_bias, down_bias = pools.frozen.tensors()
    tensors = (*pools.trained.tensors(), frozen, gate_up_bias, down_bias)
    choice = (layer.x_TD, layer.ids_TK, layer.weights_TK, position, adapter_T)
    fake = ("test_schema", "test_autograd_registration", "test_faketensor")
    operator = torch.ops.esft.routed_mlp.default
    torch.library.opcheck(operator, (*choice, *tensors, *settings(layer), "all"), test_utils=fake)


def test_no_gradients_of_what_is_only_kept_are_made():
    """The kept H is an output as well, as large as the rest of the layer together; its gradient is never looked at."""

    class Zeros(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if "zeros" in func.name():
                made.append(out.shape)
            return out

    layer, made = small(), []
    out, h, *_ = torch.ops.esft.routed_mlp(*operands(layer, "all", backend="reference"))
    with Zeros():
        torch.autograd.backward(out, layer.grad_out_TD)
    # H's gradient is one of the backend's own buffers, of uninitialised memory.
    assert h.shape == (15, 12) and h.shape not in made


@pytest.mark.parametrize("recompute", ["none", "frozen"])
@pytest.mark.parametrize(
    "layout",
    [{}, {"transposed": True, "biased": True, "interleaved": True}, {"format": "nf4_double"}, {"format": "mxfp4"}],
    ids=["", "gpt-oss", "nf4", "mxfp4"],
)
def test_compiled_output_and_gradients_are_the_eager_ones(layout: dict, recompute: str, calls):
    layer = make_layer(activation=ACTIVATIONS["gpt-oss"], dtype=torch.float32, **layout)
    outcomes = []
    for compiled in (False, True):
        torch._dynamo.reset()
        x, weights, pools, position, wanted = leaves(layer)

        def run(x, weights, pools=pools, position=position):
            return routed_mlp(x, layer.ids_TK, weights, position, pools, "reference", recompute)

        out = (torch.compile(run, backend="aot_eager", fullgraph=True) if compiled else run)(x, weights)
        outcomes.append([out, *torch.autograd.grad(out, wanted, layer.grad_out_TD)])
    for eager, compiled in zip(*outcomes, strict=True):
        assert_close(compiled, eager, 0.0)
    # A graph is compiled for the strides that the fake promised.
    assert [g.stride() for g in outcomes[1][1:]] == [t.stride() for t in wanted]
    rows = layer.routing.prefix_rows() if recompute == "frozen" else layer.routing.num_rows
    assert [args[-1] for args in calls["forward"]] == [rows, rows]
    assert len(calls["rebuild"]) == (2 if recompute == "frozen" else 0)


LAYOUTS = {
    "plain": {},
    "as in gpt-oss": {"transposed": True, "biased": True, "interleaved": True, "activation": ACTIVATIONS["gpt-oss"]},
    "without a gate": {"activation": Activation("relu2", gated=False)},
    "no token": {"tokens": 0},
    "quantized": {"format": "int8", "biased": True},
}


@pytest.mark.parametrize("needs", [(True, True, True), (False, False, True), (True, False, False)])
@pytest.mark.parametrize("keep", ["all", "prefix", "none"])
def test_schema_autograd_and_fake_agree_with_what_it_does(needs: tuple[bool, bool, bool], keep: str):
    wanted = ("x",) * needs[0] + ("weights",) * needs[1] + TENSORS[2:] * needs[2]
    if keep == "none":  # then there is no backward
        wanted = ()
    torch.library.opcheck(
        torch.ops.esft.routed_mlp.default,
        operands(small(), keep, wanted),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


@pytest.mark.parametrize("moved", [torch.Tensor.contiguous, transposed])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("keep", ["all", "prefix"])
def test_the_fake_knows_shapes_strides_and_dtypes(layout: dict, keep: str, moved):
    x, index, weights, *rest = operands(small(**layout, dtype=torch.bfloat16), keep, wanted=())
    x, weights = moved(x), moved(weights)
    fake = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.esft.routed_mlp.default, (x, index, weights, *rest), test_utils=fake)
    out, h, *routing = torch.ops.esft.routed_mlp(x, index, weights, *rest)
    grad = moved(torch.randn_like(out))
    for needs in ([True, True, True], [True, False, False], [False, True, False], [False, False, True]):
        arguments = (grad, x, weights, h, *routing, *rest[2:-1], needs)
        torch.library.opcheck(torch.ops.esft.routed_mlp_backward.default, arguments, test_utils=fake)
        grads = torch.ops.esft.routed_mlp_backward(*arguments)
        inputs, wanted = (x, weights, *rest[2:6]), (needs[0], needs[1], *[needs[2]] * 4)
        shapes = [t.shape if t is not None and want else (0,) for t, want in zip(inputs, wanted, strict=True)]
        assert [g.shape for g in grads] == shapes
        assert [g.dtype for g, t in zip(grads, inputs, strict=True) if g.numel() and t.dtype != g.dtype] == []


@pytest.mark.parametrize(
    ("keep", "elsewhere", "rows"),
    [("all", False, 15), ("all", True, None), ("prefix", False, None), ("none", False, 0), ("none", True, 0)],
)
def test_only_the_length_of_a_part_of_the_rows_is_unknown_to_the_compiler(keep, elsewhere, rows):
    x, index, *rest = operands(small(), keep)
    rest[-2] = elsewhere
    mode = FakeTensorMode(shape_env=ShapeEnv(), static_shapes=True)
    fakes = torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, (x, index.int(), *rest))
    with mode:
        _, h, *routing = torch.ops.esft.routed_mlp(*fakes)
    assert isinstance(h.shape[0], torch.SymInt if rows is None else int)
    assert rows is None or h.shape == (rows, 12)
    assert [t.dtype for t in routing] == [torch.int64] * 4  # whatever the router's own are
