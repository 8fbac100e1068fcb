"""Courses of steps, by the kernel and without it, and what they have to agree in."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar
from unittest.mock import patch

import torch
from torch import Tensor, nn

from esft.optimizer import adamw
from esft.optimizer.adamw import MasterAdamW
from esft.runs.config import TrainConfig

T = TypeVar("T")


def by_kernel(run: Callable[..., T], *args) -> T:
    """What the call gives with the kernel, wherever it runs."""
    from esft_kernels.adamw import adamw_step

    # Nothing is copied to a buffer then.
    with patch.object(adamw, "kernel_on", lambda device: adamw_step), patch.object(MasterAdamW, "_buffer", None):
        return run(*args)


def by_passes(run: Callable[..., T], *args) -> T:
    """What the call gives without the kernel, wherever it runs."""
    with patch.object(adamw, "kernel_on", lambda device: None):
        return run(*args)


def course(
    config: TrainConfig,
    dtype: torch.dtype,
    size: tuple[int, int],
    steps: Iterable[int],
    state: dict[str, Tensor] | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """All that is left by steps with these numbers, on a CPU: from ones, or from what another course has left.

    Masters and moments, the parameters, and the gradients' norms. One parameter has the size, and gradients that do not
    lie as it does; one has a single element; and one has no gradient in step 1.
    """
    shapes = {"a": size, "b": (1,), "c": (2, 256)}
    named = [(name, nn.Parameter(torch.ones(shape, dtype=dtype, device=device))) for name, shape in shapes.items()]
    optimizer = MasterAdamW(named, config)
    if state is not None:
        optimizer.load_state({key: t for key, t in state.items() if not key.startswith(("parameter", "norm"))})
    norms = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for name, p in named:
            gradient = torch.randn(p.shape, generator=generator).to(device, dtype)
            if name != "c" or step != 1:
                p.grad = gradient.T.contiguous().T if name == "a" else gradient
        norms.append(optimizer.step(0.01))
        assert all(p.grad is None for _, p in named)
    left = optimizer.state() | {f"parameter/{name}": p.detach() for name, p in named} | {"norm": torch.tensor(norms)}
    return {key: t.cpu().clone() for key, t in left.items()}


def assert_alike(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """To eight units in the last place of each tensor's largest float32, and a parameter to its master.

    Moments in 8 bits may have gone to the next code where they lie in the middle of two, and masters after them.
    """
    assert found.keys() == expected.keys()
    in_codes = any("codes" in key for key in expected)
    found_masters, right_masters = masters(found), masters(expected)
    assert len(found_masters) == 3
    for name, master in found_masters.items():
        assert_most(master, right_masters[name], in_codes, name)
        parameter = found[f"parameter/{name}"]
        # It may have gone to either of two numbers.
        torch.testing.assert_close(parameter.float(), master, rtol=torch.finfo(parameter.dtype).eps / 2, atol=0)
    for key, right in expected.items():
        if key.startswith(("norm", "step", "exp_avg")):
            assert_most(found[key], right, in_codes, key)


def assert_most(found: Tensor, right: Tensor, in_codes: bool, what: str) -> None:
    far = (found.double() - right.double()).abs() > 8 * 2.0**-23 * right.double().abs().max()
    assert far.double().mean() <= (0.01 if in_codes else 0), f"{what}: {int(far.sum())} of {far.numel()} are off"


def masters(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Float32, by name."""
    found = {}
    for key in state:
        kind, _, name = key.partition("/")
        if kind == "master":
            found[name] = state[key]
        elif kind == "weight":
            high = state[key].view(torch.int16).int() << 16
            found[name] = (high + state[f"low_bits/{name}"]).view(torch.float32)
    return found
