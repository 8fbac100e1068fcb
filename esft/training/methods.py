"""The methods of fine-tuning: what each trains of a model, and what it leaves on disk.

A method is a class with what ``Method`` names, and its name in ``METHODS``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from esft.adapters.folder import write_manifest
from esft.adapters.save import write_adapter
from esft.errors import InputError
from esft.experts.model_state import Base
from esft.experts.moe_layers import moe_layers
from esft.experts.stock_layout import read_layout
from esft.runs.config import TrainConfig
from esft.runs.run_folder import ADAPTER, MODEL, RunFolder
from esft.selection import ExpertSelection
from esft.storage.files import write_json
from esft.storage.reading import read_json
from esft.swapping.swap import swap, unswap


class Method(Protocol):
    @staticmethod
    def prepare(model: PreTrainedModel, config: TrainConfig, selection: ExpertSelection | None) -> nn.Module:
        """The model with exactly what the method trains requiring gradients."""
        ...

    @staticmethod
    def save(model: Any, tokenizer: PreTrainedTokenizerBase, config: TrainConfig, base: Base, run: RunFolder) -> None:
        """Write what was trained into the run's folder."""
        ...


class ESFT:
    """The selected experts, and what else the selection names."""

    @staticmethod
    def prepare(model: PreTrainedModel, config: TrainConfig, selection: ExpertSelection | None) -> nn.Module:
        if selection is None:
            raise InputError("method esft needs expert selection")
        return _swap(model, config, selection)

    @staticmethod
    def save(model: Any, tokenizer: PreTrainedTokenizerBase, config: TrainConfig, base: Base, run: RunFolder) -> None:
        with run.outcome(ADAPTER) as folder:
            write_adapter(model, folder)


class Full:
    """Everything: every expert through the same kernels, and all the rest."""

    @staticmethod
    def prepare(model: PreTrainedModel, config: TrainConfig, selection: ExpertSelection | None) -> nn.Module:
        layers = moe_layers(model)
        everything = {layer.index: list(range(layer.num_experts)) for layer in layers}
        shared = any(layer.shared_experts for layer in layers)
        return _swap(model, config, ExpertSelection(everything, shared, non_expert_modules=True))

    @staticmethod
    def save(model: Any, tokenizer: PreTrainedTokenizerBase, config: TrainConfig, base: Base, run: RunFolder) -> None:
        with run.outcome(MODEL) as folder:
            unswap(model).save_pretrained(folder)
            tokenizer.save_pretrained(folder)


class LoRA:
    """Low-rank additions to every linear layer of the blocks and to all experts, through PEFT (arXiv 2106.09685)."""

    @staticmethod
    def prepare(model: PreTrainedModel, config: TrainConfig, selection: ExpertSelection | None) -> nn.Module:
        try:
            from peft import LoraConfig, get_peft_model
        except ModuleNotFoundError as error:
            raise InputError("method lora needs the peft package: pip install 'esft[lora]'") from error
        head = model.get_output_embeddings()
        lora = LoraConfig(
            r=config.lora_rank,
            lora_alpha=config.lora_alpha,
            target_modules=[n for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head],
            target_parameters=list(_stacked_projections(model)),
            task_type="CAUSAL_LM",
        )
        return get_peft_model(model, lora)

    @staticmethod
    def save(model: Any, tokenizer: PreTrainedTokenizerBase, config: TrainConfig, base: Base, run: RunFolder) -> None:
        with run.outcome(ADAPTER) as folder:
            model.save_pretrained(folder)
            config_file = folder / "adapter_config.json"
            written = read_json(config_file)
            # PEFT keeps the modules in a set, whose order is another one in every process.
            write_json(config_file, written | {"target_modules": sorted(written["target_modules"])})
            write_manifest(folder, base, {"lora_rank": config.lora_rank})


METHODS: dict[str, type[Method]] = {"esft": ESFT, "full": Full, "lora": LoRA}


def prepare(model: PreTrainedModel, config: TrainConfig, selection: ExpertSelection | None) -> nn.Module:
    """The model with exactly what ``config.method`` trains requiring gradients, and its layers recomputed if so set."""
    if config.recompute == "layers":
        try:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        except ValueError as error:
            raise InputError(f"recompute layers: {error}") from error
    return METHODS[config.method].prepare(model, config, selection)


def _swap(model: PreTrainedModel, config: TrainConfig, selection: ExpertSelection) -> PreTrainedModel:
    return swap(model, selection, config.backend, "frozen" if config.recompute == "frozen" else "none")


def _stacked_projections(model: PreTrainedModel) -> Iterator[str]:
    """The names of the stacked experts' two projections, which are no linear layers to PEFT."""
    for layer in moe_layers(model):
        if not isinstance(layer.experts, nn.ModuleList):
            for name in read_layout(layer.experts, layer.name).names[:2]:
                yield f"{layer.name}.{name}"
