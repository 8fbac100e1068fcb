"""What ESFT on well-known models takes, computed by ``esft.plan`` from their sizes in ``benchmarks/models``.

In a micro batch of 2,048 tokens, 8 records of 256.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import esft
from esft.planning.advice import GB
from esft.runs.config import TrainConfig

MODELS = Path(__file__).parent / "models"
MEMORY = (16, 24, 48, 80)  # GB
# What is tried for a memory, from what costs nothing to what costs most.
WAYS = {
    "bf16": ("bf16", {}),
    "bf16, 8-bit moments": ("bf16", {"optimizer": "adamw_8bit"}),
    "int8, 8-bit moments": ("int8", {"optimizer": "adamw_8bit"}),
    "nf4, 8-bit moments": ("nf4", {"optimizer": "adamw_8bit"}),
    "nf4, 8-bit moments, layers recomputed": ("nf4", {"optimizer": "adamw_8bit", "recompute": "layers"}),
}


def run(names: list[str], experts: int | None = None, records: int = 8, tokens: int = 2048) -> list[dict]:
    """A row for every model: sizes, the peak of every way in GB, and for every memory the first way that fits.

    Args:
        experts: a layer that train; where None the paper's share.
    """
    rows = []
    for name in names:
        plans = {
            way: esft.plan(
                str(MODELS / name), config=replace(TrainConfig(batch_size=records), **more), frozen=frozen,
                tokens=tokens, experts=experts,
            )
            for way, (frozen, more) in WAYS.items()
        }  # fmt: skip
        first = next(iter(plans.values()))
        rows.append(
            {
                "model": name,
                "parameters, 10^9": f"{first.parameters / 1e9:.1f}",
                "trained, 10^9": f"{first.trained_parameters / 1e9:.2f}",
                "adapter, GB": f"{first.stored / GB:.1f}",
                **{f"peak: {way}": f"{plan.peak / GB:.1f}" for way, plan in plans.items()},
                **{f"{memory} GB": _first_that_fits(plans, memory) for memory in MEMORY},
            }
        )
    return rows


def _first_that_fits(plans: dict[str, esft.Plan], memory: int) -> str:
    return next((way for way, plan in plans.items() if plan.peak <= memory * GB), "no")
