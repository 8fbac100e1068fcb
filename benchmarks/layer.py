"""Time one MoE layer, forward and backward: the chosen experts trained, and all of them.

Correctness comes first: each backend is compared with the float32 reference on a smaller batch before it is timed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from benchmarks.shapes import LayerShape, skewed_top_k
from esft_kernels.expert_mlp import expert_mlp
from esft_kernels.pools import ExpertPools, ExpertWeights
from esft_kernels.routing import expert_order, route

SHARE = 0.22  # of the rows on chosen experts, as in the published routing logs
CHOSEN = 5  # experts of 64
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}  # of the largest value


def chosen_experts(shape: LayerShape) -> int:
    """How many experts are trained: the published share of 5 in 64."""
    return max(1, round(CHOSEN * shape.experts / 64))


def _layer(shape: LayerShape, tokens: int, trained: list[int], dtype: torch.dtype, device: torch.device):
    generator = torch.Generator().manual_seed(0)
    d, f, e = shape.hidden, shape.intermediate, shape.experts
    order = torch.tensor(expert_order(trained, e))
    index = skewed_top_k(shape, tokens, list(range(chosen_experts(shape))), SHARE, generator)
    position = torch.empty(e, dtype=torch.int64)
    position[order] = torch.arange(e)

    def random(*size: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*size, generator=generator) * scale).to(device, dtype)

    def pool(size: int, trains: bool) -> ExpertWeights:
        g = f * shape.activation.width
        if shape.gpt_oss_layout:
            weights = (
                random(size, d, g, scale=d**-0.5),
                random(size, f, d, scale=f**-0.5),
                random(size, g),
                random(size, d),
            )
        else:
            weights = random(size, g, d, scale=d**-0.5), random(size, d, f, scale=f**-0.5)
        gate_up, down, *biases = [t.requires_grad_(trains) for t in weights]
        return ExpertWeights(*((gate_up.mT, down.mT) if shape.gpt_oss_layout else (gate_up, down)), *biases)

    s = len(trained)
    pools = ExpertPools(pool(s, True), pool(e - s, False), shape.activation, shape.gpt_oss_layout)
    x = random(tokens, d).requires_grad_()
    weights = torch.rand(tokens, shape.top_k, generator=generator).to(device).requires_grad_()
    return x, weights, pools, route(index.to(device), position.to(device), s), random(tokens, d)


def _step(x, weights, pools, routing, grad_out, backend: str) -> list[torch.Tensor]:
    out = expert_mlp(x, weights, pools, routing, backend)
    wanted = [x, weights]
    if pools.num_trained:
        wanted += [t for t in pools.trained.tensors() if t is not None]
    return [out, *torch.autograd.grad(out, wanted, grad_out)]


def check(shape: LayerShape, dtype: torch.dtype, device: torch.device, backend: str) -> float:
    """Largest error of outputs and gradients against the reference in float32, over the largest value.

    Raises RuntimeError when it exceeds the tolerance.
    """
    x, weights, pools, routing, grad_out = _layer(shape, 64, [1, 0], dtype, device)
    ours = _step(x, weights, pools, routing, grad_out, backend)

    def single(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().float().requires_grad_(tensor.requires_grad)

    def single_pool(pool: ExpertWeights) -> ExpertWeights:
        return ExpertWeights(*(None if t is None else single(t) for t in pool.tensors()))

    exact = replace(pools, trained=single_pool(pools.trained), frozen=single_pool(pools.frozen))
    theirs = _step(single(x), single(weights), exact, routing, grad_out.float(), "reference")
    error = max(
        ((a.float() - b).abs().max() / b.abs().max().clamp_min(1e-9)).item() for a, b in zip(ours, theirs, strict=True)
    )
    if not error <= TOLERANCE[dtype]:
        raise RuntimeError(f"{shape.name} {dtype} {backend}: off by {error:.2e} of the largest value; not timed")
    return error


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleaved(tasks: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of every task in every round, one after the other in each, so that drift meets them all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for round_ in range(rounds + 2):
        for name, task in tasks.items():
            _synchronise(device)
            start = time.perf_counter()
            task()
            _synchronise(device)
            if round_ >= 2:  # the first two warm up
                seconds[name].append(time.perf_counter() - start)
    return seconds


def run(shape: LayerShape, tokens: int, dtype: torch.dtype, device: torch.device, backend: str, rounds: int) -> dict:
    """Medians and quartiles of both variants, and their ratio. Measured on ``device``, nothing computed."""
    error = check(shape, dtype, device, backend)
    chosen = list(range(chosen_experts(shape)))
    layers = {
        "chosen": _layer(shape, tokens, chosen, dtype, device),
        "all": _layer(shape, tokens, list(range(shape.experts)), dtype, device),
    }
    seconds = interleaved(
        {name: lambda layer=layer: _step(*layer, backend) for name, layer in layers.items()}, rounds, device
    )
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    spread = {name: statistics.quantiles(values, n=4) for name, values in seconds.items()}
    trained_rows = layers["chosen"][3].prefix_rows()
    return {
        "shape": shape.name,
        "tokens": tokens,
        "backend": backend,
        "error": error,
        "chosen ms": medians["chosen"] * 1e3,
        "all ms": medians["all"] * 1e3,
        "chosen quartiles ms": f"{spread['chosen'][0] * 1e3:.1f}-{spread['chosen'][2] * 1e3:.1f}",
        "chosen / all": medians["chosen"] / medians["all"],
        "GFLOP/s": shape.flops(tokens, trained_rows) / medians["chosen"] / 1e9,
    }
