"""What of a model each of several GPUs should hold, and what they then send one another."""

from __future__ import annotations

from dataclasses import dataclass

from esft.planning.outline import Outline
from esft.planning.plan import Plan


@dataclass(frozen=True)
class Spread:
    """One way to lay a training out over GPUs; bytes of each GPU.

    Attributes:
        sharded: what is cut up, so that each GPU has a part of it.
        peak: memory that is taken at the most.
        sent: in a step, by collective operations in a ring.
    """

    sharded: str
    peak: int
    sent: int


NOTHING, FROZEN, EXPERTS, ALL = "nothing", "what is frozen", "the experts", "the experts and what else is frozen"
_OPTION = {FROZEN: "frozen", EXPERTS: "experts", ALL: "all"}  # of --shard


def spreads(plan: Plan, gpus: int, whole: Outline) -> list[Spread]:
    """All on every GPU; what is frozen cut up, gathered layer by layer; experts dealt out; and these two at once.

    Args:
        plan: of one process, with the tokens that go through one GPU together.
        gpus: how many.
        whole: the model.

    Gradients of what trains are added up, those of dealt experts are not: it is their tokens that are sent, see
    ``esft.parallel.experts``.
    """
    ring = (gpus - 1) / gpus
    everything = Spread(NOTHING, plan.peak, round(2 * ring * plan.gradients))
    dealt, layers = _experts_dealt(plan, gpus, whole), frozen_weights(plan) - plan.outside
    return [
        everything,
        _cut_up(FROZEN, everything, layers, gpus, whole.depth),
        dealt,
        _cut_up(ALL, dealt, layers - plan.frozen_experts, gpus, whole.depth),
    ]


def _cut_up(sharded: str, way: Spread, layers: int, gpus: int, depth: int) -> Spread:
    """One layer is gathered at a time, and the next one while it is used; for the forward and for the backward.

    Args:
        way: without that.
        layers: bytes of what is cut up.
    """
    kept = layers // gpus + 2 * (layers // depth)
    return Spread(sharded, way.peak - layers + min(kept, layers), way.sent + round(2 * (gpus - 1) / gpus * layers))


def _experts_dealt(plan: Plan, gpus: int, whole: Outline) -> Spread:
    """The other GPUs' tokens are kept for the backward, and their rows of one layer's output are there for a moment."""
    others, size, k = (gpus - 1) * plan.tokens, whole.dtype.itemsize, whole.top_k
    of_experts = plan.trained_experts / max(plan.gradients, 1)
    dealt = plan.trained_experts + plan.frozen_experts + of_experts * (plan.masters + plan.moments)
    widths = [layer.shape[1] for layer in whole.layers]
    more = others * size * (sum(widths) + k * max(widths))
    # Hidden states and outputs, and the gradients of both; ids in 8 bytes, routing weights and their gradients in 4.
    exchanged = others * sum(4 * width * size + 16 * k for width in widths) if gpus > 1 else 0
    beside = 2 * (gpus - 1) / gpus * (plan.gradients - plan.trained_experts)
    return Spread(EXPERTS, round(plan.peak - dealt * (gpus - 1) / gpus + more), round(beside + exchanged))


def frozen_weights(plan: Plan) -> int:
    """Bytes of the model's weights that get no gradient."""
    return plan.trained_experts + plan.frozen_experts + plan.other_weights - plan.kept_base - plan.gradients


def spreading(plan: Plan, gpus: int, whole: Outline, memory: float | None) -> list[str]:
    """What to shard and why, as lines.

    Args:
        memory: bytes of one GPU; None where it is not told.
    """
    ways = spreads(plan, gpus, whole)
    lines = [
        f"{gpus} GPUs, sharded {way.sharded}: {way.peak / 1e9:.3f} GB each, {way.sent / 1e9:.3f} GB sent a step by each"
        for way in ways
    ]
    everything, *cut = ways
    if memory is None:
        return lines
    if everything.peak <= memory:
        why = "all of the model fits every GPU, and only the gradients of what trains are sent"
        return [*lines, f"Shard nothing: {why}."]
    shards = plan.method == "esft" and not plan.kept_base  # what train does
    if shards and (fit := [way for way in cut if way.peak <= memory]):
        best = min(fit, key=lambda way: way.sent)
        why = f"all of it does not fit, and {best.sent / max(everything.sent, 1):.1f} times the bytes are sent"
        return [*lines, f"Shard {best.sharded} (--shard {_OPTION[best.sharded]}): {why}."]
    return [*lines, "It does not fit, whatever is sharded; see what to change above."]
