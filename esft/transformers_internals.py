"""What this project uses of transformers that its documentation does not promise: all of it, and nowhere else.

When a new version changes some of this, only this file has to follow it, and ``TRIED`` then names that version.
"""

from __future__ import annotations

import copy
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.chat_template_utils import render_jinja_template
from transformers.utils.hub import CHAT_TEMPLATE_DIR
from transformers.utils.logging import disable_progress_bar
from transformers.utils.quantization_config import QuantizationConfigMixin

TRIED = ("5.20.2", "5.23.0")  # the versions of transformers with which all tests have passed

__all__ = [
    "ALL_EXPERTS_FUNCTIONS",
    "CHAT_TEMPLATE_DIR",
    "disable_progress_bar",
    "eager_mask",
    "sdpa_attention_forward",
    "sdpa_mask",
]


# Chat templates.


def render_with_marks(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict], tools: list[dict] | None, variables: Mapping[str, Any]
) -> tuple[str, list[tuple[int, int]]]:
    """A conversation as the chat template renders it, and from where to where it marks characters as generated.

    As ``apply_chat_template`` with ``return_assistant_tokens_mask``, which returns tokens only.
    """
    rendered: Any = render_jinja_template(
        [[{name: value for name, value in message.items() if value is not None} for message in messages]],
        tools=tools,
        chat_template=tokenizer.get_chat_template(tools=tools),
        return_assistant_tokens_mask=True,
        **(tokenizer.special_tokens_map | dict(variables)),
    )
    (text,), (marks,) = rendered
    return text, marks


# Attention.


def plain_attention(module: nn.Module) -> Callable[..., Any] | None:
    """The attention in plain products that stands in a model's own file; None where there is none.

    It takes the module, query, key and value [B, heads, L, head size], what is added to the scores, and options.
    """
    return vars(sys.modules[type(module).__module__]).get("eager_attention_forward")


def has_fused_attention(model: PreTrainedModel) -> bool:
    """Whether a model's attention is PyTorch's fused one, and may be another: some models' code asks for its name, and
    computes something else where it does not know it."""
    if model.config._attn_implementation != "sdpa":
        return False
    try:
        code = inspect.getsource(sys.modules[type(model).__module__])
    except OSError:  # nobody knows
        return False
    return re.search(r"_attn_implementation\s*(==|!=|in\b|not in\b)", code) is None


# Models.


def whole_layers(model: nn.Module) -> list[nn.Module]:
    """The decoder layers of a model, each of which may be made again on its own; none where they are not marked so."""
    # Imported here: the experts backend is registered while transformers itself is still being imported.
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def recompute_layers_of(model: PreTrainedModel) -> None:
    """Let a model's layers be made again in the backward. Raises ValueError where they are not marked for it."""
    enable = getattr(model, "activation_checkpointing_enable", None)  # what later versions call it
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})


def names_not_saved(model: PreTrainedModel) -> list[str]:
    """Of tensors that ``save_pretrained`` leaves out, tied ones not among them."""
    return list(model._keys_to_ignore_on_save or ())


def without_weights(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """A model of this class from its configuration; its weights are made on the device that is set."""
    return model_class._from_config(config)


def base_name(model: PreTrainedModel) -> str:
    """The folder or hub id that the model was loaded from."""
    return model.config._name_or_path


def tied_names(model: PreTrainedModel) -> dict[str, str]:
    """The weights that are another one under a second name: that name -> the other one's."""
    return getattr(model, "all_tied_weights_keys", None) or {}


def has_peft_adapter(model: PreTrainedModel) -> bool:
    """Whether transformers itself has put PEFT's weights into the model."""
    return getattr(model, "_hf_peft_config_loaded", False)


def spread_by(model: PreTrainedModel) -> Any:
    """The ``DistributedConfig`` by which transformers has spread the model over ranks; None where it has not."""
    return getattr(model.config, "distributed_config", None)


def forget_spread(model: PreTrainedModel) -> None:
    """Let transformers not take the model for one that it has spread."""
    vars(model.config).pop("distributed_config", None)
    vars(model).pop("_is_distributed_loading_by_transformers", None)


def is_cut_up_whole(model: nn.Module) -> bool:
    """Whether transformers has cut all of the model up by FSDP2: then the model runs as a whole or not at all."""
    return getattr(model, "_is_fsdp_managed_module", False)


# Loading a model in parts, through the seam that transformers has for quantizers.


@register_quantization_config("esft")
class _InPart(QuantizationConfigMixin):
    """Has a function take out of the model, before any weight is read, what is not to be loaded."""

    def __init__(self, take_out: Callable[[PreTrainedModel], Iterable[str]] = lambda model: ()):
        self.quant_method, self.take_out = "esft", take_out  # pyright: ignore[reportAttributeAccessIssue]


@register_quantizer("esft")
class _Loader(HfQuantizer):
    @property
    def is_trainable(self) -> Any:
        return True

    def is_serializable(self) -> Any:
        return True

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        config: Any = self.quantization_config
        passed_over = {rf"^(.*\.)?{re.escape(path)}\." for path in config.take_out(model)} | {r"_scale_inv$"}
        known = model._keys_to_ignore_on_load_unexpected
        model._keys_to_ignore_on_load_unexpected = {*(known or ()), *passed_over}  # pyright: ignore

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        self.remove_quantization_config(model)
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                vars(module.config).pop("_is_quantized", None)
        return model


def load_in_part(
    model_class: Any,
    path: str,
    config: PreTrainedConfig,
    take_out: Callable[[PreTrainedModel], Iterable[str]],
    **kwargs: Any,
) -> Any:
    """``from_pretrained`` of a model from which ``take_out`` has taken modules before weights are read.

    Args:
        take_out: changes the model, which is on "meta" still, and returns the paths whose tensors are passed over.

    A quantization that the configuration names is not acted on: weights come as the files have them.
    """
    config = copy.deepcopy(config)
    for part in (config, config.get_text_config()):
        vars(part).pop("quantization_config", None)
    return model_class.from_pretrained(path, config=config, quantization_config=_InPart(take_out), **kwargs)


# Modules of stacked experts, as ``use_experts_implementation`` marks them.


def is_marked(experts: nn.Module) -> bool:
    return hasattr(experts, "is_transposed")


def is_transposed(experts: nn.Module) -> bool:
    """Whether the weights are [E, in, out]."""
    return getattr(experts, "is_transposed", False)


def has_gate(experts: nn.Module) -> bool:
    return getattr(experts, "has_gate", hasattr(experts, "gate_up_proj"))


def has_bias(experts: nn.Module) -> bool:
    return getattr(experts, "has_bias", False)


def between_projections(experts: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """The module's own function of the up projection's output; None where it has none."""
    return getattr(experts, "_apply_gate", None) if has_gate(experts) else getattr(experts, "act_fn", None)


def output_norm(experts: nn.Module) -> nn.Module | None:
    """What is applied to each expert's output."""
    return experts.get_submodule("post_expert_norm") if getattr(experts, "has_post_expert_norm", False) else None


def is_expert_parallel(experts: nn.Module) -> bool:
    """Whether other ranks hold some of the experts."""
    return getattr(experts, "_is_expert_parallel", False)


def number_of_experts(experts: nn.Module) -> int:
    """Of all ranks together: where transformers has spread them, the module's own number is this rank's."""
    return len(experts.down_proj) if is_expert_parallel(experts) else int(experts.num_experts)  # pyright: ignore


# The conversion between the original format of checkpoints and a model's own tensors.


def conversions(model: PreTrainedModel) -> list[Any]:
    """The conversions between the original format and the model.

    A loaded model remembers those that its files needed. Where these are the very ones that the model's own names set
    off, the files held the tensors as the model does, and the family's are the ones. So they are where weights in few
    bits were read: that cannot be turned back.
    """
    of_files = getattr(model, "_weight_conversions", None)
    of_family = get_model_conversion_mapping(model)
    renamings = [c for c in of_family if isinstance(c, WeightRenaming)]
    converters = [c for c in of_family if isinstance(c, WeightConverter)]
    for name in model.state_dict():
        rename_source_key(name, renamings, converters)
    of_names = [_patterns(c) for c in of_family if c.was_used()]
    reads_few_bits = any(hasattr(op, "hf_quantizer") for c in of_files or () for op in getattr(c, "operations", ()))
    if of_files is None or reads_few_bits or [_patterns(c) for c in of_files] == of_names:
        # As transformers does: whether files have a prefix is not known, and nobody saves by the legacy names.
        return [c for c in get_model_conversion_mapping(model, add_legacy=False) if not isinstance(c, PrefixChange)]
    return of_files


def _patterns(conversion: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return tuple(conversion.source_patterns), tuple(conversion.target_patterns)


def revert(model: PreTrainedModel, conversions: list[Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The checkpoint's tensors from some of the model's, by these conversions."""
    return revert_weight_conversion(_Original(model, conversions), tensors)


class _Original:
    """A model as ``revert_weight_conversion`` looks at it, with other conversions than it remembers."""

    def __init__(self, model: PreTrainedModel, conversions: list[Any]):
        self._model, self._weight_conversions = model, conversions

    def get_parameter(self, name: str) -> Tensor:
        """Of no shape: where a conversion transposes tensors unless they have the model's shape already, it does.

        A swapped model has no such parameter, and the original format is the one that differs from the model's.
        """
        return torch.empty(0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)
