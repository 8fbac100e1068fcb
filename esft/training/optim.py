"""AdamW over fp32 masters of the trained tensors, whatever dtype the model computes in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from esft.errors import InputError
from esft.runs.config import TrainConfig

MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # what AdamW keeps of a tensor


class MasterAdamW:
    """Steps fp32 copies of the trained parameters and writes them back in the parameters' dtype.

    bf16 keeps 8 bits of a value: a step of 1e-5 on a weight of 0.05 would vanish without the copies. A parameter that
    is float32 already is its own master.

    Args:
        named: (name, parameter) of everything that trains; parameters without elements are passed over.
        config: betas, weight decay, largest gradient norm.
    """

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]], config: TrainConfig):
        self.params = {name: p for name, p in named if p.requires_grad and p.numel()}
        self.masters = {
            name: p if p.dtype == torch.float32 else p.detach().float().requires_grad_()
            for name, p in self.params.items()
        }
        self.clip = config.clip
        self.adam = torch.optim.AdamW(
            self.masters.values(),
            lr=0.0,
            betas=(config.beta1, config.beta2),
            weight_decay=config.weight_decay,
            fused=True,
        )

    def step(self, lr: float) -> float:
        """One update from the parameters' gradients, which it clears. Returns the gradient's norm before clipping."""
        for name, p in self.params.items():
            if self.masters[name] is not p:
                self.masters[name].grad = None if p.grad is None else p.grad.float()
                p.grad = None
        norm = torch.nn.utils.clip_grad_norm_(list(self.masters.values()), self.clip)
        for group in self.adam.param_groups:
            group["lr"] = lr
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        self._write_back()
        return float(norm)

    @torch.no_grad()
    def _write_back(self) -> None:
        for name, p in self.params.items():
            if self.masters[name] is not p:
                p.copy_(self.masters[name])

    def overflowed(self) -> str | None:
        """The first parameter that holds what is no finite number; None where all are."""
        return next((name for name, p in self.params.items() if not bool(p.isfinite().all())), None)

    def state(self) -> dict[str, Tensor]:
        """Masters and moments by name, to resume from."""
        tensors = {f"master/{name}": m.detach() for name, m in self.masters.items()}
        for name, master in self.masters.items():
            for key, value in self.adam.state.get(master, {}).items():
                tensors[f"{key}/{name}"] = value
        return tensors

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from ``state``. Raises InputError, and changes nothing, for tensors that are not those of one."""
        self._check_state(tensors)
        for name, master in self.masters.items():
            master.copy_(tensors[f"master/{name}"])
            if f"step/{name}" in tensors:
                self.adam.state[master] = {key: tensors[f"{key}/{name}"].to(master.device) for key in MOMENTS}
        self._write_back()

    def _check_state(self, tensors: Mapping[str, Tensor]) -> None:
        expected = {f"master/{name}": master.shape for name, master in self.masters.items()}
        for name, master in self.masters.items():
            if any(f"{key}/{name}" in tensors for key in MOMENTS):  # none before a parameter's first gradient
                expected |= {f"{key}/{name}": torch.Size() if key == "step" else master.shape for key in MOMENTS}
        if wrong := sorted(expected.keys() ^ tensors.keys()):
            raise InputError(f"tensor {wrong[0]} {'is missing' if wrong[0] in expected else 'is none that trains'}")
        for name, shape in expected.items():
            tensor = tensors[name]
            if tensor.shape != shape or tensor.dtype != torch.float32:
                raise InputError(f"tensor {name} is {tensor.dtype} {tuple(tensor.shape)}, not float32 {tuple(shape)}")
            if not tensor.isfinite().all():
                raise InputError(f"tensor {name} holds values that are not finite")
