from .adapters.load import load_adapter, set_adapter
from .adapters.merge import merge
from .adapters.mixed import load_adapters
from .adapters.save import save_adapter
from .errors import DiskError, DivergenceError, ESFTError, InputError, OutOfMemory
from .planning.plan import Plan, plan
from .runs.config import TrainConfig
from .scoring.expert_scores import ExpertScores
from .scoring.score import score_experts
from .scoring.select import select_experts
from .selection import ExpertSelection
from .swapping.load import load
from .swapping.swap import swap, thaw, unswap
from .training.loop import train

__all__ = [
    "DiskError",
    "DivergenceError",
    "ESFTError",
    "ExpertScores",
    "ExpertSelection",
    "InputError",
    "OutOfMemory",
    "Plan",
    "TrainConfig",
    "load",
    "load_adapter",
    "load_adapters",
    "merge",
    "plan",
    "save_adapter",
    "score_experts",
    "select_experts",
    "set_adapter",
    "swap",
    "thaw",
    "train",
    "unswap",
]
