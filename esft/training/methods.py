"""The methods of fine-tuning: what each trains of a model, and what it leaves on disk.

A method is a class with what ``Method`` names, and its name in ``METHODS``.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from esft.adapters.folder import write_manifest
from esft.adapters.lora import add_lora, require_peft
from esft.adapters.save import write_adapter
from esft.checkpoint.digest import model_base
from esft.checkpoint.load import load_model, load_skeleton
from esft.errors import InputError
from esft.experts.model_state import Base, swapped_state
from esft.experts.moe_layers import moe_layers
from esft.parallel.join import current
from esft.parallel.ranks import ALONE
from esft.runs.config import TrainConfig
from esft.runs.run_folder import ADAPTER, MODEL, RunFolder
from esft.selection import ExpertSelection
from esft.storage.files import write_json
from esft.storage.reading import read_json
from esft.swapping.load import load
from esft.swapping.swap import unswap
from esft.transformers_internals import recompute_layers_of


@dataclass(frozen=True)
class Source:
    """Where a model to train comes from.

    Attributes:
        path: checkpoint folder or hub id.
        trust_remote_code: whether Python files of the checkpoint may be run.
        progress: show a bar.
    """

    path: str
    trust_remote_code: bool = False
    progress: bool = False

    def stock(self, config: TrainConfig) -> PreTrainedModel:
        return load_model(self.path, config.dtype, self.trust_remote_code)

    def swapped(self, config: TrainConfig, selection: ExpertSelection) -> PreTrainedModel:
        recompute = "frozen" if config.recompute == "frozen" else "none"
        return load(
            self.path, selection, config.frozen, config.dtype, config.backend, recompute, self.trust_remote_code,
            self.progress, config.frozen_linear, current() if config.deals_experts else ALONE,
        )  # fmt: skip


class Method(Protocol):
    @staticmethod
    def prepare(source: Source, config: TrainConfig, selection: ExpertSelection | None) -> tuple[nn.Module, Base]:
        """A model with exactly what the method trains requiring gradients, and what it is trained from."""
        ...

    @staticmethod
    def save(
        model: Any, tokenizer: PreTrainedTokenizerBase, config: TrainConfig, base: Base, run: RunFolder | None
    ) -> None:
        """Write what was trained into the run's folder; None on ranks that only hand over what they hold."""
        ...


class ESFT:
    """The selected experts, and what else the selection names."""

    @staticmethod
    def prepare(source: Source, config: TrainConfig, selection: ExpertSelection | None) -> tuple[nn.Module, Base]:
        if selection is None:
            raise InputError("method esft needs expert selection")
        model = source.swapped(config, selection)
        return _recomputed(model, config), swapped_state(model).base

    @staticmethod
    def save(
        model: Any, tokenizer: PreTrainedTokenizerBase, config: TrainConfig, base: Base, run: RunFolder | None
    ) -> None:
        with nullcontext() if run is None else run.outcome(ADAPTER) as folder:
            write_adapter(model, folder)


class Full:
    """Everything: every expert through the same kernels, and all the rest."""

    @staticmethod
    def prepare(source: Source, config: TrainConfig, selection: ExpertSelection | None) -> tuple[nn.Module, Base]:
        layers = moe_layers(load_skeleton(source.path, source.trust_remote_code))
        everything = {layer.index: list(range(layer.num_experts)) for layer in layers}
        shared = any(layer.shared_experts for layer in layers)
        model = source.swapped(config, ExpertSelection(everything, shared, non_expert_modules=True))
        return _recomputed(model, config), swapped_state(model).base

    @staticmethod
    def save(
        model: Any, tokenizer: PreTrainedTokenizerBase, config: TrainConfig, base: Base, run: RunFolder | None
    ) -> None:
        if run is None:
            return
        with run.outcome(MODEL) as folder:
            unswap(model).save_pretrained(folder)
            tokenizer.save_pretrained(folder)


class LoRA:
    """Low-rank additions to every linear layer of the blocks and to all experts, through PEFT (arXiv 2106.09685)."""

    @staticmethod
    def prepare(source: Source, config: TrainConfig, selection: ExpertSelection | None) -> tuple[nn.Module, Base]:
        require_peft()  # before minutes of loading
        model = _recomputed(source.stock(config), config)
        base = model_base(model)
        return add_lora(model, config.lora_rank, config.lora_alpha), base

    @staticmethod
    def save(
        model: Any, tokenizer: PreTrainedTokenizerBase, config: TrainConfig, base: Base, run: RunFolder | None
    ) -> None:
        if run is None:
            return
        with run.outcome(ADAPTER) as folder:
            model.save_pretrained(folder)
            config_file = folder / "adapter_config.json"
            written = read_json(config_file)
            # PEFT keeps the modules in a set, whose order is another one in every process.
            write_json(config_file, written | {"target_modules": sorted(written["target_modules"])})
            write_manifest(folder, base, {"lora_rank": config.lora_rank}, {})


METHODS: dict[str, type[Method]] = {"esft": ESFT, "full": Full, "lora": LoRA}


def _recomputed(model: PreTrainedModel, config: TrainConfig) -> PreTrainedModel:
    """The model with its layers made again in the backward, if so set."""
    if config.recompute == "layers":
        try:
            recompute_layers_of(model)
        except ValueError as error:
            raise InputError(f"recompute layers: {error}") from error
    return model
