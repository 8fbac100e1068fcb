"""A model's layers by ``torch.compile``, which fuses the many small operators around the experts."""

from __future__ import annotations

import torch
from torch import nn

from esft.errors import InputError
from esft.transformers_internals import whole_layers

BACKEND = "inductor"  # of torch.compile


def compile_layers(model: nn.Module) -> None:
    """Let the layers of a model be compiled, in place, when each is called for the first time; all names stay.

    They are compiled one by one: most are alike, and what was compiled for one serves the next. Experts stay an
    operator of their own (``esft_kernels/compiled_op.py``). Losses and gradients differ by rounding. Forward hooks that
    come later may go unseen.

    Raises InputError where nothing can be compiled, for want of a compiler for instance, and for a model without what
    transformers knows as layers.
    """
    if not (layers := whole_layers(model)):
        raise InputError(f"compile: {type(model).__name__} has no layers that could be compiled one by one")
    device = next(model.parameters()).device
    try:
        torch.compile(torch.sin, backend=BACKEND)(torch.ones(2, device=device))
    except RuntimeError as error:
        raise InputError(f"compile: torch.compile does not work here: {_reason(error)}") from error
    for layer in layers:
        layer.compile(backend=BACKEND, dynamic=True)  # rows of other lengths are no reason to compile again


def _reason(error: RuntimeError) -> str:
    """The line of a long message that names what went wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if "Error" in line or "compiler" in line), lines[0] if lines else repr(error))
