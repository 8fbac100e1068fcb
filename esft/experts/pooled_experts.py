"""A layer's routed experts in two pools: one that trains, and one that does not and may be in few bits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from esft.experts.model_state import MixedAdapters
from esft.parallel.experts import Deal, exchanged
from esft_kernels.activation import SWIGLU, Activation
from esft_kernels.compiled_op import routed_mlp
from esft_kernels.formats.format import Stored
from esft_kernels.formats.resolve import FORMATS, resolve_format
from esft_kernels.pools import ExpertPools, ExpertWeights, QuantizedWeights
from esft_kernels.routing import expert_order

PROJECTIONS = ("gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias")
BF16 = "bf16"  # a frozen pool that is in no format: its weights are those that are computed with
FROZEN = (BF16, *FORMATS)


class Experts(nn.Module):
    """The routed experts of one layer: a trained pool that gets gradients and a frozen pool that does not.

    Called like the experts submodule of a transformers model, ``experts(x_TD, top_k_index_TK, top_k_weights_TK)``.

    Args:
        gate_up: [E, G, D] gate and up projections, G = 2F; of experts without a gate the up projections, G = F.
        down: [E, D, F] down projections.
        trained: ids of the experts to train, in any order; they become the first rows of the trained pool.
        backend: one of ``esft_kernels.BACKENDS``.
        recompute: one of ``esft_kernels.RECOMPUTE``.
        gate_up_bias, down_bias: [E, G] and [E, D], both or neither.
        activation: what is computed between the projections.
        interleaved: whether the rows of ``gate_up`` are (gate, up) in turn; else all gates come before all ups.
        transposed: whether ``gate_up`` is [E, D, G] and ``down`` [E, F, D] instead; so they stay in plain pools.
        frozen: what the frozen pool is kept in, one of ``FROZEN``.
        deal: where other ranks hold some of the experts, which; ``trained`` are all ranks' then. The forward pass is
            collective.
        device: of the pools, if not that of the weights. Weights on "meta" only say what they are: with a device, the
            pools are left for ``write`` and ``write_stored`` to fill.

    The pools are copies; the arguments are left alone. Both pools are parameters (the frozen one with
    ``requires_grad=False``), so that sharding wrappers see all weights. Those of a format are kept as integers of the
    same bits, which ``model.to(dtype)`` leaves alone. Raises ValueError for a trained id that is repeated or out of
    range, and for a format that is not known or cannot hold the weights.
    """

    def __init__(
        self,
        gate_up: Tensor,
        down: Tensor,
        trained: Sequence[int] = (),
        backend: str = "auto",
        recompute: str = "none",
        *,
        gate_up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
        activation: Activation = SWIGLU,
        interleaved: bool = False,
        transposed: bool = False,
        frozen: str = BF16,
        device: torch.device | None = None,
        deal: Deal | None = None,
    ):
        super().__init__()
        order, trains = expert_order(list(trained), gate_up.shape[0]), len(trained) > 0
        if deal is not None:
            order, trained = list(deal.held), deal.trained[deal.rank]
        self.num_experts, self.deal = gate_up.shape[0], deal
        self.trained, self.backend, self.recompute = tuple(trained), backend, recompute
        self.activation, self.interleaved, self.transposed = activation, interleaved, transposed
        self.stock_names: tuple[str, ...] = ()  # what the module in whose place this is calls its parameters
        self.frozen, self.format = frozen, None if frozen == BF16 else resolve_format(frozen)
        # Of each expert, in the pools; past these where it is another rank's.
        places = {expert: place for place, expert in enumerate(order)}
        self.place = [places.get(expert, len(order)) for expert in range(self.num_experts)]
        self.mixed: MixedAdapters | None = None
        weights, device = (gate_up, down, gate_up_bias, down_bias), device or gate_up.device
        matrices = (gate_up.mT, down.mT) if transposed else (gate_up, down)
        s, r = len(self.trained), len(order) - len(self.trained)
        self.num_frozen = r
        self.stored = {  # of the frozen pool: the tensors of a projection, by their names in its format
            name: self.format.layout(r, *matrix.shape[1:]) if self.format else {}
            for name, matrix in zip(PROJECTIONS, matrices, strict=False)
        }
        for name, like in zip(PROJECTIONS, weights, strict=True):
            plain = None if like is None else Stored((s, *like.shape[1:]), like.dtype)
            # An empty pool that required a gradient would drag the backward through all layers below. Where another
            # rank's pool does, this one has to come along.
            self._add(f"trained_{name}", plain, device, trains)
            for part, stored in self.stored.get(name, {}).items():
                self._add(f"frozen_{name}_{part}", Stored(stored.shape, bits_of(stored.dtype)), device)
            if not self.stored.get(name):
                self._add(f"frozen_{name}", plain and Stored((r, *plain.shape[1:]), plain.dtype), device)
        self.register_buffer("position", torch.tensor(self.place, device=device), persistent=False)
        self.register_buffer("positions", None, persistent=False)  # [A, E], the base's and those of ``mixed``
        if not gate_up.is_meta:
            for expert in order:
                self.write(expert, [tensor[expert] for tensor in weights if tensor is not None])

    def _add(self, name: str, stored: Stored | None, device: torch.device, trains: bool = False) -> None:
        made = None if stored is None else torch.empty(stored.shape, dtype=stored.dtype, device=device)
        self.register_parameter(name, None if made is None else nn.Parameter(made, requires_grad=trains))

    @property
    def num_held(self) -> int:
        """How many experts are in the pools."""
        return len(self.trained) + self.num_frozen

    def holds(self, expert: int) -> bool:
        """Whether it is this rank that has the weights of an expert."""
        return self.place[expert] < self.num_held

    @property
    def pools(self) -> ExpertPools:
        trained = self._plain("trained")
        if self.format is None:
            return ExpertPools(trained, self._plain("frozen"), self.activation, self.interleaved)
        shape = (*trained.gate_up_EGD.shape[1:], trained.down_EDF.shape[2])
        stacks = (self._stored(name) for name in PROJECTIONS[:2])
        biases = (getattr(self, f"frozen_{name}") for name in PROJECTIONS[2:])
        frozen = QuantizedWeights(self.format.name, shape, *stacks, *biases)
        return ExpertPools(trained, frozen, self.activation, self.interleaved)

    def _plain(self, pool: str) -> ExpertWeights:
        gate_up, down, *biases = (getattr(self, f"{pool}_{name}") for name in PROJECTIONS)
        return ExpertWeights(*((gate_up.mT, down.mT) if self.transposed else (gate_up, down)), *biases)

    def _stored(self, name: str) -> tuple[Tensor, ...]:
        """The tensors that the frozen pool keeps a projection in."""
        return tuple(getattr(self, f"frozen_{name}_{part}").view(s.dtype) for part, s in self.stored[name].items())

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[T, D], expert ids [T, K], routing weights [T, K] -> [T, D]."""
        # Under autocast a norm hands on float32 where the weights are 16-bit, or the other way round.
        x_TD = hidden_states.to(self.trained_gate_up_proj.dtype)
        if self.deal is None:
            out_TD = self.compute(x_TD, top_k_index, top_k_weights)
        else:
            out_TD = exchanged(self.deal, self.compute, x_TD, top_k_index, top_k_weights, self.num_experts)
        return out_TD.to(hidden_states.dtype)

    def compute(self, x_TD: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """What the experts in the pools add to the output, in the dtype that these have."""
        adapter_T, pools = self.adapters_of(len(x_TD)), self.pools
        position = self.position if adapter_T is None else self.positions
        return routed_mlp(
            x_TD, top_k_index, top_k_weights, position, pools, self.backend, self.recompute, self.deal is not None,
            adapter_T,
        )  # fmt: skip

    def activate(self, h_NG: Tensor) -> Tensor:
        """What an expert computes between its projections, [N, G] -> [N, F]; differentiable."""
        return self.pools.activation.forward(*self.pools.split(h_NG))

    def adapters_of(self, tokens: int) -> Tensor | None:
        """Which of the adapters side by side every token has, [T]; None where all have the one that is set, or none."""
        if self.mixed is None or (adapter_T := self.mixed.of_tokens(tokens)) is None:
            return None
        return adapter_T.to(self.position.device)

    def hold(self, mixed: MixedAdapters | None, adapters: Sequence[Sequence[int]]) -> None:
        """Make the trained pool that of several adapters, one after the other, each with experts of its own.

        Args:
            mixed: which of them a batch's sequences have; None for none any more.
            adapters: the ids of the experts of each. Their weights are for ``write`` to fill, after ``show``.

        Only for experts that have all been frozen: those are the base's, and stay as they are.
        """
        base = torch.tensor(self.place, device=self.position.device) - len(self.trained)
        self.mixed, self.trained = mixed, tuple(expert for ids in adapters for expert in ids)
        s, rows, first = len(self.trained), [base + len(self.trained)], 0
        for ids in adapters:
            own = rows[0].clone()
            own[list(ids)] = torch.arange(first, first := first + len(ids), device=own.device)
            rows.append(own)
        self.positions = torch.stack(rows)
        self.show(0)
        for name in PROJECTIONS:  # last: where there is no memory for them, the rest is whole
            like = getattr(self, f"trained_{name}")
            plain = None if like is None else Stored((s, *like.shape[1:]), like.dtype)
            self._add(f"trained_{name}", plain, base.device, trains=s > 0)

    def show(self, number: int) -> None:
        """Let the experts be those of one of the adapters side by side, by its number; 0 is the base."""
        self.position = self.positions[number]
        self.place = self.position.tolist()

    def is_packed(self, expert: int) -> bool:
        """Whether an expert is in a format, and so has no weights that are tensors."""
        return self.format is not None and self.holds(expert) and self.place[expert] >= len(self.trained)

    def weights_of(self, expert: int) -> list[Tensor]:
        """One expert's weights in the order of ``PROJECTIONS``; only two where it has no biases.

        Detached views, but copies of what is in a format; and without values, on "meta", what other ranks hold, too.
        """
        place, s = self.place[expert], len(self.trained)
        cut_up = place >= s and any(hasattr(p, "device_mesh") for p in self.parameters())
        if cut_up or not self.holds(expert):  # reading it would be collective
            whole = (getattr(self, f"trained_{name}") for name in PROJECTIONS)
            return [torch.empty(p.shape[1:], dtype=p.dtype, device="meta") for p in whole if p is not None]
        if self.is_packed(expert):
            found = self.pools.at(place)
            matrices = (found.gate_up_EGD, found.down_EDF)
            biases = (getattr(self, f"frozen_{name}") for name in PROJECTIONS[2:])
            return [
                *(matrix.mT if self.transposed else matrix for matrix in matrices),
                *(bias[place - s] for bias in biases if bias is not None),
            ]
        pool, row = ("trained", place) if place < s else ("frozen", place - s)
        parts = [getattr(self, f"{pool}_{name}") for name in PROJECTIONS]
        return [part.detach()[row] for part in parts if part is not None]

    @torch.no_grad()
    def write(self, expert: int, weights: Sequence[Tensor]) -> None:
        """Put one expert's weights, as ``weights_of`` gives them, where they belong.

        Another rank's are passed over. Raises ValueError for weights that the frozen pool's format cannot hold.
        """
        for name, weight in zip(PROJECTIONS, weights, strict=False):
            self.write_one(expert, name, weight)

    @torch.no_grad()
    def write_one(self, expert: int, name: str, weight: Tensor) -> None:
        """``write`` of one of an expert's weights, by its name in ``PROJECTIONS``."""
        place, s = self.place[expert], len(self.trained)
        if not self.holds(expert):
            return
        if self.format is not None and place >= s and self.stored.get(name):
            matrix = (weight.mT if self.transposed else weight).to(self.position.device)
            self.write_stored(expert, name, [part[0] for part in self.format.quantize(matrix[None])])
            return
        pool, row = ("trained", place) if place < s else ("frozen", place - s)
        getattr(self, f"{pool}_{name}").detach()[row].copy_(weight)

    @torch.no_grad()
    def write_stored(self, expert: int, projection: str, parts: Sequence[Tensor]) -> None:
        """Put one packed expert's matrix, in tensors of the frozen pool's format, where it belongs."""
        for own, part in zip(self._stored(projection), parts, strict=True) if self.holds(expert) else ():
            own.detach()[self.place[expert] - len(self.trained)].copy_(part)

    def stacked(self) -> list[Tensor]:
        """Detached copies of all weights in expert-id order, laid out as they came in."""
        trained = [(name, getattr(self, f"trained_{name}")) for name in PROJECTIONS]
        return [self.in_order(p.detach(), self.frozen_stack(name)) for name, p in trained if p is not None]

    def frozen_stack(self, name: str) -> Tensor:
        """The frozen experts' weights of this name, detached, in the pool's order; read where they are in a format."""
        if not self.stored.get(name):
            return getattr(self, f"frozen_{name}").detach()
        which = PROJECTIONS.index(name)
        whole = self.trained_gate_up_proj.new_empty(self.num_frozen, *getattr(self, f"trained_{name}").shape[1:])
        for row in range(self.num_frozen):
            found = self.pools.at(len(self.trained) + row)
            matrix = (found.gate_up_EGD, found.down_EDF)[which]
            whole[row] = matrix.mT if self.transposed else matrix
        return whole

    def in_order(self, trained: Tensor, frozen: Tensor) -> Tensor:
        """The experts in two pools, [S, ...] and [R, ...], as one new tensor [E, ...] in expert-id order."""
        whole, s = trained.new_empty(self.num_experts, *trained.shape[1:]), len(self.trained)
        for expert, place in enumerate(self.place):
            whole[expert] = trained[place] if place < s else frozen[place - s]
        return whole

    def extra_repr(self) -> str:
        frozen = "" if self.format is None else f", frozen={self.frozen!r}"
        held = "" if self.deal is None else f", held={self.num_held}"
        return f"num_experts={self.num_experts}, trained={list(self.trained)}, backend={self.backend!r}{frozen}{held}"


def bits_of(dtype: torch.dtype) -> torch.dtype:
    """An integer type of as many bits."""
    return {1: torch.uint8, 4: torch.int32}[dtype.itemsize]
