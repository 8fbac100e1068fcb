"""``esft`` among the models of lm-evaluation-harness: ``--model esft --model_args model=DIR,adapter=RUN``.

Versions of it that look for plugins find the class by the entry point of this package. With others, this module is the
command: ``python -m esft.evaluation.lm_harness --model esft ...`` takes what ``lm_eval`` takes.
"""

from __future__ import annotations

import sys
from typing import Any

from esft.adapters.load_any import load_with_adapter
from esft.checkpoint.load import load_tokenizer
from esft.errors import ESFTError
from esft.text import printable

_STATUS = 2  # of the command, after an error

try:
    from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]
    from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]
    from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]
except ModuleNotFoundError as error:
    if __name__ != "__main__" or "lm_eval" not in error.msg:
        raise
    print("esft: needs lm-evaluation-harness: pip install 'esft[harness]'", file=sys.stderr)
    sys.exit(_STATUS)


@register_model("esft")
class EsftLM(HFLM):
    """A model as ``esft eval`` loads it, with an adapter or without, for the tasks of the harness."""

    def __init__(
        self,
        model: str,
        adapter: str | None = None,
        frozen: str = "auto",
        dtype: str = "auto",
        backend: str = "auto",
        trust_remote_code: bool = False,
        **more: Any,
    ):
        """
        Args:
            model: checkpoint folder or hub id.
            adapter: its folder, or that of a run which holds one.
            frozen: what frozen experts are kept in, and ``dtype`` and ``backend``: see ``load_with_adapter``.
            trust_remote_code: whether Python files of the checkpoint may be run.
            more: what the harness's own class for transformers models takes beside a model: batch_size, max_length.

        Raises InputError as ``load_with_adapter`` does.
        """
        loaded = load_with_adapter(model, adapter, frozen, dtype, backend, trust_remote_code, False)
        tokenizer = load_tokenizer(model, trust_remote_code)
        super().__init__(pretrained=loaded, tokenizer=tokenizer, backend="causal", **more)


if __name__ == "__main__":
    try:
        cli_evaluate()
    except ESFTError as error:
        print(f"esft: {printable(str(error))}", file=sys.stderr)
        sys.exit(_STATUS)
