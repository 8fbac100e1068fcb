"""What of a model each of several GPUs should hold, and what they then send one another."""

from __future__ import annotations

from dataclasses import dataclass

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


NOTHING, FROZEN = "nothing", "what is frozen"


def spreads(plan: Plan, gpus: int, layers: int) -> list[Spread]:
    """All on every GPU, with the gradients of what trains added up; and what is frozen cut up, gathered layer by layer.

    Args:
        plan: of one process, with the tokens that go through one GPU together.
        gpus: how many.
        layers: of the model: one is gathered at a time, and the next one while it is used.

    What trains is on every GPU either way: its gradients, masters and moments are what ESFT has little of.
    """
    ring = (gpus - 1) / gpus
    gradients = round(2 * ring * plan.gradients)
    frozen = frozen_weights(plan)
    kept = frozen // gpus + 2 * (frozen // layers)
    gathered = round(2 * ring * frozen)  # for the forward and again for the backward
    cut = plan.peak - frozen + min(kept, frozen)
    return [Spread(NOTHING, plan.peak, gradients), Spread(FROZEN, cut, gradients + gathered)]


def frozen_weights(plan: Plan) -> int:
    """Bytes of the weights that get no gradient."""
    return plan.trained_experts + plan.frozen_experts + plan.other_weights - plan.gradients


def spreading(plan: Plan, gpus: int, layers: int, memory: float | None) -> list[str]:
    """What to shard and why, as lines.

    Args:
        memory: bytes of one GPU; None where it is not told.
    """
    ways = spreads(plan, gpus, layers)
    lines = [
        f"{gpus} GPUs, sharded {way.sharded}: {way.peak / 1e9:.3f} GB each, {way.sent / 1e9:.3f} GB sent a step by each"
        for way in ways
    ]
    whole, cut = ways
    if memory is None:
        return lines
    if whole.peak <= memory:
        why = "all of the model fits every GPU, and only the gradients of what trains are sent"
        return [*lines, f"Shard nothing: {why}."]
    if cut.peak <= memory and plan.method == "esft":
        why = f"all of it does not fit, and {cut.sent / max(whole.sent, 1):.0f} times the bytes are sent"
        return [*lines, f"Shard what is frozen (--shard frozen): {why}."]
    return [*lines, "It does not fit: what trains is on every GPU; see what to change above."]
