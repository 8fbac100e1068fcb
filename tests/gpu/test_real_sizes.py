"""Layers of well-known models, at the numbers of tokens of a training step and of a short prompt."""

from __future__ import annotations

import pytest
import torch

from benchmarks import peers
from benchmarks.layer import TOLERANCE, check, largest_error, make_problem
from benchmarks.shapes import SHAPES, LayerShape
from esft_kernels.formats.resolve import FORMATS
from tests.gpu.device import DEVICE, sized

BF16 = torch.bfloat16
MODELS = ("deepseek-v2-lite", "qwen3-30b-a3b", "olmoe-1b-7b", "gpt-oss-20b", "mixtral-8x7b")
LARGE = MODELS[3:]  # with their copies in float32, 15 GB and more
SHAPES = SHAPES | {"small": LayerShape("small", 32, 16, 3, 2)}
FORMAT_NAMES = sized(tuple(FORMATS), ("fp8",))


@pytest.mark.parametrize("tokens", sized((512, 4096), (3,)))
@pytest.mark.parametrize("name", sized(MODELS, ("small",)))
def test_output_and_gradients_are_the_references(name, tokens, request):
    if name in LARGE:
        request.getfixturevalue("much_memory")
    check(make_problem(SHAPES[name], tokens, BF16, DEVICE), BF16, "triton")


def near(found: peers.Step, expected: peers.Step, problem: peers.Problem) -> None:
    """Output, and gradients of x, the routing weights and what else both have."""
    results = [step.run(problem) for step in (found, expected)]
    error = largest_error(*results)
    assert error <= TOLERANCE[BF16], f"{problem.shape.name}, {len(problem.x_TD):,} tokens: off by {error:.2e}"


@pytest.mark.parametrize("tokens", sized((4, 512, 4096), (3,)))  # of four, fewer rows than experts, loads decode
@pytest.mark.parametrize("format", FORMAT_NAMES)
def test_quantized_experts_are_their_decoded_weights(format, tokens):
    problem = make_problem(SHAPES[sized("olmoe-1b-7b", "small")], tokens, BF16, DEVICE)
    step = peers.ours(problem, problem.chosen, "triton", format)
    near(step, peers.decoded(problem, problem.chosen, step, "triton"), problem)


@pytest.mark.parametrize(("adapters", "tokens"), sized([(8, 512), (8, 4096)], [(2, 4)]))
def test_adapters_with_the_same_experts_are_as_one(adapters, tokens):
    problem = make_problem(SHAPES[sized("olmoe-1b-7b", "small")], tokens, BF16, DEVICE)
    one, mixed = peers.ours(problem, problem.chosen, "triton"), peers.mixed(problem, adapters, "triton")
    expected, found = one.run(problem), mixed.run(problem)
    for n in (3, 4):  # the weights' gradients: what each adapter's tokens bring
        parts = found[n].float().view(adapters, -1, *found[n].shape[1:])
        found[n] = parts.sum(dim=0)
    error = largest_error(found, expected)
    assert error <= TOLERANCE[BF16], f"off by {error:.2e}"
