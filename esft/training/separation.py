"""Whether a model keeps documents apart that lie in one row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from esft.errors import InputError, first_line
from esft.experts.model_state import once_per_model

_LENGTH = 12  # tokens of a document that is tried out


def check_separates(model: nn.Module) -> None:
    """Raise InputError for a model in which a document would see the one before it in its row.

    Documents are told apart by positions that begin anew. Attention heeds them where transformers makes its mask of
    them; what goes on from token to token (a state space, linear attention, a convolution) mostly does not. So it is
    tried out the first time, and kept on the model: with short rows, on a CPU in the attention that these have.
    """
    causal_lm: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    kind = causal_lm.config.get_text_config().model_type
    try:
        separates = _separates(causal_lm)
    except Exception as error:  # of a model that is called otherwise
        raise InputError(f"packing: a {kind} model takes no positions of documents ({first_line(error)})") from error
    if not separates:
        raise InputError(
            f"packing: the documents of a row would see each other in a {kind} model; leave out packing, padding_free"
        )


@once_per_model
def _separates(causal_lm: Any) -> bool:
    """Whether no gradient gets from a document to the one before it: exactly none, whatever rounding does.

    What has no gradient, as the choice of the tokens that are looked at, is seen by what comes out: it must not change
    with the document before by more than rounding, after which a router may have chosen otherwise for some tokens.
    """
    vocabulary = causal_lm.get_input_embeddings().weight.shape[0]
    ids = torch.arange(2 * _LENGTH, device=causal_lm.device)[None] * 7 % vocabulary
    other = torch.cat([ids[:, :_LENGTH].flip(1), ids[:, _LENGTH:]], dim=1)
    was_training = causal_lm.training
    causal_lm.eval()
    try:
        embedded, out = _run(causal_lm, ids)
        (gradient,) = torch.autograd.grad(out[:, _LENGTH:].square().sum(), embedded)
        if gradient[:, :_LENGTH].any() or not gradient[:, _LENGTH:].any():
            return False
        _, changed = _run(causal_lm, other)
    finally:
        causal_lm.train(was_training)
    apart = (out - changed)[:, _LENGTH:].float().norm(dim=-1) / out[:, _LENGTH:].float().norm(dim=-1)
    return bool(apart.median() < 0.05)


def _run(causal_lm: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Embeddings and last hidden states of two documents in a row."""
    embedded: list[Tensor] = []

    def keep(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[0]

    positions = torch.arange(_LENGTH, device=ids.device).repeat(2)[None]
    hook = causal_lm.get_input_embeddings().register_forward_hook(keep)
    try:
        with torch.enable_grad():
            out = causal_lm.base_model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
    finally:
        hook.remove()
    return embedded[0], out
