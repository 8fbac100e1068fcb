"""Options that several commands have."""

from __future__ import annotations

import argparse
import json
from dataclasses import fields
from typing import Any, TypeAlias

from esft.cli.arguments import count
from esft.runs.config import TrainConfig

DATA = "records: a file (JSONL, JSON, Parquet; compressed), a folder, or OWNER/NAME[/CONFIG][@SPLIT] of the hub"

Stages: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def add_stage(stages: Stages, name: str, text: str) -> argparse.ArgumentParser:
    return stages.add_parser(name, help=text, description=text)


def add_settings(parser: argparse.ArgumentParser, *names: str, **defaults: str) -> None:
    """Options for these settings of a training run, or for all: texts, which ``TrainConfig.load`` reads and checks.

    Args:
        defaults: what to say instead of the setting's own default, by its name.
    """
    for each in fields(TrainConfig):
        if not names or each.name in names:
            said = defaults.get(each.name, None if each.default is None else as_text(each.default))
            default = f" (default {said})" if said is not None else ""
            truth = "bool" in str(each.type)
            choices = ("true", "false") if truth else each.metadata["choices"]
            parser.add_argument(
                f"--{each.name.replace('_', '-')}",
                **({"nargs": "?", "const": "true"} if truth else {}),
                choices=choices or None,
                metavar=None if choices else "X",
                help=f"{each.metadata['text']}{default}".replace("%", "%%"),
            )


def as_text(value: Any) -> str:
    """A setting's value as a YAML file has it."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return str(value)


def add_trust(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run Python files that the checkpoint holds; read them first",
    )


def add_quiet(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--quiet", action="store_true", help="no bars, and no warnings of other libraries")


def add_model(sub: argparse.ArgumentParser, length: str) -> None:
    sub.add_argument("--model", required=True, help="checkpoint folder or hub id")
    add_settings(sub, "dtype", "backend", "frozen", "frozen_linear")
    sub.set_defaults(dtype="auto", backend="auto", frozen="auto", frozen_linear="bf16")
    text = f"{length} (default 4096, or the model's positions where these are fewer)"
    sub.add_argument("--max-length", type=count, metavar="TOKENS", help=text)
    add_trust(sub)
    add_quiet(sub)


def add_batch_size(sub: argparse.ArgumentParser, default: int) -> None:
    text = f"that go through the model together (default {default})"
    sub.add_argument("--batch-size", type=count, default=default, metavar="RECORDS", help=text)


def add_adapter(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--adapter", help="adapter folder, ESFT's or PEFT's, or that of a run which holds one")


def add_inference(sub: argparse.ArgumentParser, length: str) -> None:
    add_model(sub, length)
    add_batch_size(sub, 64)
    add_adapter(sub)
