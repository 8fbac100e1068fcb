"""Times of single operations, by pytest-benchmark: ``pytest benchmarks``; ``-k "cpu and forward"`` for some of them.

Each is checked against the float32 reference on the batch that is timed, before it is timed. On a GPU the kernels' path
is timed, elsewhere the CPU's; the tables of ``python -m benchmarks`` say how others do.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks import peers
from benchmarks.layer import TOLERANCE, make_problem, relative_error
from benchmarks.peers import Problem
from benchmarks.shapes import SHAPES
from esft_kernels.backend import Backend, Needs
from esft_kernels.backends.resolve import resolve_backend
from esft_kernels.pools import ExpertPools
from esft_kernels.routing import Routing, expert_order, route

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BACKENDS = ("triton",) if DEVICE.type == "cuda" else ("cpu", "cpu_packed")
DTYPE = torch.bfloat16
LAYERS = {"tiny": 2048, "odd": 999} | ({"deepseek-v2-lite": 8192} if DEVICE.type == "cuda" else {})  # shape -> tokens


@pytest.fixture(scope="module", params=LAYERS)
def problem(request: pytest.FixtureRequest) -> Problem:
    return make_problem(SHAPES[request.param], LAYERS[request.param], DTYPE, DEVICE)


def pools_of(problem: Problem) -> ExpertPools:
    step = peers.ours(problem, problem.chosen, "auto")
    assert isinstance(step, peers.PoolStep)
    return step.pools


def routing_of(problem: Problem) -> Routing:
    order = torch.tensor(expert_order(problem.chosen, problem.shape.experts))
    return route(problem.index_TK, order.argsort().to(DEVICE), len(problem.chosen))


def timed(benchmark: BenchmarkFixture, function: Callable[[], object]) -> None:
    """Until the device is done with it."""

    def run() -> None:
        function()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark(run)


def check(found: list[Tensor | None], expected: list[Tensor | None]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        assert one is None or other is None or relative_error(one, other) <= TOLERANCE[DTYPE]


def exact_of(problem: Problem) -> tuple[Backend, Problem, ExpertPools]:
    exact = problem.to(torch.float32)
    return resolve_backend("reference", DEVICE), exact, pools_of(exact)


def test_route(benchmark: BenchmarkFixture, problem: Problem):
    routing = routing_of(problem)
    assert int(routing.offsets_E1[-1]) == problem.index_TK.numel()
    timed(benchmark, lambda: routing_of(problem))


@pytest.mark.parametrize("backend", BACKENDS)
def test_forward(benchmark: BenchmarkFixture, problem: Problem, backend: str):
    module, pools, routing = resolve_backend(backend, DEVICE), pools_of(problem), routing_of(problem)
    plain, exact, exact_pools = exact_of(problem)

    def forward() -> Tensor:
        return module.forward(problem.x_TD, problem.weights_TK, pools, routing, routing.num_rows)[0]

    with torch.no_grad():
        check([forward()], [plain.forward(exact.x_TD, exact.weights_TK, exact_pools, routing, 0)[0]])
        timed(benchmark, forward)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("needs", [Needs(True, True, True), Needs(False, False, True)], ids=["all", "prefix"])
def test_backward(benchmark: BenchmarkFixture, problem: Problem, backend: str, needs: Needs):
    module, pools, routing = resolve_backend(backend, DEVICE), pools_of(problem), routing_of(problem)
    plain, exact, exact_pools = exact_of(problem)

    def gradients(module: Backend, problem: Problem, pools: ExpertPools, h_NG: Tensor) -> list[Tensor | None]:
        found = module.backward(problem.grad_out_TD, problem.x_TD, h_NG, problem.weights_TK, pools, routing, needs)
        trained = found.trained.tensors() if found.trained is not None else ()
        return [found.x_TD, found.weights_TK, *trained]

    with torch.no_grad():
        h_NG, exact_h_NG = (
            made.forward(p.x_TD, p.weights_TK, held, routing, routing.num_rows)[1]
            for made, p, held in ((module, problem, pools), (plain, exact, exact_pools))
        )
        check(gradients(module, problem, pools, h_NG), gradients(plain, exact, exact_pools, exact_h_NG))
        timed(benchmark, lambda: gradients(module, problem, pools, h_NG))
