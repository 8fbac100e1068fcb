"""Time one MoE layer, forward and backward, beside what a user would pick instead.

Correctness comes first: our output and every gradient are compared with the float32 reference on the very batch that is
timed, so in the same tiles, and the peers' outputs and input gradients with ours.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch

from benchmarks import peers
from benchmarks.peers import PoolStep, Problem, Step
from benchmarks.shapes import LayerShape, skewed_top_k
from esft_kernels.formats.resolve import FORMATS
from esft_kernels.pools import PLAIN

SHARE = 0.22  # of the rows on chosen experts, as in the published routing logs
CHOSEN = 5  # experts of 64
ADAPTERS = 8  # in a batch that mixes them
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}  # of the largest value


def chosen_experts(shape: LayerShape) -> int:
    """How many experts are trained: the published share of 5 in 64."""
    return max(1, round(CHOSEN * shape.experts / 64))


def make_problem(shape: LayerShape, tokens: int, dtype: torch.dtype, device: torch.device) -> Problem:
    generator = torch.Generator().manual_seed(0)
    # On a GPU values are drawn there: for billions of weights a CPU takes many seconds.
    values = generator if device.type == "cpu" else torch.Generator(device).manual_seed(0)
    d, f, e = shape.hidden, shape.intermediate, shape.experts
    chosen = list(range(chosen_experts(shape)))
    index = skewed_top_k(shape, tokens, chosen, SHARE, generator)

    def random(*size: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*size, generator=values, device=device) * scale).to(dtype)

    return Problem(
        shape=shape,
        x_TD=random(tokens, d),
        index_TK=index.to(device),
        weights_TK=torch.rand(tokens, shape.top_k, generator=generator).to(device),
        grad_out_TD=random(tokens, d),
        gate_up_EGD=random(e, shape.activation.width * f, d, scale=d**-0.5),
        down_EDF=random(e, d, f, scale=f**-0.5),
        biases=(random(e, shape.activation.width * f), random(e, d)) if shape.gpt_oss_layout else (),
        chosen=chosen,
    )


def largest_error(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """Of all results, over the largest value of each; NaN where any holds one, which ``max`` would pass over."""
    return torch.tensor([relative_error(a, b) for a, b in zip(found, expected, strict=True)]).max().item()


def check(problem: Problem, dtype: torch.dtype, backend: str) -> float:
    """Largest error of our output and gradients against the reference in float32, over the largest value.

    Raises RuntimeError when it exceeds the tolerance.
    """
    results = peers.ours(problem, problem.chosen, backend).run(problem)
    exact = problem.to(torch.float32)
    expected = peers.ours(exact, exact.chosen, "reference").run(exact)
    error = largest_error(results, expected)
    if not error <= TOLERANCE[dtype]:
        raise RuntimeError(
            f"{problem.shape.name} {dtype} {backend}: off by {error:.2e} of the largest value; not timed"
        )
    return error


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.float() - expected.float()).abs().max() / expected.float().abs().max().clamp_min(1e-9)).item()


def peers_of(problem: Problem, backend: str) -> dict[str, Callable[[], Step]]:
    """What our step is timed beside, by name; only layers that transformers' plain experts can hold have others."""
    every = list(range(problem.shape.experts))
    made: dict[str, Callable[[], Step]] = {
        "esft, all trained": lambda: peers.ours(problem, every, backend),
        f"esft, {ADAPTERS} adapters": lambda: peers.mixed(problem, ADAPTERS, backend),
    }
    if problem.x_TD.device.type == "cpu":
        made["esft, frozen packed"] = lambda: peers.ours(problem, problem.chosen, "cpu_packed")
    for name in FORMATS:
        made[f"esft, frozen in {name}"] = lambda name=name: peers.ours(problem, problem.chosen, backend, name)
    if problem.shape.activation == LayerShape.activation:
        made |= {
            "grouped_mm, all trained": lambda: peers.stock(problem, "grouped_mm", True),
            "grouped_mm, frozen": lambda: peers.stock(problem, "grouped_mm", False),
            "eager, all trained": lambda: peers.stock(problem, "eager", True),
            "per-expert, chosen": lambda: peers.per_expert(problem),
            "LoRA (PEFT)": lambda: peers.lora(problem),
        }
    return made


FILLER = 8192  # rows and columns of a product that keeps a GPU busy for a millisecond or two


def synchronise(device: torch.device) -> None:
    """Wait for what a GPU has to do yet."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleaved(
    tasks: dict[str, Callable[[], object]], rounds: int, device: torch.device, ahead: bool = True
) -> dict[str, list[float]]:
    """Seconds of every task in every round, one after the other in each, so that drift meets them all alike.

    On a GPU it is the time between two events, before the first of which dense products are queued: they empty the
    cache, and keep the GPU busy until the task is queued as well, as a training's other layers do. Where the host is
    not ``ahead`` of the GPU, as at the first layer of a step, it is the clock's time between synchronisations.
    """
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    timed = _timed_on_gpu(device) if device.type == "cuda" and ahead else partial(_timed, device)
    for round_ in range(rounds + 2):
        for name, task in tasks.items():
            taken = timed(task)
            if round_ >= 2:  # the first two warm up
                seconds[name].append(taken)
    return seconds


def _timed(device: torch.device, task: Callable[[], object]) -> float:
    synchronise(device)
    start = time.perf_counter()
    task()
    synchronise(device)
    return time.perf_counter() - start


def _timed_on_gpu(device: torch.device) -> Callable[[Callable[[], object]], float]:
    rows, out = (torch.randn(FILLER, FILLER, device=device, dtype=torch.bfloat16) for _ in range(2))
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def timed(task: Callable[[], object]) -> float:
        torch.cuda.synchronize(device)
        for _ in range(3):
            torch.mm(rows, rows, out=out)
        start.record()
        task()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end) / 1e3

    return timed


def run(
    shape: LayerShape, tokens: int, dtype: torch.dtype, device: torch.device, backend: str, rounds: int,
    only: set[str] | None = None,
) -> list[dict]:  # fmt: skip
    """A row for every peer: its median and quartiles, and how many times ours it takes. Measured, nothing computed.

    One peer at a time beside our step, so that neither's memory lies idle long enough to go cold, and the ratio is the
    median over the rounds of what the two took next to each other. ``only`` names the peers to time.

    Raises RuntimeError when our step is wrong, or a peer's output or input gradient is not ours.
    """
    problem = make_problem(shape, tokens, dtype, device)
    error = check(problem, dtype, backend)
    mine = peers.ours(problem, problem.chosen, backend)
    results, saved = mine.run(problem)[:2], mine.saved_bytes(problem)
    rows = []
    for name, make in peers_of(problem, backend).items():
        if only is not None and name not in only:
            continue
        peer, wanted = make(), results
        if isinstance(peer, PoolStep) and peer.pools.format != PLAIN:  # other weights, and so other results than ours
            wanted = peers.decoded(problem, problem.chosen, peer, backend).run(problem)[:2]
        for result, expected in zip(peer.run(problem)[:2], wanted, strict=True):
            # LoRA's matrices begin at a product of zero, so it too computes the layer as it is.
            if not (off := relative_error(result, expected)) <= 2 * TOLERANCE[dtype]:
                raise RuntimeError(f"{name}: off from esft by {off:.2e} of the largest value; not timed")
        tasks = {"esft": lambda: mine.run(problem), name: lambda peer=peer: peer.run(problem)}
        rows.append(
            _row(shape, tokens, interleaved(tasks, rounds, device)) | {"saved MB": peer.saved_bytes(problem) / 1e6}
        )
        del peer, tasks
    tasks = {"esft": lambda: mine.run(problem), "dense GEMMs": peers.dense_limit(problem)}
    rows.append(_row(shape, tokens, interleaved(tasks, rounds, device)) | {"saved MB": ""})
    return [row | {"esft saved MB": saved / 1e6, "esft error": error} for row in rows]


def _row(shape: LayerShape, tokens: int, seconds: dict[str, list[float]]) -> dict:
    (_, mine), (name, theirs) = seconds.items()
    ratios = [b / a for a, b in zip(mine, theirs, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    return {
        "shape": shape.name,
        "tokens": tokens,
        "peer": name,
        "peer ms": statistics.median(theirs) * 1e3,
        "esft ms": statistics.median(mine) * 1e3,
        "peer / esft": statistics.median(ratios),
        "quartiles": f"{low:.2f}-{high:.2f}",
    }
