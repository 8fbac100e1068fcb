"""Expert-Specialized Fine-Tuning: train only the experts that a task uses (arXiv 2407.01906)."""

import esft.experts.transformers_backend  # noqa: F401 (importing it registers the "esft" experts backend of transformers)
from esft.adapters.load import load_adapter, set_adapter
from esft.adapters.merge import merge
from esft.adapters.save import save_adapter
from esft.errors import DiskError, DivergenceError, ESFTError, InputError
from esft.scoring.expert_scores import ExpertScores
from esft.scoring.score import score_experts
from esft.scoring.select import select_experts
from esft.selection import ExpertSelection
from esft.swapping.swap import swap, thaw, unswap
from esft.training.config import TrainConfig
from esft.training.loop import train

__all__ = [
    "DiskError",
    "DivergenceError",
    "ESFTError",
    "ExpertScores",
    "ExpertSelection",
    "InputError",
    "TrainConfig",
    "load_adapter",
    "merge",
    "save_adapter",
    "score_experts",
    "select_experts",
    "set_adapter",
    "swap",
    "thaw",
    "train",
    "unswap",
]
