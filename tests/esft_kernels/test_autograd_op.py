"""What the differentiable op promises whatever computes it: what it keeps, hands on and refuses.

That every backend's numbers are right is in ``test_autograd_op_backends``.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from esft_kernels import autograd_op
from esft_kernels.activation import Activation
from esft_kernels.autograd_op import RECOMPUTE, aligned, expert_mlp
from esft_kernels.backend import Needs
from esft_kernels.backends import reference
from esft_kernels.backends.resolve import resolve_backend
from esft_kernels.formats.resolve import FORMATS
from esft_kernels.pools import ExpertPools, ExpertWeights, QuantizedWeights, pools_of
from esft_kernels.routing import Routing
from tests.esft_kernels.layers import TOLERANCE, Layer, assert_close, make_layer, watch_calls

EVERYTHING = Needs(x=True, weights=True, trained=True)
NEEDS = {
    "x": Needs(x=True, weights=False, trained=False),
    "weights": Needs(x=False, weights=True, trained=False),
    "trained": Needs(x=False, weights=False, trained=True),
    "weights and trained": Needs(x=False, weights=True, trained=True),
}
TENSORS = ("gate_up_EGD", "down_EDF", "gate_up_bias_EG", "down_bias_ED")
CPU, META = torch.device("cpu"), torch.device("meta")


def run(
    layer: Layer, backend: str, needs: Needs, recompute: str = "none", pools: ExpertPools | None = None
) -> list[Tensor | None]:
    """Output, and the gradients of x, routing weights and the trained pool's tensors; None where not needed."""
    pools = pools or layer.pools
    x, weights = layer.x_TD.clone().requires_grad_(needs.x), layer.weights_TK.clone().requires_grad_(needs.weights)
    trained = [None if t is None else t.detach().requires_grad_(needs.trained) for t in pools.trained.tensors()]
    pools = replace(pools, trained=ExpertWeights(*trained))  # pyright: ignore[reportArgumentType]
    given = [x, weights, layer.grad_out_TD, *trained, *pools.frozen.tensors()]
    before = [None if t is None else t.detach().clone() for t in given]
    out = expert_mlp(x, weights, pools, layer.routing, backend, recompute)
    out.backward(layer.grad_out_TD)
    assert all(
        a is None or torch.equal(a, b) for a, b in zip(given, before, strict=True)
    )  # nothing given is written to
    return [out.detach(), x.grad, weights.grad, *(None if t is None else t.grad for t in trained)]


def exact(layer: Layer, needs: Needs) -> list[Tensor | None]:
    layer = layer.to(torch.float64)
    pools, routing = layer.pools, layer.routing
    out, h = reference.forward(layer.x_TD, layer.weights_TK, pools, routing, routing.num_rows)
    grads = reference.backward(layer.grad_out_TD, layer.x_TD, h, layer.weights_TK, pools, routing, needs)
    trained = (None,) * 4 if grads.trained is None else grads.trained.tensors()
    return [out, grads.x_TD, grads.weights_TK, *trained]


def small(**kwargs) -> Layer:
    return make_layer(**{"tokens": 5, "hidden": 8, "intermediate": 6, "dtype": torch.float32, **kwargs})


@pytest.fixture
def calls(monkeypatch) -> dict[str, list[tuple]]:
    return watch_calls(monkeypatch, reference)


def test_without_a_backend_named_it_is_that_of_the_device(monkeypatch, calls):
    seen = watch_calls(monkeypatch, resolve_backend("cpu", CPU))
    layer = small()
    expert_mlp(layer.x_TD, layer.weights_TK, layer.pools, layer.routing)
    assert len(seen["forward"]) == 1 and not calls["forward"]


def with_leaves(layer: Layer, wanted: tuple[str, ...]) -> tuple[dict[str, Tensor], ExpertPools]:
    """x, the routing weights and the trained pool's tensors, those ``wanted`` as leaves; and pools of these."""
    found = {"x": layer.x_TD, "weights": layer.weights_TK}
    found |= {name: t for name in TENSORS if (t := getattr(layer.pools.trained, name)) is not None}
    found = {name: t.clone().requires_grad_(name in wanted) for name, t in found.items()}
    return found, replace(layer.pools, trained=ExpertWeights(*(found.get(name) for name in TENSORS)))


ALL = ("x", "weights", *TENSORS)
ROWS = [
    *(((name,), "none", "all") for name in ("x", "weights")),
    *(((name,), "frozen", "prefix") for name in ("x", "weights")),
    *(((name,), recompute, "prefix") for name in TENSORS for recompute in RECOMPUTE),
    (ALL, "none", "all"),
    (ALL, "frozen", "prefix"),
    ((), "none", "none"),
    ((), "frozen", "none"),
]


@pytest.mark.parametrize(("wanted", "recompute", "keep"), ROWS, ids=str)
def test_as_many_rows_of_h_are_kept_as_the_backward_reads(wanted, recompute, keep, calls):
    layer = small(biased=any("bias" in name for name in wanted))
    routing = layer.routing
    rows = {"all": routing.num_rows, "prefix": routing.prefix_rows(), "none": 0}[keep]
    assert 0 < routing.prefix_rows() < routing.num_rows
    leaves, pools = with_leaves(layer, wanted)
    args = leaves["x"], leaves["weights"], pools, routing, "reference", recompute
    with torch.no_grad():
        assert not expert_mlp(*args).requires_grad
    out = expert_mlp(*args)
    assert out.requires_grad == bool(wanted)
    assert [seen[-1] for seen in calls["forward"]] == [0, rows]
    if not wanted:
        return
    grads = torch.autograd.grad(out, [leaves[name] for name in wanted], layer.grad_out_TD)
    needs = Needs("x" in wanted, "weights" in wanted, any(name in wanted for name in TENSORS))
    assert calls["backward"][0][-1] == needs
    assert len(calls["rebuild"]) == (needs.all_rows and keep == "prefix")
    expected = dict(zip(ALL, exact(layer, EVERYTHING)[1:], strict=True))
    for name, grad in zip(wanted, grads, strict=True):
        assert_close(grad, expected[name], TOLERANCE[torch.float32])


def test_all_rows_are_kept_unless_told_otherwise(calls):
    layer = small()
    expert_mlp(layer.x_TD.requires_grad_(), layer.weights_TK, layer.pools, layer.routing, "reference")
    assert calls["forward"][0][-1] == layer.routing.num_rows


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_x_and_h_and_the_routing_are_saved_and_nothing_else(recompute):
    layer = small(biased=True)
    routing, (leaves, pools) = layer.routing, with_leaves(layer, ALL)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        expert_mlp(leaves["x"], leaves["weights"], pools, routing, "reference", recompute)
    rows = routing.num_rows if recompute == "none" else routing.prefix_rows()
    _, h = reference.forward(layer.x_TD, layer.weights_TK, layer.pools, routing, rows)
    known = (*leaves.values(), *pools.frozen.tensors(), *(v for v in vars(routing).values() if isinstance(v, Tensor)))
    addresses = {t.data_ptr() for t in known if t is not None}
    (other,) = (t for t in saved if t.data_ptr() not in addresses)
    assert torch.equal(other, h) and other.untyped_storage().nbytes() == 4 * h.numel()


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
def test_of_rows_whose_experts_are_elsewhere_nothing_is_saved(backend):
    layer = small(biased=True, elsewhere=True)
    routing, (leaves, pools) = layer.routing, with_leaves(layer, ALL)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        expert_mlp(leaves["x"], leaves["weights"], pools, routing, backend)
    assert routing.rows_here() < routing.num_rows
    assert sum(t.shape == (routing.rows_here(), 12) for t in saved) == 1


def test_of_rows_whose_experts_are_elsewhere_nothing_is_made_again(calls):
    layer = small(elsewhere=True)
    leaves, pools = with_leaves(layer, ("x",))
    out = expert_mlp(leaves["x"], layer.weights_TK, pools, layer.routing, "reference")
    out.backward(layer.grad_out_TD)
    assert len(calls["backward"]) == 1 and not calls["rebuild"]


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("wanted", [("x", "weights"), ()])
def test_an_empty_trained_pool_that_requires_gradients_takes_part_in_the_backward(backend, wanted):
    layer = small(biased=True, trained=(), elsewhere=True)
    (leaves, pools), expected = with_leaves(layer, wanted), None
    if wanted:
        expert_mlp(leaves["x"], leaves["weights"], pools, layer.routing, backend).sum().backward()
        expected = leaves["x"].grad.clone()
        leaves["x"].grad = None
    for tensor in (empty := pools.trained.tensors()):
        assert tensor is not None and not tensor.numel()
        tensor.requires_grad_()
    out = expert_mlp(leaves["x"], leaves["weights"], pools, layer.routing, backend)
    out.sum().backward()
    assert all(t is not None and t.grad is not None and t.grad.shape == t.shape for t in empty)
    assert expected is None or torch.equal(leaves["x"].grad, expected)


def shifted(tensor: Tensor) -> Tensor:
    """The same values one element off, at an address that no vector load can start from."""
    moved = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)[1:].view(tensor.shape)
    return moved.copy_(tensor)


def transposed(tensor: Tensor) -> Tensor:
    return tensor.mT.contiguous().mT


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("moved", [shifted, transposed])
def test_the_backend_gets_contiguous_tensors_at_even_addresses(moved, dtype, calls):
    layer = small(dtype=dtype)
    x, weights = moved(layer.x_TD).requires_grad_(), moved(layer.weights_TK).requires_grad_()
    assert x.data_ptr() % 16 or not x.is_contiguous()
    out = expert_mlp(x, weights, layer.pools, layer.routing, "reference")
    torch.autograd.grad(out, (x, weights), moved(layer.grad_out_TD))
    forward, backward = calls["forward"][0], calls["backward"][0]
    expected = (layer.x_TD, layer.weights_TK, layer.grad_out_TD, layer.x_TD, layer.weights_TK)
    for seen, value in zip((*forward[:2], *backward[:2], backward[3]), expected, strict=True):
        assert seen.is_contiguous() and seen.data_ptr() % 16 == 0 and torch.equal(seen, value)


def test_what_is_aligned_is_not_copied():
    tensor = torch.randn(4, 8)
    assert aligned(tensor) is tensor
    assert aligned(tensor[1:]).data_ptr() == tensor[1:].data_ptr()  # 32 bytes on
    assert aligned(tensor.view(-1)[2:]).data_ptr() != tensor.view(-1)[2:].data_ptr()  # 8 bytes on


@pytest.mark.parametrize("backend", ["reference", "cpu", "cpu_packed", "triton"])
def test_the_gradient_of_a_sum_which_has_no_strides_is_read_right(backend):
    if backend == "triton":
        pytest.importorskip("triton")
    layer = small(tokens=3, top_k=2, experts=3, trained=(1,))
    leaves, pools = with_leaves(layer, ALL)
    out = expert_mlp(leaves["x"], leaves["weights"], pools, layer.routing, backend)
    grads = torch.autograd.grad(out.sum(), leaves.values())
    _, *expected = exact(replace(layer, grad_out_TD=torch.ones_like(layer.x_TD)), EVERYTHING)
    for grad, value in zip(grads, expected, strict=False):  # no biases
        assert_close(grad, value, TOLERANCE[torch.float32])


def test_it_is_differentiable_once():
    layer = small()
    x, grad_out = layer.x_TD.requires_grad_(), layer.grad_out_TD.requires_grad_()
    out = expert_mlp(x, layer.weights_TK, layer.pools, layer.routing, "reference")
    (grad,) = torch.autograd.grad(out, x, grad_out, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_of_a_quantized_pool_its_own_tensors_are_saved(format, recompute):
    layer = small(biased=True, format=format)
    routing, (leaves, pools) = layer.routing, with_leaves(layer, ALL)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        expert_mlp(leaves["x"], leaves["weights"], pools, routing, "reference", recompute)
    known = (*leaves.values(), *pools.frozen.tensors(), *(v for v in vars(routing).values() if isinstance(v, Tensor)))
    addresses = {t.data_ptr() for t in known if t is not None}
    (h,) = (t for t in saved if t.data_ptr() not in addresses)
    assert h.shape == (routing.num_rows if recompute == "none" else routing.prefix_rows(), 12)


Arguments = tuple[Tensor, Tensor, ExpertPools, Routing]


def arguments(device: torch.device = CPU, **layer) -> Arguments:
    made = small(biased=True, **layer)
    moved = [None if t is None else t.to(device) for t in made.pools.tensors()]
    pools = pools_of(moved, made.activation, made.interleaved, made.format)
    tables = {name: t.to(device) for name, t in vars(made.routing).items() if isinstance(t, Tensor)}
    return made.x_TD.to(device), made.weights_TK.to(device), pools, replace(made.routing, **tables)


def with_pool(args: Arguments, name: str, change) -> Arguments:
    """The arguments with one tensor, such as ``frozen_down``, changed."""
    x, weights, pools, routing = args
    pool, field = name.split("_", 1)
    (field,) = (known for known in TENSORS if known.rpartition("_")[0] == field)
    held = getattr(pools, pool)
    return x, weights, replace(pools, **{pool: replace(held, **{field: change(getattr(held, field))})}), routing


NAMES = [
    f"{pool}_{name}" for pool in ("trained", "frozen") for name in ("gate_up", "down", "gate_up_bias", "down_bias")
]


def refused(args: Arguments, message: str, **settings) -> None:
    with pytest.raises(ValueError, match=message):
        expert_mlp(*args, **settings)


def literal(shape: tuple[int, ...]) -> str:
    return str(shape).replace("(", r"\(").replace(")", r"\)")


def test_the_layer_that_is_spoilt_below_is_a_good_one():
    assert expert_mlp(*arguments(), backend="reference").shape == (5, 8)
    refused(arguments(META), "backend 'cpu' computes on CPU tensors", backend="cpu")  # the last check of all


@pytest.mark.parametrize(
    ("name", "cut", "expected", "found"),
    [
        ("trained_gate_up", (0, 1, 0), (2, 12, 8), (2, 11, 8)),
        ("trained_down", (1, 0, 0), (2, 8, 6), (1, 8, 6)),
        ("trained_down", (0, 1, 0), (2, 8, 6), (2, 7, 6)),
        ("trained_gate_up_bias", (1, 0), (2, 12), (1, 12)),
        ("trained_gate_up_bias", (0, 1), (2, 12), (2, 11)),
        ("trained_down_bias", (1, 0), (2, 8), (1, 8)),
        ("trained_down_bias", (0, 1), (2, 8), (2, 7)),
        ("frozen_gate_up", (0, 1, 0), (4, 12, 8), (4, 11, 8)),
        ("frozen_gate_up", (0, 0, 1), (4, 12, 8), (4, 12, 7)),
        ("frozen_down", (1, 0, 0), (4, 8, 6), (3, 8, 6)),
        ("frozen_down", (0, 1, 0), (4, 8, 6), (4, 7, 6)),
        ("frozen_down", (0, 0, 1), (4, 8, 6), (4, 8, 5)),
        ("frozen_gate_up_bias", (1, 0), (4, 12), (3, 12)),
        ("frozen_gate_up_bias", (0, 1), (4, 12), (4, 11)),
        ("frozen_down_bias", (1, 0), (4, 8), (3, 8)),
        ("frozen_down_bias", (0, 1), (4, 8), (4, 7)),
    ],
)
def test_a_tensor_of_another_shape_is_named(name, cut, expected, found):
    args = with_pool(arguments(), name, lambda t: t[tuple(slice(n, None) for n in cut)].contiguous())
    refused(args, f"^{name} must have shape {literal(expected)}, got {literal(found)}$")


@pytest.mark.parametrize("format", FORMATS)
def test_a_quantized_pool_that_does_not_fit_is_named(format):
    x, weights, pools, routing = arguments(format=format)
    frozen = pools.frozen
    assert isinstance(frozen, QuantizedWeights)

    def spoilt(message: str, **changes) -> None:
        refused((x, weights, replace(pools, frozen=replace(frozen, **changes)), routing), message)

    spoilt(r"^frozen_gate_up must have shape \(4, 12, 8\), got \(4, 12, 7\)$", shape=(12, 7, 6))
    spoilt(r"^frozen_down must have shape \(4, 8, 6\), got \(4, 8, 5\)$", shape=(12, 8, 5))
    spoilt("^format must be one of .*, got 'gptq'$", format="gptq")
    spoilt("^biases must be given", down_bias_ED=None)
    spoilt(rf"^frozen_down in {format} is .*; got 1 tensors$", down=frozen.down[:1])
    for place, part in enumerate(frozen.kind.layout(1, 1, 1)):
        cut = [*frozen.down[:place], frozen.down[place][1:], *frozen.down[place + 1 :]]
        spoilt(f"^frozen_down {part} of {format} must be torch.* got torch", down=tuple(cut))
        moved = [*frozen.down[:place], frozen.down[place].to(META), *frozen.down[place + 1 :]]
        spoilt(f"^frozen_down {part} must be on cpu like x, got meta$", down=tuple(moved))


def test_a_quantized_pool_starts_where_a_vector_load_can():
    x, weights, pools, routing = arguments(META, format="nf4")
    frozen = pools.frozen
    assert isinstance(frozen, QuantizedWeights)
    moved = replace(frozen, down=(shifted(frozen.down[0]), frozen.down[1]))
    refused((x, weights, replace(pools, frozen=moved), routing), "^frozen_down codes must start at a multiple of 16 b")


def test_packed_layouts_are_of_plain_weights():
    refused(arguments(format="int8"), "^backend 'cpu_packed' packs plain.* got int8, which 'cpu'", backend="cpu_packed")


def test_x_and_routing_weights_of_another_shape_are_named():
    x, weights, pools, routing = arguments()
    refused((x[1:], weights, pools, routing), r"^x must have shape \(5, 8\), got \(4, 8\)$")
    refused((x[:, 1:], weights, pools, routing), r"^x must have shape \(5, 8\), got \(5, 7\)$")
    refused((x, weights[1:], pools, routing), r"routing weights must have shape \(5, 3\), got \(4, 3\)$")
    refused((x, weights[:, 1:], pools, routing), r"routing weights must have shape \(5, 3\), got \(5, 2\)$")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("to", "found"), [(torch.float64, "torch.float64 on cpu"), (META, "torch.float32 on meta")], ids=str
)
def test_a_tensor_of_another_dtype_or_device_is_named(name, to, found):
    args = with_pool(arguments(), name, lambda t: t.to(to))
    refused(args, f"^{name} must be torch.float32 on cpu like x, got {found}$")


def test_routing_weights_are_floats_on_the_device_of_x():
    x, weights, pools, routing = arguments()
    message = "^routing weights must be floats on cpu like x, got torch.{} on {}$"
    refused((x, weights.int(), pools, routing), message.format("int32", "cpu"))
    refused((x, weights.to(META), pools, routing), message.format("float32", "meta"))
    moved = replace(routing, token_N=routing.token_N.to(META))
    refused((x, weights, pools, moved), "^routing must be on cpu like x, got meta$")
    refused((x.long(), weights, pools, routing), "^x must be of a float dtype, got torch.int64$")


@pytest.mark.parametrize("name", ["trained_gate_up", "trained_down"])
def test_the_trained_weights_are_stacks_of_matrices(name):
    shape = literal((12, 8) if name == "trained_gate_up" else (8, 6))
    refused(with_pool(arguments(), name, lambda t: t[0]), f"^{name} must be a stack of matrices, got {shape}$")
    refused(with_pool(arguments(), name, lambda t: None), f"^{name} must be a stack of matrices, got NoneType$")


def test_biases_are_given_all_or_not_at_all():
    biases = [name for name in NAMES if name.endswith("bias")]
    for missing in range(1, 15):  # every choice but none and all of the four
        args = arguments()
        for place, name in enumerate(biases):
            if missing >> place & 1:
                args = with_pool(args, name, lambda t: None)
        refused(args, "^biases must be given for both projections of both pools, or not at all$")


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith("bias")])
def test_a_bias_is_contiguous(name):
    refused(with_pool(arguments(), name, transposed), rf"^{name} must be contiguous, got strides \(1, \d\)$")


@pytest.mark.parametrize("name", NAMES)
def test_weights_on_a_device_start_where_a_vector_load_can(name):
    refused(with_pool(arguments(META), name, shifted), f"^{name} must start at a multiple of 16 bytes, got 0x4$")
    moved = with_pool(arguments(META), name, lambda t: torch.cat([t[:1], t])[1:])  # by whole experts of 16 n bytes
    refused(moved, "backend 'cpu' computes on CPU tensors", backend="cpu")
    args = arguments()
    assert torch.equal(expert_mlp(*with_pool(args, name, shifted)), expert_mlp(*args))  # on a CPU all of them can


def test_x_on_a_device_starts_anywhere():
    x, *others = arguments(META)
    refused((shifted(x), *others), "backend 'cpu' computes on CPU tensors", backend="cpu")


@pytest.mark.parametrize("pool", ["trained", "frozen"])
@pytest.mark.parametrize(("size", "fits"), [(2**31 - 1, True), (2**31, False)])
@pytest.mark.parametrize("name", ["gate_up", "down"])
def test_an_experts_last_element_is_within_32_bit_offsets(name, size, fits, pool):
    # D is 2, F 1 and G 2; experts lie inside one another's rows. The last element is ``size`` after the first.
    strides = {"gate_up": (2**32, 2, 1), "down": (2**32, 1, 1)}
    strides[name] = (2**32, size - 1, 1) if name == "gate_up" else (2**32, size, 1)

    def held(n: int) -> ExpertWeights:
        wanted = strides if n else {"gate_up": (4, 2, 1), "down": (2, 1, 1)}
        return ExpertWeights(*(
            torch.empty_strided((n, 2, columns), wanted[field], device="meta")
            for field, columns in (("gate_up", 2), ("down", 1))
        ))  # fmt: skip

    index = torch.empty(6, dtype=torch.int64, device="meta")
    sizes = {"trained": 4, "frozen": 0} if pool == "trained" else {"trained": 0, "frozen": 4}
    routing = Routing(
        index, index, index.view(3, 2), torch.empty(5, dtype=torch.int64, device="meta"), sizes["trained"]
    )
    args = torch.empty(3, 2, device="meta"), torch.empty(3, 2, device="meta"), ExpertPools(*map(held, sizes.values()))
    limit = rf"^{pool}_{name} must hold an expert within 2\*\*31 elements, got strides {literal(strides[name])}$"
    refused((*args, routing), "backend 'cpu' computes on CPU" if fits else limit, backend="cpu")


@pytest.mark.parametrize("name", NAMES[:2] + NAMES[4:6])
def test_both_pools_are_laid_out_alike(name):
    kind = name.split("_", 1)[1]
    refused(
        with_pool(arguments(), name, transposed),
        f"^trained_{kind} and frozen_{kind} must have the same strides, got .* and .*$",
    )


@pytest.mark.parametrize(("trained", "empty"), [((), "trained"), (range(6), "frozen")])
def test_a_pool_without_experts_is_laid_out_as_it_likes(trained, empty):
    args = arguments(trained=tuple(trained))
    expected = expert_mlp(*args, backend="reference")
    for name in ("gate_up", "down"):
        args = with_pool(args, f"{empty}_{name}", lambda t: t.new_empty(t.mT.shape).mT)
    assert args[2].trained.gate_up_EGD.stride() != args[2].frozen.gate_up_EGD.stride()
    assert torch.equal(expert_mlp(*args, backend="reference"), expected)


@pytest.mark.parametrize("name", NAMES[4:])
def test_the_frozen_pool_gets_no_gradient(name):
    args = with_pool(arguments(), name, lambda t: t.clone().requires_grad_())
    refused(args, "^the frozen pool cannot require a gradient$")


def test_the_routing_is_for_these_pools():
    x, weights, pools, routing = arguments()
    other = (x, weights, pools, replace(routing, num_trained=1))
    refused(other, "^routing is for 1 trained of 6 experts, the pools hold 2 of 6$")
    other = (x, weights, pools, replace(routing, offsets_E1=torch.cat([routing.offsets_E1, routing.offsets_E1[-1:]])))
    refused(other, "^routing is for 2 trained of 7 experts, the pools hold 2 of 6$")


def test_pools_that_fit_are_looked_over_once_and_again_when_they_change(monkeypatch):
    x, weights, pools, routing = arguments(format="int8")
    looked, look = [], autograd_op._validate_pools
    monkeypatch.setattr(autograd_op, "_fitting", set())
    monkeypatch.setattr(autograd_op, "_validate_pools", lambda *found: looked.append(found) or look(*found))
    for _ in range(2):
        assert expert_mlp(x, weights, pools, routing).shape == (5, 8)
    assert len(looked) == 1
    pools.trained.down_EDF.data = pools.trained.down_EDF.double()
    refused(
        (x, weights, pools, routing), "^trained_down must be torch.float32 on cpu like x, got torch.float64 on cpu$"
    )
    pools.trained.down_EDF.data = pools.trained.down_EDF.float()
    refused((x.double(), weights, pools, routing), "must be torch.float64 on cpu like x, got torch.float32 on cpu$")
    without_a_gate = replace(pools, activation=Activation("gelu", gated=False))
    refused((x, weights, without_a_gate, routing), r"^frozen_gate_up must have shape \(4, 6, 8\), got \(4, 12, 8\)$")


def test_settings_that_do_not_exist_are_refused():
    refused(arguments(), "^recompute must be one of none, frozen, got 'all'$", recompute="all")
    refused(arguments(), "^backend must be one of .*, got 'cuda'$", backend="cuda")


@pytest.mark.parametrize("moved", [shifted, transposed])
def test_without_gradients_too_the_backend_gets_contiguous_tensors_at_even_addresses(moved, calls):
    layer = small(dtype=torch.float32)
    with torch.no_grad():
        expert_mlp(moved(layer.x_TD), moved(layer.weights_TK), layer.pools, layer.routing, "reference")
    for seen, value in zip(calls["forward"][0][:2], (layer.x_TD, layer.weights_TK), strict=True):
        assert seen.is_contiguous() and seen.data_ptr() % 16 == 0 and torch.equal(seen, value)
