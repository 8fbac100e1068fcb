"""What the options of a command name: its records, its encoder, its model and its adapter.

What is heavy to import is imported in the functions, after the checks that do without it; in `stages/` as well.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def source_of(text: str) -> Any:
    """The source of records that an option names, which is there."""
    from esft.data.sources import DataSource

    source = DataSource.of(text)
    source.check()
    return source


def encoder_for(args: argparse.Namespace) -> Any:
    """What makes tokens of records for ``--model``."""
    from esft.checkpoint.load import load_tokenizer
    from esft.checkpoint.source import Reach, open_config
    from esft.data.encoding import Encoder

    reach = Reach.of(open_config(args.model, args.trust_remote_code))
    length = reach.length(args.max_length)
    return Encoder(load_tokenizer(args.model, args.trust_remote_code), length, reach.vocabulary)


def adapter_of(args: argparse.Namespace) -> Path | None:
    from esft.adapters.load_any import adapter_folder

    return adapter_folder(args.adapter) if args.adapter is not None else None


def load_for(args: argparse.Namespace, adapter: Path | None) -> Any:
    from esft.adapters.load_any import load_with_adapter

    return load_with_adapter(
        args.model, adapter, args.frozen, args.dtype, args.backend, args.trust_remote_code, not args.quiet,
        args.frozen_linear,
    )  # fmt: skip
