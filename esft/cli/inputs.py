"""What the options of a command name: its records, its encoder, its model and its adapter.

What is heavy to import is imported in the functions, after the checks that do without it; in `stages/` as well.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from esft.errors import InputError

_NAMED = re.compile(r"([A-Za-z0-9][A-Za-z0-9_-]{0,63})=(.+)")


def source_of(text: str, measured: bool = True) -> Any:
    """The source of records that an option names, which is there; of those to train on it may have a weight."""
    from esft.data.sources import DataSource

    source = DataSource.measured(text) if measured else DataSource.of(text)
    source.check()
    return source


def named(texts: Sequence[str], option: str) -> dict[str, str]:
    """What an option names that may come several times, ``NAME=DATA``, by name: the empty one where only one comes.

    Raises InputError where of several one has no name, and for a name that comes twice.
    """
    found: dict[str, str] = {}
    for text in texts:
        name, given = "", text
        if (parts := _NAMED.fullmatch(text)) is not None and not Path(text).exists():
            name, given = parts.groups()
        if not name and len(texts) > 1:
            raise InputError(f"{option} {text}: of several, each needs a name: {option} NAME={text}")
        if name in found:
            raise InputError(f"{option} {text}: two have the name {name}")
        found[name] = given
    return found


def check_alike(encoder: Any, sources: Iterable[Any] = ()) -> None:
    """Raise RankError where another process of this one's job has other records, or makes other tokens of them."""
    from esft.parallel.join import current

    if current().size > 1:
        records = {source.name: source.digest() for source in sources}
        current().check_alike({"tokenizer or chat template": encoder.digest()} | records)


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
    """``--model`` with an adapter. Raises RankError where another process of this one's job has other weights."""
    from esft.adapters.load_any import load_with_adapter
    from esft.checkpoint.digest import sampled_digest
    from esft.parallel.join import current

    model = load_with_adapter(
        args.model, adapter, args.frozen, args.dtype, args.backend, args.trust_remote_code, not args.quiet,
        args.frozen_linear,
    )  # fmt: skip
    if current().size > 1:
        current().check_alike({"model or adapter": sampled_digest(model)})
    return model
