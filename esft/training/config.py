"""Settings of a training run."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from esft.errors import InputError
from esft.files import read_text
from esft_kernels.expert_mlp import BACKENDS, RECOMPUTE

METHODS = ("esft", "full", "lora")
RECOMPUTES = (*RECOMPUTE, "layers")
# Learning rates of the paper (appendix A); any other default would need a reason of its own.
PAPER_LR = {"esft": 1e-5, "full": 3e-5, "lora": 1e-4}


@dataclass(frozen=True)
class TrainConfig:
    """How to train. The defaults are the paper's (section 4.1 and appendix A).

    Attributes:
        method: "esft" (the selected experts), "full" (everything) or "lora" (rank-``lora_rank`` adapters through PEFT).
        lr: constant learning rate; None takes the paper's for the method.
        steps: optimizer steps.
        batch_size: records a step.
        micro_batch_size: records that go through the model together, their gradients added up over a step; None takes
            the whole batch. Less memory for smaller products.
        max_length: tokens of a record; longer ones are cut.
        warmup_steps: steps over which the learning rate rises linearly.
        decay: share of the steps, at the end, over which it falls linearly to zero; 0 keeps it constant.
        eval_every: steps between losses on the evaluation data.
        save_every: steps between resumable checkpoints.
        weight_decay, beta1, beta2: of AdamW.
        clip: largest norm of the whole gradient.
        aux_loss: weight of the load-balancing loss, summed over layers; the router itself trains only where selected.
        lora_rank, lora_alpha: LoRA's rank, and its scaling times the rank.
        dtype: "auto" (the checkpoint's; float32 on a CPU without bf16 arithmetic), "bfloat16" or "float32".
        seed: of the data order and of LoRA's initial weights.
        backend: of the experts, see ``esft.swap``.
        recompute: "none"; "frozen" to keep less of the experts for the backward, see ``esft.swap``; "layers" to keep
            the input of every layer only (gradient checkpointing), for a second forward pass.
    """

    method: str = "esft"
    lr: float | None = None
    steps: int = 500
    batch_size: int = 32
    micro_batch_size: int | None = None
    max_length: int = 4096
    warmup_steps: int = 0
    decay: float = 0.0
    eval_every: int = 100
    save_every: int = 100
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 1.0
    aux_loss: float = 0.0
    lora_rank: int = 8
    lora_alpha: int = 16
    dtype: str = "auto"
    seed: int = 0
    backend: str = "auto"
    recompute: str = "none"

    def __post_init__(self):
        if self.method not in METHODS:
            raise InputError(f"method must be one of {', '.join(METHODS)}, got {self.method!r}")
        if self.dtype not in ("auto", "bfloat16", "float32"):
            raise InputError(f"dtype must be auto, bfloat16 or float32, got {self.dtype!r}")
        for name in ("steps", "batch_size", "max_length", "eval_every", "save_every", "lora_rank", "lora_alpha"):
            if (value := getattr(self, name)) < 1:
                raise InputError(f"{name} must be at least 1, got {value}")
        if self.micro_batch_size is not None and not 1 <= self.micro_batch_size <= self.batch_size:
            raise InputError(f"micro_batch_size must be from 1 to batch_size, got {self.micro_batch_size}")
        if self.backend not in BACKENDS:
            raise InputError(f"backend must be one of {', '.join(BACKENDS)}, got {self.backend!r}")
        if self.recompute not in RECOMPUTES:
            raise InputError(f"recompute must be one of {', '.join(RECOMPUTES)}, got {self.recompute!r}")
        if self.lr is not None and not 0 < self.lr < math.inf:
            raise InputError(f"lr must be above 0 and finite, got {self.lr}")
        if not 0 <= self.decay <= 1:
            raise InputError(f"decay must be in [0, 1], got {self.decay}")
        for name in ("beta1", "beta2"):
            if not 0 <= (value := getattr(self, name)) < 1:
                raise InputError(f"{name} must be in [0, 1), got {value}")
        for name in ("weight_decay", "aux_loss"):
            if not 0 <= (value := getattr(self, name)) < math.inf:
                raise InputError(f"{name} must be at least 0 and finite, got {value}")
        if self.aux_loss and self.recompute == "layers":
            raise InputError("aux_loss and recompute layers do not go together: the second pass routes again")
        if self.aux_loss and self.method == "lora":
            raise InputError("aux_loss goes with the methods esft and full, not with lora")
        if not self.clip > 0:
            raise InputError(f"clip must be above 0, got {self.clip}")
        for name, top in (("warmup_steps", math.inf), ("seed", 2**63)):
            if not 0 <= (value := getattr(self, name)) < top:
                raise InputError(f"{name} must be at least 0 and below {top:g}, got {value}")

    @property
    def learning_rate(self) -> float:
        return PAPER_LR[self.method] if self.lr is None else self.lr

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        warm = min(1.0, (step + 1) / (self.warmup_steps + 1))
        fall = self.steps * self.decay
        return self.learning_rate * warm * (min(1.0, (self.steps - step) / fall) if fall else 1.0)

    @classmethod
    def load(cls, path: str | Path | None, **overrides: Any) -> TrainConfig:
        """Settings of a YAML file (None for the defaults), overridden by the arguments that are not None.

        Raises InputError naming the file or the setting.
        """
        values: dict[str, Any] = {}
        if path is not None:
            try:
                values = yaml.safe_load(read_text(path)) or {}
            except yaml.YAMLError as error:
                raise InputError(f"{path}: not YAML ({' '.join(str(error).split())})") from error
            if not isinstance(values, dict):
                raise InputError(f"{path}: not a mapping of settings")
        values |= {name: value for name, value in overrides.items() if value is not None}
        known = {f.name: f for f in fields(cls)}
        for name, value in values.items():
            if name not in known:
                raise InputError(f"{path or 'settings'}: no setting {name!r}; there are {', '.join(known)}")
            values[name] = _convert(name, value, str(known[name].type), path)
        return replace(cls(), **values)

    def save(self, path: str | Path) -> None:
        """Write a file that ``load`` reads."""
        Path(path).write_text(yaml.safe_dump(asdict(self), sort_keys=False), encoding="utf-8")

    def check_resumes(self, begun: TrainConfig) -> None:
        """Raise InputError where a run begun with other settings cannot go on with these; only ``steps`` may differ."""
        for field in fields(self):
            mine, theirs = getattr(self, field.name), getattr(begun, field.name)
            if field.name != "steps" and mine != theirs:
                raise InputError(f"cannot resume with {field.name} {mine}: the run was begun with {theirs}")


def _convert(name: str, value: Any, kind: str, path: str | Path | None) -> Any:
    """YAML reads 1e-5 as text; anything else of the wrong kind is an error."""
    try:
        if isinstance(value, bool):
            raise ValueError
        if value is None and "None" in kind:
            return None
        if "float" in kind:
            return float(value)
        if "int" in kind and int(value) != value:
            raise ValueError
        return int(value) if "int" in kind else str(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{path or 'settings'}: {name} must be {kind}, got {value!r}") from error
