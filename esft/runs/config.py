"""Settings of a training run: each is written once, with its type, default, range and help."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from esft.errors import InputError
from esft.runs.setting import check_setting, converted, setting
from esft.selection import ExpertSelection
from esft.storage.reading import check_keys, read_settings, shown

# Learning rates of the paper (appendix A); any other default would need a reason of its own.
PAPER_LR = {"esft": 1e-5, "full": 3e-5, "lora": 1e-4}
METHODS = tuple(PAPER_LR)
# As in ``esft_kernels``, which imports PyTorch: a command line is read without. A test compares.
BACKENDS = ("auto", "triton", "cpu", "cpu_packed", "reference")
OPTIMIZERS = ("adamw", "adamw_8bit")
RECOMPUTES = ("none", "frozen", "layers")
STRATEGIES = ("bfd", "wrapped")
FROZEN = ("auto", "bf16", "int8", "nf4", "nf4_double", "fp8", "mxfp4")
FROZEN_LINEAR = ("bf16", "int8", "nf4")
SHARDS = ("none", "frozen", "experts", "all")
DTYPES = ("auto", "bfloat16", "float32")
SCHEDULES = ("constant", "linear", "cosine")
# As ``esft.evaluation`` has them, which imports PyTorch, too.
SCORES = ("loss", "exact_match", "json_match", "choices", "chrf", "rouge_l")
MOST_STREAMED = 1 << 14  # records of a step
REPORTS = ("tensorboard", "wandb", "none")


@dataclass(frozen=True)
class TrainConfig:
    """How to train. The defaults are the paper's (section 4.1 and appendix A).

    Every field is a setting of the YAML file under its name, and an option of ``esft train``. Raises InputError naming
    the setting that is out of range.
    """

    method: str = setting("esft", "what trains: the selected experts, everything, or LoRA (PEFT)", choices=METHODS)
    lr: float | None = setting(None, "learning rate; where none is given, the paper's for the method", "[1e-30, 10]")
    steps: int = setting(500, "optimizer steps", "[1, inf)")
    batch_size: int = setting(32, "records of a step", "[1, inf)")
    micro_batch_size: int | None = setting(
        None,
        "records that go through the model together, gradients added up; none: the batch",
        "[1, inf)",
    )
    max_length: int | None = setting(
        None, "tokens of a record, longer ones are cut; where none is given, 4096 or the model's positions", "[1, inf)"
    )
    assistant_only_loss: bool = setting(True, "of conversations, the loss covers assistant turns alone")
    completion_only_loss: bool = setting(True, "of records with prompt and completion, it covers the completion alone")
    dataset_num_proc: int | None = setting(
        None, "processes that encode the data; none: this one, with a tokenizer that uses all cores", "[1, 1024]"
    )
    packing: bool = setting(False, "lay several records into each row of max_length tokens, and batch_size counts rows")
    packing_strategy: str = setting(
        "bfd",
        "bfd: whole records, into the row that they leave least room in; wrapped: end to end, cut where a row is full",
        choices=STRATEGIES,
    )
    padding_free: bool = setting(False, "the records that go through the model together are one row, without padding")
    eval_packing: bool | None = setting(None, "pack the evaluation data; where nothing is said, as packing")
    streaming: bool = setting(False, "read the data while training, where it exceeds the memory; then say the steps")
    warmup_steps: int = setting(0, "steps over which the learning rate rises linearly", "[0, inf)")
    warmup_ratio: float = setting(0.0, "the same as a share of all steps", "[0, 1)")
    lr_scheduler_type: str = setting(
        "constant",
        "the learning rate after that: as it is, or falling to zero, linearly or as a cosine",
        choices=SCHEDULES,
    )
    decay: float = setting(
        0.0, "where it is constant, share of the steps, at the end, over which it falls linearly to zero", "[0, 1]"
    )
    eval_every: int = setting(100, "steps between evaluations", "[1, inf)")
    eval_on_start: bool = setting(True, "evaluate before the first step, too")
    eval_metrics: str = setting("loss", f"what is measured of evaluation data, with commas: of {', '.join(SCORES)}")
    metric_for_best_model: str | None = setting(
        None, "what tells which step is best, as the metrics call it; none: the first of the first evaluation data"
    )
    greater_is_better: bool | None = setting(None, "of that figure; where nothing is said, of any but a loss")
    load_best_model_at_end: bool = setting(False, "keep what was best, not what came last")
    early_stopping_patience: int | None = setting(
        None, "end after so many evaluations in a row that are no better", "[1, inf)"
    )
    early_stopping_threshold: float = setting(0.0, "by how much one has to be better for that", "[0, inf)")
    report_to: str = setting(
        "tensorboard", "what shows the figures of the steps, beside metrics.jsonl", choices=REPORTS
    )
    save_every: int = setting(100, "steps between resumable checkpoints", "[1, inf)")
    optimizer: str = setting(
        "adamw",
        "AdamW over float32 masters, its moments in float32 or in 8 bits: 8 or 2 bytes a trained parameter",
        choices=OPTIMIZERS,
    )
    weight_decay: float = setting(0.1, "of AdamW, a share of the learning rate", "[0, 1000]")
    beta1: float = setting(0.9, "of AdamW, decay of the mean gradient a step", "[0, 1)")
    beta2: float = setting(0.95, "of AdamW, decay of the mean squared gradient a step", "[0, 1)")
    clip: float = setting(1.0, "largest norm of the whole gradient", "[1e-8, inf]")
    aux_loss: float = setting(
        0.0, "weight of the load-balancing loss, summed over layers; the router trains only where selected", "[0, 1000]"
    )
    kl_weight: float = setting(
        0.0,
        "weight of the KL divergence from the base on the tokens that --mix mixes in; 1: as much as their own loss",
        "[0, 1000]",
    )
    lora_rank: int = setting(8, "rank of LoRA's matrices", "[1, 65536]")
    lora_alpha: int = setting(16, "LoRA's scaling times its rank", "[1, 65536]")
    dtype: str = setting(
        "auto",
        "to compute in; auto: the checkpoint's, float32 on a CPU without bf16 arithmetic",
        choices=DTYPES,
    )
    frozen: str = setting(
        "auto",
        "what frozen experts are kept in; auto: as the checkpoint has them, bf16: in the dtype that is computed in",
        choices=FROZEN,
    )
    frozen_linear: str = setting(
        "bf16",
        "what other frozen linear layers and embeddings are kept in; bf16: in the dtype that is computed in",
        choices=FROZEN_LINEAR,
    )
    shard: str = setting(
        "none",
        "what several processes have a part of each; frozen: the weights that get no gradient; experts: all experts; "
        "all: all experts, and of the rest what gets no gradient",
        choices=SHARDS,
    )
    seed: int = setting(0, "of the data order, and of what a model or LoRA draws", "[0, 2**63)")
    backend: str = setting("auto", "of the experts", choices=BACKENDS)
    compile: bool = setting(False, "the layers by torch.compile, but for experts: minutes at first, then faster steps")
    recompute: str = setting(
        "none", "keep less for the backward and compute more: of the frozen experts, of all layers", choices=RECOMPUTES
    )

    def __post_init__(self):
        for each in fields(self):
            check_setting(each, getattr(self, each.name), each.name)
        _check_together(vars(self), {})

    @property
    def learning_rate(self) -> float:
        return PAPER_LR[self.method] if self.lr is None else self.lr

    @property
    def scores(self) -> list[str]:
        """The names of ``eval_metrics``."""
        return scores_named(self.eval_metrics, "eval_metrics")

    @property
    def chooses(self) -> str | None:
        """The setting by which evaluation data decides on the outcome; None where it does not."""
        names = ("load_best_model_at_end", "early_stopping_patience")
        return next((name for name in names if getattr(self, name)), None)

    @property
    def cuts_frozen(self) -> bool:
        """Whether several processes have a part each of what gets no gradient."""
        return self.shard in ("frozen", "all")

    @property
    def deals_experts(self) -> bool:
        """Whether several processes have some of every layer's experts each."""
        return self.shard in ("experts", "all")

    @classmethod
    def load(cls, path: str | Path | None, **overrides: Any) -> TrainConfig:
        """Settings of a YAML file (None for the defaults), overridden by the arguments that are not None.

        Raises InputError naming the file or the setting.
        """
        known = {each.name: each for each in fields(cls)}
        settings: dict[str, Any] = {}
        called: dict[str, str] = {}
        for name, (value, line) in (read_settings(path) if path is not None else {}).items():
            check_keys([name], known, lambda key, at=line: InputError(f"{path}: line {at}: no setting {key}"))
            settings[name] = converted(known[name], value, f"{path}: line {line}: {name}")
        for name, value in overrides.items():
            check_keys([name], known, lambda key: InputError(f"no setting {key}"))
            if value is not None:
                called[name] = f"--{name.replace('_', '-')}"
                settings[name] = converted(known[name], value, called[name])
        _check_together({name: each.default for name, each in known.items()} | settings, called)
        if settings.get("streaming") and "steps" not in settings:
            raise InputError(f"{called.get('streaming', 'streaming')} needs steps: a stream may have no end")
        return cls(**settings)

    def check_selection(self, selection: ExpertSelection | None) -> None:
        """Raise InputError unless the method has the expert selection that it needs, and no other."""
        if (self.method == "esft") != (selection is not None):
            raise InputError(f"method {self.method} {'needs' if selection is None else 'takes no'} expert selection")
        if selection is not None and selection.is_empty:
            raise InputError("the expert selection is empty: nothing would train")

    def check_resumes(self, begun: TrainConfig) -> None:
        """Raise InputError where a run begun with other settings cannot go on with these; only ``steps`` may differ."""
        for each in fields(self):
            mine, theirs = getattr(self, each.name), getattr(begun, each.name)
            if each.name != "steps" and mine != theirs:
                raise InputError(f"cannot resume with {each.name} {mine}: the run was begun with {theirs}")


def scores_named(text: str, where: str) -> list[str]:
    """The scores that a text names, with commas between. Raises InputError for others, and for one that comes twice."""
    names = [name.strip() for name in text.split(",")]
    for place, name in enumerate(names):
        if name not in SCORES or name in names[:place]:
            twice = " twice" if name in SCORES else ""
            raise InputError(f"{where} must be of {', '.join(SCORES)}, with commas, got {shown(name)}{twice}")
    return names


def _check_together(settings: Mapping[str, Any], called: Mapping[str, str]) -> None:
    """Raise InputError for two settings that contradict; ``called`` has other names that a user gave them."""
    micro, batch, aux, recompute, lr, decay = (
        called.get(name, name)
        for name in ("micro_batch_size", "batch_size", "aux_loss", "recompute", "lr", "weight_decay")
    )
    rate = PAPER_LR[settings["method"]] if settings["lr"] is None else settings["lr"]
    if rate * settings["weight_decay"] > 1:
        raise InputError(
            f"{lr} {rate} times {decay} {settings['weight_decay']} must be at most 1, a whole weight a step"
        )
    if settings["micro_batch_size"] is not None and settings["micro_batch_size"] > settings["batch_size"]:
        most = f"{batch} {settings['batch_size']}"
        raise InputError(f"{micro} must be at most {most}, got {settings['micro_batch_size']}")
    if settings["streaming"] and settings["batch_size"] > MOST_STREAMED:
        raise InputError(f"{batch} must be at most {MOST_STREAMED:,} with streaming: 32 batches are held")
    if settings["warmup_steps"] and settings["warmup_ratio"]:
        raise InputError(f"{called.get('warmup_steps', 'warmup_steps')} and warmup_ratio exclude each other")
    if settings["decay"] and (kind := settings["lr_scheduler_type"]) != "constant":
        raise InputError(f"{called.get('decay', 'decay')} goes with lr_scheduler_type constant, not with {kind}")
    scores_named(settings["eval_metrics"], called.get("eval_metrics", "eval_metrics"))
    if settings["aux_loss"] and settings["recompute"] == "layers":
        raise InputError(f"{aux} and {recompute} layers do not go together: the second pass routes again")
    if settings["aux_loss"] and settings["method"] == "lora":
        raise InputError(f"{aux} goes with the methods esft and full, not with lora")
    for name, besides in (("aux_loss", settings["aux_loss"]), ("shard", settings["shard"] != "none")):
        if settings["compile"] and besides:
            other = f"{called.get(name, name)} {settings[name]}"
            raise InputError(f"{called.get('compile', 'compile')} and {other} do not go together")
    if settings["compile"] and settings["method"] == "lora":
        raise InputError(f"{called.get('compile', 'compile')} goes with the methods esft and full, not with lora")
    for name in ("frozen", "frozen_linear", "shard"):
        if settings[name] not in ("auto", "bf16", "none") and settings["method"] != "esft":
            option, value = called.get(name, name), settings[name]
            raise InputError(f"{option} {value} goes with the method esft, not with {settings['method']}")
