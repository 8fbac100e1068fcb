"""The custom operator that torch.compile sees: as transparent as expert_mlp itself, and a faithful fake."""

import pytest
import torch
from esft_kernels.opaque import routed_mlp

from esft_kernels.routing import expert_order
from tests.esft_kernels.layers import ACTIVATIONS, assert_close, make_layer


def leaves(layer):
    """The layer's pools and inputs as leaves that require a gradient, and all of those."""
    pools = layer.pools
    x, weights = layer.x_TD.clone().requires_grad_(), layer.weights_TK.clone().requires_grad_()
    trained = [t.detach().requires_grad_() for t in pools.trained.tensors() if t is not None]
    pools = type(pools)(type(pools.trained)(*trained), pools.frozen, pools.activation, pools.interleaved)
    position = torch.argsort(torch.tensor(expert_order(layer.trained, pools.num_experts)))
    return x, weights, pools, position, [x, weights, *trained]


@pytest.mark.parametrize("recompute", ["none", "frozen"])
@pytest.mark.parametrize("layout", [{}, {"transposed": True, "biased": True, "interleaved": True}])
def test_compiled_output_and_gradients_are_the_eager_ones(layout: dict, recompute: str):
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


@pytest.mark.parametrize("needs", [(True, True, True), (False, False, True), (True, False, False)])
@pytest.mark.parametrize("keep", ["all", "prefix"])
def test_schema_autograd_and_fake_agree_with_what_it_does(needs: tuple[bool, bool, bool], keep: str):
    layer = make_layer(tokens=5, hidden=8, intermediate=6, dtype=torch.float32)
    x, weights, pools, position, _ = leaves(layer)
    x.requires_grad_(needs[0])
    weights.requires_grad_(needs[1])
    for tensor in pools.trained.tensors()[:2]:
        tensor.requires_grad_(needs[2])
    tensors = (*pools.trained.tensors(), *pools.frozen.tensors())
    settings = ("silu", True, 1.0, None, 0.0, False, "reference", True, keep)
    torch.library.opcheck(
        torch.ops.esft.routed_mlp.default,
        (x, layer.ids_TK, weights, position, *tensors, *settings),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )
