"""Scoring experts by the gradient of their weights: how fast training them would lower the loss, to first order.

Two scores of an expert with the weights W, over batches of a task's records:

- ``fisher``: the mean over batches of |dW|^2, the squared norm of the gradient of a batch's mean loss (the diagonal of
  the empirical Fisher information, summed up; arXiv 1905.10650 prunes by it);
- ``fisher_rows``: the mean over batches of the sum over the expert's rows of |x|^2 |dH|^2 + |a|^2 |dY|^2. A row is one
  token's visit; its own part of the gradient is dH x^T of the up projection and dY a^T of the down projection, whose
  squared norms are these. No weight gradient is made, but rows that pull against each other do not cancel.

Only the outputs' gradients of the layers are asked of autograd. The rest is made here one expert after the other, so
all experts may be frozen, in few bits too, and no gradient of all experts is ever in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import ExitStack

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from esft.errors import InputError
from esft.experts.moe_layers import MoELayer, is_apart, moe_layers
from esft.experts.pooled_experts import Experts
from esft.parallel.join import current
from esft.parallel.ranks import Ranks
from esft.scoring.expert_scores import Scores
from esft.scoring.score import by_expert


def gradient_scores(
    model: PreTrainedModel,
    batches: Iterable[dict[str, Tensor]],
    loss: Callable[[nn.Module, dict[str, Tensor]], tuple[Tensor, int]],
    max_tokens: int = 131_072,
    progress: bool = False,
) -> tuple[Scores, Scores]:
    """The scores ``fisher`` and ``fisher_rows`` of every expert.

    Args:
        model: a swapped one, whatever of it trains; left as it was, without gradients.
        batches: what ``loss`` takes, with ``attention_mask`` [B, L]; each goes through the model at once.
        loss: of model and batch, the summed loss of its supervised tokens and their number.
        max_tokens: stop when the batches have had so many.
        progress: show a bar, in tokens.

    Raises InputError for a stock model, for experts in a ModuleList, for weights that are spread over processes, where
    no token was supervised, and for gradients that are no numbers. Collective in a job of several processes, which
    share the batches: all give the same ones.
    """
    if is_apart(model):  # its passes are collective, and batches are shared
        raise InputError("gradients are not scored of a model whose weights are spread over processes")
    ranks = current()
    sums = [_Sums(layer) for layer in moe_layers(model)]
    was_training, seen, count = model.training, 0, 0
    with ExitStack() as stack, tqdm(total=max_tokens, desc="gradients", disable=not progress, unit="token") as bar:
        stack.callback(model.train, was_training)
        model.eval()
        inputs: list[Tensor] = []  # of the first layer: the gradients' way goes down to them
        embeddings = model.get_input_embeddings()
        hooks = [embeddings.register_forward_hook(lambda _, args, out: inputs.append(out.requires_grad_()))]
        hooks += [each.layer.experts.register_forward_hook(each.on_experts, with_kwargs=True) for each in sums]
        for hook in hooks:
            stack.callback(hook.remove)
        for number, batch in enumerate(batches):
            if number % ranks.size == ranks.rank:
                inputs.clear()
                with torch.enable_grad():
                    total, targets = loss(model, batch)
                if targets:
                    torch.autograd.grad(total / targets, inputs, allow_unused=True)
                    count += 1
                ranks.progress()
            tokens = int(batch["attention_mask"].sum())
            seen += tokens
            bar.update(tokens)
            if seen >= max_tokens:
                break
    ranks.meet()
    count = int(ranks.totals(count)[0])
    for each in sums:
        each.add_up(ranks)
    if not count:
        raise InputError("no gradients to score: no token of the data is supervised")
    reached = {each.layer.index: each for each in sums if each.reached}  # without a tower that saw no token
    of_batches = {index: by_expert(each.of_batches_E / count) for index, each in reached.items()}
    return of_batches, {index: by_expert(each.of_rows_E / count) for index, each in reached.items()}


class _Sums:
    """Both scores of one layer's experts, summed over batches; float64 [E] in the CPU's memory."""

    def __init__(self, layer: MoELayer):
        if not isinstance(layer.experts, Experts):
            raise InputError(f"{layer.name}: gradients are scored of the experts of a swapped model")
        self.layer, self.experts, self.reached = layer, layer.experts, False
        self.of_batches_E = torch.zeros(layer.num_experts, dtype=torch.float64)
        self.of_rows_E = torch.zeros(layer.num_experts, dtype=torch.float64)

    def add_up(self, ranks: Ranks) -> None:
        """Over all ranks; collective."""
        reached_E = torch.full_like(self.of_rows_E, self.reached)
        summed = ranks.sum(torch.stack([self.of_batches_E, self.of_rows_E, reached_E]))
        self.of_batches_E, self.of_rows_E, self.reached = summed[0], summed[1], bool(summed[2].any())

    def on_experts(self, module: nn.Module, args: tuple, kwargs: dict, out_TD: Tensor) -> None:
        x_TD, index_TK, weights_TK = (each.detach() for each in (*args, *kwargs.values()))
        if out_TD.requires_grad:  # not above a tower that the embeddings do not reach
            out_TD.register_hook(lambda grad_TD: self.add(x_TD, index_TK, weights_TK, grad_TD))

    @torch.no_grad()
    def add(self, x_TD: Tensor, index_TK: Tensor, weights_TK: Tensor, grad_TD: Tensor) -> None:
        """A batch's part.

        Args:
            x_TD, index_TK, weights_TK: what the experts were called with.
            grad_TD: gradient of what they put out.
        """
        self.reached, kind = True, torch.promote_types(x_TD.dtype, torch.float32)
        for expert in index_TK.unique().tolist():
            token, slot = torch.where(index_TK == expert)
            grad_RD = grad_TD[token].to(kind) * weights_TK[token, slot, None]
            squares = self._squares(expert, x_TD[token].to(kind), grad_RD)
            of_batch, of_rows = (square.item() for square in squares)
            if not math.isfinite(of_batch + of_rows):
                raise InputError(f"layer {self.layer.index}: the gradient of expert {expert} is no finite number")
            self.of_batches_E[expert] += of_batch
            self.of_rows_E[expert] += of_rows

    def _squares(self, expert: int, x_RD: Tensor, grad_RD: Tensor) -> tuple[Tensor, Tensor]:
        """Squared norm of the gradient that an expert's rows give it together, and the sum of that of each row."""
        found, kind = self.experts.pools.at(self.experts.place[expert]), x_RD.dtype
        gate_up_GD, down_DF, bias_G, bias_D = (
            None if each is None else each.detach().to(kind)
            for each in (found.gate_up_EGD, found.down_EDF, found.gate_up_bias_EG, found.down_bias_ED)
        )
        norm = getattr(self.experts, "post_expert_norm", None)
        with torch.enable_grad():
            h_RG = F.linear(x_RD, gate_up_GD, bias_G).requires_grad_()
            a_RF = self.experts.activate(h_RG)
            y_RD = F.linear(a_RF, down_DF, bias_D)
            out_RD = y_RD if norm is None else norm(y_RD.to(found.down_EDF.dtype)).to(kind)
            grads = torch.autograd.grad(out_RD, (h_RG, y_RD), grad_RD)
        of_batch = of_rows = torch.zeros((), dtype=kind, device=x_RD.device)
        for grad, rows in zip(grads, (x_RD, a_RF.detach()), strict=True):
            ones = int(bias_D is not None)  # what a bias is multiplied with
            of_rows = of_rows + (grad.square().sum(dim=1) * (rows.square().sum(dim=1) + ones)).sum()
            of_batch = of_batch + (grad.T @ rows).square().sum() + ones * grad.sum(dim=0).square().sum()
        return of_batch, of_rows
