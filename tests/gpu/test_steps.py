"""A layer's step as training takes it: without waiting for the device, in graphs, on streams, compiled."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from esft_kernels.autograd_op import RECOMPUTE
from esft_kernels.backend import Needs
from esft_kernels.backends import triton_parts as parts
from esft_kernels.compiled_op import routed_mlp
from esft_kernels.formats.resolve import FORMATS
from esft_kernels.pools import PLAIN, ExpertPools, ExpertWeights
from esft_kernels.routing import expert_order
from tests.esft_kernels.layers import GPT_OSS, TOLERANCE, Layer, assert_close, make_layer
from tests.esft_kernels.test_autograd_op import exact
from tests.esft_kernels.test_fuzz import RESULTS
from tests.gpu.device import DEVICE, REHEARSAL, gpu_only, sized

BF16 = torch.bfloat16


def layer_of(tokens: int = sized(300, 4), **kwargs) -> Layer:
    usual = {"hidden": sized(256, 16), "intermediate": sized(128, 8), "dtype": BF16, "biased": True}
    return make_layer(tokens, 3, 6, **{**usual, **kwargs}).on(DEVICE)


class Step:
    """A layer's forward and backward from inputs that stay where they are."""

    def __init__(self, layer: Layer, recompute: str = "none"):
        pools = layer.pools
        trained = [None if t is None else t.detach().requires_grad_() for t in pools.trained.tensors()]
        self.pools: ExpertPools = replace(pools, trained=ExpertWeights(*trained))  # pyright: ignore
        self.position = torch.argsort(torch.tensor(expert_order(layer.trained, pools.num_experts))).to(DEVICE)
        self.x, self.weights = layer.x_TD.clone().requires_grad_(), layer.weights_TK.clone().requires_grad_()
        self.ids, self.grad_out, self.recompute = layer.ids_TK.clone(), layer.grad_out_TD.clone(), recompute
        self.leaves = [self.x, self.weights, *(t for t in trained if t is not None)]

    def forward(self, x: Tensor | None = None) -> Tensor:
        x = self.x if x is None else x
        return routed_mlp(x, self.ids, self.weights, self.position, self.pools, "triton", self.recompute)

    def __call__(self) -> list[Tensor]:
        out = self.forward()
        return [out.detach(), *torch.autograd.grad(out, self.leaves, self.grad_out)]

    @torch.no_grad()
    def take(self, layer: Layer) -> None:
        """The inputs, gradient and choice of another layer, in the same places."""
        for mine, other in (
            (self.x, layer.x_TD), (self.weights, layer.weights_TK), (self.ids, layer.ids_TK),
            (self.grad_out, layer.grad_out_TD),
        ):  # fmt: skip
            mine.copy_(other)


def same(found: list[Tensor], expected: list[Tensor]) -> None:
    for what, a, b in zip(RESULTS, found, expected, strict=True):
        assert torch.equal(a, b), f"{what} differs by {(a.double() - b.double()).abs().max()}"


@contextmanager
def no_waiting():
    if REHEARSAL:
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def recorded(step: Callable[[], list[Tensor]]) -> tuple[Callable[[], None], list[Tensor]]:
    """What replays a step from a graph, and where its results are then."""
    if REHEARSAL:
        results = step()
        return lambda: [old.copy_(new) for old, new in zip(results, step(), strict=True)] and None, results
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # a first time, for what is made once
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    return graph.replay, results


FORMAT_NAMES = sized((PLAIN, *FORMATS), (PLAIN, "nf4_double"))


@pytest.mark.parametrize("few_rows", sized([True, False], [True]))
@pytest.mark.parametrize("format", FORMAT_NAMES)
def test_a_step_never_waits_for_the_device(format, few_rows, monkeypatch):
    monkeypatch.setattr(parts, "FEW_ROWS", 1000 if few_rows else -1)
    step = Step(layer_of(format=format))
    expected = step()
    with no_waiting():
        found = step()
    same(found, expected)


@pytest.mark.parametrize("kind", sized(("plain", "gpt-oss", "int8", "nf4_double"), ("plain",)))
def test_a_step_is_replayed_from_a_graph_with_another_routing(kind):
    layout = {"activation": GPT_OSS, "interleaved": True, "transposed": True} if kind == "gpt-oss" else {}
    layout = {"format": kind} if kind in FORMATS else layout
    first = layer_of(**layout)
    step = Step(first)
    replay, results = recorded(step)
    for used in sized((None, (0, 2, 5), (1, 3, 4)), ((1, 3, 4),)):
        step.take(layer_of(used=used, **layout))
        replay()
        found = [t.clone() for t in results]
        assert any(t.any() for t in found)
        same(found, step())


@gpu_only
def test_another_stream_gives_the_same():
    step = Step(layer_of())
    expected, stream = step(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = step()
    torch.cuda.current_stream().wait_stream(stream)
    same(found, expected)


@pytest.mark.parametrize("recompute", sized(RECOMPUTE, ("frozen",)))
def test_compiled_a_step_is_the_eager_one(recompute):
    step = Step(layer_of(), recompute)
    expected = step()
    compiled = torch.compile(lambda x: step.forward(x), backend=sized("inductor", "aot_eager"), fullgraph=True)
    out = compiled(step.x)
    same([out.detach(), *torch.autograd.grad(out, step.leaves, step.grad_out)], expected)


def test_a_compiled_step_is_part_of_a_larger_graph():
    """What is around it is compiled by Triton as well, and its neighbours' strides are whatever suits them."""
    step = Step(layer_of())

    def block(x: Tensor) -> Tensor:
        return x + torch.nn.functional.silu(step.forward((x * 0.5).mT.contiguous().mT)) * 2

    results = []
    for run in (block, torch.compile(block, backend=sized("inductor", "aot_eager"), fullgraph=True)):
        out = run(step.x)
        results.append([out.detach(), *torch.autograd.grad(out, step.leaves, step.grad_out)])
    for what, eager, compiled in zip(RESULTS, *results, strict=True):
        assert_close(compiled, eager, TOLERANCE[BF16], what)


def test_used_twice_in_one_graph_gradients_add_up():
    step = Step(layer_of())
    once = step()
    out = step.forward() + step.forward()
    for what, two, one in zip(RESULTS[1:], torch.autograd.grad(out, step.leaves, step.grad_out), once[1:], strict=True):
        assert torch.equal(two, one + one), what


def test_a_backward_can_be_run_again_and_not_be_differentiated():
    step = Step(layer_of())
    out = step.forward()
    first, second = (torch.autograd.grad(out, step.leaves, step.grad_out, retain_graph=True) for _ in range(2))
    same([out, *first], [out, *second])
    (grad_x,) = torch.autograd.grad(out, [step.x], step.grad_out, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable|does not require grad"):
        torch.autograd.grad(grad_x.sum(), [step.x])


STRIDES = ("expanded", "transposed", "every second column", "off by one element")


@pytest.mark.parametrize("kind", sized(STRIDES, STRIDES[:1]))
def test_gradients_come_in_any_strides(kind):
    step = Step(layer_of())
    rows, columns = step.grad_out.shape
    if kind == "expanded":  # as that of a sum
        step.grad_out = step.grad_out[:1, :1].clone()
        step.grad_out.fill_(1.0)
        given = step.grad_out.expand(rows, columns)
    elif kind == "transposed":
        given = step.grad_out.mT.contiguous().mT
    elif kind == "every second column":
        given = step.grad_out.new_full((rows, 2 * columns), float("nan"))[:, ::2].copy_(step.grad_out)
    else:
        given = step.grad_out.new_empty(rows * columns + 1)[1:].view(rows, columns).copy_(step.grad_out)
    plain = given.contiguous().clone()
    found, expected = ([torch.zeros(()), *torch.autograd.grad(step.forward(), step.leaves, g)] for g in (given, plain))
    same(found, expected)


@pytest.mark.parametrize("adapters", [3])
def test_tokens_of_several_adapters_go_through_one_layer(adapters):
    """As the reference does it in float64: every adapter has its own weights for the experts that it has trained."""
    layer, s = layer_of(), 2
    own = [layer_of() for _ in range(adapters)]
    frozen = replace(layer, trained=[]).pools.frozen
    stacks = zip(*(o.pools.trained.tensors() for o in own), strict=True)
    trained = [torch.cat(stack).requires_grad_() for stack in stacks]
    position = (torch.arange(6, device=DEVICE) + adapters * s).repeat(adapters, 1)
    position[:, layer.trained] = torch.arange(adapters * s, device=DEVICE).view(adapters, s)
    adapter_T = torch.randint(adapters, (len(layer.x_TD),), device=DEVICE)
    results = []
    for backend, dtype in (("triton", BF16), ("reference", torch.float64)):
        tensors = [t.detach().to(dtype).requires_grad_() for t in trained]
        rest = ExpertWeights(*(t.to(dtype) for t in frozen.tensors()))
        pools = ExpertPools(ExpertWeights(*tensors), rest, layer.activation)
        x, weights = layer.x_TD.to(dtype).requires_grad_(), layer.weights_TK.clone().requires_grad_()
        out = routed_mlp(x, layer.ids_TK, weights, position, pools, backend, adapter_T=adapter_T)
        results.append([out, *torch.autograd.grad(out, [x, weights, *tensors], layer.grad_out_TD.to(dtype))])
    for what, found, expected in zip(RESULTS, *results, strict=True):
        assert_close(found, expected, TOLERANCE[BF16], what)


def test_the_steps_here_are_right_ones():
    layer = layer_of()
    expected = exact(layer, Needs(x=True, weights=True, trained=True))
    for what, found, right in zip(RESULTS, Step(layer)(), expected, strict=True):
        assert_close(found, right, TOLERANCE[BF16], what)
