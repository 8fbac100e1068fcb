"""The loss of a model over what the labels cover: of a batch, and of a whole set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esft.data.batches import collate
from esft.data.examples import IGNORE, Example
from esft.evaluation.cross_entropy import linear_cross_entropy
from esft.experts.model_state import once_per_model
from esft.parallel.join import current
from esft.transformers_internals import is_cut_up_whole


def causal_lm_of(model: nn.Module) -> Any:
    """The transformers model inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def has_plain_head(model: nn.Module) -> bool:
    """Whether the logits are the last hidden states times the head's weight; some models scale, shift or cap them.

    Nor may the head be computed apart in a model that FSDP2 has cut up as a whole, as transformers does. Tried out on
    two tokens the first time, and kept on the model.
    """
    return _has_plain_head(causal_lm_of(model))


@once_per_model
@torch.no_grad()
def _has_plain_head(causal_lm: Any) -> bool:
    head = causal_lm.get_output_embeddings()
    if is_cut_up_whole(causal_lm):
        return False
    # What PEFT puts in the head's place is no Linear, and starts out as if it were plain.
    return isinstance(head, nn.Linear) and head.bias is None and _gives_products(causal_lm, head.weight)


def _gives_products(causal_lm: Any, weight_VD: Tensor) -> bool:
    """Whether a causal LM's logits are hidden states times this weight, also where they are large."""
    plain = torch.empty(0)

    def enlarge(module: nn.Module, args: tuple, output: Any) -> None:
        nonlocal plain
        hidden = output.last_hidden_state
        # A cap on small logits changes less than 16-bit rounding does; none leaves a thousand as it is.
        weight_DV = weight_VD.T.to(hidden.device)
        output.last_hidden_state = hidden * (1e3 / (hidden @ weight_DV).abs().max())
        plain = output.last_hidden_state @ weight_DV

    hook = causal_lm.base_model.register_forward_hook(enlarge)
    try:
        tokens = torch.arange(2, device=causal_lm.device)[None]
        logits = causal_lm(input_ids=tokens, use_cache=False).logits
    finally:
        hook.remove()
    tolerance = 8 * torch.finfo(logits.dtype).eps
    plain = plain.to(logits.device)
    return plain.shape == logits.shape and bool((plain - logits).abs().max() <= tolerance * plain.abs().max())


@dataclass(frozen=True)
class Predictions:
    """What a model predicts at the supervised positions of a batch, N of them.

    Attributes:
        hidden_ND: the last hidden states there; the logits [N, V] where ``weight_VD`` is None.
        weight_VD: what makes logits of them, where nothing else does.
        labels_N: int64, the tokens that come there.
    """

    hidden_ND: Tensor
    weight_VD: Tensor | None
    labels_N: Tensor

    @property
    def vocabulary(self) -> int:
        return self.hidden_ND.shape[1] if self.weight_VD is None else self.weight_VD.shape[0]

    def cross_entropy(self) -> Tensor:
        """Summed, in nats; never with more than one chunk of logits made of hidden states."""
        if self.weight_VD is None:
            return F.cross_entropy(self.hidden_ND.float(), self.labels_N, reduction="sum")
        return linear_cross_entropy(self.hidden_ND, self.weight_VD, self.labels_N)


def batch_loss(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
    """Summed cross entropy in nats over the supervised positions of a batch, and their number: see ``predictions``."""
    predicted = predictions(model, batch)
    return predicted.cross_entropy(), len(predicted.labels_N)


def predictions(model: nn.Module, batch: dict[str, Tensor]) -> Predictions:
    """What a model predicts at the supervised positions of a batch in the CPU's memory.

    No logits are made where the model has nothing but a matrix between hidden states and logits.
    """
    causal_lm = causal_lm_of(model)
    # Where documents share rows, transformers makes its mask of their positions, and of them only without another.
    apart = "position_ids" if "position_ids" in batch else "attention_mask"
    inputs = {name: batch[name].to(causal_lm.device) for name in ("input_ids", apart)}
    # The supervised positions are found on the CPU and sent ahead: afterwards, either would wait for the forward pass.
    labels = batch["labels"][:, 1:]
    wanted = torch.where(labels != IGNORE)
    if not has_plain_head(model):
        places = tuple(place.to(causal_lm.device) for place in wanted)
        logits = causal_lm(**inputs, use_cache=False).logits
        logits = logits[tuple(place.to(logits.device) for place in places)]
        return Predictions(logits, None, labels[wanted].to(logits.device))
    weight = causal_lm.get_output_embeddings().weight
    where = weight.device  # over several GPUs not every layer is where the inputs go
    labels, *places = (tensor.to(where) for tensor in (labels[wanted], *wanted))
    hidden = causal_lm.base_model(**inputs, use_cache=False).last_hidden_state
    hidden = hidden[tuple(place.to(hidden.device) for place in places)]
    return Predictions(hidden.to(where), weight, labels)


@torch.no_grad()
def mean_loss(model: nn.Module, examples: Sequence[Example], pad: int, batch_size: int = 32) -> float:
    """Mean cross entropy in nats over the supervised tokens of all examples. Leaves the model in evaluation mode.

    Collective in a job of several processes, which share the examples.
    """
    model.eval()
    ranks = current()
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].ids))
    total, count = 0.0, 0
    for part, _ in ranks.rounds(order, lambda i: len(examples[i].ids), batch_size):
        if part or ranks.lockstep:
            loss, targets = batch_loss(model, collate([examples[i] for i in part or order[:1]], pad))
            total, count = total + loss.item() * bool(part), count + targets * bool(part)
        ranks.progress()
    ranks.meet()
    total, count = ranks.totals(total, count)
    return total / max(count, 1)
