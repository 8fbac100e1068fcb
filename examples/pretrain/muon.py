"""Muon for stacks of matrices, with fp32 master weights for a bf16 model.

Muon (K. Jordan et al., 2024, "Muon: An optimizer for hidden layers in neural networks") replaces the momentum of a
matrix by its nearest semi-orthogonal matrix. ``torch.optim.Muon`` takes 2-D parameters only; experts are stacked.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Quintic that drives every singular value in (0, 1] towards 1; values from the reference above.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalise(stack: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz iteration on the last two dimensions, [..., rows, columns] in bf16."""
    a, b, c = COEFFICIENTS
    x = stack.to(torch.bfloat16)
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide else x.mT


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised, scaled so that the update's root mean square does not depend on the shape.

    A parameter may carry ``muon_split``: the number of matrices stacked along its second-to-last dimension (2 for a
    fused gate and up projection). Arguments: ``lr`` is the step per element (RMS), ``momentum``, ``weight_decay``
    (decoupled).
    """

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                momentum = state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(momentum, group["momentum"])
                split = update.unflatten(-2, (getattr(p, "muon_split", 1), -1))
                update = orthogonalise(split).reshape_as(p).to(p.dtype)
                # A semi-orthogonal [r, c] matrix has an RMS of 1/sqrt(max(r, c)).
                scale = max(split.shape[-2:]) ** 0.5
                p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * scale)
