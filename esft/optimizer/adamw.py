"""AdamW over the masters of the trained tensors, in pieces: a step makes no copy of a whole tensor.

On a GPU, where everything is bounded by memory traffic, a kernel steps master, parameter and moments in one pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from esft.errors import InputError
from esft.optimizer.masters import Master, master_type
from esft.optimizer.moments import BLOCK, MOMENTS, Moments
from esft.parallel.ranks import ALONE, Ranks
from esft.runs.config import TrainConfig

PIECE = 1 << 20  # elements that are stepped together, a multiple of the moments' block
GPU_PIECE = 1 << 23  # there launches for a small one take longer than what they do; 8-bit moments take 200 MB for it
_FROM_ZERO = ("step", "exp_avg_sq", "exp_avg_absmax", "exp_avg_sq_absmax")  # parts of a state that are never below
_EPSILON = 1e-6  # beside the norm when it is clipped, as in ``torch.nn.utils.clip_grad_norm_``


class MasterAdamW:
    """Steps the masters of the trained parameters, and the parameters with them.

    Args:
        named: (name, parameter) of everything that trains; parameters without elements are passed over.
        config: optimizer, betas, weight decay, largest gradient norm.
        dealt: the names of which this rank has only a part, some perhaps without elements; all else it has as the
            others do.
        ranks: that have the other parts. A step is collective where there are any.

    Raises InputError for moments in 8 bits whose blocks would hold elements of several experts that are dealt out.
    """

    def __init__(
        self,
        named: Iterable[tuple[str, nn.Parameter]],
        config: TrainConfig,
        dealt: Iterable[str] = (),
        ranks: Ranks = ALONE,
    ):
        self.params = {name: p for name, p in named if p.requires_grad and p.numel()}
        for name in self.params.keys() & set(dealt) if config.optimizer == "adamw_8bit" else ():
            if (count := self.params[name][0].numel()) % BLOCK:
                why = f"an expert has {count} elements, not a multiple of {BLOCK}"
                raise InputError(f"{name}: {why}: with optimizer adamw_8bit such cannot be dealt out")
        for p in self.params.values():
            p.data = p.data.contiguous()
        self.config, self.dealt, self.ranks = config, frozenset(dealt), ranks
        self.masters: dict[str, Master] = {name: master_type(p.dtype)(p) for name, p in self.params.items()}
        self.moments: dict[str, Moments] = {}  # none before a parameter's first gradient, and no step
        # Made now: among what a step makes and frees, they would keep an allocator from using that memory again.
        self._unused = {name: MOMENTS[config.optimizer](p.detach()) for name, p in self.params.items()}
        self.steps: dict[str, int] = {}
        self._buffers: dict[torch.device, Tensor] = {}

    @torch.no_grad()
    def step(self, lr: float) -> float:
        """One update from the parameters' gradients, which it clears. Returns the gradient's norm before clipping.

        Where that is no finite number nothing changes.
        """
        norms: dict[bool, list[Tensor]] = {False: [], True: []}
        for name, span in (part for group in self._groups() for part in group):
            gradient = self._gradient(name, span)
            norms[name in self.dealt].append(torch.linalg.vector_norm(gradient, dtype=torch.float32))
        norm = _norm(norms[False])
        if self.dealt:
            everywhere = self.ranks.sum(_norm(norms[True]).double().cpu().square()).sqrt()
            norm = _norm([norm, everywhere.to(norm)])
        if not math.isfinite(length := float(norm)):
            return length
        shrink = (self.config.clip / (norm + _EPSILON)).clamp(max=1.0)
        for name, p in self.params.items():
            if p.grad is not None:
                if name not in self.moments:
                    self._begin(name, 0)
                self.steps[name] += 1
        for group in self._groups():
            self._update(group, shrink, lr)
        return length

    def _begin(self, name: str, step: int) -> None:
        made = self._unused.pop(name, None) or MOMENTS[self.config.optimizer](self.params[name].detach())
        self.moments[name], self.steps[name] = made, step

    def _groups(self) -> Iterator[list[tuple[str, slice]]]:
        """All that has a gradient: names with spans of elements, at most a piece of one device together."""
        group, filled, device = [], 0, None
        for name, p in self.params.items():
            piece = _piece(p.device)
            for start in range(0, 0 if p.grad is None else p.numel(), piece):
                size = min(piece, p.numel() - start)
                if group and (filled + size > piece or p.device != device):
                    yield group
                    group, filled = [], 0
                group.append((name, slice(start, start + size)))
                filled, device = filled + size, p.device
        if group:
            yield group

    def _gradient(self, name: str, span: slice, buffer: Tensor | None = None) -> Tensor:
        """[n], as a step takes it. Where no kernel does, float32: the gradient's own memory, or the buffer, filled."""
        p = self.params[name]
        assert p.grad is not None
        gradient = p.grad.reshape(-1)[span]
        if gradient.dtype == torch.float32 or kernel_on(p.device):
            return gradient
        buffer = self._buffer(p.device)[0, : gradient.numel()] if buffer is None else buffer
        return buffer.copy_(gradient)

    def _buffer(self, device: torch.device) -> Tensor:
        if device not in self._buffers:
            size = min(_piece(device), sum(p.numel() for p in self.params.values()))
            self._buffers[device] = torch.empty(2, size, device=device)
        return self._buffers[device]

    def _update(self, group: list[tuple[str, slice]], shrink: Tensor, lr: float) -> None:
        device = self.params[group[0][0]].device
        config, shrink = self.config, shrink.to(device)
        settings = {
            "lr": lr, "beta1": config.beta1, "beta2": config.beta2, "weight_decay": config.weight_decay, "eps": 1e-8
        }  # fmt: skip
        if kernel := kernel_on(device):
            for name, span in group:
                moments = self.moments[name].read(span)
                weight, beside = self.masters[name].parts(span)
                kernel(weight, beside, self._gradient(name, span), *moments, shrink, self.steps[name], **settings)
                self.moments[name].write(span, *moments)
        else:
            self._update_by_passes(group, shrink, settings)
        for name, span in group:
            if span.stop == self.params[name].numel():
                self.params[name].grad = None

    def _update_by_passes(self, group: list[tuple[str, slice]], shrink: Tensor, settings: dict[str, float]) -> None:
        """What the kernel does, in PyTorch."""
        buffer, done, filled = self._buffer(shrink.device), [], 0
        for name, span in group:
            end = filled + span.stop - span.start
            first, second = buffer[:, filled:end]
            filled = end
            gradient = self._gradient(name, span, first).mul_(shrink)
            # A count for each piece, as the update counts on.
            count = torch.full((), self.steps[name] - 1.0, device=shrink.device)
            done.append((self.masters[name].read(span, second), gradient, *self.moments[name].read(span), count))
        masters, gradients, means, squares, counts = (list(column) for column in zip(*done, strict=True))
        adamw(masters, gradients, means, squares, [], counts, fused=True, amsgrad=False, maximize=False, **settings)
        for (name, span), (master, _, mean, square, _) in zip(group, done, strict=True):
            self.moments[name].write(span, mean, square)
            self.masters[name].write(span, master)

    def gradients_are_finite(self) -> bool:
        """Whether those that have been added up are numbers so far."""
        return all(bool(p.grad.isfinite().all()) for p in self.params.values() if p.grad is not None)

    def overflowed(self) -> str | None:
        """The first parameter that holds what is no finite number; None where all are."""
        return next((name for name, p in self.params.items() if not bool(p.isfinite().all())), None)

    def state(self) -> dict[str, Tensor]:
        """Masters and moments by name, to resume from; no copies."""
        tensors = {f"{part}/{name}": t for name, m in self.masters.items() for part, t in m.tensors().items()}
        for name, moments in self.moments.items():
            tensors[f"step/{name}"] = torch.tensor(float(self.steps[name]))
            tensors |= {f"{part}/{name}": t for part, t in moments.tensors().items()}
        return tensors

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from ``state``. Raises InputError, and changes nothing, for tensors that are not those of one."""
        self._check_state(tensors)
        self.moments.clear()
        self.steps.clear()
        for name, master in self.masters.items():
            master.load({part: tensors[f"{part}/{name}"] for part in self._master_parts(name, tensors)})
            if f"step/{name}" in tensors:
                self._begin(name, int(tensors[f"step/{name}"]))
                for part, tensor in self.moments[name].tensors().items():
                    tensor.copy_(tensors[f"{part}/{name}"])

    def _master_parts(self, name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the tensors should have of a master: its own parts, or the one of before there were others."""
        whole = {"master": torch.empty_like(self.params[name], dtype=torch.float32, device="meta")}
        return whole if f"master/{name}" in tensors else self.masters[name].tensors()

    def _check_state(self, tensors: Mapping[str, Tensor]) -> None:
        expected: dict[str, Tensor] = {}
        for name, p in self.params.items():
            parts = {"step": torch.empty((), device="meta")}
            parts |= MOMENTS[self.config.optimizer](torch.empty_like(p, device="meta")).tensors()
            if not any(f"{part}/{name}" in tensors for part in parts):
                parts = {}
            parts |= self._master_parts(name, tensors)
            expected |= {f"{part}/{name}": like for part, like in parts.items()}
        if wrong := sorted(expected.keys() ^ tensors.keys()):
            raise InputError(f"tensor {wrong[0]} {'is missing' if wrong[0] in expected else 'is none that trains'}")
        for name, like in expected.items():
            tensor = tensors[name]
            if tensor.shape != like.shape or tensor.dtype != like.dtype:
                found, wanted = (f"{str(t.dtype)[6:]} {tuple(t.shape)}" for t in (tensor, like))
                raise InputError(f"tensor {name} is {found}, not {wanted}")
            if not tensor.isfinite().all():
                raise InputError(f"tensor {name} holds values that are not finite")
            if name.partition("/")[0] in _FROM_ZERO and bool((tensor < 0).any()):
                raise InputError(f"tensor {name} holds values below zero")


@cache
def kernel_on(device: torch.device) -> Callable[..., None] | None:
    """``adamw_step`` of ``esft_kernels.adamw`` where it is for tensors of this device."""
    if device.type != "cuda" or not find_spec("triton"):
        return None
    return import_module("esft_kernels.adamw").adamw_step


def _piece(device: torch.device) -> int:
    return PIECE if device.type == "cpu" else GPU_PIECE


def _norm(norms: list[Tensor]) -> Tensor:
    """Of tensors that have these norms, together."""
    first = norms[0].device if norms else None
    return torch.linalg.vector_norm(torch.stack([each.to(first) for each in norms])) if norms else torch.zeros(())
