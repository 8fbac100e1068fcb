"""Expert-Specialized Fine-Tuning: train only the experts that a task uses (arXiv 2407.01906)."""

import esft.interface  # noqa: F401 (importing it registers the "esft" experts backend of transformers)
from esft.adapter import save_adapter
from esft.config import TrainConfig
from esft.errors import InputError
from esft.merge import merge
from esft.score import ExpertScores, score_experts
from esft.select import ExpertSelection, select_experts
from esft.swap import swap, thaw, unswap
from esft.switch import load_adapter, set_adapter
from esft.train import train

__all__ = [
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
