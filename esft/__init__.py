"""Expert-Specialized Fine-Tuning: train only the experts that a task uses (arXiv 2407.01906).

The public calls are those of ``esft.api``, which is imported when the first of them is used: PyTorch and transformers
take seconds, and the command's help and its complaints need neither.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from esft.api import *  # noqa: F403


class _Package(ModuleType):
    def __getattr__(self, name: str) -> Any:
        return getattr(import_module("esft.api"), name)

    def __setattr__(self, name: str, value: Any) -> None:
        # An imported submodule is bound here, but these three have the name of a call, and the name means the call.
        if not (isinstance(value, ModuleType) and name in ("merge", "swap", "train")):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
