"""How a stock experts module lays out its weights and what it computes between them: read off it, never guessed.

transformers' ``use_experts_implementation`` leaves flags on the module for the layout of its weights. What lies between
the projections is a function of its own in several families, so it is tried out: where the kernels have an activation
that gives the same values, it is that one.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any, get_args

import torch
from torch import Tensor, nn

from esft.errors import InputError
from esft.experts.plain_experts import PlainExperts
from esft.experts.pooled_experts import BF16, PROJECTIONS, Experts
from esft.parallel.experts import Deal
from esft.transformers_internals import (
    between_projections,
    has_bias,
    has_gate,
    is_marked,
    is_transposed,
    output_norm,
)
from esft_kernels.activation import Activation, Kind
from esft_kernels.pools import ExpertWeights

QUICK_GELU = 1.702  # z * sigmoid(1.702 z), a gelu to two digits (arXiv 1606.08415): the kernels' silu with a slope


@dataclass(frozen=True)
class Layout:
    """What ``Experts`` needs to know of a stock module.

    Attributes:
        names: the stock module's parameters, in the order of ``PROJECTIONS``; only two where it has no biases.
        transposed: whether they are [E, in, out].
        activation: what the kernels compute between the projections; None where they cannot.
        interleaved: whether gate and up columns take turns.
        gate: the stock module's own function between the projections.
        norm: applied to each expert's output, where there is one.
    """

    names: tuple[str, ...]
    transposed: bool
    activation: Activation | None
    interleaved: bool
    gate: Callable[[Tensor], Tensor]
    norm: nn.Module | None

    @property
    def is_fused(self) -> bool:
        return self.activation is not None and self.norm is None

    def weights(self, stock: nn.Module) -> ExpertWeights:
        """The stock module's weights as the kernels read them."""
        gate_up, down, *biases = (getattr(stock, name) for name in self.names)
        return ExpertWeights(*((gate_up.mT, down.mT) if self.transposed else (gate_up, down)), *biases)

    def swapped(
        self,
        stock: nn.Module,
        trained: list[int],
        backend: str = "auto",
        recompute: str = "none",
        frozen: str = BF16,
        device: torch.device | None = None,
        deal: Deal | None = None,
    ) -> Experts:
        """Our experts with copies of the stock module's weights; see ``Experts`` for the arguments."""
        weights = [getattr(stock, name) for name in self.names]
        biases = dict(zip(("gate_up_bias", "down_bias"), weights[2:], strict=False))
        common: dict[str, Any] = {"transposed": self.transposed, "frozen": frozen, "device": device, **biases}
        common["deal"] = deal
        if self.is_fused:
            common |= {"activation": self.activation, "interleaved": self.interleaved}
            experts = Experts(*weights[:2], trained, backend, recompute, **common)
        else:
            common |= {"gate": self.gate, "norm": self.norm}
            experts = PlainExperts(*weights[:2], trained, backend, recompute, **common)
        experts.stock_names = self.names
        return experts


def is_stacked(module: nn.Module) -> bool:
    """Whether a module holds stacked experts behind the seam ``(hidden_states, top_k_index, top_k_weights)``."""
    names = ("num_experts", "down_proj")
    if not all(hasattr(module, name) for name in names) or not (has_gate(module) or hasattr(module, "up_proj")):
        return False
    return len(inspect.signature(module.forward).parameters) == 3 or is_marked(module)


def stacked_weights(stock: nn.Module, name: str) -> dict[str, Tensor]:
    """A stock module's weights by its own names for them, in the order of ``PROJECTIONS``; ``name`` is for messages.

    Raises InputError where they are not floating-point stacks of the shapes that the module's flags promise.
    """
    gated, transposed = has_gate(stock), is_transposed(stock)
    up = PROJECTIONS[0] if gated else "up_proj"
    names = (up, "down_proj")
    if has_bias(stock):
        names += (f"{up}_bias", "down_proj_bias")
    weights = [_float_weight(stock, n, name) for n in names]
    e, f, d = weights[1].shape if transposed else (*weights[1].shape[:1], *weights[1].shape[:0:-1])
    g = 2 * f if gated else f
    wanted = [(e, d, g) if transposed else (e, g, d), tuple(weights[1].shape), (e, g), (e, d)]
    for n, weight, shape in zip(names, weights, wanted, strict=False):
        if tuple(weight.shape) != shape:
            raise InputError(f"{name}.{n}: has shape {tuple(weight.shape)}, not {shape} as {names[1]} has it")
    return dict(zip(names, weights, strict=True))


def read_layout(stock: nn.Module, name: str) -> Layout:
    """The layout of a stock module; ``name`` is for messages.

    Raises InputError for weights that ``stacked_weights`` does not take, and where a module without flags computes
    something else than its layout says.
    """
    gated, transposed = has_gate(stock), is_transposed(stock)
    weights = stacked_weights(stock, name)
    gate = between_projections(stock)
    if gate is None and hasattr(stock, "act_fn"):
        gate = _Gated(stock.act_fn)
    if gate is None:
        raise InputError(f"{name}: what these experts compute between their projections is not known")
    norm = output_norm(stock)
    activation, interleaved = recognise(gate, gated, stock) or (None, False)
    layout = Layout(tuple(weights), transposed, activation, interleaved, gate, norm)
    if not is_marked(stock) and not _computes_the_same(stock, layout, weights["down_proj"].shape[1]):
        raise InputError(f"{name}: {type(stock).__name__} computes something else than stacked experts do")
    return layout


def _float_weight(stock: nn.Module, parameter: str, name: str) -> Tensor:
    weight = getattr(stock, parameter, None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.element_size() < 2:
        kind = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise InputError(f"{name}.{parameter}: experts of {kind} are not supported, only floating-point tensors")
    return weight


class _Gated:
    """``act_fn(gate) * up`` for a module that has no such function of its own."""

    def __init__(self, act_fn: Callable[[Tensor], Tensor]):
        self.act_fn = act_fn

    def __call__(self, h: Tensor) -> Tensor:
        gate, up = h.chunk(2, dim=-1)
        return self.act_fn(gate) * up


def recognise(gate: Callable[[Tensor], Tensor], gated: bool, stock: nn.Module) -> tuple[Activation, bool] | None:
    """The kernels' activation that computes what ``gate`` does, and whether its columns are interleaved.

    None where there is none. Limits and slopes that are tried are the numbers that the module itself holds.
    """
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(96, 16, generator=generator, dtype=torch.float64)
    h *= torch.tensor([1.0, 10.0, 100.0, 10_000.0]).repeat_interleave(24)[:, None]
    try:
        wanted = gate(h.clone())
    except (RuntimeError, TypeError, ValueError, AttributeError):  # whatever it needs, the kernels do not give it
        return None
    for activation, interleaved in _candidates(gated, stock):
        parts = (h, None) if not gated else (h[:, 0::2], h[:, 1::2]) if interleaved else h.chunk(2, dim=-1)
        found = activation.forward(*parts)
        if wanted.shape == found.shape and torch.allclose(wanted.to(found.dtype), found, rtol=1e-5, atol=1e-6):
            return activation, interleaved
    return None


def _candidates(gated: bool, stock: nn.Module) -> Iterator[tuple[Activation, bool]]:
    held = {v for v in vars(stock).values() if type(v) in (int, float) and math.isfinite(v) and v > 0}
    slopes = (1.0, QUICK_GELU, *sorted(held - {1.0, QUICK_GELU}))
    limits = (None, *sorted(held)) if gated else (None,)
    for offset, interleaved, limit, kind in product(
        (0.0, 1.0) if gated else (0.0,), (False, True) if gated else (False,), limits, get_args(Kind)
    ):
        for slope in slopes if kind == "silu" else (1.0,):
            yield Activation(kind, gated, float(slope), None if limit is None else float(limit), offset), interleaved


@torch.no_grad()
def _computes_the_same(stock: nn.Module, layout: Layout, hidden_size: int) -> bool:
    """Whether a module without transformers' flags gives, for two tokens, what its weights give through our seam."""
    weight = getattr(stock, layout.names[1])
    if weight.is_meta:
        return True
    x = torch.randn(2, hidden_size, generator=torch.Generator().manual_seed(0)).to(weight)
    index = torch.arange(2, device=weight.device)[:, None] % weight.shape[0]
    routing_weights = torch.full((2, 1), 0.5, dtype=weight.dtype, device=weight.device)
    try:
        wanted = stock(x, index, routing_weights)
    except (RuntimeError, TypeError, ValueError, AttributeError):
        return False
    few = nn.Module()
    for name in layout.names:
        setattr(few, name, getattr(stock, name)[:2])
    found = layout.swapped(few, [], "reference")(x, index, routing_weights)
    eps = torch.finfo(weight.dtype).eps
    return bool((wanted - found).abs().max() <= 50 * eps * wanted.abs().max())
