"""Expert-Specialized Fine-Tuning: train only the experts that a task uses (arXiv 2407.01906)."""

import sys
from types import ModuleType

import lazy_loader
import wrapt

# What the stub beside this file names is imported when it is first used: PyTorch takes seconds, and a command's help or
# a bad argument should not wait for it.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def _register(module: ModuleType) -> None:
    """Puts "esft" among transformers' experts backends, as soon as there are any models."""
    # What is of this package may be what imports transformers, and then is not whole yet.
    if (ours := sys.modules.get("esft.transformers_internals")) is None or ours is module:
        import esft.experts.transformers_backend  # noqa: F401


wrapt.when_imported("transformers.modeling_utils")(_register)
wrapt.when_imported("esft.transformers_internals")(_register)
